"""MQ2008 (LETOR 4.0) with the 25 real systems of its rank-aggregation setting as teachers.

The files, plain or compressed, under a data folder:

- ``mq2008/S1.txt`` .. ``S5.txt``: the five LETOR parts, 46 features, grades 0 to 2;
- ``mq2008_agg/mq2008_teachers.csv``: header ``qid,docid,split,label,t1..t25``, a row per row of S1 .. S5; empty = the
  system did not return the document.

Microsoft Research's data; this package does not contain them.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pile_fast.data.files import read_lines
from pile_fast.data.letor import read_letor
from pile_fast.data.lists import RankedLists
from pile_fast.data.locate import find_file
from pile_fast.data.missing import MISSING, missing_as_bottom
from pile_fast.data.rows import DataError, parse_number

SYSTEMS = range(1, 26)
# By NDCG@10 against the labels both ways round, these two alone would have lower values mean better: left out.
UNCLEAR_SYSTEMS = (1, 17)
# Good systems that returned more than half of the documents (the others mostly less).
HIGH_COVERAGE_SYSTEMS = (6, 8, 9, 10, 11, 14, 15, 22)


def load_mq2008(folder: str | os.PathLike, *, systems: Iterable[int] | None = None, missing: str = "nan") -> RankedLists:
    """MQ2008's 784 queries (15,211 documents) with the real systems as teachers.

    A teacher's logit is the system's value divided by its largest in the query: the values are positions in lists of
    different lengths, larger is better, so their scale differs from query to query.

    Args:
        folder: the data folder.
        systems: numbers of the systems to take, 1 to 25; None = all but `UNCLEAR_SYSTEMS`.
        missing: how to read a document that a system did not return: "nan" = the system says nothing about it;
            "bottom" = it is below the end of the system's list, logit 0, under every document returned. A system that
            returned nothing for a query stays NaN.

    Raises:
        FileNotFoundError: a file is missing; the message names it.
        ValueError: a line is broken, or the two sets do not match; the message names file and line.
    """
    if missing not in MISSING:
        raise ValueError(f"missing: expected 'nan' or 'bottom', got {missing!r}")
    systems = tuple(s for s in SYSTEMS if s not in UNCLEAR_SYSTEMS) if systems is None else tuple(systems)
    if not systems or not set(systems) <= set(SYSTEMS):
        raise ValueError(f"systems: expected numbers from 1 to 25, got {systems}")
    folder = Path(folder)
    parts = [find_file(folder, f"mq2008/S{i}.txt") for i in range(1, 6)]
    scores_path = find_file(folder, "mq2008_agg/mq2008_teachers.csv")
    lists = read_letor(*parts, num_features=46)
    values = _read_systems(scores_path, lists)[:, [s - 1 for s in systems]]
    return lists.with_teachers(_calibrate(values, lists.cu_seqlens, missing), [f"system {s}" for s in systems])


def _read_systems(path: Path, lists: RankedLists) -> np.ndarray:
    """(D, 25) float32 values, NaN = not returned, after checking that row i is the lists' document i."""
    lengths = lists.cu_seqlens.diff().tolist()
    query_of = [q for q, n in zip(lists.query_ids, lengths, strict=True) for _ in range(n)]
    part_of = [p for p, n in zip(lists.parts, lengths, strict=True) for _ in range(n)]
    labels = lists.labels.tolist()
    lines = read_lines(path)
    header = ["qid", "docid", "split", "label", *(f"t{s}" for s in SYSTEMS)]
    first = next(lines, (1, ""))[1]
    if first.strip().split(",") != header:
        raise DataError(f"{path}:1", f"expected the header {','.join(header)}")
    values = np.empty((len(labels), len(SYSTEMS)), dtype=np.float32)
    count = 0
    for number, line in lines:
        cells = line.strip().split(",")
        try:
            if len(cells) != len(header):
                raise ValueError(f"expected {len(header)} cells, got {len(cells)}")
            if count == len(labels):
                raise ValueError(f"expected {count} rows as in the feature files, got more")
            wanted = [query_of[count], lists.doc_ids[count], part_of[count]]
            if cells[:3] != wanted or parse_number("label", cells[3]) != labels[count]:
                raise ValueError(
                    f"expected {','.join(wanted)},{labels[count]:g} as in the feature files, got {','.join(cells[:4])}"
                )
            values[count] = [parse_number(f"t{s}", c) if c else np.nan for s, c in zip(SYSTEMS, cells[4:], strict=True)]
        except ValueError as error:
            raise DataError(f"{path}:{number}", error) from None
        count += 1
    if count != len(labels):
        raise DataError(path, f"expected {len(labels)} rows as in the feature files, got {count}")
    return values


def _calibrate(values: np.ndarray, cu_seqlens: Tensor, missing: str) -> Tensor:
    starts = cu_seqlens[:-1].numpy()
    highest = np.repeat(np.fmax.reduceat(values, starts, axis=0), cu_seqlens.diff().numpy(), axis=0)
    logits = torch.from_numpy(values / highest)
    return missing_as_bottom(logits, cu_seqlens, value=0.0) if missing == "bottom" else logits
