"""TREC: run files, one per teacher, with qrels and, optionally, the texts.

A run's lines are ``query Q0 document rank score tag``, or ``query document rank`` as for MS MARCO.

Runs may be larger than memory. They are not read as a whole: an index says where a query's lines are, and each query is read
from all runs at once.
"""

from __future__ import annotations

import contextlib
import math
import shutil
import tempfile
from array import array
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from pile_fast.data.files import DAMAGED, atomic_path, decode, fields, open_bytes, open_text
from pile_fast.data.formats import stem
from pile_fast.data.qrels import field, read_qrels
from pile_fast.data.rows import BadRows, DataError, RowChecker, parse_count, parse_number, reject, scores_of

# By the number of fields.
_LAYOUTS = {6: "query Q0 document rank score tag", 3: "query document rank"}


def read_rows(
    paths: list[Path],
    bad_rows: BadRows | None = None,
    *,
    teachers: Sequence[str] | None = None,
    qrels: Path | None = None,
    unjudged: float | None = None,
    queries: Path | None = None,
    documents: Path | None = None,
) -> Iterator[dict]:
    """A row per query of any run; its documents are those of any run, in the runs' order.

    Args:
        paths: runs. Where they give ranks alone, a document's score is minus its rank.
        teachers: a name per run; None = the files' names without the suffixes of format and compression.
        qrels: ``query iteration document grade``.
        unjudged: the label of what the qrels do not list; None = unlabelled.
        queries, documents: names and texts, tab-separated; of further columns the text is all, joined.

    Raises:
        DataError: see `pile_fast.data.read_rows`; the qrels have no query of the runs, or no document at all.
    """
    teachers = _names(paths, teachers)
    if unjudged is not None and not math.isfinite(unjudged):
        raise ValueError(f"unjudged: expected a finite label, got {unjudged}")
    grades = _read_grades(qrels, bad_rows) if qrels else {}
    query_texts = _read_texts(queries, bad_rows) if queries else {}
    check = RowChecker()
    with contextlib.ExitStack() as files:

        def index(path: Path, separator: str | None) -> _Index:
            return files.enter_context(contextlib.closing(_Index(path, bad_rows, separator)))

        texts = index(documents, "\t") if documents else None
        runs = [index(path, None) for path in paths]
        names = dict.fromkeys(query for run in runs for query in run.places)
        if qrels and names and not names.keys() & grades.keys():
            raise DataError(qrels, f"judges no query of the runs: theirs are such as {next(iter(names))!r}, "
                            f"here such as {next(iter(grades))!r}")  # fmt: skip
        labelled = unlabelled = 0
        for query in names:
            scores = _combine(query, runs, bad_rows)
            judged = grades.get(query, {})
            row: dict[str, Any] = {
                "query_id": query,
                "query": query_texts.get(query),
                "doc_ids": list(scores),
                "labels": [judged.get(document, unjudged) for document in scores],
                "teacher_logits": list(scores.values()),
                "teachers": teachers,
            }
            try:
                if queries and query not in query_texts:
                    raise ValueError(f"query {query!r}: no text in {queries}")
                if texts:
                    row["documents"] = [_document_text(texts, document) for document in scores]
                row = check(row)
            except ValueError as error:
                reject(bad_rows, next(run.where(query) for run in runs if query in run.places), error)
                continue
            missing = row["labels"].count(None)
            labelled, unlabelled = labelled + len(row["labels"]) - missing, unlabelled + missing
            yield row
        if qrels and unlabelled and not labelled:
            raise DataError(qrels, f"judges none of the runs' {unlabelled} documents, so all would be unlabelled")


def named_runs(arguments: Sequence[str]) -> tuple[list[Path], list[str] | None]:
    """(files, teachers' names) of a command's arguments, each a FILE or NAME=FILE; None if no argument names its teacher.

    An argument that is the name of a file is taken as one, so names of files may have an "=".
    """
    paths, names = [], []
    for argument in arguments:
        name, equals, file = argument.partition("=")
        named = bool(name and equals and file) and not Path(argument).exists() and Path(file).exists()
        paths.append(Path(file if named else argument))
        names.append(name if named else None)
    if not any(names):
        return paths, None
    return paths, [name or stem(path) for name, path in zip(names, paths, strict=True)]


def _names(paths: list[Path], teachers: Sequence[str] | None) -> list[str]:
    names = [stem(path) for path in paths] if teachers is None else list(teachers)
    if len(names) != len(paths):
        raise ValueError(f"teachers: expected {len(paths)} names, one per run, got {len(names)}")
    if len(set(names)) != len(names):
        raise ValueError(f"teachers: expected runs of different names, got {', '.join(map(repr, names))}; name them NAME=FILE")
    return names


def _read_grades(qrels: Path, bad_rows: BadRows | None) -> dict[str, dict[str, float]]:
    before = (bad_rows.count, len(bad_rows.reasons)) if bad_rows is not None else (0, 0)
    grades = read_qrels(qrels, bad_rows)
    if not grades:
        reasons = bad_rows.reasons[before[1] :][:1] if bad_rows is not None else []
        raise DataError(qrels, "no judgements" + "".join(f": all lines are broken, the first: {first}" for first in reasons))
    return grades


def _combine(query: str, runs: list[_Index], bad_rows: BadRows | None) -> dict[str, list[float | None]]:
    """The runs' scores of each document of any of them."""
    scores: dict[str, list[float | None]] = {}
    for m, run in enumerate(runs):
        for where, line in run.lines(query):
            try:
                document, score = _parse_run(line, run.layout)
                row = scores.setdefault(document, [None] * len(runs))
                if row[m] is not None:
                    raise ValueError(f"query {query!r}, document {document!r}: appears twice in the run")
                row[m] = score
            except ValueError as error:
                reject(bad_rows, where, error)
    return scores


def write_rows(path: Path, rows: Iterable[dict], *, teacher: str | None = None) -> None:
    """A run of one teacher, its best document first; what it did not score is left out.

    Args:
        teacher: see `scores_of`.

    Raises:
        ValueError: a name has spaces, or the teacher scored nothing.
    """
    empty = True
    with atomic_path(path) as temporary, open_text(temporary) as file:
        for row in rows:
            name, logits = scores_of(row, teacher)
            tag = "_".join(name.split())
            scored = [(logit, document) for document, logit in zip(row["doc_ids"], logits, strict=True) if logit is not None]
            empty = empty and not scored
            for rank, (logit, document) in enumerate(sorted(scored, key=lambda pair: -pair[0]), 1):
                file.write(f"{field(row, row['query_id'])} Q0 {field(row, document)} {rank} {float(logit)!r} {tag}\n")
        if empty:
            raise ValueError("there are no scores to write as a run")


def _parse_run(line: str, layout: int) -> tuple[str, float]:
    cells = line.encode().split()  # at ASCII blanks, as `fields`, which would decode all of them
    if len(cells) != layout:
        raise ValueError(f"expected {_LAYOUTS[layout]!r}, got {line.strip()[:60]!r}")
    if layout == 6:
        return cells[2].decode(), parse_number("score", cells[4].decode())
    rank = parse_count("rank", cells[2].decode())
    if rank < 1:
        raise ValueError(f"rank: expected 1 or more, got {rank}")
    return cells[1].decode(), -float(rank)


def _read_texts(path: Path, bad_rows: BadRows | None) -> dict[str, str]:
    with contextlib.closing(_Index(path, bad_rows, "\t")) as index:
        return {name: _text(line) for name in index.places for _, line in index.lines(name)}


def _text(line: str) -> str:
    return " ".join(line.rstrip("\r\n").split("\t")[1:])


def _document_text(texts: _Index, document: str) -> str:
    if document not in texts.places:
        raise ValueError(f"document {document!r}: no text in {texts.path}")
    return next(_text(line) for _, line in texts.lines(document))


class _Index:
    """A text file's lines by their first field: where they stand. In memory is an entry per name and block of its lines.

    Args:
        path: the file; a line that is not UTF-8 is broken.
        separator: of fields: a tab, and a name has one line; None = blanks, and a name may have several lines, which
            another name's may interrupt.

    Attributes:
        places: by name first byte, the byte after the last and number of the first line of each block.
        layout: how many fields a run's lines have, as its first good one: a key of `_LAYOUTS`.
    """

    def __init__(self, path: Path, bad_rows: BadRows | None, separator: str | None):
        self.path = path
        self.places: dict[str, array[int]] = {}
        self.layout: int = 0
        self._file = _seekable(path)
        last, position = None, 0
        for number, line in enumerate(self._file, 1):
            start, position = position, position + len(line)
            try:
                name = self._name(line, separator)
            except ValueError as error:
                reject(bad_rows, f"{path}:{number}", error)
                last = None
                continue
            if name is None:
                continue
            if name == last:
                self.places[name][-2] = position
            else:
                self.places.setdefault(name, array("q")).extend((start, position, number))
                last = name

    def _name(self, line: bytes, separator: str | None) -> str | None:
        text = decode(line)
        if not text.strip():
            return None
        if separator is None:
            if not self.layout:
                cells = fields(text)
                if len(cells) == 6 or (len(cells) == 3 and cells[2].isdecimal()):
                    self.layout = len(cells)
                else:
                    raise ValueError(f"expected {_LAYOUTS[6]!r} or {_LAYOUTS[3]!r}, got {text.strip()[:60]!r}")
            return text.encode().split(None, 1)[0].decode()
        name, found, _ = text.partition(separator)
        name = name.strip()
        if not found or not name:
            raise ValueError(f"expected 'name TAB text', got {text.strip()[:60]!r}")
        if name in self.places:
            raise ValueError(f"{name!r} appeared before; it has one text")
        return name

    def close(self) -> None:
        self._file.close()

    def where(self, name: str) -> str:
        return f"{self.path}:{self.places[name][2]}"

    def lines(self, name: str) -> Iterator[tuple[str, str]]:
        """("file:line", line) of a name."""
        places = self.places.get(name, ())
        for start, end, number in zip(places[::3], places[1::3], places[2::3], strict=True):
            self._file.seek(start)
            for offset, line in enumerate(self._file.read(end - start).split(b"\n")):
                if (text := decode(line)).strip():
                    yield f"{self.path}:{number + offset}", text


def _seekable(path: Path) -> IO[bytes]:
    """The file; a compressed one unpacked into a temporary file."""
    if path.suffix not in (".gz", ".xz"):
        return open(path, "rb")
    unpacked = tempfile.TemporaryFile()
    try:
        with open_bytes(path) as packed:
            shutil.copyfileobj(packed, unpacked)
    except DAMAGED as error:
        raise DataError(path, f"damaged file: {error}") from error
    unpacked.seek(0)
    return unpacked
