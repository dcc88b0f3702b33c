"""Autograd, registration and the company the losses keep: torch.compile, opcheck, autocast, checkpointing, DDP."""

import itertools
import subprocess
import sys

import pytest
import torch
from contract.problems import losses, terms_of
from torch.utils.checkpoint import checkpoint

import pile_fast
from pile_fast import reference
from pile_fast.autograd import flat
from pile_fast.backends import cpp
from pile_fast.options import ensemble_options, loss_options

BACKENDS = ["torch"] if cpp.unavailable() else ["torch", "cpp"]
pytestmark = pytest.mark.parametrize("backend", BACKENDS)


def batch(dtype=torch.float32, q=3, n=12, m=3):
    return torch.randn(q, n, dtype=dtype), torch.randn(q, n, m, dtype=dtype), torch.randint(0, 3, (q, n))


LOSSES = {loss.name: loss.call for loss in losses(iterations=10) if not loss.repeats}


@pytest.fixture(params=LOSSES)
def loss(request):
    return LOSSES[request.param]


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("pairwise", ["direct", "chebyshev"])
def test_gradcheck(loss, backend, reduction, pairwise):
    z, t, y = batch(torch.float64)
    kw = dict(backend=backend, reduction=reduction, pairwise=pairwise)
    assert torch.autograd.gradcheck(lambda z: loss(z, t, y, **kw), z.requires_grad_())


def test_gradcheck_of_the_reference_itself(backend):
    z, t, y = batch(torch.float64)
    valid = torch.rand(z.shape) < 0.8
    y = y.double()
    y[0, 3] = torch.nan
    each = [dict(alpha=1.0, distillation=term) for term in terms_of("distill")]
    each += [dict(alpha=0.0, label_loss=term) for term in terms_of("label")]
    c, by_query = torch.rand(z.shape, dtype=z.dtype) + 0.1, torch.rand(3, dtype=z.dtype)
    c[0, 0] = 0
    for term, weights in itertools.product([*each, dict(alpha=0.4)], [(None, None), (c, by_query)]):
        options = loss_options(pair_weight="label_gap", reduction="none", **term)

        def loss(z, options=options, weights=weights):
            return reference.pair_loss(z, t[..., 0], y, valid, options, False, *weights).loss

        assert torch.autograd.gradcheck(loss, z.requires_grad_())
        (gradient,) = torch.autograd.grad(loss(z).sum(), z)
        written_out = reference.pair_loss(z.detach(), t[..., 0], y, valid, options, True, *weights)
        torch.testing.assert_close(written_out.gradient, gradient, rtol=1e-10, atol=1e-12)
        exact = (
            torch.autograd.functional.hessian(lambda z: loss(z).sum(), z.detach())
            .flatten(0, 1)
            .flatten(1)
            .diagonal()
            .view_as(z)
        )
        if "ApproxNDCG" in str(term):  # not convex: about their size
            assert (written_out.hessian >= 0).all() and (4 * written_out.hessian >= exact.abs() - 1e-12).all()
        else:
            torch.testing.assert_close(written_out.hessian, exact, rtol=1e-9, atol=1e-12)
    options = ensemble_options(iterations=3, granularity="query")
    assert torch.autograd.gradcheck(
        lambda t: reference.ensemble(t, y, torch.ones_like(valid), options).logits, t.requires_grad_()
    )


def test_double_backward_raises(loss, backend):
    z, t, y = batch()
    (gradient,) = torch.autograd.grad(loss(z.requires_grad_(), t, y, backend=backend), z, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        gradient.square().sum().backward()


def test_backward_twice_and_in_place_use_of_the_loss(loss, backend):
    z, t, y = batch()
    value = loss(z.requires_grad_(), t, y, backend=backend)
    value.backward(retain_graph=True)
    once = z.grad.clone()
    value.backward()
    torch.testing.assert_close(z.grad, 2 * once)
    value = loss(z, t, y, backend=backend)
    value /= 4  # gradient accumulation, as trainers write it
    z.grad = None
    value.backward()
    torch.testing.assert_close(z.grad, once / 4)


def test_only_the_student_gets_a_gradient_and_no_graph_is_kept_without(backend):
    z, t, y = batch()
    assert not pile_fast.pile_ensemble(t, y, backend=backend).logits.requires_grad
    assert not pile_fast.pile_loss(z, t, y, backend=backend).requires_grad
    model = torch.nn.Linear(3, 1)
    out = model(t).squeeze(-1)
    pile_fast.pile_loss(out, t, y, backend=backend).backward()
    assert model.weight.grad.abs().sum() > 0 and t.grad is None


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("packed", [False, True])
def test_compiles_as_one_graph(loss, backend, reduction, packed):
    z, t, y = batch()
    kw = dict(backend=backend, reduction=reduction)
    if packed:
        z, t, y = z.flatten(), t.flatten(0, 1), y.flatten()
        kw["cu_seqlens"] = torch.tensor([0, 5, 5, 36])
    torch._dynamo.reset()
    step = torch.compile(lambda z, t, y: loss(2 * z, t, y, **kw).sum() + z.mean(), fullgraph=True, backend="aot_eager")
    z.requires_grad_()
    value = step(z, t, y)
    value.backward()
    got, z.grad = z.grad, None
    want = loss(2 * z, t, y, **kw).sum() + z.mean()
    want.backward()
    torch.testing.assert_close(value, want)
    torch.testing.assert_close(got, z.grad)


@pytest.mark.parametrize("granularity", ["shared", "document", "query"])
def test_ensemble_compiles_with_dynamic_shapes(backend, granularity):
    torch._dynamo.reset()

    def ensemble(t, y):
        return pile_fast.pile_ensemble(t, y, granularity=granularity, return_weights=True, return_trace=True, backend=backend)

    compiled = torch.compile(ensemble, fullgraph=True, dynamic=True, backend="aot_eager")
    for q, n in ((3, 12), (5, 7)):
        _, t, y = batch(q=q, n=n)
        for a, b in zip(compiled(t, y), ensemble(t, y), strict=True):
            torch.testing.assert_close(a, b)


def test_inductor(backend):
    # Inductor writes C++ of its own around the op; one case is enough to see that the two fit together.
    z, t, y = batch()
    torch._dynamo.reset()
    module = torch.compile(pile_fast.PILELoss(alpha=0.5, backend=backend), fullgraph=True)
    z.requires_grad_()
    value = module(z.sin(), t, y)
    value.backward()
    got, z.grad = z.grad, None
    want = pile_fast.PILELoss(alpha=0.5, backend=backend)(z.sin(), t, y)
    want.backward()
    torch.testing.assert_close(value, want)
    torch.testing.assert_close(got, z.grad)


def test_opcheck(backend):
    ops = torch.ops.pile_fast
    z, t, y = batch()
    mask = torch.rand(z.shape) < 0.7
    packed = z.flatten(), t.flatten(0, 1), y.flatten()
    cu_seqlens, prior = torch.tensor([0, 5, 5, 36]), torch.rand(3)
    e = flat(ensemble_options(iterations=3, margin=0.1, pair_weight="label_gap"))
    by_query = flat(ensemble_options(iterations=3, granularity="query", normalize="center"))
    by_document = flat(ensemble_options(iterations=3, granularity="document", normalize="minmax"))
    mean = flat(loss_options(alpha=0.5))
    none = flat(loss_options(alpha=0.5, distillation="mse", reduction="none"))
    cases = [  # no absent document for the ensemble: its NaN logit is unequal to itself
        (ops.ensemble.default, (t, y, None, None, prior, *e, True, True, backend)),
        (ops.ensemble.default, (packed[1], packed[2], None, cu_seqlens, None, *by_query, True, False, backend)),
        (ops.pair_loss.default, (z, t[..., 0], y, mask, None, None, None, *mean, True, backend)),
        (ops.pair_loss.default, (packed[0], packed[0], packed[2], None, cu_seqlens, None, None, *none, False, backend)),
        (ops.pile_loss.default, (z.half(), t.half(), y, None, None, None, None, None, *e, *none, True, True, backend)),
        (ops.pile_loss.default, (z.double(), t, y, None, None, None, None, None, *by_query, *mean, True, False, backend)),
        (ops.pile_loss.default, (z, t, y, None, None, None, None, None, *by_document, *mean, False, False, backend)),
    ]
    for op, arguments in cases:
        torch.library.opcheck(op, arguments)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_computes_in_float32(loss, backend, dtype):
    z, t, y = batch()
    want = loss(z, t, y, backend=backend)
    with torch.autocast("cpu", dtype=dtype):
        value = loss(z.requires_grad_(), t, y, backend=backend)
    value.backward()
    assert value.dtype == torch.float32
    torch.testing.assert_close(value.detach(), want)
    got, z.grad = z.grad, None
    loss(z, t, y, backend=backend).backward()
    torch.testing.assert_close(got, z.grad)


def test_gradient_checkpointing(loss, backend):
    z, t, y = batch()
    z.requires_grad_()
    checkpoint(lambda z: loss(z.tanh(), t, y, backend=backend), z, use_reentrant=False).backward()
    got, z.grad = z.grad, None
    loss(z.tanh(), t, y, backend=backend).backward()
    torch.testing.assert_close(got, z.grad)


DDP_WORKER = """
import os, sys, torch, pile_fast
rank, folder, backend = int(sys.argv[1]), sys.argv[2], sys.argv[3]
torch.set_num_threads(1)
torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
torch.manual_seed(1)
model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(3, 1))
t, y = (x[rank::2] for x in torch.load(f"{folder}/inputs.pt"))
pile_fast.pile_loss(model(t).squeeze(-1), t, y, alpha=0.5, granularity="query", backend=backend).backward()
torch.save(model.module.weight.grad, f"{folder}/gradient{rank}.pt")
torch.distributed.barrier()
os._exit(0)  # gloo's threads race the interpreter's exit
"""


def test_two_processes_average_their_gradients(backend, tmp_path):
    _, t, y = batch(q=4)
    torch.save((t, y), tmp_path / "inputs.pt")
    workers = [subprocess.Popen([sys.executable, "-c", DDP_WORKER, str(rank), str(tmp_path), backend]) for rank in (0, 1)]
    assert [worker.wait(timeout=120) for worker in workers] == [0, 0]
    torch.manual_seed(1)
    model = torch.nn.Linear(3, 1)
    pile_fast.pile_loss(model(t).squeeze(-1), t, y, alpha=0.5, granularity="query", backend=backend).backward()
    for rank in (0, 1):
        torch.testing.assert_close(torch.load(tmp_path / f"gradient{rank}.pt"), model.weight.grad)
