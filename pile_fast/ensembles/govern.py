"""The majority's direction (after GOVERN)."""

import torch
from torch import Tensor

from pile_fast.ensembles.base import Ensemble, Teachers


def govern_ensemble(
    teacher_logits: Tensor, labels: Tensor | None = None, *, student_logits: Tensor, mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None, normalize: str = "zscore",
) -> Ensemble:  # fmt: skip
    r"""Vote on the direction, follow the majority (after GOVERN, Zhou et al., EMNLP 2024 Industry). Uses no labels.

    .. math:: v_i = \operatorname{sign} \sum_m \operatorname{sign}(\tilde t_{im} - \tilde z_i), \qquad
              s_i = \operatorname{mean} \{\tilde t_{im} : \operatorname{sign}(\tilde t_{im} - \tilde z_i) = v_i\}

    That the teachers vote on each sample with the orientation of their gradients, without labels, and that the majority
    is followed, is the paper's (arXiv:2405.03764). Ours, as its exact rule was not available to us: the vote is per
    document, on whether the student's calibrated logit should rise or fall; the teachers of the majority are averaged;
    a drawn vote takes all teachers; one that agrees with the student (to rounding) has no vote.

    Args:
        teacher_logits, labels, mask, cu_seqlens, normalize: see `mean_ensemble`.
        student_logits: (Q, N) or (D,), float; calibrated like a teacher.

    Returns:
        Ensemble(logits, weights), weights (Q, N, M) or (D, M).

    >>> import torch
    >>> from pile_fast.ensembles import govern_ensemble
    >>> teachers = torch.tensor([[[1.0, 3.0, -4.0]]])
    >>> govern_ensemble(teachers, student_logits=torch.zeros(1, 1), normalize="none").logits
    tensor([[2.]])
    """
    teachers = Teachers(
        teacher_logits, labels, mask, cu_seqlens, normalize, student_logits=student_logits, needs="student_logits"
    )
    z = teachers.calibrate_list(teachers.student).unsqueeze(-1)
    # Who agrees with the student to rounding has no vote: in a list of two documents that is every other teacher.
    votes = teachers.present & ~torch.isclose(teachers.logits, z, rtol=1e-5, atol=1e-6)
    vote = torch.where(votes, (teachers.logits - z).sign(), 0.0)
    majority = vote.sum(-1, keepdim=True).sign()
    weights = (teachers.present & ((vote == majority) | (majority == 0))).to(teachers.logits.dtype)
    weights = weights / weights.sum(-1, keepdim=True).clamp(min=1)
    return Ensemble(teachers.combine(weights), teachers.view.unpad(weights, 0.0))
