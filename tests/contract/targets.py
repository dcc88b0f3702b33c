"""What the contract is run on: which backends, in which ways, where the tensors are, and what sizes it can afford.

pytest tests/contract                              the CPU
pytest tests/contract --target triton-interpreter  with TRITON_INTERPRET=1 in the environment
pytest tests/contract --target cuda-emulation      with PILE_FAST_CUDA_EMULATION naming a build of tests/cuda_emulation
pytest tests/contract --target triton              on a GPU; so with "cuda"
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from pile_fast.backends import cpp


@dataclass(frozen=True)
class Way:
    """A backend, how it sums over pairs, and how it is prepared; `samples` random batches of `lengths` test its numerics."""

    name: str
    backend: str
    pairwise: str = "auto"
    lengths: tuple[int, ...] = ()
    samples: int = 0
    prepare: Callable[[pytest.MonkeyPatch], None] = lambda patch: None

    @property
    def options(self) -> dict[str, Any]:
        return dict(backend=self.backend, pairwise=self.pairwise)


@dataclass(frozen=True)
class Target:
    ways: tuple[Way, ...]  # of the properties
    numerics: tuple[Way, ...]  # of what random batches show
    linear: Way | None = None  # sums in linear time over a list of `lengths[0]` documents
    long_lengths: tuple[int, ...] = ()
    scale_lengths: tuple[int, ...] = (7,)
    documents: int = 150  # of a list, at most, in the properties
    iterations: int = 50  # likewise
    device: str = "cpu"
    float64: bool = False
    repeats: bool = True  # also the losses that differ from another in options alone
    host: bool = False  # values of the inputs are read and checked

    @property
    def gpu(self) -> bool:
        return self.device == "cuda"

    @property
    def kernels(self) -> bool:
        """It tests GPU kernels, wherever they run."""
        return not self.host

    @property
    def fast(self) -> bool:
        """It can afford what costs much and says little of a kernel."""
        return self.iterations >= 50


# -- the CPU

# Around the vector widths (4, 8, 16), the smallest block of the linear sum (96) and past the crossover.
_CPU_LENGTHS = (0, 1, 2, 3, 7, 8, 15, 16, 17, 31, 33, 64, 95, 97, 130, 200, 333)


_CPU_WAYS = [Way("torch", "torch", "auto", _CPU_LENGTHS, 17)]
if not cpp.unavailable():
    _CPU_WAYS += [Way(f"cpp-{sums}", "cpp", sums, _CPU_LENGTHS, 60) for sums in ("direct", "chebyshev", "auto")]
CPU = Target(
    ways=tuple(_CPU_WAYS[:3]),
    numerics=tuple(_CPU_WAYS),
    linear=None if cpp.unavailable() else Way("linear", "cpp", "chebyshev", (300,)),
    long_lengths=(2500, 5000, 9001),  # shared by threads; longer than one block of direct sums
    scale_lengths=(2, 7, 40, 300),
    float64=True,
    host=True,
)

# -- Triton


def wide_tiles(patch: pytest.MonkeyPatch) -> None:
    """The interpreter takes as long for a wide tile as for a narrow one."""
    from pile_fast.backends import triton

    config = triton._config
    patch.setattr(triton, "_config", lambda slots, teachers: config(slots, teachers) | {"BC": 32})


def a_launch_per_phase(patch: pytest.MonkeyPatch) -> None:
    """The rule picks several launches for few lists longer than a block; make the block short."""
    from pile_fast.backends import triton, triton_long

    config = triton._config
    patch.setattr(triton, "_config", lambda slots, teachers: config(slots, teachers) | {"BR": 16})
    patch.setattr(triton_long, "DIRECT_CHUNK", 32)


def short_blocks(patch: pytest.MonkeyPatch) -> None:
    """Blocks as many as long lists have, in short ones: groups of 32 are large, smaller ones share up to 63 documents."""
    from pile_fast.backends import triton_long

    wide_tiles(patch)
    patch.setattr(triton_long, "WINDOW", 32)


# An operation in the interpreter takes 50 microseconds. Lengths around one and two column tiles, one block, several.
_TRITON_LENGTHS = (1, 2, 7, 17, 33, 40)
_TRITON_LINEAR = Way("linear", "triton", "chebyshev", (66, 90, 130), 6, short_blocks)
TRITON_INTERPRETER = Target(
    ways=(Way("triton", "triton", "direct", prepare=wide_tiles),),
    numerics=(
        Way("one launch", "triton", "direct", _TRITON_LENGTHS, 20),
        Way("a launch per phase", "triton", "direct", _TRITON_LENGTHS, 20, a_launch_per_phase),
        _TRITON_LINEAR,
    ),
    linear=_TRITON_LINEAR,
    documents=40,
    iterations=3,
    repeats=False,
)

# -- CUDA

# A warp per query up to 32 documents, a block beyond; 130: more than one document per four lanes.
_CUDA_LENGTHS = (1, 2, 7, 17, 31, 33, 64, 130, 300)
_CUDA_WAYS = tuple(Way(f"cuda-{sums}", "cuda", sums, _CUDA_LENGTHS, 54) for sums in ("direct", "chebyshev"))
CUDA_EMULATION = Target(
    ways=_CUDA_WAYS,
    numerics=_CUDA_WAYS,
    linear=Way("linear", "cuda", "chebyshev", (1100,)),
    long_lengths=(1024, 1025, 2500),  # one piece; two, the second of one document; three
    documents=40,
    iterations=20,
)

# -- a GPU: Triton compiles a kernel for most samples

_GPU_LENGTHS = (1, 2, 7, 31, 33, 64, 100, 129, 300, 1000)


def _gpu(backend: str, samples: int) -> Target:
    ways = tuple(Way(f"{backend}-{sums}", backend, sums, _GPU_LENGTHS, samples) for sums in ("direct", "chebyshev"))
    linear = dataclasses.replace(ways[1], lengths=(1100,))
    return Target(ways, ways, linear, (1024, 1025, 9001), (7, 40, 1100), device="cuda")


TARGETS = {
    "cpu": CPU,
    "triton-interpreter": TRITON_INTERPRETER,
    "cuda-emulation": CUDA_EMULATION,
    "triton": _gpu("triton", 40),
    "cuda": _gpu("cuda", 100),
}
