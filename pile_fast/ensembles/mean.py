"""The mean of the teachers, and their weighted mean."""

from torch import Tensor

from pile_fast.ensembles.base import Ensemble, Teachers


def mean_ensemble(
    teacher_logits: Tensor, labels: Tensor | None = None, *, mask: Tensor | None = None, cu_seqlens: Tensor | None = None,
    normalize: str = "zscore", prior: Tensor | None = None,
) -> Ensemble:  # fmt: skip
    r"""The mean of the calibrated teachers, or their weighted mean: w_m = prior_m / Σ prior.

    With weights found elsewhere as the `prior`, e.g. those of `best_teacher_ensemble` on a development set, it
    applies them to new queries.

    Args:
        teacher_logits: (Q, N, M) or (D, M), float; NaN = this teacher did not score this document.
        labels: (Q, N) or (D,), not used.
        mask: (Q, N) bool, True = the slot holds a document. Padded layout only.
        cu_seqlens: (Q + 1,) int32 or int64, where each query starts. Selects the packed layout.
        normalize: calibration per query and teacher: "zscore", "center" or "none".
        prior: (M,) or (Q, M) weights >= 0, need not sum to 1; None = equal. A teacher with prior 0 counts as missing.

    Returns:
        Ensemble(logits, weights), weights (Q, M).

    >>> import torch
    >>> from pile_fast.ensembles import mean_ensemble
    >>> mean_ensemble(torch.tensor([[[1.0, 3.0], [2.0, 8.0]]]), normalize="none").logits
    tensor([[2., 5.]])
    """
    teachers = Teachers(teacher_logits, labels, mask, cu_seqlens, normalize, prior=prior)
    return Ensemble(teachers.combine(teachers.base), teachers.base)
