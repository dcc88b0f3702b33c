"""What a backend is."""

from __future__ import annotations

from collections.abc import Container
from typing import Protocol

from torch import Tensor

from pile_fast.batch import RankingBatch
from pile_fast.options import EnsembleOptions, LossOptions


class Backend(Protocol):
    """A module of this package. It knows nothing of autograd.

    Outputs that a caller did not ask for are empty tensors. A gradient has the student's dtype and is that of the reduced loss
    (for reduction "none": of each query's own loss). Granularity "shared" comes here with `iterations` 0 only: the ensemble is
    the mean weighted by `batch.prior`, which `pile_fast.shared` moves.

    Attributes:
        DEVICES: the device types it serves; () = any.
    """

    DEVICES: tuple[str, ...]

    def unavailable(self) -> str:
        """ "" if it works here, else the reason and the fix."""

    def refusal(self, batch: RankingBatch, ensemble: EnsembleOptions | None, loss: LossOptions | None) -> str:
        """ "" if it computes such a call (by dtypes, shapes and options), else what it cannot do and the fix."""

    def ensemble(
        self, batch: RankingBatch, options: EnsembleOptions, return_weights: bool, return_trace: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(logits, weights, trace); no weights for granularity "shared"."""

    def pulls(self, batch: RankingBatch, options: EnsembleOptions) -> tuple[Tensor, Tensor]:
        """What `reference.ensemble` calls each query's pull (Q, M), and its label loss (Q,), with `batch.prior` as the weights
        of all documents (whatever granularity and iterations say); NaN where there is none.

        A backend may also have fit_shared(batch, options, return_trace), all sweeps of `pile_fast.shared.fit` in one call.
        """

    def pair_loss(self, batch: RankingBatch, options: LossOptions, with_gradient: bool) -> tuple[Tensor, Tensor]:
        """(loss, gradient) of the student's loss against `batch.target_logits` and `batch.labels`."""

    # A backend may also have derivatives(batch, options) → (loss (Q,), gradient, hessian) of each query's own loss, for boosted
    # trees; the second derivatives by each logit alone are those of `reference.PairLoss`.

    def pile_loss(
        self, batch: RankingBatch, of_ensemble: EnsembleOptions, of_loss: LossOptions, with_gradient: bool, with_pulls: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(loss, gradient, pulls) of ensemble and loss in one; `with_pulls` comes with granularity "shared" only."""


def missing_term(keys: Container[str], loss: LossOptions | None) -> str:
    """A `refusal` if a term in use is not among a backend's `keys`, else ""."""
    if loss is None:
        return ""
    if loss.alpha > 0 and loss.distillation.key not in keys:
        return f"does not compute the distillation {loss.distillation.name!r}; use backend='auto' or 'torch'"
    if loss.alpha < 1 and loss.label_loss.key not in keys:
        return f"does not compute the label loss {loss.label_loss.name!r}; use backend='auto' or 'torch'"
    return ""
