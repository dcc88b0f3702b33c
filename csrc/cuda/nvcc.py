"""Compiles csrc/cuda with nvcc, for setup.py and benchmarks/gpu_check.py. Standard library only.

`kept_object`, which keeps what was compiled, serves setup.py's C++ compiler as well.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

CSRC = Path(__file__).resolve().parents[1]
ARCHS = ("80", "86", "89", "90", "100")
FLAGS = (
    "-std=c++17", "-O3", "--ftz=true", "--expt-relaxed-constexpr", "--Werror=all-warnings",
    "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall", "--threads=0",
)  # fmt: skip
SOURCES = (*sorted((CSRC / "cuda").glob("*.cu")), CSRC / "bindings/cuda_module.cpp")
HEADERS = tuple(sorted(path for folder in ("bindings", "cuda", "include") for path in (CSRC / folder).rglob("*.h")))


def find_nvcc() -> str | None:
    """nvcc by PILE_FAST_NVCC, CUDA_HOME, PATH."""
    home = os.environ.get("CUDA_HOME")
    return os.environ.get("PILE_FAST_NVCC") or (home and shutil.which("nvcc", path=f"{home}/bin")) or shutil.which("nvcc")


def run(*command) -> None:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{command[0]} failed:\n{done.stdout}{done.stderr}")


def architectures(archs) -> list[str]:
    """Machine code for each, and PTX of the newest, for later ones."""
    return [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs] + [
        f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}"
    ]


def contents(files: Iterable[Path]) -> bytes:
    """A digest of the files' contents, whatever their folder is called."""
    digest = hashlib.sha256()
    for path in sorted(files):
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.digest()


def kept_object(folder: Path, source: Path, made_from: Iterable[bytes], make: Callable[[Path], None]) -> Path:
    """The object of `source` in `folder`; made, by `make(path)`, unless one is there that was made from the same.

    Args:
        made_from: all that the object depends on besides the source itself: compiler, flags, headers.
    """
    key = hashlib.sha256(b"\0".join([*made_from, source.read_bytes()])).hexdigest()[:16]
    kept = folder / f"{source.stem}-{key}.o"
    if not kept.exists():
        folder.mkdir(parents=True, exist_ok=True)
        making = folder / f"{source.stem}-{key}.{os.getpid()}.o"  # another build may be at it too
        make(making)
        making.replace(kept)
    return kept


def build(target: Path, pybind11_include: str, objects: Path, archs=()) -> None:
    """The extension at `target`. Objects are kept in `objects` and made again only when sources, flags or nvcc change.

    Args:
        archs: e.g. ("90",); by default those of PILE_FAST_CUDA_ARCHS ("80;90"), else ARCHS.

    Raises:
        RuntimeError: nvcc is missing, or failed; with its output.
    """
    nvcc = find_nvcc()
    if nvcc is None:
        raise RuntimeError("nvcc was not found; install the CUDA toolkit, or name its nvcc in PILE_FAST_NVCC")
    wanted = [arch for arch in os.environ.get("PILE_FAST_CUDA_ARCHS", "").split(";") if arch]
    flags = [*architectures(archs or wanted or ARCHS), *FLAGS]
    # Not in the key: in a build of its own environment or of an sdist these lie in new folders each time.
    includes = [f"-I{folder}" for folder in (CSRC / "include", CSRC / "cuda", pybind11_include, sysconfig.get_path("include"))]
    version = subprocess.run([nvcc, "--version"], capture_output=True, check=True).stdout
    bindings = contents((Path(pybind11_include) / "pybind11").rglob("*.h")) + sys.version.encode()
    made_from = [version, " ".join(flags).encode(), contents(HEADERS), bindings]

    def compile_one(source: Path) -> Path:
        return kept_object(objects, source, made_from, lambda path: run(nvcc, *flags, *includes, "-c", source, "-o", path))

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        made = list(pool.map(compile_one, SOURCES))
    target.parent.mkdir(parents=True, exist_ok=True)
    run(nvcc, "-shared", "--cudart=static", *made, "-o", target)
