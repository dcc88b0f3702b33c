"""Builds the optional native extension; metadata is in pyproject.toml.

`pile_fast._cpu` needs a C++17 compiler and pybind11, and neither torch nor its headers: one build serves every version of
PyTorch. The kernels are compiled once per instruction set and chosen at run time, so a build runs on any processor of its
architecture. Without a compiler the package installs all the same, with a warning, and uses its PyTorch backend.

PILE_FAST_SANITIZE=1 builds with AddressSanitizer, UndefinedBehaviorSanitizer and poisoned scratch memory (`make sanitize`).
"""

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


class BuildKernels(build_ext):
    """Compiles each kernel file with its own instruction set; a failure is a warning, not the end of the installation."""

    def build_extension(self, ext):
        common = COMMON + DEFINES
        link = []
        if os.environ.get("PILE_FAST_SANITIZE") == "1":
            sanitize = ["-fsanitize=address,undefined", "-fno-omit-frame-pointer", "-g"]
            common = [flag for flag in common if flag != "-O3"] + ["-O1", "-DPILE_POISON", *sanitize]
            link += sanitize
        try:
            for name, flags in INSTRUCTION_SETS.items():
                ext.extra_objects += self.compiler.compile(
                    [f"csrc/cpu/kernels_{name}.cpp"],
                    output_dir=self.build_temp,
                    extra_postargs=common + flags,
                    depends=ext.depends,
                )
            ext.extra_compile_args = common
            ext.extra_link_args = link + ["-pthread"]
            super().build_extension(ext)
        except Exception as error:  # whatever the compiler's failure is called on this platform
            if os.environ.get("PILE_FAST_REQUIRE_CPU") == "1":
                raise
            print(
                f"\nWARNING: pile_fast._cpu was not built ({error}).\n"
                "The package works without it, on the slower PyTorch backend. For the fast one install a C++17 compiler and "
                "reinstall; PILE_FAST_REQUIRE_CPU=1 makes this an error.\n",
                file=sys.stderr,
            )
            ext.optional = True


def cpu_extension():
    import pybind11

    return Extension(
        "pile_fast._cpu",
        sources=["csrc/bindings/cpu_module.cpp", "csrc/cpu/dispatch.cpp", "csrc/cpu/team.cpp"],
        include_dirs=[pybind11.get_include(), "csrc/include"],
        depends=[str(path.relative_to(ROOT)) for path in sorted((ROOT / "csrc").rglob("*.h"))],
        language="c++",
    )


setup(
    version=VERSION,
    packages=PACKAGES,
    package_dir={"pile_fast.kernels": "kernels"},
    ext_modules=[cpu_extension()] if sys.platform != "win32" else [],
    cmdclass={"build_ext": BuildKernels},
)
