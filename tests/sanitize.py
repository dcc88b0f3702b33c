"""Builds the native extension under AddressSanitizer and UndefinedBehaviorSanitizer, aside, and runs its tests on it.

    python tests/sanitize.py        (or `make sanitize`)

Not a test module: the sanitizers' runtime has to be loaded before Python itself.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TESTS = ["contract", "test_native.py"]
# Properties of memory and of time that the sanitizers change; forking and DDP need no second look.
SKIP = "not memory and not forked"


def main() -> int:
    gcc = shutil.which("g++")
    if gcc is None:
        print("sanitize: g++ was not found, and the sanitizers' runtime is taken from it", file=sys.stderr)
        return 1
    runtime = [
        subprocess.check_output([gcc, f"-print-file-name={name}.so"], text=True).strip() for name in ("libasan", "libubsan")
    ]
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        # A copy of the package that holds only the instrumented extension.
        for name in ("pile_fast", "csrc", "kernels", "setup.py", "pyproject.toml", "README.md", "LICENSE"):
            source = ROOT / name
            if source.is_dir():
                shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
            else:
                shutil.copy(source, folder / name)
        build = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
        subprocess.run(
            build,
            cwd=folder,
            check=True,
            env=os.environ | {"PILE_FAST_SANITIZE": "1", "PILE_FAST_REQUIRE_CPU": "1", "PILE_FAST_CUDA": "0"},
        )
        path = folder / "path"
        path.mkdir()
        (path / "pile_fast").symlink_to(folder / "pile_fast")
        suffix = sysconfig.get_config_var("EXT_SUFFIX")
        assert (folder / f"pile_fast/_cpu{suffix}").exists()
        env = os.environ | {
            "LD_PRELOAD": ":".join(runtime),
            # Python and PyTorch keep memory until the process ends.
            "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=1",
            "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
            "PYTHONPATH": str(path),
        }
        check = "import os, sys, pile_fast._cpu as c; sys.exit(not os.path.realpath(c.__file__).startswith(sys.argv[1]))"
        subprocess.run([sys.executable, "-c", check, os.path.realpath(folder)], cwd=path, env=env, check=True)
        tests = [str(ROOT / "tests" / name) for name in TESTS]
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", SKIP, *tests]
        return subprocess.run(command, env=env, cwd=path).returncode


if __name__ == "__main__":
    sys.exit(main())
