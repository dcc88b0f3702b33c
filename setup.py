"""Builds the optional native extensions; metadata is in pyproject.toml.

Neither needs torch or its headers: one build serves every version of PyTorch. What cannot be built is a warning, and the
package installs all the same and uses its other backends.

`pile_fast._cpu` needs a C++17 compiler and pybind11. The kernels are compiled once per instruction set and chosen at run time,
so a build runs on any processor of its architecture.

`pile_fast._cuda` is built where nvcc is found (PILE_FAST_NVCC, CUDA_HOME, PATH), whether there is a GPU or not, for the
architectures of PILE_FAST_CUDA_ARCHS (default "80;86;89;90;100") and as PTX of the newest, for later ones. It takes a few
minutes. PILE_FAST_CUDA=0 leaves it out.

Objects are kept in build/cpu and build/cuda, or below PILE_FAST_OBJECTS, and made again only when sources, flags or compiler
change. PILE_FAST_REQUIRE_CPU=1 and PILE_FAST_CUDA=1 make a failure an error.
PILE_FAST_SANITIZE=1 builds _cpu under the sanitizers, with poisoned scratch memory (`make sanitize`).
"""

import importlib.util
import os
import platform
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.extension import Extension

ROOT = Path(__file__).parent
OBJECTS = Path(os.environ.get("PILE_FAST_OBJECTS", ROOT / "build"))
# The folder kernels/ is installed as pile_fast.kernels: a top-level `kernels` is Hugging Face's package.
PACKAGES = [
    *find_packages(include=["pile_fast", "pile_fast.*"]),
    *("pile_fast.kernels" + (name and f".{name}") for name in ("", *find_packages("kernels"))),
]

COMMON = [
    "-std=c++17",
    "-O3",
    "-g0",
    "-fvisibility=hidden",
    "-ffp-contract=fast",
    "-fno-math-errno",
    "-Wall",
    "-Wno-psabi",
    "-Wno-uninitialized",  # these two: GCC's own AVX-512 headers
    "-Wno-maybe-uninitialized",
    "-Icsrc/include",
    "-Icsrc/cpu",
]
X86 = platform.machine() in ("x86_64", "AMD64")
INSTRUCTION_SETS = {"baseline": []}
if X86:
    INSTRUCTION_SETS["avx2"] = ["-mavx2", "-mfma"]
    INSTRUCTION_SETS["avx512"] = ["-mavx512f", "-mavx512vl", "-mavx512dq", "-mavx512bw", "-mfma", "-mprefer-vector-width=512"]
DEFINES = [f"-DPILE_HAVE_{name.upper()}" for name in INSTRUCTION_SETS if name != "baseline"]


def load_nvcc():
    """csrc/cuda/nvcc.py, which lies in no package."""
    spec = importlib.util.spec_from_file_location("nvcc", ROOT / "csrc/cuda/nvcc.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


nvcc = load_nvcc()


class BuildKernels(build_ext):
    """Builds each extension in its own way; a failure is a warning, not the end of the installation."""

    def build_extension(self, ext):
        build, required, advice = {
            "pile_fast._cpu": (self.build_cpu, os.environ.get("PILE_FAST_REQUIRE_CPU") == "1", "a C++17 compiler"),
            "pile_fast._cuda": (self.build_cuda, os.environ.get("PILE_FAST_CUDA") == "1", "a working CUDA toolkit"),
        }[ext.name]
        try:
            build(ext)
        except Exception as error:  # whatever the compiler's failure is called on this platform
            if required:
                raise
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            print(
                f"WARNING: {ext.name} was not built ({reason}): pile_fast works without it, more slowly; to have it, install "
                f"{advice} and reinstall with pip's --force-reinstall --no-cache-dir",
                file=sys.stderr,
            )
            ext.optional = True

    def build_cpu(self, ext):
        common = COMMON + DEFINES
        link = ["-pthread", "-ldl"]
        if os.environ.get("PILE_FAST_SANITIZE") == "1":
            sanitize = ["-fsanitize=address,undefined", "-fno-omit-frame-pointer", "-g"]
            common = [flag for flag in common if flag != "-O3"] + ["-O1", "-DPILE_POISON", *sanitize]
            link += sanitize
        compiler = self.compiler.compiler_so_cxx
        made_from = [
            subprocess.run([*compiler, "--version"], capture_output=True, check=True).stdout,
            nvcc.contents(Path(header) for header in ext.depends),
        ]
        bindings = [sys.version.encode(), nvcc.contents(Path(ext.include_dirs[0]).rglob("*.h"))]

        def compile_one(source):
            flags = common + INSTRUCTION_SETS.get(Path(source).stem.removeprefix("kernels_"), [])
            key = [*made_from, " ".join(compiler + flags).encode(), *(bindings if "/bindings/" in source else ())]

            def make(target):
                with tempfile.TemporaryDirectory(dir=target.parent) as folder:
                    (made,) = self.compiler.compile(
                        [source], output_dir=folder, include_dirs=ext.include_dirs, extra_postargs=flags
                    )
                    Path(made).replace(target)

            return str(nvcc.kept_object(OBJECTS / "cpu", Path(source), key, make))

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(compile_one, ext.sources))
        self.compiler.link_shared_object(
            objects,
            self.get_ext_fullpath(ext.name),
            libraries=self.get_libraries(ext),
            extra_postargs=link,
            export_symbols=self.get_export_symbols(ext),
            build_temp=self.build_temp,
            target_lang="c++",
        )

    def build_cuda(self, ext):
        # Everything by nvcc, which knows where its headers and its runtime library are.
        nvcc.build(Path(self.get_ext_fullpath(ext.name)), ext.include_dirs[0], OBJECTS / "cuda")


def headers(*folders):
    return [str(path.relative_to(ROOT)) for folder in folders for path in sorted((ROOT / "csrc" / folder).rglob("*.h"))]


def cpu_extension():
    import pybind11

    return Extension(
        "pile_fast._cpu",
        sources=[
            *(f"csrc/cpu/kernels_{name}.cpp" for name in INSTRUCTION_SETS),  # first: they take longest
            "csrc/bindings/cpu_module.cpp",
            "csrc/cpu/dispatch.cpp",
            "csrc/cpu/team.cpp",
        ],
        include_dirs=[pybind11.get_include(), "csrc/include"],
        depends=headers("bindings", "cpu", "include"),
        language="c++",
    )


def cuda_extension():
    import pybind11

    return Extension(
        "pile_fast._cuda",
        sources=[str(path.relative_to(ROOT)) for path in nvcc.SOURCES],
        include_dirs=[pybind11.get_include()],
        depends=headers("bindings", "cuda", "include"),
        language="c++",
    )


def extensions():
    if sys.platform == "win32":
        return []
    with_cuda = os.environ.get("PILE_FAST_CUDA") != "0" and (nvcc.find_nvcc() or os.environ.get("PILE_FAST_CUDA") == "1")
    return [cpu_extension(), *([cuda_extension()] if with_cuda else [])]


setup(
    packages=PACKAGES,
    package_dir={"pile_fast.kernels": "kernels"},
    ext_modules=extensions(),
    cmdclass={"build_ext": BuildKernels},
)
