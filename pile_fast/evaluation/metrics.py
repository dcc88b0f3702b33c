"""Ranking metrics on tensors: `ndcg`, `mrr`, `average_precision`, `pnr`, `opa`.

Arguments in the order scores, labels; padded with an optional `mask`, or packed with `cu_seqlens`, as in the losses.
Where libraries differ (gain, score ties, queries without a relevant document) the rule is an argument. For all of them:

- Documents whose label is NaN are left out, as if they were not in the list.
- A query without a labelled document has no value: NaN in `reduction="none"`, left out of the mean and of the sum.
- A NaN score of a document that counts is an error; ±inf scores rank first and last.
- A document that the system did not return by `retrieved` gains nothing, but counts in ideals and in numbers of relevant
  documents, as trec_eval does with the documents of its qrels. Its score may be NaN.
- An argument that does not fit raises TypeError or ValueError, whose message names it.
- Everything is computed in float64 and costs O(n log n) per query; pairs are counted, never listed.
"""

from __future__ import annotations

import copy
import functools
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pile_fast.batch import LABEL_LIMIT, RankingBatch, check_cu_seqlens, label_error
from pile_fast.checks import choice

GAINS = ("exponential", "linear")


class PairCounts(NamedTuple):
    """Pairs of each query that the labels order (y_i > y_j), by what the scores say. Each (Q,), int64.

    Counts add up over batches: the micro `pnr` of a whole evaluation is the ratio of the summed counts.
    """

    concordant: Tensor  # s_i > s_j
    discordant: Tensor  # s_i < s_j
    tied: Tensor  # s_i = s_j


class Lists:
    """The labelled documents of all queries in one row: (documents,) tensors with queries contiguous and in order.

    One row for both layouts, so that padding costs nothing and cannot change a result.
    """

    def __init__(
        self, scores: Tensor, labels: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None, retrieved: Tensor | None = None
    ):
        for name, tensor in (("scores", scores), ("labels", labels)):
            if not isinstance(tensor, Tensor):
                raise TypeError(f"{name}: expected a torch.Tensor, got {type(tensor).__name__}")
        scores = scores.detach()
        try:
            batch = RankingBatch(student_logits=scores, labels=labels, mask=mask, cu_seqlens=cu_seqlens)
        except (TypeError, ValueError) as error:  # the losses' name for what is `scores` here
            raise type(error)(str(error).replace("student_logits", "scores")) from None
        if retrieved is not None:
            if not isinstance(retrieved, Tensor):
                raise TypeError(f"retrieved: expected a torch.Tensor, got {type(retrieved).__name__}")
            if retrieved.dtype is not torch.bool or retrieved.shape != labels.shape:
                given = f"{retrieved.dtype} {tuple(retrieved.shape)}"
                raise ValueError(f"retrieved: expected torch.bool {tuple(labels.shape)} like labels, got {given}")
        self.num_queries = batch.num_queries
        if cu_seqlens is not None:
            check_cu_seqlens(cu_seqlens, scores.shape[0])
            lengths = cu_seqlens.diff().long()
            query = torch.arange(self.num_queries, device=scores.device).repeat_interleave(lengths)
            scores, labels = scores[: query.shape[0]], labels[: query.shape[0]]
            retrieved = None if retrieved is None else retrieved[: query.shape[0]]
            used = ~labels.isnan()
            self.query = query[used]
        else:
            used = ~labels.isnan() if mask is None else mask & ~labels.isnan()
            self.query = used.nonzero()[:, 0]
        self.used = used  # which of the slots given are documents here
        self.labels = labels[used].double() + 0.0
        if bool(self.labels.isinf().any()):
            raise ValueError("labels: expected finite numbers (NaN = unlabelled), got inf")
        if not labels.is_floating_point() and bool((self.labels.abs() >= LABEL_LIMIT).any()):
            raise label_error(integer=True, query=None)
        self._set_scores(scores, retrieved)
        self.size = self.per_query(torch.ones_like(self.query))
        self.start = (self.size.cumsum(0) - self.size)[self.query]  # of each document's query
        self.position = torch.arange(self.query.shape[0], device=scores.device) - self.start
        self.rank = self.position.double() + 1

        self.ideals: dict[tuple[str, int | None], Tensor] = {}  # ideal DCG by gain and k

    def _set_scores(self, scores: Tensor, retrieved: Tensor | None) -> None:
        # + 0.0: -0.0 becomes 0.0, which not every sort takes for its equal.
        self.scores = scores[self.used].double() + 0.0
        self.retrieved = None if retrieved is None else retrieved[self.used]
        if self.retrieved is not None:
            self.scores = torch.where(self.retrieved, self.scores, -torch.inf)
        if bool(self.scores.isnan().any()):
            raise ValueError("scores: expected numbers, got NaN for a labelled document")

    def with_scores(self, scores: Tensor, retrieved: Tensor | None = None) -> Lists:
        """The same documents and labels with another system's scores."""
        lists = copy.copy(self)
        lists.__dict__.pop("ranking", None)
        lists._set_scores(scores, retrieved)
        return lists

    def per_query(self, values: Tensor) -> Tensor:
        """(documents,) → (Q,) sums."""
        return values.new_zeros(self.num_queries).index_add_(0, self.query, values)

    def order(self, *keys: Tensor, descending: bool = False) -> Tensor:
        """Indices that sort every query by the last key, its ties by the key before it, and so on; stable."""
        order = None
        for key in keys[:-1]:
            key = key if order is None else key[order]
            step = key.argsort(descending=descending, stable=True)
            order = step if order is None else order[step]
        last, query = (keys[-1], self.query) if order is None else (keys[-1][order], self.query[order])
        short = last.float()
        if bool((short == last).all()):
            # A float32 and the query fit in one whole number: one sort instead of two.
            bits = (-short if descending else short).add(0.0).view(torch.int32).long()
            step = (torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits) + (query << 32)).argsort(stable=True)
        else:
            step = last.argsort(descending=descending, stable=True)
            step = step[query[step].argsort(stable=True)]
        return step if order is None else order[step]

    @functools.cached_property
    def ranking(self) -> Tensor:
        """Indices that put the documents of every query in the order of their scores; what was not returned is last."""
        if self.retrieved is None or not bool((self.retrieved & (self.scores == -torch.inf)).any()):
            return self.order(self.scores, descending=True)
        return self.order(self.scores, self.retrieved.double(), descending=True)

    def ranked(self, values: Tensor) -> Tensor:
        """Values of the documents in the order of their ranks; 0 where the document was not returned."""
        if self.retrieved is not None:
            values = torch.where(self.retrieved, values, torch.zeros((), dtype=values.dtype))
        return values[self.ranking]

    def run(self, *keys: Tensor) -> Tensor:
        """(documents,) number of the run of equal keys, within one query, that each document of sorted keys is in."""
        new = self.position == 0
        for key in keys:
            new[1:] |= key[1:] != key[:-1]
        return new.cumsum(0) - 1

    def pairs_in(self, run: Tensor) -> Tensor:
        """(Q,) pairs of documents that share a run."""
        # A document's pairs with the earlier ones of its run.
        first = torch.searchsorted(run, run)
        return self.per_query(torch.arange(run.shape[0], device=run.device) - first)


def ndcg(
    scores: Tensor, labels: Tensor, *, mask: Tensor | None = None, cu_seqlens: Tensor | None = None,
    retrieved: Tensor | None = None, k: int | None = None, gain: str = "exponential", ties: str = "stable",
    empty: str = "zero", reduction: str = "mean",
) -> Tensor:  # fmt: skip
    r"""Normalised discounted cumulative gain (Järvelin and Kekäläinen, ACM TOIS 2002).

    .. math:: \text{NDCG@}k = \frac{\text{DCG@}k}{\text{ideal DCG@}k}, \qquad
              \text{DCG@}k = \sum_{r=1}^{k} \frac{g(y_{\pi(r)})}{\log_2(1 + r)}

    with π(r) the document at rank r. ``gain="exponential", empty="one"`` is LightGBM's,
    ``gain="linear", ties="average"`` scikit-learn's; ``gain="linear"`` trec_eval's, where documents with equal scores come
    in descending order of their names. Gains are taken relative to the query's largest, so none overflows.

    Args:
        scores: (Q, N) or (D,), float; higher ranks first.
        labels: (Q, N) or (D,), float or integer, of any size; NaN = unlabelled (left out).
        mask: (Q, N) bool, True = the slot holds a document. Padded layout only.
        cu_seqlens: (Q + 1,) int32 or int64, where each query starts. Selects the packed layout.
        retrieved: (Q, N) or (D,), bool, False = the system did not return the document; None = it returned all.
        k: ranks that count; None = all.
        gain: "exponential", g(y) = 2^y − 1, or "linear", g(y) = y as in trec_eval; a label below 0 gains 0 in both.
        ties: documents with equal scores keep their order ("stable") or share their mean gain ("average").
        empty: value of a query without a relevant document (label > 0): "zero", "one", or "skip" (no value).
        reduction: "mean" or "sum" over the queries that have a value, or "none" for (Q,) with NaN where there is none.

    Returns:
        () or (Q,), float64. The mean over no query is NaN.

    >>> import torch
    >>> from pile_fast.evaluation.metrics import ndcg
    >>> round(ndcg(torch.tensor([[3.0, 2.0, 1.0]]), torch.tensor([[0, 1, 2]])).item(), 4)
    0.5869
    """
    _check_ranked(k, empty, reduction)
    choice("gain", gain, GAINS)
    choice("ties", ties, ("stable", "average"))
    lists = Lists(scores, labels, mask, cu_seqlens, retrieved)
    return _ranked(lists, *ndcg_values(lists, k, gain, ties), empty, reduction)


def ndcg_values(lists: Lists, k: int | None, gain: str, ties: str = "stable") -> tuple[Tensor, Tensor]:
    """(Q,) NDCG@k, and whether the query has a document with a gain."""
    gains = _gains(lists, gain)
    discount = 1 / torch.log2(lists.rank + 1)
    if k is not None:
        discount = torch.where(lists.rank <= k, discount, 0.0)
    ranked = lists.ranked(gains)
    if ties == "average":
        keys = (lists.scores,) if lists.retrieved is None else (lists.scores, lists.retrieved)
        run = lists.run(*(key[lists.ranking] for key in keys))
        sums = torch.zeros_like(ranked).index_add_(0, run, ranked)
        ranked = (sums / run.bincount(minlength=run.shape[0]).clamp(min=1))[run]
    dcg = lists.per_query(ranked * discount)
    if (gain, k) not in lists.ideals:
        lists.ideals[gain, k] = lists.per_query(gains[lists.order(lists.labels.clamp(min=0), descending=True)] * discount)
    ideal = lists.ideals[gain, k]
    return dcg / ideal, ideal > 0


def _gains(lists: Lists, gain: str) -> Tensor:
    """(documents,) gains, but for a power of two per query, which NDCG does not see: so no label is too large."""
    labels = lists.labels.clamp(min=0)
    largest = labels.new_zeros(lists.num_queries).scatter_reduce(0, lists.query, labels, "amax")
    if gain == "linear":
        return labels * torch.exp2(-largest.frexp().exponent.clamp(min=-1000).double())[lists.query]
    shift = largest.floor()[lists.query]
    small = torch.expm1(labels * math.log(2)) * torch.exp2(-shift)  # 2^y − 1 would lose the digits of a small y
    return torch.where(labels < 0.5, small, torch.exp2(labels - shift) - torch.exp2(-shift))


def mrr(
    scores: Tensor, labels: Tensor, *, mask: Tensor | None = None, cu_seqlens: Tensor | None = None,
    retrieved: Tensor | None = None, k: int | None = None, relevant_at: float = 1, empty: str = "zero",
    reduction: str = "mean",
) -> Tensor:  # fmt: skip
    r"""Mean reciprocal rank: 1 / rank of the first relevant document, 0 if it is not among the first k.

    Documents with equal scores keep their order.

    Args:
        scores, labels, mask, cu_seqlens, retrieved, k, empty, reduction: see `ndcg`.
        relevant_at: a document is relevant if its label is at least this.

    Returns:
        () or (Q,), float64. The mean over no query is NaN.

    >>> import torch
    >>> from pile_fast.evaluation.metrics import mrr
    >>> mrr(torch.tensor([[3.0, 2.0, 1.0]]), torch.tensor([[0, 1, 1]])).item()
    0.5
    """
    _check_ranked(k, empty, reduction)
    lists = Lists(scores, labels, mask, cu_seqlens, retrieved)
    return _ranked(lists, *reciprocal_rank_values(lists, lists.labels >= relevant_at, k), empty, reduction)


def reciprocal_rank_values(lists: Lists, relevant: Tensor, k: int | None) -> tuple[Tensor, Tensor]:
    """(Q,) reciprocal rank of the first of the relevant documents (documents,), and whether the query has one."""
    found = lists.ranked(relevant)
    if k is not None:
        found = found & (lists.rank <= k)
    reciprocal = torch.where(found, 1 / lists.rank, 0.0)
    best = reciprocal.new_zeros(lists.num_queries).scatter_reduce(0, lists.query, reciprocal, "amax")
    return best, lists.per_query(relevant.long()) > 0


def average_precision(
    scores: Tensor, labels: Tensor, *, mask: Tensor | None = None, cu_seqlens: Tensor | None = None,
    retrieved: Tensor | None = None, k: int | None = None, relevant_at: float = 1, empty: str = "zero",
    reduction: str = "mean",
) -> Tensor:  # fmt: skip
    r"""Average precision; its mean over queries is MAP.

    .. math:: \text{AP@}k = \frac{1}{R} \sum_{r=1}^{k} \text{rel}(r) \, \text{precision@}r

    R counts all relevant documents of the query, also those past k (trec_eval's `map_cut`). Documents with equal scores
    keep their order.

    Args:
        scores, labels, mask, cu_seqlens, retrieved, k, relevant_at, empty, reduction: see `mrr`.

    Returns:
        () or (Q,), float64. The mean over no query is NaN.

    >>> import torch
    >>> from pile_fast.evaluation.metrics import average_precision
    >>> average_precision(torch.tensor([[4.0, 3.0, 2.0, 1.0]]), torch.tensor([[1, 0, 0, 1]])).item()
    0.75
    """
    _check_ranked(k, empty, reduction)
    lists = Lists(scores, labels, mask, cu_seqlens, retrieved)
    return _ranked(lists, *average_precision_values(lists, lists.labels >= relevant_at, k), empty, reduction)


def average_precision_values(lists: Lists, relevant: Tensor, k: int | None) -> tuple[Tensor, Tensor]:
    """(Q,) average precision with the relevant documents (documents,), and whether the query has one."""
    ranked = lists.ranked(relevant).long()
    returned = lists.per_query(ranked)
    found = ranked.cumsum(0) - (returned.cumsum(0) - returned)[lists.query]
    precision = ranked * found / lists.rank
    if k is not None:
        precision = torch.where(lists.rank <= k, precision, 0.0)
    total = lists.per_query(relevant.long())
    return lists.per_query(precision) / total, total > 0


def pair_counts(scores: Tensor, labels: Tensor, *, mask: Tensor | None = None, cu_seqlens: Tensor | None = None) -> PairCounts:
    """Count, per query, the pairs with y_i > y_j that the scores order rightly, wrongly, or not at all. O(n log n).

    Args:
        scores, labels, mask, cu_seqlens: see `ndcg`.

    Returns:
        PairCounts(concordant, discordant, tied), each (Q,), int64.

    >>> import torch
    >>> from pile_fast.evaluation.metrics import pair_counts
    >>> [count.tolist() for count in pair_counts(torch.tensor([[3.0, 1.0, 1.0, 2.0]]), torch.tensor([[2, 1, 0, 0]]))]
    [[3], [1], [1]]
    """
    return count_pairs(Lists(scores, labels, mask, cu_seqlens))


def count_pairs(lists: Lists) -> PairCounts:
    """`pair_counts` of documents and labels that are in place."""
    # By label, and by score among equal labels: then a pair is out of order exactly if it is discordant.
    order = lists.order(lists.scores, lists.labels)
    s, y = lists.scores[order], lists.labels[order]
    same_label, same_both = lists.pairs_in(lists.run(y)), lists.pairs_in(lists.run(y, s))
    by_score = lists.order(s)
    run = lists.run(s[by_score])
    rank = torch.empty_like(run)
    rank[by_score] = run - run[lists.start]
    discordant = _inversions(lists, rank)
    tied = lists.pairs_in(run) - same_both
    ordered = lists.size * (lists.size - 1) // 2 - same_label
    return PairCounts(ordered - discordant - tied, discordant, tied)


def _inversions(lists: Lists, values: Tensor) -> Tensor:
    """(Q,) pairs i before j of one query with values[i] > values[j]; values are ints >= 0.

    A radix sort from the highest bit: two values are told apart at the first bit in which they differ, when they are
    still in their first order and in one group, so the pairs with a 1 before a 0 are counted there. Linear per bit.
    """
    count = torch.zeros_like(lists.size)
    index = torch.arange(values.shape[0], device=values.device)
    start, end = lists.start, lists.start + lists.size[lists.query]  # of the group of equal higher bits
    for bit in reversed(range(int(values.max()).bit_length() if values.numel() else 0)):
        one = values >> bit & 1
        before = F.pad(one.cumsum(0), (1, 0))
        ones = before[:-1] - before[start]
        count += lists.per_query(ones * (1 - one))
        split = end - (before[end] - before[start])
        one = one.bool()
        target = torch.where(one, split + ones, index - ones)
        start, end = torch.where(one, split, start), torch.where(one, end, split)
        values, start, end = (torch.empty_like(x).index_copy_(0, target, x) for x in (values, start, end))
    return count


def pnr(
    scores: Tensor, labels: Tensor, *, mask: Tensor | None = None, cu_seqlens: Tensor | None = None, average: str = "micro",
    ties: str = "exclude", zero_division: float = math.inf, return_counts: bool = False,
) -> Tensor | tuple[Tensor, PairCounts]:  # fmt: skip
    r"""Positive-negative ratio: rightly ordered pairs over wrongly ordered ones.

    .. math:: \text{PNR} = \frac{C}{D}, \qquad
              C = |\{y_i > y_j, s_i > s_j\}|, \quad D = |\{y_i > y_j, s_i < s_j\}|, \quad E = |\{y_i > y_j, s_i = s_j\}|

    Published numbers differ in three rules, all of them arguments here: how queries are averaged, where the E tied
    pairs go, and what a division by zero gives. The default is C / D over all queries; PaddlePaddle's
    `positive_negative_pair` is ``ties="negative"``. Without ties, a query's PNR is OPA / (1 − OPA).

    Args:
        scores, labels, mask, cu_seqlens: see `ndcg`.
        average: "micro", the ratio of the counts summed over queries; "macro", the mean of the queries' ratios; "none",
            the queries' ratios.
        ties: E is left out ("exclude"), added to D ("negative"), or halved between C and D ("half").
        zero_division: the ratio where C > 0 and D = 0; NaN leaves the query out of the macro mean. With neither C nor D
            the ratio is always NaN, and left out.
        return_counts: also return the `PairCounts`.

    Returns:
        () or, for "none", (Q,), float64; with `return_counts`, (ratio, PairCounts).

    >>> import torch
    >>> from pile_fast.evaluation.metrics import pnr
    >>> scores, labels = torch.tensor([[3.0, 1.0, 2.0], [1.0, 2.0, 3.0]]), torch.tensor([[2, 1, 0], [0, 0, 1]])
    >>> pnr(scores, labels).item()  # 2 + 2 pairs right, 1 + 0 wrong
    4.0
    """
    choice("average", average, ("micro", "macro", "none"))
    choice("ties", ties, ("exclude", "negative", "half"))
    if isinstance(zero_division, bool) or not isinstance(zero_division, (int, float)):
        raise TypeError(f"zero_division: expected a number, got {type(zero_division).__name__}")
    counts = pair_counts(scores, labels, mask=mask, cu_seqlens=cu_seqlens)
    right, wrong = counts.concordant, counts.discordant
    if average == "micro":
        right, wrong, tied = right.sum(), wrong.sum(), counts.tied.sum()
    else:
        tied = counts.tied
    if ties == "half":
        right, wrong = right + tied / 2, wrong + tied / 2
    elif ties == "negative":
        wrong = wrong + tied
    ratio = torch.where((wrong == 0) & (right > 0), float(zero_division), right.double() / wrong.double())
    if average == "macro":
        ratio = ratio.nanmean()
    return (ratio, counts) if return_counts else ratio


def opa(
    scores: Tensor, labels: Tensor, *, mask: Tensor | None = None, cu_seqlens: Tensor | None = None, ties: str = "negative",
    reduction: str = "mean",
) -> Tensor:  # fmt: skip
    r"""Ordered pair accuracy: the share of the pairs with y_i > y_j that have s_i > s_j.

    ``ties="negative"`` is TF-Ranking's and rax's; with ``ties="half"`` and binary labels it is the query's ROC AUC.

    Args:
        scores, labels, mask, cu_seqlens: see `ndcg`.
        ties: a pair with equal scores is wrong ("negative"), half right ("half"), or does not count ("exclude").
        reduction: "mean" or "sum" over the queries that have a pair, or "none" for (Q,) with NaN where there is none.

    Returns:
        () or (Q,), float64. The mean over no query is NaN.

    >>> import torch
    >>> from pile_fast.evaluation.metrics import opa
    >>> opa(torch.tensor([[3.0, 1.0, 2.0, 1.0]]), torch.tensor([[2, 1, 0, 0]])).item()  # 3 right, 1 wrong, 1 tied
    0.6
    """
    choice("ties", ties, ("negative", "half", "exclude"))
    choice("reduction", reduction, ("mean", "sum", "none"))
    right, wrong, tied = (count.double() for count in pair_counts(scores, labels, mask=mask, cu_seqlens=cu_seqlens))
    pairs = right + wrong if ties == "exclude" else right + wrong + tied
    return _reduce((right + tied / 2 if ties == "half" else right) / pairs, reduction)


def _check_ranked(k: object, empty: object, reduction: object) -> None:
    if k is not None and (isinstance(k, bool) or not isinstance(k, int)):
        raise TypeError(f"k: expected an int or None, got {type(k).__name__}")
    if k is not None and k < 1:
        raise ValueError(f"k: expected an int >= 1 or None, got {k}")
    choice("empty", empty, ("zero", "one", "skip"))
    choice("reduction", reduction, ("mean", "sum", "none"))


def _ranked(lists: Lists, values: Tensor, has_relevant: Tensor, empty: str, reduction: str) -> Tensor:
    """Apply `empty`, drop queries without a document, reduce."""
    values = torch.where(has_relevant, values, {"zero": 0.0, "one": 1.0, "skip": math.nan}[empty])
    return _reduce(torch.where(lists.size > 0, values, torch.nan), reduction)


def _reduce(values: Tensor, reduction: str) -> Tensor:
    return values if reduction == "none" else values.nansum() if reduction == "sum" else values.nanmean()
