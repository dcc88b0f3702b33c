"""Prove and time the Triton kernels on a GPU: `make gpu-check`, or this file alone with any Python that has PyTorch and
Triton.

It needs nothing but a checkout: the package is made importable through a temporary folder of symlinks, nothing is installed.
Every stage writes benchmarks/results/<device>/gpu_<stage>.json before the next begins, also when it fails.

    python benchmarks/gpu_check.py                     # all stages
    python benchmarks/gpu_check.py correctness speed   # some
    python benchmarks/gpu_check.py --dry-run           # on a CPU, in Triton's interpreter, tiny: does the script itself work?
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DRY = "--dry-run" in sys.argv
if DRY:
    os.environ["TRITON_INTERPRET"] = "1"

# Importable as installed: pile_fast with kernels/ inside. Never the checkout itself on the path: its kernels/ would shadow
# Hugging Face's package of that name.
_links = tempfile.TemporaryDirectory()
_package = Path(_links.name) / "pile_fast"
_package.mkdir()
for _entry in (ROOT / "pile_fast").iterdir():
    (_package / _entry.name).symlink_to(_entry)
(_package / "kernels").symlink_to(ROOT / "kernels")
sys.path.insert(0, _links.name)
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() not in (ROOT, ROOT / "benchmarks")]

import torch  # noqa: E402

import pile_fast  # noqa: E402
from pile_fast.options import ensemble_options, loss_options  # noqa: E402

DEVICE = "cpu" if DRY else "cuda"
TRITON = dict(backend="triton")


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


# -- stages: each returns a JSON-able dict; {"ok": False} or an exception is a failure


def correctness():
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
                options = dict(options, granularity=granularity, mask=mask, pairwise=pairwise)
                want = pile_fast.pile_ensemble(t.double(), y, backend="torch", **options).logits
                same = pile_fast.pile_ensemble(t, y, backend="torch", **options).logits
                got = pile_fast.pile_ensemble(t, y, **options, **TRITON).logits
                bound = max(2e-6 * max(t.nan_to_num().abs().max().item(), 1.0), 3 * error(same, want))
                row = dict(
                    shape=shape, granularity=granularity, case=case, what="ensemble", error=error(got, want), bound=bound
                )
                rows.append(row)
                for alpha, distillation in ((1.0, "logistic"), (0.3, "logistic"), (0.5, "mse"), (0.0, "logistic")):
                    extra = dict(options, alpha=alpha, distillation=distillation)
                    want = loss_and_gradient(z.double(), t.double(), y, backend="torch", **extra)
                    same = loss_and_gradient(z, t, y, backend="torch", **extra)
                    got = loss_and_gradient(z, t, y, **extra, **TRITON)
                    bounds = 2e-6 * max(1.0, want[0].abs().max().item()), 1e-5 * want[1].abs().max().item() + 1e-37
                    for what, a, b, c, bound in zip(("loss", "gradient"), got, same, want, bounds, strict=True):
                        bound = max(bound, 3 * error(b, c))
                        rows.append(
                            dict(shape=shape, granularity=granularity, case=case, what=f"{what} alpha={alpha} {distillation}",
                                 error=error(a, c), bound=bound)
                        )  # fmt: skip
    bad = [row for row in rows if not row["error"] <= row["bound"]]
    return dict(ok=not bad, checks=len(rows), failed=bad[:50], worst=max(r["error"] / r["bound"] for r in rows))


def half():
    rows = []
    for dtype in (torch.bfloat16, torch.float16):
        z, t, y, _ = data(2, 7 if DRY else 100, 3)
        z, t = z.to(dtype), t.to(dtype)
        want = pile_fast.pile_ensemble(t.double(), y, backend="torch").logits
        got = pile_fast.pile_ensemble(t, y, **TRITON).logits
        rows.append(dict(dtype=str(dtype), what="ensemble", error=error(got, want), bound=2e-6 * t.abs().max().item()))
        want = loss_and_gradient(z.double(), t.double(), y, backend="torch")
        got = loss_and_gradient(z, t, y, **TRITON)
        bound = 2 * torch.finfo(dtype).eps * want[1].abs().max().item()
        rows.append(dict(dtype=str(dtype), what="gradient", error=error(got[1], want[1]), bound=bound))
    return dict(ok=all(r["error"] <= r["bound"] for r in rows), rows=rows)


def compiled():
    """torch.compile(fullgraph=True) gives what eager gives."""
    z, t, y, _ = data(2, 7 if DRY else 60, 3)
    step = torch.compile(
        lambda z: pile_fast.pile_loss(z, t, y, alpha=0.5, **TRITON), fullgraph=True, backend="aot_eager" if DRY else "inductor"
    )
    a = z.clone().requires_grad_()
    step(a).backward()
    _, gradient = loss_and_gradient(z, t, y, alpha=0.5, **TRITON)
    return dict(ok=torch.equal(a.grad, gradient), error=error(a.grad, gradient))


def graph():
    """Capture in a CUDA graph, change the inputs, replay."""
    if DRY:
        return dict(ok=True, skipped="needs a GPU")
    rows = []
    for shape, packed in (((8, 60, 4), False), ((2, 700, 4), False), ((8, 60, 4), True)):
        z, t, y, _ = data(*shape)
        options = dict(TRITON)
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


def no_sync():
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
                        z, t, y, alpha=0.5, granularity=granularity, reduction=reduction, **options, **TRITON
                    )
                    torch.autograd.grad(loss.sum(), z)
            finally:
                torch.cuda.set_sync_debug_mode("default")
    return dict(ok=True)


def lengths():
    """Lists of 1 to 100,000 documents, checked against the float64 reference where its n x n memory fits."""
    rows = []
    for n in (1, 7) if DRY else (1, 7, 100, 1000, 100_000):
        z, t, y, _ = data(1, n, 4)
        start = time.perf_counter()
        loss, gradient = loss_and_gradient(z, t, y, **TRITON)
        row = dict(n=n, seconds_with_compilation=time.perf_counter() - start, loss=loss.item())
        row["ok"] = bool(loss.isfinite()) and bool(gradient.isfinite().all())
        if n <= 1000:
            want = loss_and_gradient(z.double(), t.double(), y, backend="torch")
            row["error"] = error(gradient, want[1])
            row["ok"] &= row["error"] <= 1e-5 * want[1].abs().max().item()
        rows.append(row)
    return dict(ok=all(r["ok"] for r in rows), rows=rows)


def million():
    """One list of 1,000,000 documents, in linear time."""
    z, t, y, _ = data(1, 9 if DRY else 1_000_000, 8)
    start = time.perf_counter()
    loss, gradient = loss_and_gradient(z, t, y, **TRITON)
    ok = bool(loss.isfinite()) and bool(gradient.isfinite().all())
    return dict(ok=ok, loss=loss.item(), seconds_with_compilation=time.perf_counter() - start)


def repeatable():
    rows = []
    for shape in [(2, 7, 3)] if DRY else [(300, 100, 4), (2, 1500, 4)]:
        z, t, y, _ = data(*shape)
        first = loss_and_gradient(z, t, y, alpha=0.5, **TRITON)
        equal = all(
            torch.equal(a, b)
            for _ in range(2 if DRY else 20)
            for a, b in zip(first, loss_and_gradient(z, t, y, alpha=0.5, **TRITON), strict=True)
        )
        rows.append(dict(shape=shape, equal=equal))
    return dict(ok=all(r["equal"] for r in rows), rows=rows)


def wide():
    """More than 2^31 logits in one tensor: addresses are 64 bits."""
    queries, documents, teachers = (2, 8, 4) if DRY else (2**31 // (64 * 8) + 8, 64, 8)
    need = queries * documents * (2 * teachers + 4 * (teachers + 14))  # float16 teachers, float32 scratch
    if not DRY and torch.cuda.mem_get_info()[0] < 1.1 * need:
        return dict(ok=True, skipped=f"needs {need / 2**30:.0f} GiB of free GPU memory")
    t = torch.zeros(queries, documents, teachers, dtype=torch.float16, device=DEVICE)
    y = torch.zeros(queries, documents, dtype=torch.uint8, device=DEVICE)
    z, some, labels, _ = data(1, documents, teachers)
    t[-1], y[-1] = some[0].half(), labels[0].to(torch.uint8)
    got = pile_fast.pile_ensemble(t, y, iterations=2, **TRITON).logits[-1]
    want = pile_fast.pile_ensemble(t[-1:].double(), y[-1:], iterations=2, backend="torch").logits[0]
    return dict(ok=error(got, want) <= 1e-5, logits=t.numel(), error=error(got, want))


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


def speed():
    """pile_loss forward and backward, T = 10, float32: Triton, eager PyTorch, torch.compile, and the floors."""
    if DRY:
        return dict(ok=True, skipped="needs a GPU")
    from pile_fast import reference

    ensemble = ensemble_options(10, None, "document", "zscore", 1.0, 0.0, None, "auto")
    loss = loss_options(1.0, "logistic", 1.0, None, "mean", "auto")

    def plain(z, t, y):
        valid = torch.ones_like(y, dtype=torch.bool)
        with torch.no_grad():
            target = reference.ensemble(t, y, valid, ensemble).logits
        value = reference.reduce(reference.pair_loss(z, target, y, valid, loss), "mean")
        return torch.autograd.grad(value, z)[0]

    rows = []
    for shape in ((32, 64, 4), (1024, 128, 4), (4096, 128, 4), (1024, 512, 8), (16, 1024, 8), (1, 100_000, 8)):
        queries, documents, teachers = shape
        z, t, y, _ = data(*shape)
        size = 4 * (z.numel() * 3 + t.numel())
        copies = max(2, min(16, 2 * torch.cuda.get_device_properties(0).L2_cache_size // size + 1))
        inputs = [(z.clone().requires_grad_(), t.clone(), y.clone()) for _ in range(copies)]
        row = dict(shape=shape, bytes=size)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        gradient_of(*inputs[0], TRITON)
        row["peak_extra_bytes"] = torch.cuda.max_memory_allocated() - before
        row["triton_ms"] = replay_ms(lambda z, t, y: gradient_of(z, t, y, TRITON), inputs)
        row["gb_per_s"] = size / row["triton_ms"] / 1e6
        # The floors: PyTorch copies the inputs (reads them once, writes as much); the smallest launch there is.
        row["copy_ms"] = replay_ms(lambda z, t, y: (z.detach().clone(), t.clone(), y.clone()), inputs, 1.0)
        row["launch_ms"] = replay_ms(lambda z, t, y: torch.zeros(1, device=DEVICE), inputs, 0.5)
        compiled = torch.compile(plain, dynamic=False)
        for name, make in (("eager_ms", plain), ("compile_ms", compiled)):
            # n x n memory; and a compilation of ten iterations takes a minute, so one shape has to do.
            if documents > 2000 or (name == "compile_ms" and shape != (1024, 128, 4)):
                row[name] = None
                continue
            try:
                row[name] = replay_ms(make, inputs[:2], 1.0)
            except Exception as problem:  # out of memory, mostly: a fact worth keeping
                row[name] = None
                row[f"{name}_problem"] = str(problem)[:200]
                torch.cuda.empty_cache()
        for name in ("eager_ms", "compile_ms"):
            if row[name]:
                row[name.replace("_ms", "_ratio")] = row[name] / row["triton_ms"]
        print("   ", row, flush=True)
        rows.append(row)
    return dict(ok=True, rows=rows)


STAGES = dict(
    correctness=correctness, half=half, compiled=compiled, graph=graph, no_sync=no_sync, lengths=lengths,
    repeatable=repeatable, wide=wide, speed=speed, million=million,
)  # fmt: skip


def facts():
    import triton

    commit = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True)
    return dict(
        device="interpreter" if DRY else torch.cuda.get_device_name(),
        date=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        commit=commit.stdout.strip() or None,
        torch=torch.__version__, triton=triton.__version__, python=platform.python_version(),
        cuda=torch.version.cuda, hip=torch.version.hip,
    )  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("stages", nargs="*", help=", ".join(STAGES))
    parser.add_argument("--dry-run", action="store_true", help="on a CPU, in Triton's interpreter, at tiny sizes")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks/results")
    arguments = parser.parse_args()
    if unknown := set(arguments.stages) - set(STAGES):
        parser.error(f"no stage {', '.join(sorted(unknown))}; there are {', '.join(STAGES)}")
    status = pile_fast.available_backends()["triton"]
    if not status.available:
        print(f"the triton backend does not work here: {status.reason}", file=sys.stderr)
        return 1
    about = facts()
    folder = arguments.results / re.sub(r"[^a-z0-9]+", "-", about["device"].lower()).strip("-")
    folder.mkdir(parents=True, exist_ok=True)
    failed = []
    for name in arguments.stages or STAGES:
        start = time.perf_counter()
        try:
            result = STAGES[name]()
        except Exception:  # whatever it is: written down, reported, and the next stage still runs
            result = dict(ok=False, error=traceback.format_exc())
        result = about | dict(stage=name, seconds=round(time.perf_counter() - start, 2)) | result
        (folder / f"gpu_{name}.json").write_text(json.dumps(result, indent=1, default=str) + "\n")
        word = "skipped" if "skipped" in result else "ok" if result["ok"] else "FAILED"
        print(f"{name}: {word} ({result['seconds']} s)", flush=True)
        if not result["ok"]:
            failed.append(name)
            print(result.get("error") or {k: v for k, v in result.items() if k not in about}, flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
