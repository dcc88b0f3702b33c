"""Makes the environments that cannot be the main one: python benchmarks/peers/setup.py [NAME ...].

Each is a virtual environment in build/peers/NAME that sees this Python's packages (PyTorch, pile_fast) and puts its own before them.
"""

import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
FOLDER = ROOT / "build" / "peers"
PINNED = f"torch=={__import__('torch').__version__}"  # nothing here may bring another PyTorch
ENVIRONMENTS = {
    # Its tokenizers do not work with transformers 5, which sentence-transformers 6 wants.
    "lightning-ir": ["lightning-ir==0.0.6", "transformers>=4.57,<5"],
    "pytorchltr": ["--no-deps", "pytorchltr==0.2.1"],
    # Its wheel asks for torch <= 1.8 and for torchvision, which the file with the loss imports and does not use.
    "allrank": ["--no-deps", "allrank==1.4.3"],
    "rax": ["jax==0.10.2", "jaxlib==0.10.2", "rax==0.4.0"],
    "sentence-transformers": ["sentence-transformers==6.2.0"],
}


def python(name: str) -> Path:
    """The environment's interpreter, there or not."""
    return FOLDER / name / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")


def make(name: str) -> None:
    folder = FOLDER / name
    print(f"{folder}: {' '.join(ENVIRONMENTS[name])}", flush=True)
    venv.create(folder, with_pip=True, clear=True)
    own = subprocess.check_output([python(name), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], text=True)
    Path(own.strip(), "parent.pth").write_text(f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n")
    constraints = folder / "constraints.txt"
    constraints.write_text(PINNED + "\n")
    subprocess.run([python(name), "-m", "pip", "install", "-q", "-c", constraints, *ENVIRONMENTS[name]], check=True)


if __name__ == "__main__":
    for environment in sys.argv[1:] or ENVIRONMENTS:
        make(environment)
