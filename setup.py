"""Builds the optional native extensions; metadata is in pyproject.toml.

Neither needs torch or its headers: one build serves every version of PyTorch. What cannot be built is a warning, and the
package installs all the same and uses its other backends.

`pile_fast._cpu` needs a C++17 compiler and pybind11. The kernels are compiled once per instruction set and chosen at run time,
so a build runs on any processor of its architecture.

`pile_fast._cuda` is built where nvcc is found (PILE_FAST_NVCC, CUDA_HOME, PATH), whether there is a GPU or not, for the
architectures of PILE_FAST_CUDA_ARCHS (default "80;86;89;90;100") and as PTX of the newest, for later ones. It takes a few
minutes; its objects are kept in build/cuda and made again only when sources or flags change. PILE_FAST_CUDA=0 leaves it out.

PILE_FAST_REQUIRE_CPU=1 and PILE_FAST_CUDA=1 make a failure an error.
PILE_FAST_SANITIZE=1 builds _cpu under the sanitizers, with poisoned scratch memory (`make sanitize`).
"""

import importlib.util
import os
import platform
import re
import sys
from pathlib import Path

from setuptools import setup
from setuptools.command.build_ext import build_ext
from setuptools.extension import Extension

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+?)"', (ROOT / "pile_fast/__init__.py").read_text()).group(1)
PACKAGES = ["pile_fast", *(f"pile_fast.{name}" for name in ("backends", "cli", "data", "integrations", "kernels"))]

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
            print(
                f"\nWARNING: {ext.name} was not built ({error}).\n"
                f"The package works without it, on its other backends. For this one install {advice} and reinstall.\n",
                file=sys.stderr,
            )
            ext.optional = True

    def build_cpu(self, ext):
        common = COMMON + DEFINES
        link = []
        if os.environ.get("PILE_FAST_SANITIZE") == "1":
            sanitize = ["-fsanitize=address,undefined", "-fno-omit-frame-pointer", "-g"]
            common = [flag for flag in common if flag != "-O3"] + ["-O1", "-DPILE_POISON", *sanitize]
            link += sanitize
        for name, flags in INSTRUCTION_SETS.items():
            ext.extra_objects += self.compiler.compile(
                [f"csrc/cpu/kernels_{name}.cpp"],
                output_dir=self.build_temp,
                extra_postargs=common + flags,
                depends=ext.depends,
            )
        ext.extra_compile_args = common
        ext.extra_link_args = link + ["-pthread", "-ldl"]
        super().build_extension(ext)

    def build_cuda(self, ext):
        # Everything by nvcc, which knows where its headers and its runtime library are.
        nvcc.build(Path(self.get_ext_fullpath(ext.name)), ext.include_dirs[0], ROOT / "build/cuda")


def headers(*folders):
    return [str(path.relative_to(ROOT)) for folder in folders for path in sorted((ROOT / "csrc" / folder).rglob("*.h"))]


def cpu_extension():
    import pybind11

    return Extension(
        "pile_fast._cpu",
        sources=["csrc/bindings/cpu_module.cpp", "csrc/cpu/dispatch.cpp", "csrc/cpu/team.cpp"],
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
    version=VERSION,
    packages=PACKAGES,
    package_dir={"pile_fast.kernels": "kernels"},
    ext_modules=extensions(),
    cmdclass={"build_ext": BuildKernels},
)
