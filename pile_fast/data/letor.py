"""Reader of LETOR / SVMlight ranking text: ``label qid:Q 1:v 2:v ... # docid = X ...``, plain, .xz or .gz.

scikit-learn's `load_svmlight_file` reads the same numbers, but drops the comments, which hold the documents' names, and
cannot say which line is broken.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import numpy as np
import torch

from pile_fast.data.files import read_lines
from pile_fast.data.lists import RankedLists

_DOC_ID = re.compile(r"docid\s*=\s*(\S+)")


def read_letor(*paths: str | os.PathLike, num_features: int | None = None) -> RankedLists:
    """Read files as one data set without teachers; a query's part is its file's name, "S1" for S1.txt.xz.

    Args:
        paths: files; a query's rows stand together, in one file.
        num_features: F; None = the largest index seen. Indices that a row leaves out are 0, as in SVMlight.

    Raises:
        ValueError: a line is broken; the message reads ``file:line: reason``.
    """
    labels, indices, values, query_ids, doc_ids, parts, starts, origins = [], [], [], [], [], [], [], []
    seen = set()
    for path in map(Path, paths):
        query = None  # a query does not go on into the next file
        for number, line in read_lines(path):
            body, _, comment = line.partition("#")
            if not body.strip():
                continue
            try:
                label, qid, row_indices, row_values = _parse(body, num_features)
                if qid != query:
                    if qid in seen:
                        raise ValueError(f"query {qid} appeared before; the rows of a query must stand together")
                    seen.add(qid)
                    query_ids.append(qid)
                    parts.append(path.name.split(".")[0])
                    starts.append(len(labels))
                    query = qid
            except ValueError as error:
                raise ValueError(f"{path}:{number}: {error}") from None
            name = _DOC_ID.search(comment)
            doc_ids.append(name[1] if name else f"{qid}.{len(labels) - starts[-1] + 1}")
            labels.append(label)
            indices.append(row_indices)
            values.append(row_values)
            origins.append((path, number))
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


def _parse(body: str, num_features: int | None) -> tuple[float, str, list[int], list[float]]:
    label, *tokens = body.split()
    qid = tokens[0].removeprefix("qid:") if tokens and tokens[0].startswith("qid:") else ""
    if not qid:
        raise ValueError(f"expected 'label qid:Q 1:v ...', got {body.strip()[:40]!r}")
    try:
        grade = float(label)
    except ValueError:
        raise ValueError(f"label: expected a number, got {label!r}") from None
    indices, values = [], []
    last = 0
    for token in tokens[1:]:
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
    return grade, qid, indices, values
