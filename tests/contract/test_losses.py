"""The properties of every loss."""

import pytest
import torch
import torch.nn.functional as F
from contract.problems import batch, make, run, same

from pile_fast import distillation_loss, pile_loss, ranking_loss, terms
from pile_fast.backends import select
from pile_fast.batch import RankingBatch

REDUCTIONS = ("mean", "sum", "none")


def test_without_pairs_zero_with_zero_gradient(loss, how, shape_of_nothing):
    q, n = shape_of_nothing
    for reduction in REDUCTIONS:
        z, t, y = torch.randn(q, n), torch.randn(q, n, 3), torch.zeros(q, n)
        value, gradient = run(loss.call, z, t, y, reduction=reduction, **how)
        assert value.shape == ((q,) if reduction == "none" else ())
        assert (value == 0).all() and (gradient == 0).all()


def test_all_masked(loss, how):
    z, t, y = batch()
    value, gradient = run(loss.call, z, t, y, mask=torch.zeros_like(y, dtype=torch.bool), **how)
    assert value == 0 and (gradient == 0).all()


def test_equal_labels(loss, how):
    z, t, y = batch()
    value, gradient = run(loss.call, z, t, torch.ones_like(y), **how)
    assert value.isfinite() and gradient.isfinite().all()
    if loss.by_label:  # no pair, and no gain either
        value, gradient = run(loss.call, z, t, torch.zeros_like(y), **how)
        assert value == 0 and (gradient == 0).all()


def test_padding_width_changes_nothing(loss, how):
    z, t, y = batch()
    value, gradient = run(loss.call, z, t, y, **how)
    mask = torch.zeros(3, 50, dtype=torch.bool)
    mask[:, 4:25] = True
    # What lies under the mask is never read: not even NaN shows.
    wide = [torch.full((3, 50, *x.shape[2:]), fill, dtype=x.dtype) for x, fill in ((z, torch.nan), (t, 1e30), (y, 9))]
    for to, x in zip(wide, (z, t, y), strict=True):
        to[:, 4:25] = x
    wide_value, wide_gradient = run(loss.call, *wide, mask=mask, **how)
    assert torch.equal(value, wide_value) or how["backend"] != "cpp"
    same(wide_value, value)
    same(wide_gradient[mask].view(3, 21), gradient)
    assert (wide_gradient[~mask] == 0).all()


@pytest.mark.parametrize("reduction, index", [("mean", torch.int32), ("sum", torch.int64), ("none", torch.int64)])
def test_packed_equals_padded(loss, how, reduction, index):
    z, t, y = batch(5)
    mask = torch.arange(21) < torch.tensor([7, 0, 1, 21, 2])[:, None]
    cu_seqlens = torch.tensor([0, 7, 7, 8, 29, 31], dtype=index)
    tail = 3  # documents of no query
    packed = (torch.cat([x[mask], torch.full((tail, *x.shape[2:]), 5, dtype=x.dtype)]) for x in (z, t, y))
    value, gradient = run(loss.call, z, t, y, mask=mask, reduction=reduction, **how)
    packed_value, packed_gradient = run(loss.call, *packed, cu_seqlens=cu_seqlens, reduction=reduction, **how)
    same(packed_value, value)
    same(packed_gradient[:31], gradient[mask])
    assert (packed_gradient[31:] == 0).all()


def test_permuting_documents_permutes_the_gradient(loss, how):
    z, t, y = batch()
    order = torch.randperm(21)
    value, gradient = run(loss.call, z, t, y, **how)
    other_value, other_gradient = run(loss.call, z[:, order], t[:, order], y[:, order], **how)
    same(other_value, value)
    same(other_gradient, gradient[:, order])


def test_shifting_the_student_changes_nothing(loss, how):
    z, t, y = batch()
    value, gradient = run(loss.call, z, t, y, **how)
    other_value, other_gradient = run(loss.call, z + 8, t, y, **how)
    same(other_value, value, rtol=1e-4, atol=1e-5)
    same(other_gradient, gradient, rtol=1e-4, atol=1e-5)


def test_a_query_does_not_depend_on_its_batch(loss, how):
    z, t, y = batch(6)
    one = lambda z, t, y, **kw: loss.call(z, t, y, reduction="none", **kw).sum()  # noqa: E731
    value = loss.call(z, t, y, reduction="none", **how)
    _, gradient = run(one, z, t, y, **how)
    for q in (0, 5):
        own_value, own_gradient = run(one, z[q : q + 1], t[q : q + 1], y[q : q + 1], **how)
        if how["backend"] == "cpp":
            assert torch.equal(own_value, value[q]) and torch.equal(own_gradient[0], gradient[q])
        same(own_value, value[q])
        same(own_gradient[0], gradient[q])


def test_reductions_agree(loss, how):
    z, t, y = batch()
    y[1] = 0  # no label pair, and no gain
    summed = lambda *x, **kw: loss.call(*x, **kw).sum()  # noqa: E731
    mean, total, each = (run(summed, z, t, y, reduction=reduction, **how) for reduction in REDUCTIONS)
    counted = 2 if loss.by_label else 3
    for a, b, c in zip(mean, total, each, strict=True):
        same(b, c)
        same(b / counted, a)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_upstream_gradient_multiplies(loss, how, reduction):
    z, t, y = batch()
    z.requires_grad_()
    value = loss.call(z, t, y, reduction=reduction, **how)
    (gradient,) = torch.autograd.grad(value.sum(), z, retain_graph=True)
    upstream = torch.tensor([0.5, -2.0, 0.0]) if reduction == "none" else torch.tensor(-3.0)
    value.backward(upstream)
    same(z.grad, gradient * (upstream[:, None] if reduction == "none" else upstream))


def test_upstream_gradient_per_packed_query(loss, how):
    z, t, y = batch(1, 31)
    z, t, y, cu_seqlens = z[0].requires_grad_(), t[0], y[0], torch.tensor([0, 7, 7, 8, 29])
    value = loss.call(z, t, y, cu_seqlens=cu_seqlens, reduction="none", **how)
    (gradient,) = torch.autograd.grad(value.sum(), z, retain_graph=True)
    value.backward(torch.tensor([1.0, 10.0, 100.0, 1000.0]))
    same(z.grad, gradient * torch.tensor([1.0] * 7 + [100.0] + [1000.0] * 21 + [0.0] * 2))


def test_value_does_not_depend_on_gradients(loss, how):
    z, t, y = batch()
    with torch.no_grad():
        without = loss.call(z.requires_grad_(), t, y, **how)
    assert not without.requires_grad
    assert torch.equal(without, loss.call(z, t, y, **how).detach())
    assert torch.equal(without, loss.call(z.detach(), t, y, **how))


def test_inputs_are_not_written(loss, how):
    z, t, y = batch()
    copies = z.clone(), t.clone(), y.clone()
    run(loss.call, z, t, y, **how)
    assert all(torch.equal(a, b) for a, b in zip((z, t, y), copies, strict=True))


def test_a_broken_student_logit_breaks_its_query_and_no_other(loss, how):
    z, t, y = batch(5)
    want, want_gradient = run(loss.call, z, t, y, reduction="none", **how)
    z[1, 4], z[2, 20], z[4, 0] = torch.nan, torch.inf, -torch.inf
    value, gradient = run(loss.call, z, t, y, reduction="none", **how)
    assert value[[1, 2, 4]].isnan().all() and gradient[[1, 2, 4]].isnan().all()
    assert torch.equal(value[[0, 3]], want[[0, 3]]) and torch.equal(gradient[[0, 3]], want_gradient[[0, 3]])
    assert loss.call(z, t, y, **how).isnan()


def test_a_broken_student_logit_in_a_long_list(linear):
    how, n = linear
    z, t, y, _ = make(n, 2, 1)
    options = dict(iterations=0, alpha=0.5, reduction="none", **how)
    want, want_gradient = run(pile_loss, z, t, y, **options)
    z[1, 7] = torch.inf
    value, gradient = run(pile_loss, z, t, y, **options)
    assert value[1].isnan() and gradient[1].isnan().all()
    assert torch.equal(value[0], want[0]) and torch.equal(gradient[0], want_gradient[0])


def test_misordered_by_far_still_has_a_gradient(loss, how):
    z, t, y = torch.tensor([[0.0, 200.0]]), torch.tensor([[[1.0] * 3, [0.0] * 3]]), torch.tensor([[1, 0]])
    z.requires_grad_()
    value = loss.call(z, t, y, **how)
    (gradient,) = torch.autograd.grad(value, z)
    if isinstance(loss.term, terms.ApproxNDCG):  # between 0 and 1: it gives up on such a document
        assert value.isfinite() and gradient.isfinite().all()
        return
    assert value > 30 and gradient[0, 0] < -0.1 and gradient[0, 1] > 0.1


def test_the_same_bits_every_time(loss, how):
    for shape in ((2, 7), (1, 40)):
        z, t, y = batch(*shape)
        first, again = (run(loss.call, z, t, y, **how) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.needs("kernels")
@pytest.mark.parametrize("packed", [False, True])
def test_compiles_as_one_graph(how, packed):
    z, t, y, where = make(9, packed=packed)
    torch._dynamo.reset()
    step = lambda z, t, y: pile_loss(z, t, y, alpha=0.5, **where, **how)  # noqa: E731
    compiled = torch.compile(step, fullgraph=True, backend="inductor" if z.is_cuda else "aot_eager")
    assert all(torch.equal(a, b) for a, b in zip(run(compiled, z, t, y), run(step, z, t, y), strict=True))


def test_auto_takes_kernels_of_a_gpu_for_its_tensors_alone(how):
    z, t, y, _ = make(4)
    chosen = select("auto", RankingBatch(student_logits=z), None, None)
    assert chosen in (("triton", "cuda", "torch") if z.is_cuda else ("cpp", "torch"))
    assert torch.equal(pile_loss(z, t, y), pile_loss(z, t, y, backend=chosen))


def test_kl_and_softmax_are_those_of_torch(how):
    z, target = torch.randn(9), torch.randn(9)
    target[2] = torch.nan
    labels = torch.tensor([1.0, 0, 2, torch.nan, 0, 0, 0, 3, 0])
    lists, options = [range(4), range(4, 7), range(7, 9)], dict(cu_seqlens=torch.tensor([0, 4, 7, 9]), reduction="none", **how)
    kl = distillation_loss(z, target, kind="kl", **options)
    softmax = ranking_loss(z, labels, kind="softmax", **options)
    for q, documents in enumerate(lists):
        scored = [i for i in documents if i != 2]
        wanted = F.kl_div(z[scored].log_softmax(0), target[scored].log_softmax(0), reduction="sum", log_target=True)
        same(kl[q], wanted)
        labelled = [i for i in documents if i != 3]
        y = labels[labelled]
        share = y / y.sum() if y.sum() > 0 else y
        same(softmax[q], -(share * z[labelled].log_softmax(0)).sum())
