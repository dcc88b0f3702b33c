"""The CUDA kernels without a GPU: what nvcc made of them, and the same sources emulated on the CPU."""

import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import cuda_resources
import pytest
import torch
from cuda_emulation import build as emulation

import pile_fast

HERE = Path(__file__).parent


specification = importlib.util.spec_from_file_location("nvcc", HERE.parent / "csrc/cuda/nvcc.py")
nvcc = importlib.util.module_from_spec(specification)
specification.loader.exec_module(nvcc)

needs_emulation = pytest.mark.skipif(
    platform.machine() != "x86_64" or shutil.which("g++") is None, reason="the emulation needs g++ on x86-64"
)


def run(*command, **env):
    env = os.environ | {"OMP_NUM_THREADS": "1"} | env
    done = subprocess.run([sys.executable, *map(str, command)], env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def emulated(tmp_path_factory):
    return emulation.build(tmp_path_factory.mktemp("emulated"), sanitize=True)


@needs_emulation
def test_contract_emulated(emulated):
    """Under AddressSanitizer and UndefinedBehaviorSanitizer."""
    out = run(
        "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", HERE / "contract", HERE / "cuda_emulation_cases.py",
        "--target", "cuda-emulation", PILE_FAST_CUDA_EMULATION=str(emulated), **emulation.sanitizer_environment(),
    )  # fmt: skip
    assert int(re.search(r"(\d+) passed", out)[1]) > 500


@pytest.fixture(scope="module")
def faults(tmp_path_factory):
    if platform.machine() != "x86_64" or shutil.which("g++") is None:
        pytest.skip("the emulation needs g++ on x86-64")
    folder = tmp_path_factory.mktemp("faults")
    emulation.build(folder, sanitize=True, faults=True)

    def run_fault(fault, order="forward"):
        code = f"import faults; assert faults.set_order({order!r}); print(*faults.run({fault}))"
        env = os.environ | emulation.sanitizer_environment() | {"PYTHONPATH": str(folder)}
        return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=60)

    return run_fault


ORDERS = ("forward", "backward", "random")
NO_FAULT, MISSING_BARRIER, BEYOND_SHARED_MEMORY, MISSING_LANES, UNEVEN_BARRIERS, NEVER_WRITTEN = range(6)


def test_a_right_kernel_gives_the_same_in_any_order(faults):
    want = " ".join(map(str, range(63, -1, -1)))
    assert {faults(NO_FAULT, order).stdout.strip() for order in ORDERS} == {want}


def test_a_missing_barrier_shows(faults):
    assert len({faults(MISSING_BARRIER, order).stdout for order in ORDERS}) == 3


@pytest.mark.parametrize(
    "fault, message",
    [
        (BEYOND_SHARED_MEMORY, "heap-buffer-overflow"),
        (MISSING_LANES, "a thread that has left"),
        (UNEVEN_BARRIERS, "deadlock"),
    ],
)
def test_a_fault_is_named(faults, fault, message):
    done = faults(fault)
    assert done.returncode != 0 and message in done.stderr


def test_shared_memory_is_poisoned(faults):
    assert "-1" in faults(NEVER_WRITTEN).stdout.split()


# -- what nvcc made


def test_without_nvcc_the_build_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(nvcc.shutil, "which", lambda *a, **k: None)
    monkeypatch.delenv("PILE_FAST_NVCC", raising=False)
    with pytest.raises(RuntimeError, match="PILE_FAST_NVCC"):
        nvcc.build(tmp_path / "_cuda.so", "", tmp_path)


@pytest.mark.skipif(nvcc.find_nvcc() is None, reason="needs nvcc")
def test_the_floors_of_gpu_check_compile(tmp_path):
    source = HERE.parent / "benchmarks/_gpu_floors.cu"
    nvcc.run(nvcc.find_nvcc(), "-shared", "-Xcompiler=-fPIC", "--Werror=all-warnings", source, "-o", tmp_path / "floors.so")


def test_compiled_without_spilling():
    """Every architecture of the build: no stack frame (so no spilled register) in any kernel that runs more than once."""
    pytest.importorskip("pile_fast._cuda", reason="pile_fast._cuda was not built: no nvcc")
    found = cuda_resources.resources()
    assert {"warp_per_query", "block_per_query", "advance_pieces", "add_pieces"} <= {kernel for kernel, _ in found}
    for (kernel, arch), use in found.items():
        assert use["stack"] == 0 or kernel == "tabulate", (kernel, arch, use)
        assert use["registers"] <= cuda_resources.most_registers(kernel), (kernel, arch, use)


@pytest.mark.parametrize("kernel", ["warp_per_query", "block_per_query", "advance_pieces"])
def test_the_inner_loops_are_what_the_design_says(kernel):
    pytest.importorskip("pile_fast._cuda", reason="pile_fast._cuda was not built: no nvcc")
    archs = {arch for _, arch in cuda_resources.resources()}
    found = cuda_resources.loops(kernel, sorted(archs)[-1])

    def best(**wanted):
        return min(
            (loop["instructions"] for loop in found if all(loop[kind] == number for kind, number in wanted.items())),
            default=1000,
        )

    # λ: four rows by four columns share four reciprocals and a load.
    assert best(reciprocals=4, exponentials=0, logarithms=0, loads=1, floats=48) <= 64
    if kernel != "advance_pieces":  # the distillation: eight pairs
        assert best(reciprocals=4, exponentials=0, logarithms=2, loads=6) <= 120


def test_the_extension_links_no_torch_and_no_cuda_library():
    module = pytest.importorskip("pile_fast._cuda", reason="pile_fast._cuda was not built: no nvcc")
    needed = subprocess.run(["readelf", "-d", module.__file__], capture_output=True, text=True, check=True).stdout
    assert "NEEDED" in needed and not re.search(r"libtorch|libc10|libcudart|libcuda\.", needed)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so():
    status = pile_fast.available_backends()["cuda"]
    assert not status.available and ("nvcc" in status.reason or "GPU" in status.reason)
    with pytest.raises(RuntimeError, match="backend 'cuda' is not available"):
        pile_fast.ranking_loss(torch.zeros(1, 2), torch.zeros(1, 2), backend="cuda")


def test_without_nvcc_it_says_so():
    run("-c", textwrap.dedent("""
        import importlib.util, sys
        find = importlib.util.find_spec
        importlib.util.find_spec = lambda name, *a: None if name == "pile_fast._cuda" else find(name, *a)
        import pile_fast
        status = pile_fast.available_backends()["cuda"]
        assert not status.available and "nvcc" in status.reason, status
    """))  # fmt: skip


def test_a_broken_extension_says_so(tmp_path):
    broken = tmp_path / "pile_fast_broken.so"
    broken.write_bytes(b"")
    run("-c", textwrap.dedent("""
        import pile_fast
        status = pile_fast.available_backends()["cuda"]
        assert not status.available and "did not load" in status.reason, status
    """), PILE_FAST_CUDA_EMULATION=str(broken))  # fmt: skip


def test_gpu_check_dry_run(tmp_path, emulated):
    out = run(
        HERE.parent / "benchmarks/gpu_check.py", "--dry-run", "--results", tmp_path, "--backend", "cuda",
        PILE_FAST_CUDA_EMULATION=str(emulated), **emulation.sanitizer_environment(),
    )  # fmt: skip
    written = {path.name for path in (tmp_path / "emulation").glob("gpu_*.json")}
    stages = ("build", "contract", "floors", "eager", "training", "sanitizer", "speed")
    assert "FAILED" not in out and written == {f"gpu_{stage}.json" for stage in stages}


def test_gpu_check_writes_what_failed_too(tmp_path, emulated):
    command = [sys.executable, HERE.parent / "benchmarks/gpu_check.py", "--dry-run", "--results", tmp_path, "--backend", "cuda"]
    env = os.environ | emulation.sanitizer_environment() | {"PILE_FAST_CUDA_EMULATION": str(emulated)}
    done = subprocess.run(
        [*map(str, command), "--minutes", "0", "contract", "eager"], env=env, capture_output=True, timeout=120
    )
    assert done.returncode == 1
    results = [json.loads((tmp_path / f"emulation/gpu_{stage}.json").read_text()) for stage in ("contract", "eager")]
    assert all(not result["ok"] and "minutes" in result["error"] for result in results)
