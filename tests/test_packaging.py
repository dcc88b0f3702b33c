"""What is installed, and how it behaves as a package among others."""

import doctest
import importlib
import os
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import pile_fast


def run_python(code, cwd=None, **env):
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, env=os.environ | env, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_public_names():
    for name in pile_fast.__all__:
        thing = getattr(pile_fast, name)
        assert thing.__doc__, name
    assert pile_fast.__version__ == "0.1.0"


@pytest.mark.parametrize(
    "name",
    sorted(
        m.name
        for m in pkgutil.walk_packages(pile_fast.__path__, "pile_fast.")
        if not m.name.endswith(("__main__", "._cpu", "._cuda"))
    ),
)
def test_docstring_examples(name):
    if name.startswith("pile_fast.integrations."):
        pytest.importorskip(name, exc_type=ImportError)  # its library may be missing
    assert doctest.testmod(importlib.import_module(name)).failed == 0


def test_importing_the_core_imports_nothing_heavy():
    loaded = run_python("import sys, pile_fast; print(*sys.modules)").split()
    for name in (
        "transformers",
        "datasets",
        "sklearn",
        "matplotlib",
        "triton",
        "pile_fast.trainer",
        "pile_fast.data",
        "pile_fast.cli",
    ):
        assert name not in loaded, name


def test_hugging_faces_kernels_package_is_not_shadowed(tmp_path):
    # transformers imports `kernels`; this repository has a folder of that name, installed as pile_fast.kernels.
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels/__init__.py").write_text("def get_kernel(): return 'theirs'")
    out = run_python(
        "import pile_fast.kernels as ours; from kernels import get_kernel; print(get_kernel(), ours.__name__)",
        cwd=tmp_path,
    )
    assert out == "theirs pile_fast.kernels"


def test_the_repository_root_is_not_on_the_path():
    root = Path(__file__).resolve().parents[1]
    assert all(Path(entry or ".").resolve() != root for entry in sys.path)


def test_the_extension_links_no_torch():
    cpu = pytest.importorskip("pile_fast._cpu")
    text = Path(cpu.__file__).read_bytes()
    for library in (b"libtorch", b"libc10", b"libgomp"):
        assert library not in text, library


def test_the_module_runs():
    out = subprocess.run([sys.executable, "-m", "pile_fast"], capture_output=True, text=True, timeout=120)
    assert out.returncode == 0 and pile_fast.__version__ in out.stdout and "cpp" in out.stdout
