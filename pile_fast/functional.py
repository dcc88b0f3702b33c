"""The user's functions: names, defaults, documentation. Arguments in the order student, teachers, labels.

All of them take padded tensors with an optional `mask`, or packed ones with `cu_seqlens`; see `pile_fast.batch` for the two
layouts and docs/inputs.md for the whole contract.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from pile_fast import autograd
from pile_fast.backends import select
from pile_fast.batch import RankingBatch
from pile_fast.options import ensemble_options, loss_options


class PILEEnsemble(NamedTuple):
    """What `pile_ensemble` returns.

    Attributes:
        logits: (Q, N) or (D,), float32 (float64 for float64 teachers); NaN where no teacher scored the document and in
            slots without a document.
        weights: the teachers' weights, each row on the simplex: (Q, N, M) or (D, M) for granularity "document", (Q, M) for
            "query"; 0 for missing teachers. None unless asked for.
        trace: (Q, iterations + 1), the pairwise label loss before each iteration and after the last; 0 for a query without
            pairs. None unless asked for.
    """

    logits: Tensor
    weights: Tensor | None
    trace: Tensor | None


def pile_ensemble(
    teacher_logits: Tensor,
    labels: Tensor,
    *,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    iterations: int = 10,
    step_size: float | None = None,
    granularity: str = "document",
    normalize: str = "zscore",
    temperature: float = 1.0,
    margin: float = 0.0,
    pair_weight: str | None = None,
    prior: Tensor | None = None,
    return_weights: bool = False,
    return_trace: bool = False,
    pairwise: str = "auto",
    backend: str = "auto",
) -> PILEEnsemble:
    r"""Ensemble the teachers' logits, supervised by labels, pairwise and iteratively.

    With calibrated logits t_im, ensemble s_i = Σ_m w_im t_im and P the pairs of labelled documents with y_i > y_j,
    `iterations` exponentiated-gradient steps lower

    .. math:: \frac{1}{\sum_P \omega_{ij}} \sum_{(i,j) \in P} \omega_{ij}
              \operatorname{softplus}\left(\frac{\text{margin} - (s_i - s_j)}{\text{temperature}}\right)

    over convex combinations of the teachers, starting from equal weights (or `prior`). After PILE, Cai et al., EMNLP 2022
    Industry, arXiv:2211.06059; the update rule is this package's own definition (docs/algorithm.md).

    Args:
        teacher_logits: (Q, N, M) or (D, M); NaN or ±inf = this teacher did not score this document.
        labels: (Q, N) or (D,), any real dtype, finite, larger is better; NaN = unlabelled (in no pair).
        mask: (Q, N) bool, True = the slot holds a document. Padded layout only.
        cu_seqlens: (Q + 1,) int32 or int64, where each query starts. Selects the packed layout.
        iterations: number of updates T; 0 gives the mean ensemble.
        step_size: η of the update; None = 3 for "document", 1 for "query".
        granularity: "document", weights per document, or "query", one weight vector per query.
        normalize: calibration per query and teacher: "zscore", "center" or "none".
        temperature: unit in which differences of ensemble logits are measured, > 0.
        margin: difference a pair should reach.
        pair_weight: ω: None = 1, "label_gap" = y_i − y_j, "gain_gap" = 2^y_i − 2^y_j, for labels of any size.
        prior: (M,) or (Q, M) finite weights >= 0 to start from, need not sum to 1; a teacher with prior 0 counts as missing.
        return_weights: also return the weights.
        return_trace: also return the label loss per iteration.
        pairwise: how pairs are summed: "direct" O(n²), "chebyshev" O(n), or "auto" by a cost model.
        backend: "auto" or a name from `pile_fast.available_backends()`.

    Returns:
        PILEEnsemble(logits, weights, trace).

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
        RuntimeError: the backend asked for is not available; the message says why.

    >>> import torch, pile_fast
    >>> teachers = torch.tensor([[[2.0, 0.0], [1.0, 2.0], [0.0, 1.0]]])  # one query, three documents, two teachers
    >>> labels = torch.tensor([[2, 1, 0]])  # the first teacher is right
    >>> out = pile_fast.pile_ensemble(teachers, labels, return_weights=True)
    >>> out.logits.argsort(descending=True).tolist(), out.weights[0, 0].argmax().item()
    ([[0, 1, 2]], 0)
    """
    options = ensemble_options(iterations, step_size, granularity, normalize, temperature, margin, pair_weight, pairwise)
    if teacher_logits is None or labels is None:
        raise _missing(teacher_logits=teacher_logits, labels=labels)
    batch = RankingBatch(teacher_logits=teacher_logits, labels=labels, mask=mask, cu_seqlens=cu_seqlens, prior=prior)
    logits, weights, trace = autograd.ensemble(batch, options, return_weights, return_trace, select(backend, batch))
    return PILEEnsemble(logits, weights if return_weights else None, trace if return_trace else None)


def pairwise_distillation_loss(
    student_logits: Tensor,
    target_logits: Tensor,
    *,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    kind: str = "logistic",
    temperature: float = 1.0,
    reduction: str = "mean",
    pairwise: str = "auto",
    backend: str = "auto",
) -> Tensor:
    r"""Distil one set of target logits: the student's pairwise preferences should equal the target's.

    Per query, the mean over all pairs of documents that have a target of

    .. math:: \operatorname{BCE}\left(\sigma\left((z_i - z_j) / \tau\right), \sigma\left((s_i - s_j) / \tau\right)\right)
              \quad\text{or}\quad \left((z_i - z_j) - (s_i - s_j)\right)^2

    for kind "logistic" (soft RankNet, Burges et al., ICML 2005) and "mse" (MarginMSE over all pairs, Hofstätter et al.,
    arXiv:2010.02666; closed form, O(n)).

    Args:
        student_logits: (Q, N) or (D,); the only argument that carries a gradient.
        target_logits: (Q, N) or (D,), e.g. `pile_ensemble(...).logits`; NaN or ±inf = no target, the document is left out.
        mask: (Q, N) bool, True = the slot holds a document. Padded layout only.
        cu_seqlens: (Q + 1,) int32 or int64, where each query starts. Selects the packed layout.
        kind: "logistic" or "mse".
        temperature: τ of the logistic kind, > 0.
        reduction: "mean" over the queries that have a pair, "sum", or "none" for (Q,).
        pairwise: "direct", "chebyshev" or "auto", see `pile_ensemble`.
        backend: "auto" or a name from `pile_fast.available_backends()`.

    Returns:
        () or (Q,), float32 (float64 for float64 logits). A query without a pair gives 0 and a zero gradient; one with a
        student logit that is not finite gives NaN, and no other does.

    Raises:
        TypeError, ValueError, RuntimeError: see `pile_ensemble`.

    >>> import torch, pile_fast
    >>> student = torch.tensor([[0.0, 1.0]], requires_grad=True)
    >>> pile_fast.pairwise_distillation_loss(student, torch.tensor([[3.0, 1.0]]), kind="mse").item()
    9.0
    """
    options = loss_options(1.0, _kind(kind), temperature, None, reduction, pairwise)
    if student_logits is None or target_logits is None:
        raise _missing(student_logits=student_logits, target_logits=target_logits)
    batch = RankingBatch(student_logits=student_logits, target_logits=target_logits, mask=mask, cu_seqlens=cu_seqlens)
    return autograd.pair_loss(batch, options, select(backend, batch))


def pairwise_logistic_loss(
    student_logits: Tensor,
    labels: Tensor,
    *,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    pair_weight: str | None = None,
    reduction: str = "mean",
    pairwise: str = "auto",
    backend: str = "auto",
) -> Tensor:
    r"""RankNet on graded labels (Burges et al., ICML 2005), normalised per query.

    Per query, over the pairs P of labelled documents with y_i > y_j,

    .. math:: \frac{1}{\sum_P \omega_{ij}} \sum_P \omega_{ij} \operatorname{softplus}(-(z_i - z_j)).

    Args:
        student_logits: (Q, N) or (D,); the only argument that carries a gradient.
        labels: (Q, N) or (D,), any real dtype, finite, larger is better; NaN = unlabelled.
        mask: (Q, N) bool, True = the slot holds a document. Padded layout only.
        cu_seqlens: (Q + 1,) int32 or int64, where each query starts. Selects the packed layout.
        pair_weight: ω: None = 1, "label_gap" = y_i − y_j, "gain_gap" = 2^y_i − 2^y_j, for labels of any size.
        reduction: "mean" over the queries that have a pair, "sum", or "none" for (Q,).
        pairwise: "direct", "chebyshev" or "auto", see `pile_ensemble`.
        backend: "auto" or a name from `pile_fast.available_backends()`.

    Returns:
        () or (Q,), see `pairwise_distillation_loss`.

    Raises:
        TypeError, ValueError, RuntimeError: see `pile_ensemble`.

    >>> import torch, pile_fast
    >>> student = torch.tensor([[0.5, 0.5, 0.5]], requires_grad=True)
    >>> loss = pile_fast.pairwise_logistic_loss(student, torch.tensor([[2, 0, 0]]))
    >>> round(loss.item(), 4)  # log 2
    0.6931
    """
    options = loss_options(0.0, "logistic", 1.0, pair_weight, reduction, pairwise)
    if student_logits is None or labels is None:
        raise _missing(student_logits=student_logits, labels=labels)
    batch = RankingBatch(student_logits=student_logits, labels=labels, mask=mask, cu_seqlens=cu_seqlens)
    return autograd.pair_loss(batch, options, select(backend, batch))


def pile_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    *,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    alpha: float = 1.0,
    distillation: str = "logistic",
    distillation_temperature: float = 1.0,
    reduction: str = "mean",
    iterations: int = 10,
    step_size: float | None = None,
    granularity: str = "document",
    normalize: str = "zscore",
    temperature: float = 1.0,
    margin: float = 0.0,
    pair_weight: str | None = None,
    prior: Tensor | None = None,
    pairwise: str = "auto",
    backend: str = "auto",
) -> Tensor:
    r"""Ensemble the teachers with `pile_ensemble` and distil the ensemble, in one fused call.

    Per query ``alpha · D + (1 − alpha) · R``: D is `pairwise_distillation_loss` against the ensemble's logits, R is
    `pairwise_logistic_loss` on the labels.

    Args:
        student_logits: (Q, N) or (D,); the only argument that carries a gradient.
        teacher_logits: (Q, N, M) or (D, M); NaN or ±inf = this teacher did not score this document.
        labels: (Q, N) or (D,), any real dtype, finite, larger is better; NaN = unlabelled (distilled, but in no label pair).
        mask: (Q, N) bool, True = the slot holds a document. Padded layout only.
        cu_seqlens: (Q + 1,) int32 or int64, where each query starts. Selects the packed layout.
        alpha: weight of the distillation against the labels, in [0, 1].
        distillation: "logistic" or "mse".
        distillation_temperature: τ of the logistic distillation, > 0 (`temperature` is the ensemble's).
        reduction: "mean" over the queries that have a pair in a term in use, "sum", or "none" for (Q,).
        iterations, step_size, granularity, normalize, temperature, margin, prior: the ensemble, see `pile_ensemble`.
        pair_weight: ω of the ensemble's pairs and of R.
        pairwise: "direct", "chebyshev" or "auto", see `pile_ensemble`.
        backend: "auto" or a name from `pile_fast.available_backends()`.

    Returns:
        () or (Q,), see `pairwise_distillation_loss`.

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
    options = ensemble_options(iterations, step_size, granularity, normalize, temperature, margin, pair_weight, pairwise)
    loss = loss_options(alpha, distillation, distillation_temperature, pair_weight, reduction, pairwise)
    if student_logits is None or teacher_logits is None or labels is None:
        raise _missing(student_logits=student_logits, teacher_logits=teacher_logits, labels=labels)
    batch = RankingBatch(
        student_logits=student_logits, teacher_logits=teacher_logits, labels=labels, mask=mask, cu_seqlens=cu_seqlens,
        prior=prior,
    )  # fmt: skip
    return autograd.pile_loss(batch, options, loss, select(backend, batch))


def _missing(**tensors) -> TypeError:
    name = next(name for name, tensor in tensors.items() if tensor is None)
    return TypeError(f"{name}: expected a torch.Tensor, got None")


def _kind(kind):
    if kind not in ("logistic", "mse"):
        raise ValueError(f"kind: expected one of 'logistic', 'mse', got {kind!r}")
    return kind
