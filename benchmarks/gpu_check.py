"""Prove and time the GPU kernels, Triton's and CUDA's: `make gpu-check`, or this file alone with any Python that has PyTorch,
Triton and pytest, and nvcc beside it. The proof is tests/contract, run on the GPU; the times are taken here.

It needs nothing but a checkout and no network: the package is made importable through a temporary folder of symlinks,
nothing is installed, and the CUDA extension is built for the device at hand (build/gpu_check keeps its objects). Every stage
writes benchmarks/results/<device>/gpu_<stage>.json before the next begins, also when it fails.

    python benchmarks/gpu_check.py                     # all stages, both backends
    python benchmarks/gpu_check.py contract speed      # some
    python benchmarks/gpu_check.py --backend cuda      # one backend
    python benchmarks/gpu_check.py --dry-run           # on a CPU, tiny: does the script itself work? Triton in its interpreter,
                                                       # CUDA in the emulation that PILE_FAST_CUDA_EMULATION names
"""

from __future__ import annotations

import argparse
import ctypes
import datetime
import importlib.util
import itertools
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
import xml.etree.ElementTree as ET
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
sys.path.append(str(ROOT / "tests"))

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

from contract.problems import capture, make, run  # noqa: E402

import pile_fast  # noqa: E402
from pile_fast import reference, terms  # noqa: E402
from pile_fast.options import pile_options  # noqa: E402

BACKENDS: list[str] = []  # those under test, set by main()


def hows() -> list[dict]:
    return [dict(backend=name, granularity="document") for name in BACKENDS]


def data(queries: int, documents: int, teachers: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    with torch.device(DEVICE):
        return make(documents, queries, teachers)[:3]


# -- stages of one backend: each returns a JSON-able dict; {"ok": False} or an exception is a failure


def contract(how: dict, deadline: float) -> dict:
    """tests/contract on the device, in processes side by side: most of the time goes into compiling kernels."""
    target = {"triton": "triton-interpreter", "cuda": "cuda-emulation"}[how["backend"]] if DRY else how["backend"]
    parts = 1 if DRY else max(1, min(12, (os.cpu_count() or 1) - 2))
    command = [
        sys.executable, "-m", "pytest", "-q", "-o", "addopts=--import-mode=importlib", "-p", "no:cacheprovider",
        *(["-k", "permuting"] if DRY else []), "--target", target, str(ROOT / "tests/contract"),
    ]  # fmt: skip
    env = os.environ | {"PYTHONPATH": _links.name}
    processes = []
    for part in range(parts):
        report = Path(_links.name) / f"{target}-{part}.xml"
        own = [*command, "--part", f"{part}/{parts}", "--junitxml", str(report)]
        with report.with_suffix(".log").open("w") as log:
            processes.append((subprocess.Popen(own, env=env, cwd=_links.name, stdout=log, stderr=log), report))
    limit = time.perf_counter() + (deadline - time.perf_counter()) / 2  # something is left for the other stages
    passed, skipped, failed = 0, 0, []
    for process, report in processes:
        try:
            code = process.wait(max(1.0, limit - time.perf_counter()))
        except subprocess.TimeoutExpired:
            process.kill()
            code = process.wait()
        cases = list(ET.parse(report).iter("testcase")) if report.exists() else []
        problems = [(case, part) for case in cases for part in case if part.tag in ("failure", "error")]
        failed += [dict(test=f"{c.get('classname')}::{c.get('name')}", message=(p.text or "")[-2000:]) for c, p in problems]
        if code and not problems:  # killed, or pytest did not start
            failed.append(dict(test=report.stem, message=report.with_suffix(".log").read_text()[-2000:]))
        skipped += sum(case.find("skipped") is not None for case in cases)
        passed += len(cases) - len(problems)
    return dict(
        ok=passed > skipped and not failed, processes=parts, passed=passed - skipped, left_out=skipped, failed=failed[:50]
    )


def gradient_of(z, t, y, options):
    (gradient,) = torch.autograd.grad(pile_fast.pile_loss(z, t, y, **options), z)
    return gradient


def sanitizer(how: dict, deadline: float) -> dict:
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
    for shape, packed in (((20, 3, 4), False), ((50, 2, 3), True), ((1100, 1, 4), False)):
        with torch.device(DEVICE):
            z, t, y, where = make(*shape, missing=0.1, unlabelled=0.1, masked=0.1, packed=packed)
        for granularity, pairwise in itertools.product(("shared", "document", "query"), ("direct", "chebyshev")):
            how = dict(granularity=granularity, iterations=2, backend="cuda", pairwise=pairwise, **where)
            pile_fast.pile_ensemble(t, y, return_weights=True, return_trace=True, **how)
            for distillation, label_loss in itertools.product(terms.names("distill"), terms.names("label")):
                loss = dict(alpha=0.5, distillation=distillation, label_loss=label_loss, pair_weight="label_gap")
                run(pile_fast.pile_loss, z, t, y, **loss, **how)
        pile_fast.PILELoss(backend="cuda")(z, t, y, **where)  # a step of shared weights, in the pass of the loss
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
    z, t, y = data(1, queries * documents, teachers)
    lengths = (documents * (0.25 + 1.5 * torch.rand(queries, generator=torch.Generator().manual_seed(0)))).long().clamp(min=1)
    ends = lengths.cumsum(0).clamp(max=queries * documents)
    return z[0], t[0], y[0], torch.nn.functional.pad(ends, (1, 0)).to(DEVICE)


def speed():
    """pile_loss, T = 10, float32: the backends, eager PyTorch, torch.compile; forward alone, with backward, padded, packed."""
    if DRY:
        return dict(ok=True, skipped="needs a GPU")

    ensemble, loss = pile_options(granularity="document")

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
        z, t, y = data(*shape)
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
        for name, step in (("eager_ms", plain), ("compile_ms", compiled)):
            # n x n memory; and a compilation of ten iterations takes a minute, so one shape has to do.
            if documents > 2000 or (name == "compile_ms" and shape != (1024, 128, 4)):
                continue
            try:
                row[name] = replay_ms(step, inputs[:2], 0.7)
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
    z, t, y = data(*((2, 7, 3) if DRY else (32, 64, 4)))
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
    _, t, y = data(queries, documents, 4)
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


OF_A_BACKEND = dict(contract=contract, sanitizer=sanitizer)
OF_ALL = dict(build=lambda: BUILT, floors=floors, eager=eager, training=training, speed=speed)
# What proves comes first; what takes longest last.
ORDER = ("build", "contract", "floors", "eager", "training", "sanitizer", "speed")


def attempt(stage, *arguments) -> dict:
    """The stage's result, or its failure: written down, reported, and the next stage still runs."""
    start = time.perf_counter()
    try:
        result = stage(*arguments)
    except Exception:  # whatever it is, it goes into the results; the run as a whole then fails
        result = dict(ok=False, error=traceback.format_exc())
    return dict(seconds=round(time.perf_counter() - start, 2)) | result


def run_stage(name: str, deadline: float) -> dict:
    if name in OF_ALL:
        return attempt(OF_ALL[name])
    results = {how["backend"]: attempt(OF_A_BACKEND[name], how, deadline) for how in hows()}
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
    deadline = STARTED + 60 * arguments.minutes
    for name in arguments.stages or ORDER:
        start = time.perf_counter()
        late = start > deadline
        result = dict(ok=False, error=f"not begun within {arguments.minutes:g} minutes") if late else run_stage(name, deadline)
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
