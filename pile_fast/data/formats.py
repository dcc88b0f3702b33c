"""Reading and writing rows, whatever the format; docs/data.md shows each format's mapping to the schema."""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from pile_fast.data.rows import BadRows, DataError

if TYPE_CHECKING:
    import datasets

_OF_JSON = ("bge", "tevatron")  # lines of JSON with columns of their own
# Each a module of this package with `read_rows` and `write_rows`, or two functions in `jsonl`.
FORMATS = ("jsonl", "parquet", "letor", "trec", "qrels", *_OF_JSON)
_SUFFIXES = {
    "jsonl": (".jsonl", ".ndjson", ".json"),
    "parquet": (".parquet", ".pq"),
    "letor": (".txt", ".letor", ".svm", ".svmlight", ".libsvm"),
    "trec": (".run", ".trec", ".res"),
    "qrels": (".qrels",),
}
_COMPRESSED = (".gz", ".xz")
_FORMAT_OF = {suffix: format for format, suffixes in _SUFFIXES.items() for suffix in suffixes}


def format_of(path: str | os.PathLike) -> str:
    """The format of a file by its suffix (before .gz or .xz); "bge" and "tevatron" have no suffix.

    Raises:
        ValueError: the suffix is not known.
    """
    suffix = _whole_name(path).suffix
    if suffix not in _FORMAT_OF:
        raise ValueError(f"{path}: the name does not tell the format; give it, one of {', '.join(FORMATS)}")
    return _FORMAT_OF[suffix]


def stem(path: str | os.PathLike) -> str:
    """A file's name without the suffixes of its compression and its format, and no others.

    >>> [stem(name) for name in ("bm25.run", "S1.txt.xz", "bm25.k1=0.9.txt", "run.v2")]
    ['bm25', 'S1', 'bm25.k1=0.9', 'run.v2']
    """
    name = _whole_name(path)
    return name.stem if name.suffix in (*_FORMAT_OF, ".tsv") else name.name


def _whole_name(path: str | os.PathLike) -> Path:
    path = Path(path)
    return path.with_suffix("") if path.suffix in _COMPRESSED else path


def read_rows(
    paths: str | os.PathLike | Sequence[str | os.PathLike],
    *,
    format: str | None = None,
    bad_rows: BadRows | None = None,
    **options: Any,
) -> Iterator[dict]:
    """The rows of a file, or of several files as one data set: checked, normalised (`check_row`), one at a time.

    Args:
        paths: one file or several; all but Parquet may be compressed (.gz, .xz). A folder stands for the Parquet files in
            it, in the order of their names. TREC: runs, each a teacher.
        format: one of `FORMATS`; None = by the suffix.
        bad_rows: counts broken rows and lines, which are left out; None = the first one raises.
        options: of the format "trec": `teachers`, a name per run (default: the files' names, without suffixes); `qrels`, a
            file; `queries` and `documents`, files of names and texts, tab-separated; `unjudged`, the label of documents
            that the qrels do not list (None = unlabelled).

    Raises:
        DataError: a row is broken ("file:line: reason", Parquet "file: row N: reason"), a file is damaged or has no rows.
        ValueError: an argument does not fit; a format is not known.
        OSError: a file cannot be read.

    >>> import pathlib, tempfile
    >>> path = pathlib.Path(tempfile.mkdtemp()) / "data.jsonl"
    >>> _ = path.write_text('{"query_id": "q", "query": "why", "documents": ["a", "b"], "labels": [1, null]}\\n')
    >>> [row["labels"] for row in read_rows(path)]
    [[1.0, None]]
    """
    paths = as_paths(paths, format)
    for path in paths:
        if path.is_dir():
            raise FileNotFoundError(f"{path}: not a file, and not a folder of Parquet files")
    formats = {format} if format else {format_of(path) for path in paths}
    if len(formats) != 1 or not paths:
        raise ValueError(f"expected files of one format, got {', '.join(sorted(formats)) or 'no files'}")
    format = formats.pop()
    if format not in FORMATS:
        raise ValueError(f"format: expected one of {', '.join(FORMATS)}, got {format!r}")
    options = {name: value for name, value in options.items() if value is not None}
    if unknown := options.keys() - (_TREC_OPTIONS if format == "trec" else set()):
        raise ValueError(f"{', '.join(sorted(unknown))}: not an option of the format {format}")
    for name in _TREC_FILES & options.keys():
        options[name] = Path(options[name])
    for path in [*paths, *(options[name] for name in _TREC_FILES & options.keys())]:
        if not path.is_file():
            raise FileNotFoundError(f"{path}: {'not a file' if path.exists() else 'no such file'}")
    module = _module(format)
    if format in _OF_JSON:
        options["convert"] = getattr(module, f"from_{format}")
    return _some(module.read_rows(paths, bad_rows, **options), paths, bad_rows)


_TREC_FILES = {"qrels", "queries", "documents"}
_TREC_OPTIONS = _TREC_FILES | {"teachers", "unjudged"}


def as_paths(paths: str | os.PathLike | Sequence[str | os.PathLike], format: str | None = None) -> list[Path]:
    """The files; where the format is Parquet or open, a folder stands for the Parquet files in it."""
    found = [Path(path) for path in ([paths] if isinstance(paths, (str, os.PathLike)) else paths)]
    if format not in (None, "parquet"):
        return found
    return [part for path in found for part in (_parts(path) or [path])]


def _parts(folder: Path) -> list[Path]:
    """The Parquet files in a folder, if it is one; names that begin with a dot or an underscore do not count."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if path.suffix in _SUFFIXES["parquet"] and path.name[0] not in "._")


def _module(format: str) -> ModuleType:
    """The format's module, imported when it is used: Parquet needs pyarrow."""
    return importlib.import_module(f"pile_fast.data.{'jsonl' if format in _OF_JSON else format}")


def _some(rows: Iterator[dict], paths: list[Path], bad_rows: BadRows | None) -> Iterator[dict]:
    before, shown = (bad_rows.count, len(bad_rows.reasons)) if bad_rows is not None else (0, 0)
    empty = True
    for row in rows:
        empty = False
        yield row
    if empty:
        reason = "no rows"
        if bad_rows is not None and bad_rows.count > before:
            reason += f": all {bad_rows.count - before} are broken"
            reason += "".join(f", the first: {first}" for first in bad_rows.reasons[shown:][:1])
        raise DataError(", ".join(map(str, paths)), reason)


def write_rows(path: str | os.PathLike, rows: Iterable[dict], *, format: str | None = None, teacher: str | None = None) -> None:
    """Write rows to a file; if anything fails, the file is as it was before.

    Args:
        path: the file; all but Parquet may be compressed (.gz, .xz).
        rows: as `read_rows` gives them.
        format: one of `FORMATS`; None = by the suffix.
        teacher: whose scores a format with room for one holds ("trec", "bge", "tevatron"); "ensemble" = `ensemble_logits`;
            None = the ensemble if there is one, else the only teacher.

    Raises:
        ValueError: the format is not known, or cannot hold a row.
        OSError: cannot write there.
    """
    path = Path(path)
    format = format or format_of(path)
    if format not in FORMATS:
        raise ValueError(f"format: expected one of {', '.join(FORMATS)}, got {format!r}")
    if teacher is not None and format not in ("trec", *_OF_JSON):
        raise ValueError(f"teacher: the format {format} holds all teachers or none")
    module = _module(format)
    if format in _OF_JSON:
        module.write_rows(path, rows, functools.partial(getattr(module, f"to_{format}"), teacher=teacher))
    else:
        module.write_rows(path, rows, **({"teacher": teacher} if format == "trec" else {}))


def load_dataset(
    paths: str | os.PathLike | Sequence[str | os.PathLike],
    *,
    format: str | None = None,
    bad_rows: BadRows | None = None,
    **options: Any,
) -> datasets.Dataset:
    """The rows as a `datasets.Dataset` with the schema's columns, for training.

    It is kept in the `datasets` cache, on disk, and made again when a file changes.

    Args:
        paths, format, bad_rows, options: see `read_rows`.

    Raises:
        ValueError, OSError: see `read_rows`.
    """
    import datasets

    from pile_fast import __version__
    from pile_fast.data.files import fingerprint
    from pile_fast.data.parquet import SCHEMA

    read_rows(paths, format=format, **options)  # checks the arguments
    paths = as_paths(paths, format)
    files = [*paths, *(value for name, value in options.items() if name in _TREC_FILES and value is not None)]
    content = [fingerprint(*files), format, sorted(options.items()), bad_rows is not None, SCHEMA.to_string(), __version__]
    read = False

    def rows() -> Iterator[dict]:
        nonlocal read
        read = True
        yield from read_rows(paths, format=format, bad_rows=bad_rows, **options)

    try:
        dataset = datasets.Dataset.from_generator(
            rows, features=datasets.Features.from_arrow_schema(SCHEMA), fingerprint=datasets.fingerprint.Hasher.hash(content)
        )
    except datasets.exceptions.DatasetGenerationError as error:
        if isinstance(error.__cause__, (ValueError, OSError)):
            raise error.__cause__ from None
        raise
    if bad_rows is not None and not read:  # it was in the cache, which does not know the broken rows
        for _ in read_rows(paths, format=format, bad_rows=bad_rows, **options):
            pass
    return dataset
