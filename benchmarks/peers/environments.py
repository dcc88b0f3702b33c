"""Makes the environments of the peers that cannot live in the main one: python benchmarks/peers/environments.py [NAME ...].

Each is a virtual environment in build/peers/NAME that sees this Python's packages (PyTorch, pile_fast) and puts its own first.
"""

import subprocess
import sys
import sysconfig
import tarfile
import venv
from importlib.metadata import version
from pathlib import Path

FOLDER = Path(__file__).parents[2] / "build" / "peers"
REQUIREMENTS = {
    # 0.0.6 does not work with transformers 5, which sentence-transformers 6 wants.
    "lightning-ir": ["lightning-ir==0.0.6", "transformers>=4.57,<5"],
    # Asks for torch <= 1.8, and for torchvision and gcsfs, which its loss does not use (provider_allrank.py).
    "allrank": ["--no-deps", "allrank==1.4.3", "attrs"],
    "pytorchltr": ["--no-deps", "--no-binary", "pytorchltr", "pytorchltr==0.2.1"],
    "rax": ["jax==0.10.2", "jaxlib==0.10.2", "rax==0.4.0"],
}
# No wheel for Python > 3.9, and its C code, a parser of files, does not compile against newer ones. Its losses are Python.
UNPACKED = {"pytorchltr"}


def python(name: str) -> Path:
    """The environment's interpreter, there or not."""
    return FOLDER / name / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")


def make(name: str) -> None:
    folder = FOLDER / name
    print(f"{folder}: {' '.join(REQUIREMENTS[name])}", flush=True)
    venv.create(folder, with_pip=True, clear=True)
    purelib = "import sysconfig; print(sysconfig.get_path('purelib'))"
    packages = Path(subprocess.check_output([python(name), "-c", purelib], text=True).strip())
    (packages / "parent.pth").write_text(f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n")
    constraints = folder / "constraints.txt"
    constraints.write_text(f"torch=={version('torch')}\n")  # nothing here may bring another PyTorch
    pip = [python(name), "-m", "pip", "--quiet", "--disable-pip-version-check"]
    if name not in UNPACKED:
        subprocess.run([*pip, "install", "-c", constraints, *REQUIREMENTS[name]], check=True)
        return
    subprocess.run([*pip, "download", "-d", folder, *REQUIREMENTS[name]], check=True)
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    for part in (name, f"{name}.egg-info"):  # the second holds its version
        (folder / archive.name.removesuffix(".tar.gz") / part).rename(packages / part)


if __name__ == "__main__":
    for environment in sys.argv[1:] or REQUIREMENTS:
        make(environment)
