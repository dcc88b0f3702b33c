"""Ensembles over tables of rows, column by column, and over files of any size.

Columns stay in Arrow: what an ensemble does not need passes through as it is.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import itertools
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import pile_fast
from pile_fast.checks import choice
from pile_fast.data.files import ahead, refuse_same_file
from pile_fast.data.formats import format_of, write_rows
from pile_fast.data.missing import MISSING, many_missing, missing_as_bottom
from pile_fast.data.packed import orders_pairs, pack, teacher_names
from pile_fast.data.rows import RowChecker, default_names
from pile_fast.data.teacher_weights import TeacherWeights
from pile_fast.ensembles import NEEDS_LABELS, NEEDS_STUDENT, OFFLINE, best_teacher_ensemble, mean_ensemble
from pile_fast.extras import needs_extra
from pile_fast.functional import pile_ensemble
from pile_fast.loss import PILELoss
from pile_fast.offline.parts import DataSet, Part
from pile_fast.offline.resumable import ResumableOutput
from pile_fast.options import EnsembleOptions, ensemble_options

with needs_extra("train"):
    import pyarrow as pa

# (teacher_logits, labels, cu_seqlens), see `pack`.
Packed = tuple[Tensor, Tensor, Tensor]
# Methods that work on padded lists get at most this many slots at a time.
_PADDED_SLOTS = 2**20


class OfflineEnsemble:
    """An ensemble of `pile_fast.ensembles` as a function of Arrow tables. It pickles, for worker processes.

    Called with a table of rows (`teacher_logits`, `labels` where the method needs them, any other column) it returns the
    table with one more column, `ensemble_logits`: a number per document, null where no teacher scored it.

    Args:
        method: one of `pile_fast.ensembles.OFFLINE`, the methods that need no student.
        keep_weights: also add `ensemble_weights`, documents × teachers, as they are before they are rescaled to the
            teachers that scored a document.
        replace: put the ensemble in the place of the teachers, as the one teacher "ensemble", instead of adding a column.
        fit: a table with labels from which "pile" learns the weights that all queries share (None: from the rows themselves,
            see `fitted`), "stacking" its weights (required), and "best" the one teacher to take for all queries (None: it
            takes each query's best by the query's own labels). What is learnt of a teacher holds for the teacher of that name,
            in any order; by position only if neither side has names.
        weights: for "pile", weights that were learnt before, in the place of `fit`.
        missing: how to read a score that a teacher did not give: "nan" = it says nothing about the document, "bottom" = see
            `pile_fast.data.missing_as_bottom`. The column `teacher_logits` stays as it is.
        options: of the ensemble's function, e.g. ``iterations=5``. With granularity "query" or "document" PILE goes on from
            weights of `fit` or `weights` by each query's own labels.

    Attributes:
        learnt: the teachers' weights learnt from `fit`, or given; None = none yet.
        teachers: whose they are, or None.
        labelled_queries: how many queries they were learnt from, or None.

    Raises:
        ValueError, TypeError: an argument does not fit, or `fit` has no query with two documents whose labels differ; the
            message names it.

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
        weights: TeacherWeights | None = None,
        missing: str = "nan",
        **options: Any,
    ):
        if method in NEEDS_STUDENT:
            raise ValueError(f"method: {method} needs the student's logits, so it runs while the student is trained")
        if method not in OFFLINE:
            raise ValueError(f"method: expected one of {', '.join(OFFLINE)}, got {method!r}")
        if fit is None and method == "stacking":
            raise ValueError("fit: stacking needs data with labels to learn its weights from")
        if fit is not None and method not in ("stacking", "best", "pile"):
            raise ValueError(f"fit: {method} learns nothing from data, only stacking, best and pile do")
        if weights is not None and (method != "pile" or fit is not None):
            raise ValueError("weights: are for the method pile, and in the place of fit")
        self.method = method
        self.keep_weights = keep_weights
        self.replace = replace
        self.options = options
        self.missing = choice("missing", missing, MISSING)
        self.learnt: list[float] | None = None
        self.teachers: list[str] | None = None
        self.labelled_queries: int | None = None
        # Only PILE's weights that all queries share can be learnt from the rows themselves first.
        self._shared = method == "pile" and _options(options).granularity == "shared"
        if weights is not None:
            self.learnt, self.teachers = [*weights.weights.values()], [*weights.weights]
            self.labelled_queries = weights.labelled_queries
        self._function = self._make_function(None if fit is None else self._packed_fit(fit))
        # A choice that was learnt from other rows does not use the labels of these.
        self.needs_labels = method in NEEDS_LABELS and (self.learnt is None or method == "pile" and not self._shared)
        if self.learnt is None:  # wrong options raise now, not at the first table
            self._function(torch.zeros(2, 2), torch.zeros(2), cu_seqlens=torch.tensor([0, 2]))

    @property
    def fits_first(self) -> bool:
        """Whether weights that all queries share have to be learnt before a part of the rows can be done."""
        return self._shared and self.learnt is None and _options(self.options).iterations > 0

    def fitted(self, parts: Iterable[Packed], teachers: Sequence[str]) -> OfflineEnsemble:
        """The ensemble with the weights that all queries of the parts share. Without a pair of labels: equal ones, or `prior`.

        Args:
            parts: (teacher_logits, labels, cu_seqlens), as `pile_fast.data.packed.pack` makes them.
            teachers: their names.
        """
        copied = copy.copy(self)
        copied.teachers = list(teachers)
        copied._learn(self._read(part) for part in parts)
        copied._function, copied.needs_labels = copied._make_function(None), False
        return copied

    def _read(self, packed: Packed) -> Packed:
        teacher_logits, labels, cu_seqlens = packed
        if self.missing == "bottom":
            teacher_logits = missing_as_bottom(teacher_logits, cu_seqlens)
        return teacher_logits, labels, cu_seqlens

    def _learn(self, parts: Iterable[Packed]) -> None:
        """PILE's weights that all queries share, from the parts."""
        options = {
            name: value for name, value in self.options.items() if name in (*EnsembleOptions._fields, "prior", "backend")
        }
        if not self._shared:  # what it starts from; these two are of its own steps
            options = {name: value for name, value in options.items() if name not in ("iterations", "step_size")}
        loss = PILELoss(**options | {"granularity": "shared"})
        useful = (part for part in parts if orders_pairs(*part).any())
        first = next(useful, None)
        if first is None:
            prior = loss.prior if loss.prior is not None else torch.ones(len(self.teachers or [""]))
            self.learnt, self.labelled_queries = (prior / prior.sum()).tolist(), 0
            return
        loss.fit(((logits, labels, None, starts) for logits, labels, starts in itertools.chain([first], useful)), sharded=False)
        self.learnt, self.labelled_queries = loss.weights.tolist(), int(loss.labelled_queries)

    def _packed_fit(self, fit: pa.Table) -> Packed:
        try:
            packed = self._read(pack(fit, labelled=True))
            self.teachers = teacher_names(fit, packed[0].shape[1])
        except ValueError as error:
            raise ValueError(f"fit: {error}") from None
        if not (pairs := orders_pairs(*packed)).any():
            raise ValueError(
                "fit: nothing to learn from, in no query two documents have labels that differ (and a teacher's logit)"
            )
        self.labelled_queries = int(pairs.sum())
        return packed

    def _make_function(self, fit: Packed | None) -> Callable:
        if fit is not None:
            teacher_logits, labels, cu_seqlens = fit
        if self.method == "pile":
            options = dict(self.options)
            if fit is not None:
                self._learn([fit])
            if self.learnt is not None:
                options |= {"prior": torch.tensor(self.learnt)} | ({"iterations": 0} if self._shared else {})
            return functools.partial(pile_ensemble, return_weights=self.keep_weights, **options)
        if self.method == "stacking":
            stacking = OFFLINE["stacking"](**self.options).fit(teacher_logits, labels, cu_seqlens=cu_seqlens)
            self.learnt = stacking.weights.tolist()
            return stacking
        if self.method == "best":
            if fit is None:
                return functools.partial(best_teacher_ensemble, selection="query", **self.options)
            best = best_teacher_ensemble(teacher_logits, labels, cu_seqlens=cu_seqlens, **self.options).weights
            self.learnt = best.tolist()
            calibration = {name: value for name, value in self.options.items() if name == "normalize"}
            return functools.partial(mean_ensemble, prior=best, **calibration)
        return functools.partial(OFFLINE[self.method], **self.options)

    @property
    def weights(self) -> TeacherWeights | None:
        """The weights that were learnt, by the teachers' names."""
        if self.learnt is None or self.teachers is None:
            return None
        return TeacherWeights(dict(zip(self.teachers, self.learnt, strict=True)), self.labelled_queries or 0, self.options)

    @property
    def settings(self) -> dict:
        """What decides the result, as JSON."""
        names = ("method", "options", "keep_weights", "replace", "learnt", "teachers", "missing")
        return {name: getattr(self, name) for name in names} | {"pile_fast": pile_fast.__version__}

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns it reads."""
        return ("teacher_logits", "labels") if self.needs_labels else ("teacher_logits",)

    def order(self, teachers: Sequence[str]) -> list[int] | None:
        """Where among a table's teachers those are whose weights were learnt, in their order; None = as they stand.

        Raises:
            ValueError: they are not the same ones.
        """
        if self.teachers is None or list(teachers) == self.teachers:
            return None
        unnamed = [list(names) == default_names(len(names)) for names in (teachers, self.teachers)]
        if all(unnamed):
            raise ValueError(f"teacher_logits: expected {len(self.teachers)} teachers as in fit, got {len(teachers)}")
        if any(unnamed):
            one, other = ("the rows", "fit") if unnamed[0] else ("fit", "the rows")
            raise ValueError(f"teachers: no names in {one}, but in {other}; name the teachers in both, or in neither")
        for name in self.teachers:
            if name not in teachers:
                raise ValueError(f"teachers: {name!r} of fit is missing, the rows have {', '.join(teachers)}")
        for name in teachers:
            if name not in self.teachers:
                raise ValueError(f"teachers: nothing is known of {name!r}, fit has {', '.join(self.teachers)}")
        return [list(teachers).index(name) for name in self.teachers]

    def __call__(self, table: pa.Table, *, first_row: int = 0, teachers: Sequence[str] | None = None) -> pa.Table:
        """The table with the ensemble.

        Args:
            table: rows.
            first_row: how many rows stand before the table's first, for the row numbers of error messages.
            teachers: the names that the rows' teachers must have, in this order; None = those of the first row.

        Raises:
            ValueError: a column is missing or a row is broken: "row 7: reason", counted from 1.
        """
        if self.fits_first:
            part = pack(table, labelled=True, first_row=first_row, teachers=len(teachers or [""]))
            names = teacher_names(table, part[0].shape[1], first_row=first_row, expected=teachers)
            return self.fitted([part], names)(table, first_row=first_row, teachers=teachers)
        expected = teachers or self.teachers or [""]
        labelled = self.needs_labels and (self.learnt is None or "labels" in table.column_names)
        packed = pack(table, labelled=labelled, first_row=first_row, teachers=len(expected))
        teacher_logits, labels, cu_seqlens = self._read(packed)
        if labels is None and self.method == "pile":
            labels = torch.full((len(teacher_logits),), torch.nan)
        count = teacher_logits.shape[1]
        names = teacher_names(table, count, first_row=first_row, expected=teachers)
        try:
            order = self.order(names) if len(teacher_logits) else None
        except ValueError as error:
            raise ValueError(f"row {first_row + 1}: {error}") from None
        if order is not None:
            teacher_logits = teacher_logits[:, order]
        if self.method == "pile":
            logits, weights, _ = self._function(teacher_logits, labels, cu_seqlens=cu_seqlens)
            if weights is not None:
                weights = _per_document(weights, cu_seqlens)
        else:
            logits, weights = _by_length(self._function, teacher_logits, labels, cu_seqlens)
        if order is not None and weights is not None:
            weights = weights[:, torch.tensor(order).argsort()]
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


def _options(given: dict[str, Any]) -> EnsembleOptions:
    return ensemble_options(**{name: value for name, value in given.items() if name in EnsembleOptions._fields})


class MissingScores:
    """How many of the teachers' scores are missing in the tables that came by."""

    def __init__(self) -> None:
        self.missing = self.scores = 0

    def add(self, table: pa.Table) -> None:
        scores = pa.compute.list_flatten(pa.compute.list_flatten(table["teacher_logits"]))
        self.missing += scores.null_count
        self.scores += len(scores)

    def warn(self, name: str, ensemble: OfflineEnsemble) -> None:
        """Say of a data set that they are many, if they are and nothing was done about it."""
        if ensemble.missing == "nan" and (text := many_missing(self.missing, self.scores)):
            warnings.warn(f"{name}: {text}", stacklevel=4)


def _with_column(table: pa.Table, name: str, column: pa.Array) -> pa.Table:
    if name in table.column_names:
        return table.set_column(table.column_names.index(name), name, column)
    return table.append_column(name, column)


def _steps(count: int, size: int) -> pa.Array:
    return pa.array(np.arange(0, count * size + 1, size, dtype=np.int32))


def _per_document(weights: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Weights of the teachers, of each query's teachers or of each document's, as those of each document."""
    lengths = cu_seqlens.diff()
    if weights.dim() == 1:
        return weights.expand(int(cu_seqlens[-1]), -1)
    if weights.shape[0] == int(cu_seqlens[-1]):
        return weights
    return weights.repeat_interleave(lengths, 0)


def _by_length(function: Callable, teacher_logits: Tensor, labels: Tensor | None, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
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


def read_fit(paths: str | os.PathLike | Sequence[str | os.PathLike], **options: Any) -> pa.Table:
    """What `OfflineEnsemble` learns from, in memory: logits, labels and names of the teachers of a data set.

    Args:
        paths, options: see `pile_fast.offline.parts.DataSet`.

    Raises:
        ValueError: a row is broken: "file: row 7: reason", or the teachers are not the same in all rows.
        OSError: a file cannot be read.
    """
    tables, names = [], None
    for part in DataSet(paths, **options).parts(columns=("teacher_logits", "labels", "teachers")):
        with _located(part.path):
            teacher_logits, _, _ = pack(part.table, labelled=True, first_row=part.first_row)
            names = teacher_names(part.table, teacher_logits.shape[1], first_row=part.first_row, expected=names)
        tables.append(part.table)
    return pa.concat_tables(tables)


def ensemble_file(
    paths: str | os.PathLike | Sequence[str | os.PathLike],
    output: str | os.PathLike,
    ensemble: OfflineEnsemble,
    *,
    format: str | None = None,
    progress: Callable[[int], None] = lambda rows: None,
    **options: Any,
) -> OfflineEnsemble:
    """Run an ensemble over a data set of any size, a part at a time.

    PILE's weights that all queries share are learnt first, from the labelled queries of the whole data set, unless the ensemble
    has some: a pass over teachers and labels, which are held in memory. With what the fit makes of them, that is some 200 bytes
    a labelled document for 4 teachers. So the result does not depend on the parts.

    A Parquet output is a `ResumableOutput`: it resumes after a kill. Other formats are written in one pass.

    Args:
        paths: the rows: a file in any format `pile_fast.data.read_rows` knows, several of one format (TREC: a run per
            teacher), or a folder of Parquet files, taken in the order of their names.
        output: the file to write.
        ensemble: what to add to the rows.
        format: of the input; None = by the suffix.
        progress: called with the number of rows done since the last call.
        options: of the input's format, see `pile_fast.data.read_rows`.

    Returns:
        The ensemble that was run, with what it learnt.

    Warns:
        UserWarning: the method goes by labels, and in no query two documents have labels that differ; or more than a third of
            the teachers' scores are missing, of those that this run read.

    Raises:
        ValueError: a row is broken ("file: row 7: reason"), its teachers are not those of the first row or of what the
            ensemble was fitted to, the method needs labels and there are none, the output was begun with other settings, or
            an input changed while it was read.
        OSError: a file cannot be read or written.
    """
    output = Path(output)
    data = DataSet(paths, format=format, **options)
    refuse_same_file(output, data.files)
    target = format_of(output)
    ensemble = prepare(data, ensemble)
    missing = MissingScores()
    settings = {"input": data.fingerprint(), "format": data.format, "ensemble": ensemble.settings}
    if target != "parquet":
        tables = ensemble_tables(data, ensemble, missing=missing)

        # JSON lines take any column; other formats have room for what the schema has, so for its rows alone.
        checked = (lambda row: row) if target == "jsonl" else RowChecker()

        def rows() -> Iterator[dict]:
            for part, table in tables:
                for number, row in enumerate(table.to_pylist(), part.first_row + 1):
                    with _located(f"{part.path}: row {number}"):
                        row = checked(row)
                    yield row
                progress(table.num_rows)
            _check_unchanged(data, settings)

        write_rows(output, rows(), format=target)
        missing.warn(data.name, ensemble)
        return ensemble
    with ResumableOutput(output, settings) as out:
        try:
            _write_parts(out, ensemble_tables(data, ensemble, frozenset(out.done), missing), progress)
            _check_unchanged(data, settings)
        except ValueError:
            out.discard()  # only a changed input can help, and with that nothing resumes
            raise
        out.finish()
    missing.warn(data.name, ensemble)
    return ensemble


def _write_parts(out: ResumableOutput, tables: Iterator[tuple[Part, pa.Table]], progress: Callable[[int], None]) -> None:
    """One part is written while the next is made."""
    with ThreadPoolExecutor(1) as writer:
        writing = None
        for part, table in tables:
            if writing is not None:
                writing.result()
            writing = writer.submit(out.write, part.number, table)
            progress(table.num_rows)
        if writing is not None:
            writing.result()


def prepare(data: DataSet, ensemble: OfflineEnsemble, missing: MissingScores | None = None) -> OfflineEnsemble:
    """What comes before the work: a data set has the columns, teachers and labels that an ensemble needs, and it has learnt.

    Args:
        missing: counts the scores of the rows, if they all have to be read here.

    Returns:
        The ensemble that any part of the data set can be given to.

    Warns, Raises: see `ensemble_file`.
    """
    optional = ensemble.learnt or ensemble.fits_first  # learnt weights mean something without labels, too
    for name in ensemble.columns:
        if data.columns is not None and name not in data.columns and not (name == "labels" and optional):
            raise ValueError(f"{data.name}: missing column {name}, there are {', '.join(data.columns)}")
    if ensemble.teachers is not None and (teachers := first_teachers(data)) is not None:
        with _located(data.name):
            ensemble.order(teachers)
    if ensemble.fits_first:
        return _fitted_to(data, ensemble, missing)
    if ensemble.needs_labels and not optional:
        _check_labels(data, ensemble)
    return ensemble


def _fitted_to(data: DataSet, ensemble: OfflineEnsemble, missing: MissingScores | None) -> OfflineEnsemble:
    names = first_teachers(data) or default_names(1)

    def parts() -> Iterator[Packed]:
        for part in ahead(data.parts(columns=("teacher_logits", "labels", "teachers"))):
            with _located(part.path):
                labelled = "labels" in part.table.column_names
                logits, labels, starts = pack(part.table, labelled=labelled, first_row=part.first_row, teachers=len(names))
                teacher_names(part.table, logits.shape[1], first_row=part.first_row, expected=names)
            if missing is not None:
                missing.add(part.table)
            yield logits, torch.full((len(logits),), torch.nan) if labels is None else labels, starts

    fitted = ensemble.fitted(parts(), names)
    if not fitted.labelled_queries:
        warnings.warn(
            f"{data.name}: in no query two documents have labels that differ, and the method {ensemble.method} goes by such "
            "pairs: all teachers count the same, as in the mean",
            stacklevel=4,
        )
    return fitted


def _check_labels(data: DataSet, ensemble: OfflineEnsemble) -> None:
    labelled = False
    for part in data.parts(columns=("teacher_logits", "labels")):
        with _located(part.path):
            packed = pack(part.table, labelled=True, first_row=part.first_row)
        if orders_pairs(*packed).any():
            return
        labelled = labelled or not packed[1].isnan().all()
    if not labelled:
        raise ValueError(
            f"{data.name}: no document has a label, and the method {ensemble.method} goes by labels"
            f"{' (of runs: by qrels)' if data.format == 'trec' else ''}; mean, rrf and ebkd need none"
        )
    warnings.warn(
        f"{data.name}: in no query two documents have labels that differ, and the method {ensemble.method} goes by such pairs",
        stacklevel=4,
    )


def _check_unchanged(data: DataSet, settings: dict) -> None:
    if data.fingerprint() != settings["input"]:
        raise ValueError(f"{data.name}: changed while it was read, so nothing was written; run it again")


def ensemble_tables(
    data: DataSet, ensemble: OfflineEnsemble, done: frozenset[int] = frozenset(), missing: MissingScores | None = None
) -> Iterator[tuple[Part, pa.Table]]:
    """Each part that is not done, and its rows with the ensemble; `missing` counts their scores.

    Raises:
        ValueError: see `ensemble_file`.
    """
    teachers = first_teachers(data) if done else None
    for part in ahead(data.parts(done)):
        teachers = teachers or _first_teachers(part)
        with _located(part.path):
            table = ensemble(part.table, first_row=part.first_row, teachers=teachers)
        if missing is not None:
            missing.add(part.table)
        yield part, table


def first_teachers(data: DataSet) -> list[str] | None:
    """The teachers' names in the first row with a document, which are those of all rows; None without any document."""
    parts = data.parts(columns=("teacher_logits", "teachers"))
    return next((names for part in parts if (names := _first_teachers(part))), None)


def _first_teachers(part: Part) -> list[str] | None:
    with _located(part.path):
        _, _, cu_seqlens = pack(part.table, labelled=False, first_row=part.first_row)
        filled = cu_seqlens.diff().nonzero()
        if not len(filled):
            return None
        row, number = part.table.slice(int(filled[0]), 1), part.first_row + int(filled[0])
        teacher_logits, _, _ = pack(row, labelled=False, first_row=number)
        return teacher_names(row, teacher_logits.shape[1], first_row=number)


@contextlib.contextmanager
def _located(where: str) -> Iterator[None]:
    """Errors with the file before the row."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
