"""The schema: a row is a query, a dict of the columns below. Every reader checks its rows here."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from decimal import Decimal
from typing import Any, TypeVar

from pile_fast.printable import printable

T = TypeVar("T")
COLUMNS = (
    "query_id", "query", "documents", "features", "doc_ids", "labels", "teacher_logits", "teachers", "ensemble_logits",
)  # fmt: skip
# The columns with an entry per document.
PER_DOCUMENT = ("documents", "features", "doc_ids", "labels", "teacher_logits", "ensemble_logits")
# What to do where a format has no room for a document without a label.
UNLABELLED = "convert --drop-unlabelled leaves them out, --unjudged LABEL labels what qrels do not list"
_LARGEST_FLOAT32 = 3.4028235677973366e38  # what rounds to the largest finite one, not to inf, is below
_LARGEST_EXACT = 2**53  # beyond it neighbouring whole numbers are one float64: labels would tie


class DataError(ValueError):
    """A file that cannot be read as it is. Its text is "where: reason" in one line without control characters.

    Attributes:
        where: "file:line", "file: row N" (Parquet, counted from 1 over the whole file) or "file".
        reason: what is wrong there.

    >>> str(DataError("data.jsonl:7", "labels: expected 3 entries like documents, got 2"))
    'data.jsonl:7: labels: expected 3 entries like documents, got 2'
    """

    def __init__(self, where: object, reason: object):
        super().__init__(str(where), printable(" ".join(str(reason).split())))  # both as arguments, so that it pickles
        self.where, self.reason = self.args

    def __str__(self) -> str:
        return f"{self.where}: {self.reason}"


class BadRows:
    """Collects broken rows instead of stopping at the first: how many, and the first reasons.

    Attributes:
        count: how many rows or lines were left out.
        reasons: the first `keep` of them, "file:line: reason".

    >>> bad_rows = BadRows()
    >>> bad_rows.add("data.jsonl:7", "labels: expected 3 entries like documents, got 2")
    >>> bad_rows.count, bad_rows.reasons
    (1, ['data.jsonl:7: labels: expected 3 entries like documents, got 2'])
    """

    def __init__(self, keep: int = 10):
        self.count = 0
        self.reasons: list[str] = []
        self._keep = keep

    def add(self, where: object, reason: object) -> None:
        self.count += 1
        if len(self.reasons) < self._keep:
            self.reasons.append(str(DataError(where, reason)))


def reject(bad_rows: BadRows | None, where: object, reason: object) -> None:
    """A broken row: raise `DataError`, or count it."""
    if bad_rows is None:
        raise DataError(where, reason) from None
    bad_rows.add(where, reason)


class RowChecker:
    """Checks and normalises the rows of one data set: each on its own (`check_row`) and against those before it."""

    def __init__(self) -> None:
        self._seen: set[str] = set()
        self._teachers: list[str] | None = None
        self._width: int | None = None

    def __call__(self, row: dict) -> dict:
        """The normalised row.

        Raises:
            ValueError: what is wrong with it.
        """
        row = check_row(row, self._teachers)
        if row["query_id"] in self._seen:
            raise ValueError(f"query {row['query_id']!r} appeared before; the documents of a query must be one row")
        if self._teachers is not None and row["teachers"] != self._teachers:
            raise ValueError(f"teachers: expected {self._teachers} as in the rows before, got {row['teachers']}")
        if row["features"] is not None:
            width = len(row["features"][0])
            if self._width is not None and width != self._width:
                raise ValueError(f"features: expected {self._width} per document as in the rows before, got {width}")
            self._width = width
        self._teachers = row["teachers"]
        self._seen.add(row["query_id"])
        return row


def check_row(row: dict, teachers: list[str] | None = None) -> dict:
    """One row, checked, with every column: what it leaves out is filled in.

    Args:
        row: see docs/data.md; columns other than `COLUMNS` are dropped.
        teachers: names to take where the row has teachers but does not name them; None = "teacher 1", "teacher 2", ...

    Returns:
        A row whose `query`, `documents`, `features` and `ensemble_logits` are None if absent; `doc_ids` default to
        "<query_id>.1", ...; `labels` to None per document; `teacher_logits` to an empty list per document.

    Raises:
        ValueError: column and entry, what was expected, what was given.

    >>> row = check_row({"query_id": "q", "documents": ["a", "b"], "teacher_logits": [[0.5], [None]]})
    >>> row["doc_ids"], row["labels"], row["teachers"]
    (['q.1', 'q.2'], [None, None], ['teacher 1'])
    """
    if not isinstance(row, dict):
        raise ValueError(f"expected an object with the row's columns, got {show(row)}")
    query_id = _name("query_id", row.get("query_id"))
    given = [name for name in PER_DOCUMENT if row.get(name) is not None]
    if not given:
        raise ValueError(f"missing columns: expected some of {', '.join(PER_DOCUMENT[:-1])}")
    for name in given:
        if not isinstance(row[name], list):
            raise ValueError(f"{name}: expected a list with an entry per document, got {show(row[name])}")
        if len(row[name]) != len(row[given[0]]):
            raise ValueError(f"{name}: expected {len(row[given[0]])} entries like {given[0]}, got {len(row[name])}")
    size = len(row[given[0]])
    if size == 0:
        raise ValueError(f"{given[0]}: the query has no documents")

    checked: dict[str, Any] = dict.fromkeys(COLUMNS)
    checked["query_id"] = query_id
    if row.get("query") is not None:
        checked["query"] = _text("query", row["query"])
    if "documents" in given:
        checked["documents"] = [_text(f"documents[{i}]", text) for i, text in enumerate(row["documents"])]
    if "doc_ids" in given:
        checked["doc_ids"] = [_name(f"doc_ids[{i}]", name) for i, name in enumerate(row["doc_ids"])]
        if len(set(checked["doc_ids"])) != size:
            raise ValueError(f"doc_ids: document {twice(checked['doc_ids'])!r} appears twice")
    else:
        checked["doc_ids"] = [f"{query_id}.{i}" for i in range(1, size + 1)]
    if "features" in given:
        checked["features"] = _table("features", row["features"], nullable=False)
        if not checked["features"][0]:
            raise ValueError("features: expected at least one per document")
    checked["labels"] = _labels(row["labels"]) if "labels" in given else [None] * size
    logits = row["teacher_logits"] if "teacher_logits" in given else [[]] * size
    checked["teacher_logits"] = _table("teacher_logits", logits)
    checked["teachers"] = _teacher_names(row.get("teachers"), len(checked["teacher_logits"][0]), teachers)
    if "ensemble_logits" in given:
        checked["ensemble_logits"] = _numbers("ensemble_logits", row["ensemble_logits"])
    return checked


def ensemble_as_teacher(row: dict) -> dict:
    """The row with its ensemble as the only teacher, named "ensemble": to train on what `pile-fast ensemble` wrote.

    Raises:
        ValueError: the row has no `ensemble_logits`.

    >>> row = check_row({"query_id": "q", "teacher_logits": [[0.5, 0.1], [0.2, 0.3]], "ensemble_logits": [0.7, -0.7]})
    >>> ensemble_as_teacher(row)["teacher_logits"]
    [[0.7], [-0.7]]
    """
    if row.get("ensemble_logits") is None:
        raise ValueError(f"query {row['query_id']!r}: no ensemble_logits; write them with pile-fast ensemble")
    return row | {"teacher_logits": [[logit] for logit in row["ensemble_logits"]], "teachers": ["ensemble"]}


def drop_unlabelled(row: dict) -> dict | None:
    """A checked row without the documents that have no label; None if that is all of them.

    >>> drop_unlabelled(check_row({"query_id": "q", "documents": ["a", "b"], "labels": [None, 2]}))["documents"]
    ['b']
    """
    kept = [i for i, label in enumerate(row["labels"]) if label is not None]
    if not kept:
        return None
    return row | {name: [row[name][i] for i in kept] for name in PER_DOCUMENT if row[name] is not None}


def groups(rows: Iterable[dict], size: int) -> Iterator[list[dict]]:
    """The rows, in runs with about `size` documents each."""
    group: list[dict] = []
    documents = 0
    for row in rows:
        group.append(row)
        given = row.get("features") if row.get("documents") is None else row["documents"]
        documents += 0 if given is None else len(given)
        if documents >= size:
            yield group
            group, documents = [], 0
    if group:
        yield group


def scores_of(row: dict, teacher: str | None) -> tuple[str, list[float | None]]:
    """(name, a score per document) of one teacher of a checked row.

    Args:
        teacher: its name; "ensemble" = `ensemble_logits`; None = the ensemble if the row has one, else the only teacher.

    Raises:
        ValueError: there is no such teacher, or more than one to choose from.
    """
    if row["ensemble_logits"] is not None and teacher in (None, "ensemble"):
        return "ensemble", row["ensemble_logits"]
    if teacher is None and len(row["teachers"]) == 1:
        teacher = row["teachers"][0]
    if teacher is None or teacher not in row["teachers"]:
        given = "none was named" if teacher is None else f"got {teacher!r}"
        names = ", ".join(map(repr, row["teachers"])) or "(the rows have none)"
        raise ValueError(f"teacher: expected one of {names}; {given}")
    column = row["teachers"].index(teacher)
    return teacher, [logits[column] for logits in row["teacher_logits"]]


def default_names(count: int) -> list[str]:
    """The names of teachers for which the data has none."""
    return [f"teacher {m}" for m in range(1, count + 1)]


def _teacher_names(names: object, count: int, default: list[str] | None) -> list[str]:
    if names is None:
        return default if default is not None and len(default) == count else default_names(count)
    if not isinstance(names, list):
        raise ValueError(f"teachers: expected a list of names, got {show(names)}")
    names = [_name(f"teachers[{m}]", name) for m, name in enumerate(names)]
    if len(names) != count:
        raise ValueError(f"teachers: expected {count} names like the columns of teacher_logits, got {len(names)}")
    if len(set(names)) != count:
        raise ValueError(f"teachers: expected different names, got {names}")
    return names


def _table(name: str, rows: list, nullable: bool = True) -> list[list[float | None]]:
    for i, row in enumerate(rows):
        if not isinstance(row, list):
            raise ValueError(f"{name}[{i}]: expected a list of numbers, got {show(row)}")
        if len(row) != len(rows[0]):
            raise ValueError(f"{name}[{i}]: expected {len(rows[0])} numbers like {name}[0], got {len(row)}")
    return [_numbers(f"{name}[{i}]", row, nullable) for i, row in enumerate(rows)]


def _labels(values: list) -> list[float | None]:
    checked = _numbers("labels", values)
    for i, value in enumerate(values):
        # An int between floats compares exactly, whatever its size.
        if isinstance(value, (int, Decimal)) and not -_LARGEST_EXACT <= value <= _LARGEST_EXACT:
            raise ValueError(f"labels[{i}]: expected a whole number of at most 2^53, got {show(value)}")
    return checked


def _numbers(name: str, values: Iterable, nullable: bool = True) -> list[float | None]:
    checked: list[float | None] = []
    for i, value in enumerate(values):
        if value is None and nullable:
            checked.append(None)
            continue
        if not isinstance(value, (int, float, Decimal)):  # bool among them: labels of true and false
            raise ValueError(f"{name}[{i}]: expected a number{' or null' * nullable}, got {show(value)}")
        if not -_LARGEST_FLOAT32 < value < _LARGEST_FLOAT32:
            if value != value:
                advice = "; write null for what is not known" * nullable
                raise ValueError(f"{name}[{i}]: expected a number{' or null' * nullable}, got NaN{advice}")
            raise ValueError(f"{name}[{i}]: expected a number that is finite in float32, got {show(value)}")
        checked.append(float(value))
    return checked


def parse_number(name: str, text: str) -> float:
    """A number of a text file: what `float` reads, but in ASCII digits without underscores, and finite in float32.

    Raises:
        ValueError: it is none; the message begins with `name`.
    """
    try:
        # float() takes 1_000 for a thousand, and digits of any script.
        value = float(text) if text.isascii() and "_" not in text else None
    except ValueError:
        value = None
    if value is None:
        raise ValueError(f"{name}: expected a number, got {show(text)}")
    if not -_LARGEST_FLOAT32 < value < _LARGEST_FLOAT32:
        raise ValueError(f"{name}: expected a number that is finite in float32, got {show(text)}")
    return value


def parse_label(name: str, text: str) -> float:
    """A label or grade of a text file: a number, and if it is a whole one, one that float64 holds exactly.

    Raises:
        ValueError: it is none; the message begins with `name`.
    """
    value = parse_number(name, text)
    if abs(value) >= _LARGEST_EXACT and text.strip("+-").isdecimal() and abs(int(text)) > _LARGEST_EXACT:
        raise ValueError(f"{name}: expected a whole number of at most 2^53, got {show(text)}")
    return value


def parse_count(name: str, text: str) -> int:
    """A whole number of a text file, >= 0, in ASCII digits.

    Raises:
        ValueError: it is none; the message begins with `name`.
    """
    if not (text.isascii() and text.isdecimal() and len(text) < 20):
        raise ValueError(f"{name}: expected a whole number, got {show(text)}")
    return int(text)


def _name(name: str, value: object) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str) or not value:
        raise ValueError(f"{name}: expected a name, got {show(value)}")
    return _text(name, value)


def _text(name: str, value: object) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{name}: expected a text, got {show(value)}")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:  # JSON can write half a character
            raise ValueError(f"{name}: not Unicode: {error.reason} at character {error.start + 1}") from None
    return value


def twice(values: Iterable[T]) -> T | None:
    """The first value that came before, or None."""
    seen: set[T] = set()
    for value in values:
        if value in seen:
            return value
        seen.add(value)
    return None


def show(value: object) -> str:
    """A value in an error message: short, null as the files have it, control characters as Python writes them."""
    try:
        text = "null" if value is None else repr(value[:41] if isinstance(value, str) else value)
    except (RecursionError, ValueError):  # nested too deeply to show; a whole number of thousands of digits
        text = f"a huge {type(value).__name__}"
    return text if len(text) <= 40 else text[:37] + "..."
