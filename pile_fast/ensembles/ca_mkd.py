"""Confidence-aware weights (CA-MKD)."""

from torch import Tensor

from pile_fast.checks import number
from pile_fast.ensembles.base import Ensemble, Teachers, complement, label_losses
from pile_fast.reference import softmax_or_zero


def ca_mkd_ensemble(
    teacher_logits: Tensor, labels: Tensor, *, mask: Tensor | None = None, cu_seqlens: Tensor | None = None,
    normalize: str = "zscore", temperature: float = 1.0,
) -> Ensemble:  # fmt: skip
    r"""Confidence-aware weights (CA-MKD, Zhang, Chen and Wang, ICASSP 2022): teachers that err less weigh more.

    .. math:: w_{qm} = \frac{1}{K - 1} \left(1 - \frac{\exp \ell_{qm}}{\sum_k \exp \ell_{qk}}\right)

    for the K teachers of a query. The formula is the paper's, with the cross entropy of the sample as ℓ and the
    weights on the teachers' losses. Ours: ℓ_qm is the pairwise label loss of `best_teacher_ensemble`, the weights are
    on the logits, and the features play no part. No weight exceeds 1 / (K − 1).

    Args:
        teacher_logits, mask, cu_seqlens, normalize: see `mean_ensemble`.
        labels, temperature: see `best_teacher_ensemble`.

    Returns:
        Ensemble(logits, weights), weights (Q, M).

    >>> import torch
    >>> from pile_fast.ensembles import ca_mkd_ensemble
    >>> teachers = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])  # calibrated ±1: ℓ = 0.127 and 2.127
    >>> ca_mkd_ensemble(teachers, torch.tensor([[1, 0]])).weights  # sigmoid(2)
    tensor([[0.8808, 0.1192]])
    """
    temperature = number("temperature", temperature, low=0.0, open_low=True)
    teachers = Teachers(teacher_logits, labels, mask, cu_seqlens, normalize, needs="labels")
    weights = complement(softmax_or_zero(label_losses(teachers, temperature), teachers.here), teachers)
    return Ensemble(teachers.combine(weights), weights)
