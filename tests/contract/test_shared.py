"""Weights that all queries share: the pulls that move them, and their fit."""

import pytest
import torch
from contract.problems import NAN, Loss, batch, largest, make, run, same

import pile_fast
from pile_fast import PILELoss, pile_loss, reference, shared
from pile_fast.backends import load, select
from pile_fast.batch import PaddedView, RankingBatch
from pile_fast.functional import pile_loss_and_pulls
from pile_fast.options import ensemble_options

OPTIONS = [dict(), dict(pair_weight="gain_gap", margin=0.2, temperature=0.5), dict(normalize="none", pair_weight="label_gap")]


def expected(t, y, where, prior, options):
    """Pulls and label losses by the reference, in float64."""
    given = RankingBatch(teacher_logits=t.double(), labels=y, prior=prior, **where)
    view = PaddedView(given)
    settings = options._replace(granularity="query", iterations=0)
    found = reference.ensemble(view.pad(t.double()), view.labels(given), view.valid, settings, prior.double(), True)
    return found.pulls, torch.where(found.pulls.isnan().all(1), NAN, found.trace[:, 0])


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(map(str, options.values())) or "defaults")
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("n", [1, 5, 40, 150, 700])
def test_pulls(how, target, n, packed, options):
    if n > target.documents:
        pytest.skip("too long for this target")
    z, t, y, where = make(n, 4, 4, missing=0.3, unlabelled=0.2, masked=0.2, packed=packed)
    if not packed:
        y[0] = 1.0  # no pair
        t[1, :, 2] = NAN  # a teacher that scored nothing
    prior = torch.tensor([0.1, 0.0, 0.5, 0.4], dtype=torch.float64 if target.float64 else torch.float32)
    settings = ensemble_options(pairwise=how["pairwise"], **options)
    given = RankingBatch(student_logits=z, teacher_logits=t, labels=y, prior=prior, **where)
    backend = load(how["backend"])
    want, want_losses = expected(t, y, where, prior, settings)
    unit = max(1.0, largest(t)) if options.get("normalize") == "none" else 1.0
    pulls, losses = backend.pulls(given, settings)
    assert pulls.dtype == losses.dtype == torch.float32
    same(pulls.double(), want, rtol=1e-5, atol=2e-6 * unit**2)
    same(losses.double(), want_losses, rtol=1e-5, atol=4e-6 * unit)
    for alpha in (1.0, 0.5):  # in the same pass as the loss
        fixed = dict(alpha=alpha, iterations=0, pairwise=how["pairwise"], **options)
        loss, beside = pile_loss_and_pulls(
            z.clone().requires_grad_(), t, y, where.get("mask"), where.get("cu_seqlens"), prior, how["backend"], fixed
        )
        same(beside, pulls)
        assert not beside.requires_grad
        same(loss.detach(), pile_loss(z, t, y, prior=prior, backend=how["backend"], **fixed, **where))


def test_fixed_weights_are_the_weighted_mean(how):
    _, t, y = batch()
    prior = torch.tensor([3.0, 1.0, 0.0])
    out = pile_fast.pile_ensemble(t, y, prior=prior, iterations=0, normalize="none", return_weights=True, **how)
    same(out.logits, t[..., 0] * 0.75 + t[..., 1] * 0.25)
    same(out.weights, torch.tensor([0.75, 0.25, 0.0]))


def test_fixed_weights_take_no_pass_of_the_fit(how, monkeypatch):
    """They are the hot path: nothing is prepared that they do not use."""

    def called(*arguments):
        raise AssertionError("a pass over the pairs")

    backend = load(how["backend"])
    for name in ("pulls", "fit_shared"):
        monkeypatch.setattr(backend, name, called, raising=False)
    z, t, y = batch()
    prior = torch.tensor([0.5, 0.3, 0.2])
    assert pile_fast.pile_ensemble(t, y, prior=prior, iterations=0, return_weights=True, **how).logits.isfinite().all()
    assert pile_loss(z, t, y, prior=prior, iterations=0, **how).isfinite()


def test_the_smallest_weight_is_no_missing_score(how):
    t = torch.tensor([[[1.0, NAN], [0.0, 5.0], [NAN, 7.0]]])
    prior = torch.tensor([1.0, torch.finfo(torch.float32).tiny])
    out = pile_fast.pile_ensemble(t, torch.zeros(1, 3), prior=prior, iterations=0, normalize="none", **how)
    same(out.logits, torch.tensor([[1.0, 0.0, 7.0]]))


def test_unlabelled_queries_get_the_weights_of_the_labelled(how, target):
    _, t, y, _ = make(12, 6, 3)
    options = dict(iterations=min(40, target.iterations), return_weights=True, **how)
    few = pile_fast.pile_ensemble(t[:3], y[:3], **options)
    y[3:] = NAN
    out = pile_fast.pile_ensemble(t, y, **options)
    same(out.weights, few.weights)
    same(out.logits[:3], few.logits)
    weighted = pile_fast.pile_ensemble(t, y, prior=few.weights, iterations=0, **how)
    same(out.logits, weighted.logits)


def test_shrinkage_keeps_few_labels_near_the_mean(how, target):
    _, t, y, _ = make(12, 8, 3)
    y[1:] = NAN

    def distance(**options):
        iterations = min(40, target.iterations)
        weights = pile_fast.pile_ensemble(t, y, iterations=iterations, return_weights=True, **options, **how).weights
        return (weights - 1 / 3).abs().max()

    assert distance(shrinkage=100.0) < distance() < distance(shrinkage=0.0)


def test_a_wrong_teacher_loses_its_weight(how, target):
    _, t, y, _ = make(20, 12, 2)
    t = torch.cat([t, -t[..., :1]], -1)
    iterations = min(40, target.iterations)
    weights = pile_fast.pile_ensemble(t, y, iterations=iterations, return_weights=True, **how).weights
    assert weights[2] < 0.2 * weights[0]


def test_pile_loss_fits_its_batch(how, target):
    z, t, y, _ = make(12, 6, 3)
    iterations = min(40, target.iterations)
    weights = pile_fast.pile_ensemble(t, y, iterations=iterations, return_weights=True, **how).weights
    fitted = run(pile_loss, z, t, y, alpha=0.5, iterations=iterations, **how)
    for a, b in zip(fitted, run(pile_loss, z, t, y, alpha=0.5, iterations=0, prior=weights, **how), strict=True):
        same(a, b)


def test_steps_in_training_are_those_of_the_fit(how, target):
    """With the same batch again and again, and its number of labelled queries known."""
    z, t, y, _ = make(10, 5, 3)
    iterations = min(6, target.iterations)
    options = dict(iterations=iterations, **how)
    loss = PILELoss(labelled_queries=5, **options)
    for _ in range(iterations):
        loss(z, t, y)
    same(loss.weights, pile_fast.pile_ensemble(t, y, return_weights=True, **options).weights)


def test_pulls_add_up_in_a_fixed_order():
    pulls = torch.randn(3000, 4)
    pulls[torch.rand(3000) < 0.3] = NAN
    losses = torch.rand(3000)
    before = torch.get_num_threads()
    try:
        totals = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            totals.append(shared.totals(pulls, losses))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*totals)
    there = ~pulls.isnan().all(1)
    same(totals[0][:4], pulls.double().nansum(0))
    same(totals[0][4:], torch.tensor([*[there.sum()] * 5, losses[there].double().sum()], dtype=torch.float64))


@pytest.mark.needs("float64")
def test_the_fit_of_a_backend_is_the_loop_over_its_pulls(how):
    backend = load(how["backend"])
    if not hasattr(backend, "fit_shared"):
        pytest.skip("has no fit of its own")
    _, t, y, where = make(130, 9, 4, missing=0.2, unlabelled=0.2, packed=True)
    given = RankingBatch(teacher_logits=t, labels=y, prior=torch.tensor([1.0, 2.0, 0.0, 1.0]), **where)
    options = ensemble_options(pairwise=how["pairwise"])
    exponents, trace = backend.fit_shared(given, options, True)
    alone = type("Alone", (), {"pulls": staticmethod(backend.pulls)})
    by_loop, loop_trace = shared.fit(alone, given, options, True)
    same(exponents, by_loop)
    same(trace, loop_trace)


@pytest.mark.needs("host")
def test_the_fit_does_not_depend_on_threads(how):
    if how["backend"] != "cpp":
        pytest.skip("about the CPU kernels' threads")
    _, t, y, where = make(40, 300, 4, missing=0.1, packed=True)
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(pile_fast.pile_ensemble(t, y, return_weights=True, return_trace=True, **where, **how))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert torch.equal(found[0].weights, other.weights) and torch.equal(found[0].trace, other.trace)
        assert torch.equal(found[0].logits.nan_to_num(), other.logits.nan_to_num())


def test_auto_serves_shared_weights():
    z, t, y, _ = make(4)
    given = RankingBatch(student_logits=z, teacher_logits=t, labels=y)
    assert Loss("pile", pile_loss).call(z, t, y, backend=select("auto", given, ensemble_options(), None)).isfinite()
