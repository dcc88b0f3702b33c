"""CPU kernels: what csrc/bindings/cpu_module.cpp binds. tests/test_native.py holds this against the module."""

from typing import Any

DONE: int
CURVED: tuple[str, ...]
TERMS: tuple[str, ...]

class EnsembleOptions:
    def __setattr__(self, option: str, value: Any, /) -> None: ...

class LossOptions:
    def __setattr__(self, option: str, value: Any, /) -> None: ...

def run(
    sizes: tuple[int, ...],
    views: tuple[Any, ...],
    ensemble: EnsembleOptions | None,
    loss: LossOptions | None,
    outputs: tuple[int, ...],
    exponents: int,
    hessian: int,
    float64: bool,
    threads: int,
    /,
) -> int: ...
def has_threads() -> bool: ...
def instruction_set() -> str: ...
def instruction_sets() -> str: ...
def set_instruction_set(name: str, /) -> bool: ...
