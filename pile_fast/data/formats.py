"""Reading and writing rows, whatever the format; docs/data.md shows each format's mapping to the schema."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from pile_fast.data.rows import BadRows

_SUFFIXES = {
    ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl",
    ".parquet": "parquet", ".pq": "parquet",
}  # fmt: skip
READABLE = ("jsonl", "parquet", "bge", "tevatron")
WRITABLE = ("jsonl", "parquet")


def format_of(path: str | os.PathLike) -> str:
    """The format that a file's suffix (before .gz or .xz) tells.

    Raises:
        ValueError: it tells none.
    """
    suffixes = [suffix for suffix in Path(path).suffixes if suffix not in (".gz", ".xz")]
    if not suffixes or suffixes[-1] not in _SUFFIXES:
        raise ValueError(f"{path}: the format is not clear from the name; give one of {', '.join(READABLE)}")
    return _SUFFIXES[suffixes[-1]]


def read_rows(
    paths: str | os.PathLike | Sequence[str | os.PathLike],
    *,
    format: str | None = None,
    bad_rows: BadRows | None = None,
) -> Iterator[dict]:
    """The rows of a file, or of several files as one data set: checked, normalised (`check_row`), one at a time.

    Args:
        paths: one file or several; JSON lines and text may be compressed (.gz, .xz).
        format: "jsonl", "parquet", "bge" or "tevatron"; None = by the suffix.
        bad_rows: counts broken rows and lines, which are left out; None = the first one raises.

    Raises:
        ValueError: a row is broken ("file:line: reason"), a file is damaged or has no rows, or its format is not known.
        OSError: a file cannot be read.

    >>> import pathlib, tempfile
    >>> path = pathlib.Path(tempfile.mkdtemp()) / "data.jsonl"
    >>> _ = path.write_text('{"query_id": "q", "query": "why", "documents": ["a", "b"], "labels": [1, null]}\\n')
    >>> [row["labels"] for row in read_rows(path)]
    [[1.0, None]]
    """
    paths = [Path(path) for path in ([paths] if isinstance(paths, (str, os.PathLike)) else paths)]
    formats = {format} if format else {format_of(path) for path in paths}
    if len(formats) != 1:
        raise ValueError(f"expected files of one format, got {', '.join(sorted(formats)) or 'no files'}")
    for path in paths:
        if not path.is_file():
            raise FileNotFoundError(f"{path}: {'not a file' if path.exists() else 'no such file'}")
    return _some(_reader(formats.pop(), paths, bad_rows), paths)


def _reader(format: str, paths: list[Path], bad_rows: BadRows | None) -> Iterator[dict]:
    from pile_fast.data import jsonl

    if format == "jsonl":
        return jsonl.read_rows(paths, bad_rows)
    if format == "bge":
        return jsonl.read_rows(paths, bad_rows, jsonl.from_bge)
    if format == "tevatron":
        return jsonl.read_rows(paths, bad_rows, jsonl.from_tevatron)
    if format == "parquet":
        from pile_fast.data import parquet

        return parquet.read_rows(paths, bad_rows)
    raise ValueError(f"format: expected one of {', '.join(READABLE)}, got {format!r}")


def _some(rows: Iterator[dict], paths: list[Path]) -> Iterator[dict]:
    empty = True
    for row in rows:
        empty = False
        yield row
    if empty:
        raise ValueError(f"{', '.join(map(str, paths))}: no rows")


def write_rows(path: str | os.PathLike, rows: Iterable[dict], *, format: str | None = None) -> None:
    """Write rows to a file, which is there in whole or, if anything fails, as it was before.

    Args:
        path: the file; JSON lines may be compressed (.gz, .xz).
        rows: of the schema, as `read_rows` gives them.
        format: "jsonl" or "parquet"; None = by the suffix.

    Raises:
        ValueError: the format is not known, or cannot hold a row.
        OSError: cannot write there.
    """
    path = Path(path)
    format = format or format_of(path)
    if format not in WRITABLE:
        raise ValueError(f"format: expected one of {', '.join(WRITABLE)}, got {format!r}")
    if format == "jsonl":
        from pile_fast.data import jsonl as writer
    else:
        from pile_fast.data import parquet as writer
    writer.write_rows(path, rows)


def load_dataset(
    paths: str | os.PathLike | Sequence[str | os.PathLike],
    *,
    format: str | None = None,
    bad_rows: BadRows | None = None,
):
    """The rows as a `datasets.Dataset` with the schema's columns, for training.

    It lies in the `datasets` cache, on disk, whatever its size, and is made anew when a file changes.

    Args:
        paths, format, bad_rows: see `read_rows`.

    Raises:
        ValueError, OSError: see `read_rows`.
    """
    import datasets

    from pile_fast.data.files import fingerprint
    from pile_fast.data.parquet import SCHEMA

    read_rows(paths, format=format)  # checks the arguments
    paths = [os.fspath(paths)] if isinstance(paths, (str, os.PathLike)) else [os.fspath(path) for path in paths]
    content = datasets.fingerprint.Hasher.hash([fingerprint(*paths), format, bad_rows is not None, SCHEMA.to_string()])
    found = BadRows() if bad_rows is None else bad_rows
    read = False

    def rows():
        nonlocal read
        read = True
        yield from read_rows(paths, format=format, bad_rows=bad_rows)

    try:
        dataset = datasets.Dataset.from_generator(
            rows, features=datasets.Features.from_arrow_schema(SCHEMA), fingerprint=content
        )
    except datasets.exceptions.DatasetGenerationError as error:
        if isinstance(error.__cause__, (ValueError, OSError)):
            raise error.__cause__ from None
        raise
    if bad_rows is not None and not read:  # from the cache: the broken rows are only known from the files
        for _ in read_rows(paths, format=format, bad_rows=found):
            pass
    return dataset
