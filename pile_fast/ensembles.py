"""The other ensembles of teachers, behind one signature, to compare with `pile_fast.pile_ensemble`.

Most of these methods were published for classification, and most weight losses rather than logits. Each docstring
says what is its paper's and what is our adaptation to a ranked list. In all of them

- teachers are calibrated per query as in PILE (`normalize`), t̃_im below, and the ensemble is s_i = Σ_m w_m t̃_im;
- NaN or ±inf = this teacher did not score this document: at a document the weights are rescaled to the teachers that scored
  it (their plain mean if those have no weight to speak of); a teacher that scored nothing of a query is as good as not
  there;
- `labels`, where a method makes no use of them, may be given and are only checked;
- results carry no gradient.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from pile_fast.batch import PaddedView, RankingBatch, compute_dtype
from pile_fast.checks import choice, number
from pile_fast.functional import pile_ensemble, ranking_loss
from pile_fast.reference import calibrate, present_teachers, softmax_or_zero

# A backend that forms pairs explicitly needs memory for this many at once.
PAIRS_AT_ONCE = 2**24
# Of the accelerated projected gradient of AE-KD's quadratic programme: 1e-6 off or better for up to 8 teachers.
QP_ITERATIONS = 300


class Ensemble(NamedTuple):
    """What an ensemble returns.

    Attributes:
        logits: (Q, N) or (D,), float32 (float64 for float64 teachers); NaN where no teacher scored the document and in
            slots without a document.
        weights: the teachers' weights before they are rescaled to the teachers of a document: (M,), (Q, M) or, where
            every document has its own, (Q, N, M) / (D, M). Each row on the simplex (0 throughout where no teacher
            is); those of `StackingEnsemble` are free.
    """

    logits: Tensor
    weights: Tensor | None


class _Teachers:
    """Checked and calibrated teachers of one call as (Q, N, M), and the way back to the caller's layout."""

    def __init__(self, teacher_logits, labels, mask, cu_seqlens, normalize, *, prior=None, student_logits=None, needs=""):
        choice("normalize", normalize, ("zscore", "center", "none"))
        given = {"student_logits": student_logits, "teacher_logits": teacher_logits, "labels": labels}
        for name in ("teacher_logits", needs):
            if name and given[name] is None:
                raise TypeError(f"{name}: expected a torch.Tensor, got None")
        batch = RankingBatch(**given, mask=mask, cu_seqlens=cu_seqlens, prior=prior)
        self.view = PaddedView(batch)
        self.normalize = normalize
        dtype = compute_dtype(teacher_logits)
        self.raw = self.view.pad(teacher_logits).to(dtype)
        self.labels = self.view.labels(batch)
        self.student = None if student_logits is None else self.view.pad(student_logits.detach()).to(dtype)
        self.present = present_teachers(self.raw, self.view.valid, prior)
        self.logits = calibrate(self.raw, self.present, normalize)
        self.scored = self.present.any(2)  # (Q, N)
        self.here = self.present.any(1)  # (Q, M): the teacher scored some document of the query
        self.count = self.here.sum(1, keepdim=True)
        base = self.here.to(dtype) if prior is None else torch.where(self.here, prior.to(dtype), 0.0)
        self.base = base / base.sum(1, keepdim=True).clamp(min=torch.finfo(dtype).tiny)  # the weights of the mean

    def calibrate_list(self, logits: Tensor) -> Tensor:
        """One more (Q, N) set of logits, calibrated like a teacher."""
        return calibrate(logits.unsqueeze(-1), self.scored.unsqueeze(-1), self.normalize).squeeze(-1)

    def combine(self, weights: Tensor) -> Tensor:
        """Ensemble logits from weights (M,), (Q, M) or (Q, N, M)."""
        weights = weights if weights.dim() == 3 else weights.unsqueeze(-2)
        local = torch.where(self.present, weights, 0.0)
        # Weights that are 0 but for rounding would, rescaled, choose a teacher at random.
        held = local.abs().sum(-1, keepdim=True) > 1e-5 * weights.abs().sum(-1, keepdim=True)
        local = torch.where(held, local, self.present.to(local.dtype))
        return self.unpad((local * self.logits).sum(-1) / local.abs().sum(-1))

    def unpad(self, logits: Tensor) -> Tensor:
        return self.view.unpad(torch.where(self.scored, logits, torch.nan), torch.nan)


def mean_ensemble(
    teacher_logits: Tensor,
    labels: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    normalize: str = "zscore",
    prior: Tensor | None = None,
) -> Ensemble:
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

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.

    >>> import torch
    >>> from pile_fast.ensembles import mean_ensemble
    >>> mean_ensemble(torch.tensor([[[1.0, 3.0], [2.0, 8.0]]]), normalize="none").logits
    tensor([[2., 5.]])
    """
    teachers = _Teachers(teacher_logits, labels, mask, cu_seqlens, normalize, prior=prior)
    return Ensemble(teachers.combine(teachers.base), teachers.base)


def best_teacher_ensemble(
    teacher_logits: Tensor,
    labels: Tensor,
    *,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    normalize: str = "zscore",
    selection: str = "global",
    temperature: float = 1.0,
) -> Ensemble:
    r"""The teacher that agrees best with the labels.

    .. math:: m^* = \arg\min_m \ell_{qm} \ \text{or}\ \arg\min_m \sum_q \ell_{qm}, \qquad
              \ell_{qm} = \frac{1}{|P_q|} \sum_{(i,j) \in P_q} \log(1 + \exp(-(\tilde t_{im} - \tilde t_{jm}) / \tau))

    P_q are the labelled pairs y_i > y_j that teacher m scored; without any, ℓ_qm = log 2, the loss of a constant.
    Equally good teachers share the weight. A document that the best teacher did not score takes the best of those
    that did.

    Args:
        teacher_logits, mask, cu_seqlens, normalize: see `mean_ensemble`.
        labels: (Q, N) or (D,), any real dtype, larger is better; NaN = unlabelled.
        selection: "global", one teacher for all queries of the call (the only ensemble here whose result for a query
            depends on the others), or "query", an oracle that chooses for each query.
        temperature: τ, the unit of the calibrated logits, > 0.

    Returns:
        Ensemble(logits, weights), weights (M,) for "global", (Q, M) for "query".

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.

    >>> import torch
    >>> from pile_fast.ensembles import best_teacher_ensemble
    >>> teachers = torch.tensor([[[2.0, 0.0], [1.0, 2.0], [0.0, 1.0]]])  # the first teacher is right
    >>> best_teacher_ensemble(teachers, torch.tensor([[2, 1, 0]])).weights
    tensor([1., 0.])
    """
    choice("selection", selection, ("global", "query"))
    temperature = number("temperature", temperature, low=0.0, open_low=True)
    teachers = _Teachers(teacher_logits, labels, mask, cu_seqlens, normalize, needs="labels")
    loss, here = _label_losses(teachers, temperature), teachers.here
    if selection == "global":
        loss, here = loss.sum(0), here.any(0)
    best = _lowest(loss, here)
    per_document = loss.unsqueeze(-2).expand(teachers.present.shape)
    return Ensemble(teachers.combine(_lowest(per_document, teachers.present)), best)


def _lowest(loss: Tensor, present: Tensor) -> Tensor:
    """Weight 1 on the present teacher of the lowest loss, shared among equals."""
    loss = torch.where(present, loss, torch.inf)
    # Equal to rounding: of two documents, every calibrated teacher that orders them in one way says the same.
    lowest = (present & (loss <= loss.amin(-1, keepdim=True) * (1 + 1e-5))).to(loss.dtype)
    return lowest / lowest.sum(-1, keepdim=True).clamp(min=1)


def _label_losses(teachers: _Teachers, temperature: float) -> Tensor:
    """(Q, M) ℓ_qm, the pairwise logistic loss of each teacher on its own; log 2 without a pair."""
    queries, documents, count = teachers.logits.shape
    if documents == 0:
        return teachers.logits.new_full((queries, count), math.log(2))
    # Each teacher of each query as a query of its own.
    t = (teachers.logits / temperature).transpose(1, 2).flatten(0, 1)
    present = teachers.present.transpose(1, 2).flatten(0, 1)
    labels = teachers.labels.repeat_interleave(count, 0)
    rows = max(1, PAIRS_AT_ONCE // documents**2)
    chunks = zip(t.split(rows), labels.split(rows), present.split(rows), strict=True)
    loss = torch.cat([ranking_loss(s, y, mask=valid, reduction="none") for s, y, valid in chunks])
    labelled, y = present & labels.isfinite(), labels.double()
    highest = torch.where(labelled, y, -torch.inf).amax(1)
    lowest = torch.where(labelled, y, torch.inf).amin(1)
    return torch.where(highest > lowest, loss, math.log(2)).view(queries, count)


def rrf_ensemble(
    teacher_logits: Tensor,
    labels: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    normalize: str = "zscore",
    prior: Tensor | None = None,
    k: float = 60.0,
) -> Ensemble:
    r"""Reciprocal rank fusion (Cormack, Clarke and Büttcher, SIGIR 2009).

    .. math:: s_i = \sum_m \frac{1}{k + \text{rank}_m(i)}

    is the paper's, and the result of ``normalize="none"``. Ours: as ranks need no calibration, `normalize` is applied
    to s, whose differences of a hundredth or so are no logits to distil; equal logits share their mean rank; a
    missing teacher is not a bad rank, the sum is scaled up from the teachers that scored the document; `prior`
    weights the terms.

    Args:
        teacher_logits, labels, mask, cu_seqlens, prior: see `mean_ensemble`.
        normalize: calibration of the fused scores per query: "zscore", "center" or "none".
        k: >= 0; the larger, the less the top ranks stand out.

    Returns:
        Ensemble(logits, weights), weights (Q, M).

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.

    >>> import torch
    >>> from pile_fast.ensembles import rrf_ensemble
    >>> teachers = torch.tensor([[[9.0, 0.2], [1.0, 0.1], [0.0, 0.3]]])
    >>> rrf_ensemble(teachers, normalize="none", k=1).logits.mul(60).round()  # 1/2 + 1/3, 1/3 + 1/4, 1/4 + 1/2
    tensor([[50., 35., 45.]])
    """
    k = number("k", k, low=0.0)
    teachers = _Teachers(teacher_logits, labels, mask, cu_seqlens, normalize, prior=prior)
    keys = torch.where(teachers.present, -teachers.raw, torch.inf).transpose(1, 2).contiguous()
    ascending = keys.sort(-1).values
    before, upto = torch.searchsorted(ascending, keys), torch.searchsorted(ascending, keys, right=True)
    rank = (before + upto + 1).transpose(1, 2).double() / 2
    weight = torch.where(teachers.present, teachers.base.unsqueeze(1), 0.0).double()
    s = (weight / (k + rank)).sum(-1) / weight.sum(-1) * teachers.count
    # Rounded, so that a list of equal sums stays equal and calibration does not blow up its rounding errors.
    s = teachers.calibrate_list(s.float().to(teachers.raw.dtype))
    return Ensemble(teachers.unpad(s), teachers.base)


def _complement(share: Tensor, teachers: _Teachers) -> Tensor:
    """Weights (1 − share_m) / (K − 1) of a query's K teachers, from shares on the simplex; 1 for a teacher alone."""
    return torch.where(teachers.here & (teachers.count > 1), (1 - share) / (teachers.count - 1), teachers.base)


def ca_mkd_ensemble(
    teacher_logits: Tensor,
    labels: Tensor,
    *,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    normalize: str = "zscore",
    temperature: float = 1.0,
) -> Ensemble:
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

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.

    >>> import torch
    >>> from pile_fast.ensembles import ca_mkd_ensemble
    >>> teachers = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])  # calibrated ±1: ℓ = 0.127 and 2.127
    >>> ca_mkd_ensemble(teachers, torch.tensor([[1, 0]])).weights  # sigmoid(2)
    tensor([[0.8808, 0.1192]])
    """
    temperature = number("temperature", temperature, low=0.0, open_low=True)
    teachers = _Teachers(teacher_logits, labels, mask, cu_seqlens, normalize, needs="labels")
    weights = _complement(softmax_or_zero(_label_losses(teachers, temperature), teachers.here), teachers)
    return Ensemble(teachers.combine(weights), weights)


def ebkd_ensemble(
    teacher_logits: Tensor,
    labels: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    normalize: str = "zscore",
    temperature: float = 1.0,
) -> Ensemble:
    r"""Entropy-based weights (EBKD, Kwon et al., ICASSP 2020): sure teachers weigh more. Uses no labels.

    .. math:: w_{qm} = \frac{1}{K - 1} \left(1 - \frac{H_{qm}}{\sum_k H_{qk}}\right), \qquad
              H_{qm} = -\sum_i p_{im} \log p_{im}, \qquad
              p_{\cdot m} = \operatorname{softmax}(\tilde t_{\cdot m} / \tau)

    for the K teachers of a query. The idea is the paper's, the formula that of CA-MKD's public code, over classes
    there. Ours: the softmax is over the documents of a query; H is divided by the log of how many documents the
    teacher scored, its largest value, so that few scores do not pass for sureness (without missing scores this
    changes nothing).

    Args:
        teacher_logits, labels, mask, cu_seqlens, normalize: see `mean_ensemble`.
        temperature: τ, the unit of the calibrated logits, > 0.

    Returns:
        Ensemble(logits, weights), weights (Q, M).

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.

    >>> import torch
    >>> from pile_fast.ensembles import ebkd_ensemble
    >>> teachers = torch.tensor([[[100.0, 0.0], [0.0, 0.0]]])  # sure, unsure
    >>> ebkd_ensemble(teachers, normalize="none").weights
    tensor([[1., 0.]])
    """
    temperature = number("temperature", temperature, low=0.0, open_low=True)
    teachers = _Teachers(teacher_logits, labels, mask, cu_seqlens, normalize)
    p = softmax_or_zero((teachers.logits / temperature).transpose(1, 2), teachers.present.transpose(1, 2))
    scored = teachers.present.sum(1)
    entropy = torch.special.entr(p).sum(-1) / torch.where(scored > 1, scored, 2).to(p.dtype).log()
    # A teacher of one document is as unsure as can be. The least entropy makes all sure teachers equal, not 0 / 0.
    entropy = torch.where(scored > 1, entropy.clamp(min=1e-30), scored.to(p.dtype))
    weights = _complement(entropy / entropy.sum(1, keepdim=True), teachers)
    return Ensemble(teachers.combine(weights), weights)


def ae_kd_ensemble(
    teacher_logits: Tensor,
    labels: Tensor | None = None,
    *,
    student_logits: Tensor,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    normalize: str = "zscore",
    temperature: float = 1.0,
    max_weight: float = 1.0,
) -> Ensemble:
    r"""Weights from the teachers' pulls on the student (AE-KD, Du et al., NeurIPS 2020). Uses no labels.

    .. math:: \min_w \tfrac12 \left\| \sum_m w_m g_m \right\|^2 \ \text{s.t.} \ \sum_m w_m = 1, \ 0 \le w_m \le C,
              \qquad g_m = \operatorname{softmax}(z / \tau) - \operatorname{softmax}(\tilde t_{\cdot m} / \tau)

    g_m is the gradient (times τ) of teacher m's distillation loss, a Kullback-Leibler divergence, at the student's
    logits z. The programme is the paper's: its solution is the direction that lowers all teachers' losses, and C says
    how far a single teacher may be left out of the compromise. Ours: one programme per query, the softmax over its
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

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.

    >>> import torch
    >>> from pile_fast.ensembles import ae_kd_ensemble
    >>> student, teachers = torch.zeros(1, 2), torch.tensor([[[1.0, -1.0], [-1.0, 1.0]]])  # opposite pulls
    >>> ae_kd_ensemble(teachers, student_logits=student).weights
    tensor([[0.5000, 0.5000]])
    """
    temperature = number("temperature", temperature, low=0.0, open_low=True)
    max_weight = number("max_weight", max_weight, low=0.0, high=1.0, open_low=True)
    teachers = _Teachers(
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


def govern_ensemble(
    teacher_logits: Tensor,
    labels: Tensor | None = None,
    *,
    student_logits: Tensor,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    normalize: str = "zscore",
) -> Ensemble:
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

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.

    >>> import torch
    >>> from pile_fast.ensembles import govern_ensemble
    >>> teachers = torch.tensor([[[1.0, 3.0, -4.0]]])
    >>> govern_ensemble(teachers, student_logits=torch.zeros(1, 1), normalize="none").logits
    tensor([[2.]])
    """
    teachers = _Teachers(
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


class StackingEnsemble:
    r"""Global weights learnt from labels: logistic regression on the pairs' differences of calibrated teacher logits.

    .. math:: \min_w \sum_q \frac{1}{|P_q|} \sum_{(i,j) \in P_q} \log(1 + \exp(-w^\top (\tilde t_i - \tilde t_j)))
              + \frac{\|w\|^2}{2C}

    over the labelled pairs y_i > y_j, each query counting the same. The weights are free, of either sign and any
    scale (this is stacking, not a convex combination), so the logits are on the scale of the labels' log odds. A
    teacher missing at a document of a pair adds 0 to the pair's difference; at a document the weights of its teachers
    are scaled up to the absolute sum of all of them. Fit on other queries than those whose students are judged:
    labels go into the targets. Needs scikit-learn.

    Args:
        normalize: calibration per query and teacher: "zscore", "center" or "none".
        C: inverse strength of the L2 penalty, > 0.
        pairs_per_query: of a query with more pairs than this, so many spread ones are used, always the same.

    Attributes:
        weights: (M,) float64 tensor, None before `fit`.

    >>> import torch
    >>> from pile_fast.ensembles import StackingEnsemble
    >>> teachers = torch.tensor([[[2.0, 0.0], [1.0, 2.0], [0.0, 1.0]]])  # the first teacher is right
    >>> stacking = StackingEnsemble().fit(teachers, torch.tensor([[2, 1, 0]]))
    >>> stacking(teachers).logits.argsort(descending=True)
    tensor([[0, 1, 2]])
    """

    def __init__(self, *, normalize: str = "zscore", C: float = 1.0, pairs_per_query: int = 200):
        choice("normalize", normalize, ("zscore", "center", "none"))
        if isinstance(pairs_per_query, bool) or not isinstance(pairs_per_query, int) or pairs_per_query < 1:
            raise ValueError(f"pairs_per_query: expected an int >= 1, got {pairs_per_query!r}")
        self.normalize = normalize
        self.C = number("C", C, low=0.0, open_low=True)
        self.pairs_per_query = pairs_per_query
        self.weights: Tensor | None = None

    def fit(
        self, teacher_logits: Tensor, labels: Tensor, *, mask: Tensor | None = None, cu_seqlens: Tensor | None = None
    ) -> StackingEnsemble:
        """Learn the weights, equal ones without any pair. For the arguments see `best_teacher_ensemble`.

        Raises:
            TypeError, ValueError: an argument does not fit; the message names it.
            ImportError: scikit-learn is not installed.
        """
        try:
            from sklearn.linear_model import LogisticRegression
        except ImportError as error:
            raise ImportError("StackingEnsemble needs scikit-learn: pip install 'pile_fast[ensembles]'") from error
        teachers = _Teachers(teacher_logits, labels, mask, cu_seqlens, self.normalize, needs="labels")
        labelled = teachers.scored & teachers.labels.isfinite()
        query, above, below, weight = _some_pairs(teachers.labels, labelled, self.pairs_per_query)
        if query.shape[0] == 0:
            self.weights = torch.full((teachers.here.shape[1],), 1 / teachers.here.shape[1], dtype=torch.float64)
            return self
        t, present = teachers.logits.double(), teachers.present
        both = present[query, above] & present[query, below]
        difference = torch.where(both, t[query, above] - t[query, below], 0.0)
        # The regression wants two classes, so every pair is told from both sides.
        model = LogisticRegression(C=self.C, fit_intercept=False, tol=1e-8, max_iter=1000)
        model.fit(
            torch.cat([-difference, difference]).cpu().numpy(),
            torch.arange(2).repeat_interleave(query.shape[0]).numpy(),
            sample_weight=(weight / 2).repeat(2).cpu().numpy(),
        )
        self.weights = torch.from_numpy(model.coef_[0])
        return self

    def __call__(
        self,
        teacher_logits: Tensor,
        labels: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> Ensemble:
        """Ensemble(logits, weights), weights (M,); see `mean_ensemble` for the arguments.

        Raises:
            RuntimeError: not fitted.
            TypeError, ValueError: an argument does not fit; the message names it.
        """
        if self.weights is None:
            raise RuntimeError("StackingEnsemble: call fit(teacher_logits, labels) first")
        teachers = _Teachers(teacher_logits, labels, mask, cu_seqlens, self.normalize)
        count = teachers.here.shape[1]
        if count != self.weights.shape[0]:
            raise ValueError(f"teacher_logits: expected {self.weights.shape[0]} teachers as in fit, got {count}")
        weights = self.weights.to(teachers.logits)
        return Ensemble(teachers.combine(weights) * weights.abs().sum(), weights)


def _some_pairs(labels: Tensor, labelled: Tensor, most: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of each query at most `most` pairs: (pairs,) query, document above, document below, 1 / pairs of the query.

    Pairs are numbered, not listed: the documents in falling order of labels, each with those of lower labels.
    """
    key, order = torch.where(labelled, -labels.double(), torch.inf).sort(dim=1, stable=True)
    size = labelled.sum(1, keepdim=True)
    lower = (size - torch.searchsorted(key, key, right=True)).clamp(min=0)
    last = lower.cumsum(1)  # pairs up to and with the document
    total = lower.sum(1, keepdim=True)
    number = torch.arange(most, device=labels.device)
    # One pair from each of `most` equal shares, at random places: even steps would meet the same documents every time.
    place = torch.rand(most, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).to(labels.device)
    spread = ((number + place) * (total.double() / most)).long().minimum(total - 1)
    number = torch.where(total <= most, number, spread)
    above = torch.searchsorted(last, number, right=True)
    query, column = (number < total).nonzero(as_tuple=True)
    number, above = number[query, column], above[query, column]
    below = size[query, 0] - last[query, above] + number
    return query, order[query, above], order[query, below], 1 / total.clamp(max=most)[query, 0].double()


def pile(
    teacher_logits: Tensor,
    labels: Tensor,
    *,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    normalize: str = "zscore",
    prior: Tensor | None = None,
    **options,
) -> Ensemble:
    """`pile_fast.pile_ensemble` with its weights, as one of `ENSEMBLES`; `options` are its options."""
    out = pile_ensemble(
        teacher_logits, labels, mask=mask, cu_seqlens=cu_seqlens, normalize=normalize, prior=prior,
        return_weights=True, **options,
    )  # fmt: skip
    return Ensemble(out.logits, out.weights)


def shared_prior(
    teacher_logits: Tensor,
    labels: Tensor,
    *,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    iterations: int = 30,
    step_size: float = 3.0,
    normalize: str = "zscore",
    temperature: float = 1.0,
    margin: float = 0.0,
    pair_weight: str | None = None,
) -> Tensor:
    """Teachers' weights that all queries share, as the `prior` of `pile_ensemble` and `pile_loss`: ours, not a paper's.

    PILE's update with one weight vector for the whole data set: in each iteration the step that "query" granularity would
    take in every query, averaged over the queries in which the teacher scored a document. It learns which teachers to trust
    from all labels at once, where PILE alone has those of one query. Fit it on training queries.

    Args:
        teacher_logits: (Q, N, M) or (D, M) float; NaN = not scored.
        labels: (Q, N) or (D,), larger is better; NaN = unlabelled.
        mask, cu_seqlens: see `pile_fast.pile_ensemble`.
        iterations: steps, each a pass over the data.
        step_size, normalize, temperature, margin, pair_weight: see `pile_fast.pile_ensemble`.

    Returns:
        (M,) on the simplex. Queries without a labelled pair count as content with the weights as they are.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.

    >>> import torch
    >>> from pile_fast.ensembles import shared_prior
    >>> labels = torch.tensor([[2, 1, 0], [0, 2, 1]])
    >>> teachers = torch.stack([labels.float(), -labels.float()], -1)  # one is right, one is wrong
    >>> shared_prior(teachers, labels)[0] > 0.9
    tensor(True)
    """
    if isinstance(iterations, bool) or not isinstance(iterations, int) or iterations < 0:
        raise ValueError(f"iterations: expected an int >= 0, got {iterations!r}")
    batch = RankingBatch(teacher_logits=teacher_logits, labels=labels, mask=mask, cu_seqlens=cu_seqlens)
    weights = torch.full((batch.num_teachers,), 1 / max(batch.num_teachers, 1), device=batch.device)
    for _ in range(iterations):
        each = pile_ensemble(
            teacher_logits, labels, mask=mask, cu_seqlens=cu_seqlens, granularity="query", iterations=1,
            step_size=step_size, normalize=normalize, temperature=temperature, margin=margin, pair_weight=pair_weight,
            prior=weights, return_weights=True,
        ).weights  # fmt: skip
        change = torch.where(each > 0, (each / weights).log(), torch.nan).nanmean(0).nan_to_num()
        weights = torch.softmax(weights.log() + change, 0)
    return weights


ENSEMBLES = {
    "mean": mean_ensemble,
    "best": best_teacher_ensemble,
    "rrf": rrf_ensemble,
    "ca_mkd": ca_mkd_ensemble,
    "ebkd": ebkd_ensemble,
    "ae_kd": ae_kd_ensemble,
    "govern": govern_ensemble,
    "pile": pile,
}
NEEDS_LABELS = frozenset({"best", "ca_mkd", "pile"})
NEEDS_STUDENT = frozenset({"ae_kd", "govern"})  # `student_logits`, so the target moves with the student
