"""Judgements of TREC: ``query iteration document grade``, read and written; BEIR's three columns are read, too."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from pile_fast.data.files import atomic_path, fields, open_text, read_lines
from pile_fast.data.rows import BadRows, RowChecker, parse_label, reject

_COLUMNS = "query iteration document grade"
_BEIR = ["query-id", "corpus-id", "score"]


def read_qrels(path: Path, bad_rows: BadRows | None = None) -> dict[str, dict[str, float]]:
    """Grades by query and document.

    Args:
        path: lines of ``query iteration document grade``; or of ``query document grade`` under BEIR's header
            ``query-id corpus-id score``.
        bad_rows: counts broken lines, which are left out; None = the first one raises.

    Raises:
        DataError: a line is broken, or grades a document anew.
    """
    grades: dict[str, dict[str, float]] = {}
    columns = _COLUMNS
    for number, line in read_lines(path, bad_rows):
        cells = fields(line)
        if not cells:
            continue
        if number == 1 and cells == _BEIR:
            columns = "query document grade"
            continue
        try:
            if len(cells) != len(columns.split()):
                raise ValueError(f"expected {columns!r}, got {line.strip()[:60]!r}")
            query, document, grade = cells[0], cells[-2], cells[-1]
            try:
                value = parse_label("grade", grade)
            except ValueError as error:
                raise ValueError(f"not a {error}") from None
            judged = grades.setdefault(query, {})
            if document in judged:  # trec_eval stops there, too, also where the grade is the same
                different = ", with different grades" * (judged[document] != value)
                raise ValueError(f"query {query!r}, document {document!r}: appears twice{different}")
            judged[document] = value
        except ValueError as error:
            reject(bad_rows, f"{path}:{number}", error)
    return {query: judged for query, judged in grades.items() if judged}


def read_rows(paths: list[Path], bad_rows: BadRows | None = None) -> Iterator[dict]:
    """A row per query: its judged documents with their grades as labels."""
    check = RowChecker()
    for path in paths:
        for query, judged in read_qrels(path, bad_rows).items():
            try:
                yield check({"query_id": query, "doc_ids": list(judged), "labels": list(judged.values())})
            except ValueError as error:
                reject(bad_rows, path, error)


def write_rows(path: Path, rows: Iterable[dict]) -> None:
    """A line for every labelled document; what is not labelled is not judged.

    Raises:
        ValueError: a name has spaces, or no row has a label.
    """
    empty = True
    with atomic_path(path) as temporary, open_text(temporary) as file:
        for row in rows:
            for document, label in zip(row["doc_ids"], row["labels"], strict=True):
                if label is not None:
                    empty = False
                    file.write(f"{field(row, row['query_id'])} 0 {field(row, document)} {format_label(label)}\n")
        if empty:
            raise ValueError("there are no labels to write as qrels")


def field(row: dict, name: str) -> str:
    """A name, if it can be a field of a line.

    Raises:
        ValueError: it has spaces.
    """
    if name.split() != [name]:
        raise ValueError(f"query {row['query_id']!r}: the format cannot hold names with spaces, as {name!r}")
    return name


def format_label(label: float) -> str:
    """A label as text, exactly; a whole number without a point, as trec_eval wants it."""
    return str(int(label)) if label == int(label) else repr(float(label))
