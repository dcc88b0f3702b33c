"""Compare rankers on the same judged queries: means with confidence intervals, and paired tests against a baseline.

The conventions are trec_eval's (`evaluate` has the list), and the mean is over all judged queries, as ir-measures takes it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from pile_fast.checks import choice
from pile_fast.evaluation import ir_measures
from pile_fast.evaluation.metrics import (
    GAINS,
    Lists,
    PairCounts,
    average_precision_values,
    count_pairs,
    ndcg_values,
    reciprocal_rank_values,
)

_RANKED = ("ndcg", "mrr", "map")
_PAIRWISE = ("pnr", "opa")
_ALIASES = {"ap": "map", "rr": "mrr", "precision": "p", "r": "recall"}
DEFAULT_METRICS = ("ndcg@10", "mrr", "map", "pnr")
UNJUDGED = ("zero", "skip")
EMPTY = ("zero", "one", "skip")
BOOTSTRAP_SAMPLES = 2_000
PERMUTATIONS = 10_000
# Resampling draws as many units: single queries, or blocks of them where there are more.
MOST_UNITS = 5_000
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
    """How much a system returned.

    Attributes:
        documents: judged documents that it returned; it gains nothing by the others.
        unjudged: documents of judged queries that it returned and that were not judged.
        queries: judged queries for which it returned anything; the others count as 0.
        right_pairs, wrong_pairs, tied_pairs: of the pairs that the labels order; what it did not return is last, and ties.
            Any variant of PNR follows from them.
    """

    documents: int
    unjudged: int
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
        labelled: queries with a judged document.
        relevant: queries with a document whose label is at least `relevant_at`.
        paired: queries with two documents of different labels.
        documents: judged documents.
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
    """A metric by its name: "ndcg@10", "ndcg", "mrr", "map", "pnr", "opa", or one of ir-measures': "p@5", "recall@100",
    "success@5", "judged@10", "err@20", "rbp". Case does not matter; "ap", "rr" and "r" are other names for "map", "mrr"
    and "recall".

    Per query it is a fraction whose numerator and denominator add up over queries: their ratio is the value of any set of
    queries. The denominator is 1 but for PNR, whose fraction is x, the share of pairs in the right order, a tied one
    half right (as in training: what a system did not return ties), and PNR is x / (1 − x).

    >>> Metric("nDCG@10").name
    'ndcg@10'
    """

    def __init__(self, name: str):
        base, at, k = name.lower().partition("@")
        base = _ALIASES.get(base, base)
        with_k = k.isascii() and k.isdecimal() and int(k) > 0
        good = base in _RANKED and (not at or with_k)
        good = good or base in _PAIRWISE + ir_measures.PLAIN and not at or base in ir_measures.AT_K and with_k
        if not good:
            raise ValueError(
                f"metrics: expected ndcg, mrr or map, with @k or without, {', '.join(ir_measures.AT_K)} with @k, "
                f"{', '.join(_PAIRWISE + ir_measures.PLAIN)}; got {name!r}"
            )
        self.base, self.k = base, int(k) if at else None
        self.name = f"{base}@{self.k}" if at else base

    @property
    def outside(self) -> bool:
        """Whether ir-measures computes it."""
        return self.base in ir_measures.PLAIN + ir_measures.AT_K

    def value(self, fraction: np.ndarray) -> np.ndarray:
        """The metric of a set of queries from the ratio of its sums."""
        if self.base != "pnr":
            return fraction
        with np.errstate(divide="ignore"):
            return fraction / (1 - fraction)


def evaluate(
    systems: Mapping[str, Tensor], labels: Tensor, cu_seqlens: Tensor, *, metrics: Sequence[str] = DEFAULT_METRICS,
    baseline: str | None = None, relevant_at: float = 1.0, gain: str = "linear", unjudged: str = "zero", empty: str = "zero",
    seed: int = 0, query_ids: Sequence[str] | None = None,
) -> Evaluation:  # fmt: skip
    """Metrics of several systems on the same queries, by trec_eval's conventions.

    A query's documents are those that were judged and those that any system returned. The ideal ranking and the number of
    relevant documents come from all that were judged; a system gains nothing by what it did not return. Documents with
    equal scores keep their order: give them in descending order of their names, and ties are broken as by trec_eval. A
    query without a judged document does not count; one for which a system returned nothing counts as 0 for it. PNR and OPA
    look at pairs of judged documents only.

    Confidence intervals are the percentile bootstrap over queries, differences resampled in pairs. The test exchanges
    system and baseline per query at random (Fisher's randomisation test, two-sided); for PNR it compares
    the shares of pairs in the right order. Holm's correction is per metric, over the systems compared. More than 5,000
    queries are resampled in as many blocks of equal size, drawn once at random.

    Args:
        systems: name → (D,) scores, higher ranks first; NaN = not returned.
        labels: (D,), float or integer; NaN = not judged. A label below 0 gains nothing.
        cu_seqlens: (Q + 1,) where each query starts.
        metrics: see `Metric`; ERR takes whole labels up to 4, the scale of its program.
        baseline: a system to test the others against.
        relevant_at: a document is relevant if its label is at least this; for all metrics that know only relevant or not.
        gain: of NDCG: "linear", the label, as trec_eval has it, or "exponential", 2^label − 1.
        unjudged: documents that were not judged keep their ranks and are not relevant ("zero"), or are left out ("skip").
        empty: a query without a relevant document counts as "zero" or "one", or is left out ("skip"); not of PNR and OPA,
            which count the queries with two different labels.
        seed: of the resampling.
        query_ids: Q names, for errors.

    Raises:
        ValueError: a metric, an option or the baseline is unknown, or labels do not fit a metric.
        ImportError: a metric needs ir-measures, and it is not installed.

    >>> scores, labels = torch.tensor([3.0, 2.0, 1.0, 1.0, 2.0]), torch.tensor([1.0, 0.0, 0.0, 1.0, 0.0])
    >>> result = evaluate({"a": scores}, labels, torch.tensor([0, 3, 5]), metrics=["mrr"]).results["a"]["mrr"]
    >>> result.value, result.queries, result.per_query.tolist()
    (0.75, 2, [1.0, 0.5])
    """
    choice("gain", gain, GAINS)
    choice("unjudged", unjudged, UNJUDGED)
    choice("empty", empty, EMPTY)
    if baseline is not None and baseline not in systems:
        raise ValueError(f"baseline: expected one of {', '.join(systems)}, got {baseline!r}")
    parsed = list({metric.name: metric for metric in map(Metric, metrics)}.values())
    names = list(systems)
    judgements = Judgements(labels, cu_seqlens, relevant_at, unjudged)
    outside = ir_measures.Evaluator([(m.name, m.base, m.k) for m in parsed if m.outside], judgements, query_ids)
    fractions, coverage = {}, {}
    for name, scores in systems.items():
        fractions[name], coverage[name] = _measure(scores, judgements, parsed, gain, empty, outside)
    results: dict[str, dict[str, Result]] = {name: {} for name in names}
    for metric in parsed:
        stacked = np.stack([fractions[name].pop(metric.name) for name in names]) if names else np.zeros((0, 0, 2))
        for name, result in zip(names, _results(metric, stacked, names, baseline, seed), strict=True):
            results[name][metric.name] = result
    return Evaluation(results, coverage, judgements.counts())


class Judgements:
    """What was judged: labels (D,), their queries, and what follows from them for every system alike."""

    def __init__(self, labels: Tensor, cu_seqlens: Tensor, relevant_at: float, unjudged: str):
        self.labels, self.cu_seqlens = labels, cu_seqlens
        self.query = torch.arange(cu_seqlens.shape[0] - 1).repeat_interleave(cu_seqlens.diff())
        self.judged = ~labels.isnan()
        self.relevant = labels >= relevant_at
        self.judged_queries = self.per_query(self.judged) > 0
        # What was not judged is left out by a label of NaN, and gains nothing by one of 0.
        zero = ~self.judged & self.judged_queries[self.query] if unjudged == "zero" else torch.zeros_like(self.judged)
        nothing = torch.zeros(len(labels))
        self.lists = Lists(nothing, torch.where(zero, 0.0, labels.double()), None, cu_seqlens)
        self.pairs = Lists(nothing, labels, None, cu_seqlens)  # of judged documents only

    def per_query(self, flags: Tensor) -> Tensor:
        """(Q,) how many of the (D,) flags are set."""
        return torch.zeros(self.cu_seqlens.shape[0] - 1, dtype=torch.long).index_add_(0, self.query, flags.long())

    def counts(self) -> QueryCounts:
        query, labels = self.pairs.query, self.pairs.labels
        unset = torch.zeros(len(self.judged_queries), dtype=torch.float64)
        low, high = (unset.scatter_reduce(0, query, labels, way, include_self=False) for way in ("amin", "amax"))
        return QueryCounts(
            len(self.judged_queries),
            int(self.judged_queries.sum()),
            int((self.per_query(self.relevant) > 0).sum()),
            int((low < high).sum()),
            int(self.judged.sum()),
        )


def _measure(
    scores: Tensor, judgements: Judgements, metrics: Sequence[Metric], gain: str, empty: str, outside: ir_measures.Evaluator
) -> tuple[dict[str, np.ndarray], Coverage]:
    """A system's fractions (Q, 2), numerator and denominator, by each metric, 0 / 0 for a query that does not count."""
    retrieved = ~scores.isnan()
    last = scores.nan_to_num(nan=-math.inf, posinf=math.inf, neginf=-math.inf)
    pairs = count_pairs(judgements.pairs.with_scores(last))
    lists = judgements.lists.with_scores(scores, retrieved)
    relevant = judgements.relevant[lists.used]
    measured = outside(lists)
    fractions = {}
    for metric in metrics:
        if metric.base in _PAIRWISE:
            fractions[metric.name] = _pair_fractions(metric, pairs)
            continue
        if metric.base == "ndcg":
            values, filled = ndcg_values(lists, metric.k, gain)
        elif metric.base == "mrr":
            values, filled = reciprocal_rank_values(lists, relevant, metric.k)
        elif metric.base == "map":
            values, filled = average_precision_values(lists, relevant, metric.k)
        else:
            values, filled = measured[metric.name]
        counted = judgements.judged_queries & (filled | (empty != "skip"))
        values = torch.where(filled, values, 1.0 if empty == "one" else 0.0)
        fractions[metric.name] = torch.stack([torch.where(counted, values, 0.0), counted.double()], 1).numpy()
    in_judged = retrieved & judgements.judged_queries[judgements.query]
    coverage = Coverage(
        int((retrieved & judgements.judged).sum()),
        int((in_judged & ~judgements.judged).sum()),
        int((judgements.per_query(in_judged) > 0).sum()),
        *(int(count.sum()) for count in pairs),
    )
    return fractions, coverage


def _pair_fractions(metric: Metric, pairs: PairCounts) -> np.ndarray:
    right, wrong, tied = (count.double() for count in pairs)
    total = right + wrong + tied
    if metric.base == "pnr":
        return torch.stack([right + tied / 2, total], 1).numpy()
    return torch.stack([(right / total).nan_to_num(0.0), (total > 0).double()], 1).numpy()


def _results(metric: Metric, fractions: np.ndarray, names: list[str], baseline: str | None, seed: int) -> list[Result]:
    """One `Result` per system from (S, Q, 2) fractions. A system is a row, so that all are resampled at once."""
    with np.errstate(invalid="ignore"):
        per_query = metric.value(fractions[..., 0] / fractions[..., 1])
    counted = (fractions[..., 1] > 0).any(0)
    fractions = fractions[:, counted]
    count = fractions.shape[1]
    units = _units(fractions, seed)
    values = metric.value(_ratio(fractions.sum(1)))
    samples = metric.value(_ratio(_bootstrap(units, seed)))  # (B, S)
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
    p = _randomisation_test(units, base, seed)
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


def _units(fractions: np.ndarray, seed: int) -> np.ndarray:
    """What is resampled: the queries (S, Q, 2), or the sums over at most `MOST_UNITS` random blocks of them.

    Blocks of independent queries are as independent and vary as much together, so neither the interval nor the level
    of the test changes, and the time stays linear.
    """
    systems, count, _ = fractions.shape
    if count <= MOST_UNITS:
        return fractions
    block = np.random.default_rng(seed).permutation(count) % MOST_UNITS
    sums = [np.bincount(block, fractions[s, :, i], MOST_UNITS) for s in range(systems) for i in range(2)]
    return np.stack(sums, 1).reshape(MOST_UNITS, systems, 2).transpose(1, 0, 2)


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
