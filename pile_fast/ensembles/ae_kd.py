"""Weights from the teachers' pulls on the student (AE-KD), and its quadratic programme."""

import torch
from torch import Tensor

from pile_fast.checks import number
from pile_fast.ensembles.base import Ensemble, Teachers
from pile_fast.reference import softmax_or_zero

# Of the accelerated projected gradient: 1e-6 off or better for up to 8 teachers.
QP_ITERATIONS = 300


def ae_kd_ensemble(
    teacher_logits: Tensor, labels: Tensor | None = None, *, student_logits: Tensor, mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None, normalize: str = "zscore", temperature: float = 1.0, max_weight: float = 1.0,
) -> Ensemble:  # fmt: skip
    r"""Weights from the teachers' pulls on the student (AE-KD, Du et al., NeurIPS 2020). Uses no labels.

    .. math:: \min_w \tfrac12 \left\| \sum_m w_m g_m \right\|^2 \ \text{s.t.} \ \sum_m w_m = 1, \ 0 \le w_m \le C,
              \qquad g_m = \operatorname{softmax}(z / \tau) - \operatorname{softmax}(\tilde t_{\cdot m} / \tau)

    g_m is the gradient (times τ) of teacher m's distillation loss, a Kullback-Leibler divergence, at the student's
    logits z. The programme is the paper's: its solution is the direction that lowers all teachers' losses, and C bounds
    the weight of a single teacher. Ours: one programme per query, the softmax over its
    documents, and the weights on the logits; a teacher that scored one document of a query, and so has no pull, takes
    no part. The programmes of all queries are solved at once, on the device of the logits.

    Args:
        teacher_logits, labels, mask, cu_seqlens, normalize: see `mean_ensemble`.
        student_logits: (Q, N) or (D,), float, as they are trained; not calibrated.
        temperature: τ, > 0.
        max_weight: C, in (0, 1]. 1 = no bound; up to 1 / K for the K teachers of a query: the mean. In the one-class
            support vector form, C = 1 / (ν M).

    Returns:
        Ensemble(logits, weights), weights (Q, M).

    >>> import torch
    >>> from pile_fast.ensembles import ae_kd_ensemble
    >>> student, teachers = torch.zeros(1, 2), torch.tensor([[[1.0, -1.0], [-1.0, 1.0]]])  # opposite pulls
    >>> ae_kd_ensemble(teachers, student_logits=student).weights
    tensor([[0.5000, 0.5000]])
    """
    temperature = number("temperature", temperature, low=0.0, open_low=True)
    max_weight = number("max_weight", max_weight, low=0.0, high=1.0, open_low=True)
    teachers = Teachers(
        teacher_logits, labels, mask, cu_seqlens, normalize, student_logits=student_logits, needs="student_logits"
    )
    present = teachers.present.transpose(1, 2)
    z = (teachers.student / temperature).unsqueeze(1)
    pull = softmax_or_zero(z, present) - softmax_or_zero((teachers.logits / temperature).transpose(1, 2), present)
    pull = pull.double()
    several = teachers.present.sum(1) > 1
    allowed = torch.where(several.any(1, keepdim=True), several, teachers.here)
    weights = _least_norm(pull @ pull.mT, allowed, max_weight).to(teachers.logits.dtype)
    return Ensemble(teachers.combine(weights), weights)


def _least_norm(gram: Tensor, allowed: Tensor, max_weight: float) -> Tensor:
    """(Q, M) minimisers of ½ wᵀ gram w on the simplex with w <= max_weight, and w = 0 where not allowed.

    Accelerated projected gradient with restarts (O'Donoghue and Candès, 2015) from equal weights: where the minimiser
    is not unique, the teachers' order makes no difference to which one is found.
    """
    count = allowed.sum(-1, keepdim=True).clamp(min=1)
    w = y = allowed.to(gram.dtype) / count
    cap = torch.where(allowed, (1 / count).to(gram.dtype).clamp(min=max_weight), 0.0)
    curvature = gram.abs().sum(-1).amax(-1)[:, None, None]  # at least the largest eigenvalue
    gram = gram / torch.where(curvature > 0, curvature, 1.0)
    momentum = w.new_ones(w.shape[0], 1)
    for _ in range(QP_ITERATIONS):
        new = _capped_simplex(y - (gram @ y.unsqueeze(-1)).squeeze(-1), cap)
        restart = ((y - new) * (new - w)).sum(-1, keepdim=True) > 0
        following = torch.where(restart, 1.0, (1 + (1 + 4 * momentum.square()).sqrt()) / 2)
        y = new + torch.where(restart, 0.0, (momentum - 1) / following) * (new - w)
        w, momentum = new, following
    return w


def _capped_simplex(v: Tensor, cap: Tensor) -> Tensor:
    """(Q, M) projection of v on {Σ w = 1, 0 <= w <= cap}: w = clip(v − λ, 0, cap) with λ such that the sum is 1.

    The sum falls piecewise linearly in λ between the 2M points v and v − cap.
    """
    points = torch.cat([v - cap, v], -1).sort(-1).values
    sums = (v.unsqueeze(-2) - points.unsqueeze(-1)).clamp(min=0).minimum(cap.unsqueeze(-2)).sum(-1)
    left = ((sums >= 1).sum(-1, keepdim=True) - 1).clamp(min=0)
    (a, b), (fa, fb) = ((x.gather(-1, left), x.gather(-1, left + 1)) for x in (points, sums))
    shift = a + (fa - 1) / (fa - fb).clamp(min=1e-30) * (b - a)
    return (v - shift).clamp(min=0).minimum(cap)
