"""pile_fast: fused kernels and a drop-in PyTorch loss for distilling several teacher rankers into one student (PILE)."""

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
