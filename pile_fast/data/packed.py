"""Columns of a table of rows as packed tensors, checked: what is broken is named by row and column.

Logits and labels reach the kernels as the arrays they were decoded to, with the lists' offsets as `cu_seqlens`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from pile_fast.data.rows import default_names
from pile_fast.extras import needs_extra

with needs_extra("train"):
    import pyarrow as pa

_NUMBERS = pa.list_(pa.float32())
_TABLES = pa.list_(_NUMBERS)
_NAMES = pa.list_(pa.string())
_LARGEST_WHOLE = 2**53  # whole numbers beyond it tie in float64


def pack(table: pa.Table, *, labelled: bool, first_row: int = 0, teachers: int = 1) -> tuple[Tensor, Any, Tensor]:
    """teacher_logits (D, M) float32, labels (D,) float32 or float64, cu_seqlens (Q + 1,); no copy where nothing is null.

    Args:
        table: rows with `teacher_logits`, and `labels` if `labelled` (else None takes their place).
        first_row: how many rows stand before the table's first, for the row numbers of error messages.
        teachers: how many there are if no row has a document.

    Raises:
        ValueError: a column is missing or a row is broken: "row 7: reason", counted from 1.
    """
    lists = _column(table, "teacher_logits", _TABLES)
    if lists.null_count:
        row = int(np.argmax(lists.is_null().to_numpy(zero_copy_only=False)))
        raise ValueError(f"row {first_row + row + 1}: teacher_logits: expected a list per document, got null")
    cu_seqlens = _starts(lists)
    documents = lists.flatten()

    def fail(document: int, reason: str) -> NoReturn:
        row = int(np.searchsorted(cu_seqlens, document, side="right")) - 1
        raise ValueError(f"row {first_row + row + 1}: {reason.format(i=document - cu_seqlens[row])}")

    if documents.null_count:
        missing = int(np.argmax(documents.is_null().to_numpy(zero_copy_only=False)))
        fail(missing, "teacher_logits[{i}]: expected a list with an entry per teacher, got null")
    sizes = np.diff(_starts(documents))
    teachers = int(sizes[0]) if len(sizes) else teachers
    if (sizes != teachers).any():
        other = int(np.argmax(sizes != teachers))
        fail(other, f"teacher_logits[{{i}}]: expected {teachers} teachers as in the rows before, got {sizes[other]}")
    if teachers == 0:
        fail(0, "teacher_logits[{i}]: there are no teachers")
    teacher_logits, broken = _floats(documents.flatten())
    if broken is not None:
        m = broken % teachers
        value = teacher_logits[broken].item()
        fail(broken // teachers, f"teacher_logits[{{i}}][{m}]: expected a finite number, or null for 'not scored', got {value}")
    teacher_logits = teacher_logits.view(-1, teachers)
    if not labelled:
        return teacher_logits, None, torch.from_numpy(cu_seqlens)

    lists = _column(table, "labels", _NUMBERS)
    given = ~lists.is_null().to_numpy(zero_copy_only=False)
    lengths, sizes = np.diff(_starts(lists)), np.diff(cu_seqlens)
    if (wrong := given & (lengths != sizes)).any():
        row = int(np.argmax(wrong))
        raise ValueError(
            f"row {first_row + row + 1}: labels: expected {sizes[row]} entries like teacher_logits, got {lengths[row]}"
        )
    given = given.repeat(sizes)  # null for the whole row: nothing is labelled
    values = lists.flatten()
    if pa.types.is_integer(values.type):
        whole = values.fill_null(0).to_numpy()
        if len(beyond := np.flatnonzero((whole > _LARGEST_WHOLE) | (whole < -_LARGEST_WHOLE))):
            document = int(np.flatnonzero(given)[beyond[0]])
            fail(document, f"labels[{{i}}]: expected a whole number up to 2^53 or null for unlabelled, got {whole[beyond[0]]}")
        values = values.cast(pa.float64())
    labels, broken = _floats(values)
    if broken is not None:
        document = int(np.flatnonzero(given)[broken])
        fail(document, f"labels[{{i}}]: expected a finite number, or null for unlabelled, got {labels[broken].item()}")
    if not given.all():
        spread = torch.full((len(teacher_logits),), torch.nan, dtype=labels.dtype)
        spread[torch.from_numpy(given)] = labels
        labels = spread
    return teacher_logits, labels, torch.from_numpy(cu_seqlens)


def teacher_names(table: pa.Table, count: int, *, first_row: int = 0, expected: Sequence[str] | None = None) -> list[str]:
    """The names of the teachers of a table's rows, which must all have the same ones, in one order.

    Rows that do not name them have those of the rows before or, at the start, "teacher 1", "teacher 2", ...

    Args:
        table: rows.
        count: how many teachers the rows have (`pack` checks that it is the same in all).
        first_row: see `pack`.
        expected: the names that the rows must have; None = those of the first row.

    Raises:
        ValueError: a row names other teachers, or none that could be names.
    """
    if expected is not None and len(expected) != count and table.num_rows:
        raise ValueError(
            f"row {first_row + 1}: teacher_logits: expected {len(expected)} teachers as in the first row, got {count}"
        )
    unnamed = default_names(count) if expected is None else list(expected)
    if "teachers" not in table.column_names or not table.num_rows or table["teachers"].null_count == table.num_rows:
        return unnamed
    names = _names(table)
    given = names.is_valid().to_numpy(zero_copy_only=False)
    wanted = names[0].as_py() if expected is None and given[0] else unnamed
    if len(wanted) == count and (None in wanted or "" in wanted or len(set(wanted)) != count):
        raise ValueError(f"row {first_row + 1}: teachers: expected {count} different names, got {wanted}")
    rows = np.flatnonzero(given)
    wrong = np.diff(_starts(names))[rows] != count
    if len(wanted) == count and not wrong.any():
        same = pa.compute.equal(names.flatten(), pa.array(wanted * len(rows), pa.string()))
        wrong = ~same.fill_null(False).to_numpy(zero_copy_only=False).reshape(-1, count).all(1)
    if wrong.any():
        row = int(rows[np.argmax(wrong)])
        wanted = wanted if len(wanted) == count else f"{count} names"
        raise ValueError(f"row {first_row + row + 1}: teachers: expected {wanted}, got {names[row].as_py()}")
    return wanted


def orders_pairs(teacher_logits: Tensor, labels: Tensor, cu_seqlens: Tensor) -> Tensor:
    """(Q,) bool: whether the labels order two documents of the query that any teacher scored; for the arguments see `pack`."""
    usable = ~labels.isnan() & ~teacher_logits.isnan().all(1)
    query = torch.arange(len(cu_seqlens) - 1).repeat_interleave(cu_seqlens.diff())[usable]
    values = labels[usable].double()
    least, most = (
        torch.zeros(len(cu_seqlens) - 1, dtype=torch.float64).scatter_reduce(0, query, values, how, include_self=False)
        for how in ("amin", "amax")
    )
    return most > least


def _column(table: pa.Table, name: str, wanted: pa.DataType) -> pa.Array:
    """A column of lists as `wanted`; whole and 64-bit numbers of `_NUMBERS`, which float32 may not hold, stay as they are."""
    if name not in table.column_names:
        raise ValueError(f"missing column {name}, there are {', '.join(table.column_names)}")
    column = table[name]
    leaf, depth = _leaf(column.type)
    numeric = any(
        is_type(leaf)
        for is_type in (pa.types.is_floating, pa.types.is_integer, pa.types.is_boolean, pa.types.is_null, pa.types.is_decimal)
    )
    if not numeric or (depth != (2 if wanted == _TABLES else 1) and not pa.types.is_null(leaf)):
        raise ValueError(f"column {name}: expected {'lists of ' * (wanted == _TABLES)}lists of numbers, got {column.type}")
    column = column.combine_chunks()
    if wanted == _NUMBERS and depth == 1 and pa.types.is_integer(leaf):
        return column.cast(pa.list_(leaf))
    if wanted == _NUMBERS and depth == 1 and (pa.types.is_float64(leaf) or pa.types.is_decimal(leaf)):
        return column.cast(pa.list_(pa.float64()))
    if pa.types.is_integer(leaf):  # not every one is a float32 number: the nearest is taken, as of float64
        column = column.cast(pa.list_(pa.list_(pa.float64())), safe=False)
    return column if column.type == wanted else column.cast(wanted)


def _leaf(type: pa.DataType) -> tuple[pa.DataType, int]:
    depth = 0
    while pa.types.is_list(type) or pa.types.is_large_list(type) or pa.types.is_fixed_size_list(type):
        type, depth = type.value_type, depth + 1
    return type, depth


def _names(table: pa.Table) -> pa.Array:
    column = table["teachers"].combine_chunks()
    leaf, depth = _leaf(column.type)
    leaf = leaf.value_type if pa.types.is_dictionary(leaf) else leaf
    texts = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view, pa.types.is_null)
    if depth != 1 or not any(is_type(leaf) for is_type in texts):
        raise ValueError(f"column teachers: expected lists of names, got {column.type}")
    return column if column.type == _NAMES else column.cast(_NAMES)


def _starts(lists: pa.ListArray) -> np.ndarray:
    offsets = lists.offsets.to_numpy()
    return offsets - offsets[0] if len(offsets) else np.zeros(1, dtype=np.int32)


def _floats(values: pa.Array) -> tuple[Tensor, int | None]:
    """Values with NaN for null, and the place of the first that is not null and not finite."""
    if not len(values):
        return torch.empty(0), None
    filled = values.fill_null(torch.nan)
    usual = np.isfinite(filled.to_numpy())
    broken = None
    if np.count_nonzero(usual) != len(values) - values.null_count:
        broken = int(np.argmax(~usual & values.is_valid().to_numpy(zero_copy_only=False)))
    return torch.from_dlpack(filled), broken
