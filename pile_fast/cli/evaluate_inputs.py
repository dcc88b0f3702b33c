"""What ``pile-fast evaluate`` reads: systems and judgements, as tensors of all documents, queries one after the other."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import gc
import itertools
import math
from array import array
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pile_fast.cli.common import load_ranker, progress
from pile_fast.cli.errors import UserError
from pile_fast.data import BadRows, read_rows
from pile_fast.data.files import DAMAGED, open_bytes
from pile_fast.data.formats import format_of, stem
from pile_fast.data.qrels import read_qrels

QUERIES_AT_ONCE = 64  # read, then scored by the models, so that texts of the whole file are never in memory
_LARGEST_FLOAT32 = float(np.finfo(np.float32).max)
_LARGEST_EXACT = 2.0**53

Run = dict[str, dict[str, float]]


@dataclasses.dataclass
class System:
    """A ranker to evaluate, and its scores (NaN = not returned) of the documents read so far."""

    kind: str  # "teacher", "column", "model", "run"
    name: str
    source: str
    column: array = dataclasses.field(default_factory=lambda: array("f"))  # trec_eval, too, compares scores in float32

    @property
    def scores(self) -> Tensor:
        return torch.from_numpy(np.array(self.column))


class Inputs:
    """The documents of all queries: those that were judged and those that any system returned.

    A query's documents come in descending order of their names, so that a stable sort by score breaks ties as trec_eval
    does. (It compares names byte by byte; the code points of UTF-8 are in the same order.)

    Attributes:
        query_ids: Q names: the rows' queries, then those of the runs and of the qrels.
        systems: by name, in the order of the command line.
    """

    def __init__(self) -> None:
        self.query_ids: list[str] = []
        self.systems: dict[str, System] = {}
        self._lengths = [0]
        self._labels = array("d")

    @property
    def labels(self) -> Tensor:
        """(D,) float64, NaN = not judged."""
        return torch.from_numpy(np.array(self._labels))

    @property
    def cu_seqlens(self) -> Tensor:
        return torch.tensor(self._lengths).cumsum(0)

    def add_system(self, kind: str, name: str, source: str) -> System:
        if name in self.systems:
            raise UserError(
                f"two systems are called {name!r}: {self.systems[name].source} and {source}; --run NAME=FILE names a run"
            )
        self.systems[name] = System(kind, name, source)
        return self.systems[name]

    def add_query(
        self,
        query_id: str,
        documents: Iterable[str],
        found: Iterable[tuple[System, dict[str, float]]],
        labels: dict[str, float],
    ) -> None:
        """A query.

        Args:
            documents: those it has in a file of rows; the others are those of `found` and `labels`.
            found: every system's scores of the documents that it returned.
            labels: of the documents that were judged.
        """
        names = sorted({*documents, *labels, *itertools.chain.from_iterable(scores for _, scores in found)}, reverse=True)
        for system, scores in found:
            system.column.extend(map(scores.get, names, _NOTHING))
        self._labels.extend(map(labels.get, names, _NOTHING))
        self.query_ids.append(query_id)
        self._lengths.append(len(names))


_NOTHING = itertools.repeat(math.nan)


def _known(names: Sequence[str], values: Sequence[float | None]) -> dict[str, float]:
    return {name: value for name, value in zip(names, values, strict=True) if value is not None}


@contextlib.contextmanager
def _without_garbage_collection() -> Iterator[None]:
    """Millions of objects that all stay: looking through them for garbage again and again takes longer than making them."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@_without_garbage_collection()
def read_inputs(args: argparse.Namespace, bad_rows: BadRows | None) -> Inputs:
    """All that the command line names.

    Raises:
        UserError: systems, queries or judgements do not fit together.
        ValueError, OSError: a file is broken.
    """
    data, run_files = _by_format(args)
    if not data:
        _refuse_without_rows(args, run_files)
    inputs = Inputs()
    qrels = _read_qrels(args.qrels, bad_rows) if args.qrels else None
    rows = read_rows(data, format=args.source, bad_rows=bad_rows) if data else iter(())
    first = next(rows, None)
    names = ", ".join(data)
    teachers = [inputs.add_system("teacher", name, names) for name in first["teachers"]] if first and args.teachers else []
    if first and args.teachers and not teachers and not run_files:
        raise UserError(f"--teachers: {names} has no teachers")
    columns = [inputs.add_system("column", name, names) for name in dict.fromkeys(args.column)]
    runs = [(inputs.add_system("run", name, path), read_run(path, bad_rows)) for name, path in run_files]
    models = [
        (inputs.add_system("model", name, path), load_ranker(path, max_length=args.max_length, device=args.device))
        for name, path in args.model
    ]
    if qrels is not None:
        _check_shared(args.qrels, qrels, runs)

    judged = False
    seen: set[str] = set()
    for batch in _batches(progress(itertools.chain([first], rows) if first else ())):
        scored = [(system, _model_scores(system, ranker, batch, names, args)) for system, ranker in models]
        for i, row in enumerate(batch):
            query_id = row["query_id"]
            if columns and row["ensemble_logits"] is None:
                raise UserError(f"--column ensemble_logits: query {query_id!r} of {names} has no such column")
            documents = row["doc_ids"]
            listed = [(system, [logits[m] for logits in row["teacher_logits"]]) for m, system in enumerate(teachers)]
            listed += [(system, row[system.name]) for system in columns]
            listed += [(system, scores[i].tolist()) for system, scores in scored]
            found = [(system, _known(documents, values)) for system, values in listed]
            found += [(system, run.get(query_id, {})) for system, run in runs]
            labels = _known(documents, row["labels"]) if qrels is None else qrels.get(query_id, {})
            judged = judged or bool(labels)
            inputs.add_query(query_id, documents, found, labels)
            seen.add(query_id)
    if first and not judged:
        if qrels is not None:
            raise UserError(_none_shared(args.qrels, qrels, names, first["query_id"]))
        raise UserError(f"{names}: no labels; judgements can come from --qrels FILE")
    for system, run in runs:
        if qrels is None and not seen & run.keys():
            raise UserError(f"--run {system.name}={system.source}: none of its queries is in {names}")
    others = dict.fromkeys(itertools.chain(*(run for _, run in runs), qrels or ()))
    without: list[tuple[System, dict[str, float]]] = [
        (system, {}) for system in (*teachers, *columns, *(system for system, _ in models))
    ]
    grades = qrels or {}
    for query_id in others:
        if query_id not in seen:
            found = [*without, *((system, run.get(query_id, {})) for system, run in runs)]
            inputs.add_query(query_id, (), found, grades.get(query_id, {}))
    return inputs


def _by_format(args: argparse.Namespace) -> tuple[list[str], list[tuple[str, str]]]:
    """The files of rows, and (name, path) of the runs, those of --run last."""
    is_run = {path: _is_run(path, args) for path in args.data}
    runs = [(stem(path), path) for path in args.data if is_run[path]]
    return [path for path in args.data if not is_run[path]], [*runs, *args.runs]


def _is_run(path: str, args: argparse.Namespace) -> bool:
    if args.source or Path(path).is_dir():  # a folder holds Parquet files
        return args.source == "trec"
    # Runs often have the suffix of LETOR, .txt, or none that tells. With qrels and nothing else to score, they are runs.
    runs_alone = args.qrels and not (args.teachers or args.column or args.model)
    try:
        format = format_of(path)
    except ValueError:
        if runs_alone:
            return True
        raise
    return format == "trec" or bool(runs_alone) and format == "letor"


def _refuse_without_rows(args: argparse.Namespace, runs: list[tuple[str, str]]) -> None:
    for given, flag in ((args.model, "--model"), (args.column, "--column")):
        if given:
            raise UserError(f"{flag}: needs a file of queries as DATA; a run holds none to read")
    if not runs:
        raise UserError("nothing to evaluate: give DATA, runs or a file of queries, or --run NAME=FILE")
    if not args.qrels:
        raise UserError(f"{runs[0][1]}: a run has no labels: give --qrels FILE")


def _check_shared(path: str, qrels: Run, runs: list[tuple[System, Run]]) -> None:
    for system, run in runs:
        if not run.keys() & qrels.keys():
            raise UserError(_none_shared(path, qrels, f"the run {system.source}", next(iter(run))))


def _none_shared(path: str, qrels: Run, other: str, query_id: str) -> str:
    return f"--qrels {path}: none of its queries is in {other}: here they are such as {next(iter(qrels))!r}, there {query_id!r}"


def _read_qrels(path: str, bad_rows: BadRows | None) -> Run:
    qrels = _read_plain(Path(path), 4, 3, _LARGEST_EXACT)
    if qrels is None:
        qrels = {query: grades for query, grades in read_qrels(Path(path), bad_rows).items() if grades}
    if not qrels:
        raise UserError(f"--qrels {path}: no judgements")
    return qrels


def read_run(path: str, bad_rows: BadRows | None = None) -> Run:
    """Scores by query and document.

    Raises:
        ValueError: a line is broken, or a query's document comes twice.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: {'not a file' if Path(path).exists() else 'no such file'}")
    run = _read_plain(Path(path), 6, 4, _LARGEST_FLOAT32)
    if run is None:
        run = {
            row["query_id"]: {name: logits[0] for name, logits in zip(row["doc_ids"], row["teacher_logits"], strict=True)}
            for row in read_rows(path, format="trec", bad_rows=bad_rows)
        }
    return run


def _read_plain(path: Path, width: int, place: int, largest: float) -> Run | None:
    """Numbers by query and document of a file without a flaw, in a tenth of the time; None if any line needs another look.

    Args:
        width: fields of a line; the first is the query, the third the document.
        place: where the number is among them.
        largest: number.
    """
    found: Run = {}
    count, last, documents = 0, None, {}
    with open_bytes(path) as file:
        try:
            for line in file:
                fields = line.split()
                value = fields[place]
                number = float(value)
                if len(fields) != width or b"_" in value or not -largest <= number <= largest:
                    return None
                if fields[0] != last:
                    last = fields[0]
                    documents = found.setdefault(last.decode(), {})
                documents[fields[2].decode()] = number
                count += 1
        except (ValueError, IndexError, *DAMAGED):
            return None
    whole = count == sum(map(len, found.values())) > 0 and not next(iter(found)).startswith("\ufeff")
    return found if whole else None


def _batches(rows: Iterable[dict]) -> Iterator[list[dict]]:
    rows = iter(rows)
    while batch := list(itertools.islice(rows, QUERIES_AT_ONCE)):
        yield batch


def _model_scores(system: System, ranker: Any, rows: list[dict], data: str, args: argparse.Namespace) -> list[Tensor]:
    try:
        return ranker.score(rows, batch_size=args.batch_size)
    except ValueError as error:
        raise UserError(f"--model {system.name}: {data}: {error}") from error
