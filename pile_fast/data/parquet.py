"""Parquet: rows of the schema, read and written a few at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from pile_fast.data.files import atomic_path
from pile_fast.data.rows import COLUMNS, BadRows, RowChecker, reject
from pile_fast.extras import needs_extra

with needs_extra("train"):
    import pyarrow as pa
    import pyarrow.parquet as pq

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
# How much of a file is in memory at a time: encoded bytes, and numbers in its longest column. A text counts as several numbers,
# as texts that repeat are short when they are encoded, and long again in memory.
BATCH_BYTES = 2**25
BATCH_VALUES = 2**20
_VALUES_PER_TEXT = 8
ROWS_PER_TABLE = 1000
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
        columns = (group.column(c) for c in range(group.num_columns))
        values += max(
            (column.num_values * (_VALUES_PER_TEXT if column.physical_type == "BYTE_ARRAY" else 1) for column in columns),
            default=0,
        )
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


def read_tables(
    file: pq.ParquetFile, start: int, stop: int, size: int, columns: list[str] | None = None
) -> Iterator[tuple[int, pa.Table]]:
    """(number of its first row, table) for the rows from `start` to `stop`, `size` each, the last one the rest.

    Raises:
        ValueError: the file is damaged.
    """
    ends = np.cumsum([file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)])
    groups = range(int(np.searchsorted(ends, start, side="right")), int(np.searchsorted(ends, stop)) + 1)
    position = int(ends[groups[0] - 1]) if groups[0] else 0
    waiting, rows = [], 0
    try:
        for batch in file.iter_batches(batch_size=size, row_groups=list(groups), columns=columns):
            before, position = position, position + batch.num_rows
            batch = batch.slice(max(0, start - before), max(0, min(position, stop) - max(before, start)))
            while batch.num_rows:
                piece = batch.slice(0, size - rows)
                waiting.append(piece)
                rows += piece.num_rows
                batch = batch.slice(piece.num_rows)
                if rows == size or start + rows == stop:
                    yield start, pa.Table.from_batches(waiting)
                    start, waiting, rows = start + rows, [], 0
    except (OSError, pa.ArrowException) as error:
        raise ValueError(f"damaged file after row {position}: {error}") from error


def rows_to_table(rows: Iterable[dict]) -> pa.Table:
    """Rows as a table of `SCHEMA`."""
    return pa.Table.from_pylist(list(rows), SCHEMA)


def write_rows(path: Path, rows: Iterable[dict]) -> None:
    with atomic_path(path) as temporary:
        write_tables(temporary, SCHEMA, tables(rows))


def tables(rows: Iterable[dict]) -> Iterator[pa.Table]:
    waiting = []
    for row in rows:
        waiting.append(row)
        if len(waiting) == ROWS_PER_TABLE:
            yield rows_to_table(waiting)
            waiting = []
    yield rows_to_table(waiting)


def write_tables(path: Path, schema: pa.Schema, tables: Iterable[pa.Table]) -> None:
    """Each table a row group."""
    # Few numbers repeat: a dictionary of them only costs time and space.
    texts = [column for field in schema for column in _texts(field.name, field.type)]
    with pq.ParquetWriter(path, schema, compression="zstd", use_dictionary=texts) as writer:
        for table in tables:
            writer.write_table(table, row_group_size=max(1, table.num_rows))


def _texts(name: str, type: pa.DataType) -> list[str]:
    """The Parquet columns of texts in an Arrow column."""
    if pa.types.is_list(type) or pa.types.is_large_list(type) or pa.types.is_fixed_size_list(type):
        return _texts(f"{name}.list.element", type.value_type)
    if pa.types.is_struct(type):
        return [column for field in type for column in _texts(f"{name}.{field.name}", field.type)]
    return [name] if pa.types.is_string(type) or pa.types.is_large_string(type) else []
