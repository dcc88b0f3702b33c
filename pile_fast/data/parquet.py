"""Parquet: rows of the schema, read and written a few at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pile_fast.data.files import atomic_path
from pile_fast.data.rows import COLUMNS, BadRows, DataError, RowChecker, reject

_LISTS = pa.list_(pa.list_(pa.float32()))
SCHEMA = pa.schema(
    [
        ("query_id", pa.string()),
        ("query", pa.string()),
        ("documents", pa.list_(pa.string())),
        ("features", _LISTS),
        ("doc_ids", pa.list_(pa.string())),
        ("labels", pa.list_(pa.float64())),  # so that whole numbers stay what they are
        ("teacher_logits", _LISTS),
        ("teachers", pa.list_(pa.string())),
        ("ensemble_logits", pa.list_(pa.float32())),
    ]
)
# What each column of a row is: how deep in lists, and lists of what.
_KINDS = {
    "query_id": (0, "names"),
    "query": (0, "texts"),
    "documents": (1, "texts"),
    "features": (2, "numbers"),
    "doc_ids": (1, "names"),
    "labels": (1, "numbers"),
    "teacher_logits": (2, "numbers"),
    "teachers": (1, "names"),
    "ensemble_logits": (1, "numbers"),
}
# How much of a file is in memory at a time: encoded bytes, and numbers in its longest column. A text counts as several numbers,
# as texts that repeat are short when they are encoded, and long again in memory.
BATCH_BYTES = 2**25
BATCH_VALUES = 2**20
_VALUES_PER_TEXT = 8
_SAMPLED_GROUPS = 16
ROWS_PER_TABLE = 1000
_READ_BUFFER = 2**20
# What reading a damaged file raises; names in it need not be UTF-8.
_DAMAGED = (OSError, pa.ArrowException, UnicodeDecodeError)


def open_parquet(path: Path) -> pq.ParquetFile:
    """The file, set to read in pieces however large its row groups are.

    Raises:
        DataError: not a Parquet file, or one without a usable schema.
        FileNotFoundError: no such file.
    """
    try:
        # Without a buffer a whole column chunk would be fetched at once.
        file = pq.ParquetFile(path, buffer_size=_READ_BUFFER, pre_buffer=False, page_checksum_verification=True)
        names = file.schema_arrow.names
    except (FileNotFoundError, PermissionError):
        raise
    except _DAMAGED as error:
        raise DataError(path, f"damaged file: {error}") from error
    file.path = path
    if twice := [name for name in COLUMNS if names.count(name) > 1]:
        raise DataError(path, f"column {twice[0]}: appears {names.count(twice[0])} times")
    return file


def rows_at_a_time(file: pq.ParquetFile, columns: list[str] | None = None) -> int:
    """How many rows of some columns (None: all) are `BATCH_BYTES` encoded or `BATCH_VALUES` values, on average; at least one.

    Of many row groups a sample, evenly spread, stands for the file.

    Raises:
        DataError: the file is damaged.
    """
    try:
        paths = [column.path.split(".") for column in file.schema]
    except _DAMAGED as error:
        raise DataError(file.path, f"damaged file: {error}") from error
    wanted = [c for c, path in enumerate(paths) if columns is None or path[0] in columns]
    groups = file.metadata.num_row_groups
    rows = size = values = 0
    for i in sorted({step * (groups - 1) // (_SAMPLED_GROUPS - 1) for step in range(_SAMPLED_GROUPS)} if groups else ()):
        # pyarrow ends the process at a damaged column's metadata: an exception of C++ that nothing catches. Reading is
        # safe and fails at the same places, so the metadata are looked at once a row of the group has been read.
        try:
            next(file.iter_batches(batch_size=1, row_groups=[i], columns=columns), None)
        except _DAMAGED as error:
            raise DataError(file.path, f"damaged file: row group {i + 1}: {error}") from error
        group = file.metadata.row_group(i)
        rows += group.num_rows
        size += group.total_byte_size
        values += max(
            (
                column.num_values * (_VALUES_PER_TEXT if column.physical_type == "BYTE_ARRAY" else 1)
                for column in map(group.column, wanted)
            ),
            default=0,
        )
    rows = max(1, rows)
    # A damaged file may give any figures.
    return max(
        1, min(file.metadata.num_rows, BATCH_VALUES, BATCH_BYTES * rows // max(size, 1), BATCH_VALUES * rows // max(values, 1))
    )


def read_rows(paths: list[Path], bad_rows: BadRows | None = None) -> Iterator[dict]:
    check = RowChecker()
    for path in paths:
        with open_parquet(path) as file:
            schema = {field.name: field.type for field in file.schema_arrow}
            if "query_id" not in schema:
                raise DataError(path, f"missing column query_id, the file has {', '.join(map(repr, schema))}")
            types = {name: _readable(path, name, schema[name]) for name in COLUMNS if name in schema}
            number = 0
            size = rows_at_a_time(file, list(types))
            try:
                for batch in file.iter_batches(batch_size=size, columns=list(types)):
                    for row in _to_rows(batch, types):
                        number += 1
                        try:
                            if isinstance(row, Exception):
                                raise ValueError(f"cannot be read: {row}")
                            row = check(row)
                        except ValueError as error:
                            reject(bad_rows, f"{path}: row {number}", error)
                            continue
                        yield row
            except _DAMAGED as error:
                raise DataError(path, f"damaged file after row {number}: {error}") from error
            if number != file.metadata.num_rows:
                raise DataError(path, f"damaged file: it counts {file.metadata.num_rows} rows, and has {number}")


def _readable(path: Path, name: str, type: pa.DataType) -> pa.DataType:
    """The type to cast a column to, so that `to_pylist` makes of it what rows hold.

    Raises:
        DataError: the column holds something else.
    """
    depth, kind = _KINDS[name]
    leaf = _storage(type)
    for _ in range(depth):
        if pa.types.is_null(leaf):
            return leaf
        if not (pa.types.is_nested(leaf) and hasattr(leaf, "value_type")):
            break
        leaf = _storage(leaf.value_type)
    else:
        value = leaf.value_type if pa.types.is_dictionary(leaf) else leaf
        if pa.types.is_null(value) or any(fits(value) for fits in _LEAVES[kind]):
            return _storage(type)
        # Texts of programs that do not mark them as such; and halves are NumPy's to older releases of pyarrow.
        plain = pa.float32() if pa.types.is_float16(value) else pa.string()
        binary = kind != "numbers" and (pa.types.is_binary(value) or pa.types.is_large_binary(value))
        if binary or (kind == "numbers" and pa.types.is_float16(value)):
            for _ in range(depth):
                plain = pa.list_(plain)
            return plain
    try:
        given = str(type)
    except UnicodeDecodeError:
        given = "a type with a name that is not UTF-8"
    raise DataError(path, f"column {name}: expected {'lists of ' * depth}{kind}, got {given}")


_TEXTS = (pa.types.is_string, pa.types.is_large_string, getattr(pa.types, "is_string_view", pa.types.is_string))
_LEAVES = {
    "texts": _TEXTS,
    "names": (*_TEXTS, pa.types.is_integer),
    "numbers": (
        pa.types.is_integer, pa.types.is_float32, pa.types.is_float64, pa.types.is_boolean, pa.types.is_decimal,
    ),
}  # fmt: skip


def _storage(type: pa.DataType) -> pa.DataType:
    return type.storage_type if isinstance(type, pa.BaseExtensionType) else type


def _to_rows(batch: pa.RecordBatch, types: dict[str, pa.DataType]) -> list[dict | Exception]:
    """The rows; in the place of one that cannot be one in Python, such as of a text that is not UTF-8, the reason."""
    try:
        batch.validate(full=True)  # damaged offsets would be followed anywhere
        columns = {}
        for name, type in types.items():
            column = batch.column(name)
            column = column.storage if isinstance(column, pa.ExtensionArray) else column
            columns[name] = (column if column.type == type else column.cast(type)).to_pylist()
    except (ValueError, OverflowError, LookupError, pa.ArrowException) as error:
        if batch.num_rows == 1:
            return [error]
        # Taken, not sliced: a slice is checked together with what lies around it.
        return [row for i in range(batch.num_rows) for row in _to_rows(batch.take(pa.array([i])), types)]
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def read_tables(
    file: pq.ParquetFile, start: int, stop: int, size: int, columns: list[str] | None = None
) -> Iterator[tuple[int, pa.Table]]:
    """(number of its first row, table) for the rows from `start` to `stop`, `size` each, the last one the rest.

    Raises:
        DataError: the file is damaged.
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
    except _DAMAGED as error:
        raise DataError(file.path, f"damaged file after row {position}: {error}") from error


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
