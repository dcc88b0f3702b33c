"""Packing a batch of queries: no padding, whatever the lists' lengths."""

from __future__ import annotations

from collections.abc import Sequence

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
