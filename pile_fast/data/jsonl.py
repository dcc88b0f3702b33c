"""JSON lines: the schema's own, a row a line, and those of FlagEmbedding (BGE) and Tevatron."""

from __future__ import annotations

import base64
import datetime
import json
import math
from collections.abc import Callable, Iterable, Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

from pile_fast.data.files import atomic_path, byte_lines, decode, open_text
from pile_fast.data.rows import COLUMNS, UNLABELLED, BadRows, DataError, RowChecker, check_row, reject, scores_of, show, twice


def read_rows(
    paths: list[Path], bad_rows: BadRows | None = None, convert: Callable[[dict, str], dict] | None = None
) -> Iterator[dict]:
    """Rows of files.

    Args:
        paths: files of an object a line, or of one JSON array of objects.
        convert: makes a row of an object and a name for a query without one. Where it finds a teacher in one object, the
            teacher is in all rows, and scored nothing in those of the others.
    """
    check = RowChecker()
    scored = convert is not None and _scored(paths, convert, bad_rows is not None)
    number = 0  # of the query in all files
    for path in paths:
        for line, text in _objects(path):
            number += 1
            try:
                row = _parse(text)
                if convert:
                    row = convert(row, str(number))
                    if scored and "teacher_logits" not in row:
                        row |= _teacher([None] * len(row["documents"]))
                yield check(row)
            except ValueError as error:
                reject(bad_rows, f"{path}:{line}", error)


def _scored(paths: list[Path], convert: Callable[[dict, str], dict], skipping: bool) -> bool:
    """Whether a good object of any file has a teacher. It reads until it finds one.

    Args:
        skipping: broken objects are left out, so that they must not count.
    """
    seen: set[str] = set()
    number = 0
    for path in paths:
        for _, text in _objects(path):
            number += 1
            if not skipping and b"score" not in text:  # most objects need no parsing
                continue
            try:
                row = check_row(convert(_parse(text), str(number)))
            except ValueError:
                continue  # the reader will say so
            if row["teachers"] and row["query_id"] not in seen:
                return True
            seen.add(row["query_id"])
    return False


def _objects(path: Path) -> Iterator[tuple[int, bytes]]:
    """(line, text of a JSON value): of each line that is not blank, or of each element of an array that is the file."""
    lines = byte_lines(path)
    for number, line in lines:
        text = line.removeprefix(b"\xef\xbb\xbf").strip()
        if not text:
            continue
        if text[:1] == b"[" and text[1:].lstrip()[:1] in (b"", b"{", b"]"):
            yield from _elements(path, number, line + b"".join(rest for _, rest in lines))
            return
        yield number, line
        break
    for number, line in lines:
        if line.strip():
            yield number, line


def _elements(path: Path, first_line: int, text: bytes) -> Iterator[tuple[int, bytes]]:
    """(line, text) of each element of a JSON array.

    Raises:
        DataError: the text is not an array; what came before in it has been given.
    """
    decoder = json.JSONDecoder()
    line = first_line
    try:
        content = text.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}:{line + text.count(10, 0, error.start)}", f"not UTF-8: {error.reason}") from None
    end = content.index("[") + 1
    wanted = "]"  # which may stand in the place of the first element alone

    def skip_blanks() -> None:
        nonlocal line, end
        while end < len(content) and content[end] in " \t\r\n":
            line += content[end] == "\n"
            end += 1

    while True:
        skip_blanks()
        if wanted and content[end : end + 1] == wanted:
            break
        start = end
        try:
            _, end = decoder.raw_decode(content, start)
        except json.JSONDecodeError as error:
            at = error.pos - start
            raise DataError(f"{path}:{line + content.count(chr(10), start, start + at)}", f"not JSON: {error.msg}") from None
        except (RecursionError, ValueError) as error:
            raise DataError(f"{path}:{line}", _unreadable(error)) from None
        yield line, content[start:end].encode()
        line += content.count("\n", start, end)
        skip_blanks()
        if content[end : end + 1] == "]":
            break
        if content[end : end + 1] != ",":
            raise DataError(f"{path}:{line}", "not JSON: expected ',' or ']' after an element of the array")
        end += 1
        wanted = ""
    end += 1
    skip_blanks()
    if end < len(content):
        raise DataError(f"{path}:{line}", "not JSON: there is more after the array")


def _parse(text: bytes) -> dict:
    line = decode(text)
    try:
        row = _DECODER.decode(line)
    except json.JSONDecodeError as error:
        advice = ""
        if line.strip() == "{":
            advice = "; write each object on a line (jq -c . FILE does), or all of them in one array"
        raise ValueError(f"not JSON: {error.msg} at character {error.pos + 1}{advice}") from None
    except RecursionError as error:
        raise ValueError(_unreadable(error)) from None
    if not isinstance(row, dict):
        raise ValueError(f"expected an object, got {line.strip()[:40]}")
    return row


def _unreadable(error: Exception) -> str:
    return "not a row: nested too deeply" if isinstance(error, RecursionError) else f"not a row: {error}"


def _object(pairs: list[tuple[str, object]]) -> dict:
    content = dict(pairs)
    if len(content) != len(pairs):
        raise ValueError(f"the key {show(twice(name for name, _ in pairs))} appears twice in one object")
    return content


_DECODER = json.JSONDecoder(object_pairs_hook=_object)


def write_rows(path: Path, rows: Iterable[dict], convert: Callable[[dict], dict] | None = None) -> None:
    """A line a row: the row without what it does not have, or what `convert` makes of it.

    Columns outside the schema may hold what JSON has no type for. Decimals are numbers; dates and times are texts (ISO
    8601), durations their seconds, bytes base64; NaN is null.

    Raises:
        ValueError: the row cannot be written; the message names query and column.
    """
    with atomic_path(path) as temporary, open_text(temporary) as file:
        for row in rows:
            try:
                file.write(_dumps((convert or _present)(row)) + "\n")
            except ValueError as error:
                raise ValueError(f"query {row.get('query_id')!r}: {error}") from None


def _dumps(content: dict) -> str:
    try:
        return json.dumps(content, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError):  # rare, so only now column by column
        content = {name: _plain(name, value, name not in COLUMNS) for name, value in content.items()}
        return json.dumps(content, ensure_ascii=False, allow_nan=False)


def _plain(name: str, value: object, foreign: bool) -> object:
    """The value in JSON's own types; NaN is null in columns that this package does not know."""
    if isinstance(value, dict):
        return {str(key): _plain(name, entry, foreign) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(name, entry, foreign) for entry in value]
    if isinstance(value, Decimal):
        value = int(value) if value.is_finite() and value == value.to_integral_value() else float(value)
    if isinstance(value, float) and not math.isfinite(value):
        if foreign and value != value:
            return None
        raise ValueError(f"{name}: JSON has no {value}")
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (datetime.date, datetime.time)):  # datetime among them
        return value.isoformat()
    if isinstance(value, datetime.timedelta):
        return value.total_seconds()
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    raise ValueError(f"{name}: JSON cannot hold {show(value)}")


def _present(row: dict) -> dict:
    content = {name: value for name, value in row.items() if value is not None}
    if not content.get("teachers"):
        content.pop("teachers", None)
        content.pop("teacher_logits", None)
    return content


def _teacher(scores: list) -> dict:
    return {"teacher_logits": [[score] for score in scores], "teachers": ["teacher"]}


def from_bge(line: dict, number: str) -> dict:
    """{"query", "pos", "neg", "pos_scores", "neg_scores"}: labels 1 and 0, one teacher if there are scores, also null ones."""
    positive, negative = _list(line, "pos"), _list(line, "neg", [])
    row = {
        "query_id": _first(line.get("query_id"), line.get("id"), number),
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
    if line.get("pos_scores") is not None or line.get("neg_scores") is not None:
        row |= _teacher(scores)
    return row


def from_tevatron(line: dict, number: str) -> dict:
    """{"query_id", "query", "passages"}, or "positive_passages" and "negative_passages": labels 1 and 0.

    The one teacher's scores are a list "scores", or the "score" of each passage, null where a passage has none.
    """
    row: dict[str, Any] = {"query_id": _first(line.get("query_id"), number), "query": line.get("query")}
    passages = {}
    if line.get("passages") is not None:
        if both := [name for name in _LABELS if line.get(name)]:
            raise ValueError(f"passages: expected either passages or {both[0]}, got both")
        passages = {f"passages[{i}]": passage for i, passage in enumerate(_list(line, "passages"))}
    else:
        row["labels"] = []
        for name, label in _LABELS.items():
            part = _list(line, name, None if label else [])
            passages |= {f"{name}[{i}]": passage for i, passage in enumerate(part)}
            row["labels"] += [label] * len(part)
    for where, passage in passages.items():
        if not isinstance(passage, dict) or not isinstance(passage.get("text"), str):
            raise ValueError(f"{where}: expected an object with a text, got {show(passage)}")
        if not isinstance(passage.get("title"), (str, type(None))):
            raise ValueError(f"{where}: title: expected a text, got {show(passage['title'])}")
    row["documents"] = [" ".join(filter(None, (passage.get("title"), passage["text"]))) for passage in passages.values()]
    names = [passage.get("docid") for passage in passages.values()]
    if None not in names:
        row["doc_ids"] = names
    elif any(name is not None for name in names):
        raise ValueError(f"{list(passages)[names.index(None)]}: docid: expected one as the other passages have, got null")
    own = [passage.get("score") for passage in passages.values()]
    if line.get("scores") is not None:
        if scored := next((where for where, score in zip(passages, own, strict=True) if score is not None), None):
            raise ValueError(f"{scored}: score: expected none beside the list of scores")
        row |= _teacher(_list(line, "scores"))
    elif any("score" in passage for passage in passages.values()):
        row |= _teacher(own)
    return row


_LABELS = {"positive_passages": 1.0, "negative_passages": 0.0}


def _first(*values: object) -> object:
    """The first that is not null."""
    return next((value for value in values if value is not None), None)


def to_bge(row: dict, teacher: str | None = None) -> dict:
    """Labels above 0 are positives; with the scores of one teacher (`scores_of`), if there are teachers."""
    positive = _positive(row)
    line = {"query_id": row["query_id"], "query": row["query"]}
    columns: dict[str, list] = {"": _texts(row)}
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
        document = row["doc_ids"][row["labels"].index(None)]
        raise ValueError(f"document {document!r}: the format has no unlabelled documents; {UNLABELLED}")
    return [label > 0 for label in row["labels"]]


def _all_scores(row: dict, teacher: str | None) -> list[float | None]:
    name, scores = scores_of(row, teacher)
    if None in scores:
        missing = row["doc_ids"][scores.index(None)]
        raise ValueError(f"document {missing!r}: the format has no missing scores, and {name!r} did not score it")
    return scores


def _list(line: dict, name: str, default: list | None = None) -> list:
    value = line.get(name)
    value = default if value is None else value
    if not isinstance(value, list):
        raise ValueError(f"{name}: expected a list, got {show(value)}")
    return value
