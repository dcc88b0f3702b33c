"""pile_fast: fused kernels and a drop-in PyTorch loss for distilling several teacher rankers into one student (PILE)."""

from pile_fast.backends import available_backends
from pile_fast.functional import (
    PILEEnsemble,
    pairwise_distillation_loss,
    pairwise_logistic_loss,
    pile_ensemble,
    pile_loss,
)
from pile_fast.loss import PILELoss

__version__ = "0.1.0"
__all__ = [
    "PILEEnsemble",
    "PILELoss",
    "available_backends",
    "pairwise_distillation_loss",
    "pairwise_logistic_loss",
    "pile_ensemble",
    "pile_loss",
]
