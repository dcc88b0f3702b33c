"""Packing a batch of queries: no padding of lists, whatever their lengths.

`pack_queries` packs tensors for your own training loop. The three collators pack rows of the data schema, or of
`RankedLists`, for a student and the `Trainer`: the model's inputs, and under "labels" what the loss needs. They check
the rows, because rows in memory have not passed a reader: a ValueError names the query.
"""

from __future__ import annotations

import numbers
from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import Any

import numpy as np
import torch
from torch import Tensor


def pack_queries(rows: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Rows of `RankedLists`, a query each, as one packed batch.

    Args:
        rows: Q dicts of tensors with equal keys; the first dimension of row q's tensors is the query's n_q documents.

    Returns:
        The same keys, concatenated to D = Σ n_q documents, and `cu_seqlens` (Q + 1,) int64.

    >>> batch = pack_queries([{"labels": torch.tensor([1.0])}, {"labels": torch.tensor([0.0, 2.0])}])
    >>> batch["labels"].tolist(), batch["cu_seqlens"].tolist()
    ([1.0, 0.0, 2.0], [0, 1, 3])
    """
    lengths = torch.tensor([0, *(len(row["labels"]) for row in rows)])
    return {name: torch.cat([row[name] for row in rows]) for name in rows[0]} | {"cu_seqlens": lengths.cumsum(0)}


class RankingTargets(dict):
    """What the loss needs of a packed batch, in the place of the Trainer's "labels".

    `labels` (D,), `teacher_logits` (D, M), both float32 with NaN for what is missing (`labels` float64 where float32 would
    tie two of them), and `cu_seqlens` (Q + 1,) int64. For messages: `queries`, Q names of queries; `teachers`, M names, or
    None where the rows name none; `infinite`, None or the first infinite teacher logit in words. It counts as missing.
    """

    def ne(self, value: int) -> Tensor:
        """Ones (Q,): the Trainer counts a step's items as ``labels.ne(-100).sum()``, and the items here are queries."""
        return torch.ones_like(self["cu_seqlens"][1:])


class FeatureCollator:
    """Rows with `features` as inputs of a `FeatureRanker`: ``{"features": (D, F), "labels": RankingTargets}``.

    >>> batch = FeatureCollator()([{"features": [[1.0], [2.0]], "labels": [1, None], "teacher_logits": [[0.3], [None]]}])
    >>> batch["features"].shape, batch["labels"]["labels"], batch["labels"]["cu_seqlens"]
    (torch.Size([2, 1]), tensor([1., nan]), tensor([0, 2]))
    """

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        targets = _targets(rows, "features")
        return {"features": targets.pop("features"), "labels": targets}


class CrossEncoderCollator:
    """Rows with `query` and `documents` as inputs of a cross-encoder: a (query, document) pair of texts per document.

    Args:
        tokenizer: the model's.
        max_length: tokens of a pair, more are cut off the longer text; None = the tokenizer's own limit.

    Returns, when called with Q rows:
        The tokenizer's tensors (D, length), padded to the longest pair, and "labels": `RankingTargets`.
    """

    def __init__(self, tokenizer: Any, max_length: int | None = None):
        self.tokenizer, self.max_length = tokenizer, max_length

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        targets = _targets(rows, "documents")
        queries, documents = _texts(rows)
        pairs = [query for query, texts in zip(queries, documents, strict=True) for _ in texts]
        return {**_tokenize(self, pairs, [text for texts in documents for text in texts]), "labels": targets}


class BiEncoderCollator:
    """Rows with `query` and `documents` as inputs of a `BiEncoder`: every text on its own, each query once.

    Args:
        tokenizer: the model's.
        max_length: tokens of a text, more are cut off; None = the tokenizer's own limit.

    Returns, when called with Q rows:
        The tokenizer's tensors (D, length) for the documents and, under "query_...", (Q, query length) for the queries,
        `query_index` (D,), and "labels": `RankingTargets`.
    """

    def __init__(self, tokenizer: Any, max_length: int | None = None):
        self.tokenizer, self.max_length = tokenizer, max_length

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        targets = _targets(rows, "documents")
        queries, documents = _texts(rows)
        query_tokens = _tokenize(self, queries)
        tokens = _tokenize(self, [text for texts in documents for text in texts])
        query_index = torch.arange(len(rows)).repeat_interleave(targets["cu_seqlens"].diff())
        return {
            **tokens,
            **{f"query_{name}": tensor for name, tensor in query_tokens.items()},
            "query_index": query_index,
            "labels": targets,
        }


def pack_targets(rows: Sequence[dict[str, Any]]) -> RankingTargets:
    """The targets of rows alone, whatever a student reads: teachers matched by their names, as the collators do.

    Raises:
        ValueError: a row is broken or has no teachers; the message names the query.

    >>> pack_targets([{"labels": [1, None], "teacher_logits": [[0.3], [None]]}])["labels"]
    tensor([1., nan])
    """
    return _targets(rows, "teacher_logits")


def _tokenize(collator: Any, *texts: list[str]) -> dict[str, Tensor]:
    return dict(collator.tokenizer(*texts, padding=True, truncation=True, max_length=collator.max_length, return_tensors="pt"))


def _texts(rows: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """(the queries, their documents)"""
    queries, documents = [], []
    for place, row in enumerate(rows):
        of = f"query {query_name(row, place)}"
        queries.append(_text(f"{of}: query", _field(row, place, "query")))
        documents.append([_text(f"{of}: documents[{i}]", text) for i, text in enumerate(row["documents"])])
    return queries, documents


def _text(where: str, value: object) -> str:
    if not isinstance(value, str):
        given = "None" if value is None else f"{type(value).__name__} {value!r:.40}"
        raise ValueError(f'{where}: expected a text, got {given}; write "" where there is none')
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"{where}: not Unicode: {error.reason} at character {error.start + 1}") from None
    return str(value)  # numpy has its own kind


def _targets(rows: Sequence[dict[str, Any]], documents: str) -> RankingTargets:
    """What is numbers in rows whose documents are given by `documents`, their texts or their "features"."""
    packed: list[dict[str, Tensor]] = []
    names, infinite = None, None
    for place, row in enumerate(rows):
        if not isinstance(row, Mapping):
            raise ValueError(
                f"expected rows as dicts of columns, got {type(row).__name__}; a Dataset's format: with_format(None)"
            )
        tensors = _tensors(row, place, documents)
        of, count = f"query {query_name(row, place)}", tensors["teacher_logits"].shape[1]
        if packed and count != (expected := packed[0]["teacher_logits"].shape[1]):
            raise ValueError(
                f"{of}: teacher_logits: expected as many teachers as in query {query_name(rows[0], 0)}, {expected}, got {count}"
            )
        own = _teacher_names(row, of, count)
        names = own if names is None else names
        if own is not None and names is not None and own != names:
            order = order_of_teachers(own, names, of, f"query {query_name(rows[0], 0)}")
            tensors["teacher_logits"] = tensors["teacher_logits"][:, order]
        if (where := tensors["teacher_logits"].isinf()).any():
            document, teacher = where.nonzero()[0].tolist()
            called = names[teacher] if names else teacher + 1
            infinite = infinite or f"teacher {called!r} gives document {document + 1} of {of}"
            tensors["teacher_logits"] = tensors["teacher_logits"].masked_fill(where, torch.nan)
        packed.append(tensors)
    queries = [query_name(row, place) for place, row in enumerate(rows)]
    return RankingTargets(pack_queries(packed), queries=queries, teachers=names, infinite=infinite)


def queries_of(targets: Mapping[str, Any]) -> Sequence[str]:
    """The queries' names in messages; your own collator may give none."""
    return targets.get("queries") or [query_name({}, place) for place in range(len(targets["cu_seqlens"]) - 1)]


def order_of_teachers(given: Sequence[str], wanted: Sequence[str], where: str, like: str) -> list[int]:
    """The columns of `given` in the order of `wanted`.

    Raises:
        ValueError: one is missing.
    """
    if missing := [name for name in wanted if name not in given]:
        raise ValueError(f"{where}: teachers: no {missing[0]!r}, which {like} has; got {', '.join(map(repr, given))}")
    return [given.index(name) for name in wanted]


def _teacher_names(row: Mapping[str, Any], of: str, count: int) -> list[str] | None:
    if row.get("teachers") is None:
        return None
    names = [str(name) for name in row["teachers"]]
    if len(set(names)) != count or len(names) != count:
        raise ValueError(f"{of}: teachers: expected a name of its own for each of the {count} teachers, got {names}")
    return names


def _tensors(row: Mapping[str, Any], place: int, source: str) -> dict[str, Tensor]:
    """A row's labels (n,), teacher_logits (n, M) and features (n, F), with NaN for None and what is absent."""
    of, given = f"query {query_name(row, place)}", _field(row, place, source)
    if isinstance(given, (str, bytes)) or not hasattr(given, "__len__"):
        raise ValueError(
            f"{of}: {source}: expected a list with an entry per document, got {type(given).__name__} {given!r:.40}"
        )
    documents = len(given)
    if documents == 0 and not isinstance(given, Tensor):
        raise ValueError(f"{of}: no documents")
    labels, teachers = row.get("labels"), row.get("teacher_logits")
    tensors = {
        "labels": torch.full((documents,), torch.nan) if labels is None else _labels(labels, of),
        "teacher_logits": torch.empty(documents, 0) if teachers is None else _numbers(teachers, f"{of}: teacher_logits", 2),
    }
    if source == "features":
        tensors["features"] = _numbers(given, f"{of}: features", 2)
    for name, tensor in tensors.items():
        if len(tensor) != documents:
            raise ValueError(f"{of}: {name}: expected one per document, {documents}, got {len(tensor)}")
    return tensors


def _labels(values: Any, of: str) -> Tensor:
    labels = _numbers(values, f"{of}: labels", 1, torch.float64)
    if (where := labels.isinf()).any():
        document = int(where.nonzero()[0])
        raise ValueError(f"{of}: labels[{document}]: expected a finite number, or None = unlabelled, got {labels[document]}")
    largest = labels.nan_to_num().abs().amax().item() if len(labels) else 0.0
    entries = values.tolist() if hasattr(values, "tolist") else values
    if largest >= 2**53 and any(isinstance(y, numbers.Integral) and abs(int(y)) > 2**53 for y in entries):
        raise ValueError(f"{of}: labels: expected whole numbers up to 2^53, which can be told apart, got about {largest:.0f}")
    fits = 2**24 if labels.equal(labels.round()) else torch.finfo(torch.float32).max
    return labels if largest > fits else labels.float()


def _numbers(values: object, where: str, dimensions: int, dtype: torch.dtype = torch.float32) -> Tensor:
    if isinstance(values, Tensor):
        tensor = values.detach().resolve_conj().resolve_neg().to("cpu")
        if tensor.is_complex():
            raise ValueError(f"{where}: expected numbers, equally many per document: got {tensor.dtype}")
        tensor = tensor.to(dtype)
    else:
        try:
            array = np.asarray(values)
            if array.dtype.kind not in "biuf":  # None among them, or what is no number
                array = np.asarray(values, dtype=object)
                if wrong := [entry for entry in array.flat if not _is_number(entry)]:
                    raise ValueError(f"got {wrong[0]!r:.40}")
            with np.errstate(over="ignore"):  # infinity is told apart by the callers
                tensor = torch.from_numpy(array.astype(np.float64)).to(dtype)
        except (TypeError, ValueError, OverflowError) as error:
            raise ValueError(f"{where}: expected numbers, equally many per document: {error}") from None
    if tensor.dim() != dimensions:
        raise ValueError(f"{where}: expected {dimensions} dimension(s), got {tuple(tensor.shape)}")
    return tensor


def _is_number(value: object) -> bool:
    return value is None or isinstance(value, (numbers.Real, np.number, Decimal))


def _field(row: Mapping[str, Any], place: int, name: str) -> Any:
    value = row.get(name)
    if value is None:
        raise ValueError(
            f"query {query_name(row, place)}: no {name!r}, which this student needs; the row has {sorted(row)}. A Trainer "
            "drops what the model's forward does not name unless it is told TrainingArguments(remove_unused_columns=False)"
        )
    return value


def query_name(row: Mapping[str, Any], place: int) -> str:
    """The name of a row's query in messages: its id, else its text, else its place in the batch (from 0)."""
    name = row.get("query_id")
    if name is None:
        name = row.get("query")
    if name is None:
        return f"{place + 1} of the batch"
    name = str(name)
    return repr(name if len(name) <= 60 else name[:57] + "...")
