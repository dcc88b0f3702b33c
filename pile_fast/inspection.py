"""What a file of queries holds: labels, teachers, where they disagree, and what looks wrong."""

from __future__ import annotations

import dataclasses
import math
from array import array
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from pile_fast.functional import pile_ensemble
from pile_fast.metrics import ndcg, pair_counts, pnr

# A logit within this share of the teacher's whole range from its end counts as at the extreme.
NEAR_EXTREME = 0.01
# Findings are reported from these on.
LOW_COVERAGE = 0.5
MANY_CONSTANT = 0.1
MANY_EXTREME = 0.25
SAME_ORDER = 0.99
MOST_LABEL_VALUES = 12


@dataclasses.dataclass(frozen=True)
class Contents:
    """The numbers of a file, packed in memory, without its texts and features.

    Attributes:
        query_ids: Q names.
        labels: (D,) float32, NaN = unlabelled.
        teacher_logits: (D, M) float32, NaN = not scored.
        cu_seqlens: (Q + 1,) int64.
        teachers: M names.
        texts: queries with texts to read.
        num_features: F, 0 without features.
    """

    query_ids: list[str]
    labels: Tensor
    teacher_logits: Tensor
    cu_seqlens: Tensor
    teachers: list[str]
    texts: int
    num_features: int

    @classmethod
    def from_rows(cls, rows: Iterable[dict]) -> Contents:
        """Rows as `pile_fast.data.read_rows` gives them, read once."""
        query_ids, lengths, labels, logits, texts, num_features, teachers = [], [0], array("f"), array("f"), 0, 0, []
        for row in rows:
            query_ids.append(row["query_id"])
            lengths.append(len(row["doc_ids"]))
            labels.extend(math.nan if label is None else label for label in row["labels"])
            for values in row["teacher_logits"]:
                logits.extend(math.nan if value is None else value for value in values)
            texts += row["query"] is not None and row["documents"] is not None
            num_features = len(row["features"][0]) if row["features"] else num_features
            teachers = row["teachers"]
        label_column = torch.from_numpy(np.array(labels))
        table = torch.from_numpy(np.array(logits)).reshape(len(label_column), len(teachers))
        return cls(query_ids, label_column, table, torch.tensor(lengths).cumsum(0), list(teachers), texts, num_features)

    @property
    def lengths(self) -> Tensor:
        return self.cu_seqlens.diff()

    def labels_where(self, scored: Tensor) -> Tensor:
        return torch.where(scored, self.labels, torch.nan)


def inspect(contents: Contents, *, most: int = 20) -> dict:
    """Everything the report shows, as plain numbers.

    Args:
        contents: see `Contents`.
        most: how many suspicious queries and pairs to list.

    Returns:
        A dict with "queries", "documents", "list_lengths", "labels", "teachers" (one dict each), "agreement",
        "suspicious_queries", "suspicious_pairs" and "findings" (sentences). Without labels or teachers, what would
        need them is None or empty.

    >>> row = {"query_id": "q", "query": None, "documents": None, "features": [[1.0], [2.0]], "doc_ids": ["a", "b"],
    ...        "labels": [1.0, 0.0], "teacher_logits": [[0.1], [0.9]], "teachers": ["t"]}
    >>> report = inspect(Contents.from_rows([row]))
    >>> report["teachers"][0]["pnr"], report["suspicious_pairs"][0]["higher"]["position"]
    (0.0, 0)
    """
    lengths = contents.lengths
    labels = _labels(contents)
    teachers = [_teacher(contents, m) for m in range(len(contents.teachers))]
    queries = pairs = []
    if teachers and labels["queries_with_pairs"]:
        for teacher, weight in zip(teachers, _pile_weights(contents), strict=True):
            teacher |= weight
        queries, pairs = _suspicious(contents, most)
    report = {
        "queries": len(contents.query_ids),
        "documents": len(contents.labels),
        "texts": contents.texts,
        "num_features": contents.num_features,
        "list_lengths": {
            "min": int(lengths.min()),
            "median": float(np.median(lengths.numpy())),
            "mean": float(lengths.double().mean()),
            "max": int(lengths.max()),
        },
        "labels": labels,
        "teachers": teachers,
        "agreement": _agreement(contents) if teachers else None,
        "suspicious_queries": queries,
        "suspicious_pairs": pairs,
    }
    return report | {"findings": _findings(report)}


def _labels(contents: Contents) -> dict:
    labels = contents.labels
    known = ~labels.isnan()
    values, counts = labels[known].unique(return_counts=True)
    pairs = sum(pair_counts(torch.zeros_like(labels), labels, cu_seqlens=contents.cu_seqlens))
    relevant = _per_query(contents, labels > 0) > 0
    few = len(values) <= MOST_LABEL_VALUES
    return {
        "labelled": int(known.sum()),
        "unlabelled": int((~known).sum()),
        "counts": {f"{value:g}": count for value, count in zip(values.tolist(), counts.tolist(), strict=True)} if few else None,
        "min": float(values[0]) if len(values) else None,
        "max": float(values[-1]) if len(values) else None,
        "queries_labelled": int((_per_query(contents, known) > 0).sum()),
        "queries_with_relevant": int(relevant.sum()),
        "queries_with_pairs": int((pairs > 0).sum()),
        "pairs": int(pairs.sum()),
    }


def _per_query(contents: Contents, values: Tensor) -> Tensor:
    """(Q,) sums of (D,) values."""
    query = torch.arange(len(contents.query_ids)).repeat_interleave(contents.lengths)
    return torch.zeros(len(contents.query_ids), dtype=torch.float64).index_add_(0, query, values.double())


def _teacher(contents: Contents, m: int) -> dict:
    logits = contents.teacher_logits[:, m]
    scored = ~logits.isnan()
    values = logits[scored].double()
    count = _per_query(contents, scored)
    teacher = {
        "name": contents.teachers[m],
        "scored": int(scored.sum()),
        "coverage": float(scored.double().mean()),
        "queries_scored": int((count > 0).sum()),
        "queries_complete": int((count == contents.lengths).sum()),
    }
    if not len(values):
        return teacher
    low, high = values.min(), values.max()
    several = count > 1
    # Two passes: the spread of logits around 1e4 must not drown in their size.
    safe = torch.where(scored, logits.double(), 0.0)
    mean = _per_query(contents, safe) / count.clamp(min=1)
    deviation = torch.where(scored, safe - mean.repeat_interleave(contents.lengths), 0.0)
    spread = (_per_query(contents, deviation.square()) / count.clamp(min=1)).sqrt()[several]
    largest, smallest = _extremes(contents, logits)
    constant = (largest == smallest)[several]
    probability = bool(low >= 0) and bool(high <= 1)
    teacher |= {
        "min": float(low),
        "max": float(high),
        "mean": float(values.mean()),
        "std": float(values.std(correction=0)),
        "median_query_std": float(spread.median()) if len(spread) else None,
        "constant_lists": float(constant.double().mean()) if len(constant) else None,
        "near_min": float((values <= low + NEAR_EXTREME * (high - low)).double().mean()),
        "near_max": float((values >= high - NEAR_EXTREME * (high - low)).double().mean()),
        "probability": probability,
    }
    return teacher | _quality(contents, m)


def _extremes(contents: Contents, logits: Tensor) -> tuple[Tensor, Tensor]:
    query = torch.arange(len(contents.query_ids)).repeat_interleave(contents.lengths)
    size = len(contents.query_ids)
    largest = torch.full((size,), -torch.inf).scatter_reduce(0, query, logits.nan_to_num(nan=-torch.inf), "amax")
    smallest = torch.full((size,), torch.inf).scatter_reduce(0, query, logits.nan_to_num(nan=torch.inf), "amin")
    return largest, smallest


def _quality(contents: Contents, m: int) -> dict:
    """Against the labels, on the documents that the teacher scored."""
    logits = contents.teacher_logits[:, m]
    labels = contents.labels_where(~logits.isnan())
    right, wrong, tied = (int(count.sum()) for count in pair_counts(logits, labels, cu_seqlens=contents.cu_seqlens))
    pairs = right + wrong + tied
    quality = {
        "pairs": pairs,
        "pair_accuracy": (right + tied / 2) / pairs if pairs else math.nan,
        "pnr": float(pnr(logits, labels, cu_seqlens=contents.cu_seqlens, ties="half")),
        "tied_pairs": tied / pairs if pairs else math.nan,
        "ndcg@10": None,
    }
    if not bool((labels < 0).any()):
        value = ndcg(logits, labels, cu_seqlens=contents.cu_seqlens, k=10, ties="average", empty="skip")
        quality["ndcg@10"] = float(value)
    return quality


def _pile_weights(contents: Contents) -> list[dict]:
    """Every teacher's mean weight in PILE, and in the mean, over the documents of queries with a labelled pair."""
    logits = contents.teacher_logits
    ensemble = pile_ensemble(logits, contents.labels, cu_seqlens=contents.cu_seqlens, return_weights=True)
    pairs = sum(pair_counts(torch.zeros_like(contents.labels), contents.labels, cu_seqlens=contents.cu_seqlens))
    used = (pairs > 0).repeat_interleave(contents.lengths) & ~logits.isnan().all(1)
    if not bool(used.any()):
        return [{} for _ in contents.teachers]
    present = ~logits[used].isnan()
    equal = (present / present.sum(1, keepdim=True)).double().mean(0)
    weights = ensemble.weights[used].double().mean(0)
    return [{"pile_weight": float(w), "mean_weight": float(e)} for w, e in zip(weights, equal, strict=True)]


def _agreement(contents: Contents) -> dict:
    """Of each two teachers, and of each and the labels, on the documents that both know.

    "pairs" that both order, the share of them ordered alike, and the mean over queries of Kendall's tau-b.
    """
    columns = list(contents.teacher_logits.unbind(1))
    names = list(contents.teachers)
    if not bool(contents.labels.isnan().all()):
        columns.append(contents.labels)
        names.append("labels")
    size = len(columns)
    pairs, share, tau = np.zeros((size, size), np.int64), np.full((size, size), np.nan), np.full((size, size), np.nan)
    for a in range(size):
        for b in range(a + 1):
            both = ~columns[a].isnan() & ~columns[b].isnan()
            one, other = (torch.where(both, column, torch.nan) for column in (columns[a], columns[b]))
            counts = pair_counts(one, other, cu_seqlens=contents.cu_seqlens)
            right, wrong = counts.concordant, counts.discordant
            tied_other = pair_counts(other, one, cu_seqlens=contents.cu_seqlens).tied
            root = ((right + wrong + counts.tied).double() * (right + wrong + tied_other)).sqrt()
            tau[a, b] = tau[b, a] = ((right - wrong) / root).nanmean()
            pairs[a, b] = pairs[b, a] = int((right + wrong).sum())
            if pairs[a, b]:
                share[a, b] = share[b, a] = int(right.sum()) / pairs[a, b]
    return {
        "names": names,
        "pairs": pairs.tolist(),
        "pair_agreement": share.tolist(),
        "kendall_tau": tau.tolist(),
    }


def _suspicious(contents: Contents, most: int) -> tuple[list[dict], list[dict]]:
    """The queries and the pairs of documents whose labels the teachers contradict most.

    A query by how many of its pairs the mean of the calibrated teachers orders against the labels, in standard
    deviations of as many tosses of a coin. A pair by the teachers that order it against the labels less those that
    order it alike, then by the mean's difference. Of all pairs of a document with lower-labelled ones, one is a
    candidate: that with the one the mean prefers most. So this costs O(n) pairs, not O(n²).
    """
    mean = pile_ensemble(contents.teacher_logits, contents.labels, cu_seqlens=contents.cu_seqlens, iterations=0).logits
    labels = contents.labels_where(~mean.isnan())
    right, wrong, _ = pair_counts(mean, labels, cu_seqlens=contents.cu_seqlens)
    excess = (wrong - right) / (right + wrong).double().sqrt()  # NaN without a pair
    order = excess.nan_to_num(nan=-math.inf).argsort(descending=True, stable=True)[:most].tolist()
    queries = [
        {"query_id": contents.query_ids[q], "pairs_against": int(wrong[q]), "pairs_alike": int(right[q])}
        for q in order
        if excess[q] > 0
    ]
    above, below, query = _candidates(mean.numpy(), labels.numpy(), contents.cu_seqlens.tolist())
    gap = contents.teacher_logits[below] - contents.teacher_logits[above]  # NaN where one is not scored
    against, alike = (gap > 0).sum(1), (gap < 0).sum(1)
    margin = mean[below] - mean[above]
    order = np.lexsort((-margin.numpy(), (alike - against).numpy()))[:most]
    starts = contents.cu_seqlens
    pairs = [
        {
            "query_id": contents.query_ids[query[i]],
            "teachers_against": int(against[i]),
            "teachers_alike": int(alike[i]),
            "mean_difference": float(margin[i]),
            "higher": _document(contents, above[i], starts[query[i]]),
            "lower": _document(contents, below[i], starts[query[i]]),
        }
        for i in order.tolist()
        if against[i] > alike[i]
    ]
    return queries, pairs


def _document(contents: Contents, document: Tensor, start: Tensor) -> dict:
    return {"position": int(document - start), "label": float(contents.labels[document])}


def _candidates(mean: np.ndarray, labels: np.ndarray, bounds: list[int]) -> tuple[Tensor, Tensor, list[int]]:
    """For each document, the lower-labelled one of its query that has the highest mean: (above, below, query)."""
    above, below, query = [], [], []
    for q in range(len(bounds) - 1):
        y = labels[bounds[q] : bounds[q + 1]]
        known = np.flatnonzero(~np.isnan(y))
        known = known[np.argsort(y[known], kind="stable")] + bounds[q]
        if not len(known) or labels[known[0]] == labels[known[-1]]:
            continue
        lower = np.searchsorted(labels[known], labels[known])  # how many have a lower label
        s = mean[known]
        # Of each prefix the place of its highest mean.
        best = np.maximum.accumulate(np.where(s == np.maximum.accumulate(s), np.arange(len(s)), 0))
        some = lower > 0
        above.append(known[some])
        below.append(known[best[lower[some] - 1]])
        query += [q] * int(some.sum())
    if not above:
        return torch.empty(0, dtype=torch.long), torch.empty(0, dtype=torch.long), []
    return torch.from_numpy(np.concatenate(above)), torch.from_numpy(np.concatenate(below)), query


def _findings(report: dict) -> list[str]:
    """What a reader should look at first."""
    labels, teachers, agreement = report["labels"], report["teachers"], report["agreement"]
    found = []
    if not labels["labelled"]:
        found.append("No labels: nothing can be said about quality, and PILE is the mean of the teachers.")
    elif without := report["queries"] - labels["queries_with_pairs"]:
        found.append(f"{without:,} of {report['queries']:,} queries have no two documents of different labels to learn from.")
    if not teachers:
        return [*found, "No teachers: add their logits with pile-fast score."]

    def among(what: str, key: str, wanted) -> None:
        some = [f"{t['name']} ({t[key]:.0%})" for t in teachers if t.get(key) is not None and wanted(t[key])]
        if some:
            found.append(f"{what}: {', '.join(some)}.")

    among(f"Teachers that scored less than {LOW_COVERAGE:.0%} of the documents", "coverage", lambda share: share < LOW_COVERAGE)
    among("Constant lists, one logit for every document of a query", "constant_lists", lambda share: share > MANY_CONSTANT)
    among("Logits piled up at the lowest value the teacher gives", "near_min", lambda share: MANY_EXTREME < share < 1)
    among("Logits piled up at the highest value the teacher gives", "near_max", lambda share: MANY_EXTREME < share < 1)
    piled = [t["name"] for t in teachers if t.get("probability") and MANY_EXTREME < max(t["near_min"], t["near_max"]) < 1]
    if piled:
        found.append(
            f"All in [0, 1] and piled up, so perhaps probabilities (prefer logits before the sigmoid): {', '.join(piled)}."
        )
    among("Worse than chance on the labelled pairs (is higher better?)", "pair_accuracy", lambda share: share < 0.5)
    pairs, share = agreement["pairs"], agreement["pair_agreement"]
    found += [
        f"{teachers[a]['name']} and {teachers[b]['name']} order {share[a][b]:.1%} of {pairs[a][b]:,} pairs alike: one may do."
        for a in range(len(teachers))
        for b in range(a)
        # Of pairs enough for either to be like the other, not of the few that both happen to know.
        if share[a][b] > SAME_ORDER and pairs[a][b] > max(pairs[a][a], pairs[b][b]) / 2
    ]
    return found
