"""What ``pile-fast evaluate`` reads: systems and judgements, as tensors of all documents, queries one after the other."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import math
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pile_fast.cli.common import load_ranker
from pile_fast.cli.errors import UserError, user_errors
from pile_fast.data import BadRows, read_rows
from pile_fast.data.files import DAMAGED, open_bytes
from pile_fast.data.formats import format_of, stem
from pile_fast.data.qrels import read_qrels

QUERIES_AT_ONCE = 64  # read, then scored by the models, so that texts of the whole file are never in memory
_LARGEST_FLOAT32 = float(np.finfo(np.float32).max)

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

    def __init__(self):
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
        names: list[str],
        listed: Iterable[tuple[System, Sequence[float | None]]],
        runs: Iterable[tuple[System, Run]],
        labels: Sequence[float | None] | dict[str, float],
    ) -> None:
        """A query.

        Args:
            names: its documents in the file of rows.
            listed: systems with a score for each of `names`, None = not scored.
            runs: systems with their runs.
            labels: for each of `names`, None = unlabelled; or the query's grades in the qrels.
        """
        scores = [(system, run.get(query_id, {})) for system, run in runs]
        others = [found for _, found in scores if found]
        if isinstance(labels, dict):
            others.append(labels)
        if others:
            seen = set(names)
            names = names + [name for name in dict.fromkeys(itertools.chain(*others)) if name not in seen]
        order = sorted(range(len(names)), key=names.__getitem__, reverse=True)
        for system, values in listed:
            known = len(values)
            system.column.extend([
                math.nan if d >= known or values[d] is None else values[d] for d in order
            ])  # fmt: skip
        for system, found in scores:
            system.column.extend([found.get(names[d], math.nan) for d in order])
        if isinstance(labels, dict):
            self._labels.extend([labels.get(names[d], math.nan) for d in order])
        else:
            known = len(labels)
            self._labels.extend([math.nan if d >= known or labels[d] is None else labels[d] for d in order])
        self.query_ids.append(query_id)
        self._lengths.append(len(names))


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
    models = [(inputs.add_system("model", name, path), _load_model(name, path, args)) for name, path in args.model]
    if qrels is not None:
        _check_shared(args.qrels, qrels, runs)

    judged = False
    seen: set[str] = set()
    for batch in _batches(_progress(itertools.chain([first], rows) if first else ())):
        scored = [(system, _model_scores(system, ranker, batch, names, args)) for system, ranker in models]
        for i, row in enumerate(batch):
            query_id = row["query_id"]
            if columns and row["ensemble_logits"] is None:
                raise UserError(f"--column ensemble_logits: query {query_id} of {names} has no such column")
            listed = [(system, [logits[m] for logits in row["teacher_logits"]]) for m, system in enumerate(teachers)]
            listed += [(system, row[system.name]) for system in columns]
            listed += [(system, scores[i].tolist()) for system, scores in scored]
            labels = row["labels"] if qrels is None else qrels.get(query_id, {})
            judged = judged or any(label is not None for label in labels)
            inputs.add_query(query_id, row["doc_ids"], listed, runs, labels)
            seen.add(query_id)
    if first and not judged:
        if qrels is not None:
            raise UserError(_none_shared(args.qrels, qrels, names, first["query_id"]))
        raise UserError(f"{names}: no labels; judgements can come from --qrels FILE")
    for system, run in runs:
        if qrels is None and not seen & run.keys():
            raise UserError(f"--run {system.name}={system.source}: none of its queries is in {names}")
    others = dict.fromkeys(itertools.chain(*(run for _, run in runs), qrels or ()))
    unscored = [(system, ()) for system in (*teachers, *columns, *(system for system, _ in models))]
    for query_id in others:
        if query_id not in seen:
            inputs.add_query(query_id, [], unscored, runs, {} if qrels is None else qrels.get(query_id, {}))
    return inputs


def _by_format(args: argparse.Namespace) -> tuple[list[str], list[tuple[str, str]]]:
    """The files of rows, and (name, path) of the runs, those of --run last."""
    is_run = {path: (args.source or format_of(path)) == "trec" for path in args.data}
    runs = [(stem(path), path) for path in args.data if is_run[path]]
    return [path for path in args.data if not is_run[path]], [*runs, *args.runs]


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
    run = _read_plain_run(Path(path))
    if run is None:
        run = {
            row["query_id"]: {name: logits[0] for name, logits in zip(row["doc_ids"], row["teacher_logits"], strict=True)}
            for row in read_rows(path, format="trec", bad_rows=bad_rows)
        }
    return run


def _read_plain_run(path: Path) -> Run | None:
    """A run without a flaw, read in a twentieth of the time; None if any line needs another look."""
    run: Run = {}
    count, last, documents = 0, None, {}
    with open_bytes(path) as file:
        try:
            for line in file:
                query, _, document, _, score, _ = line.split()
                if query != last:
                    last, documents = query, run.setdefault(query.decode(), {})
                value = float(score)
                if not -_LARGEST_FLOAT32 <= value <= _LARGEST_FLOAT32 or b"_" in score:
                    return None
                documents[document.decode()] = value
                count += 1
        except (ValueError, *DAMAGED):
            return None
    whole = count == sum(map(len, run.values())) > 0 and not next(iter(run)).startswith("\ufeff")
    return run if whole else None


def _progress(rows: Iterable[dict]) -> Iterable[dict]:
    from tqdm import tqdm

    return tqdm(rows, unit=" queries", disable=None)


def _batches(rows: Iterable[dict]) -> Iterator[list[dict]]:
    rows = iter(rows)
    while batch := list(itertools.islice(rows, QUERIES_AT_ONCE)):
        yield batch


def _load_model(name: str, path: str, args: argparse.Namespace) -> Callable:
    with user_errors(f"--model {name}"):
        return load_ranker(path, max_length=args.max_length, device=args.device)


def _model_scores(system: System, ranker, rows: list[dict], data: str, args: argparse.Namespace) -> list[Tensor]:
    try:
        return ranker.score(rows, batch_size=args.batch_size)
    except ValueError as error:
        raise UserError(f"--model {system.name}: {data}: {error}") from error
