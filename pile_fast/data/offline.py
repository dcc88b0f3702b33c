"""Ensembles over tables of rows, column by column, and over files of any size.

Columns stay in Arrow: what an ensemble does not need passes through as it is, and logits and labels reach the kernels as
the arrays they were decoded to, packed, with the lists' offsets as `cu_seqlens`.
"""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

import pile_fast
from pile_fast.data import parquet
from pile_fast.data.files import ahead, fingerprint
from pile_fast.data.formats import format_of, read_rows, write_rows
from pile_fast.data.resumable import ResumableOutput
from pile_fast.ensembles import (
    ENSEMBLES,
    NEEDS_LABELS,
    NEEDS_STUDENT,
    StackingEnsemble,
    best_teacher_ensemble,
    shared_prior,
)
from pile_fast.functional import pile_ensemble

METHODS = (*(name for name in ENSEMBLES if name not in NEEDS_STUDENT), "stacking")
# Methods that work on padded lists get at most this many slots at a time.
_PADDED_SLOTS = 2**20
_NUMBERS = pa.list_(pa.float32())
_TABLES = pa.list_(_NUMBERS)


class OfflineEnsemble:
    """An ensemble of `pile_fast.ensembles` as a function of Arrow tables. It pickles, for worker processes.

    Called with a table of rows (`teacher_logits`, `labels` where the method needs them, any other column) it returns the
    table with one more column, `ensemble_logits`: a number per document, null where no teacher scored it.

    Args:
        method: one of `METHODS`: those of `pile_fast.ensembles.ENSEMBLES` that need no student, and "stacking".
        keep_weights: also add `ensemble_weights`, documents × teachers, as they are before they are rescaled to the
            teachers that scored a document.
        replace: put the ensemble in the place of the teachers, as the one teacher "ensemble", instead of adding a column.
        fit: a table with labels from which "stacking" learns its weights (required), "best" the one teacher to take
            for all queries (None: it takes each query's best by the query's own labels), and "pile" the weights it starts
            from, `pile_fast.ensembles.shared_prior` (None: equal ones).
        options: of the ensemble's function, e.g. ``iterations=5``.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.

    >>> import pyarrow as pa
    >>> table = pa.table({"query_id": ["q"], "labels": [[1, 0]], "teacher_logits": [[[3.0, 0.0], [1.0, 2.0]]]})
    >>> OfflineEnsemble("mean", normalize="none")(table)["ensemble_logits"].to_pylist()
    [[1.5, 1.5]]
    """

    def __init__(
        self,
        method: str = "pile",
        *,
        keep_weights: bool = False,
        replace: bool = False,
        fit: pa.Table | None = None,
        **options,
    ):
        if method in NEEDS_STUDENT:
            raise ValueError(f"method: {method} needs the student's logits, so it runs while the student is trained")
        if method not in METHODS:
            raise ValueError(f"method: expected one of {', '.join(METHODS)}, got {method!r}")
        if fit is None and method == "stacking":
            raise ValueError("fit: stacking needs data with labels to learn its weights from")
        if fit is not None and method not in ("stacking", "best", "pile"):
            raise ValueError(f"fit: {method} learns nothing from data, only stacking, best and pile do")
        self.method = method
        self.keep_weights = keep_weights
        self.replace = replace
        self.options = options
        # The labels of the rows play no part in a choice that was learnt from others.
        self.needs_labels = method in NEEDS_LABELS and (fit is None or method == "pile")
        self.learnt: list[float] | None = None
        self._function = self._make_function(fit)
        if self.learnt is None:  # wrong options show now, not in the first table
            self._function(torch.zeros(2, 2), torch.zeros(2), cu_seqlens=torch.tensor([0, 2]))

    def _make_function(self, fit: pa.Table | None) -> Callable:
        if self.method == "pile":
            options = dict(self.options)
            if fit is not None:
                teacher_logits, labels, cu_seqlens = _packed(fit, labelled=True)
                names = inspect.signature(shared_prior).parameters.keys() - {"iterations", "step_size"}
                shared = {name: value for name, value in options.items() if name in names}
                options["prior"] = shared_prior(teacher_logits, labels, cu_seqlens=cu_seqlens, **shared)
                self.learnt = options["prior"].tolist()
            return functools.partial(pile_ensemble, return_weights=self.keep_weights, **options)
        if self.method == "stacking":
            stacking = StackingEnsemble(**self.options)
            teacher_logits, labels, cu_seqlens = _packed(fit, labelled=True)
            stacking.fit(teacher_logits, labels, cu_seqlens=cu_seqlens)
            self.learnt = stacking.weights.tolist()
            return stacking
        if self.method == "best":
            if fit is None:
                return functools.partial(best_teacher_ensemble, selection="query", **self.options)
            teacher_logits, labels, cu_seqlens = _packed(fit, labelled=True)
            best = best_teacher_ensemble(teacher_logits, labels, cu_seqlens=cu_seqlens, **self.options).weights
            self.learnt = best.tolist()
            calibration = {name: value for name, value in self.options.items() if name == "normalize"}
            return functools.partial(ENSEMBLES["mean"], prior=best, **calibration)
        return functools.partial(ENSEMBLES[self.method], **self.options)

    @property
    def settings(self) -> dict:
        """What decides the result, as JSON."""
        names = ("method", "options", "keep_weights", "replace", "learnt")
        return {name: getattr(self, name) for name in names} | {"pile_fast": pile_fast.__version__}

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns it reads."""
        return ("teacher_logits", "labels") if self.needs_labels else ("teacher_logits",)

    def __call__(self, table: pa.Table, *, first_row: int = 0, like: pa.Table | None = None) -> pa.Table:
        """The table with the ensemble.

        Args:
            table: rows.
            first_row: how many rows stand before the table's first, for the row numbers of error messages.
            like: a row whose teachers the table's must be; None = the table's own first.

        Raises:
            ValueError: a column is missing or a row is broken: "row 7: reason", counted from 1.
        """
        teacher_logits, labels, cu_seqlens = _packed(table, labelled=self.needs_labels, first_row=first_row)
        _same_teachers(table, teacher_logits.shape[1], first_row, table if like is None else like)
        if self.method == "pile":
            logits, weights, _ = self._function(teacher_logits, labels, cu_seqlens=cu_seqlens)
            if weights is not None:
                weights = _per_document(weights, cu_seqlens)
        else:
            logits, weights = _by_length(self._function, teacher_logits, labels, cu_seqlens)
        offsets = pa.array(cu_seqlens.numpy())
        column = pa.array(logits.numpy(), from_pandas=True)  # NaN becomes null
        if self.replace:
            teachers = pa.ListArray.from_arrays(_steps(table.num_rows, 1), pa.array(["ensemble"] * table.num_rows))
            column = pa.ListArray.from_arrays(_steps(len(column), 1), column)
            table = _with_column(table, "teachers", teachers)
            table = _with_column(table, "teacher_logits", pa.ListArray.from_arrays(offsets, column))
        else:
            table = _with_column(table, "ensemble_logits", pa.ListArray.from_arrays(offsets, column))
        if self.keep_weights:
            values = pa.array(weights.to(torch.float32).contiguous().view(-1).numpy())
            values = pa.ListArray.from_arrays(_steps(*weights.shape), values)
            table = _with_column(table, "ensemble_weights", pa.ListArray.from_arrays(offsets, values))
        return table


def _with_column(table: pa.Table, name: str, column: pa.Array) -> pa.Table:
    if name in table.column_names:
        return table.set_column(table.column_names.index(name), name, column)
    return table.append_column(name, column)


def _steps(count: int, size: int) -> pa.Array:
    return pa.array(np.arange(0, count * size + 1, size, dtype=np.int32))


def _packed(table: pa.Table, *, labelled: bool, first_row: int = 0) -> tuple[Tensor, Tensor | None, Tensor]:
    """teacher_logits (D, M), labels (D,) or None, cu_seqlens (Q + 1,), without a copy where nothing is null."""
    lists = _column(table, "teacher_logits", _TABLES)
    if lists.null_count:
        row = int(np.argmax(lists.is_null().to_numpy(zero_copy_only=False)))
        raise ValueError(f"row {first_row + row + 1}: teacher_logits: expected a list per document, got null")
    cu_seqlens = _starts(lists)
    documents = lists.flatten()

    def fail(document: int, reason: str):
        row = int(np.searchsorted(cu_seqlens, document, side="right")) - 1
        raise ValueError(f"row {first_row + row + 1}: {reason.format(i=document - cu_seqlens[row])}")

    if documents.null_count:
        missing = int(np.argmax(documents.is_null().to_numpy(zero_copy_only=False)))
        fail(missing, "teacher_logits[{i}]: expected a list with an entry per teacher, got null")
    sizes = np.diff(_starts(documents))
    teachers = int(sizes[0]) if len(sizes) else 1
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
    labels, broken = _floats(lists.flatten())
    if not given.all():  # null for the whole row: nothing is labelled
        spread = torch.full((len(teacher_logits),), torch.nan)
        spread[torch.from_numpy(given.repeat(sizes))] = labels
        labels = spread
        broken = None if broken is None else int(np.flatnonzero(given.repeat(sizes))[broken])
    if broken is not None:
        fail(broken, f"labels[{{i}}]: expected a finite number, or null for unlabelled, got {labels[broken].item()}")
    return teacher_logits, labels, torch.from_numpy(cu_seqlens)


def _column(table: pa.Table, name: str, wanted: pa.DataType) -> pa.Array:
    if name not in table.column_names:
        raise ValueError(f"missing column {name}, there are {', '.join(table.column_names)}")
    column = table[name]
    leaf, depth = column.type, 0
    while pa.types.is_list(leaf) or pa.types.is_large_list(leaf) or pa.types.is_fixed_size_list(leaf):
        leaf, depth = leaf.value_type, depth + 1
    numeric = pa.types.is_floating(leaf) or pa.types.is_integer(leaf) or pa.types.is_boolean(leaf) or pa.types.is_null(leaf)
    if not numeric or (depth != (2 if wanted == _TABLES else 1) and not pa.types.is_null(leaf)):
        raise ValueError(f"column {name}: expected {'lists of ' * (wanted == _TABLES)}lists of numbers, got {column.type}")
    column = column.combine_chunks()
    return column if column.type == wanted else column.cast(wanted)


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


def _same_teachers(table: pa.Table, count: int, first_row: int, like: pa.Table) -> None:
    """Every row must have as many teachers as the first, and name the same ones, in one order, if it names them."""
    if like is not table and table.num_rows and (wanted := _packed(like, labelled=False)[0].shape[1]) != count:
        raise ValueError(f"row {first_row + 1}: teacher_logits: expected {wanted} teachers as in the first row, got {count}")
    if "teachers" not in table.column_names or table["teachers"].null_count == table.num_rows:
        return
    names = table["teachers"].combine_chunks()
    rows = np.flatnonzero(names.is_valid().to_numpy(zero_copy_only=False))
    lengths = np.diff(_starts(names))[rows]
    first = names[rows[0]] if like is table or not like["teachers"][0].is_valid else like["teachers"][0]
    wrong = lengths != count
    if not wrong.any() and len(first) == count:
        same = pa.compute.equal(names.flatten(), first.values.take(pa.array(np.tile(np.arange(count), len(rows)))))
        wrong = ~same.fill_null(False).to_numpy(zero_copy_only=False).reshape(-1, count).all(1)
    if wrong.any():
        row = int(rows[np.argmax(wrong)])
        wanted = first.as_py() if len(first) == count else f"{count} names"
        raise ValueError(f"row {first_row + row + 1}: teachers: expected {wanted}, got {names[row].as_py()}")


def _per_document(weights: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Weights of the teachers, of each query's teachers or of each document's, as those of each document."""
    lengths = cu_seqlens.diff()
    if weights.dim() == 1:
        return weights.expand(int(cu_seqlens[-1]), -1)
    if weights.shape[0] == int(cu_seqlens[-1]):
        return weights
    return weights.repeat_interleave(lengths, 0)


def _by_length(function: Callable, teacher_logits: Tensor, labels: Tensor | None, cu_seqlens: Tensor):
    """The function over queries of alike length at a time: it pads, and one long list must not pad thousands."""
    lengths = cu_seqlens.diff()
    ascending, order = lengths.sort(stable=True)
    logits, weights = torch.empty(len(teacher_logits)), torch.empty(teacher_logits.shape)
    start = 0
    while start < len(order):
        slots = (torch.arange(len(order) - start) + 1) * ascending[start:]
        end = start + max(1, int(torch.searchsorted(slots, _PADDED_SLOTS, right=True)))
        queries = order[start:end]
        sizes = lengths[queries]
        cu = torch.cat([sizes.new_zeros(1), sizes.cumsum(0)])
        places = torch.arange(int(cu[-1])) + (cu_seqlens[queries] - cu[:-1]).repeat_interleave(sizes)
        chosen = None if labels is None else labels[places]
        out = function(teacher_logits[places], chosen, cu_seqlens=cu)
        logits[places] = out.logits.to(torch.float32)
        weights[places] = _per_document(out.weights, cu).to(torch.float32)
        start = end
    return logits, weights


def read_columns(path: str | os.PathLike, columns: Iterable[str], *, format: str | None = None) -> pa.Table:
    """Some columns of a file's rows, in memory."""
    columns = list(columns)
    if (format or format_of(path)) != "parquet":
        return parquet.rows_to_table(read_rows(path, format=format)).select(columns)
    with parquet.open_parquet(Path(path)) as file:
        return file.read([name for name in columns if name in file.schema_arrow.names])


def ensemble_file(
    path: str | os.PathLike,
    output: str | os.PathLike,
    ensemble: OfflineEnsemble,
    *,
    format: str | None = None,
    progress: Callable[[int], None] = lambda rows: None,
) -> None:
    """Run an ensemble over a file of any size, a part at a time.

    A Parquet output is a `ResumableOutput`: killed, it goes on where it was. Another format is written in one go.

    Args:
        path: the rows, in any format `read_rows` knows.
        output: the file to write.
        ensemble: what to add to the rows.
        format: of the input; None = by the suffix.
        progress: called with the number of rows done since the last call.

    Raises:
        ValueError: a row is broken ("file:row 7: reason"), or the output was begun with other settings.
        OSError: a file cannot be read or written.
    """
    path, output = Path(path), Path(output)
    if output.exists() and path.exists() and os.path.samefile(path, output):
        raise ValueError(f"{output}: the output would replace the input")
    format = format or format_of(path)
    if format_of(output) != "parquet":
        tables = (ensemble(table) for _, _, table in _parts(path, format, set()))
        write_rows(output, (row for table in tables for row in _counted(table.to_pylist(), progress)))
        return
    settings = {"input": fingerprint(path), "format": format, "ensemble": ensemble.settings}
    with ResumableOutput(output, settings) as out, ThreadPoolExecutor(1) as writer:
        writing = None
        like = _first_row(path, format)
        for number, first_row, table in ahead(_parts(path, format, frozenset(out.done))):
            try:
                result = ensemble(table, first_row=first_row, like=like)
            except ValueError as error:
                raise ValueError(f"{path}:{error}") from None
            if writing is not None:
                writing.result()
            writing = writer.submit(out.write, number, result)
            progress(table.num_rows)
        if writing is not None:
            writing.result()
        out.finish()


def _first_row(path: Path, format: str) -> pa.Table:
    if format != "parquet":
        return parquet.rows_to_table([next(read_rows(path, format=format))])
    with parquet.open_parquet(path) as file:
        columns = [name for name in ("teacher_logits", "teachers") if name in file.schema_arrow.names]
        if not file.metadata.num_rows:
            raise ValueError(f"{path}: no rows")
        return next(parquet.read_tables(file, 0, 1, 1, columns))[1]


def _counted(rows: list[dict], progress: Callable[[int], None]) -> Iterator[dict]:
    yield from rows
    progress(len(rows))


def _parts(path: Path, format: str, done: frozenset[int]) -> Iterator[tuple[int, int, pa.Table]]:
    """(number, rows before it, table) of each part of a file that is not done; a part's rows depend on the file alone."""
    if format != "parquet":
        for number, table in enumerate(parquet.tables(read_rows(path, format=format))):
            if number not in done:
                yield number, number * parquet.ROWS_PER_TABLE, table
        return
    with parquet.open_parquet(path) as file:
        size, total = parquet.rows_at_a_time(file), file.metadata.num_rows
        todo = [number for number in range(-(-total // size)) if number not in done]
        while todo:
            run = next((i for i in range(1, len(todo)) if todo[i] != todo[0] + i), len(todo))
            start, stop = todo[0] * size, min((todo[run - 1] + 1) * size, total)
            yield from (
                (first_row // size, first_row, table) for first_row, table in parquet.read_tables(file, start, stop, size)
            )
            todo = todo[run:]
