"""The user's functions: names, defaults, documentation. Arguments in the order student, teachers, labels.

All of them take padded tensors with an optional `mask`, or packed ones with `cu_seqlens`; see `pile_fast.batch` for the two
layouts and docs/inputs.md for the whole contract.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from torch import Tensor
from typing_extensions import Unpack

from pile_fast import autograd, terms
from pile_fast.backends import load, select
from pile_fast.batch import LABEL_LIMIT, RankingBatch
from pile_fast.options import (
    EnsembleKeywords,
    EnsembleOptions,
    LossOptions,
    PILEKeywords,
    cached,
    documented,
    ensemble_options,
    loss_options,
    pile_options,
)
from pile_fast.terms import Term


class PILEEnsemble(NamedTuple):
    """What `pile_ensemble` returns.

    Attributes:
        logits: (Q, N) or (D,), float32 (float64 for float64 teachers); NaN where no teacher scored the document and in
            slots without a document.
        weights: the teachers' weights, each row on the simplex: (M,) for granularity "shared", before they are rescaled to
            the teachers of a document; (Q, M) for "query", (Q, N, M) or (D, M) for "document", there 0 for missing teachers.
            None unless asked for.
        trace: (iterations + 1,) for granularity "shared", else (Q, iterations + 1): the pairwise label loss before each
            iteration and after the last, 0 for a query without pairs; "shared" has the mean over the queries with one. None
            unless asked for.
    """

    logits: Tensor
    weights: Tensor | None
    trace: Tensor | None


@documented(EnsembleOptions)
def pile_ensemble(
    teacher_logits: Tensor,
    labels: Tensor,
    *,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    prior: Tensor | None = None,
    return_weights: bool = False,
    return_trace: bool = False,
    backend: str = "auto",
    **options: Unpack[EnsembleKeywords],
) -> PILEEnsemble:
    r"""Ensemble the teachers' logits, supervised by labels, pairwise and iteratively.

    With calibrated logits t_im, ensemble s_i = Σ_m w_im t_im and P the pairs of labelled documents with y_i > y_j,
    `iterations` exponentiated-gradient steps lower

    .. math:: \frac{1}{\sum_P \omega_{ij}} \sum_{(i,j) \in P} \omega_{ij}
              \operatorname{softplus}\left(\frac{\text{margin} - (s_i - s_j)}{\text{temperature}}\right)

    over convex combinations of the teachers, starting from equal weights (or `prior`). By default all queries share one weight
    per teacher, which the labels of all of them decide, with a pull to the mean (`shrinkage`): fit it on many queries at once,
    or with `pile_fast.PILELoss.fit`, not on single small batches. Given weights are used as they are by ``prior=weights,
    iterations=0``. After PILE, Cai et al., EMNLP 2022 Industry, arXiv:2211.06059; the update rule is this package's own
    definition (docs/algorithm.md).

    Args:
        teacher_logits: (Q, N, M) or (D, M); NaN or ±inf = this teacher did not score this document.
        labels: (Q, N) or (D,), any real dtype, finite, larger is better; NaN = unlabelled (in no pair).
        mask: (Q, N) bool, True = the slot holds a document. Padded layout only.
        cu_seqlens: (Q + 1,) int32 or int64, where each query starts. Selects the packed layout.
        prior: (M,) finite weights >= 0 to start from, need not sum to 1; a teacher with prior 0 counts as missing. With
            granularity "query" or "document" also (Q, M).
        return_weights: also return the weights.
        return_trace: also return the label loss per iteration.
        backend: "auto" or a name from `pile_fast.available_backends()`.
        {options}

    Returns:
        PILEEnsemble(logits, weights, trace).

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
        RuntimeError: the backend asked for is not available; the message says why.

    >>> import torch, pile_fast
    >>> teachers = torch.tensor([[[2.0, 0.0], [1.0, 2.0], [0.0, 1.0]]])  # one query, three documents, two teachers
    >>> labels = torch.tensor([[2, 1, 0]])  # the first teacher is right
    >>> out = pile_fast.pile_ensemble(teachers, labels, return_weights=True)
    >>> out.logits.argsort(descending=True).tolist(), out.weights.argmax().item()
    ([[0, 1, 2]], 0)
    """
    chosen = ensemble_options(**options)
    if teacher_logits is None or labels is None:
        raise _missing(teacher_logits=teacher_logits, labels=labels)
    batch = RankingBatch(teacher_logits=teacher_logits, labels=labels, mask=mask, cu_seqlens=cu_seqlens, prior=prior)
    check_fits(batch, chosen)
    by = select(backend, batch, chosen, None)
    logits, weights, trace = autograd.ensemble(batch, chosen, return_weights, return_trace, by)
    return PILEEnsemble(logits, weights if return_weights else None, trace if return_trace else None)


def distillation_loss(
    student_logits: Tensor,
    target_logits: Tensor,
    *,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    weights: Tensor | None = None,
    query_weights: Tensor | None = None,
    kind: str | Term = "logistic",
    reduction: str = "mean",
    pairwise: str = "auto",
    backend: str = "auto",
) -> Tensor:
    """Distil one set of target logits into the student.

    Args:
        student_logits: (Q, N) or (D,); the only argument that carries a gradient.
        target_logits: (Q, N) or (D,), e.g. `pile_ensemble(...).logits`; NaN or ±inf = no target, the document is left out.
        mask: (Q, N) bool, True = the slot holds a document. Padded layout only.
        cu_seqlens: (Q + 1,) int32 or int64, where each query starts. Selects the packed layout.
        weights: (Q, N) or (D,), finite and >= 0: what each document counts in the loss, as its confidence or inverse
            propensity; 0 = not there. A pair counts by the product of its two, a list's document as if it were there so
            many times. Means do not divide them out, except of "kl".
        query_weights: (Q,), finite and >= 0: what each query's loss is multiplied by; 0 = not there.
        kind: the loss, by name or as an object of `pile_fast.terms`: "logistic" (soft RankNet), "mse" (MarginMSE over all
            pairs) or "kl" (ListNet); their formulas are in the docstrings of `pile_fast.terms`.
        reduction: "mean" over the queries that count (that have a pair, or a gain), "sum", or "none" for (Q,).
        pairwise: "direct", "chebyshev" or "auto", see `pile_ensemble`.
        backend: "auto" or a name from `pile_fast.available_backends()`.

    Returns:
        () or (Q,), float32 (float64 for float64 logits). A query without a pair gives 0 and a zero gradient; one with a
        student logit that is not finite gives NaN, and no other does.

    Raises:
        TypeError, ValueError, RuntimeError: see `pile_ensemble`.

    >>> import torch, pile_fast
    >>> student = torch.tensor([[0.0, 1.0]], requires_grad=True)
    >>> pile_fast.distillation_loss(student, torch.tensor([[3.0, 1.0]]), kind="mse").item()
    9.0
    """
    options = _distillation_options(kind, reduction, pairwise)
    if student_logits is None or target_logits is None:
        raise _missing(student_logits=student_logits, target_logits=target_logits)
    batch = RankingBatch(
        student_logits=student_logits, target_logits=target_logits, mask=mask, cu_seqlens=cu_seqlens, weights=weights,
        query_weights=query_weights,
    )  # fmt: skip
    return autograd.pair_loss(batch, options, select(backend, batch, None, options))


def ranking_loss(
    student_logits: Tensor,
    labels: Tensor,
    *,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    weights: Tensor | None = None,
    query_weights: Tensor | None = None,
    kind: str | Term = "logistic",
    pair_weight: str | None = None,
    reduction: str = "mean",
    pairwise: str = "auto",
    backend: str = "auto",
) -> Tensor:
    """Fit the student to labels.

    Args:
        student_logits: (Q, N) or (D,); the only argument that carries a gradient.
        labels: (Q, N) or (D,), any real dtype, finite, larger is better; NaN = unlabelled.
        mask: (Q, N) bool, True = the slot holds a document. Padded layout only.
        cu_seqlens: (Q + 1,) int32 or int64, where each query starts. Selects the packed layout.
        weights: (Q, N) or (D,), finite and >= 0: what each document counts in the loss, as its confidence or inverse
            propensity; 0 = not there. A pair counts by its preferred document's, in "softmax" and "approx_ndcg" a gain
            by its own. Means do not divide them out.
        query_weights: (Q,), finite and >= 0: what each query's loss is multiplied by; 0 = not there.
        kind: the loss, by name or as an object of `pile_fast.terms`: "logistic" (RankNet), "softmax" (ListNet, InfoNCE),
            "lambdarank" (also as "lambdarank@10") or "approx_ndcg". The formulas are there.
        pair_weight: ω of the label pairs of "logistic": None = 1, "label_gap" = y_i − y_j, "gain_gap" = 2^y_i − 2^y_j, for
            labels of any size.
        reduction: "mean" over the queries that count (that have a pair, or a gain), "sum", or "none" for (Q,).
        pairwise: "direct", "chebyshev" or "auto", see `pile_ensemble`.
        backend: "auto" or a name from `pile_fast.available_backends()`.

    Returns:
        () or (Q,), see `distillation_loss`.

    Raises:
        TypeError, ValueError, RuntimeError: see `pile_ensemble`.

    >>> import torch, pile_fast
    >>> student = torch.tensor([[0.5, 0.5, 0.5]], requires_grad=True)
    >>> loss = pile_fast.ranking_loss(student, torch.tensor([[2, 0, 0]]))
    >>> round(loss.item(), 4)  # log 2
    0.6931
    """
    options = _ranking_options(kind, pair_weight, reduction, pairwise)
    if student_logits is None or labels is None:
        raise _missing(student_logits=student_logits, labels=labels)
    batch = RankingBatch(
        student_logits=student_logits, labels=labels, mask=mask, cu_seqlens=cu_seqlens, weights=weights,
        query_weights=query_weights,
    )  # fmt: skip
    check_gains(batch, options)
    return autograd.pair_loss(batch, options, select(backend, batch, None, options))


@documented(LossOptions, EnsembleOptions)
def pile_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    *,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    prior: Tensor | None = None,
    weights: Tensor | None = None,
    query_weights: Tensor | None = None,
    backend: str = "auto",
    **options: Unpack[PILEKeywords],
) -> Tensor:
    r"""Ensemble the teachers with `pile_ensemble` and distil the ensemble, in one fused call.

    Per query ``alpha · D + (1 − alpha) · R``: D is `distillation_loss` against the ensemble's logits, R is `ranking_loss`
    on the labels.

    Args:
        student_logits: (Q, N) or (D,); the only argument that carries a gradient.
        teacher_logits: (Q, N, M) or (D, M); NaN or ±inf = this teacher did not score this document.
        labels: (Q, N) or (D,), any real dtype, finite, larger is better; NaN = unlabelled (distilled, but in no label pair).
        mask: (Q, N) bool, True = the slot holds a document. Padded layout only.
        cu_seqlens: (Q + 1,) int32 or int64, where each query starts. Selects the packed layout.
        prior: weights of the ensemble to start from, see `pile_ensemble`.
        weights: (Q, N) or (D,), finite and >= 0: what each document counts in the loss, as its confidence or inverse
            propensity; 0 = not there. See `distillation_loss` and `ranking_loss`; the ensemble takes no notice of
            them.
        query_weights: (Q,), finite and >= 0: what each query's loss is multiplied by; 0 = not there.
        backend: "auto" or a name from `pile_fast.available_backends()`.
        {options}

    Returns:
        () or (Q,), see `distillation_loss`.

    Raises:
        TypeError, ValueError, RuntimeError: see `pile_ensemble`.

    >>> import torch, pile_fast
    >>> _ = torch.manual_seed(0)
    >>> student = torch.zeros(8, 40, requires_grad=True)
    >>> teachers, labels = torch.randn(8, 40, 4), torch.randint(0, 5, (8, 40))
    >>> loss = pile_fast.pile_loss(student, teachers, labels, alpha=0.5)
    >>> loss.backward()
    >>> student.grad.shape
    torch.Size([8, 40])
    """
    batch, of_ensemble, of_loss, by = _of_pile(
        student_logits, teacher_logits, labels, mask, cu_seqlens, prior, weights, query_weights, backend, options
    )
    return autograd.pile_loss(batch, of_ensemble, of_loss, by)[0]


def pile_loss_and_pulls(
    student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None,
    prior: Tensor, backend: str, options: PILEKeywords, weights: Tensor | None = None, query_weights: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`pile_loss` with the weights in `prior`, and each query's pull on them (`Backend.pulls`), in one pass."""
    batch, of_ensemble, of_loss, by = _of_pile(
        student_logits, teacher_logits, labels, mask, cu_seqlens, prior, weights, query_weights, backend, options
    )
    loss, pulls = autograd.pile_loss(batch, of_ensemble, of_loss, by, with_pulls=True)
    assert pulls is not None
    return loss, pulls


def _of_pile(
    student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None,
    prior: Tensor | None, weights: Tensor | None, query_weights: Tensor | None, backend: str, options: PILEKeywords,
) -> tuple[RankingBatch, EnsembleOptions, LossOptions, str]:  # fmt: skip
    """The checked call: batch, options, and the backend that serves it."""
    of_ensemble, of_loss = pile_options(**options)
    if student_logits is None or teacher_logits is None or labels is None:
        raise _missing(student_logits=student_logits, teacher_logits=teacher_logits, labels=labels)
    batch = RankingBatch(
        student_logits=student_logits, teacher_logits=teacher_logits, labels=labels, mask=mask, cu_seqlens=cu_seqlens,
        prior=prior, weights=weights, query_weights=query_weights,
    )  # fmt: skip
    check_fits(batch, of_ensemble)
    check_gains(batch, of_loss)
    return batch, of_ensemble, of_loss, select(backend, batch, of_ensemble, of_loss)


def check_fits(batch: RankingBatch, options: EnsembleOptions) -> None:
    """What options say of tensors."""
    if batch.prior is not None and batch.prior.dim() == 2 and options.granularity == "shared":
        raise ValueError(
            f"prior: expected (M,) = ({batch.num_teachers},) for weights that all queries share, got "
            f"{tuple(batch.prior.shape)}; granularity='query' or 'document' takes one for each query"
        )
    if options.normalize == "logit" and batch.concrete and batch.device.type == "cpu":
        given = batch.teacher_logits
        if ((given < 0) | ((given > 1) & (given < math.inf))).any():
            raise ValueError("teacher_logits: expected probabilities in [0, 1] for normalize='logit', got others")


def check_gains(batch: RankingBatch, options: LossOptions) -> None:
    """Labels that a loss takes as gains are not negative.

    On a device, where reading them would stall the stream, a negative one makes its query's loss NaN.
    """
    if options.alpha < 1 and options.label_loss.has_gains and batch.concrete and batch.device.type == "cpu":
        wrong = batch.labels < 0
        if not wrong.any():
            return
        wrong &= batch.labels > -LABEL_LIMIT  # beyond it they are refused as what they are
        if batch.mask is not None:
            wrong &= batch.mask
        elif batch.cu_seqlens is not None:
            wrong = wrong[: int(batch.cu_seqlens[-1])]
        if batch.weights is not None:
            wrong &= (batch.weights != 0) if batch.cu_seqlens is None else (batch.weights != 0)[: len(wrong)]
        if wrong.any():
            place = tuple(wrong.nonzero()[0].tolist())
            raise ValueError(
                f"labels: expected labels >= 0 for {options.label_loss.name!r}, which takes them as gains, got "
                f"{batch.labels[place].item():g} at {list(place)}; NaN marks an unlabelled document"
            )


class Derivatives(NamedTuple):
    """What `derivatives` returns.

    Attributes:
        loss: (Q,), of each query.
        gradient: (Q, N) or (D,), of the sum of the losses by each document's logit.
        hessian: the same shape, second derivatives by that logit alone, never negative; of "approx_ndcg", which is not
            convex, a number of about their size.
    """

    loss: Tensor
    gradient: Tensor
    hessian: Tensor


def derivatives(batch: RankingBatch, options: LossOptions, backend: str = "auto") -> Derivatives:
    """First and second derivatives of the student's loss, against `batch.target_logits` and `batch.labels`, for boosted trees.

    Raises:
        TypeError, ValueError, RuntimeError: see `pile_ensemble`.
    """
    check_gains(batch, options)
    by = select(backend, batch, None, options)
    own = getattr(load(by), "derivatives", None)
    if own is None and backend == "auto":
        own = getattr(load(select("torch", batch, None, options)), "derivatives", None)
    if own is None:
        raise RuntimeError(f"backend {by!r} computes no second derivatives; use backend='auto' or 'torch'")
    return Derivatives(*own(batch, options))


@cached
def _distillation_options(kind: str | Term, reduction: str, pairwise: str) -> LossOptions:
    term = terms.find("distill", "kind", kind)
    return loss_options(alpha=1.0, distillation=term, reduction=reduction, pairwise=pairwise)


@cached
def _ranking_options(kind: str | Term, pair_weight: str | None, reduction: str, pairwise: str) -> LossOptions:
    term = terms.find("label", "kind", kind)
    return loss_options(alpha=0.0, label_loss=term, pair_weight=pair_weight, reduction=reduction, pairwise=pairwise)


def _missing(**tensors: Any) -> TypeError:
    name = next(name for name, tensor in tensors.items() if tensor is None)
    return TypeError(f"{name}: expected a torch.Tensor, got None")
