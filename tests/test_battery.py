"""One battery of properties for the ensemble and every loss, every backend and pair sum."""

import pytest
import torch

import pile_fast
from pile_fast.backends import cpp

BACKENDS = {"torch": dict(backend="torch")}
if not cpp.unavailable():
    BACKENDS |= {"direct": dict(backend="cpp", pairwise="direct"), "chebyshev": dict(backend="cpp", pairwise="chebyshev")}

pytestmark = pytest.mark.usefixtures("poisoned")


def distill(z, t, y, **kw):
    return pile_fast.distillation_loss(z, t[..., 0], **kw)


def distill_mse(z, t, y, **kw):
    return pile_fast.distillation_loss(z, t[..., 0], kind="mse", **kw)


def rank(z, t, y, **kw):
    return pile_fast.ranking_loss(z, y, **kw)


def rank_weighted(z, t, y, **kw):
    return pile_fast.ranking_loss(z, y, pair_weight="label_gap", **kw)


def pile(z, t, y, **kw):
    return pile_fast.pile_loss(z, t, y, alpha=0.5, **kw)


def pile_query(z, t, y, **kw):
    return pile_fast.pile_loss(z, t, y, granularity="query", pair_weight="gain_gap", **kw)


@pytest.fixture(params=[distill, distill_mse, rank, rank_weighted, pile, pile_query], ids=lambda f: f.__name__)
def loss(request):
    return request.param


@pytest.fixture(params=BACKENDS)
def how(request):
    return BACKENDS[request.param]


@pytest.fixture(params=["document", "query"])
def granularity(request):
    return request.param


def batch(q=3, n=21, m=3):
    t = torch.randn(q, n, m)
    return torch.randn(q, n), t, torch.randint(0, 4, (q, n))


def run(loss, z, t, y, **kw):
    z = z.clone().requires_grad_()
    value = loss(z, t, y, **kw)
    value.sum().backward()
    return value.detach(), z.grad


def same(a, b, **kw):
    torch.testing.assert_close(a, b, **({"rtol": 2e-5, "atol": 2e-6, "equal_nan": True} | kw))


# -- the losses


@pytest.mark.parametrize("shape", [(3, 1), (3, 0), (0, 5), (0, 0)], ids=["one document", "no document", "no query", "nothing"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_without_pairs_zero_with_zero_gradient(loss, how, shape, reduction):
    q, n = shape
    value, gradient = run(loss, torch.randn(q, n), torch.randn(q, n, 3), torch.zeros(q, n), reduction=reduction, **how)
    assert value.shape == ((q,) if reduction == "none" else ())
    assert (value == 0).all() and (gradient == 0).all()


def test_all_masked(loss, how):
    z, t, y = batch()
    value, gradient = run(loss, z, t, y, mask=torch.zeros_like(y, dtype=torch.bool), **how)
    assert value == 0 and (gradient == 0).all()


def test_equal_labels(loss, how):
    z, t, y = batch()
    value, gradient = run(loss, z, t, torch.ones_like(y), **how)
    assert value.isfinite() and gradient.isfinite().all()
    if loss in (rank, rank_weighted):
        assert value == 0 and (gradient == 0).all()


def test_padding_width_changes_nothing(loss, how):
    z, t, y = batch()
    value, gradient = run(loss, z, t, y, **how)
    wide_mask = torch.zeros(3, 50, dtype=torch.bool)
    wide_mask[:, 4:25] = True

    def widen(x, fill):
        out = torch.full((3, 50, *x.shape[2:]), fill, dtype=x.dtype)
        out[:, 4:25] = x
        return out

    # What lies under the mask is never read: not even NaN shows.
    wide_value, wide_gradient = run(loss, widen(z, torch.nan), widen(t, 1e30), widen(y, 9), mask=wide_mask, **how)
    assert torch.equal(value, wide_value) or how["backend"] == "torch"
    same(wide_value, value)
    same(wide_gradient[wide_mask].view(3, 21), gradient)
    assert (wide_gradient[~wide_mask] == 0).all()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("index", [torch.int32, torch.int64])
def test_packed_equals_padded(loss, how, reduction, index):
    lengths = [7, 0, 1, 21, 2]
    z, t, y = batch(5)
    mask = torch.arange(21) < torch.tensor(lengths)[:, None]
    cu_seqlens = torch.tensor([0, 7, 7, 8, 29, 31], dtype=index)
    tail = 3  # documents of no query
    pack = lambda x: torch.cat([x[mask], torch.full((tail, *x.shape[2:]), 5, dtype=x.dtype)])  # noqa: E731
    value, gradient = run(loss, z, t, y, mask=mask, reduction=reduction, **how)
    packed_value, packed_gradient = run(loss, pack(z), pack(t), pack(y), cu_seqlens=cu_seqlens, reduction=reduction, **how)
    same(packed_value, value)
    same(packed_gradient[:31], gradient[mask])
    assert (packed_gradient[31:] == 0).all()


def test_permuting_documents_permutes_the_gradient(loss, how):
    z, t, y = batch()
    order = torch.randperm(21)
    value, gradient = run(loss, z, t, y, **how)
    other_value, other_gradient = run(loss, z[:, order], t[:, order], y[:, order], **how)
    same(other_value, value)
    same(other_gradient, gradient[:, order])


def test_shifting_the_student_changes_nothing(loss, how):
    z, t, y = batch()
    value, gradient = run(loss, z, t, y, **how)
    other_value, other_gradient = run(loss, z + 8, t, y, **how)
    same(other_value, value, rtol=1e-4, atol=1e-5)
    same(other_gradient, gradient, rtol=1e-4, atol=1e-5)


def test_a_query_does_not_depend_on_its_batch(loss, how):
    z, t, y = batch(6)
    value, gradient = run(loss, z, t, y, reduction="none", **how)
    for q in (0, 5):
        own_value, own_gradient = run(loss, z[q : q + 1], t[q : q + 1], y[q : q + 1], reduction="none", **how)
        if how["backend"] == "cpp":
            assert torch.equal(own_value[0], value[q]) and torch.equal(own_gradient[0], gradient[q])
        same(own_value[0], value[q])
        same(own_gradient[0], gradient[q])


def test_reductions_agree(loss, how):
    z, t, y = batch()
    y[1] = 2  # no label pair
    each, each_gradient = run(loss, z, t, y, reduction="none", **how)
    total, total_gradient = run(loss, z, t, y, reduction="sum", **how)
    mean, mean_gradient = run(loss, z, t, y, reduction="mean", **how)
    counted = 2 if loss in (rank, rank_weighted) else 3
    same(each.sum(), total)
    same(total / counted, mean)
    same(each_gradient, total_gradient)
    same(total_gradient / counted, mean_gradient)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_upstream_gradient_multiplies(loss, how, reduction):
    z, t, y = batch()
    _, gradient = run(loss, z, t, y, reduction=reduction, **how)
    z.requires_grad_()
    value = loss(z, t, y, reduction=reduction, **how)
    upstream = torch.tensor([0.5, -2.0, 0.0]) if reduction == "none" else torch.tensor(-3.0)
    value.backward(upstream)
    same(z.grad, gradient * (upstream[:, None] if reduction == "none" else upstream))


def test_upstream_gradient_per_packed_query(loss, how):
    z, t, y = batch(1, 31)
    z, t, y, cu_seqlens = z[0], t[0], y[0], torch.tensor([0, 7, 7, 8, 29])
    _, gradient = run(loss, z, t, y, cu_seqlens=cu_seqlens, reduction="none", **how)
    z.requires_grad_()
    upstream = torch.tensor([1.0, 10.0, 100.0, 1000.0])
    loss(z, t, y, cu_seqlens=cu_seqlens, reduction="none", **how).backward(upstream)
    factor = torch.tensor([1.0] * 7 + [100.0] + [1000.0] * 21 + [0.0] * 2)
    same(z.grad, gradient * factor)


def test_value_does_not_depend_on_gradients(loss, how):
    z, t, y = batch()
    with torch.no_grad():
        without = loss(z.requires_grad_(), t, y, **how)
    assert not without.requires_grad
    assert torch.equal(without, loss(z, t, y, **how).detach())
    assert torch.equal(without, loss(z.detach(), t, y, **how))


def test_inputs_are_not_written(loss, how):
    z, t, y = batch()
    copies = z.clone(), t.clone(), y.clone()
    run(loss, z, t, y, **how)
    assert all(torch.equal(a, b) for a, b in zip((z, t, y), copies, strict=True))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_broken_student_logit_breaks_its_query_and_no_other(loss, how, bad):
    z, t, y = batch()
    want, want_gradient = run(loss, z, t, y, reduction="none", **how)
    z[1, 4] = bad
    value, gradient = run(loss, z, t, y, reduction="none", **how)
    assert value[1].isnan() and gradient[1].isnan().all()
    assert torch.equal(value[[0, 2]], want[[0, 2]]) and torch.equal(gradient[[0, 2]], want_gradient[[0, 2]])
    assert run(loss, z, t, y, **how)[0].isnan()


def test_misordered_by_far_still_has_a_gradient(loss, how):
    z, t, y = torch.tensor([[0.0, 200.0]]), torch.tensor([[[1.0] * 3, [0.0] * 3]]), torch.tensor([[1, 0]])
    value, gradient = run(loss, z, t, y, **how)
    assert value > 50 and gradient[0, 0] < -0.4 and gradient[0, 1] > 0.4


# -- the ensemble


def ensemble(t, y, how, granularity, **kw):
    return pile_fast.pile_ensemble(t, y, return_weights=True, granularity=granularity, **how, **kw)


@pytest.mark.parametrize("shape", [(3, 1), (3, 0), (0, 5), (0, 0)], ids=["one document", "no document", "no query", "nothing"])
def test_ensemble_of_little(how, granularity, shape):
    out = ensemble(torch.randn(*shape, 3), torch.zeros(shape), how, granularity, return_trace=True)
    assert out.logits.shape == shape and out.trace.shape == (shape[0], 11)
    assert (out.logits == 0).all()  # zscore of one document
    assert out.weights.shape == ((*shape, 3) if granularity == "document" else (shape[0], 3))


def test_no_iterations_is_the_mean(how, granularity):
    _, t, y = batch()
    out = ensemble(t, y, how, granularity, iterations=0)
    z = (t - t.mean(1, keepdim=True)) / t.std(1, keepdim=True, correction=0)
    same(out.logits, z.mean(-1))
    same(out.weights, torch.full_like(out.weights, 1 / 3))


def test_prior(how, granularity):
    _, t, y = batch()
    prior = torch.tensor([2.0, 1.0, 1.0])
    out = ensemble(t, y, how, granularity, iterations=0, prior=prior)
    same(out.weights, (prior / 4).expand_as(out.weights))
    each = ensemble(t, y, how, granularity, prior=prior.expand(3, 3))
    same(each.logits, ensemble(t, y, how, granularity, prior=prior).logits)
    dropped = ensemble(t, y, how, granularity, prior=torch.tensor([1.0, 0.0, 1.0]))
    same(dropped.logits, ensemble(t[..., [0, 2]], y, how, granularity).logits)
    assert (dropped.weights[..., 1] == 0).all()


def test_weights_are_on_the_simplex_and_give_the_logits(how, granularity):
    _, t, y = batch()
    t[torch.rand(t.shape) < 0.3] = torch.nan
    out = ensemble(t, y, how, granularity, normalize="none")
    assert (out.weights >= 0).all()
    if granularity == "document":
        scored = ~out.logits.isnan()
        same(out.weights.sum(-1), scored.float())
        assert (out.weights[t.isnan()] == 0).all()
        same((out.weights * t.nan_to_num()).sum(-1)[scored], out.logits[scored])
    else:
        same(out.weights.sum(-1), torch.ones(3))


def test_between_lowest_and_highest_teacher(how, granularity):
    _, t, y = batch(4, 150)
    out = ensemble(t, y, how, granularity, normalize="none", iterations=50, step_size=10.0).logits
    assert (out >= t.amin(-1)).all() and (out <= t.amax(-1)).all()


def test_permuting_teachers_permutes_weights(how, granularity):
    _, t, y = batch()
    order = [2, 0, 1]
    a, b = ensemble(t, y, how, granularity), ensemble(t[..., order], y, how, granularity)
    same(a.logits, b.logits)
    same(a.weights[..., order], b.weights)


def test_permuting_documents(how, granularity):
    _, t, y = batch()
    order = torch.randperm(21)
    same(ensemble(t, y, how, granularity).logits[:, order], ensemble(t[:, order], y[:, order], how, granularity).logits)


def test_missing_teacher_equals_dropped(how, granularity):
    _, t, y = batch()
    gone = t.clone()
    gone[..., 1] = torch.nan
    a, b = ensemble(gone, y, how, granularity), ensemble(t[..., [0, 2]], y, how, granularity)
    same(a.logits, b.logits)
    same(a.weights[..., [0, 2]], b.weights)


def test_missing_document_equals_dropped(how, granularity):
    _, t, y = batch()
    t[:, 5] = torch.nan
    rest = [i for i in range(21) if i != 5]
    out = ensemble(t, y, how, granularity).logits
    assert out[:, 5].isnan().all()
    same(out[:, rest], ensemble(t[:, rest], y[:, rest], how, granularity).logits)


def test_unlabelled_document_keeps_the_mean(how):
    _, t, y = batch()
    y = y.float()
    y[:, 3] = torch.nan
    out, mean = ensemble(t, y, how, "document"), ensemble(t, y, how, "document", iterations=0)
    same(out.logits[:, 3], mean.logits[:, 3])
    assert (out.logits[:, 4] - mean.logits[:, 4]).abs().max() > 1e-3


def test_equal_labels_keep_the_mean(how, granularity):
    _, t, y = batch()
    same(
        ensemble(t, torch.ones_like(y), how, granularity).logits,
        t.sub(t.mean(1, keepdim=True)).div(t.std(1, correction=0, keepdim=True)).mean(-1),
    )


def test_scale_and_shift_of_a_teacher_under_zscore(how, granularity):
    _, t, y = batch()
    other = t * torch.tensor([1.0, 100.0, 0.01]) + torch.tensor([0.0, -50.0, 3.0])
    same(ensemble(t, y, how, granularity).logits, ensemble(other, y, how, granularity).logits, rtol=1e-3, atol=1e-4)


def test_constant_teacher_under_zscore_is_zero(how, granularity):
    _, t, y = batch()
    t[..., 1] = 0.1  # its mean is not exactly 0.1 in any floating dtype
    zero = t.clone()
    zero[..., 1] = 0
    same(ensemble(t, y, how, granularity).logits, ensemble(zero, y, how, granularity).logits)


def test_the_label_loss_falls_with_small_steps(how, granularity):
    _, t, y = batch(8, 40)
    for missing in (False, True):
        if missing:
            t[torch.rand(t.shape) < 0.4] = torch.nan
        step = 0.3 if granularity == "query" else 1.0
        trace = ensemble(t.double(), y, how, granularity, step_size=step, iterations=30, return_trace=True).trace
        assert (trace.diff(dim=1) <= 1e-12).all()
        assert (trace[:, -1] < trace[:, 0] - 1e-3).all()


def test_many_steps_follow_the_labels_as_far_as_teachers_allow(how):
    t = torch.stack([torch.tensor([[0.0, 1.0, 2.0]]), torch.tensor([[2.0, 1.0, 0.0]])], -1)
    out = ensemble(t, torch.tensor([[2, 1, 0]]), how, "document", iterations=200, normalize="none").logits
    same(out, torch.tensor([[2.0, 1.0, 0.0]]), rtol=0, atol=1e-2)


def test_padding_of_the_ensemble(how, granularity):
    _, t, y = batch()
    mask = torch.rand(3, 21) < 0.7
    out = ensemble(t, y, how, granularity, mask=mask)
    assert (out.logits.isnan() == ~mask).all()
    for q in range(3):
        own = ensemble(t[q : q + 1, mask[q]], y[q : q + 1, mask[q]], how, granularity)
        same(own.logits[0], out.logits[q, mask[q]])


def test_packed_ensemble(how, granularity):
    _, t, y = batch(1, 30)
    cu_seqlens = torch.tensor([0, 12, 12, 27])
    out = ensemble(t[0], y[0], how, granularity, cu_seqlens=cu_seqlens, return_trace=True)
    assert out.logits[27:].isnan().all() and out.trace.shape == (3, 11)
    for a, b in ((0, 12), (12, 27)):
        same(out.logits[a:b], ensemble(t[:, a:b], y[:, a:b], how, granularity).logits[0])
    if granularity == "document":
        assert out.weights.shape == (30, 3) and (out.weights[27:] == 0).all()
    else:
        assert out.weights.shape == (3, 3)


def test_negative_labels_are_data(how, granularity):
    _, t, y = batch()
    same(ensemble(t, y, how, granularity).logits, ensemble(t, y - 100, how, granularity).logits)


def test_fused_loss_equals_ensemble_then_loss(how):
    z, t, y = batch()
    t[torch.rand(t.shape) < 0.5] = torch.nan  # some documents have no teacher at all
    logits = pile_fast.pile_ensemble(t, y, **how).logits
    fused, fused_gradient = run(lambda z, t, y, **kw: pile_fast.pile_loss(z, t, y, alpha=0.3, **kw), z, t, y, **how)
    z = z.requires_grad_()
    parts = 0.3 * pile_fast.distillation_loss(z, logits, **how) + 0.7 * pile_fast.ranking_loss(z, y, **how)
    parts.backward()
    same(fused, parts.detach())
    same(fused_gradient, z.grad)
