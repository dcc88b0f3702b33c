"""CUDA kernels: what csrc/bindings/cuda_module.cpp binds. tests/test_native.py holds this against the module."""

from typing import Any

TERMS: tuple[str, ...]

class EnsembleOptions:
    def __setattr__(self, option: str, value: Any, /) -> None: ...

class LossOptions:
    def __setattr__(self, option: str, value: Any, /) -> None: ...

class Device: ...

class ShortPlan:
    capacity: int
    scratch_bytes: int
    warps: bool

class Call:
    def __init__(
        self,
        sizes: tuple[int, ...],
        views: tuple[Any, ...],
        ensemble: EnsembleOptions | None,
        loss: LossOptions | None,
        /,
    ) -> None: ...

def device(index: int, /) -> Device: ...
def unavailable() -> str: ...
def plan_short(
    queries: int, slots: int, packed: bool, teachers: int, sweeps: int, direct: bool, device: Device, /
) -> ShortPlan: ...
def run_short(call: Call, to: tuple[int, ...], plan: ShortPlan, device: Device, place: tuple[int, int], /) -> None: ...
def long_keys(call: Call, keys: int, place: tuple[int, int], /) -> None: ...
def long_bytes(call: Call, to: tuple[int, ...], /) -> int: ...
def run_long(call: Call, to: tuple[int, ...], keys: int, order: int, device: Device, place: tuple[int, int], /) -> None: ...
