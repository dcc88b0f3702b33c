"""The native extension itself: bits, threads, instruction sets, forks, memory."""

import ast
import functools
import os
import re
import shutil
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest
import torch

import pile_fast
from pile_fast.backends import cpp, cuda
from pile_fast.options import EnsembleOptions, LossOptions

if cpp.unavailable():
    pytest.skip(cpp.unavailable(), allow_module_level=True)

from pile_fast import _cpu

SETS = _cpu.instruction_sets().split()


def problem(shape, m=4, labels="grades", missing=0.1):
    t = torch.randn(*shape, m)
    t[torch.rand(t.shape) < missing] = torch.nan
    y = torch.randint(0, 5, shape).float() if labels == "grades" else torch.randn(shape)
    return torch.randn(shape), t, y


def everything(z, t, y, **kw):
    """Every output of every op, for comparing bits."""
    outputs = []
    for granularity in ("document", "query"):
        outputs += pile_fast.pile_ensemble(
            t, y, granularity=granularity, return_weights=True, return_trace=True, iterations=4, backend="cpp", **kw
        )
    z = z.clone().requires_grad_()
    loss = pile_fast.pile_loss(z, t, y, alpha=0.5, iterations=4, backend="cpp", **kw)
    loss.backward()
    return [x.nan_to_num(-7.0) for x in (*outputs, loss.detach(), z.grad)]


# Many short queries; few long ones, which threads share, or each takes its own; a list beyond both kinds of block.
@pytest.mark.parametrize("shape", [(50, 30), (3, 300), (1, 4500), (2, 9000), (3, 4200)])
@pytest.mark.parametrize("labels", ["grades", "continuous"])
@pytest.mark.parametrize("pairwise", ["direct", "chebyshev"])
def test_the_same_bits_for_any_number_of_threads_and_every_time(shape, labels, pairwise):
    inputs = problem(shape, labels=labels)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        want = everything(*inputs, pairwise=pairwise)
        for count in (2, 2, 3, 5):
            torch.set_num_threads(count)
            for a, b in zip(everything(*inputs, pairwise=pairwise), want, strict=True):
                assert torch.equal(a, b)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("pairwise", ["direct", "chebyshev"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("labels", ["grades", "continuous"])
def test_every_instruction_set(name, pairwise, dtype, labels):
    z, t, y = problem((3, 250), labels=labels)
    z, t = z.to(dtype), t.to(dtype)
    best = _cpu.instruction_set()
    try:
        assert _cpu.set_instruction_set(name) and _cpu.instruction_set() == name
        got = everything(z, t, y, pairwise=pairwise)
    finally:
        _cpu.set_instruction_set(best)
    z = z.double().requires_grad_()
    want = pile_fast.pile_loss(z, t.double(), y, alpha=0.5, iterations=4, backend="torch")
    want.backward()
    tolerance = 2e-6 if dtype is torch.float32 else 1e-11
    assert abs(got[-2].item() - want.item()) <= tolerance
    assert (got[-1].double() - z.grad).abs().max() <= 10 * tolerance * z.grad.abs().max()


# 16 is the most that are sorted as grades; 0 and -0 are one; a part of a vector, or of two, at the end.
@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("distinct", [1, 2, 15, 16, 17, 40])
@pytest.mark.parametrize("n", [5, 8, 41, 111])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int64, torch.int8])
def test_few_labels_and_many(name, distinct, n, dtype):
    y = torch.randint(0, distinct, (2, n, 2)).to(dtype)
    if y.is_floating_point():
        y = torch.where((y == 0) & (torch.rand(y.shape) < 0.5), -y, y)
    y = y[..., 0]  # not contiguous
    z = torch.randn(2, n, dtype=torch.float64, requires_grad=True)
    best = _cpu.instruction_set()
    try:
        _cpu.set_instruction_set(name)
        got = pile_fast.ranking_loss(z, y, backend="cpp")
    finally:
        _cpu.set_instruction_set(best)
    want = pile_fast.ranking_loss(z, y, backend="torch")
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(*(torch.autograd.grad(loss, z)[0] for loss in (got, want)))


def test_an_unknown_instruction_set_is_refused():
    assert not _cpu.set_instruction_set("sse9")
    assert _cpu.instruction_set() == SETS[0]


@pytest.mark.parametrize("spread", [1e2, 1e3, 1e5])
def test_many_cells(spread):
    """Logits so wide that most cells do not see each other, and wider still, where the linear sum gives up its grid."""
    z = spread * torch.randn(1, 3000, dtype=torch.float64)
    s = spread * torch.randn(1, 3000, dtype=torch.float64)
    y = torch.randint(0, 3, (1, 3000))
    for loss in (
        lambda **kw: pile_fast.distillation_loss(z, s, backend="cpp", **kw),
        lambda **kw: pile_fast.ranking_loss(z, y, backend="cpp", **kw),
    ):
        torch.testing.assert_close(loss(pairwise="chebyshev"), loss(pairwise="direct"), rtol=1e-10, atol=0)


def test_calls_from_several_threads():
    z, t, y = problem((20, 60))
    want = everything(z, t, y)
    wrong = []

    def work():
        for _ in range(20):
            if not all(torch.equal(a, b) for a, b in zip(everything(z, t, y), want, strict=True)):
                wrong.append(1)

    workers = [threading.Thread(target=work) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


def run_python(code, **env):
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], env=os.environ | env, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("first", ["pile_fast.pile_ensemble(t, y)", "torch.ones(10**6).exp()"])
def test_a_forked_process_can_go_on(first):
    # As a DataLoader's worker does. The parent's threads are not in the child, whoever has started them.
    run_python(f"""
        import os, signal, torch, pile_fast
        from pile_fast.backends import cpp, cuda
        torch.set_num_threads(2)
        t, y = torch.randn(200, 50, 3), torch.randint(0, 3, (200, 50))
        {first}
        child = os.fork()
        if child == 0:
            signal.alarm(30)
            got = pile_fast.pile_ensemble(t, y, backend="cpp").logits
            torch.set_num_threads(1)
            want = pile_fast.pile_ensemble(t, y, backend="cpp").logits
            os._exit(0 if torch.equal(got, want) and cpp.threads() == 1 else 1)
        assert os.waitpid(child, 0)[1] == 0
    """)


def test_threads_are_those_of_pytorchs_openmp():
    assert cpp.threads() == torch.get_num_threads()
    threads = """
        import importlib.util, os
        spec = importlib.util.spec_from_file_location("pile_fast._cpu", {path!r})
        _cpu = importlib.util.module_from_spec(spec)
        {before}
        spec.loader.exec_module(_cpu)
        print(_cpu.has_threads())
    """
    run = functools.partial(threads.format, path=_cpu.__file__)
    assert run_python(run(before="import torch")) == "True"
    assert run_python(run(before="")) == "False"  # nobody has loaded an OpenMP runtime


def test_memory_of_a_long_list():
    """Extra memory of a call, outputs included, against the inputs: nothing grows with the square of the list."""
    peak = run_python("""
        import resource, torch, pile_fast
        n = 500_000
        z, t, y = torch.randn(1, n, requires_grad=True), torch.randn(1, n, 8), torch.randint(0, 5, (1, n)).float()
        pile_fast.pile_loss(z[:, :10], t[:, :10], y[:, :10]).backward()
        z.grad = None
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        pile_fast.pile_loss(z, t, y).backward()
        after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        print((after - before) * 1024 / (n * 4 * 10))
    """)
    assert float(peak) < 3.0, f"{peak} times the inputs"


def test_elements_beyond_two_to_the_31():
    # Two queries, the second 2^31 elements behind the first. Pages that nothing touches take no memory.
    _, t, y = problem((2, 40))
    spread_out = torch.empty(2**31 + t[0].numel(), dtype=torch.float16).as_strided(t.shape, (2**31, 4, 1))
    spread_out.copy_(t)
    assert spread_out.stride(0) == 2**31
    for a, b in zip(
        pile_fast.pile_ensemble(spread_out, y, return_weights=True, backend="cpp")[:2],
        pile_fast.pile_ensemble(t.half(), y, return_weights=True, backend="cpp")[:2],
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def test_scratch_memory_of_many_sizes_is_reused():
    for n in [10, 70_000, 300, 40_000, 90_000, 5] * 12:
        z, t, y = torch.randn(1, n), torch.randn(1, n, 8), torch.zeros(1, n)
        y[:, ::3] = 1
        pile_fast.pile_loss(z, t, y, alpha=0.5, iterations=1, backend="cpp")


def test_without_the_extension_everything_works_on_torch(tmp_path):
    """What a machine without a compiler has: the same results, and a reason that says what to do."""
    run_python("""
        import sys
        sys.modules["pile_fast._cpu"] = None
        import torch, pile_fast
        status = pile_fast.available_backends()["cpp"]
        assert not status.available and "compiler" in status.reason
        t, y = torch.randn(2, 9, 3), torch.randint(0, 3, (2, 9))
        pile_fast.pile_ensemble(t, y)
        try:
            pile_fast.pile_ensemble(t, y, backend="cpp")
        except RuntimeError as error:
            assert "not available" in str(error) and "compiler" in str(error)
        else:
            raise AssertionError
    """)


@pytest.mark.parametrize("granularity", ["document", "query"])
def test_what_an_earlier_call_left_in_memory_is_not_read(granularity):
    """Vectors begin where a block of labels begins and reach past the last document: 0 · NaN would be NaN."""
    generator = torch.Generator().manual_seed(0)

    def lists(n):
        labels = torch.randint(0, 5, (1, n), generator=generator)
        return labels[..., None] * 0.5 + torch.randn(1, n, 3, generator=generator), labels

    spoilt, spoilt_labels = lists(5000)
    spoilt[..., 0], spoilt[:, ::2, 1] = torch.inf, -torch.inf
    options = {"granularity": granularity, "backend": "cpp"}
    for n in (1003, 1999, 2500, 2501, 3300):
        teachers, labels = lists(n)
        student = torch.randn(1, n, generator=generator, requires_grad=True)
        pile_fast.pile_ensemble(spoilt, spoilt_labels, normalize="none", pairwise="direct", **options)
        ensemble = pile_fast.pile_ensemble(teachers, labels, pairwise="chebyshev", **options)
        assert ensemble.logits.isfinite().all()
        pile_fast.pile_ensemble(spoilt, spoilt_labels, normalize="none", pairwise="direct", **options)
        pile_fast.pile_loss(student, teachers, labels, alpha=0.5, pairwise="chebyshev", **options).backward()
        assert student.grad.isfinite().all()


def plain(annotation: str) -> str:
    """A type's bare name: "pile_fast._cpu.LossOptions" and "LossOptions | None" are one."""
    for extra in (r"\[.*\]", r" \| .*", r"^.*\.", "^supports"):
        annotation = re.sub(extra, "", annotation.lower())
    return annotation


def in_docstring(function) -> tuple[list[str], str]:
    """The types that pybind11 writes there: of the arguments, of what is returned."""
    arguments, returned = re.match(r"\w+\((.*)\) -> (.*)", function.__doc__).groups()
    return [plain(argument.split(": ")[1]) for argument in re.split(r", (?=\w+: )", arguments) if argument], plain(returned)


@pytest.mark.parametrize("name", ["_cpu", "_cuda"])
def test_the_stub_says_what_the_module_has(name):
    try:
        module = _cpu if name == "_cpu" else cuda._module()  # PILE_FAST_CUDA_EMULATION's, if there is one
    except ImportError as error:
        pytest.skip(str(error))
    stub = ast.parse((Path(pile_fast.__file__).parent / f"{name}.pyi").read_text())
    said = {}
    for node in stub.body:
        if isinstance(node, ast.AnnAssign):
            said[node.target.id] = ast.unparse(node.annotation)
        elif isinstance(node, ast.ClassDef | ast.FunctionDef):
            said[node.name] = node
    only_emulated = {"set_order", "set_shared_limit"}
    assert set(said) == {n for n in vars(module) if not n.startswith("__")} - only_emulated
    for name, node in said.items():
        thing = getattr(module, name)
        if isinstance(node, ast.FunctionDef):
            annotations = [ast.unparse(argument.annotation) for argument in (*node.args.posonlyargs, *node.args.args)]
            assert ([plain(a) for a in annotations], plain(ast.unparse(node.returns))) == in_docstring(thing), name
        elif isinstance(node, ast.ClassDef):
            attributes = {n.target.id for n in node.body if isinstance(n, ast.AnnAssign)}
            assert isinstance(thing, type) and attributes <= set(dir(thing)), name
        else:
            assert type(thing).__name__ == plain(node), name


def test_options_go_by_name():
    for options in (EnsembleOptions, LossOptions):
        struct = getattr(_cpu, options.__name__)()
        assert {name for name in dir(struct) if not name.startswith("_")} == set(options._fields)
    ensemble, loss = _cpu.EnsembleOptions(), _cpu.LossOptions()
    with pytest.raises(ValueError, match="granularity: expected one of shared, document, query, got 'list'"):
        ensemble.granularity = "list"
    with pytest.raises(AttributeError, match="stepsize"):
        ensemble.stepsize = 1.0
    for term, message in [
        (("distill_toy", {}), "distillation: this module has no 'distill_toy'"),
        (("distill_logistic", {}), "distillation: 'distill_logistic' needs its temperature"),
        (("distill_mse", {"temperature": 1.0}), "'distill_mse' got a number that it does not know"),
        (("label_logistic", {}), "distillation: this module has no 'label_logistic'"),
    ]:
        with pytest.raises(ValueError, match=message):
            loss.distillation = term


@pytest.mark.skipif(not shutil.which("nm"), reason="nm, of binutils, lists what objects define")
def test_instruction_sets_share_no_function():
    """Of a function that several objects define the linker keeps one. AVX-512's would stop other processors (SIGILL)."""
    objects = Path(__file__).resolve().parents[1] / "build/cpu"
    newest = {path.name.rpartition("-")[0]: path for path in sorted(objects.glob("kernels_*.o"), key=os.path.getmtime)}
    if not newest:
        pytest.skip("no objects in build/cpu: the extension was not built in place")
    owner = {}
    for name, path in newest.items():
        listing = subprocess.run(
            ["nm", "--defined-only", "--extern-only", "-P", path], capture_output=True, text=True, check=True
        )
        for symbol in (line.split()[0] for line in listing.stdout.splitlines()):
            # How exceptions are found is an address, no code.
            if not symbol.startswith("DW.ref."):
                assert owner.setdefault(symbol, name) == name, f"{symbol} in {owner[symbol]} and {name}"
    assert any("has_term" in symbol for symbol in owner)
