"""Prove and time the GPU kernels, Triton's and CUDA's: `make gpu-check`, or this file alone with any Python that has PyTorch
and Triton, and nvcc beside it.

It needs nothing but a checkout and no network: the package is made importable through a temporary folder of symlinks,
nothing is installed, and the CUDA extension is built for the device at hand (build/gpu_check keeps its objects). Every stage
writes benchmarks/results/<device>/gpu_<stage>.json before the next begins, also when it fails.

    python benchmarks/gpu_check.py                     # all stages, both backends
    python benchmarks/gpu_check.py correctness speed   # some
    python benchmarks/gpu_check.py --backend cuda      # one backend
    python benchmarks/gpu_check.py --dry-run           # on a CPU, tiny: does the script itself work? Triton in its interpreter,
                                                       # CUDA in the emulation that PILE_FAST_CUDA_EMULATION names
"""

from __future__ import annotations

import argparse
import ctypes
import datetime
import importlib.util
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DRY = "--dry-run" in sys.argv
STARTED = time.perf_counter()
if DRY:
    os.environ["TRITON_INTERPRET"] = "1"

# Importable as installed: pile_fast with kernels/ inside. Never the checkout itself on the path: its kernels/ would shadow
# Hugging Face's package of that name.
_links = tempfile.TemporaryDirectory()
_package = Path(_links.name) / "pile_fast"
_package.mkdir()
for _entry in (ROOT / "pile_fast").iterdir():
    if not _entry.name.startswith("_cuda."):  # this device's own comes from build_extension()
        (_package / _entry.name).symlink_to(_entry)
(_package / "kernels").symlink_to(ROOT / "kernels")
sys.path.insert(0, _links.name)
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() not in (ROOT, ROOT / "benchmarks")]

import torch  # noqa: E402

_spec = importlib.util.spec_from_file_location("nvcc", ROOT / "csrc/cuda/nvcc.py")
nvcc = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(nvcc)

BUILD = ROOT / "build/gpu_check"
DEVICE = "cpu" if DRY else "cuda"


def build_extension() -> dict:
    """pile_fast._cuda for the device at hand, into the package of symlinks. PyTorch brings pybind11's headers along."""
    if DRY or not torch.cuda.is_available() or torch.version.hip is not None:
        return dict(ok=True, skipped="no NVIDIA GPU")
    start = time.perf_counter()
    arch = "{}{}".format(*torch.cuda.get_device_capability())
    target = _package / f"_cuda{sysconfig.get_config_var('EXT_SUFFIX')}"
    try:
        nvcc.build(target, str(Path(torch.__file__).parent / "include"), BUILD, (arch,))
    except Exception:  # reported as the stage "build"; Triton's stages still run
        return dict(ok=False, error=traceback.format_exc())
    return dict(ok=True, arch=arch, build_seconds=round(time.perf_counter() - start, 1))


BUILT = build_extension()  # before pile_fast looks for it

import pile_fast  # noqa: E402
from pile_fast.options import ensemble_options, loss_options  # noqa: E402

BACKENDS: list[str] = []  # those under test, set by main()


def hows():
    return [dict(backend=name) for name in BACKENDS]


def data(queries, documents, teachers, *, missing=0.0, unlabelled=0.0, masked=0.0, spread=1.0, continuous=False, seed=0):
    g = torch.Generator().manual_seed(seed)
    truth = torch.randn(queries, documents, 1, generator=g)
    t = spread * (truth + torch.randn(queries, documents, teachers, generator=g))
    y = truth[..., 0] + 0.5 * torch.randn(queries, documents, generator=g)
    if not continuous:
        y = (y * 1.5 + 2).round().clamp(0, 4)
    t[torch.rand(t.shape, generator=g) < missing] = torch.nan
    y[torch.rand(y.shape, generator=g) < unlabelled] = torch.nan
    mask = (torch.rand(y.shape, generator=g) >= masked).to(DEVICE) if masked else None
    z = spread * torch.randn(queries, documents, generator=g)
    return z.to(DEVICE), t.to(DEVICE), y.to(DEVICE), mask


def loss_and_gradient(z, t, y, **options):
    z = z.detach().clone().requires_grad_()
    loss = pile_fast.pile_loss(z, t, y, **options)
    loss.sum().backward()
    return loss.detach(), z.grad


def error(got, want):
    """Largest difference; infinite where one is NaN and the other is not."""
    if bool((got.isnan() != want.isnan()).any()):
        return float("inf")
    return (got.double() - want.double()).abs().nan_to_num().max().item() if got.numel() else 0.0


# -- stages of one backend: each returns a JSON-able dict; {"ok": False} or an exception is a failure


def correctness(how):
    """Against the float64 reference, held to the contract or to three times the float32 reference's own error."""
    rows = []
    shapes = (
        [(2, 7, 3)]
        if DRY
        else [(3, 1, 2), (5, 2, 1), (4, 7, 3), (9, 33, 5), (130, 100, 4), (3, 300, 4), (200, 129, 8), (2, 1000, 8)]
    )
    for number, shape in enumerate(shapes):
        for granularity in ("document", "query"):
            for case, (make, options) in enumerate(
                [
                    ({}, {}),
                    (dict(missing=0.4, unlabelled=0.3, masked=0.3), dict(pair_weight="label_gap", margin=0.3)),
                    (dict(missing=0.2, continuous=True), dict(normalize="none", temperature=2.0)),
                    (dict(spread=30.0), dict(normalize="center", pair_weight="gain_gap", temperature=0.5, iterations=3)),
                ]
            ):
                z, t, y, mask = data(*shape, seed=number, **make)
                # The linear sums' launches for lists of several blocks; what "auto" takes for the others.
                pairwise = "chebyshev" if shape[1] in (129, 300, 1000) and case < 3 else "auto"
                options = dict(options, granularity=granularity, mask=mask)
                own = dict(how, pairwise=pairwise)
                want = pile_fast.pile_ensemble(t.double(), y, backend="torch", **options).logits
                same = pile_fast.pile_ensemble(t, y, backend="torch", **options).logits
                got = pile_fast.pile_ensemble(t, y, **options, **own).logits
                bound = max(2e-6 * max(t.nan_to_num().abs().max().item(), 1.0), 3 * error(same, want))
                row = dict(
                    shape=shape,
                    granularity=granularity,
                    case=case,
                    pairwise=pairwise,
                    what="ensemble",
                    error=error(got, want),
                    bound=bound,
                )
                rows.append(row)
                for alpha, distillation in ((1.0, "logistic"), (0.3, "logistic"), (0.5, "mse"), (0.0, "logistic")):
                    extra = dict(options, alpha=alpha, distillation=distillation)
                    want = loss_and_gradient(z.double(), t.double(), y, backend="torch", **extra)
                    same = loss_and_gradient(z, t, y, backend="torch", **extra)
                    got = loss_and_gradient(z, t, y, **extra, **own)
                    bounds = 2e-6 * max(1.0, want[0].abs().max().item()), 1e-5 * want[1].abs().max().item() + 1e-37
                    for what, a, b, c, bound in zip(("loss", "gradient"), got, same, want, bounds, strict=True):
                        bound = max(bound, 3 * error(b, c))
                        rows.append(
                            dict(shape=shape, granularity=granularity, case=case, pairwise=pairwise,
                                 what=f"{what} alpha={alpha} {distillation}", error=error(a, c), bound=bound)
                        )  # fmt: skip
    bad = [row for row in rows if not row["error"] <= row["bound"]]
    return dict(ok=not bad, checks=len(rows), failed=bad[:50], worst=max(r["error"] / r["bound"] for r in rows))


def half(how):
    rows = []
    for dtype in (torch.bfloat16, torch.float16):
        z, t, y, _ = data(2, 7 if DRY else 100, 3)
        z, t = z.to(dtype), t.to(dtype)
        want = pile_fast.pile_ensemble(t.double(), y, backend="torch").logits
        got = pile_fast.pile_ensemble(t, y, **how).logits
        rows.append(dict(dtype=str(dtype), what="ensemble", error=error(got, want), bound=2e-6 * t.abs().max().item()))
        want = loss_and_gradient(z.double(), t.double(), y, backend="torch")
        got = loss_and_gradient(z, t, y, **how)
        bound = 2 * torch.finfo(dtype).eps * want[1].abs().max().item()
        rows.append(dict(dtype=str(dtype), what="gradient", error=error(got[1], want[1]), bound=bound))
    return dict(ok=all(r["error"] <= r["bound"] for r in rows), rows=rows)


def compiled(how):
    """torch.compile(fullgraph=True) gives what eager gives."""
    z, t, y, _ = data(2, 7 if DRY else 60, 3)
    step = torch.compile(
        lambda z: pile_fast.pile_loss(z, t, y, alpha=0.5, **how), fullgraph=True, backend="aot_eager" if DRY else "inductor"
    )
    a = z.clone().requires_grad_()
    step(a).backward()
    _, gradient = loss_and_gradient(z, t, y, alpha=0.5, **how)
    return dict(ok=torch.equal(a.grad, gradient), error=error(a.grad, gradient))


def graph(how):
    """Capture in a CUDA graph, change the inputs, replay."""
    if DRY:
        return dict(ok=True, skipped="needs a GPU")
    rows = []
    for shape, packed in (((8, 60, 4), False), ((2, 700, 4), False), ((8, 60, 4), True)):
        z, t, y, _ = data(*shape)
        options = dict(how)
        if packed:
            z, t, y = z.flatten(), t.flatten(0, 1), y.flatten()
            options["cu_seqlens"] = torch.arange(0, z.numel() + 1, shape[1], device=DEVICE)
        z.requires_grad_()
        replay = capture(lambda z=z, t=t, y=y, options=options: gradient_of(z, t, y, options))
        with torch.no_grad():
            t.copy_(t.flip(0))
            z.mul_(0.5)
        got = replay()
        torch.cuda.synchronize()
        want = loss_and_gradient(z, t, y, **options)[1]
        rows.append(dict(shape=shape, packed=packed, equal=torch.equal(got, want)))
    return dict(ok=all(r["equal"] for r in rows), rows=rows)


def gradient_of(z, t, y, options):
    (gradient,) = torch.autograd.grad(pile_fast.pile_loss(z, t, y, **options), z)
    return gradient


def capture(run):
    """A function that replays `run` as a CUDA graph and returns what it returned."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    cuda_graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(cuda_graph):
        out = run()

    def replay():
        cuda_graph.replay()
        return out

    return replay


def no_sync(how):
    """Nothing reads the device, padded or packed, in one launch or several."""
    if DRY:
        return dict(ok=True, skipped="needs a GPU")
    cu_seqlens = torch.tensor([0, 100, 700, 1400], device=DEVICE)
    lists = [(data(4, 50, 3), {}), (data(2, 700, 3), {}), (data(1, 1400, 3), dict(cu_seqlens=cu_seqlens))]
    for (z, t, y, _), options in lists:
        if options:
            z, t, y = z[0], t[0], y[0]
        z.requires_grad_()
        for granularity in ("document", "query"):
            torch.cuda.set_sync_debug_mode("error")
            try:
                for reduction in ("mean", "sum", "none"):
                    loss = pile_fast.pile_loss(
                        z, t, y, alpha=0.5, granularity=granularity, reduction=reduction, **options, **how
                    )
                    torch.autograd.grad(loss.sum(), z)
            finally:
                torch.cuda.set_sync_debug_mode("default")
    return dict(ok=True)


def lengths(how):
    """Lists of 1 to 100,000 documents, checked against the float64 reference where its n x n memory fits."""
    rows = []
    for n in (1, 7) if DRY else (1, 7, 100, 1000, 100_000):
        z, t, y, _ = data(1, n, 4)
        start = time.perf_counter()
        loss, gradient = loss_and_gradient(z, t, y, **how)
        row = dict(n=n, seconds_with_compilation=time.perf_counter() - start, loss=loss.item())
        row["ok"] = bool(loss.isfinite()) and bool(gradient.isfinite().all())
        if n <= 1000:
            want = loss_and_gradient(z.double(), t.double(), y, backend="torch")
            row["error"] = error(gradient, want[1])
            row["ok"] &= row["error"] <= 1e-5 * want[1].abs().max().item()
        rows.append(row)
    return dict(ok=all(r["ok"] for r in rows), rows=rows)


def million(how):
    """One list of 1,000,000 documents, in linear time."""
    z, t, y, _ = data(1, 9 if DRY else 1_000_000, 8)
    start = time.perf_counter()
    loss, gradient = loss_and_gradient(z, t, y, **how)
    ok = bool(loss.isfinite()) and bool(gradient.isfinite().all())
    return dict(ok=ok, loss=loss.item(), seconds_with_compilation=time.perf_counter() - start)


def repeatable(how):
    rows = []
    for shape in [(2, 7, 3)] if DRY else [(300, 100, 4), (2, 1500, 4)]:
        z, t, y, _ = data(*shape)
        first = loss_and_gradient(z, t, y, alpha=0.5, **how)
        equal = all(
            torch.equal(a, b)
            for _ in range(2 if DRY else 20)
            for a, b in zip(first, loss_and_gradient(z, t, y, alpha=0.5, **how), strict=True)
        )
        rows.append(dict(shape=shape, equal=equal))
    return dict(ok=all(r["equal"] for r in rows), rows=rows)


def wide(how):
    """More than 2^31 logits in one tensor: addresses are 64 bits."""
    queries, documents, teachers = (2, 8, 4) if DRY else (2**31 // (64 * 8) + 8, 64, 8)
    need = queries * documents * (2 * teachers + 4 * (teachers + 14))  # float16 teachers, float32 scratch
    if not DRY and torch.cuda.mem_get_info()[0] < 1.1 * need:
        return dict(ok=True, skipped=f"needs {need / 2**30:.0f} GiB of free GPU memory")
    t = torch.zeros(queries, documents, teachers, dtype=torch.float16, device=DEVICE)
    y = torch.zeros(queries, documents, dtype=torch.uint8, device=DEVICE)
    z, some, labels, _ = data(1, documents, teachers)
    t[-1], y[-1] = some[0].half(), labels[0].to(torch.uint8)
    got = pile_fast.pile_ensemble(t, y, iterations=2, **how).logits[-1]
    want = pile_fast.pile_ensemble(t[-1:].double(), y[-1:], iterations=2, backend="torch").logits[0]
    return dict(ok=error(got, want) <= 1e-5, logits=t.numel(), error=error(got, want))


def streams(how):
    """Two streams at once, each with its own inputs: what either gives alone."""
    if DRY:
        return dict(ok=True, skipped="needs a GPU")
    rows = []
    for shape in ((64, 60, 4), (2, 1500, 4)):
        inputs = [data(*shape, seed=seed)[:3] for seed in range(2)]
        want = [loss_and_gradient(*one, **how) for one in inputs]
        both = [torch.cuda.Stream() for _ in inputs]
        torch.cuda.synchronize()
        got = [[], []]
        for _ in range(20):
            for which, stream in enumerate(both):
                with torch.cuda.stream(stream):
                    got[which].append(loss_and_gradient(*inputs[which], **how))
        torch.cuda.synchronize()
        equal = all(torch.equal(a, b) for one, w in zip(got, want, strict=True) for g in one for a, b in zip(g, w, strict=True))
        rows.append(dict(shape=shape, equal=equal))
    return dict(ok=all(r["equal"] for r in rows), rows=rows)


def devices(how):
    """Tensors on a device that is not the current one."""
    if DRY or torch.cuda.device_count() < 2:
        return dict(ok=True, skipped="needs two GPUs")
    z, t, y, _ = data(4, 60, 3)
    want = loss_and_gradient(z, t, y, **how)
    got = loss_and_gradient(z.to("cuda:1"), t.to("cuda:1"), y.to("cuda:1"), **how)
    return dict(
        ok=torch.cuda.current_device() == 0 and all(torch.equal(a, b.to(a.device)) for a, b in zip(want, got, strict=True))
    )


def sanitizer(how):
    """The CUDA kernels under compute-sanitizer, small: memcheck, racecheck, initcheck."""
    if how["backend"] != "cuda":
        return dict(ok=True, skipped="for the CUDA backend")
    if DRY:
        return dict(ok=True, skipped="needs a GPU")
    tool = shutil.which("compute-sanitizer", path=str(Path(nvcc.find_nvcc()).resolve().parent)) or shutil.which(
        "compute-sanitizer"
    )
    if tool is None:
        return dict(ok=True, skipped="compute-sanitizer was not found beside nvcc or in PATH")
    rows = []
    for check in ("memcheck", "racecheck", "initcheck"):
        command = [tool, "--tool", check, "--error-exitcode", "9", "--kernel-regex", "kns=pile", sys.executable, __file__,
                   "--small-cases"]  # fmt: skip
        env = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=100, env=env)
            rows.append(dict(tool=check, ok=done.returncode == 0, output=done.stdout[-2000:] + done.stderr[-500:]))
        except subprocess.TimeoutExpired:
            rows.append(dict(tool=check, ok=False, output="no end within 100 s"))
    return dict(ok=all(r["ok"] for r in rows), rows=rows)


def small_cases() -> int:
    """Every CUDA kernel once, for the sanitizer."""
    for shape in ((3, 20, 4), (2, 50, 3), (1, 1100, 4)):
        z, t, y, mask = data(*shape, missing=0.1, unlabelled=0.1, masked=0.1)
        for granularity in ("document", "query"):
            options = dict(mask=mask, granularity=granularity, iterations=2, backend="cuda")
            for pairwise in ("direct", "chebyshev"):
                pile_fast.pile_ensemble(t, y, return_weights=True, return_trace=True, pairwise=pairwise, **options)
                loss_and_gradient(z, t, y, alpha=0.5, pair_weight="label_gap", pairwise=pairwise, **options)
    cu_seqlens = torch.tensor([0, 3, 10, 250, 270], device=DEVICE)
    z, t, y, _ = data(1, 275, 3)
    loss_and_gradient(z[0], t[0], y[0], cu_seqlens=cu_seqlens, iterations=2, backend="cuda")
    torch.cuda.synchronize()
    return 0


# -- the benchmark


def replay_ms(make, inputs, budget_s=2.0):
    """Median milliseconds of a CUDA-graph replay; one graph per input set, taken in turn so that no input waits in L2."""
    replays = [capture(lambda one=one: make(*one)) for one in inputs]
    for replay in replays:
        replay()
    torch.cuda.synchronize()
    times = []
    start = time.perf_counter()
    while len(times) < 20 or (time.perf_counter() - start < budget_s and len(times) < 400):
        for replay in replays:
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            replay()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end))
    return statistics.median(times)


def floors():
    """What this GPU does at most: copies, reciprocals, multiply-adds, a launch. Own kernels, through ctypes."""
    if DRY:
        return dict(ok=True, skipped="needs a GPU")
    result = dict(ok=True)
    source = torch.empty(2**28, dtype=torch.float32, device=DEVICE)
    to = torch.empty_like(source)
    result["copy_gb_per_s"] = 2 * source.numel() * 4 / replay_ms(lambda: to.copy_(source), [()], 0.5) / 1e6
    if BUILT.get("arch") is None:
        return result | dict(skipped_rates="the kernels are CUDA C++ and nvcc did not build")
    library = BUILD / "_gpu_floors.so"
    source_file = ROOT / "benchmarks/_gpu_floors.cu"
    arch = f"-arch=sm_{BUILT['arch']}"
    nvcc.run(nvcc.find_nvcc(), "-O3", "-shared", "-Xcompiler=-fPIC", arch, source_file, "-o", library)
    calls = ctypes.CDLL(str(library))
    stream = lambda: ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)  # noqa: E731
    blocks, iterations = 8 * torch.cuda.get_device_properties(0).multi_processor_count, 4096

    def rate(name):
        kernel = getattr(calls, f"floor_{name}")
        took = replay_ms(lambda: kernel(ctypes.c_void_p(to.data_ptr()), blocks, iterations, stream()), [()], 0.5)
        return blocks * 256 * 8 * iterations / took / 1e6

    result["reciprocals_g_per_s"] = rate("reciprocals")
    result["multiply_adds_g_per_s"] = rate("multiply_adds")
    result["launch_us"] = 1e3 * replay_ms(lambda: calls.floor_launch(stream()), [()], 0.5)
    return result


def ragged(queries, documents, teachers):
    """The same number of documents, packed, a list holding from a quarter to one and three quarters of the mean."""
    z, t, y, _ = data(1, queries * documents, teachers)
    lengths = (documents * (0.25 + 1.5 * torch.rand(queries, generator=torch.Generator().manual_seed(0)))).long().clamp(min=1)
    ends = lengths.cumsum(0).clamp(max=queries * documents)
    return z[0], t[0], y[0], torch.cat([torch.zeros(1, dtype=torch.long), ends]).to(DEVICE)


def speed():
    """pile_loss, T = 10, float32: the backends, eager PyTorch, torch.compile; forward alone, with backward, padded, packed."""
    if DRY:
        return dict(ok=True, skipped="needs a GPU")
    from pile_fast import reference

    ensemble = ensemble_options()
    loss = loss_options()

    def plain(z, t, y):
        valid = torch.ones_like(y, dtype=torch.bool)
        with torch.no_grad():
            target = reference.ensemble(t, y, valid, ensemble).logits
        value = reference.reduce(reference.pair_loss(z, target, y, valid, loss), "mean")
        return torch.autograd.grad(value, z)[0]

    def forward(z, t, y, options):
        return pile_fast.pile_loss(z.detach(), t, y, **options)

    rows = []
    for shape in ((32, 64, 4), (1024, 32, 4), (1024, 128, 4), (4096, 128, 4), (1024, 512, 8), (16, 1024, 8), (1, 100_000, 8)):
        queries, documents, teachers = shape
        z, t, y, _ = data(*shape)
        size = 4 * (z.numel() * 3 + t.numel())
        copies = max(2, min(16, 2 * torch.cuda.get_device_properties(0).L2_cache_size // size + 1))
        inputs = [(z.clone().requires_grad_(), t.clone(), y.clone()) for _ in range(copies)]
        row = dict(shape=shape, bytes=size)
        for how in hows():
            name = how["backend"]
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            gradient_of(*inputs[0], how)
            row[f"{name}_peak_extra_bytes"] = torch.cuda.max_memory_allocated() - before
            for pairwise in ("auto", "direct", "chebyshev") if documents <= 2000 else ("auto",):
                own = dict(how, pairwise=pairwise)
                key = f"{name}_{pairwise}_ms"
                row[key] = replay_ms(lambda z, t, y, own=own: gradient_of(z, t, y, own), inputs, 0.7)
            row[f"{name}_forward_ms"] = replay_ms(lambda z, t, y, how=how: forward(z, t, y, how), inputs, 0.7)
            if 1 < queries and documents >= 64:
                rz, rt, ry, cu_seqlens = ragged(*shape)
                packed = dict(how, cu_seqlens=cu_seqlens)
                packed_inputs = [(rz.requires_grad_(), rt, ry)]
                row[f"{name}_packed_ms"] = replay_ms(lambda z, t, y, o=packed: gradient_of(z, t, y, o), packed_inputs, 0.7)
        # The memory floor: PyTorch copies the inputs (reads them once, writes as much).
        row["copy_ms"] = replay_ms(lambda z, t, y: (z.detach().clone(), t.clone(), y.clone()), inputs, 0.5)
        compiled = torch.compile(plain, dynamic=False)
        for name, make in (("eager_ms", plain), ("compile_ms", compiled)):
            # n x n memory; and a compilation of ten iterations takes a minute, so one shape has to do.
            if documents > 2000 or (name == "compile_ms" and shape != (1024, 128, 4)):
                continue
            try:
                row[name] = replay_ms(make, inputs[:2], 0.7)
            except Exception as problem:  # out of memory, mostly: a fact worth keeping
                row[f"{name}_problem"] = str(problem)[:200]
                torch.cuda.empty_cache()
        print("   ", row, flush=True)
        rows.append(row)
    return dict(ok=True, rows=rows)


class _Empty(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z):
        return z.new_zeros(())

    @staticmethod
    def backward(ctx, upstream):
        return None


def eager():
    """Wall time of a whole eager step, Python included, 32 x 64 x 4, against an empty autograd.Function's."""
    z, t, y, _ = data(*((2, 7, 3) if DRY else (32, 64, 4)))
    z.requires_grad_()

    def seconds(step, repeats=3 if DRY else 300):
        for _ in range(1 if DRY else 20):
            step()
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            step()
            times.append(time.perf_counter() - start)
        if not DRY:
            torch.cuda.synchronize()
        return statistics.median(times)

    empty = seconds(lambda: _Empty.apply(z).backward())
    row = dict(empty_us=1e6 * empty)
    for how in hows():
        took = seconds(lambda how=how: pile_fast.pile_loss(z, t, y, **how).backward())
        row[f"{how['backend']}_us"], row[f"{how['backend']}_ratio"] = 1e6 * took, took / empty
    return dict(ok=True, **row)


def training():
    """The loss's share of a MiniLM-L6 cross-encoder's training step, random weights, 32 queries x 64 documents."""
    if DRY:
        return dict(ok=True, skipped="needs a GPU")
    try:
        from transformers import BertConfig, BertForSequenceClassification
    except ImportError as problem:
        return dict(ok=True, skipped=f"transformers does not import: {problem}")
    queries, documents, tokens = 32, 64, 64
    config = BertConfig(
        hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536, num_labels=1,
    )  # fmt: skip
    model = BertForSequenceClassification(config).to(DEVICE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    _, t, y, _ = data(queries, documents, 4)
    ids = torch.randint(1000, 20000, (queries * documents, tokens), device=DEVICE)

    def step(loss):
        with torch.autocast("cuda", dtype=torch.bfloat16):
            z = model(input_ids=ids).logits.view(queries, documents)
        loss(z.float()).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def seconds(loss, repeats=10):
        for _ in range(3):
            step(loss)
        times = []
        for _ in range(repeats):
            torch.cuda.synchronize()
            start = time.perf_counter()
            step(loss)
            torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
        return statistics.median(times)

    mean = t.mean(-1)
    row = dict(mean_squares_ms=1e3 * seconds(lambda z: (z - mean).square().mean()))
    for how in hows():
        row[f"{how['backend']}_ms"] = 1e3 * seconds(lambda z, how=how: pile_fast.pile_loss(z, t, y, **how))
    return dict(ok=True, **row)


OF_A_BACKEND = dict(
    correctness=correctness, half=half, compiled=compiled, graph=graph, no_sync=no_sync, lengths=lengths,
    repeatable=repeatable, streams=streams, devices=devices, wide=wide, million=million, sanitizer=sanitizer,
)  # fmt: skip
OF_ALL = dict(build=lambda: BUILT, floors=floors, eager=eager, training=training, speed=speed)
# What proves comes first; what takes longest last.
ORDER = (
    "build", "correctness", "half", "compiled", "graph", "no_sync", "lengths", "repeatable", "streams", "devices", "floors",
    "eager", "training", "million", "wide", "sanitizer", "speed",
)  # fmt: skip


def attempt(stage, *arguments) -> dict:
    """The stage's result, or its failure: written down, reported, and the next stage still runs."""
    start = time.perf_counter()
    try:
        result = stage(*arguments)
    except Exception:
        result = dict(ok=False, error=traceback.format_exc())
    return dict(seconds=round(time.perf_counter() - start, 2)) | result


def run_stage(name: str) -> dict:
    if name in OF_ALL:
        return attempt(OF_ALL[name])
    results = {how["backend"]: attempt(OF_A_BACKEND[name], how) for how in hows()}
    return dict(ok=all(r["ok"] for r in results.values()), results=results)


def facts():
    commit = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True)
    about = dict(
        device=("interpreter" if "triton" in BACKENDS else "emulation") if DRY else torch.cuda.get_device_name(),
        backends=BACKENDS,
        date=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        commit=commit.stdout.strip() or None,
        torch=torch.__version__, python=platform.python_version(), cuda=torch.version.cuda, hip=torch.version.hip,
    )  # fmt: skip
    if "triton" in BACKENDS:
        import triton

        about["triton"] = triton.__version__
    if not DRY and shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        about["driver"] = subprocess.run(query, capture_output=True, text=True).stdout.split("\n")[0]
    return about


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("stages", nargs="*", help=", ".join(ORDER))
    parser.add_argument("--backend", action="append", choices=("triton", "cuda"), help="by default those that work here")
    parser.add_argument("--dry-run", action="store_true", help="on a CPU, at tiny sizes")
    parser.add_argument("--small-cases", action="store_true", help=argparse.SUPPRESS)  # what the sanitizer runs
    parser.add_argument("--minutes", type=float, default=8, help="no stage begins after so long (default 8)")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks/results")
    arguments = parser.parse_args()
    if arguments.small_cases:
        return small_cases()
    if unknown := set(arguments.stages) - set(ORDER):
        parser.error(f"no stage {', '.join(sorted(unknown))}; there are {', '.join(ORDER)}")
    available = pile_fast.available_backends()
    for name in arguments.backend or ("triton", "cuda"):
        if available[name].available:
            BACKENDS.append(name)
        else:
            print(f"backend {name} does not work here: {available[name].reason}", file=sys.stderr)
            if arguments.backend:
                return 1
    if not BACKENDS:
        return 1
    about = facts()
    folder = arguments.results / re.sub(r"[^a-z0-9]+", "-", about["device"].lower()).strip("-")
    folder.mkdir(parents=True, exist_ok=True)
    failed = []
    for name in arguments.stages or ORDER:
        start = time.perf_counter()
        late = start - STARTED > 60 * arguments.minutes
        result = dict(ok=False, error=f"not begun within {arguments.minutes:g} minutes") if late else run_stage(name)
        result = about | dict(stage=name, seconds=round(time.perf_counter() - start, 2)) | result
        (folder / f"gpu_{name}.json").write_text(json.dumps(result, indent=1, default=str) + "\n")
        word = "skipped" if "skipped" in result else "ok" if result["ok"] else "FAILED"
        print(f"{name}: {word} ({result['seconds']} s)", flush=True)
        if not result["ok"]:
            failed.append(name)
            print({k: v for k, v in result.items() if k not in about}, flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
