"""The properties of the ensemble."""

import pytest
import torch
from contract.problems import batch, run, same

import pile_fast
from pile_fast import terms


def zscore(t):
    return (t - t.mean(1, keepdim=True)) / t.std(1, keepdim=True, correction=0)


def test_of_little(ensemble, granularity, shape_of_nothing):
    q, n = shape_of_nothing
    out = ensemble(torch.randn(q, n, 3), torch.zeros(q, n), granularity=granularity, iterations=2, return_trace=True)
    assert out.logits.shape == (q, n) and out.trace.shape == ((3,) if granularity == "shared" else (q, 3))
    assert (out.logits == 0).all()  # zscore of one document
    assert out.weights.shape == {"shared": (3,), "document": (q, n, 3), "query": (q, 3)}[granularity]
    assert out.trace.isfinite().all() and out.weights.isfinite().all()


def test_no_iterations_is_the_mean(ensemble, granularity):
    _, t, y = batch()
    out = ensemble(t, y, granularity=granularity, iterations=0)
    same(out.logits, zscore(t).mean(-1))
    same(out.weights, torch.full_like(out.weights, 1 / 3))


def test_prior(ensemble, granularity):
    _, t, y = batch()
    prior = torch.tensor([2.0, 1.0, 1.0])
    out = ensemble(t, y, granularity=granularity, iterations=0, prior=prior)
    same(out.weights, (prior / 4).expand_as(out.weights))
    if granularity == "shared":
        with pytest.raises(
            ValueError, match=r"prior: expected \(M,\) = \(3,\) for weights that all queries share, got \(3, 3\)"
        ):
            ensemble(t, y, granularity=granularity, prior=prior.expand(3, 3))
    else:
        each = ensemble(t, y, granularity=granularity, prior=prior.expand(3, 3))
        same(each.logits, ensemble(t, y, granularity=granularity, prior=prior).logits)
    dropped = ensemble(t, y, granularity=granularity, prior=torch.tensor([1.0, 0.0, 1.0]))
    same(dropped.logits, ensemble(t[..., [0, 2]], y, granularity=granularity).logits)
    assert (dropped.weights[..., 1] == 0).all()


def test_weights_are_on_the_simplex_and_give_the_logits(ensemble, granularity):
    _, t, y = batch()
    t[torch.rand(t.shape) < 0.3] = torch.nan
    out = ensemble(t, y, granularity=granularity, normalize="none")
    assert (out.weights >= 0).all()
    if granularity == "document":
        scored = ~out.logits.isnan()
        same(out.weights.sum(-1), scored.float())
        assert (out.weights[t.isnan()] == 0).all()
        same((out.weights * t.nan_to_num()).sum(-1)[scored], out.logits[scored])
    else:
        same(out.weights.sum(-1), torch.ones(() if granularity == "shared" else 3))


def test_between_lowest_and_highest_teacher(ensemble, how, granularity, target):
    _, t, y = batch(4, target.documents)
    out = ensemble(t, y, granularity=granularity, normalize="none", iterations=target.iterations, step_size=10.0).logits
    rounding = 1e-6 if how["backend"] == "torch" else 0.0
    assert (out >= t.amin(-1) - rounding).all() and (out <= t.amax(-1) + rounding).all()


def test_permuting_teachers_permutes_weights(ensemble, granularity):
    _, t, y = batch()
    order = [2, 0, 1]
    a, b = ensemble(t, y, granularity=granularity), ensemble(t[..., order], y, granularity=granularity)
    same(a.logits, b.logits)
    same(a.weights[..., order], b.weights)


def test_permuting_documents(ensemble, granularity):
    _, t, y = batch()
    order = torch.randperm(21)
    a, b = ensemble(t, y, granularity=granularity), ensemble(t[:, order], y[:, order], granularity=granularity)
    same(a.logits[:, order], b.logits)


def test_missing_teacher_equals_dropped(ensemble, granularity):
    _, t, y = batch()
    gone = t.clone()
    gone[..., 1] = torch.nan
    a, b = ensemble(gone, y, granularity=granularity), ensemble(t[..., [0, 2]], y, granularity=granularity)
    same(a.logits, b.logits)
    kept = a.weights[..., [0, 2]]  # beside what "shared" keeps for a teacher of which it knows nothing
    same(kept / kept.sum(-1, keepdim=True) if granularity == "shared" else kept, b.weights)


def test_missing_document_equals_dropped(ensemble, granularity):
    _, t, y = batch()
    t[:, 5] = torch.nan
    rest = [i for i in range(21) if i != 5]
    out = ensemble(t, y, granularity=granularity).logits
    assert out[:, 5].isnan().all()
    same(out[:, rest], ensemble(t[:, rest], y[:, rest], granularity=granularity).logits)


def test_unlabelled_document_keeps_the_mean(ensemble):
    _, t, y = batch()
    y = y.float()
    y[:, 3] = torch.nan
    out, mean = ensemble(t, y, granularity="document"), ensemble(t, y, iterations=0)
    same(out.logits[:, 3], mean.logits[:, 3])
    assert (out.logits[:, 4] - mean.logits[:, 4]).abs().max() > 1e-3


def test_equal_labels_keep_the_mean(ensemble, granularity):
    _, t, y = batch()
    same(ensemble(t, torch.ones_like(y), granularity=granularity).logits, zscore(t).mean(-1))


def test_scale_and_shift_of_a_teacher_under_zscore(ensemble, granularity):
    _, t, y = batch()
    other = t * torch.tensor([1.0, 100.0, 0.01]) + torch.tensor([0.0, -50.0, 3.0])
    a, b = ensemble(t, y, granularity=granularity), ensemble(other, y, granularity=granularity)
    same(a.logits, b.logits, rtol=1e-3, atol=1e-4)


def test_constant_teacher_under_zscore_is_zero(ensemble, granularity):
    _, t, y = batch()
    t[..., 1] = 0.1  # its mean is not exactly 0.1 in any floating dtype
    zero = t.clone()
    zero[..., 1] = 0
    same(ensemble(t, y, granularity=granularity).logits, ensemble(zero, y, granularity=granularity).logits)


def test_the_label_loss_falls_with_small_steps(ensemble, granularity, target):
    _, t, y = batch(4, min(40, target.documents))
    t = t.double() if target.float64 else t
    rises = 1e-12 if target.float64 else 1e-6  # by rounding
    for missing in (0.0, 0.4):
        t[torch.rand(t.shape) < missing] = torch.nan
        step = 0.3 if granularity == "query" else 1.0
        options = dict(granularity=granularity, step_size=step, iterations=min(30, target.iterations), shrinkage=0.0)
        trace = ensemble(t, y, return_trace=True, **options).trace
        assert (trace.diff(dim=-1) <= rises).all()
        assert (trace[..., -1] < trace[..., 0] - 1e-4).all()


def test_many_steps_follow_the_labels_as_far_as_teachers_allow(ensemble):
    t = torch.tensor([[[0.0, 2.0], [1.0, 1.0], [2.0, 0.0]]])
    out = ensemble(t, torch.tensor([[2, 1, 0]]), iterations=200, normalize="none", granularity="document").logits
    same(out, torch.tensor([[2.0, 1.0, 0.0]]), rtol=0, atol=1e-2)


def test_padding(ensemble, granularity):
    _, t, y = batch()
    mask = torch.rand(3, 21) < 0.7
    out = ensemble(t, y, granularity=granularity, mask=mask)
    assert (out.logits.isnan() == ~mask).all()
    if granularity == "shared":  # one query's weights are those of its batch
        filled = t.masked_fill(~mask.unsqueeze(-1), 7.0)
        same(ensemble(filled, y, granularity=granularity, mask=mask).logits, out.logits)
        packed = torch.nn.functional.pad(mask.sum(1).cumsum(0), (1, 0))
        same(ensemble(t[mask], y[mask], granularity=granularity, cu_seqlens=packed).logits, out.logits[mask])
        return
    for q in range(3):
        own = ensemble(t[q : q + 1, mask[q]], y[q : q + 1, mask[q]], granularity=granularity)
        same(own.logits[0], out.logits[q, mask[q]])


@pytest.mark.parametrize("ends", [(12, 12, 27), (0, 50, 51, 51, 85)], ids=["short", "longer than a block"])
def test_packed(ensemble, granularity, ends):
    _, t, y = batch(1, 90)
    cu_seqlens = torch.tensor([0, *ends])
    options = dict(granularity=granularity, iterations=2, return_trace=True)
    if granularity == "shared":  # the same bits for each query, but from given weights
        options |= dict(iterations=0, prior=torch.tensor([0.5, 0.1, 0.4]))
    out = ensemble(t[0], y[0], cu_seqlens=cu_seqlens, **options)
    if granularity == "shared":
        for a, b in zip((0, *ends), ends, strict=False):
            same(out.logits[a:b], ensemble(t[:, a:b], y[:, a:b], **options).logits[0])
        assert out.trace.shape == (1,)
        return
    assert out.logits[ends[-1] :].isnan().all() and out.trace.shape == (len(ends), 3)
    for q, (a, b) in enumerate(zip((0, *ends), ends, strict=False)):
        own = ensemble(t[:, a:b], y[:, a:b], **options)
        same(out.logits[a:b], own.logits[0])
        same(out.trace[q], own.trace[0])
        same(out.weights[a:b] if granularity == "document" else out.weights[q], own.weights[0])
    if granularity == "document":
        assert out.weights.shape == (90, 3) and (out.weights[ends[-1] :] == 0).all()
    else:
        assert out.weights.shape == (len(ends), 3)


def test_negative_labels_are_data(ensemble, granularity):
    _, t, y = batch()
    same(ensemble(t, y, granularity=granularity).logits, ensemble(t, y - 100, granularity=granularity).logits)


def test_fused_loss_equals_ensemble_then_loss(how, target):
    z, t, y = batch()
    t[torch.rand(t.shape) < 0.5] = torch.nan  # some documents have no teacher at all
    iterations = min(10, target.iterations)
    logits = pile_fast.pile_ensemble(t, y, iterations=iterations, **how).logits
    pairs = [(term, "logistic") for term in terms.names("distill")]
    pairs += [("logistic", term) for term in terms.names("label") if term != "logistic"]
    for distillation, label_loss in pairs:
        both = dict(alpha=0.3, distillation=distillation, label_loss=label_loss, iterations=iterations)
        fused = run(pile_fast.pile_loss, z, t, y, **both, **how)
        first = run(lambda z, t, y: pile_fast.distillation_loss(z, logits, kind=distillation, **how), z, t, y)  # noqa: B023
        second = run(lambda z, t, y: pile_fast.ranking_loss(z, y, kind=label_loss, **how), z, t, y)  # noqa: B023
        for whole, a, b in zip(fused, first, second, strict=True):
            same(whole, 0.3 * a + 0.7 * b)
