"""JSON lines: the schema's own, a row a line, and those of FlagEmbedding (BGE) and Tevatron."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path

from pile_fast.data.files import atomic_path, open_text, read_lines
from pile_fast.data.rows import BadRows, RowChecker, reject, scores_of


def read_rows(paths: list[Path], bad_rows: BadRows | None = None, convert: Callable[[dict, str], dict] | None = None):
    """Rows of files; `convert` makes a row of a line's object and a name for a query without one."""
    check = RowChecker()
    number = 0  # of the query in all files
    for path in paths:
        for line_number, line in read_lines(path, bad_rows):
            if not line.strip():
                continue
            number += 1
            try:
                row = _parse(line)
                yield check(convert(row, str(number)) if convert else row)
            except ValueError as error:
                reject(bad_rows, f"{path}:{line_number}", error)


def _parse(line: str) -> dict:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} at character {error.pos + 1}") from None
    except RecursionError:
        raise ValueError("not a row: nested too deeply") from None
    if not isinstance(row, dict):
        raise ValueError(f"expected an object, got {line.strip()[:40]}")
    return row


def write_rows(path: Path, rows: Iterable[dict], convert: Callable[[dict], dict] | None = None) -> None:
    """A line a row: the row without what it does not have, or what `convert` makes of it."""
    with atomic_path(path) as temporary, open_text(temporary) as file:
        for row in rows:
            try:
                content = (convert or _present)(row)
            except ValueError as error:
                raise ValueError(f"query {row['query_id']}: {error}") from None
            file.write(json.dumps(content, ensure_ascii=False, allow_nan=False) + "\n")


def _present(row: dict) -> dict:
    content = {name: value for name, value in row.items() if value is not None}
    if not content.get("teachers"):
        content.pop("teachers", None)
        content.pop("teacher_logits", None)
    return content


def from_bge(line: dict, number: str) -> dict:
    """{"query", "pos", "neg", "pos_scores", "neg_scores"}: labels 1 and 0, one teacher if there are scores."""
    positive, negative = _list(line, "pos"), _list(line, "neg", [])
    row = {
        "query_id": line.get("query_id", line.get("id", number)),
        "query": line.get("query"),
        "documents": positive + negative,
        "labels": [1.0] * len(positive) + [0.0] * len(negative),
    }
    scores = []
    for name, documents in (("pos_scores", positive), ("neg_scores", negative)):
        given = _list(line, name, [])
        if given and len(given) != len(documents):
            raise ValueError(f"{name}: expected {len(documents)} scores, got {len(given)}")
        scores += given or [None] * len(documents)
    if any(score is not None for score in scores):
        row |= {"teacher_logits": [[score] for score in scores], "teachers": ["teacher"]}
    return row


def from_tevatron(line: dict, number: str) -> dict:
    """{"query_id", "query", "passages", "scores"}, or "positive_passages" and "negative_passages": labels 1 and 0."""
    row = {"query_id": line.get("query_id", number), "query": line.get("query")}
    if "passages" in line:
        passages = _list(line, "passages")
    else:
        positive, negative = _list(line, "positive_passages"), _list(line, "negative_passages", [])
        passages = positive + negative
        row["labels"] = [1.0] * len(positive) + [0.0] * len(negative)
    for i, passage in enumerate(passages):
        if not isinstance(passage, dict) or not isinstance(passage.get("text"), str):
            raise ValueError(f"passages[{i}]: expected an object with a text, got {str(passage)[:40]}")
    row["documents"] = [" ".join(filter(None, (passage.get("title"), passage["text"]))) for passage in passages]
    if all(passage.get("docid") is not None for passage in passages):
        row["doc_ids"] = [passage["docid"] for passage in passages]
    if line.get("scores") is not None:
        row |= {"teacher_logits": [[score] for score in _list(line, "scores")], "teachers": ["teacher"]}
    return row


def to_bge(row: dict, teacher: str | None = None) -> dict:
    """Labels above 0 are positives; with the scores of one teacher (`scores_of`), if there are teachers."""
    positive = _positive(row)
    line = {"query_id": row["query_id"], "query": row["query"]}
    columns = {"": _texts(row)}
    if row["teachers"] or row["ensemble_logits"]:
        columns["_scores"] = _all_scores(row, teacher)
    for suffix, values in columns.items():
        for name, wanted in (("pos", True), ("neg", False)):
            line[name + suffix] = [value for value, label in zip(values, positive, strict=True) if label is wanted]
    return line


def to_tevatron(row: dict, teacher: str | None = None) -> dict:
    """ "passages" with the "scores" of one teacher (`scores_of`), if there are teachers, else positives and negatives."""
    line = {"query_id": row["query_id"], "query": row["query"]}
    passages = [{"docid": name, "title": "", "text": text} for name, text in zip(row["doc_ids"], _texts(row), strict=True)]
    if row["teachers"] or row["ensemble_logits"]:
        return line | {"passages": passages, "scores": _all_scores(row, teacher)}
    positive = _positive(row)
    for name, wanted in (("positive_passages", True), ("negative_passages", False)):
        line[name] = [passage for passage, label in zip(passages, positive, strict=True) if label is wanted]
    return line


def _texts(row: dict) -> list[str]:
    if row["query"] is None or row["documents"] is None:
        raise ValueError("the format holds texts, and the row has no query or no documents")
    return row["documents"]


def _positive(row: dict) -> list[bool]:
    if None in row["labels"]:
        raise ValueError(f"document {row['doc_ids'][row['labels'].index(None)]}: the format has no unlabelled documents")
    return [label > 0 for label in row["labels"]]


def _all_scores(row: dict, teacher: str | None) -> list[float]:
    name, scores = scores_of(row, teacher)
    if None in scores:
        missing = row["doc_ids"][scores.index(None)]
        raise ValueError(f"document {missing}: the format has no missing scores, and {name} did not score it")
    return scores


def _list(line: dict, name: str, default: list | None = None) -> list:
    value = line.get(name)
    value = default if value is None else value
    if not isinstance(value, list):
        raise ValueError(f"{name}: expected a list, got {'null' if value is None else repr(value)[:40]}")
    return value
