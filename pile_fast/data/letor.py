"""Reader of LETOR / SVMlight ranking text: ``label qid:Q 1:v 2:v ... # docid = X ...``, plain, .xz or .gz.

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

from pile_fast.data.files import atomic_path, open_text, read_lines
from pile_fast.data.lists import RankedLists
from pile_fast.data.rows import BadRows, RowChecker, reject

# A row lists all of its features: an index beyond this is taken for a mistake, not for a table of zeros.
_MOST_FEATURES = 100_000
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
            added to its name gives the queries' sizes, one a line, as for LightGBM; the queries are then "1", "2", ...
        num_features: F; None = the largest index seen. Indices that a row leaves out are 0, as in SVMlight.

    Raises:
        ValueError: a line is broken; the message reads ``file:line: reason``.
    """
    labels, indices, values, query_ids, doc_ids, parts, starts, origins = [], [], [], [], [], [], [], []
    for document in _documents([Path(path) for path in paths], num_features, None):
        if document.starts_query:
            query_ids.append(document.query_id)
            parts.append(document.path.name.split(".")[0])
            starts.append(len(labels))
        doc_ids.append(document.doc_id)
        labels.append(document.label)
        indices.append(document.indices)
        values.append(document.values)
        origins.append((document.path, document.line))
    if not labels:
        raise ValueError(f"{', '.join(map(str, paths))}: no rows")

    rows = np.repeat(np.arange(len(labels)), [len(i) for i in indices])
    columns = np.concatenate(indices).astype(np.int64) - 1
    width = num_features or (int(columns.max()) + 1 if columns.size else 0)
    features = np.zeros((len(labels), width), dtype=np.float32)
    with np.errstate(over="ignore"):  # to inf, which is refused below
        features[rows, columns] = np.concatenate(values)
        label_column = np.array(labels, dtype=np.float32)
    finite = np.isfinite(features).all(1) & np.isfinite(label_column)
    if not finite.all():
        path, number = origins[int(np.argmin(finite))]
        raise ValueError(f"{path}:{number}: a value is not finite in float32")
    return RankedLists(
        torch.from_numpy(features),
        torch.from_numpy(label_column),
        torch.empty((len(labels), 0)),
        torch.tensor([*starts, len(labels)]),
        tuple(query_ids),
        tuple(doc_ids),
        (),
        tuple(parts),
    )


def read_rows(paths: list[Path], bad_rows: BadRows | None = None) -> Iterator[dict]:
    """Rows of files, which are read twice: first for the largest feature index."""
    width = 0
    for path in paths:
        for _, line in read_lines(path, BadRows()):
            last = line.partition("#")[0].split()[-1:]
            index = last[0].partition(":")[0] if last else ""
            width = max(width, int(index)) if index.isdecimal() else width
    if width > _MOST_FEATURES:
        raise ValueError(f"{', '.join(map(str, paths))}: feature index: expected at most {_MOST_FEATURES}, got {width}")
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
            reject(bad_rows, f"{documents[0].path}:{documents[0].line}", f"query {documents[0].query_id}: {error}")


def write_rows(path: Path, rows: Iterable[dict]) -> None:
    """Features and labels; teachers have no place in the format. What is 0 is left out."""
    with atomic_path(path) as temporary, open_text(temporary) as file:
        for row in rows:
            query = row["query_id"]
            if row["features"] is None:
                raise ValueError(f"query {query}: LETOR holds features, and the row has none")
            for name, features, label in zip(row["doc_ids"], row["features"], row["labels"], strict=True):
                if label is None:
                    raise ValueError(f"query {query}, document {name}: LETOR has no unlabelled documents")
                if (query + name).split() != [query + name] or "#" in query:
                    raise ValueError(f"query {query!r}, document {name!r}: LETOR cannot hold names with spaces")
                pairs = "".join(f" {i}:{value!r}" for i, value in enumerate(features, 1) if value)
                file.write(f"{label:g} qid:{query}{pairs} # docid = {name}\n")


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
    for path in paths:
        query = None  # a query does not go on into the next file
        count = 0
        sizes = _Sizes(path, len(seen)) if _sizes_path(path).is_file() else None
        for number, line in read_lines(path, bad_rows):
            body, _, comment = line.partition("#")
            if not body.strip():
                continue
            try:
                given = sizes.next() if sizes else None
                label, qid, indices, values = _parse(body, num_features, given)
                starts = qid != query
                if starts:
                    if qid in seen:
                        raise ValueError(f"query {qid} appeared before; the rows of a query must stand together")
                    seen.add(qid)
                    query, count = qid, 0
            except ValueError as error:
                reject(bad_rows, f"{path}:{number}", error)
                continue
            count += 1
            name = _DOC_ID.search(comment)
            yield _Document(path, number, qid, starts, name[1] if name else f"{qid}.{count}", label, indices, values)
        if sizes:
            sizes.end()


def _sizes_path(path: Path) -> Path:
    return path.with_name(path.name + ".query")


class _Sizes:
    """The queries' sizes of a LightGBM ``.query`` file: each document's query, "1", "2", ... on from `before`."""

    def __init__(self, path: Path, before: int):
        self.path = _sizes_path(path)
        self._lines = read_lines(self.path)
        self._query = before
        self._left = 0

    def next(self) -> str:
        while self._left == 0:
            number, line = next(self._lines, (0, ""))
            if not number:
                raise ValueError(f"the row belongs to no query: {self.path} counts fewer rows")
            if not line.strip().isdecimal():
                raise ValueError(f"{self.path}:{number}: expected the number of rows of a query, got {line.strip()[:40]!r}")
            self._left = int(line)
            self._query += 1
        self._left -= 1
        return str(self._query)

    def end(self) -> None:
        if self._left or any(line.strip() for _, line in self._lines):
            raise ValueError(f"{self.path}: counts more rows than there are in the data")


def _parse(body: str, num_features: int | None, query: str | None) -> tuple[float, str, list[int], list[float]]:
    label, *tokens = body.split()
    if tokens and tokens[0].startswith("qid:"):
        query = tokens.pop(0).removeprefix("qid:")
    if not query:
        raise ValueError(f"expected 'label qid:Q 1:v ...', got {body.strip()[:40]!r}")
    try:
        grade = float(label)
    except ValueError:
        raise ValueError(f"label: expected a number, got {label!r}") from None
    indices, values = [], []
    last = 0
    for token in tokens:
        index, _, value = token.partition(":")
        try:
            i, v = int(index), float(value)
        except ValueError:
            raise ValueError(f"expected a feature 'index:value', got {token!r}") from None
        if i <= last:
            raise ValueError(f"feature indices must be 1 or more and increase, got {i} after {last}")
        indices.append(i)
        values.append(v)
        last = i
    if num_features is not None and last > num_features:
        raise ValueError(f"feature index: expected at most {num_features}, got {last}")
    return grade, query, indices, values
