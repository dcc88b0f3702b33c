"""Cranfield: 225 questions on 1,400 abstracts in aerodynamics, with graded relevance judgements.

The files, plain or compressed, under a data folder: ``cranfield/docs.tsv`` (number, title, text), ``queries.tsv``
(number, text) and ``qrels.txt`` (``query 0 document grade``, 1 to 4, 4 the best; what is not listed is not relevant).

The collection is the University of Glasgow IR group's; this package does not contain it.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from pile_fast.checks import count
from pile_fast.data.files import read_cells
from pile_fast.data.locate import find_file
from pile_fast.data.rows import DataError, parse_count
from pile_fast.teachers import BM25


def load_cranfield(folder: str | os.PathLike, *, k: int = 100) -> list[dict]:
    """The queries as rows: each with the first `k` abstracts by BM25 and the judged ones, in the collection's order.

    Abstracts that are not judged have label 0, the collection's own assumption. Its two empty abstracts are left out. What
    BM25 ranks below its first `k` is there only if it is relevant: that makes BM25 look worse, in PNR above all, than it
    is on the whole collection. Needs bm25s.

    Args:
        folder: the data folder.
        k: candidates by BM25, >= 0; 1398 or more = every abstract.

    Raises:
        FileNotFoundError: a file is missing; the message names it.
        ValueError: a line is broken; the message names file and line.
    """
    count("k", k)
    folder = Path(folder)
    documents = {number: text for number, _, text in read_cells(find_file(folder, "cranfield/docs.tsv"), "\t", 3)}
    queries = dict(read_cells(find_file(folder, "cranfield/queries.tsv"), "\t", 2))
    qrels_path = find_file(folder, "cranfield/qrels.txt")
    grades: dict[str, dict[str, float]] = {query_id: {} for query_id in queries}
    for line, (query_id, _, doc_id, grade) in enumerate(read_cells(qrels_path, None, 4), 1):
        if query_id not in queries or doc_id not in documents:
            raise DataError(f"{qrels_path}:{line}", "expected 'query 0 document grade' of known ones")
        try:
            grades[query_id][doc_id] = float(parse_count("grade", grade))
        except ValueError as error:
            raise DataError(f"{qrels_path}:{line}", error) from None
    documents = {doc_id: text for doc_id, text in documents.items() if text.strip()}
    ids = list(documents)
    texts = list(documents.values())
    bm25 = BM25(texts)
    rows = []
    for query_id, query in queries.items():
        first = np.argsort(-bm25.score(query, texts), kind="stable")[:k]
        wanted = {ids[i] for i in first} | grades[query_id].keys()
        chosen = [doc_id for doc_id in ids if doc_id in wanted]
        rows.append(
            {
                "query_id": query_id,
                "query": query,
                "documents": [documents[doc_id] for doc_id in chosen],
                "doc_ids": chosen,
                "labels": [grades[query_id].get(doc_id, 0.0) for doc_id in chosen],
            }
        )
    return rows
