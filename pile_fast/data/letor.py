"""LETOR / SVMlight ranking text: ``label qid:Q 1:v 2:v ... # docid = X ...``, plain, .xz or .gz.

scikit-learn's `load_svmlight_file` reads the same numbers, but drops the comments, which hold the documents' names, and
cannot say which line is broken.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch

from pile_fast.data.files import atomic_path, byte_lines, decode, open_text, read_lines
from pile_fast.data.formats import stem
from pile_fast.data.lists import RankedLists, float32_labels
from pile_fast.data.qrels import format_label
from pile_fast.data.rows import UNLABELLED, BadRows, DataError, RowChecker, parse_count, parse_label, parse_number, reject, show

# A row lists all of its features: a larger index is a mistake, not a table of zeros.
_MOST_FEATURES = 100_000
_LARGE = 1e38  # finite in float32 beyond doubt
_SIZES = (".query", ".group")
_DOC_ID = re.compile(r"docid\s*=\s*(\S+)")


@dataclasses.dataclass(slots=True)
class _Document:
    """A line of a file."""

    path: Path
    line: int
    query_id: str
    starts_query: bool
    doc_id: str
    label: float
    indices: list[int]
    values: list[float]


def read_letor(*paths: str | os.PathLike, num_features: int | None = None) -> RankedLists:
    """Read files as one data set without teachers; a query's part is its file's name, "S1" for S1.txt.xz.

    Args:
        paths: files; a query's rows stand together, in one file. Where rows have no qid, the file beside with ``.query``
            (LightGBM) or ``.group`` (XGBoost) added to its name gives the queries' sizes, one a line; the queries are then
            "1", "2", ...
        num_features: F; None = the largest index seen. Indices that a row leaves out are 0, as in SVMlight.

    Raises:
        DataError: a line is broken; the message reads ``file:line: reason``.
    """
    labels: list[float] = []
    indices, values, query_ids, doc_ids, parts, starts = [], [], [], [], [], []
    for document in _documents([Path(path) for path in paths], num_features, None):
        if document.starts_query:
            query_ids.append(document.query_id)
            parts.append(stem(document.path))
            starts.append(len(labels))
        doc_ids.append(document.doc_id)
        labels.append(document.label)
        indices.append(document.indices)
        values.append(document.values)
    if not labels:
        raise DataError(", ".join(map(str, paths)), "no rows")

    rows = np.repeat(np.arange(len(labels)), [len(i) for i in indices])
    columns = np.concatenate(indices).astype(np.int64) - 1
    width = num_features or (int(columns.max()) + 1 if columns.size else 0)
    features = np.zeros((len(labels), width), dtype=np.float32)
    features[rows, columns] = np.concatenate(values)
    bounds = [*starts, len(labels)]
    for query, start, end in zip(query_ids, starts, bounds[1:], strict=True):
        float32_labels(query, labels[start:end])
    return RankedLists(
        torch.from_numpy(features),
        torch.tensor(labels, dtype=torch.float32),
        torch.empty((len(labels), 0)),
        torch.tensor(bounds),
        tuple(query_ids),
        tuple(doc_ids),
        (),
        tuple(parts),
    )


def read_rows(paths: list[Path], bad_rows: BadRows | None = None) -> Iterator[dict]:
    """Rows of files, which are read twice: first for the largest feature index."""
    width = _width(paths) if bad_rows is None else _width_of_good_lines(paths)
    check = RowChecker()
    for documents in _queries(_documents(paths, None, bad_rows)):
        features = np.zeros((len(documents), width))
        for row, document in zip(features, documents, strict=True):
            row[np.array(document.indices, dtype=np.int64) - 1] = document.values
        try:
            yield check(
                {
                    "query_id": documents[0].query_id,
                    "doc_ids": [document.doc_id for document in documents],
                    "features": features.tolist(),
                    "labels": [document.label for document in documents],
                }
            )
        except ValueError as error:
            reject(bad_rows, f"{documents[0].path}:{documents[0].line}", f"query {documents[0].query_id!r}: {error}")


def _width(paths: list[Path]) -> int:
    """The largest feature index, by a glance at the end of each line: whatever is broken will stop the reader anyway."""
    width = 0
    for path in paths:
        for _, line in byte_lines(path):
            last = line.partition(b"#")[0].decode(errors="replace").split()[-1:]
            index = last[0].partition(":")[0] if last else ""
            width = max(width, int(index)) if index.isascii() and index.isdecimal() and len(index) < 20 else width
    return min(width, _MOST_FEATURES)


def _width_of_good_lines(paths: list[Path]) -> int:
    """The largest feature index of a line that is not left out."""
    return max((document.indices[-1] for document in _documents(paths, None, BadRows()) if document.indices), default=0)


def write_rows(path: Path, rows: Iterable[dict]) -> None:
    """Labels and features.

    Raises:
        ValueError: a document has no label or no features, or a name cannot be written.
    """
    with atomic_path(path) as temporary, open_text(temporary) as file:
        first = True
        for row in rows:
            query = row["query_id"]
            if row["features"] is None:
                raise ValueError(f"query {query!r}: LETOR holds features, and the row has none")
            for name, label, features in zip(row["doc_ids"], row["labels"], row["features"], strict=True):
                if label is None:
                    raise ValueError(f"query {query!r}, document {name!r}: LETOR has no unlabelled documents; {UNLABELLED}")
                if query.split() != [query] or name.split() != [name] or "#" in query:  # which begins the comment
                    raise ValueError(f"query {query!r}, document {name!r}: LETOR cannot hold names with spaces or #")
                # Zeros are left out, but the file says once how many features there are.
                last = len(features) if first else 0
                pairs = "".join(f" {i}:{float(value)!r}" for i, value in enumerate(features, 1) if value or i == last)
                file.write(f"{format_label(label)} qid:{query}{pairs} # docid = {name}\n")
                first = False


def _queries(documents: Iterator[_Document]) -> Iterator[list[_Document]]:
    waiting: list[_Document] = []
    for document in documents:
        if document.starts_query and waiting:
            yield waiting
            waiting = []
        waiting.append(document)
    if waiting:
        yield waiting


def _documents(paths: list[Path], num_features: int | None, bad_rows: BadRows | None) -> Iterator[_Document]:
    seen: set[str] = set()
    before = 0
    for path in paths:
        query = None  # a query does not go on into the next file
        names: set[str] = set()
        count = 0
        sizes = _Sizes(path, before)
        for number, line in byte_lines(path):
            body, _, comment = line.partition(b"#")
            if not body.removeprefix(b"\xef\xbb\xbf").strip():
                continue
            given = sizes.next(number)  # also for a line that turns out broken
            try:
                label, qid, indices, values = _parse(decode(body), num_features, given)
                starts = qid != query
                if starts and qid in seen:
                    raise ValueError(f"query {qid!r} appeared before; the rows of a query must stand together")
                count = 1 if starts else count + 1
                names = set() if starts else names
                named = _DOC_ID.search(decode(comment))
                name = named[1] if named else f"{qid}.{count}"
                if name in names:
                    raise ValueError(f"query {qid!r}, document {name!r}: appears twice")
            except ValueError as error:
                reject(bad_rows, f"{path}:{number}", error)
                continue
            seen.add(qid)
            names.add(name)
            query = qid
            yield _Document(path, number, qid, starts, name, label, indices, values)
        sizes.end()
        before = max(sizes.query, len(seen))


class _Sizes:
    """The queries' sizes of a file beside the data, if there is one: each document's query, "1", "2", ... on from `before`."""

    def __init__(self, data: Path, before: int):
        self._data = data
        names = {data.name, data.name.removesuffix(".gz").removesuffix(".xz")}
        paths = [data.with_name(name + suffix) for suffix in _SIZES for name in names]
        paths = sorted(path for path in paths if path.is_file())
        if len(paths) > 1:
            raise DataError(data, f"the queries' sizes are given twice, by {paths[0]} and {paths[1]}")
        self._path = paths[0] if paths else None
        self._lines = read_lines(self._path) if self._path else iter(())
        self.query = before
        self._left = 0

    def next(self, row: int) -> str | None:
        """The query of the document in line `row` of the data."""
        if self._path is None:
            return None
        while self._left == 0:
            number, line = next(self._lines, (0, ""))
            if not number:
                raise DataError(f"{self._data}:{row}", f"the row belongs to no query: {self._path} counts fewer rows")
            try:
                self._left = parse_count("rows of a query", line.strip())
            except ValueError as error:
                raise DataError(f"{self._path}:{number}", error) from None
            self.query += 1
        self._left -= 1
        return str(self.query)

    def end(self) -> None:
        if self._left or any(line.strip() for _, line in self._lines):
            raise DataError(self._path, "counts more rows than there are in the data")


def _parse(body: str, num_features: int | None, query: str | None) -> tuple[float, str, list[int], list[float]]:
    label, *tokens = body.split()
    if tokens and tokens[0].startswith("qid:"):
        query = tokens.pop(0).removeprefix("qid:")
    if not query:
        raise ValueError(f"expected 'label qid:Q 1:v ...', got {body.strip()[:40]!r}")
    grade = parse_label("label", label)
    indices, values = [], []
    last, most = 0, num_features or _MOST_FEATURES
    plain = body.isascii() and "_" not in body
    for token in tokens:
        index, _, value = token.partition(":")
        # What `parse_count` and `parse_number` would say of most tokens, in a fraction of the time.
        try:
            i, v = int(index), float(value)
            usual = plain and index.isdecimal() and i <= most and -_LARGE < v < _LARGE
        except ValueError:
            usual = False
        if not usual:
            i, v = _feature(token, most)
        if i <= last:
            raise ValueError(f"feature indices must be 1 or more and increase, got {i} after {last}")
        indices.append(i)
        values.append(v)
        last = i
    return grade, query, indices, values


def _feature(token: str, most: int) -> tuple[int, float]:
    index, colon, value = token.partition(":")
    if not (colon and value):
        raise ValueError(f"expected a feature 'index:value', got {show(token)}")
    i = parse_count("feature index", index)
    if i > most:
        raise ValueError(f"feature index: expected at most {most}, got {i}")
    return i, parse_number(f"feature {i}", value)
