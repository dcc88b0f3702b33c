"""PILE in plain PyTorch: readable, any float dtype, O(n²) memory. The ground truth every kernel is tested against.

Everything here works on padded tensors, (Q, N) and (Q, N, M), with a boolean `valid` (Q, N) that says which slots hold a
document (`pile_fast.batch.PaddedView` brings packed lists into this form). The functions are differentiable by plain
autograd. docs/algorithm.md has the formulas; the symbols below are its symbols.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pile_fast import terms
from pile_fast.options import EnsembleOptions, LossOptions
from pile_fast.terms import Term

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
    loss: Tensor  # (Q,), 0 for a query that does not count
    counts: Tensor  # (Q,) bool: in the mean over queries; some term in use has something to say
    # (Q, N), of `loss.sum()`, written out; None unless asked for. The second derivatives are those by each logit alone, for
    # boosted trees; where a loss is not convex, a number >= 0 of about their size.
    gradient: Tensor | None = None
    hessian: Tensor | None = None


class Query(NamedTuple):
    """What a term sees of a batch of queries. Functions of terms return the `PairLoss` of each query."""

    z: Tensor  # (Q, N), the student's logits, finite
    used: Tensor  # (Q, N) bool: documents with a target, or with a label
    s: Tensor | None  # (Q, N), the target logits of a distillation, 0 where there is none
    labels: Tensor | None  # (Q, N), of a label term
    pair_weight: str  # of label pairs
    c: Tensor | None  # (Q, N), the documents' weights, > 0 where used; None = 1
    derivatives: bool  # whether to give gradient and hessian


def pair_loss(
    student_logits: Tensor, target_logits: Tensor | None, labels: Tensor | None, valid: Tensor, options: LossOptions,
    derivatives: bool = False, weights: Tensor | None = None, query_weights: Tensor | None = None,
) -> PairLoss:  # fmt: skip
    """The student's loss per query, alpha · D + (1 − alpha) · R, before any reduction over queries.

    Args:
        student_logits: (Q, N), float32 or float64.
        target_logits: (Q, N), the logits to distil, NaN or ±inf = none; may be None when alpha is 0.
        labels: (Q, N), NaN = unlabelled; may be None when alpha is 1.
        valid: (Q, N) bool.
        options: see `pile_fast.options.LossOptions`.
        derivatives: also gradient and hessian, for callers where autograd does not record.
        weights: (Q, N), what each document counts; 0 = as if it were not there. A negative one or NaN makes the loss NaN.
        query_weights: (Q,), likewise of queries.
    """
    broken = ~student_logits.isfinite()
    factor = student_logits.new_ones(student_logits.shape[0])
    if query_weights is not None:
        factor = query_weights.to(factor.dtype)
        valid = valid & (factor != 0).unsqueeze(1)
        broken = broken | ~((factor >= 0) & factor.isfinite()).unsqueeze(1)
    if weights is not None:
        valid, weights = valid & (weights != 0), weights.to(student_logits.dtype)
        broken = broken | ~((weights > 0) & weights.isfinite())
        weights = torch.where(valid & ~broken, weights, 1.0)
    broken = valid & broken
    z = torch.where(valid & ~broken, student_logits, 0.0)
    query = Query(z, valid, None, None, options.pair_weight, weights, derivatives)
    parts: list[tuple[float, PairLoss]] = []
    if options.alpha > 0:
        assert target_logits is not None
        used = valid & target_logits.isfinite()
        distilled = query._replace(used=used, s=torch.where(used, target_logits, 0.0))
        parts.append((options.alpha, TERMS[options.distillation.key](options.distillation, distilled)))
    if options.alpha < 1:
        assert labels is not None
        labelled = query._replace(used=valid & labels.isfinite(), labels=labels)
        parts.append((1 - options.alpha, TERMS[options.label_loss.key](options.label_loss, labelled)))
    # A student logit that is not finite is never hidden and never touches another query; its loss stays connected.
    poison = torch.where(broken.any(1), torch.nan, 0.0).to(z.dtype)
    loss, counts = z.new_zeros(z.shape[0]), valid.new_zeros(z.shape[0])
    for weight, part in parts:
        loss, counts = loss + weight * part.loss, counts | part.counts
    loss = factor * loss * (1 + poison) + torch.where(valid, student_logits, 0.0).sum(1) * poison
    if not derivatives:
        return PairLoss(loss, counts)
    sums = [torch.zeros_like(z), torch.zeros_like(z)]
    for weight, part in parts:
        for total, own in zip(sums, (part.gradient, part.hessian), strict=True):
            assert own is not None
            total += weight * own
    gradient, hessian = (torch.where(valid, factor.unsqueeze(1) * total + poison.unsqueeze(1), 0.0) for total in sums)
    return PairLoss(loss, counts, gradient, hessian)


def mean_over_pairs(
    query: Query, pairs: Tensor, weights: Tensor | float, value: Tensor, slope: Tensor, curvature: Tensor
) -> PairLoss:
    """The mean over `pairs`, times `weights`, of `value`; `slope` and `curvature` are value's derivatives by z_i − z_j.

    All are (Q, N, N), `pairs` with what a pair counts in the mean, 0 for those that are none.
    """
    total = pairs.sum((1, 2))
    part = sum_over_pairs(query, pairs * weights, value, slope, curvature)
    divisor = torch.where(total > 0, total, 1.0)
    by_document = divisor.unsqueeze(1)
    if part.gradient is None or part.hessian is None:
        return PairLoss(part.loss / divisor, total > 0)
    return PairLoss(part.loss / divisor, total > 0, part.gradient / by_document, part.hessian / by_document)


def sum_over_pairs(query: Query, omega: Tensor, value: Tensor, slope: Tensor, curvature: Tensor) -> PairLoss:
    """The sum over pairs, see `mean_over_pairs`."""
    there = omega != 0
    loss = torch.where(there, omega * value, 0.0).sum((1, 2))
    if not query.derivatives:
        return PairLoss(loss, there.any(2).any(1))
    slope, curvature = (torch.where(there, omega * x, 0.0) for x in (slope, curvature))
    return PairLoss(loss, there.any(2).any(1), slope.sum(2) - slope.sum(1), curvature.sum(2) + curvature.sum(1))


def target_pairs(query: Query) -> tuple[Tensor, Tensor | float]:
    """1 for the pairs i < j of which both documents have a target, and their weights c_i c_j; both (Q, N, N)."""
    pairs = (query.used.unsqueeze(2) & query.used.unsqueeze(1)).triu(1).to(query.z.dtype)
    return pairs, 1.0 if query.c is None else query.c.unsqueeze(2) * query.c.unsqueeze(1)


def differences(x: Tensor | None) -> Tensor:
    """x_i − x_j, (Q, N, N)."""
    assert x is not None
    return x.unsqueeze(2) - x.unsqueeze(1)


def distill_logistic(term: terms.Logistic, query: Query) -> PairLoss:
    dz, target = differences(query.z) / term.temperature, torch.sigmoid(differences(query.s) / term.temperature)
    value, sigma = F.binary_cross_entropy_with_logits(dz, target, reduction="none"), torch.sigmoid(dz)
    slope, curvature = (sigma - target) / term.temperature, sigma * torch.sigmoid(-dz) / term.temperature**2
    return mean_over_pairs(query, *target_pairs(query), value, slope, curvature)


def distill_mse(term: terms.MSE, query: Query) -> PairLoss:
    gap = differences(query.z) - differences(query.s)
    return mean_over_pairs(query, *target_pairs(query), gap.square(), 2 * gap, torch.full_like(gap, 2.0))


def distill_kl(term: terms.KL, query: Query) -> PairLoss:
    assert query.s is not None
    (log_p, p, rest_p), (log_q, q, rest_q) = (softmax(x, query, term.temperature, query.c) for x in (query.s, query.z))
    counts = query.used.sum(1) > 1
    loss = term.temperature**2 * (p * (log_p - log_q)).sum(1)
    gradient = term.temperature * torch.where((p > 0.5) & (q > 0.5), rest_p - rest_q, q - p)
    return of_list(query, counts, loss, gradient, q * rest_q)


def label_logistic(term: terms.RankNet, query: Query) -> PairLoss:
    assert query.labels is not None
    dz = differences(query.z)
    pairs = preference_pairs(query.labels, query.used, query.pair_weight, dz.dtype)
    return mean_over_pairs(query, pairs, _of_preferred(query), *_logistic(dz))


def label_softmax(term: terms.Softmax, query: Query) -> PairLoss:
    gain = gains(query, term.gain)
    total = gain.sum(1, keepdim=True)
    share = gain / torch.where(total != 0, total, 1.0)
    share = (share if query.c is None else query.c * share).to(query.z.dtype)
    log_q, q, rest = softmax(query.z, query, term.temperature)
    weight = share.sum(1, keepdim=True)
    gradient = ((weight - share) * q - share * rest) / term.temperature
    loss = -(share * log_q).sum(1)
    return of_list(query, total.squeeze(1) != 0, loss, gradient, weight * q * rest / term.temperature**2)


def label_lambdarank(term: terms.LambdaRank, query: Query) -> PairLoss:
    gain = gains(query, "any" if term.metric == "mrr" else term.gain)
    discount = discounts(gain.shape[1], term, gain)
    most = (gain.sort(1, descending=True).values * discount).sum(1)
    own, within = expected_discounts(query, discount)
    z = query.z.detach()
    change = torch.where(z.unsqueeze(2) == z.unsqueeze(1), within.unsqueeze(2), differences(own).abs())
    preferred = differences(gain).clamp(min=0) / torch.where(most != 0, most, 1.0)[:, None, None]
    there = query.used.unsqueeze(2) & query.used.unsqueeze(1)
    part = sum_over_pairs(
        query, torch.where(there, preferred * change, 0.0).to(z.dtype) * _of_preferred(query), *_logistic(differences(query.z))
    )
    return part._replace(counts=(there & (preferred != 0)).any(2).any(1))


def label_approx_ndcg(term: terms.ApproxNDCG, query: Query) -> PairLoss:
    gain = gains(query, term.gain)
    gain = gain if query.c is None else query.c.to(gain.dtype) * gain
    most = (gain.sort(1, descending=True).values * discounts(gain.shape[1], terms.LambdaRank(), gain)).sum(1)
    gain = (gain / torch.where(most != 0, most, 1.0).unsqueeze(1)).to(query.z.dtype)
    gap = differences(query.z) / -term.temperature  # z_j − z_i
    sigma = torch.sigmoid(gap)
    both = query.used.unsqueeze(2) & query.used.unsqueeze(1)
    rank = 0.5 + torch.where(both, sigma, 0.0).sum(2)
    loss = 1 - (gain / torch.log2(1 + rank)).sum(1)
    # By rank, then by logits: Σ_j (a_j − a_i) σ'. What stands for the second derivatives takes a_j + a_i.
    a = gain * math.log(2) / ((1 + rank) * torch.log1p(rank).square())
    slope = torch.where(both, sigma * torch.sigmoid(-gap), 0.0) / term.temperature  # 1 − σ would lose digits
    slope = slope - torch.diag_embed(slope.diagonal(dim1=1, dim2=2))
    gradient = (slope * (a.unsqueeze(1) - a.unsqueeze(2))).sum(2)
    hessian = (slope * (a.unsqueeze(1) + a.unsqueeze(2))).sum(2) / term.temperature
    return of_list(query, most != 0, loss, gradient, hessian)


def of_list(query: Query, counts: Tensor, loss: Tensor, gradient: Tensor, hessian: Tensor) -> PairLoss:
    """A loss of whole lists; 0 for queries that do not count."""
    if not query.derivatives:
        return PairLoss(torch.where(counts, loss, 0.0), counts)
    there = counts.unsqueeze(1) & query.used
    return PairLoss(torch.where(counts, loss, 0.0), counts, torch.where(there, gradient, 0.0), torch.where(there, hessian, 0.0))


def softmax(x: Tensor, query: Query, temperature: float, c: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """The logarithm, q and 1 − q of the softmax of x / temperature over the documents used; 0 elsewhere.

    The last has all its digits where q is nearly 1. With c each document is there c times; the logarithm is that of one of
    them.
    """
    if x.shape[1] == 0:
        return x, x, x
    # Differences before the division: large logits would lose theirs.
    top = torch.where(query.used, x, torch.finfo(x.dtype).min).detach().max(1, keepdim=True)
    x = torch.where(query.used, x - x.gather(1, top.indices), 0.0) / temperature
    e = torch.where(query.used, x.exp() if c is None else c * x.exp(), 0.0)
    at_top = torch.zeros_like(query.used).scatter(1, top.indices, True)
    most = torch.ones_like(top.values) if c is None else c.gather(1, top.indices)
    others = torch.where(at_top, 0.0, e).sum(1, keepdim=True)
    log_q = x - torch.log1p(others / most) - most.log()
    q = e / (most + others)
    rest = torch.where(at_top, others / (most + others), 1 - q)
    return torch.where(query.used, log_q, 0.0), q, torch.where(query.used, rest, 0.0)


def gains(query: Query, kind: str) -> Tensor:
    """(Q, N) gains of the labels relative to 2^largest ("exp2") or the largest ("linear"); "any" has 1 for those above 0."""
    assert query.labels is not None
    y = torch.where(query.used, query.labels.to(widest_dtype(query.labels.device)), 0)
    if y.shape[1] == 0:
        return y
    y = torch.where((y < 0).any(1, keepdim=True), torch.nan, y)  # cannot be meant
    highest = y.amax(1, keepdim=True)
    if kind == "any":
        return torch.where(y.isnan(), y, (y > 0).to(y.dtype))
    if kind == "linear":
        return y / torch.where(highest > 0, highest, 1.0)
    return torch.exp2(y - highest) - torch.exp2(-highest)


def discounts(n: int, term: terms.LambdaRank, like: Tensor) -> Tensor:
    """(n,) discounts at ranks 1 to n."""
    rank = torch.arange(1, n + 1, dtype=like.dtype, device=like.device)
    discount = 1 / (rank if term.metric == "mrr" else torch.log2(1 + rank))
    return torch.where(rank <= term.cutoff, discount, 0.0) if term.cutoff else discount


def expected_discounts(query: Query, discount: Tensor) -> tuple[Tensor, Tensor]:
    """(Q, N) each document's discount at the student's ranks, and its mean difference to the documents of the same logit.

    Means over all orders of those documents: m of them at ranks a, ..., a + m − 1 share these ranks' discounts.
    """
    z, used = query.z.detach(), query.used
    a = ((z.unsqueeze(1) > z.unsqueeze(2)) & used.unsqueeze(1)).sum(2)
    m = ((z.unsqueeze(1) == z.unsqueeze(2)) & used.unsqueeze(1)).sum(2).clamp(min=1)
    place = torch.arange(len(discount), dtype=discount.dtype, device=discount.device)
    zero = discount.new_zeros(1)
    sums, by_place = (torch.cat([zero, x.cumsum(0)]) for x in (discount, discount * place))
    end = (a + m).clamp(max=len(discount))  # beyond it only where a document is not used
    total = sums[end] - sums[a]
    apart = (m - 1 + 2 * a) * total - 2 * (by_place[end] - by_place[a])
    return total / m, apart / (m * (m - 1) / 2).clamp(min=1)


def _logistic(dz: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """softplus(−dz) and its two derivatives."""
    sigma = torch.sigmoid(-dz)
    return F.softplus(-dz), -sigma, sigma * torch.sigmoid(dz)


def _of_preferred(query: Query) -> Tensor | float:
    """What a label pair (i, j) counts by its documents' weights: c_i."""
    return 1.0 if query.c is None else query.c.unsqueeze(2)


# By key: a term's function (term, query) → PairLoss.
TERMS: dict[str, Callable[[Any, Query], PairLoss]] = {
    function.__name__: function
    for function in (
        distill_logistic, distill_mse, distill_kl, label_logistic, label_softmax, label_lambdarank, label_approx_ndcg
    )
}  # fmt: skip


def has_label_loss(term: Term, highest: Tensor, lowest: Tensor) -> Tensor:
    """Which queries count in a label term: `PairLoss.counts` by their largest and smallest label alone."""
    if isinstance(term, (terms.Softmax, terms.ApproxNDCG)):
        return highest > 0  # some gain
    if isinstance(term, terms.LambdaRank) and term.metric == "mrr":
        return (highest > 0) & (lowest <= 0)
    return highest > lowest


def reduce(per_query: PairLoss, reduction: str) -> Tensor:
    """ "none" (Q,), "sum" (), or "mean" () over the queries that count; without any, a 0 connected to the graph."""
    if reduction == "none":
        return per_query.loss
    total = per_query.loss.sum()
    return total if reduction == "sum" else total / per_query.counts.sum().clamp(min=1)
