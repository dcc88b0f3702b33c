"""Entropy-based weights (EBKD)."""

import torch
from torch import Tensor

from pile_fast.checks import number
from pile_fast.ensembles.base import Ensemble, Teachers, complement
from pile_fast.reference import softmax_or_zero


def ebkd_ensemble(
    teacher_logits: Tensor, labels: Tensor | None = None, *, mask: Tensor | None = None, cu_seqlens: Tensor | None = None,
    normalize: str = "zscore", temperature: float = 1.0,
) -> Ensemble:  # fmt: skip
    r"""Entropy-based weights (EBKD, Kwon et al., ICASSP 2020): sure teachers weigh more. Uses no labels.

    .. math:: w_{qm} = \frac{1}{K - 1} \left(1 - \frac{H_{qm}}{\sum_k H_{qk}}\right), \qquad
              H_{qm} = -\sum_i p_{im} \log p_{im}, \qquad
              p_{\cdot m} = \operatorname{softmax}(\tilde t_{\cdot m} / \tau)

    for the K teachers of a query. The idea is the paper's, the formula that of CA-MKD's public code, over classes
    there. Ours: the softmax is over the documents of a query; H is divided by the log of how many documents the
    teacher scored, its largest value, so that a teacher does not look sure because it scored few documents
    (without missing scores this changes nothing).

    Args:
        teacher_logits, labels, mask, cu_seqlens, normalize: see `mean_ensemble`.
        temperature: τ, the unit of the calibrated logits, > 0.

    Returns:
        Ensemble(logits, weights), weights (Q, M).

    >>> import torch
    >>> from pile_fast.ensembles import ebkd_ensemble
    >>> teachers = torch.tensor([[[100.0, 0.0], [0.0, 0.0]]])  # sure, unsure
    >>> ebkd_ensemble(teachers, normalize="none").weights
    tensor([[1., 0.]])
    """
    temperature = number("temperature", temperature, low=0.0, open_low=True)
    teachers = Teachers(teacher_logits, labels, mask, cu_seqlens, normalize)
    p = softmax_or_zero((teachers.logits / temperature).transpose(1, 2), teachers.present.transpose(1, 2))
    scored = teachers.present.sum(1)
    entropy = torch.special.entr(p).sum(-1) / torch.where(scored > 1, scored, 2).to(p.dtype).log()
    # A teacher of one document is as unsure as can be. The least entropy makes all sure teachers equal, not 0 / 0.
    entropy = torch.where(scored > 1, entropy.clamp(min=1e-30), scored.to(p.dtype))
    weights = complement(entropy / entropy.sum(1, keepdim=True), teachers)
    return Ensemble(teachers.combine(weights), weights)
