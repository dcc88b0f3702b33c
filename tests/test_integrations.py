"""What holds for every integration, with or without its library."""

import importlib
import subprocess
import sys

import pytest

LIBRARIES = {
    "integrations.sentence_transformers": "sentence-transformers",
    "integrations.lightning_ir": "lightning-ir",
    "offline.ray": "ray",
}


def test_the_package_imports_no_library():
    code = "import sys, pile_fast.integrations; print(*sorted({name.split('.')[0] for name in sys.modules}))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    libraries = {"sentence_transformers", "lightning_ir", "ray", "transformers", "datasets", "lightning"}
    assert "pile_fast" in loaded and not libraries & set(loaded)


@pytest.mark.parametrize("module, extra", LIBRARIES.items())
def test_a_missing_library_says_what_to_install(monkeypatch, module, extra):
    library = module.split(".")[1]
    for name in [name for name in sys.modules if name.split(".")[0] == library] + [library]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, f"pile_fast.{module}", raising=False)
    with pytest.raises(ImportError, match=rf"{library}.*pip install 'pile_fast\[{extra}\]'"):
        importlib.import_module(f"pile_fast.{module}")


def test_a_library_that_is_too_old_says_what_to_install(monkeypatch):
    library = pytest.importorskip("sentence_transformers")
    monkeypatch.setattr(library, "__version__", "5.2.1")
    monkeypatch.delitem(sys.modules, "pile_fast.integrations.sentence_transformers", raising=False)
    with pytest.raises(ImportError, match=r"expected 6 or later, got 5.2.1: pip install 'pile_fast\[sentence-transformers\]'"):
        importlib.import_module("pile_fast.integrations.sentence_transformers")
