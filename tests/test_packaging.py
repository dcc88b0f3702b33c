"""What is installed, and how it behaves as a package among others."""

import doctest
import importlib
import importlib.metadata
import os
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

import pile_fast
from pile_fast.backends import triton


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


def test_the_version_needs_no_metadata_and_agrees_with_it():
    assert importlib.metadata.version("pile_fast") == pile_fast.__version__
    none = "import importlib.metadata as m; m.MetadataPathFinder.find_distributions = lambda *context: iter(())"
    asked = "assert not list(m.distributions()); import pile_fast; print(pile_fast.__version__)"
    assert run_python(f"{none}; {asked}") == pile_fast.__version__


def test_the_gpu_extra_promises_what_the_triton_backend_takes():
    (bound,) = (line for line in importlib.metadata.requires("pile_fast") if re.match(r"triton\b.*extra == .gpu", line))
    assert bound.startswith("triton>=" + ".".join(map(str, triton.OLDEST)))


@pytest.mark.parametrize("version, too_old", [("3.2.0", True), ("3.3.1+git", True), ("3.4.0", False), ("3.10.0", False)])
def test_an_older_triton_which_pytorch_brought_along_is_not_used(version, too_old):
    # C6: bounds that hold. PyTorch 2.6 comes with Triton 3.2, which lacks what the kernels use.
    code = f"""if True:
        import importlib.metadata as m, importlib.util as u
        version, find = m.version, u.find_spec
        m.version = lambda name: {version!r} if name == "triton" else version(name)
        u.find_spec = lambda name, *a: find("json") if name == "triton" else find(name, *a)
        import pile_fast
        print(pile_fast.available_backends()["triton"].reason)
    """
    assert ("needs triton >= 3.4, found " + version in run_python(code)) == too_old


@pytest.mark.parametrize(
    "name",
    sorted(
        m.name
        for m in pkgutil.walk_packages(pile_fast.__path__, "pile_fast.")
        if not m.name.endswith(("__main__", "._cpu", "._cuda"))
    ),
)
def test_docstring_examples(name):
    if name.startswith(("pile_fast.integrations.", "pile_fast.offline.ray")):
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
