"""Every odd tensor on every public function: a right value, or an error that names the argument.

A call is a function, one of its tensor arguments, and an oddity done to that argument alone. What keeps the values has to give
the plain call's result; what cannot be read has to be refused by name. Nothing gives a wrong number or ends the process.
"""

import functools
import signal
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest
import torch
from contract.problems import losses
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import pile_fast
from pile_fast import ensembles, terms
from pile_fast.backends import cpp
from pile_fast.evaluation import metrics

BACKENDS = ["torch"] if cpp.unavailable() else ["torch", "cpp"]
QUERIES, SLOTS, TEACHERS = 2, 5, 3


def tensors(layout):
    g = torch.Generator().manual_seed(1)
    z, t = torch.randn(QUERIES, SLOTS, generator=g), torch.randn(QUERIES, SLOTS, TEACHERS, generator=g)
    y = torch.randint(0, 4, (QUERIES, SLOTS), generator=g).float()
    mask = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]], dtype=torch.bool)
    named = dict(
        student_logits=z, teacher_logits=t, target_logits=t[..., 0].clone(), labels=y, prior=torch.tensor([0.5, 1.0, 2.0])
    )
    if layout == "padded":
        return named | {"mask": mask}
    flat = {name: x if name == "prior" else x.flatten(0, 1) for name, x in named.items()}
    return flat | {"cu_seqlens": torch.tensor([0, 4, 10])}


def of_ensemble(method):
    needs = (
        ("student_logits", "teacher_logits", "labels") if method in ensembles.NEEDS_STUDENT else ("teacher_logits", "labels")
    )

    def call(teacher_logits, labels, student_logits=None, backend=None, **kw):
        student = {} if student_logits is None else {"student_logits": student_logits}
        return ensembles.ENSEMBLES[method](teacher_logits, labels, **student, **kw)[:2]

    return call, needs


def logits_of(function):
    return lambda **kw: function(**kw)[0]


FUNCTIONS = {
    "pile_loss": (pile_fast.pile_loss, ("student_logits", "teacher_logits", "labels", "prior")),
    "pile_loss, labels": (lambda **kw: pile_fast.pile_loss(alpha=0, **kw), ("student_logits", "teacher_logits", "labels")),
    "pile_loss, by query": (
        lambda **kw: pile_fast.pile_loss(granularity="query", alpha=0.5, distillation="mse", pair_weight="label_gap", **kw),
        ("student_logits", "teacher_logits", "labels", "prior"),
    ),
    "pile_ensemble": (logits_of(pile_fast.pile_ensemble), ("teacher_logits", "labels", "prior")),
    **{
        f"distillation_loss {term}": (
            functools.partial(pile_fast.distillation_loss, kind=term),
            ("student_logits", "target_logits"),
        )
        for term in terms.names("distill")
    },
    **{
        f"label {term}": (functools.partial(pile_fast.ranking_loss, kind=term), ("student_logits", "labels"))
        for term in terms.names("label")
    },
    "PILELoss": (
        lambda backend, student_logits, teacher_logits, labels, **kw: pile_fast.PILELoss(alpha=0.5, backend=backend)(
            student_logits, teacher_logits, labels, **kw
        ),
        ("student_logits", "teacher_logits", "labels"),
    ),
    **{method: of_ensemble(method) for method in ensembles.ENSEMBLES if method != "pile"},
}


def negated(x):
    """The same values behind a sign bit that is kept beside the memory."""
    return torch.complex(torch.zeros_like(x), -x).conj().imag if x.dtype in (torch.float32, torch.float64) else None


def sliced(x):
    wide = torch.full((*x.shape[:-1], 3 * x.shape[-1]), 7, dtype=x.dtype)
    wide[..., 1::3] = x
    return wide[..., 1::3]


class Named(torch.Tensor):
    """A subclass that adds nothing."""


# Oddities that keep the values.
SAME = {
    "negated view": negated,
    "real part of a conjugate": lambda x: torch.complex(x, x).conj().real if x.dtype is torch.float32 else None,
    "slice with gaps": sliced,
    "transposed memory": lambda x: x.mT.contiguous().mT if x.dim() > 1 else None,
    "reversed twice": lambda x: x.flip(0).flip(0),
    "unaligned": lambda x: torch.cat([x.flatten()[:1], x.flatten()])[1:].view(x.shape),
    "a subclass": lambda x: x.as_subclass(Named),
    "a parameter": lambda x: torch.nn.Parameter(x, requires_grad=False),
    "a buffer": lambda x: torch.nn.Buffer(x) if hasattr(torch.nn, "Buffer") else None,
    "memory of numpy": lambda x: torch.from_numpy(x.numpy()),
    "memory of numpy in Fortran's order": lambda x: torch.from_numpy(np.asfortranarray(x.numpy())) if x.dim() > 1 else None,
    "from DLPack": lambda x: torch.from_dlpack(x),
    "part of a wider tensor": lambda x: torch.stack([torch.full_like(x, 9), x, torch.full_like(x, 9)], -1)[..., 1],
    "view of a view": lambda x: x.unsqueeze(0).expand(2, *x.shape)[1].view(x.shape),
    "detached": lambda x: (x.clone().requires_grad_() * 1).detach() if x.is_floating_point() else None,
    "whole numbers": lambda x: x.int() if x.is_floating_point() and (x == x.round()).all() else None,
    "shared memory": lambda x: x.clone().share_memory_(),
    "inference mode": lambda x: _inference(x),
    "float64": lambda x: x.double() if x.is_floating_point() else None,
}
# Oddities to be refused, and the words after the argument's name.
REFUSED = {
    "sparse": lambda x: x.to_sparse(),
    "compressed sparse": lambda x: x.to_sparse_csr() if x.dim() == 2 and x.is_floating_point() else None,
    "nested": lambda x: torch.nested.nested_tensor(list(x)) if x.dim() > 1 and x.is_floating_point() else None,
    "jagged": lambda x: (
        torch.nested.nested_tensor(list(x), layout=torch.jagged) if x.dim() > 1 and x.is_floating_point() else None
    ),
    "quantised": lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8) if x.dtype is torch.float32 else None,
    "complex": lambda x: torch.complex(x, x) if x.dtype is torch.float32 else None,
    "float8": lambda x: x.to(torch.float8_e4m3fn) if x.is_floating_point() else None,
    "a list": lambda x: x.tolist(),
    "an array": lambda x: x.numpy(),
    "a tuple": lambda x: tuple(x),
    "a number": lambda x: 1.0,
    "logits of whole numbers": lambda x: x.int() if x.is_floating_point() and not (x == x.round()).all() else None,
    "of bits": lambda x: x > 0 if x.is_floating_point() and not (x == x.round()).all() else None,
    "without a document": lambda x: x[:0],
    "a scalar": lambda x: torch.tensor(1.0, dtype=x.dtype),
    "one axis more": lambda x: x.unsqueeze(0).unsqueeze(0),
    "one document more": lambda x: torch.cat([x, x[-1:]]),
    "meta": lambda x: x.to("meta"),
    "a string": lambda x: "logits",
}


# Then two arguments disagree, and either may be named.
DISAGREE = ("meta", "one document more", "without a document")


def _inference(x):
    with torch.inference_mode():
        return x.clone()


def calls(oddities):
    for function, (_, arguments) in FUNCTIONS.items():
        for layout in ("padded", "packed"):
            for argument in (*arguments, "mask" if layout == "padded" else "cu_seqlens"):
                for oddity in oddities:
                    yield function, layout, argument, oddity


def own_tensors(function, layout):
    return {name: x for name, x in tensors(layout).items() if name in (*FUNCTIONS[function][1], "mask", "cu_seqlens")}


@functools.cache
def plain_result(function, layout, backend):
    return FUNCTIONS[function][0](backend=backend, **own_tensors(function, layout))


def odd_call(function, layout, argument, change, backend):
    """The call with one argument changed; None where the change does not apply, or the function has no backends to try."""
    own = own_tensors(function, layout)
    odd = change(own[argument])
    if odd is None or (function in ensembles.ENSEMBLES and backend != BACKENDS[0]):
        return None
    return lambda: FUNCTIONS[function][0](backend=backend, **own | {argument: odd})


def same(a, b):
    a, b = (x if isinstance(x, tuple) else (x,) for x in (a, b))
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(
            torch.as_tensor(x), torch.as_tensor(y), rtol=2e-5, atol=2e-6, equal_nan=True, check_dtype=False
        )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("oddity", SAME)
def test_what_keeps_its_values_gives_the_same_result(oddity, backend):  # A7
    for function, layout, argument, _ in calls([oddity]):
        call = odd_call(function, layout, argument, SAME[oddity], backend)
        if call is not None:
            same(call(), plain_result(function, layout, backend))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("oddity", REFUSED)
def test_what_cannot_be_read_is_refused_by_name(oddity, backend):
    refused = 0
    for function, layout, argument, _ in calls([oddity]):
        call = odd_call(function, layout, argument, REFUSED[oddity], backend)
        if call is None or (argument == "cu_seqlens" and oddity == "one document more"):
            continue
        names = f"{argument}|student_logits|teacher_logits|target_logits|labels|backend" if oddity in DISAGREE else argument
        with pytest.raises((TypeError, ValueError, RuntimeError), match=f"({names})"):
            call()
        refused += 1
    assert refused > 5


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_negated_view_of_the_report(backend):  # A7
    x, t, y = torch.randn(2, 5), torch.randn(2, 5, 3), torch.randint(0, 3, (2, 5))
    odd = torch.complex(x, x).conj().imag
    assert odd.is_neg()
    assert torch.equal(pile_fast.pile_loss(odd, t, y, backend=backend), pile_fast.pile_loss(-x, t, y, backend=backend))
    leaf = x.clone().requires_grad_()
    pile_fast.pile_loss(torch._neg_view(leaf), t, y, backend=backend).backward()
    other = x.clone().requires_grad_()
    pile_fast.pile_loss(-other, t, y, backend=backend).backward()
    assert torch.equal(leaf.grad, other.grad)


@pytest.mark.parametrize("shape", [(0, 5), (2, 0), (0, 0), (1, 1)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_at_all(shape, backend):
    z, t, y = torch.randn(shape), torch.randn(*shape, 3), torch.zeros(shape)
    assert pile_fast.pile_loss(z, t, y, backend=backend) == 0
    assert pile_fast.pile_ensemble(t, y, backend=backend).logits.shape == shape
    for method in set(ensembles.ENSEMBLES) - ensembles.NEEDS_STUDENT:
        assert ensembles.ENSEMBLES[method](t, y).logits.shape == shape


@pytest.mark.parametrize("backend", BACKENDS)
def test_expanded_tensors(backend):
    z, t, y = torch.randn(1, 5).expand(3, 5), torch.randn(1, 5, 1).expand(3, 5, 4), torch.tensor([[2.0], [1], [0]]).expand(3, 5)
    same(
        pile_fast.pile_loss(z, t, y, alpha=0.5, backend=backend),
        pile_fast.pile_loss(z.contiguous(), t.contiguous(), y.contiguous(), alpha=0.5, backend=backend),
    )


# -- tensors that stand for others


def problem():
    return torch.randn(3, 6), torch.randn(3, 6, 2), torch.randint(0, 3, (3, 6))


CALLS = {loss.name: loss.call for loss in losses(iterations=10) if not loss.repeats}
CALLS["pile_ensemble"] = lambda z, t, y, **kw: pile_fast.pile_ensemble(t, y, **kw).logits


@pytest.fixture(params=CALLS)
def call(request):
    return CALLS[request.param]


@pytest.mark.parametrize("allow", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_fake_tensors_have_shapes_alone(call, backend, allow):
    real = problem()
    want = call(*real, backend=backend)
    with FakeTensorMode(allow_non_fake_inputs=allow) as mode:
        got = call(*(mode.from_tensor(x) for x in real), backend=backend)
        assert type(got).__name__ == "FakeTensor"
        if allow:
            assert call(*real, backend=backend).shape == want.shape
    assert got.shape == want.shape and got.dtype == want.dtype


def test_meta_tensors_have_shapes_alone(call):
    z, t, y = problem()
    got = call(z.to("meta"), t.to("meta"), y.to("meta"))
    assert got.device.type == "meta" and got.shape == call(z, t, y).shape


@pytest.mark.parametrize("backend", BACKENDS)
def test_traced_graphs_compute_with_what_they_are_given(call, backend):
    real, other = problem(), problem()
    want = call(*other, backend=backend)
    graph = make_fx(lambda z, t, y: call(z, t, y, backend=backend))(*real)
    torch.testing.assert_close(graph(*other), want, equal_nan=True)
    with torch.no_grad():
        traced = torch.jit.trace(lambda z, t, y: call(z, t, y, backend=backend), real, check_trace=False)
    torch.testing.assert_close(traced(*other), want, equal_nan=True)


def test_transforms_are_refused_by_name(call):
    z, t, y = problem()
    with pytest.raises(RuntimeError, match="_logits: is inside a torch.func transform"):
        torch.func.vmap(lambda z, t, y: call(z[None], t[None], y[None]))(z, t, y)
    if call is not CALLS["pile_ensemble"]:
        with pytest.raises(RuntimeError, match="student_logits: is inside a torch.func transform"):
            torch.func.grad(lambda z: call(z, t, y).sum())(z)
        with pytest.raises(RuntimeError, match="student_logits: (is inside|carries a forward-mode tangent)"):
            torch.func.jvp(lambda z: call(z, t, y), (z,), (z,))
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(z, z)
            with pytest.raises(RuntimeError, match="student_logits: carries a forward-mode tangent"):
                call(dual, t, y)


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_the_default_device_is_not_where_results_go(call, device):
    z, t, y = problem()
    want = call(z, t, y)
    with torch.device(device):
        got = call(z, t, y)
    assert got.device.type == "cpu"
    torch.testing.assert_close(got, want, equal_nan=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_prior_compiles_with_dynamic_shapes(backend):  # B5
    loss_fn = pile_fast.PILELoss(prior=torch.tensor([1.0, 2.0]), backend=backend).eval()
    compiled = torch.compile(loss_fn, fullgraph=True, dynamic=True, backend="aot_eager")
    for queries, slots in ((3, 6), (4, 9)):
        z, t, y = torch.randn(queries, slots), torch.randn(queries, slots, 2), torch.randint(0, 3, (queries, slots))
        torch.testing.assert_close(compiled(z, t, y), loss_fn(z, t, y))
    options = dict(granularity="query", backend=backend)
    per_query = torch.compile(
        lambda z, t, y, prior: pile_fast.pile_loss(z, t, y, prior=prior, **options), fullgraph=True, dynamic=True,
        backend="aot_eager",
    )  # fmt: skip
    prior = torch.rand(4, 2)
    torch.testing.assert_close(per_query(z, t, y, prior), pile_fast.pile_loss(z, t, y, prior=prior, **options))


# -- options and metrics


def test_an_unknown_backend_is_refused_when_the_loss_is_built():  # C4
    with pytest.raises(ValueError, match="backend: expected one of 'auto'.*got 'cude'"):
        pile_fast.PILELoss(backend="cude")
    with pytest.raises(ValueError, match="prior: expected finite weights >= 0"):  # A8
        pile_fast.PILELoss(prior=torch.tensor([1.0, torch.inf]))(*(x[..., :2] if x.dim() == 3 else x for x in problem()))


@pytest.mark.parametrize("metric", ["ndcg", "mrr", "average_precision", "pnr", "opa"])
@pytest.mark.parametrize("oddity", ["negated view", "slice with gaps", "a subclass", "float64"])
def test_metrics_read_odd_tensors(metric, oddity):
    z, _, y = problem()
    function = getattr(metrics, metric)
    same(function(SAME[oddity](z), SAME[oddity](y.float())), function(z, y.float()))


@pytest.mark.parametrize("metric", ["ndcg", "mrr", "average_precision", "pnr", "opa"])
def test_metrics_refuse_labels_that_tie_in_float64(metric):
    with pytest.raises(ValueError, match="labels: expected integers below 2\\^53"):
        getattr(metrics, metric)(torch.tensor([[0.3, 0.2]]), torch.tensor([[2**53, 2**53 + 1]]))


# -- without the compiled library, and Ctrl-C


def python(code):
    return subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=120)


def test_without_the_compiled_library_one_warning_says_so():  # C5
    done = python("""
        import sys, warnings
        sys.modules["pile_fast._cpu"] = None  # as if it had not been built
        import torch, pile_fast
        for _ in range(3):
            print(pile_fast.pile_loss(torch.zeros(1, 3), torch.randn(1, 3, 2), torch.tensor([[1, 0, 2]])).item())
        """)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("RuntimeWarning") == 1 and "plain PyTorch" in done.stderr and "C++17 compiler" in done.stderr


@pytest.mark.skipif(bool(cpp.unavailable()), reason=cpp.unavailable() or "built")
@pytest.mark.parametrize("queries, slots, pairwise", [(1, 60_000, "direct"), (9_000, 400, "direct"), (1, 700_000, "chebyshev")])
def test_ctrl_c_stops_a_long_call(queries, slots, pairwise):  # B15
    code = f"""
        import torch, pile_fast
        z, t, y = torch.randn({queries}, {slots}), torch.randn({queries}, {slots}, 2), torch.randn({queries}, {slots})
        print("ready", flush=True)
        try:
            pile_fast.pile_loss(z, t, y, iterations=1000, pairwise="{pairwise}", backend="cpp")
        except KeyboardInterrupt:
            print("stopped", pile_fast.pile_loss(z[:1, :9], t[:1, :9], y[:1, :9]).isfinite().item())
        """
    with subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "ready\n"
        time.sleep(0.5)
        start = time.monotonic()
        process.send_signal(signal.SIGINT)
        assert process.stdout.read() == "stopped True\n"
        assert time.monotonic() - start < 10  # a second on an idle machine; unstopped it takes minutes
        assert process.wait() == 0
