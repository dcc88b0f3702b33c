"""PILE in plain PyTorch: readable, any float dtype, O(n²) memory. The ground truth every kernel is tested against.

Everything here works on padded tensors, (Q, N) and (Q, N, M), with a boolean `valid` (Q, N) that says which slots hold a
document (`pile_fast.batch.PaddedView` brings packed lists into this form). The functions are differentiable by plain
autograd. docs/algorithm.md has the formulas; the symbols below are its symbols.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pile_fast import terms
from pile_fast.options import EnsembleOptions, LossOptions

# With missing scores a pull on the teachers' weights divides by the share of the weight that a document's teachers hold. It is
# bounded below, or one document scored by an abandoned teacher alone would outvote its query.
MIN_SHARE = 2.0**-10


def present_teachers(teacher_logits: Tensor, valid: Tensor, prior: Tensor | None = None) -> Tensor:
    """(Q, N, M) bool: the teacher scored this document, the slot holds a document and the teacher's prior is positive.

    A logit that is not finite is no score: NaN by definition, ±inf because no calibration survives it.
    """
    present = valid.unsqueeze(-1) & teacher_logits.isfinite()
    if prior is not None:
        present = present & (prior > 0).unsqueeze(-2)
    return present


def calibrate(teacher_logits: Tensor, present: Tensor, normalize: str) -> Tensor:
    """Teachers' logits on a common scale, per query and teacher over its present documents.

    Args:
        teacher_logits: (Q, N, M), float.
        present: (Q, N, M) bool, see `present_teachers`.
        normalize: "zscore" (mean 0, population standard deviation 1), "center", "none", "minmax" (lowest 0, highest 1) or
            "logit" (`probability_logit`, then "zscore"). A constant teacher becomes 0 where a scale is divided out.

    Returns:
        (Q, N, M); 0 where a teacher is not present.
    """
    t = torch.where(present, teacher_logits, 0.0)
    if normalize == "none" or t.shape[1] == 0:
        return t
    if normalize == "logit":
        t = torch.where(present, probability_logit(t), 0.0)
    # In float64 and in the teacher's own unit, a power of two: whatever its offset and scale, no digit is lost.
    wide = t.to(widest_dtype(t.device))
    unit = _power_of_two_near(wide.detach().abs().amax(1, keepdim=True))
    wide = wide / unit
    lowest = torch.where(present, wide, torch.inf).amin(1, keepdim=True)
    highest = torch.where(present, wide, -torch.inf).amax(1, keepdim=True)
    if normalize == "minmax":
        zero, scale = lowest, highest - lowest
    else:
        count = present.sum(1, keepdim=True).clamp(min=1)
        zero = wide.sum(1, keepdim=True) / count
        scale = (torch.where(present, wide - zero, 0.0).square().sum(1, keepdim=True) / count).sqrt()
    centered = torch.where(present, wide - zero, 0.0)
    if normalize == "center":
        return (centered * unit).to(t.dtype)
    # Constant by its extremes, not by its deviation: the rounding of its mean must not be blown up to unit scale.
    return torch.where(highest > lowest, centered / torch.where(highest > lowest, scale, 1.0), 0.0).to(t.dtype)


def probability_logit(p: Tensor) -> Tensor:
    """log p − log(1 − p), of p kept between ε and 1 − ε, ε that of its dtype; the result has its dtype."""
    wide, epsilon = p.to(widest_dtype(p.device)), torch.finfo(p.dtype).eps
    return torch.logit(wide.clamp(epsilon, 1 - epsilon)).to(p.dtype)


def widest_dtype(device: torch.device) -> torch.dtype:
    """float64, or float32 where the device has nothing wider."""
    return torch.float32 if device.type == "mps" else torch.float64


def _power_of_two_near(size: Tensor) -> Tensor:
    most = 1000 if size.dtype is torch.float64 else 120  # the inverse must be a number, too
    return torch.exp2(torch.frexp(size).exponent.clamp(-most, most).to(size.dtype))


def common_offset(t: Tensor, present: Tensor) -> Tensor:
    """(Q, 1, 1): the middle of a query's logits where it is large beside their range, else 0.

    Ensembles and pairs are differences: what all logits share only costs digits. So large an offset comes off, and goes back
    on, without rounding.
    """
    if t.shape[1] == 0:
        return t.new_zeros((t.shape[0], 1, 1))
    low = torch.where(present, t, torch.inf).amin((1, 2), keepdim=True)
    high = torch.where(present, t, -torch.inf).amax((1, 2), keepdim=True)
    middle = low / 2 + high / 2
    return torch.where(middle.abs() > 2 * (high - low), middle, 0.0).detach()


def preference_pairs(labels: Tensor, labelled: Tensor, pair_weight: str, dtype: torch.dtype) -> Tensor:
    """(Q, N, N) weights ω_ij of the pairs P: positive where i and j are labelled and y_i > y_j, else 0.

    Up to a factor per query, which every use divides out: gains are relative to the query's largest label, so that no label is
    too large for them.
    """
    # Not below float32, and exactly for integers: labels are compared as they are.
    exact = labels.dtype is torch.float64 or dtype is torch.float64 or not labels.is_floating_point()
    labels = labels.to(widest_dtype(labels.device) if exact else torch.float32)
    y = torch.where(labelled, labels, 0)
    above = (y.unsqueeze(2) > y.unsqueeze(1)) & labelled.unsqueeze(2) & labelled.unsqueeze(1)
    if pair_weight == "none" or y.shape[1] == 0:
        return above.to(dtype)
    highest = torch.where(labelled, y, -torch.inf).amax(1, keepdim=True)
    lowest = torch.where(labelled, y, torch.inf).amin(1, keepdim=True)
    several = highest > lowest
    highest, lowest = torch.where(several, highest, 1.0), torch.where(several, lowest, 0.0)
    # Halves, because the gap of two labels may be too large for their dtype.
    gain = (y / 2 - lowest / 2) / (highest / 2 - lowest / 2) if pair_weight == "label_gap" else torch.exp2(y - highest)
    return torch.where(above, gain.unsqueeze(2) - gain.unsqueeze(1), 0).to(dtype)


class Ensemble(NamedTuple):
    logits: Tensor  # (Q, N), NaN where no teacher scored the document
    weights: Tensor  # (Q, N, M), (Q, M) or, shared by all queries, (M,)
    trace: Tensor  # (Q, iterations + 1), or (iterations + 1,)
    pulls: Tensor  # (Q, M), see `ensemble`


def ensemble(
    teacher_logits: Tensor,
    labels: Tensor,
    valid: Tensor,
    options: EnsembleOptions,
    prior: Tensor | None = None,
    return_trace: bool = False,
) -> Ensemble:
    """The label-supervised ensemble: `iterations` exponentiated-gradient steps on the teachers' weights.

    Args:
        teacher_logits: (Q, N, M), float32 or float64; NaN or ±inf = not scored.
        labels: (Q, N), any real dtype; NaN = unlabelled.
        valid: (Q, N) bool.
        options: see `pile_fast.options.EnsembleOptions`.
        prior: (M,) or (Q, M) weights to start from; None = uniform.
        return_trace: also the pairwise label loss before each iteration and after the last; else an empty trace.

    Returns:
        Logits, weights, trace, and each query's pull g_q on weights that its documents share, at the end: the slope of its
        label loss, downwards. NaN where there is none: in a query without a pair, and for a teacher that scored nothing of it.
    """
    dtype = teacher_logits.dtype
    present = present_teachers(teacher_logits, valid, prior)
    t = calibrate(teacher_logits, present, options.normalize)
    offset = common_offset(t, present)
    t = torch.where(present, t - offset, 0.0)
    scored, here = present.any(-1), present.any(1)
    labelled = scored & labels.isfinite()
    omega = preference_pairs(labels, labelled, options.pair_weight, dtype)
    k = omega.sum(2) + omega.sum(1)
    total = omega.sum((1, 2))
    has_pairs = total > 0
    total = torch.where(has_pairs, total, 1.0)
    pulled = has_pairs.unsqueeze(-1) & here  # (Q, M)
    trace = []

    log_prior = t.new_zeros(1) if prior is None else prior.to(dtype).clamp(min=0).log()
    by_document, shared = options.granularity == "document", options.granularity == "shared"
    # The exponents add up over the iterations: one number per document, per teacher and query, or per teacher.
    queries, documents, teachers = t.shape
    exponent = t.new_zeros((queries, documents) if by_document else (1 if shared else queries, teachers))

    def document_weights() -> Tensor:
        energy = log_prior.unsqueeze(-2) + (exponent.unsqueeze(-1) * t if by_document else exponent.unsqueeze(1))
        return softmax_or_zero(energy, present)

    def query_weights() -> Tensor:
        return softmax_or_zero(log_prior + exponent, here)

    def label_loss(s: Tensor) -> Tensor:
        difference = s.unsqueeze(2) - s.unsqueeze(1)
        loss = (omega * F.softplus((options.margin - difference) / options.temperature)).sum((1, 2)) / total
        return loss.sum() / has_pairs.sum().clamp(min=1) if shared else loss

    def direction(s: Tensor) -> Tensor:  # λ
        difference = s.unsqueeze(2) - s.unsqueeze(1)
        p = omega * torch.sigmoid((options.margin - difference) / options.temperature)
        return p.sum(2) - p.sum(1)

    def pull(s: Tensor) -> Tensor:
        # ds_i/dw_m = (t_im − s_i) / share_i, share_i what the teachers present at i hold of the query's weight. Without
        # missing scores this is Σ_i λ_i t_im up to a constant that the normalisation removes.
        share = torch.where(present, query_weights().unsqueeze(1), 0.0).sum(-1).clamp(min=MIN_SHARE)
        force = (direction(s) / share).unsqueeze(-1)
        return torch.where(present, force * (t - s.unsqueeze(-1)), 0.0).sum(1) / total.unsqueeze(-1)

    for _ in range(options.iterations):
        s = (document_weights() * t).sum(-1)
        if return_trace:
            trace.append(label_loss(s))
        if by_document:
            exponent = exponent + options.step_size * direction(s) / torch.where(k > 0, k, 1.0)
        elif shared:
            mean = torch.where(pulled, pull(s), 0.0).sum(0) / pulled.sum(0).clamp(min=1)
            exponent = shared_step(exponent, mean, has_pairs.sum(), options)
        else:
            exponent = exponent + options.step_size * pull(s)

    weights = document_weights()
    s = (weights * t).sum(-1)
    if return_trace:
        trace.append(label_loss(s))
    if shared:
        weights = (log_prior + exponent).expand(1, teachers).softmax(-1).squeeze(0)
    elif not by_document:
        weights = query_weights()
    return Ensemble(
        torch.where(scored, s + offset.squeeze(-1), torch.nan),
        weights,
        torch.stack(trace, -1) if trace else t.new_zeros((0,) if shared else (queries, 0)),
        t.new_zeros((0, teachers)) if by_document else torch.where(pulled, pull(s), torch.nan),
    )


def shared_step(exponent: Tensor, pull: Tensor, queries: Tensor, options: EnsembleOptions) -> Tensor:
    """The next exponents (..., M) of weights that all queries share: a proximal step on the mean label loss plus
    shrinkage / (2 queries) |a|². With few labelled queries the weights stay near the mean ensemble's.

    Args:
        exponent: (..., M), the present ones.
        pull: (M,), the mean pull of the labelled queries.
        queries: how many those are, in all of the data.
        options: `step_size` and `shrinkage`.
    """
    moved = exponent - exponent.mean(-1, keepdim=True) + options.step_size * pull
    return torch.where(queries > 0, moved / (1 + options.step_size * options.shrinkage / queries), exponent)


def softmax_or_zero(energy: Tensor, present: Tensor) -> Tensor:
    """Softmax over the teachers that are present; all zeros where none is."""
    weights = torch.where(present, energy, -torch.inf).softmax(-1)
    return torch.where(present, weights, 0.0)


# -- the student's loss


class PairLoss(NamedTuple):
    loss: Tensor  # (Q,), 0 for a query without pairs
    has_pairs: Tensor  # (Q,) bool: some term in use has a pair
    gradient: Tensor | None  # (Q, N): what autograd gives for `loss.sum()`, written out; None unless asked for


class Query(NamedTuple):
    """What a term sees of a batch of queries. Functions of terms return a `PairLoss` of means over each query's pairs."""

    z: Tensor  # (Q, N), the student's logits, finite
    s: Tensor | None  # (Q, N), the target logits of a distillation, 0 where there is none
    omega: Tensor | None  # (Q, N, N), a label term's `preference_pairs`
    used: Tensor  # (Q, N) bool: documents with a target, or with a label
    with_gradient: bool


def pair_loss(
    student_logits: Tensor, target_logits: Tensor | None, labels: Tensor | None, valid: Tensor, options: LossOptions,
    with_gradient: bool = False,
) -> PairLoss:  # fmt: skip
    """The student's loss per query, alpha · D + (1 − alpha) · R, before any reduction over queries.

    Args:
        student_logits: (Q, N), float32 or float64.
        target_logits: (Q, N), the logits to distil, NaN or ±inf = none; may be None when alpha is 0.
        labels: (Q, N), NaN = unlabelled; may be None when alpha is 1.
        valid: (Q, N) bool.
        options: see `pile_fast.options.LossOptions`.
        with_gradient: also the gradient, for callers where autograd does not record.
    """
    z = torch.where(valid, student_logits, 0.0)
    parts: list[tuple[float, PairLoss]] = []
    if options.alpha > 0:
        assert target_logits is not None
        used = valid & target_logits.isfinite()
        query = Query(z, torch.where(used, target_logits, 0.0), None, used, with_gradient)
        parts.append((options.alpha, TERMS[options.distillation.key](options.distillation, query)))
    if options.alpha < 1:
        assert labels is not None
        used = valid & labels.isfinite()
        query = Query(z, None, preference_pairs(labels, used, options.pair_weight, z.dtype), used, with_gradient)
        parts.append((1 - options.alpha, TERMS[options.label_loss.key](options.label_loss, query)))
    # A student logit that is not finite is never hidden and never touches another query.
    poison = torch.where((valid & ~student_logits.isfinite()).any(1, keepdim=True), torch.nan, 0.0)
    loss, has_pairs, gradient = z.new_zeros(z.shape[0]), valid.new_zeros(z.shape[0]), torch.zeros_like(z)
    for weight, part in parts:
        loss = loss + weight * part.loss
        has_pairs = has_pairs | part.has_pairs
        gradient = gradient if part.gradient is None else gradient + weight * part.gradient
    loss = loss * (1 + poison.squeeze(1)) + z.sum(1) * poison.squeeze(1)
    return PairLoss(loss, has_pairs, torch.where(valid, gradient + poison, 0.0) if with_gradient else None)


def mean_over_pairs(value: Tensor, slope: Tensor, omega: Tensor, with_gradient: bool) -> PairLoss:
    """The mean of `value` (Q, N, N) weighted by `omega` (Q, N, N), and its gradient; `slope` is value's along z_i − z_j."""
    total = omega.sum((1, 2))
    divisor = torch.where(total > 0, total, 1.0)
    loss = torch.where(omega > 0, omega * value, 0.0).sum((1, 2)) / divisor
    gradient = None
    if with_gradient:
        slope = torch.where(omega > 0, omega * slope, 0.0)
        gradient = (slope.sum(2) - slope.sum(1)) / divisor.unsqueeze(1)
    return PairLoss(loss, total > 0, gradient)


def pairs_of(query: Query) -> tuple[Tensor, Tensor, Tensor]:
    """z_i − z_j, s_i − s_j, and 1 for the pairs i < j of which both documents have a target; all (Q, N, N)."""
    assert query.s is not None
    dz, ds = (x.unsqueeze(2) - x.unsqueeze(1) for x in (query.z, query.s))
    return dz, ds, (query.used.unsqueeze(2) & query.used.unsqueeze(1)).triu(1).to(dz.dtype)


def distill_logistic(term: terms.Logistic, query: Query) -> PairLoss:
    dz, ds, pairs = pairs_of(query)
    dz, target = dz / term.temperature, torch.sigmoid(ds / term.temperature)
    value = F.binary_cross_entropy_with_logits(dz, target, reduction="none")
    return mean_over_pairs(value, (torch.sigmoid(dz) - target) / term.temperature, pairs, query.with_gradient)


def distill_mse(term: terms.MSE, query: Query) -> PairLoss:
    dz, ds, pairs = pairs_of(query)
    return mean_over_pairs((dz - ds).square(), 2 * (dz - ds), pairs, query.with_gradient)


def label_logistic(term: terms.RankNet, query: Query) -> PairLoss:
    dz = query.z.unsqueeze(2) - query.z.unsqueeze(1)
    assert query.omega is not None
    return mean_over_pairs(F.softplus(-dz), -torch.sigmoid(-dz), query.omega, query.with_gradient)


# By key: a term's function (term, query) → PairLoss.
TERMS: dict[str, Callable[[Any, Query], PairLoss]] = {
    function.__name__: function for function in (distill_logistic, distill_mse, label_logistic)
}


def reduce(per_query: PairLoss, reduction: str) -> Tensor:
    """ "none" (Q,), "sum" (), or "mean" () over the queries that have a pair; without any, a 0 connected to the graph."""
    if reduction == "none":
        return per_query.loss
    total = per_query.loss.sum()
    return total if reduction == "sum" else total / per_query.has_pairs.sum().clamp(min=1)
