"""Parquet: rows of the schema, read and written a few at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from pile_fast.data.files import atomic_path
from pile_fast.data.rows import COLUMNS, BadRows, RowChecker, reject

_LISTS = pa.list_(pa.list_(pa.float32()))
SCHEMA = pa.schema(
    [
        ("query_id", pa.string()),
        ("query", pa.string()),
        ("documents", pa.list_(pa.string())),
        ("features", _LISTS),
        ("doc_ids", pa.list_(pa.string())),
        ("labels", pa.list_(pa.float32())),
        ("teacher_logits", _LISTS),
        ("teachers", pa.list_(pa.string())),
        ("ensemble_logits", pa.list_(pa.float32())),
    ]
)
# How much of a file is in memory at a time, as encoded bytes and as values of its longest column.
BATCH_BYTES = 2**25
BATCH_VALUES = 2**20
_ROWS_PER_TABLE = 1000
_READ_BUFFER = 2**20


def open_parquet(path: Path) -> pq.ParquetFile:
    """The file, set to read in pieces however large its row groups are.

    Raises:
        ValueError: not a Parquet file.
        FileNotFoundError: no such file.
    """
    try:
        # Without a buffer a whole column chunk would be fetched at once.
        return pq.ParquetFile(path, buffer_size=_READ_BUFFER, pre_buffer=False)
    except pa.ArrowInvalid as error:
        raise ValueError(f"{path}: damaged file: {error}") from error


def rows_at_a_time(metadata: pq.FileMetaData) -> int:
    """How many rows, on the file's average, are `BATCH_BYTES` encoded or `BATCH_VALUES` values; at least one."""
    size = values = 0
    for i in range(metadata.num_row_groups):
        group = metadata.row_group(i)
        size += group.total_byte_size
        values += max((group.column(c).num_values for c in range(group.num_columns)), default=0)
    rows = max(1, metadata.num_rows)
    return max(1, min(rows, BATCH_BYTES * rows // max(size, 1), BATCH_VALUES * rows // max(values, 1)))


def read_rows(paths: list[Path], bad_rows: BadRows | None = None) -> Iterator[dict]:
    check = RowChecker()
    for path in paths:
        with open_parquet(path) as file:
            present = set(file.schema_arrow.names)
            if "query_id" not in present:
                raise ValueError(f"{path}: missing column query_id, the file has {', '.join(file.schema_arrow.names)}")
            number = 0
            try:
                for batch in file.iter_batches(
                    batch_size=rows_at_a_time(file.metadata), columns=[name for name in COLUMNS if name in present]
                ):
                    for row in batch.to_pylist():
                        number += 1
                        try:
                            yield check(row)
                        except ValueError as error:
                            reject(bad_rows, f"{path}:row {number}", error)
            except (OSError, pa.ArrowException) as error:
                raise ValueError(f"{path}: damaged file after row {number}: {error}") from error


def rows_to_table(rows: Iterable[dict]) -> pa.Table:
    """Rows as a table of `SCHEMA`."""
    return pa.Table.from_pylist(list(rows), SCHEMA)


def write_rows(path: Path, rows: Iterable[dict]) -> None:
    with atomic_path(path) as temporary:
        write_tables(temporary, SCHEMA, _tables(rows))


def _tables(rows: Iterable[dict]) -> Iterator[pa.Table]:
    waiting = []
    for row in rows:
        waiting.append(row)
        if len(waiting) == _ROWS_PER_TABLE:
            yield rows_to_table(waiting)
            waiting = []
    yield rows_to_table(waiting)


def write_tables(path: Path, schema: pa.Schema, tables: Iterable[pa.Table]) -> None:
    """Each table a row group."""
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        for table in tables:
            writer.write_table(table, row_group_size=max(1, table.num_rows))
