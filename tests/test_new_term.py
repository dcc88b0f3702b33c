"""A loss is added in six files. This adds one to a copy of the sources, builds it, and runs the contract on it.

The loss is Huber's, of the differences of pairs. Before its kernels are there, every backend but "torch" refuses it by name.
The files of tests/new_term are those that are new; `PYTHON` and `NATIVE` are insertions into files that are there.
"""

import os
import platform
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from cuda_emulation import build as emulation

from pile_fast.backends import cpp

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent

# By file: (what it comes before, what comes).
PYTHON = {
    "pile_fast/terms.py": [
        (
            "\n\n@register\n@dataclasses.dataclass(frozen=True)\nclass RankNet",
            """

            @register
            @dataclasses.dataclass(frozen=True)
            class Huber(Term):
                kind = "distill"
                name = "huber"
                delta: float = number(1.0, "where the square turns into a line", low=0.0, open_low=True)
            """,
        )
    ],
    "pile_fast/reference.py": [
        (
            "\n\ndef label_logistic(",
            """

            def distill_huber(term: terms.Huber, query: Query) -> PairLoss:
                d, delta = differences(query.z) - differences(query.s), term.delta
                near = d.abs() <= delta
                value = torch.where(near, d * d / 2, delta * (d.abs() - delta / 2))
                return mean_over_pairs(query, *target_pairs(query), value, d.clamp(-delta, delta), near.to(d.dtype))
            """,
        ),
        ("distill_kl, label_logistic, label", "distill_huber, "),
    ],
}
NATIVE = {
    "csrc/include/pile/terms.h": [
        (
            "\n// R: the student against the labels.",
            """\
            struct DistillHuber {
              static constexpr const char* kKey = "distill_huber";
              double delta;
              template <class Visit>
              void each_number(Visit visit) {
                visit("delta", delta);
              }
            };
            """,
        ),
        (">;\nusing LabelLoss", ", DistillHuber"),
        (
            '#if __has_include("terms/label_logistic.h")',
            """\
            #if __has_include("terms/distill_huber.h")
            #include "terms/distill_huber.h"
            #endif
            """,
        ),
    ],
}
NEW = [str(path.relative_to(HERE / "new_term")) for path in sorted((HERE / "new_term").rglob("distill_huber.*"))]


def insert(root: Path, insertions: dict) -> None:
    for name, parts in insertions.items():
        text = (root / name).read_text()
        for anchor, part in parts:
            assert text.count(anchor) == 1, (name, anchor)
            text = text.replace(anchor, textwrap.dedent(part) + anchor)
        (root / name).write_text(text)


def add_kernels(root: Path, folder: str) -> None:
    for name in NEW:
        if name.startswith(folder):
            shutil.copy(HERE / "new_term" / name, root / name)


@pytest.fixture
def house(tmp_path):
    """A copy of the sources with the term in Python, but without its kernels."""
    leave_out = shutil.ignore_patterns("__pycache__")
    for name in ("pile_fast", "csrc"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=leave_out)
    shutil.copytree(ROOT / "kernels", tmp_path / "pile_fast/kernels", ignore=leave_out)
    (tmp_path / "kernels").symlink_to("pile_fast/kernels")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path / name)
    insert(tmp_path, PYTHON)
    # The path holds the package alone, as where it is installed.
    (tmp_path / "path").mkdir()
    (tmp_path / "path/pile_fast").symlink_to("../pile_fast")
    return tmp_path


def run(house, *command, **env):
    env = os.environ | {"PYTHONPATH": str(house / "path"), "OMP_NUM_THREADS": "1"} | env
    command = [sys.executable, *map(str, command)]
    done = subprocess.run(command, cwd=house / "path", env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-3000:]
    return done.stdout


def run_contract(house, target, **env):
    options = ("-q", "-x", "-p", "no:cacheprovider", "-W", "ignore::RuntimeWarning", "-k", "huber or fused", "--target", target)
    out = run(house, "-m", "pytest", ROOT / "tests/contract", *options, **env)
    assert int(re.search(r"(\d+) passed", out)[1]) > 25


def test_a_loss_is_six_files():
    assert len({*PYTHON, *NATIVE, *NEW}) <= 6


REFUSED = """
import torch, pile_fast
from pile_fast import backends
from pile_fast.batch import RankingBatch
from pile_fast.options import loss_options

z, s = torch.randn(2, 5), torch.randn(2, 5)
batch, loss = RankingBatch(student_logits=z, target_logits=s), loss_options(distillation="huber")
words = "does not compute the distillation 'huber'; use backend='auto' or 'torch'"
for name in ("cpp", "triton", "cuda"):
    try:
        assert backends.load(name).refusal(batch, None, loss) == words, name
    except ImportError:  # its extension is not built
        continue
    if pile_fast.available_backends()[name].available:
        try:
            pile_fast.distillation_loss(z, s, kind="huber", backend=name)
        except RuntimeError as error:
            assert str(error) == f"backend {name!r} {words}", error
        else:
            raise AssertionError(name)
want = pile_fast.distillation_loss(z, s, kind="huber:delta=0.3", backend="torch")
assert torch.equal(pile_fast.distillation_loss(z, s, kind="huber:delta=0.3"), want) and want > 0
"""


def test_a_backend_without_it_refuses_by_name(house):
    run(house, "-c", REFUSED, TRITON_INTERPRET="1")


@pytest.mark.skipif(bool(cpp.unavailable()), reason=cpp.unavailable() or "built")
def test_on_the_cpu(house):
    insert(house, NATIVE)
    add_kernels(house, "csrc/cpu")
    # One instruction set is enough, and built in a third of the time.
    setup = (house / "setup.py").read_text()
    assert setup.count("\nif X86:\n") == 1
    (house / "setup.py").write_text(setup.replace("\nif X86:\n", "\nif False:\n"))
    build = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    subprocess.run(build, cwd=house, check=True, env=os.environ | {"PILE_FAST_REQUIRE_CPU": "1", "PILE_FAST_CUDA": "0"})
    run_contract(house, "cpu")


def test_in_triton(house):
    pytest.importorskip("triton")
    add_kernels(house, "kernels")
    run_contract(house, "triton-interpreter", TRITON_INTERPRET="1")


@pytest.mark.skipif(platform.machine() != "x86_64" or shutil.which("g++") is None, reason="the emulation needs g++ on x86-64")
def test_in_cuda(house):
    insert(house, NATIVE)
    add_kernels(house, "csrc/cuda")
    run_contract(house, "cuda-emulation", PILE_FAST_CUDA_EMULATION=str(emulation.build(house, root=house)))
