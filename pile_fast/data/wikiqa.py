"""WikiQA (Yang, Yih and Meek, EMNLP 2015): questions, sentences that may answer them, and two systems' real scores.

The files, plain or compressed, under a data folder:

- ``wikiqa/WikiQA-{split}.txt``: question, sentence, 0 or 1, tab-separated;
- ``wikiqa/WikiQA-{split}.ref``: ``question 0 sentence label``, line by line the same pairs;
- ``wikiqa/emnlp-table/WikiQA.{CNN,CNN-Cnt}.{split}.rank``: ``question 0 sentence rank score run``, for dev and test.

Microsoft Research's data under its own licence; this package does not contain them.
"""

from __future__ import annotations

import os
from pathlib import Path

from pile_fast.data.files import read_cells
from pile_fast.data.locate import find_file
from pile_fast.data.rows import DataError, parse_number

SPLITS = ("train", "dev", "test")
SYSTEMS = ("CNN", "CNN-Cnt")  # the paper's own; published for dev and test


def load_wikiqa(folder: str | os.PathLike, split: str) -> list[dict]:
    """The questions of a split as rows, those without an answer among their sentences included.

    Query and document ids are the .ref file's numbers, "12" and "12-0", so they repeat between splits. In dev and
    test the paper's systems are the teachers; train has none.

    Args:
        folder: the data folder.
        split: "train" (2,118 questions), "dev" (296) or "test" (633).

    Raises:
        FileNotFoundError: a file is missing; the message names it.
        ValueError: a line is broken, or two files do not match; the message names file and line.
    """
    if split not in SPLITS:
        raise ValueError(f"split: expected one of {', '.join(SPLITS)}, got {split!r}")
    folder = Path(folder)
    text_path, ref_path = (find_file(folder, f"wikiqa/WikiQA-{split}.{kind}") for kind in ("txt", "ref"))
    systems = () if split == "train" else SYSTEMS
    run_paths = [find_file(folder, f"wikiqa/emnlp-table/WikiQA.{name}.{split}.rank") for name in systems]

    pairs = read_cells(text_path, "\t", 3)
    keys = read_cells(ref_path, None, 4)
    runs = [read_cells(path, None, 6) for path in run_paths]
    for path, lines in zip((ref_path, *run_paths), (keys, *runs), strict=True):
        if len(lines) != len(pairs):
            raise DataError(path, f"expected {len(pairs)} lines as in {text_path}, got {len(lines)}")
    rows: dict[str, dict] = {}
    for line, ((question, sentence, label), (query_id, _, doc_id, ref_label)) in enumerate(zip(pairs, keys, strict=True)):
        row = rows.setdefault(query_id, {"query_id": query_id, "query": question, "documents": [], "doc_ids": [], "labels": []})
        if question != row["query"] or label != ref_label or label not in ("0", "1"):
            raise DataError(f"{ref_path}:{line + 1}", f"does not match the line in {text_path}")
        row["documents"].append(sentence)
        row["doc_ids"].append(f"{query_id}-{doc_id}")
        row["labels"].append(float(label))
        if not systems:
            continue
        row.setdefault("teachers", list(systems))
        scores = []
        for path, run in zip(run_paths, runs, strict=True):
            if run[line][0] != query_id or run[line][2] != doc_id:
                raise DataError(f"{path}:{line + 1}", f"does not match the line in {ref_path}")
            try:
                scores.append(parse_number("score", run[line][4]))
            except ValueError as error:
                raise DataError(f"{path}:{line + 1}", error) from None
        row.setdefault("teacher_logits", []).append(scores)
    return list(rows.values())
