"""Runs the tests with the oldest versions that pyproject.toml promises (`make test-oldest`).

    python tests/oldest.py [--python PYTHON]

uv finds them (`--resolution lowest-direct`: the least version of what the package names itself, the newest of what that needs)
and installs them into build/oldest, with the oldest Python at hand. PyTorch 2.6 from PyPI is a CUDA build of some 5 GB; it runs
without a GPU.

Tried by hand on 2026-11-29 with Python 3.10.13 and the versions now in pyproject.toml: 562 tests of 14 files passed, all but
that of memory left out below. Raised, as it did not hold: transformers 4.57 (the loss function in a plain Trainer, rounded
logs), 5.0 and 5.4 (names of BERT's weights); accelerate 1.1 (no training), 1.3 and 1.6 (a resumed run ended at other weights);
datasets 3.2 to 4.2 (no fingerprint for a generator). Triton 3.2, which PyTorch 2.6 brings along, cannot run the kernels in its
interpreter; 3.4 can.

Not a test module: it needs another environment than the one it is run in.
"""

import argparse
import importlib.metadata
import os
import shutil
import subprocess
import sys
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "build/oldest"
EXTRAS = ("train", "ensembles", "ray", "sentence-transformers", "boosting")  # not gpu: Triton is PyTorch's affair
# They test the build, or need what the extras above do not bring.
LEFT_OUT = (
    "test_benchmarks.py", "test_benchmarks_peers.py", "test_cuda.py", "test_integrations_lightning_ir.py",
    "test_new_term.py", "test_quality.py", "test_triton.py", "test_wheel.py",
)  # fmt: skip
# pyarrow 21 keeps 62 MiB between two sizes of file, where the test takes 50.
SKIP = "not test_memory_does_not_grow_with_the_file"


def run(*command, **options) -> None:
    print("+", *command, flush=True)
    subprocess.run([str(part) for part in command], check=True, cwd=ROOT, **options)


def test_tools() -> list[str]:
    """What the `test` extra names, besides other extras of this package."""
    requirements = [Requirement(line) for line in importlib.metadata.requires("pile_fast")]
    return [
        str(need).partition(";")[0].strip()
        for need in requirements
        if need.name != "pile_fast" and need.marker and need.marker.evaluate({"extra": "test"}) and "test" in str(need.marker)
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--python", default=sys.executable, help="the oldest that is at hand (default: this one)")
    parser.add_argument("--processes", default="2", help="of pytest (default: 2)")
    args = parser.parse_args()
    shutil.rmtree(FOLDER, ignore_errors=True)
    run(args.python, "-m", "venv", FOLDER)
    python = FOLDER / "bin/python"
    run(python, "-m", "pip", "install", "--quiet", "uv")
    uv = [FOLDER / "bin/uv", "pip"]
    versions = FOLDER / "versions.txt"
    chosen = [part for extra in EXTRAS for part in ("--extra", extra)]
    resolve = ["--quiet", "--python", python, "--resolution", "lowest-direct", "--no-header", "--no-annotate"]
    run(*uv, "compile", *resolve, *chosen, "--output-file", versions, ROOT / "pyproject.toml", stdout=subprocess.DEVNULL)
    into = ["--quiet", "--python", python]
    run(*uv, "install", *into, "--requirement", versions)
    run(*uv, "install", *into, "--constraint", versions, *test_tools(), "setuptools>=77", "pybind11>=2.13")
    env = os.environ | {"PILE_FAST_CUDA": "0", "PILE_FAST_REQUIRE_CPU": "1"}
    run(*uv, "install", *into, "--no-deps", "--no-build-isolation", "--editable", ROOT, env=env)
    print(versions.read_text(), flush=True)
    ignored = [f"--ignore=tests/{name}" for name in LEFT_OUT]
    # Not `python -m pytest`, which puts the checkout on the path.
    run(FOLDER / "bin/pytest", "-q", "-n", args.processes, "-p", "no:cacheprovider", "-k", SKIP, "tests", *ignored)
    shutil.rmtree(FOLDER)
    return 0


if __name__ == "__main__":
    sys.exit(main())
