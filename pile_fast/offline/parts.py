"""A data set of any size on disk, in numbered parts, which an offline job reads and, to resume, reads again."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pile_fast.data import parquet
from pile_fast.data.files import fingerprint
from pile_fast.data.formats import as_paths, format_of, read_rows
from pile_fast.data.rows import twice
from pile_fast.extras import needs_extra

with needs_extra("train"):
    import pyarrow as pa


class Part(NamedTuple):
    """Some rows of a data set.

    Attributes:
        number: from 0, over the whole data set.
        path: the file they are in, or the files, as error messages name them.
        first_row: how many rows of `path` stand before the first of them.
        table: the rows.
    """

    number: int
    path: str
    first_row: int
    table: pa.Table


class DataSet:
    """The rows of one or more files in numbered parts; what a part holds depends on the files alone.

    Args:
        paths: files of one format, or a folder of Parquet files, which are taken in the order of their names.
        format: see `pile_fast.data.read_rows`; None = by the suffix.
        options: of the format, see `pile_fast.data.read_rows`.

    Attributes:
        files: all of them.
        name: the paths, for error messages.
        format: theirs.
        columns: the columns of Parquet files; None for other formats, whose rows have those of the schema.

    Raises:
        ValueError: the formats differ or are not known, or a folder has no Parquet files.
        OSError: a file cannot be read.

    >>> import tempfile
    >>> from pile_fast.data import write_rows
    >>> folder = Path(tempfile.mkdtemp())
    >>> for name in "ba":
    ...     write_rows(folder / f"{name}.parquet", [{"query_id": name, "labels": [1.0]}])
    >>> [(part.number, part.first_row, part.table["query_id"].to_pylist()) for part in DataSet(folder).parts()]
    [(0, 0, ['a']), (1, 0, ['b'])]
    """

    def __init__(self, paths: str | os.PathLike | Sequence[str | os.PathLike], *, format: str | None = None, **options: Any):
        self.name = ", ".join(map(str, [paths] if isinstance(paths, (str, os.PathLike)) else paths))
        self.files = as_paths(paths, format)
        for path in self.files:
            if path.is_dir() and format not in (None, "parquet"):
                raise ValueError(f"{path}: a folder is one of Parquet files, not of {format}; name the files")
            if path.is_dir():
                raise ValueError(f"{path}: a folder without Parquet files; give a file, or a folder of Parquet files")
            if not path.is_file():
                raise FileNotFoundError(f"{path}: {'not a file' if path.exists() else 'no such file'}")
        if again := twice(self.files):
            raise ValueError(f"{again}: given twice")
        formats = {format} if format else {format_of(path) for path in self.files}
        if len(formats) != 1 or not self.files:
            raise ValueError(f"expected files of one format, got {', '.join(sorted(formats)) or 'no files'}")
        self.format = formats.pop()
        self._options = {name: value for name, value in options.items() if value is not None}
        self.columns: list[str] | None = None
        for path in self.files:
            with open(path, "rb"):  # whose error names the file
                pass
        if self.format == "parquet":
            if self._options:
                raise ValueError(f"{', '.join(self._options)}: not an option of the format parquet")
            self._schema = self._common_schema()
            self.columns = self._schema.names
        else:
            read_rows(self.files, format=self.format, **self._options)  # checks them

    def fingerprint(self) -> list:
        """What must be the same for a job to resume, as JSON."""
        extra = [value for value in self._options.values() if isinstance(value, (str, os.PathLike))]
        return [fingerprint(*self.files, *extra), sorted((name, str(value)) for name, value in self._options.items())]

    def parts(self, done: frozenset[int] = frozenset(), columns: Sequence[str] | None = None) -> Iterator[Part]:
        """The parts that are not done.

        Args:
            done: numbers of parts to leave out.
            columns: to read, of those that there are; None = all.

        Raises:
            ValueError: a row is broken (all formats but Parquet are checked), a file is damaged, or there are no rows.
        """
        if self.format == "parquet":
            yield from self._parquet_parts(done, columns)
            return
        rows = read_rows(self.files, format=self.format, **self._options)
        for number, table in enumerate(parquet.tables(rows)):
            if number not in done and table.num_rows:
                table = table if columns is None else table.select([name for name in columns if name in table.column_names])
                yield Part(number, self.name, number * parquet.ROWS_PER_TABLE, table)

    def _parquet_parts(self, done: frozenset[int], columns: Sequence[str] | None) -> Iterator[Part]:
        before = 0  # parts of the files before
        schema = self._schema
        if columns is not None:
            schema = pa.schema([schema.field(name) for name in columns if name in schema.names])
        for path in self.files:
            with parquet.open_parquet(path) as file:
                size, total = parquet.rows_at_a_time(file), file.metadata.num_rows
                count = -(-total // size)
                todo = [number for number in range(count) if before + number not in done]
                while todo:
                    run = next((i for i in range(1, len(todo)) if todo[i] != todo[0] + i), len(todo))
                    start, stop = todo[0] * size, min((todo[run - 1] + 1) * size, total)
                    for first_row, table in _read(path, file, start, stop, size, schema.names):
                        table = table.select(schema.names)
                        table = table if table.schema.equals(schema) else table.cast(schema)
                        yield Part(before + first_row // size, str(path), first_row, table)
                    todo = todo[run:]
            before += count
        if not before:
            raise ValueError(f"{self.name}: no rows")

    def _common_schema(self) -> pa.Schema:
        schemas = []
        for path in self.files:
            with parquet.open_parquet(path) as file:
                schemas.append(file.schema_arrow)
            if set(schemas[-1].names) != set(schemas[0].names):
                others = set(schemas[-1].names) ^ set(schemas[0].names)
                raise ValueError(f"{path}: expected the columns of {self.files[0]}; they differ in {', '.join(sorted(others))}")
            try:  # a column without a value has no type of its own, one without a null is whole numbers to pandas
                common = pa.unify_schemas(schemas, promote_options="permissive")
            except pa.ArrowException as error:
                raise ValueError(f"{path}: expected columns of the same types as in {self.files[0]}: {error}") from error
        return common if len(schemas) > 1 else schemas[0]


def _read(path: Path, file: Any, start: int, stop: int, size: int, columns: list[str]) -> Iterator[tuple[int, pa.Table]]:
    try:
        yield from parquet.read_tables(file, start, stop, size, columns)
    except ValueError as error:
        raise ValueError(str(error) if str(error).startswith(str(path)) else f"{path}: {error}") from error
