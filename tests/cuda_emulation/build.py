"""Builds csrc/cuda for the emulation: the same sources, compiled by g++ as a module that pile_fast.backends.cuda loads
instead of pile_fast._cuda when PILE_FAST_CUDA_EMULATION names it.

    python tests/cuda_emulation/build.py FOLDER [--sanitize] [--faults]
"""

import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pybind11

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
SANITIZE = ["-fsanitize=address,undefined", "-fno-omit-frame-pointer", "-fno-sanitize-recover=undefined"]


def build(folder: Path, sanitize: bool = False, faults: bool = False, root: Path = ROOT) -> Path:
    """The path of the emulated _cuda, or of the module of deliberate faults. Objects are made side by side."""
    compiler = shutil.which("g++")
    if compiler is None:
        raise RuntimeError("the emulation is built with g++, which was not found")
    sources = [*sorted((root / "csrc/cuda").glob("*.cu")), root / "csrc/bindings/cuda_module.cpp"]
    sources = [HERE / "faults.cu"] if faults else sources
    sources.append(HERE / "emulation.cpp")
    flags = [
        "-std=c++17", "-O1", "-fPIC", "-Wall", "-Wno-unknown-pragmas", "-Werror", "-fvisibility=hidden", "-DPILE_EMULATION",
        *(f"-I{path}" for path in (root / "csrc/include", root / "csrc/cuda", HERE, pybind11.get_include())),
        f"-I{sysconfig.get_path('include')}", *(SANITIZE if sanitize else []),
    ]  # fmt: skip
    objects = [folder / f"{source.stem}.o" for source in sources]

    def compile_one(source, output):
        command = [compiler, *flags, "-x", "c++", "-c", source, "-o", output]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{source.name}:\n{done.stderr}")

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(compile_one, sources, objects))
    module = folder / f"{'faults' if faults else '_cuda'}{sysconfig.get_config_var('EXT_SUFFIX')}"
    subprocess.run([compiler, "-shared", *(SANITIZE if sanitize else []), *objects, "-o", module], check=True)
    return module


def sanitizer_environment() -> dict:
    """What a process that loads a sanitized module needs: the runtime before Python itself, and no leak reports (Python and
    PyTorch keep memory until the process ends)."""
    runtime = (
        subprocess.check_output(["g++", f"-print-file-name={name}.so"], text=True).strip() for name in ("libasan", "libubsan")
    )
    return {
        "LD_PRELOAD": ":".join(runtime),
        "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=1",
        "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
    }


if __name__ == "__main__":
    print(build(Path(sys.argv[1]), "--sanitize" in sys.argv, "--faults" in sys.argv))
