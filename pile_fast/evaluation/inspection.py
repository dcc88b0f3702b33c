"""What a file of queries holds: labels, teachers, where they disagree, and what looks wrong."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from array import array
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch
from torch import Tensor

from pile_fast.ensembles.pile import pile_with_weights
from pile_fast.evaluation.metrics import Lists, count_pairs, ndcg_values, pair_counts
from pile_fast.functional import pile_ensemble

# A logit within this share of the teacher's whole range from its end counts as at the extreme.
NEAR_EXTREME = 0.01
# Findings are reported from these on.
LOW_COVERAGE = 0.5
MANY_CONSTANT = 0.1
MANY_EXTREME = 0.25
SAME_ORDER = 0.99
MOST_LABEL_VALUES = 12
MOST_NAMED = 20
# Agreement of every two teachers looks at so many pairs of documents, and multiplies so many numbers, at most.
MOST_PAIRS = 5 * 10**6
MOST_PRODUCTS = 5 * 10**9
_SHORT_LIST = 64
# Numbers worked on at a time.
_CHUNK = 2**22


class Names:
    """Many names in little memory.

    >>> names = Names()
    >>> names.extend(["d1", "é", ""])
    >>> len(names), names[1]
    (3, 'é')
    """

    def __init__(self) -> None:
        self._text = bytearray()
        self._ends = array("Q", [0])

    def extend(self, names: Iterable[str]) -> None:
        encoded = [name.encode() for name in names]
        start = len(self._text)
        self._text += b"".join(encoded)
        self._ends.extend(end + start for end in itertools.accumulate(map(len, encoded)))

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, i: int) -> str:
        return self._text[self._ends[i] : self._ends[i + 1]].decode()


@dataclasses.dataclass(frozen=True)
class Contents:
    """The numbers and names of a file, packed in memory, without its texts and features.

    Attributes:
        query_ids: Q names.
        doc_ids: of all documents.
        labels: (D,) float64, NaN = unlabelled.
        teacher_logits: (D, M) float32, NaN = not scored.
        cu_seqlens: (Q + 1,) int64.
        teachers: M names.
        texts: queries with texts to read.
        any_text: whether any query or document has a text.
        num_features: F, 0 without features.
    """

    query_ids: list[str]
    doc_ids: Names
    labels: Tensor
    teacher_logits: Tensor
    cu_seqlens: Tensor
    teachers: list[str]
    texts: int
    any_text: bool
    num_features: int

    @classmethod
    def from_rows(cls, rows: Iterable[dict]) -> Contents:
        """Rows as `pile_fast.data.read_rows` gives them, read once."""
        query_ids, lengths, names, labels, logits, teachers = [], [0], Names(), array("d"), array("f"), []
        texts, any_text, num_features = 0, False, 0
        for row in rows:
            query_ids.append(row["query_id"])
            lengths.append(len(row["doc_ids"]))
            names.extend(row["doc_ids"])
            labels.extend(math.nan if label is None else label for label in row["labels"])
            for values in row["teacher_logits"]:
                logits.extend(math.nan if value is None else value for value in values)
            texts += row["query"] is not None and row["documents"] is not None
            any_text = any_text or row["query"] is not None or row["documents"] is not None
            num_features = len(row["features"][0]) if row["features"] else num_features
            teachers = list(row["teachers"])
        label_column = torch.from_numpy(np.array(labels))
        table = torch.from_numpy(np.array(logits)).reshape(len(label_column), len(teachers))
        bounds = torch.tensor(lengths).cumsum(0)
        return cls(query_ids, names, label_column, table, bounds, teachers, texts, any_text, num_features)

    @property
    def lengths(self) -> Tensor:
        return self.cu_seqlens.diff()

    @functools.cached_property
    def query(self) -> Tensor:
        """(D,) the query of each document."""
        return torch.arange(len(self.query_ids)).repeat_interleave(self.lengths)

    @functools.cached_property
    def lists(self) -> Lists:
        """The labelled documents, for a teacher that scored them all."""
        return Lists(torch.zeros(len(self.labels)), self.labels, None, self.cu_seqlens)

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
    queries: list[dict] = []
    pairs: list[dict] = []
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
    pairs = torch.stack(pair_counts(torch.zeros_like(labels), labels, cu_seqlens=contents.cu_seqlens)).sum(0)
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
    return torch.zeros(len(contents.query_ids), dtype=torch.float64).index_add_(0, contents.query, values.double())


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
    deviation = torch.where(scored, safe - mean[contents.query], 0.0)
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
    query, size = contents.query, len(contents.query_ids)
    largest = torch.full((size,), -torch.inf).scatter_reduce(0, query, logits.nan_to_num(nan=-torch.inf), "amax")
    smallest = torch.full((size,), torch.inf).scatter_reduce(0, query, logits.nan_to_num(nan=torch.inf), "amin")
    return largest, smallest


def _quality(contents: Contents, m: int) -> dict:
    """Against the labels, on the documents that the teacher scored."""
    logits = contents.teacher_logits[:, m]
    missing = logits.isnan()
    if bool(missing.any()):
        lists = Lists(logits, contents.labels_where(~missing), None, contents.cu_seqlens)
    else:
        lists = contents.lists.with_scores(logits)
    right, wrong, tied = (int(count.sum()) for count in count_pairs(lists))
    ndcg, filled = ndcg_values(lists, 10, "exponential", ties="average")
    pairs = right + wrong + tied
    good, bad = right + tied / 2, wrong + tied / 2
    return {
        "pairs": pairs,
        "pair_accuracy": good / pairs if pairs else math.nan,
        "pnr": good / bad if bad else math.inf if good else math.nan,
        "tied_pairs": tied / pairs if pairs else math.nan,
        "ndcg@10": float(ndcg[filled].mean()),
    }


def _pile_weights(contents: Contents) -> list[dict]:
    """Every teacher's mean weight in PILE, and in the mean, over the documents of queries with a labelled pair."""
    logits = contents.teacher_logits
    pile = pile_with_weights(logits, contents.labels, cu_seqlens=contents.cu_seqlens)
    pairs = torch.stack(pair_counts(torch.zeros_like(contents.labels), contents.labels, cu_seqlens=contents.cu_seqlens)).sum(0)
    used = (pairs > 0)[contents.query] & ~logits.isnan().all(1)
    if not bool(used.any()):
        return [{} for _ in contents.teachers]
    present = ~logits[used].isnan()
    equal = (present / present.sum(1, keepdim=True)).double().mean(0)
    # Of each document, rescaled to the teachers that scored it.
    weights = torch.where(present, pile.weights, 0.0).double()
    weights = (weights / weights.sum(1, keepdim=True)).mean(0)
    return [{"pile_weight": float(w), "mean_weight": float(e)} for w, e in zip(weights, equal, strict=True)]


def _agreement(contents: Contents) -> dict:
    """Of each two teachers, and of each and the labels, on the documents that both know.

    "pairs" that both order, the share of them ordered alike, and the mean over queries of Kendall's tau-b. All pairs of
    documents, or where these are too many, those of "documents" drawn at random (None = all).
    """
    names = list(contents.teachers)
    table = contents.teacher_logits
    if not bool(contents.labels.isnan().all()):
        table = torch.cat([table, contents.labels[:, None]], 1)  # float64 where labels are there
        names.append("labels")
    size = len(names)
    drawn = _draw(contents.lengths.numpy(), min(MOST_PAIRS, MOST_PRODUCTS // size**2))
    agreeing = np.zeros((size, size))  # pairs ordered alike less those ordered otherwise
    ordered = np.zeros((size, size))  # pairs that both order
    tau, queries = np.zeros((size, size)), np.zeros((size, size))
    for documents in _same_length(contents.cu_seqlens, drawn):
        for alike, both, first in _signs(table, documents):
            with np.errstate(invalid="ignore"):
                taus = alike / np.sqrt(first * first.transpose(0, 2, 1))
            known = ~np.isnan(taus)
            agreeing, ordered = agreeing + alike.sum(0), ordered + both.sum(0)
            tau, queries = tau + np.where(known, taus, 0).sum(0), queries + known.sum(0)
    with np.errstate(invalid="ignore"):
        share, tau = (ordered + agreeing) / (2 * ordered), tau / queries
    return {
        "names": names,
        "pairs": ordered.round().astype(np.int64).tolist(),
        "pair_agreement": share.tolist(),
        "kendall_tau": tau.tolist(),
        "documents": None if drawn is None else sum(map(len, drawn.values())),
    }


def _draw(lengths: np.ndarray, most: int) -> dict[int, np.ndarray] | None:
    """Documents of queries whose pairs are at most `most`, by query; None = all documents.

    Long lists are thinned first, all to one length; if that is not enough, queries are left out.
    """

    def pairs(longest: int) -> int:
        shorter = np.minimum(lengths, longest).astype(object if longest > 2**31 else np.int64)
        return int((shorter * (shorter - 1) // 2).sum())

    if pairs(int(lengths.max())) <= most:
        return None
    rng = np.random.default_rng(0)
    longest, high = _SHORT_LIST, int(lengths.max())
    while longest < high:  # the longest that fits
        middle = (longest + high + 1) // 2
        longest, high = (middle, high) if pairs(middle) <= most else (longest, middle - 1)
    queries = np.arange(len(lengths))
    if pairs(longest) > most:
        share = most / pairs(longest)
        queries = np.sort(rng.permutation(queries)[: max(1, int(share * len(queries)))])
    return {
        int(q): np.sort(rng.choice(lengths[q], longest, replace=False)) if lengths[q] > longest else np.arange(lengths[q])
        for q in queries
    }


def _same_length(cu_seqlens: Tensor, drawn: dict[int, np.ndarray] | None) -> Iterator[Tensor]:
    """(queries, n) documents of the queries of one length n, for each length."""
    starts, lengths = cu_seqlens[:-1], cu_seqlens.diff()
    if drawn is None:
        for n in lengths.unique().tolist():
            yield starts[lengths == n][:, None] + torch.arange(n)
        return
    by_length: dict[int, list[Tensor]] = {}
    for q, documents in drawn.items():
        by_length.setdefault(len(documents), []).append(starts[q] + torch.from_numpy(documents))
    for some in by_length.values():
        yield torch.stack(some)


def _signs(table: Tensor, documents: Tensor) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Of documents (queries, n), chunk by chunk: (queries, M, M) sums over pairs of documents for columns a and b.

    Σ sign_a sign_b; Σ |sign_a| |sign_b|, the pairs that both order; and Σ |sign_a| over the pairs that b knows. A sign is
    that of the difference of a pair's two values, 0 where they are equal or one is missing.
    """
    n, size = documents.shape[1], table.shape[1]
    at_once = max(1, _CHUNK // (max(n * n, size) * size))
    for some in documents.split(at_once):
        values = table[some]  # (q, n, M)
        sums = torch.zeros(3, len(some), size, size, dtype=torch.float64)
        for part in values.split(max(1, _CHUNK // (n * size)), 1):
            difference = (part[:, :, None] - values[:, None]).flatten(1, 2)
            known = (~difference.isnan()).float()
            sign = difference.sign().nan_to_num(nan=0.0).float()
            turned = sign.transpose(1, 2)
            sums += torch.stack([turned @ sign, turned.abs() @ sign.abs(), turned.abs() @ known])  # whole numbers, exact
        yield tuple((sums / 2).numpy())  # every pair came twice


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
    above, below, query = _candidates(mean, labels, contents.cu_seqlens)
    gap = contents.teacher_logits[below] - contents.teacher_logits[above]  # NaN where one is not scored
    against, alike = (gap > 0).sum(1), (gap < 0).sum(1)
    margin = mean[below] - mean[above]
    worst = np.lexsort((-margin.numpy(), (alike - against).numpy()))[:most]
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
        for i in worst.tolist()
        if against[i] > alike[i]
    ]
    return queries, pairs


def _document(contents: Contents, document: Tensor, start: Tensor) -> dict:
    return {"position": int(document - start), "label": float(contents.labels[document])}


def _candidates(mean: Tensor, labels: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """For each document, the lower-labelled one of its query that has the highest mean: (above, below, query)."""
    known = (~labels.isnan()).nonzero()[:, 0]
    query = torch.arange(len(cu_seqlens) - 1).repeat_interleave(cu_seqlens.diff())[known]
    # Sorted by query, and by label in it; the labels of a query's runs of equal ones rise.
    order = labels[known].argsort(stable=True)
    order = order[query[order].argsort(stable=True)]
    known, query = known[order], query[order]
    if not len(known):
        return known, known, query
    y, s = labels[known], mean[known]
    new_query = torch.ones_like(query, dtype=torch.bool)
    new_query[1:] = query[1:] != query[:-1]
    new_label = new_query.clone()
    new_label[1:] |= y[1:] != y[:-1]
    place = torch.arange(len(known))
    first = torch.where(new_label, place, 0).cummax(0).values  # of the run of documents with this label
    # The place of the highest mean so far in the query: of its rank among all, raised by query.
    rank = torch.empty_like(place)
    rank[s.argsort(stable=True)] = place
    best = (rank + query * len(known)).cummax(0).values - query * len(known)
    at = torch.empty_like(place)
    at[rank] = place
    some = first > torch.where(new_query, place, 0).cummax(0).values  # a lower label comes before
    return known[some], known[at[best[first[some] - 1]]], query[some]


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

    def among(what: str, key: str, wanted: Callable[[float], bool]) -> None:
        some = [f"{t['name']} ({t[key]:.0%})" for t in teachers if t.get(key) is not None and wanted(t[key])]
        if some:
            more = f" and {len(some) - MOST_NAMED:,} more" if len(some) > MOST_NAMED else ""
            found.append(f"{what}: {', '.join(some[:MOST_NAMED])}{more}.")

    among(f"Teachers that scored less than {LOW_COVERAGE:.0%} of the documents", "coverage", lambda share: share < LOW_COVERAGE)
    among("Constant lists, one logit for every document of a query", "constant_lists", lambda share: share > MANY_CONSTANT)
    among("Logits piled up at the lowest value the teacher gives", "near_min", lambda share: MANY_EXTREME < share < 1)
    among("Logits piled up at the highest value the teacher gives", "near_max", lambda share: MANY_EXTREME < share < 1)
    piled = [t["name"] for t in teachers if t.get("probability") and MANY_EXTREME < max(t["near_min"], t["near_max"]) < 1]
    if piled:
        found.append(
            "All in [0, 1] and piled up, so perhaps probabilities (prefer logits before the sigmoid): "
            f"{', '.join(piled[:MOST_NAMED])}{' and more' * (len(piled) > MOST_NAMED)}."
        )
    among("Worse than chance on the labelled pairs (is higher better?)", "pair_accuracy", lambda share: share < 0.5)
    pairs, share = agreement["pairs"], agreement["pair_agreement"]
    same = [
        f"{teachers[a]['name']} and {teachers[b]['name']} order {share[a][b]:.1%} of {pairs[a][b]:,} pairs alike: one may do."
        for a in range(len(teachers))
        for b in range(a)
        # Of pairs enough for either to be like the other, not of the few that both happen to know.
        if share[a][b] > SAME_ORDER and pairs[a][b] > max(pairs[a][a], pairs[b][b]) / 2
    ]
    found += same[:MOST_NAMED]
    if len(same) > MOST_NAMED:
        found.append(f"{len(same) - MOST_NAMED:,} more pairs of teachers order their documents alike.")
    if agreement["documents"] is not None:
        found.append(f"Agreement between teachers was measured on {agreement['documents']:,} documents drawn at random.")
    return found
