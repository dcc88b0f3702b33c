"""Compare rankers on the same labelled queries: means with confidence intervals, and paired tests against a baseline."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from pile_fast.metrics import average_precision, mrr, ndcg, opa, pair_counts

_RANKED = {"ndcg": ndcg, "mrr": mrr, "map": average_precision}
_PAIRWISE = ("pnr", "opa")
DEFAULT_METRICS = ("ndcg@10", "mrr", "map", "pnr")
BOOTSTRAP_SAMPLES = 2_000
PERMUTATIONS = 10_000
# Resampling goes in chunks of about this many numbers.
_CHUNK = 2**22


@dataclasses.dataclass(frozen=True)
class Result:
    """One system by one metric.

    Attributes:
        value: over all queries that count: the mean, or for PNR the ratio of the summed pair counts.
        low, high: 95 % confidence interval of `value`, by the bootstrap over queries.
        queries: how many queries have a value.
        per_query: (Q,) float64, NaN = the query has no value.
        difference, difference_low, difference_high: `value` minus the baseline's, with its 95 % interval.
        p: of the two-sided paired randomisation test against the baseline.
        p_holm: `p` after Holm's correction for the systems compared with the baseline by this metric.

    The last five are None without a baseline, and for the baseline itself.
    """

    value: float
    low: float
    high: float
    queries: int
    per_query: np.ndarray
    difference: float | None = None
    difference_low: float | None = None
    difference_high: float | None = None
    p: float | None = None
    p_holm: float | None = None


@dataclasses.dataclass(frozen=True)
class Coverage:
    """How much of the labelled documents a system scored; the others rank last.

    Attributes:
        documents: labelled documents with a score.
        queries: queries with a scored labelled document.
        right_pairs, wrong_pairs, tied_pairs: of the pairs that the labels order. Any variant of PNR follows from them.
    """

    documents: int
    queries: int
    right_pairs: int
    wrong_pairs: int
    tied_pairs: int

    @property
    def tied_share(self) -> float:
        """NaN without a pair."""
        pairs = self.right_pairs + self.wrong_pairs + self.tied_pairs
        return self.tied_pairs / pairs if pairs else math.nan


@dataclasses.dataclass(frozen=True)
class QueryCounts:
    """What the labels say of the queries.

    Attributes:
        total: queries.
        labelled: queries with a labelled document.
        relevant: queries with a document whose label is at least `relevant_at`.
        paired: queries with two documents of different labels.
        documents: labelled documents.
    """

    total: int
    labelled: int
    relevant: int
    paired: int
    documents: int


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What `evaluate` returns: results[system][metric], coverage[system], and the counts of the queries."""

    results: dict[str, dict[str, Result]]
    coverage: dict[str, Coverage]
    queries: QueryCounts


class Metric:
    """A metric by its name: "ndcg@10", "mrr", "map", "pnr", "opa"; @k goes with the first three.

    Per query it is a fraction whose numerator and denominator add up over queries: their ratio is the value of any set of
    queries. A ranked metric's denominator is 1. PNR's fraction is x, the share of pairs in the right order, a tied one
    half right (as in training: what a system did not score ties), and PNR is x / (1 − x).

    >>> Metric("ndcg@10").k
    10
    """

    def __init__(self, name: str):
        base, at, k = name.partition("@")
        good = base in _RANKED and (not at or k.isdecimal() and int(k) > 0) or name in _PAIRWISE
        if not good:
            raise ValueError(f"metrics: expected ndcg, mrr or map, with @k or without, pnr or opa; got {name!r}")
        self.name, self.base, self.k = name, base, int(k) if at else None

    def fractions(self, scores: Tensor, labels: Tensor, cu_seqlens: Tensor, relevant_at: float, empty: str) -> np.ndarray:
        """(Q, 2) numerator and denominator, 0 / 0 for a query that does not count."""
        if self.base == "pnr":
            right, wrong, tied = (count.double() for count in pair_counts(scores, labels, cu_seqlens=cu_seqlens))
            return torch.stack([right + tied / 2, right + wrong + tied], 1).numpy()
        if self.base == "opa":
            values = opa(scores, labels, cu_seqlens=cu_seqlens, reduction="none")
        else:
            options = {} if self.base == "ndcg" else {"relevant_at": relevant_at}
            values = _RANKED[self.base](
                scores, labels, cu_seqlens=cu_seqlens, k=self.k, empty=empty, reduction="none", **options
            )
        return torch.stack([values.nan_to_num(0.0), (~values.isnan()).double()], 1).numpy()

    def value(self, fraction: np.ndarray) -> np.ndarray:
        """The metric of a set of queries from the ratio of its sums."""
        if self.base != "pnr":
            return fraction
        with np.errstate(divide="ignore"):
            return fraction / (1 - fraction)


def tie_order(query_id: str, doc_ids: Sequence[str]) -> list[int]:
    """An order of a query's documents that depends on their names alone: in it, equal scores keep no one's favour.

    A ranking metric lets documents with equal scores, so also those without one, stand as they come. In a file they often
    come best first; in this order, the same for every system, they do not.
    """
    keys = [hashlib.blake2b(f"{query_id}\0{doc_id}".encode(), digest_size=8).digest() for doc_id in doc_ids]
    return sorted(range(len(keys)), key=keys.__getitem__)


def evaluate(
    systems: Mapping[str, Tensor],
    labels: Tensor,
    cu_seqlens: Tensor,
    *,
    metrics: Sequence[str] = DEFAULT_METRICS,
    baseline: str | None = None,
    relevant_at: float = 1.0,
    empty: str = "skip",
    seed: int = 0,
) -> Evaluation:
    """Metrics of several systems on the same queries.

    Confidence intervals are the percentile bootstrap over queries, differences resampled in pairs. The test exchanges
    system and baseline per query at random (Fisher's randomisation test, two-sided); for PNR it compares
    the shares of pairs in the right order. Holm's correction is per metric, over the systems compared.

    Args:
        systems: name → (D,) scores, higher ranks first; NaN = not scored, ranks last.
        labels: (D,), >= 0 for NDCG; NaN = unlabelled, left out.
        cu_seqlens: (Q + 1,) where each query starts.
        metrics: see `Metric`.
        baseline: a system to test the others against.
        relevant_at: for MRR and MAP a document is relevant if its label is at least this.
        empty: a query without a relevant document is left out of NDCG, MRR and MAP ("skip"), or counts as "zero" or "one".
        seed: of the resampling.

    Raises:
        ValueError: a metric or the baseline is unknown, or labels do not fit a metric.

    >>> scores, labels = torch.tensor([3.0, 2.0, 1.0, 1.0, 2.0]), torch.tensor([1.0, 0.0, 0.0, 1.0, 0.0])
    >>> result = evaluate({"a": scores}, labels, torch.tensor([0, 3, 5]), metrics=["mrr"]).results["a"]["mrr"]
    >>> result.value, result.queries, result.per_query.tolist()
    (0.75, 2, [1.0, 0.5])
    """
    if baseline is not None and baseline not in systems:
        raise ValueError(f"baseline: expected one of {', '.join(systems)}, got {baseline!r}")
    parsed = [Metric(name) for name in dict.fromkeys(metrics)]
    names = list(systems)
    labelled = ~labels.isnan()
    per_query = _per_query(cu_seqlens)
    ranked = {name: scores.nan_to_num(nan=-math.inf, posinf=math.inf, neginf=-math.inf) for name, scores in systems.items()}
    results: dict[str, dict[str, Result]] = {name: {} for name in names}
    for metric in parsed:
        fractions = np.stack([metric.fractions(ranked[name], labels, cu_seqlens, relevant_at, empty) for name in names])
        for name, result in zip(names, _results(metric, fractions, names, baseline, seed), strict=True):
            results[name][metric.name] = result
    coverage = {}
    for name, scores in systems.items():
        scored = ~scores.isnan() & labelled
        counts = [count.sum().item() for count in pair_counts(ranked[name], labels, cu_seqlens=cu_seqlens)]
        coverage[name] = Coverage(int(scored.sum()), int((per_query(scored) > 0).sum()), *counts)
    pairs = sum(pair_counts(torch.zeros_like(labels), labels, cu_seqlens=cu_seqlens))
    queries = QueryCounts(
        cu_seqlens.shape[0] - 1,
        int((per_query(labelled) > 0).sum()),
        int((per_query(labels >= relevant_at) > 0).sum()),
        int((pairs > 0).sum()),
        int(labelled.sum()),
    )
    return Evaluation(results, coverage, queries)


def _per_query(cu_seqlens: Tensor):
    query = torch.arange(cu_seqlens.shape[0] - 1).repeat_interleave(cu_seqlens.diff())
    return lambda flags: torch.zeros(cu_seqlens.shape[0] - 1, dtype=torch.long).index_add_(0, query, flags.long())


def _results(metric: Metric, fractions: np.ndarray, names: list[str], baseline: str | None, seed: int) -> list[Result]:
    """One `Result` per system from (S, Q, 2) fractions. A system is a row, so that all are resampled at once."""
    with np.errstate(invalid="ignore"):
        per_query = metric.value(fractions[..., 0] / fractions[..., 1])
    counted = (fractions[..., 1] > 0).any(0)
    fractions = fractions[:, counted]
    count = fractions.shape[1]
    values = metric.value(_ratio(fractions.sum(1)))
    samples = metric.value(_ratio(_bootstrap(fractions, seed)))  # (B, S)
    low, high = _interval(samples)
    results = [
        Result(float(values[s]), float(low[s]), float(high[s]), count, per_query[s]) for s in range(len(names))
    ]  # fmt: skip
    if baseline is None:
        return results
    base = names.index(baseline)
    with np.errstate(invalid="ignore"):  # a PNR without a wrong pair is infinite
        differences, sampled = values - values[base], samples - samples[:, base : base + 1]
    low, high = _interval(sampled)
    p = _randomisation_test(fractions, base, seed)
    others = [s for s in range(len(names)) if s != base]
    for s, p_holm in zip(others, holm(p[others]), strict=True):
        results[s] = dataclasses.replace(
            results[s],
            difference=float(differences[s]),
            difference_low=float(low[s]),
            difference_high=float(high[s]),
            p=float(p[s]),
            p_holm=float(p_holm),
        )
    return results


def _ratio(sums: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore"):
        return sums[..., 0] / sums[..., 1]


def _interval(samples: np.ndarray) -> np.ndarray:
    """(2, S) 95 % percentile interval; NaN where a sample has no value."""
    # Not interpolated: between two infinite samples there is no number.
    return np.quantile(samples, [0.025, 0.975], axis=0, method="nearest")


def _bootstrap(fractions: np.ndarray, seed: int) -> np.ndarray:
    """(B, S, 2) sums over as many queries as there are, drawn with replacement, the same for all systems."""
    systems, count, _ = fractions.shape
    if count == 0:
        return np.zeros((1, systems, 2))
    rng = np.random.default_rng(seed)
    columns = fractions.transpose(1, 0, 2).reshape(count, -1)
    sums = []
    for size in _chunks(BOOTSTRAP_SAMPLES, count):
        drawn = rng.integers(count, size=(size, count)) + np.arange(size)[:, None] * count
        times = np.bincount(drawn.ravel(), minlength=size * count).reshape(size, count)
        sums.append(times @ columns)
    return np.concatenate(sums).reshape(-1, systems, 2)


def _randomisation_test(fractions: np.ndarray, base: int, seed: int) -> np.ndarray:
    """(S,) two-sided p: how often exchanging system and baseline at random gives as large a difference."""
    systems, count, _ = fractions.shape
    if count == 0:
        return np.full(systems, np.nan)
    rng = np.random.default_rng(seed)
    total = fractions.sum(1)
    gap = fractions[base] - fractions  # (S, Q, 2): what an exchange adds to the system and takes from the baseline
    columns = gap.transpose(1, 0, 2).reshape(count, -1)
    observed = np.abs(_ratio(total) - _ratio(total[base]))
    as_large = np.zeros(systems)
    for size in _chunks(PERMUTATIONS, count):
        moved = (rng.integers(2, size=(size, count), dtype=np.int8) @ columns).reshape(size, systems, 2)
        difference = np.abs(_ratio(total + moved) - _ratio(total[base] - moved))
        as_large += (difference >= observed * (1 - 1e-9) - 1e-12).sum(0)  # equal but for rounding
    return np.where(np.isnan(observed), np.nan, (1 + as_large) / (1 + PERMUTATIONS))


def _chunks(total: int, width: int) -> list[int]:
    most = max(1, _CHUNK // width)
    return [min(most, total - start) for start in range(0, total, most)]


def holm(p: np.ndarray) -> np.ndarray:
    """Holm's step-down correction of p-values (n,) for n comparisons; NaN stays, and is not counted.

    >>> holm(np.array([0.01, 0.04, 0.03])).tolist()
    [0.03, 0.06, 0.06]
    """
    corrected = np.full(len(p), np.nan)
    order = np.argsort(p)[: int((~np.isnan(p)).sum())]  # NaN sorts last
    factors = np.arange(len(order), 0, -1)
    corrected[order] = np.minimum(1, np.maximum.accumulate(p[order] * factors))
    return corrected
