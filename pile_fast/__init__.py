"""pile_fast: fused kernels and a drop-in PyTorch loss for distilling several teacher rankers into one student (PILE)."""

import importlib
from types import ModuleType

from pile_fast import terms
from pile_fast.backends import available_backends
from pile_fast.functional import PILEEnsemble, distillation_loss, pile_ensemble, pile_loss, ranking_loss
from pile_fast.loss import PILELoss

__version__ = "0.1.0"
__all__ = [
    "PILEEnsemble",
    "PILELoss",
    "available_backends",
    "distillation_loss",
    "pile_ensemble",
    "pile_loss",
    "ranking_loss",
    "terms",
]

# What lies above the core, loaded when it is first asked for.
_LAZY = ("cli", "data", "ensembles", "evaluation", "integrations", "offline", "students", "teachers", "trainer")


def __getattr__(name: str) -> ModuleType:
    if name in _LAZY:
        return importlib.import_module(f"pile_fast.{name}")
    raise AttributeError(f"module 'pile_fast' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *_LAZY]
