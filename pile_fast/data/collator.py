"""Packing a batch of queries: no padding of lists, whatever their lengths.

`pack_queries` packs tensors for a training loop of one's own. The three collators pack rows of the data schema, or of
`RankedLists`, for a student and the `Trainer`: the model's inputs, and under "labels" what the loss needs.
"""

from __future__ import annotations

from collections.abc import Sequence
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

    `labels` (D,), `teacher_logits` (D, M), both float32 with NaN for what is missing, and `cu_seqlens` (Q + 1,) int64.
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
        packed = _pack(rows, "features")
        return {"features": packed.pop("features"), "labels": RankingTargets(packed)}


class CrossEncoderCollator:
    """Rows with `query` and `documents` as inputs of a cross-encoder: a (query, document) pair of texts per document.

    Args:
        tokenizer: the model's.
        max_length: tokens of a pair, more are cut off the longer text; None = the tokenizer's own limit.

    Returns, when called with Q rows:
        The tokenizer's tensors (D, length), padded to the longest pair, and "labels": `RankingTargets`.
    """

    def __init__(self, tokenizer, max_length: int | None = None):
        self.tokenizer, self.max_length = tokenizer, max_length

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        targets = _text_targets(rows)
        queries = [_field(row, "query") for row in rows for _ in row["documents"]]
        documents = [text for row in rows for text in row["documents"]]
        return {**_tokenize(self, queries, documents), "labels": targets}


class BiEncoderCollator:
    """Rows with `query` and `documents` as inputs of a `BiEncoder`: every text on its own, each query once.

    Args:
        tokenizer: the model's.
        max_length: tokens of a text, more are cut off; None = the tokenizer's own limit.

    Returns, when called with Q rows:
        The tokenizer's tensors (D, length) for the documents and, under "query_...", (Q, query length) for the queries,
        `query_index` (D,), and "labels": `RankingTargets`.
    """

    def __init__(self, tokenizer, max_length: int | None = None):
        self.tokenizer, self.max_length = tokenizer, max_length

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        targets = _text_targets(rows)
        queries = _tokenize(self, [_field(row, "query") for row in rows])
        documents = _tokenize(self, [text for row in rows for text in row["documents"]])
        query_index = torch.arange(len(rows)).repeat_interleave(targets["cu_seqlens"].diff())
        queries = {f"query_{name}": tensor for name, tensor in queries.items()}
        return {**documents, **queries, "query_index": query_index, "labels": targets}


def _tokenize(collator, *texts: list[str]) -> dict[str, Tensor]:
    return dict(collator.tokenizer(*texts, padding=True, truncation=True, max_length=collator.max_length, return_tensors="pt"))


def _text_targets(rows: Sequence[dict[str, Any]]) -> RankingTargets:
    return RankingTargets(_pack(rows, "documents"))


def _pack(rows: Sequence[dict[str, Any]], documents: str) -> dict[str, Tensor]:
    """What is numbers in rows whose documents are given by `documents`, their texts or their "features"."""
    packed = [_tensors(row, documents) for row in rows]
    teachers = [tensors["teacher_logits"].shape[1] for tensors in packed]
    if len(set(teachers)) > 1:
        other = next(i for i, count in enumerate(teachers) if count != teachers[0])
        raise ValueError(
            f"{_name(rows[other])}: teacher_logits: expected as many teachers as in {_name(rows[0])}, {teachers[0]}, "
            f"got {teachers[other]}"
        )
    return pack_queries(packed)


def _tensors(row: dict[str, Any], source: str) -> dict[str, Tensor]:
    """A row's labels (n,), teacher_logits (n, M) and features (n, F), with NaN for None and what is absent."""
    documents = len(_field(row, source))
    if documents == 0 and not isinstance(row[source], Tensor):
        raise ValueError(f"{_name(row)}: no documents")
    labels, teachers = row.get("labels"), row.get("teacher_logits")
    tensors = {
        "labels": torch.full((documents,), torch.nan) if labels is None else _floats(row, "labels", 1),
        "teacher_logits": torch.empty(documents, 0) if teachers is None else _floats(row, "teacher_logits", 2),
    }
    if source == "features":
        tensors["features"] = _floats(row, "features", 2)
    for name, tensor in tensors.items():
        if len(tensor) != documents:
            raise ValueError(f"{_name(row)}: {name}: expected one per document, {documents}, got {len(tensor)}")
    return tensors


def _floats(row: dict[str, Any], name: str, dimensions: int) -> Tensor:
    try:
        tensor = torch.as_tensor(np.asarray(row[name], dtype=np.float32))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{_name(row)}: {name}: expected numbers, equally many per document: {error}") from None
    if tensor.dim() != dimensions:
        raise ValueError(f"{_name(row)}: {name}: expected {dimensions} dimension(s), got {tuple(tensor.shape)}")
    return tensor


def _field(row: dict[str, Any], name: str):
    value = row.get(name)
    if value is None:
        raise ValueError(f"{_name(row)}: no {name!r}, which this student needs; the row has {sorted(row)}")
    return value


def _name(row: dict[str, Any]) -> str:
    return f"query {row['query_id']!r}" if "query_id" in row else "a query"
