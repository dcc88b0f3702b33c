"""The backends: who computes an op, by what rule, and why one cannot.

A backend is a module of this package that follows `pile_fast.backends.protocol.Backend`.
"""

from __future__ import annotations

import functools
import warnings
from typing import NamedTuple

import torch

from pile_fast.backends import cpp, cuda, torch_reference, triton
from pile_fast.backends.protocol import Backend
from pile_fast.batch import RankingBatch
from pile_fast.options import EnsembleOptions, LossOptions

# In order of preference, per device type; HIP tensors are of type "cuda" too. Triton before CUDA until a GPU has shown which
# is faster: neither has been measured, and Triton is there without nvcc, so results do not depend on who built with it.
_ORDER = {"cpu": ("cpp", "torch"), "cuda": ("triton", "cuda", "torch")}
_ORDER_ELSEWHERE = ("torch",)
_MODULES: dict[str, Backend] = {"cpp": cpp, "cuda": cuda, "triton": triton, "torch": torch_reference}


class BackendStatus(NamedTuple):
    """Whether a backend works here; if not, `reason` says why and what to do about it."""

    available: bool
    reason: str
    devices: tuple[str, ...]


def load(name: str) -> Backend:
    """The backend's module."""
    return _MODULES[name]


def available_backends() -> dict[str, BackendStatus]:
    """Every backend, whether it works on this machine, and if not why.

    >>> import pile_fast
    >>> pile_fast.available_backends()["torch"].available
    True
    """
    return {
        name: BackendStatus(not module.unavailable(), module.unavailable(), module.DEVICES) for name, module in _MODULES.items()
    }


def check_name(name: str) -> str:
    """The name, if it is "auto" or that of a backend, whether that works here or not; else ValueError."""
    if name != "auto" and name not in _MODULES:
        raise ValueError(f"backend: expected one of 'auto', {', '.join(map(repr, _MODULES))}, got {name!r}")
    return name


@functools.cache
def _warn_of_the_slow_way(reason: str) -> None:
    warnings.warn(
        f"pile_fast runs on plain PyTorch, up to a thousand times slower than its compiled CPU library: {reason}",
        RuntimeWarning,
        stacklevel=4,  # the caller of the public function
    )


def select(name: str, batch: RankingBatch, ensemble: EnsembleOptions | None, loss: LossOptions | None) -> str:
    """The backend's name for a request ("auto" or a name) and the call it has to serve.

    "auto" is the first of the device's backends that works here and computes such a call.

    Raises:
        ValueError: no backend of that name.
        RuntimeError: the backend asked for cannot serve; the message says why and what to do.
    """
    device_type = batch.device.type
    if name == "auto":
        for candidate in _ORDER.get(device_type, _ORDER_ELSEWHERE):
            module = _MODULES[candidate]
            if not module.unavailable() and not module.refusal(batch, ensemble, loss):
                return candidate
            if candidate == "cpp" and module.unavailable() and not torch.compiler.is_compiling():
                _warn_of_the_slow_way(module.unavailable())
    backend = _MODULES[check_name(name)]
    if reason := backend.unavailable():
        raise RuntimeError(f"backend {name!r} is not available: {reason}")
    if backend.DEVICES and device_type not in backend.DEVICES:
        raise RuntimeError(
            f"backend {name!r} serves {', '.join(backend.DEVICES)} tensors, got {device_type}; use backend='auto'"
        )
    if reason := backend.refusal(batch, ensemble, loss):
        raise RuntimeError(f"backend {name!r} {reason}")
    return name
