"""Documents that a teacher did not score, read as below the end of its list."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

MISSING = ("nan", "bottom")
# Of the teachers' scores: from here on the commands say what "bottom" would do.
MANY_MISSING = 1 / 3


def missing_as_bottom(teacher_logits: Tensor, cu_seqlens: Tensor, *, value: float | None = None) -> Tensor:
    """The teachers' logits with a logit for documents that a teacher did not score: below all that it scored in the query.

    For runs that were cut at a depth: there a missing score means "not good enough to be returned". A teacher that scored
    nothing of a query stays missing in it.

    Args:
        teacher_logits: (D, M) float, packed; NaN or ±inf = not scored.
        cu_seqlens: (Q + 1,) where each query starts.
        value: the logit to give, for a scale whose bottom is known. None = the query's lowest logit of this teacher, less the
            mean step of its list, (highest − lowest) / scored documents; less 1 (or more, where the dtype cannot tell 1) if
            that is 0.

    Returns:
        (D, M), a new tensor.

    Raises:
        ValueError: a shape does not fit; the message names the argument.

    >>> missing_as_bottom(torch.tensor([[3.0], [torch.nan], [1.0]]), torch.tensor([0, 3]))
    tensor([[3.],
            [0.],
            [1.]])
    """
    if teacher_logits.dim() != 2:
        raise ValueError(f"teacher_logits: expected (D, M), got {tuple(teacher_logits.shape)}")
    lengths = cu_seqlens.diff()
    if len(lengths) < 1 or int(cu_seqlens[-1]) != len(teacher_logits):
        raise ValueError(f"cu_seqlens: expected the last entry to be D = {len(teacher_logits)}, got {cu_seqlens[-1:].tolist()}")
    logits = teacher_logits.double()
    query = torch.arange(len(lengths), device=logits.device).repeat_interleave(lengths)
    scored = logits.isfinite()

    def of_queries(how: str, empty: float) -> Tensor:
        start = logits.new_full((len(lengths), logits.shape[1]), empty)
        return start.scatter_reduce(0, query[:, None].expand_as(logits), torch.where(scored, logits, empty), how)

    lowest, highest = of_queries("amin", torch.inf), of_queries("amax", -torch.inf)
    count = logits.new_zeros(lowest.shape).index_add_(0, query, scored.to(logits.dtype))
    if value is None:
        step = (highest - lowest) / count
        least = lowest.abs() * torch.finfo(teacher_logits.dtype).eps * 4
        bottom = lowest - torch.where(step > least, step, least.clamp(min=1.0))
    else:
        bottom = torch.full_like(lowest, value)
    return torch.where(~scored & (count > 0)[query], bottom[query], logits).to(teacher_logits.dtype)


def row_with_bottom(row: dict[str, Any]) -> dict[str, Any]:
    """A row of the data schema with `missing_as_bottom`.

    >>> row_with_bottom({"teacher_logits": [[3.0, None], [None, None], [1.0, None]]})["teacher_logits"]
    [[3.0, None], [0.0, None], [1.0, None]]
    """
    if not row.get("teacher_logits"):
        return row
    logits = torch.from_numpy(np.array(row["teacher_logits"], dtype=np.float64))  # None becomes NaN
    filled = missing_as_bottom(logits, torch.tensor([0, len(logits)]))
    return row | {"teacher_logits": [[None if x != x else x for x in scores] for scores in filled.tolist()]}


def many_missing(missing: int, scores: int) -> str | None:
    """What a command says of so many missing scores of teachers, if they are many."""
    if missing <= MANY_MISSING * scores:
        return None
    return (
        f"{missing:,} of {scores:,} scores of the teachers are missing ({missing / scores:.0%}), which counts as: the teacher "
        "says nothing of the document. If they are missing because runs were cut at a depth, --missing bottom reads them as "
        "below the end of the teacher's list"
    )
