"""`PILELoss` with state: the teachers' weights that all queries share, fitted before training or learned in it."""

import copy
import io
import os
import socket
import warnings

import pytest
import torch
import torch.multiprocessing as mp

import pile_fast
from pile_fast import PILELoss, pile_loss
from pile_fast.data.collator import FeatureCollator

OPTIONS = dict(iterations=12)


def data(queries=9, documents=14, seed=0):
    """Student, teachers (good, fair, noise, wrong), labels."""
    g = torch.Generator().manual_seed(seed)
    truth = torch.randn(queries, documents, 1, generator=g)
    t = truth * torch.tensor([1.0, 0.5, 0.0, -1.0]) + torch.randn(queries, documents, 4, generator=g)
    return torch.randn(queries, documents, generator=g), t, truth[..., 0].round().clamp(-1, 2)


def weights_of(t, y, **options):
    return pile_fast.pile_ensemble(t, y, return_weights=True, **OPTIONS | options).weights


def test_fit_gives_the_weights_of_one_batch_of_all_queries():
    z, t, y = data()
    loss = PILELoss(**OPTIONS).fit([(t[:4], y[:4]), (t[4:], y[4:])])
    torch.testing.assert_close(loss.weights, weights_of(t, y))
    assert loss.weights[0] > loss.weights[1] > loss.weights[2] > loss.weights[3]
    assert loss.labelled_queries == 9 and loss.fitted
    fixed = pile_loss(z, t, y, prior=loss.weights, iterations=0)
    for _ in range(2):  # in training mode, and they stay
        torch.testing.assert_close(loss(z, t, y), fixed)
    unlabelled = torch.full_like(y, torch.nan)
    torch.testing.assert_close(loss(z, t, unlabelled), fixed)


def test_what_a_loader_may_give():
    _, t, y = data()
    want = PILELoss(**OPTIONS).fit([(t, y)]).weights
    mask = torch.rand(9, 14, generator=torch.Generator().manual_seed(1)) < 0.8
    masked = PILELoss(**OPTIONS).fit([(t, y, mask)]).weights
    cu_seqlens = torch.nn.functional.pad(mask.sum(1).cumsum(0), (1, 0))
    as_mapping = {"teacher_logits": t[mask], "labels": y[mask], "cu_seqlens": cu_seqlens}
    rows = [
        {"features": torch.zeros(14, 2).tolist(), "labels": labels.tolist(), "teacher_logits": teachers.tolist()}
        for teachers, labels in zip(t, y, strict=True)
    ]
    collated = FeatureCollator()(rows)
    batches = {
        "a tuple": ([(t, y)], want),
        "integer labels": ([(t[:5], y[:5].int()), (t[5:], y[5:])], want),
        "a mask": ([(t, y, mask)], masked),
        "packed": ([as_mapping], masked),
        "packed, in a tuple": ([(t[mask], y[mask], None, cu_seqlens)], masked),
        "a collator's": ([collated], want),
        "unlabelled queries beside": ([(torch.cat([t, t]), torch.cat([y, torch.full_like(y, torch.nan)]))], want),
        "batches without labels": ([(t, None), (t, y), {"teacher_logits": t}], want),
        "queries of one label": ([(t, torch.ones_like(y)), (t, y)], want),
        "a generator": (((t[q : q + 1], y[q : q + 1]) for q in range(9)), want),
    }
    for name, (given, expected) in batches.items():
        torch.testing.assert_close(PILELoss(**OPTIONS).fit(given).weights, expected, msg=lambda m, name=name: f"{name}: {m}")


def test_what_fit_refuses():
    _, t, y = data()
    broken = y.clone()
    broken[3, 2] = torch.inf
    cases = [
        ([(t, y), (t[..., :2], y)], ValueError, "batch 2: teacher_logits: expected 4 teachers as before, got 2"),
        ([(t, y[:, :3])], ValueError, "batch 1: labels: expected"),
        ([t], TypeError, "batch 1: expected a mapping or"),
        ([{"labels": y}], TypeError, "batch 1: teacher_logits: expected a torch.Tensor, got None"),
        ([(t, broken)], ValueError, r"batch 1: labels: expected finite numbers, .* in query 3"),
    ]
    for batches, error, words in cases:
        with pytest.raises(error, match=words):
            PILELoss().fit(batches)
    for options in (dict(granularity="query"), dict(alpha=0.0), dict(iterations=0)):
        with pytest.raises(RuntimeError, match="PILELoss.fit: nothing to fit"):
            PILELoss(**options).fit([(t, y)])
    with pytest.raises(ValueError, match="labelled_queries: expected an int >= 1"):
        PILELoss(labelled_queries=0)
    with pytest.raises(ValueError, match="accumulation_steps: expected an int >= 1"):
        PILELoss(accumulation_steps=0)
    loss = PILELoss().fit([(t, y)])
    with pytest.raises(ValueError, match="teacher_logits: expected 4 teachers, whose weights this loss has, got 3"):
        loss(torch.zeros_like(y), t[..., :3], y)


def test_nothing_to_learn_from_is_said_and_leaves_the_mean():
    z, t, y = data()
    with pytest.warns(UserWarning, match="no query has two documents whose labels differ"):
        loss = PILELoss(**OPTIONS).fit([(t, torch.ones_like(y))])
    torch.testing.assert_close(loss(z, t, y), pile_loss(z, t, y, iterations=0))
    torch.testing.assert_close(loss.weights, torch.full((4,), 0.25))


def test_a_wrong_call_leaves_no_trace():
    z, t, y = data()
    loss = PILELoss()
    with pytest.raises(ValueError, match="student_logits: expected"):
        loss(t, z, y)
    with pytest.raises(ValueError, match="prior: expected"):
        PILELoss(prior=torch.ones(3))(z, t, y)
    assert loss(z, t, y).isfinite()


def test_eval_freezes_and_training_goes_on():
    z, t, y = data()
    loss = PILELoss().eval()
    torch.testing.assert_close(loss(z, t, y), pile_loss(z, t, y, iterations=0))
    assert loss.labelled_queries == 0
    loss.train()
    first = loss(z, t, y)
    torch.testing.assert_close(first, pile_loss(z, t, y, iterations=0))  # the step comes after the loss
    assert loss.weights[3] < 0.25 and loss.labelled_queries == 9
    kept = loss.weights.clone()
    loss.eval()(z, t, y)
    assert torch.equal(loss.weights, kept)
    loss.train()(z, t, y)
    assert not torch.equal(loss.weights, kept)


def test_without_labels_a_step_changes_nothing():
    z, t, y = data()
    loss = PILELoss()
    loss(z, t, y)
    kept = loss.weights.clone()
    loss(z, t, torch.full_like(y, torch.nan))
    assert torch.equal(loss.weights, kept) and loss.labelled_queries == 9


def test_labelled_queries_are_counted_in_the_first_epoch():
    z, t, y = data()
    loss = PILELoss()
    loss.set_epoch(0)
    for _ in range(2):
        loss(z, t, y)
    loss.set_epoch(1)
    loss(z, t, y)
    assert loss.labelled_queries == 18
    given = PILELoss(labelled_queries=100)
    given(z, t, y)
    assert given.labelled_queries == 100
    assert (given.weights - 0.25).abs().max() > 0.05


def test_accumulated_calls_take_one_step():
    z, t, y = data(8)
    whole, parts = PILELoss(labelled_queries=8), PILELoss(labelled_queries=8, accumulation_steps=2)
    for _ in range(3):
        whole(z, t, y)
        before = parts.weights.clone() if len(parts.weights) else torch.full((4,), 0.25)
        parts(z[:4], t[:4], y[:4])
        torch.testing.assert_close(parts.weights, before, rtol=0, atol=0)
        parts(z[4:], t[4:], y[4:])
        torch.testing.assert_close(parts.weights, whole.weights)


@pytest.mark.parametrize("fitted", [True, False])
def test_saved_and_loaded_it_goes_on(fitted):
    z, t, y = data()
    options = dict(accumulation_steps=2, alpha=0.5)
    loss = PILELoss(**options)
    if fitted:
        loss.fit([(t, y)])
    for _ in range(3):  # one call into a step
        loss(z, t, y)
    file = io.BytesIO()
    torch.save(loss.state_dict(), file)
    file.seek(0)
    resumed = PILELoss(**options)
    resumed.load_state_dict(torch.load(file))
    copied = copy.deepcopy(loss)
    for _ in range(2):
        values = [one(z, t, y) for one in (loss, resumed, copied)]
        assert torch.equal(values[0], values[1]) and torch.equal(values[0], values[2])
    assert torch.equal(loss.weights, resumed.weights) and loss.labelled_queries == resumed.labelled_queries
    assert bool(resumed.fitted) == fitted


def test_halves_do_not_round_the_weights():
    z, t, y = data()
    loss = PILELoss().fit([(t, y)])
    kept = loss.weights.clone()
    for cast in (torch.float16, torch.bfloat16, torch.float64):
        loss.to(cast)
        assert loss.weights.dtype == torch.float32 and torch.equal(loss.weights, kept)
    assert loss(z.bfloat16(), t.bfloat16(), y).isfinite()


def test_prior_is_where_they_start():
    z, t, y = data()
    prior = torch.tensor([1.0, 2.0, 0.0, 1.0])
    loss = PILELoss(prior=prior, **OPTIONS)
    torch.testing.assert_close(loss.eval()(z, t, y), pile_loss(z, t, y, prior=prior, iterations=0))
    loss.fit([(t, y)])
    torch.testing.assert_close(loss.weights, weights_of(t, y, prior=prior))
    assert loss.weights[2] == 0


@pytest.mark.parametrize("fitted", [True, False])
def test_compiles_as_one_graph(fitted):
    z, t, y = data()
    torch._dynamo.reset()
    eager, inside = PILELoss(labelled_queries=9), PILELoss(labelled_queries=9)
    if fitted:
        eager.fit([(t, y)])
        inside.fit([(t, y)])
    compiled = torch.compile(inside, fullgraph=True, backend="aot_eager")
    for _ in range(3):
        a, b = z.clone().requires_grad_(), z.clone().requires_grad_()
        want, got = eager(a, t, y), compiled(b, t, y)
        want.backward()
        got.backward()
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(b.grad, a.grad)
    torch.testing.assert_close(inside.weights, eager.weights)


def test_other_granularities_keep_no_weights():
    z, t, y = data()
    loss = PILELoss(granularity="document")
    torch.testing.assert_close(loss(z, t, y), pile_loss(z, t, y, granularity="document"))
    assert len(loss.weights) == 0


def _process(rank, port, folder):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    z, t, y = data(8)
    own = slice(0, 5) if rank == 0 else slice(5, 8)  # shares of unlike size
    steps = PILELoss(labelled_queries=8)
    for _ in range(4):
        steps(z[own], t[own], y[own])
    shares = PILELoss(**OPTIONS).fit([(t[own], y[own])])
    whole = PILELoss(**OPTIONS).fit([(t, y)], sharded=False)
    compiled = torch.compile(PILELoss(labelled_queries=8), fullgraph=True, backend="aot_eager")
    for _ in range(4):
        compiled(z[own], t[own], y[own])
    found = {"steps": steps.weights, "shares": shares.weights, "whole": whole.weights, "compiled": compiled.weights}
    torch.save(found, folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_have_the_weights_of_one(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # Forked: a spawned process could not import this file.
    mp.start_processes(_process, (port, tmp_path), nprocs=2, start_method="fork")
    one, two = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert all(torch.equal(one[name], two[name]) for name in one)
    z, t, y = data(8)
    alone = PILELoss(labelled_queries=8)
    for _ in range(4):
        alone(z, t, y)
    torch.testing.assert_close(one["steps"], alone.weights)
    torch.testing.assert_close(one["compiled"], alone.weights)
    for name in ("shares", "whole"):
        torch.testing.assert_close(one[name], weights_of(t, y))
