"""TREC: run files, one per teacher (``query Q0 document rank score tag``), with qrels and, optionally, the texts.

Runs may be larger than memory: they are not read but indexed, a query's lines by where they stand, and each query is read
from all runs at once.
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO

from pile_fast.data.files import DAMAGED, atomic_path, open_bytes, open_text, read_lines
from pile_fast.data.rows import BadRows, RowChecker, reject, scores_of


def read_rows(
    paths: list[Path],
    bad_rows: BadRows | None = None,
    *,
    qrels: Path | None = None,
    unjudged: float | None = None,
    queries: Path | None = None,
    documents: Path | None = None,
) -> Iterator[dict]:
    """A row per query of any run; its documents are those of any run, in the runs' order.

    Args:
        paths: runs; a teacher is called as its file, without suffixes.
        qrels: ``query iteration document grade``.
        unjudged: the label of what the qrels do not list; None = unlabelled.
        queries, documents: names and texts, tab-separated; of further columns the text is all, joined.
    """
    teachers = [path.name.split(".")[0] for path in paths]
    if len(set(teachers)) != len(teachers):
        raise ValueError(f"expected runs of different names, got {', '.join(teachers)}")
    grades = read_qrels(qrels, bad_rows) if qrels else {}
    query_texts = _read_texts(queries, bad_rows) if queries else {}
    check = RowChecker()
    with contextlib.ExitStack() as files:

        def index(path: Path, separator: str | None) -> _Index:
            return files.enter_context(contextlib.closing(_Index(path, bad_rows, separator)))

        texts = index(documents, "\t") if documents else None
        runs = [index(path, None) for path in paths]
        for query in dict.fromkeys(query for run in runs for query in run.places):
            scores = _combine(query, runs, bad_rows)
            judged = grades.get(query, {})
            row = {
                "query_id": query,
                "query": query_texts.get(query),
                "doc_ids": list(scores),
                "labels": [judged.get(document, unjudged) for document in scores],
                "teacher_logits": list(scores.values()),
                "teachers": teachers,
            }
            try:
                if queries and query not in query_texts:
                    raise ValueError(f"query {query}: no text in {queries}")
                if texts:
                    row["documents"] = [_document_text(texts, document) for document in scores]
                yield check(row)
            except ValueError as error:
                reject(bad_rows, next(run.where(query) for run in runs if query in run.places), error)


def _combine(query: str, runs: list[_Index], bad_rows: BadRows | None) -> dict[str, list[float | None]]:
    """The runs' scores of each document of any of them."""
    scores: dict[str, list[float | None]] = {}
    for m, run in enumerate(runs):
        for where, line in run.lines(query):
            try:
                document, score = _parse_run(line)
                row = scores.setdefault(document, [None] * len(runs))
                if row[m] is not None:
                    raise ValueError(f"query {query}, document {document}: appears twice in the run")
                row[m] = score
            except ValueError as error:
                reject(bad_rows, where, error)
    return scores


def write_rows(path: Path, rows: Iterable[dict], *, teacher: str | None = None) -> None:
    """A run of one teacher, its best document first; what it did not score is left out.

    Args:
        teacher: see `scores_of`.
    """
    with atomic_path(path) as temporary, open_text(temporary) as file:
        for row in rows:
            name, logits = scores_of(row, teacher)
            tag = "_".join(name.split())
            scored = [pair for pair in zip(row["doc_ids"], logits, strict=True) if pair[1] is not None]
            for rank, (document, logit) in enumerate(sorted(scored, key=lambda pair: -pair[1]), 1):
                for text in (row["query_id"], document):
                    if text.split() != [text]:
                        raise ValueError(f"query {row['query_id']}: a run cannot hold names with spaces, as {text!r}")
                file.write(f"{row['query_id']} Q0 {document} {rank} {logit!r} {tag}\n")


def _parse_run(line: str) -> tuple[str, float]:
    fields = line.split()
    if len(fields) != 6:
        raise ValueError(f"expected 'query Q0 document rank score tag', got {line.strip()[:60]!r}")
    try:
        return fields[2], float(fields[4])
    except ValueError:
        raise ValueError(f"score: expected a number, got {fields[4]!r}") from None


def read_qrels(path: Path, bad_rows: BadRows | None = None) -> dict[str, dict[str, float]]:
    """Grades by query and document of a file of ``query iteration document grade``."""
    grades: dict[str, dict[str, float]] = {}
    for number, line in read_lines(path, bad_rows):
        fields = line.split()
        if not fields:
            continue
        try:
            if len(fields) != 4:
                raise ValueError(f"expected 'query iteration document grade', got {line.strip()[:60]!r}")
            query, _, document, grade = fields
            try:
                value = float(grade)
            except ValueError:
                raise ValueError(f"grade: expected a number, got {grade!r}") from None
            if grades.setdefault(query, {}).setdefault(document, value) != value:
                raise ValueError(f"query {query}, document {document}: appears twice, with different grades")
        except ValueError as error:
            reject(bad_rows, f"{path}:{number}", error)
    return grades


def _read_texts(path: Path, bad_rows: BadRows | None) -> dict[str, str]:
    with contextlib.closing(_Index(path, bad_rows, "\t")) as index:
        return {name: _text(line) for name in index.places for _, line in index.lines(name)}


def _text(line: str) -> str:
    return " ".join(line.rstrip("\r\n").split("\t")[1:])


def _document_text(texts: _Index, document: str) -> str:
    if document not in texts.places:
        raise ValueError(f"document {document}: no text in {texts.path}")
    return next(_text(line) for _, line in texts.lines(document))


class _Index:
    """A text file's lines by their first field: where they begin and end. In memory is an entry per name.

    Args:
        path: lines of one name stand together.
        separator: of fields; None = white space, and a name may have several lines.
    """

    def __init__(self, path: Path, bad_rows: BadRows | None, separator: str | None):
        self.path = path
        self.places: dict[str, tuple[int, int, int]] = {}  # first byte, the byte after the last, number of the first line
        self._bad_rows = bad_rows
        self._file = _seekable(path)
        last, position = None, 0
        for number, line in enumerate(self._file, 1):
            start, position = position, position + len(line)
            if not line.strip():
                continue
            name = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
            name = name.split(separator and separator.encode(), 1)[0].decode(errors="replace").strip()
            if name == last and separator is None:
                first, _, first_number = self.places[name]
                self.places[name] = (first, position, first_number)
            elif name in self.places:
                wanted = "its lines must stand together" if separator is None else "it has one text"
                reject(bad_rows, f"{path}:{number}", f"{name} appeared before; {wanted}")
                last = None
            else:
                self.places[name] = (start, position, number)
                last = name

    def close(self) -> None:
        self._file.close()

    def where(self, name: str) -> str:
        return f"{self.path}:{self.places[name][2]}"

    def lines(self, name: str) -> Iterator[tuple[str, str]]:
        """("file:line", line) of a name."""
        if name not in self.places:
            return
        start, end, number = self.places[name]
        self._file.seek(start)
        for offset, line in enumerate(self._file.read(end - start).split(b"\n")):
            if not line.strip():
                continue
            try:
                yield f"{self.path}:{number + offset}", line.decode("utf-8-sig" if number + offset == 1 else "utf-8")
            except UnicodeDecodeError as error:
                reject(self._bad_rows, f"{self.path}:{number + offset}", f"not UTF-8: {error.reason}")


def _seekable(path: Path) -> IO[bytes]:
    """The file; a compressed one unpacked into a temporary file."""
    if path.suffix not in (".gz", ".xz"):
        return open(path, "rb")
    unpacked = tempfile.TemporaryFile()
    try:
        with open_bytes(path) as packed:
            shutil.copyfileobj(packed, unpacked)
    except DAMAGED as error:
        raise ValueError(f"{path}: damaged file: {error}") from error
    unpacked.seek(0)
    return unpacked
