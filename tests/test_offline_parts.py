"""A data set of one or more files in numbered parts: the same ones however it is read."""

import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pile_fast.data import parquet, write_rows
from pile_fast.offline.parts import DataSet


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(parquet, "BATCH_VALUES", 8)
    monkeypatch.setattr(parquet, "ROWS_PER_TABLE", 4)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Parts "b", "a" and an empty one of a data set, beside files that are none."""
    monkeypatch.chdir(tmp_path)
    os.mkdir("data")
    for name, count in (("b", 5), ("a", 11), ("empty", 0)):
        pq.write_table(pa.table({"query_id": [f"{name}{i}" for i in range(count)]}, SCHEMA), f"data/{name}.parquet")
    for name in ("_SUCCESS", ".hidden.parquet", "_metadata.parquet", "readme.txt"):
        (tmp_path / "data" / name).write_text("no part")
    return "data"


SCHEMA = pa.schema([("query_id", pa.string())])


def ids(parts):
    return [name for part in parts for name in part.table["query_id"].to_pylist()]


@pytest.mark.parametrize("paths", ["data", ["data/a.parquet", "data/b.parquet"]])
def test_a_folder_is_its_files_in_the_order_of_their_names(folder, paths):
    data = DataSet(paths)
    parts = list(data.parts())
    assert ids(parts) == [f"a{i}" for i in range(11)] + [f"b{i}" for i in range(5)]
    assert [part.number for part in parts] == list(range(len(parts))) and len(parts) > 6
    for part in parts:  # rows are counted anew in every file
        name = part.path.removeprefix("data/")[0]
        assert part.table["query_id"][0].as_py() == f"{name}{part.first_row}"
    done = frozenset({0, 3, len(parts) - 1})
    assert [part.number for part in data.parts(done)] == [n for n in range(len(parts)) if n not in done]
    assert ids(data.parts(done)) == ids(part for part in parts if part.number not in done)


def test_several_files_come_in_the_order_given(folder):
    assert ids(DataSet(["data/b.parquet", "data/a.parquet"]).parts())[0] == "b0"


def test_other_formats_are_one_data_set(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in "ab":
        write_rows(f"{name}.jsonl", [{"query_id": f"{name}{i}", "labels": [1.0]} for i in range(6)])
    parts = list(DataSet(["a.jsonl", "b.jsonl"]).parts())
    assert [(part.number, part.first_row, len(part.table)) for part in parts] == [(0, 0, 4), (1, 4, 4), (2, 8, 4)]
    assert parts[0].path == "a.jsonl, b.jsonl"
    assert [part.number for part in DataSet(["a.jsonl", "b.jsonl"]).parts(frozenset({1}))] == [0, 2]


def test_columns_and_their_types_are_brought_together(folder):
    one = pa.table({"query_id": ["q"], "labels": pa.array([[None]], pa.list_(pa.null())), "x": pa.nulls(1)})
    two = pa.table({"x": [1], "labels": [[1.5]], "query_id": ["p"]})
    three = pa.table({"x": [1.5], "labels": [[2]], "query_id": ["r"]})
    for name, table in (("one", one), ("two", two), ("three", three)):
        pq.write_table(table, f"{name}.parquet")
    for paths in (["one.parquet", "two.parquet", "three.parquet"], ["three.parquet", "two.parquet", "one.parquet"]):
        tables = [part.table for part in DataSet(paths).parts()]
        assert tables[0].schema == tables[1].schema == tables[2].schema
        assert pa.concat_tables(tables)["labels"].type == pa.list_(pa.float64())
    only = [part.table.column_names for part in DataSet("one.parquet").parts(columns=("labels", "none", "query_id"))]
    assert only == [["labels", "query_id"]]


def test_what_cannot_be_one_data_set(folder, tmp_path):
    def error_of(paths, **options):
        with pytest.raises((ValueError, OSError)) as caught:
            list(DataSet(paths, **options).parts())
        return str(caught.value)

    os.mkdir("none")
    pq.write_table(pa.table({"query_id": ["q"], "x": [1]}), "more.parquet")
    pq.write_table(pa.table({"query_id": [[1]]}), "lists.parquet")
    pq.write_table(pa.table([["q"], ["p"]], names=["query_id", "query_id"]), "twice.parquet")
    write_rows("a.jsonl", [{"query_id": "q", "labels": [1.0]}])
    assert error_of("none") == "none: a folder without Parquet files; give a file, or a folder of Parquet files"
    assert error_of(["data", "more.parquet"]) == ("more.parquet: expected the columns of data/a.parquet; they differ in x")
    assert error_of(["data", "lists.parquet"]).startswith(
        "lists.parquet: expected columns of the same types as in data/a.parquet"
    )
    assert error_of("twice.parquet") == "twice.parquet: column query_id: appears 2 times"
    assert error_of(["data", "a.jsonl"]) == "expected files of one format, got jsonl, parquet"
    assert error_of("data", format="jsonl") == "data: a folder is one of Parquet files, not of jsonl; name the files"
    assert error_of(["data", "data/a.parquet"]) == "data/a.parquet: given twice"
    assert error_of([]) == "expected files of one format, got no files"
    assert error_of("data/empty.parquet") == "data/empty.parquet: no rows"
    assert error_of("a.parquet") == "a.parquet: no such file"
    assert error_of("data", qrels="q.txt") == "qrels: not an option of the format parquet"
    assert error_of("a.jsonl", qrels="q.txt").startswith("qrels: not an option of the format jsonl")
    if hasattr(os, "mkfifo"):
        os.mkfifo("pipe.parquet")
        os.mkfifo("pipe.jsonl")
        for name in ("pipe.parquet", "pipe.jsonl"):  # and does not wait for a writer
            assert error_of(name) == f"{name}: not a file"
    (tmp_path / "data" / "b.parquet").write_bytes((tmp_path / "data" / "b.parquet").read_bytes()[:-9])
    assert error_of("data").startswith("data/b.parquet: damaged file")


def test_the_fingerprint_is_of_every_file(folder, tmp_path):
    before = DataSet("data").fingerprint()
    assert DataSet(["data/a.parquet", "data/b.parquet", "data/empty.parquet"]).fingerprint() == before
    pq.write_table(pa.table({"query_id": ["c"]}, SCHEMA), "data/c.parquet")
    assert DataSet("data").fingerprint() != before
    (tmp_path / "a.run").write_text("q Q0 d 1 2.5 a\n")
    (tmp_path / "qrels").write_text("q 0 d 1\n")
    before = DataSet("a.run", qrels="qrels").fingerprint()
    (tmp_path / "qrels").write_text("q 0 d 2\n")
    assert DataSet("a.run", qrels="qrels").fingerprint() != before
    assert DataSet("a.run").fingerprint() != DataSet("a.run", unjudged=0.0).fingerprint()
