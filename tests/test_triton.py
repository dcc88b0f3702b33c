"""The Triton kernels without a GPU: in Triton's interpreter, and compiled ahead of time for four architectures."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import pile_fast

pytest.importorskip("triton")
import triton_aot as aot  # noqa: E402

HERE = Path(__file__).parent


def run(*command):
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, *map(str, command)], env=environment, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    return done.stdout


def test_contract_in_the_interpreter():
    out = run(
        "-m", "pytest", "-q", "-x", "-n", "2", "-p", "no:cacheprovider", "-W", "ignore::RuntimeWarning", HERE / "contract",
        HERE / "triton_interpreter_cases.py", "--target", "triton-interpreter",
    )  # fmt: skip
    assert int(re.search(r"(\d+) passed", out)[1]) > 250


def test_gpu_check_dry_run(tmp_path):
    out = run(HERE.parent / "benchmarks/gpu_check.py", "--dry-run", "--results", tmp_path)
    assert "FAILED" not in out and len(list((tmp_path / "interpreter").glob("gpu_*.json"))) > 5


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so():
    status = pile_fast.available_backends()["triton"]
    assert not status.available and "GPU" in status.reason
    with pytest.raises(RuntimeError, match="no CUDA or ROCm GPU"):
        pile_fast.ranking_loss(torch.zeros(1, 2), torch.zeros(1, 2), backend="triton")


CASES = aot.cases()
# On one chip; on AMD's, where no list takes the one launch, the long lists' inner loops. docs/triton.md has four chips.
AMD = tuple(
    f"{next(iter(aot.LONG))}: {name}" for name in ("deposit", "apply_labels", "iterate", "distill_logistic", "label_logistic")
)
CHECKED = [
    pytest.param(name, target, id=f"{name}-{target}")
    for name in CASES
    for target in ("sm_90", "gfx942")
    if (aot.in_table(name) if target == "sm_90" else name in AMD)
]


@pytest.mark.parametrize("name, target", CHECKED)
def test_compiles_without_spilling(name, target):
    found = aot.resources(CASES[name].compile(target))
    assert found["spills"] == 0 and found["shared"] <= aot.SHARED_LIMIT[target]


def test_the_ensembles_inner_loop_shares_its_reciprocals():
    # A tile of 4 + 4 columns by 2 rows per thread: 8 reciprocals serve 16 pairs.
    for name, instructions in (("pile_loss, 128 documents", 7), ("direct: iterate", 8)):
        found = aot.resources(CASES[name].compile("sm_90"))
        assert found["reciprocals"] == 8 and found["exponentials"] == 0 and found["loop"] < instructions * 16


@pytest.mark.parametrize("call", aot.FUSED | aot.LONG)
def test_a_short_list_is_one_launch_and_a_long_one_few(call):
    names = [launch.name for launch in aot.launches((aot.FUSED | aot.LONG)[call])]
    assert ("pile" in names) == (call in aot.FUSED)
    assert ("deposit" in names) == (call in aot.LONG and "direct" not in call)
