"""Builds, installs and tries the package with every Python it supports that is found here (`make test-pythons`).

    python tests/interpreters.py [--torch REQUIREMENT] [-- PIP OPTIONS]

For each: the sdist becomes a wheel, the wheel is installed into an environment in build/pythons, its modules are compiled with
warnings as errors, and the extension is loaded. With --torch also PyTorch and the `train` extra are installed and the demo is
run: in PyTorch's CUDA build that is several GB for each Python, so an environment that passed is removed.

Not a test module: what is tried is in none of this environment's packages. On 2026-11-29: 3.10.13, 3.11.7, 3.12.1, 3.13.0.
"""

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "build/pythons"
VERSIONS = [(3, minor) for minor in range(10, 14)]
LOAD_EXTENSION = """
import importlib.util, pathlib, sys, sysconfig
folder = pathlib.Path(sysconfig.get_path("platlib")) / "pile_fast"
(path,) = folder.glob("_cpu.*.so")
spec = importlib.util.spec_from_file_location("pile_fast._cpu", path)
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
print("extension:", module.instruction_sets())
"""
SMOKE = """
import torch, pile_fast
student, teachers, labels = torch.randn(3, 9, requires_grad=True), torch.randn(3, 9, 4), torch.randint(0, 3, (3, 9))
values = [pile_fast.pile_loss(student, teachers, labels, alpha=0.5, backend=backend) for backend in ("cpp", "torch")]
torch.testing.assert_close(*values)
print("torch:", torch.__version__, "numpy:", __import__("numpy").__version__)
"""


def run(*command, **options) -> str:
    return subprocess.run([str(part) for part in command], check=True, stdout=subprocess.PIPE, text=True, **options).stdout


def find_pythons() -> dict[tuple[int, int], str]:
    """The supported versions that are found here: this Python, pythonX.Y on the PATH, pyenv's."""
    names = [shutil.which(f"python3.{minor}") for _, minor in VERSIONS]
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    found = {}
    for python in [sys.executable, *filter(None, names), *sorted(pyenv.glob("*/bin/python"))]:
        asked = subprocess.run([python, "-c", "import sys, venv; print(*sys.version_info[:2])"], capture_output=True, text=True)
        if asked.returncode == 0 and (version := tuple(map(int, asked.stdout.split()))) in VERSIONS:  # pyenv's shims may fail
            found.setdefault(version, str(python))
    return dict(sorted(found.items()))


def try_python(python: str, sdist: Path, folder: Path, torch: str | None, pip_options: list[str]) -> None:
    run(python, "-m", "venv", "--clear", folder)
    binaries = folder / "bin"
    pip = [binaries / "python", "-m", "pip", "--quiet", "--disable-pip-version-check"]
    env = os.environ | {"PILE_FAST_OBJECTS": str(ROOT / "build"), "PILE_FAST_CUDA": "0", "PILE_FAST_REQUIRE_CPU": "1"}
    run(*pip, "wheel", *pip_options, "--no-deps", "--wheel-dir", folder / "wheel", sdist, env=env)
    (wheel,) = (folder / "wheel").iterdir()
    run(*pip, "install", "--no-deps", "--no-index", wheel)
    package = run(binaries / "python", "-c", "import sysconfig; print(sysconfig.get_path('platlib'))").strip() + "/pile_fast"
    run(binaries / "python", "-W", "error", "-m", "compileall", "-q", "-f", package)
    print(run(binaries / "python", "-c", LOAD_EXTENSION, cwd=folder), end="", flush=True)
    if torch:
        run(*pip, "install", *pip_options, torch, f"{wheel}[train]")
        print(run(binaries / "python", "-W", "error::SyntaxWarning", "-c", SMOKE, cwd=folder), end="", flush=True)
        run(binaries / "pile-fast", "demo", "--quick", "--output", folder / "demo", cwd=folder)
    shutil.rmtree(folder)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--torch", metavar="REQUIREMENT", help="what to give to pip, torch==2.13.0 for instance")
    parser.add_argument("pip_options", nargs="*", metavar="PIP OPTIONS")
    args = parser.parse_args()
    pythons = find_pythons()
    for version in VERSIONS:
        if version not in pythons:
            print(f"Python {version[0]}.{version[1]}: not found here", flush=True)
    shutil.rmtree(FOLDER, ignore_errors=True)
    run(sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", FOLDER / "sdist", ROOT)
    (sdist,) = (FOLDER / "sdist").iterdir()
    for version, python in pythons.items():
        name = "{}.{}".format(*version)
        print(f"Python {name}, {python}", flush=True)
        try_python(python, sdist, FOLDER / name, args.torch, args.pip_options)
        print(f"Python {name}: passed{'' if args.torch else ', without PyTorch'}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
