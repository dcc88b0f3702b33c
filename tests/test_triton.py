"""The Triton kernels without a GPU: in Triton's interpreter, and compiled ahead of time for four architectures."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import pile_fast

pytest.importorskip("triton")
HERE = Path(__file__).parent


def _load(name):
    spec = importlib.util.spec_from_file_location(name, HERE / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(*command):
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, *map(str, command)], env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    return done.stdout


def test_battery_and_contract_in_the_interpreter():
    # Repetitions that cost a minute and say nothing new about a GPU: an int64 cu_seqlens, and infinities beside NaN.
    out = run(
        "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-W", "ignore::RuntimeWarning", "-k",
        "not index1 and not inf]", HERE / "triton_interpreter_cases.py",
    )  # fmt: skip
    assert int(re.search(r"(\d+) passed", out)[1]) > 150


def test_gpu_check_dry_run(tmp_path):
    out = run(HERE.parent / "benchmarks/gpu_check.py", "--dry-run", "--results", tmp_path)
    assert "FAILED" not in out and len(list((tmp_path / "interpreter").glob("gpu_*.json"))) > 10


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so():
    status = pile_fast.available_backends()["triton"]
    assert not status.available and "GPU" in status.reason
    with pytest.raises(RuntimeError, match="no CUDA or ROCm GPU"):
        pile_fast.pairwise_logistic_loss(torch.zeros(1, 2), torch.zeros(1, 2), backend="triton")


aot = _load("triton_aot")


# The fused kernels everywhere, the phases of long lists on one chip; docs/triton.md's table has all (make triton-table).
CHECKED = [
    pytest.param(case, target, id=f"{case.name}-{target}")
    for case in aot.CASES
    for target in aot.TARGETS
    if target == "sm_90"
    or (not case.name.startswith("long") and (target == "gfx942" or "alpha" in case.name or "16" in case.name))
]


@pytest.mark.parametrize("case, target", CHECKED)
def test_compiles_without_spilling(case, target):
    found = aot.resources(aot.compile_case(case, target))
    # ptxas may park a pointer or two over a program's life (8 bytes each) for occupancy's sake; never within a pair loop.
    assert found["spills"] <= 16 and found.get("local", 0) == 0
    assert found["shared"] <= aot.SHARED_LIMIT[target]


def test_the_ensembles_inner_loop_shares_its_reciprocals():
    # A tile of 4 + 4 columns by 2 rows per thread: 8 reciprocals serve 16 pairs, in fewer than 9 instructions each.
    case = next(case for case in aot.CASES if case.name == "long lists, packed: iterate")
    found = aot.resources(aot.compile_case(case, "sm_90"))
    assert found["reciprocals"] == 8 and found["exponentials"] == 0 and found["loop"] < 9 * 16


@pytest.mark.parametrize("target", aot.TARGETS)
def test_the_reduction_compiles(target):
    assert aot.resources(aot.compile_reduction(target))["spills"] == 0
