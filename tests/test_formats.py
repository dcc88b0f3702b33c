"""Rows of every format: what each maps to, what comes back after a round trip, and what is said about broken files."""

import datetime
import decimal
import gzip
import io
import json
import lzma
import math
import pickle
import subprocess
import sys
import time

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pile_fast.data import (
    BadRows,
    DataError,
    RankedLists,
    check_row,
    ensemble_as_teacher,
    load_dataset,
    read_letor,
    read_rows,
    write_rows,
)
from pile_fast.data.formats import format_of, stem
from pile_fast.data.rows import COLUMNS

TEXTS = [
    {
        "query_id": "q1",
        "query": "why is the sky blue?",
        "documents": ['Rayleigh, scattering\tand "quotes"', "", "日本語 \u2028 text"],
        "doc_ids": ["d1", "d2", "d7"],
        "labels": [2, None, 0],
        "teacher_logits": [[0.5, None], [-1e-7, 3e4], [None, None]],
        "teachers": ["cross encoder", "bm25"],
        "ensemble_logits": [0.25, 1.5, None],
    },
    {
        "query_id": "7",
        "query": "two",
        "documents": ["only"],
        "doc_ids": ["x"],
        "labels": [1],
        "teacher_logits": [[1.0, 2.0]],
        "teachers": ["cross encoder", "bm25"],
        "ensemble_logits": [0.0],
    },
]
FEATURES = [
    {"query_id": "a", "features": [[0.5, 0.0, 3.0], [0.0, 0.0, 0.0]], "labels": [1, 0], "doc_ids": ["D1", "D2"]},
    {"query_id": "b", "features": [[0.0, -2.5, 0.0]], "labels": [2]},
]


def rows_of(content):
    return [check_row(row) for row in content]


def write_lines(path, *lines):
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def error_of(function, *arguments, **options):
    with pytest.raises(ValueError) as caught:
        list(function(*arguments, **options))
    return str(caught.value)


# -- the schema


def test_a_row_is_filled_in():
    row = check_row({"query_id": 7, "documents": ["a", "b"], "other": "dropped"})
    assert tuple(row) == COLUMNS
    assert row["query_id"] == "7" and row["doc_ids"] == ["7.1", "7.2"] and row["labels"] == [None, None]
    assert row["teachers"] == [] and row["teacher_logits"] == [[], []]
    assert row["query"] is None and row["features"] is None and row["ensemble_logits"] is None
    assert check_row(row) == row


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"query_id": None}, "query_id: expected a name, got null"),
        ({"query_id": ""}, "query_id: expected a name, got ''"),
        ({"query_id": True}, "query_id: expected a name, got True"),
        ({"query": 5}, "query: expected a text, got 5"),
        ({"documents": "text"}, "documents: expected a list with an entry per document, got 'text'"),
        ({"documents": ["a"]}, "labels: expected 1 entries like documents, got 2"),
        ({"documents": ["a", None]}, "documents[1]: expected a text, got null"),
        ({"documents": [], "labels": [], "teacher_logits": []}, "documents: the query has no documents"),
        ({"doc_ids": ["x", "x"]}, "doc_ids: document 'x' appears twice"),
        ({"labels": ["high", 0]}, "labels[0]: expected a number or null, got 'high'"),
        ({"labels": [1, math.nan]}, "labels[1]: expected a number or null, got NaN; write null for what is not known"),
        ({"labels": [10**400, 0]}, "labels[0]: expected a number that is finite in float32, got 1000"),
        ({"teacher_logits": [[1], [1, 2]]}, "teacher_logits[1]: expected 1 numbers like teacher_logits[0], got 2"),
        ({"teacher_logits": [[1], None]}, "teacher_logits[1]: expected a list of numbers, got null"),
        ({"teacher_logits": [[1], [math.nan]]}, "teacher_logits[1][0]: expected a number or null, got NaN; write null"),
        ({"teacher_logits": [[-math.inf], [1]]}, "teacher_logits[0][0]: expected a number that is finite in float32, got -inf"),
        ({"teacher_logits": [["0.5"], [1]]}, "teacher_logits[0][0]: expected a number or null, got '0.5'"),
        ({"teachers": ["a", "b"]}, "teachers: expected 1 names like the columns of teacher_logits, got 2"),
        ({"teachers": "a"}, "teachers: expected a list of names, got 'a'"),
        ({"teacher_logits": [[1, 2], [1, 2]], "teachers": ["a", "a"]}, "teachers: expected different names"),
        ({"features": [[1.0], [None]]}, "features[1][0]: expected a number, got null"),
        ({"features": [[], []]}, "features: expected at least one per document"),
        ({"ensemble_logits": [1]}, "ensemble_logits: expected 2 entries like documents, got 1"),
    ],
)
def test_a_broken_row_says_why(change, reason):
    good = {"query_id": "q", "documents": ["a", "b"], "labels": [1, 0], "teacher_logits": [[1], [None]]}
    check_row(good)
    with pytest.raises(ValueError) as caught:
        check_row(good | change)
    assert str(caught.value).startswith(reason)


# B14
def test_a_repeated_name_among_many_is_found_in_linear_time():
    names = [f"d{i}" for i in range(100_000)]
    begin = time.perf_counter()
    with pytest.raises(ValueError, match="doc_ids: document 'd99998' appears twice"):
        check_row({"query_id": "q", "doc_ids": [*names[:-1], "d99998"]})
    assert time.perf_counter() - begin < 5  # minutes, where each name is looked for in a list


@pytest.mark.parametrize("label", [20000001, 2**53, -(2**53), decimal.Decimal(20000001)])
def test_whole_labels_are_exact(label):
    assert check_row({"query_id": "q", "labels": [label]})["labels"] == [label]


@pytest.mark.parametrize("label", [2**53 + 1, -(2**53) - 1, 2**64])
def test_whole_labels_that_would_tie_are_refused(label):
    with pytest.raises(ValueError, match=r"labels\[1\]: expected a whole number of at most 2\^53, got -?\d+"):
        check_row({"query_id": "q", "labels": [0, label]})


def test_labels_that_would_tie_in_tensors_are_refused(tmp_path):
    row = {"query_id": "q", "features": [[1.0], [2.0]], "labels": [20000001, 20000000]}
    reason = "query 'q': labels 20000000.0 and 20000001.0 are one number in float32"
    with pytest.raises(ValueError, match=reason):
        RankedLists.from_rows([row])
    write_rows(tmp_path / "a.txt", [check_row(row)])
    with pytest.raises(ValueError, match=reason):
        read_letor(tmp_path / "a.txt")
    assert RankedLists.from_rows([row | {"labels": [0.1, None]}]).labels[0] == pytest.approx(0.1)


def test_an_error_is_one_printable_line_and_pickles(tmp_path):
    hostile = "\x1b[2J\u202e\n"
    path = write_lines(tmp_path / "a.jsonl", {"query_id": hostile, "documents": ["a"]}, {"query_id": hostile, "labels": [1]})
    error = error_of(read_rows, path)
    assert error == rf"{path}:2: query '\x1b[2J\u202e\n' appeared before; the documents of a query must be one row"
    bad_rows = BadRows()
    bad_rows.add("a.jsonl:1", f"what a library says: {hostile}")
    assert bad_rows.reasons == [r"a.jsonl:1: what a library says: \x1b[2J\u202e"]
    copy = pickle.loads(pickle.dumps(DataError("a.jsonl:1", "reason")))
    assert (type(copy), str(copy), copy.where, copy.reason) == (DataError, "a.jsonl:1: reason", "a.jsonl:1", "reason")


def test_a_row_without_documents_names_the_columns():
    with pytest.raises(ValueError, match="missing columns: expected some of documents, features, doc_ids, labels"):
        check_row({"query_id": "q", "query": "text"})


def test_ensemble_becomes_the_one_teacher():
    row = ensemble_as_teacher(rows_of(TEXTS)[0])
    assert row["teacher_logits"] == [[0.25], [1.5], [None]] and row["teachers"] == ["ensemble"]
    assert check_row(row) == row
    with pytest.raises(ValueError, match="query 'a': no ensemble_logits"):
        ensemble_as_teacher(rows_of(FEATURES)[0])


# -- round trips


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.ndjson.xz", "a.parquet"])
@pytest.mark.parametrize("content", [TEXTS, FEATURES])
def test_rows_come_back_whole(tmp_path, name, content):
    write_rows(tmp_path / name, rows_of(content))
    rows = list(read_rows(tmp_path / name))
    if name.endswith("parquet"):  # float32
        assert rows[0].pop("teacher_logits") == [pytest.approx(logits) for logits in rows_of(content)[0]["teacher_logits"]]
        assert [row.pop("teacher_logits", None) for row in rows[1:]]
        content = [{key: value for key, value in row.items() if key != "teacher_logits"} for row in rows_of(content)]
        assert rows == content
    else:
        assert rows == rows_of(content)


def test_letor_comes_back_whole(tmp_path):
    path = tmp_path / "a.txt"
    write_rows(path, rows_of(FEATURES))
    assert path.read_text().splitlines()[0] == "1 qid:a 1:0.5 3:3.0 # docid = D1"
    assert list(read_rows(path)) == rows_of(FEATURES)
    assert read_letor(path).features.tolist() == [features for row in FEATURES for features in row["features"]]


def test_a_run_comes_back_as_a_teacher_without_what_it_did_not_score(tmp_path):
    write_rows(tmp_path / "bm25.run", rows_of(TEXTS), teacher="bm25")
    assert (tmp_path / "bm25.run").read_text() == "q1 Q0 d2 1 30000.0 bm25\n7 Q0 x 1 2.0 bm25\n"
    rows = list(read_rows(tmp_path / "bm25.run"))
    assert [(row["query_id"], row["doc_ids"], row["teacher_logits"], row["teachers"]) for row in rows] == [
        ("q1", ["d2"], [[30000.0]], ["bm25"]),
        ("7", ["x"], [[2.0]], ["bm25"]),
    ]
    write_rows(tmp_path / "other.run", rows_of(TEXTS))  # the ensemble, if there is one
    assert (tmp_path / "other.run").read_text().splitlines()[0] == "q1 Q0 d2 1 1.5 ensemble"


@pytest.mark.parametrize("format", ["bge", "tevatron"])
def test_texts_with_one_teacher_come_back(tmp_path, format):
    row = check_row(
        {
            "query_id": "q", "query": "text", "documents": ["a", "b", "c"], "doc_ids": ["1", "2", "3"],
            "labels": [1, 1, 0], "teacher_logits": [[1], [2], [3]], "teachers": ["teacher"],
        }
    )  # fmt: skip
    write_rows(tmp_path / "a.jsonl", [row], format=format)
    (back,) = read_rows(tmp_path / "a.jsonl", format=format)
    if format == "bge":
        assert back == row | {"doc_ids": ["q.1", "q.2", "q.3"]}
        content = {"query_id": "q", "query": "text", "pos": ["a", "b"], "neg": ["c"]}
        assert json.loads((tmp_path / "a.jsonl").read_text()) == content | {"pos_scores": [1, 2], "neg_scores": [3]}
    else:
        assert back == row | {"labels": [None] * 3}
        write_rows(tmp_path / "a.jsonl", [check_row(row | {"teacher_logits": None, "teachers": None})], format=format)
        (back,) = read_rows(tmp_path / "a.jsonl", format=format)
        assert back["labels"] == [1, 1, 0] and back["teachers"] == [] and back["documents"] == ["a", "b", "c"]


@pytest.mark.parametrize(
    "name, options, content, reason",
    [
        ("a.txt", {}, TEXTS, "query 'q1': LETOR holds features, and the row has none"),
        (
            "a.txt",
            {},
            [{"query_id": "q", "features": [[1]]}],
            "query 'q', document 'q.1': LETOR has no unlabelled documents; convert --drop-unlabelled",
        ),
        ("a.txt", {}, [FEATURES[0] | {"query_id": "a b"}], "query 'a b', document 'D1': LETOR cannot hold names with spaces"),
        ("a.run", {"teacher": "splade"}, TEXTS, "teacher: expected one of 'cross encoder', 'bm25'; got 'splade'"),
        ("a.run", {}, FEATURES, "teacher: expected one of (the rows have none); none was named"),
        ("a.run", {}, [{**TEXTS[1], "doc_ids": ["x y"]}], "query '7': the format cannot hold names with spaces, as 'x y'"),
        ("a.jsonl", {"format": "bge"}, FEATURES, "query 'a': the format holds texts"),
        (
            "a.jsonl",
            {"format": "bge"},
            TEXTS,
            "query 'q1': document 'd2': the format has no unlabelled documents; convert --drop-unlabelled",
        ),
        ("a.jsonl", {"format": "tevatron"}, TEXTS, "query 'q1': document 'd7': the format has no missing scores"),
        ("a.jsonl", {"teacher": "bm25"}, TEXTS, "teacher: the format jsonl holds all teachers or none"),
        ("a.jsonl", {"format": "csv"}, TEXTS, "format: expected one of jsonl, parquet, letor"),
        ("a.csv", {}, TEXTS, "a.csv: the name does not tell the format"),
    ],
)
def test_what_a_format_cannot_hold_is_refused_and_nothing_is_left(tmp_path, name, options, content, reason):
    (tmp_path / name).write_text("old")
    with pytest.raises(ValueError) as caught:
        write_rows(tmp_path / name, rows_of(content), **options)
    assert reason in str(caught.value)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]


def test_suffixes():
    names = ["a.jsonl", "a.b.json.gz", "a.parquet", "a.txt.xz", "a.svm", "a.run.gz"]
    assert [format_of(name) for name in names] == ["jsonl", "jsonl", "parquet", "letor", "letor", "trec"]


# Names of files and teachers
def test_a_stem_loses_the_suffixes_of_format_and_compression_alone():
    names = {"run.bm25.k1=0.9.txt": "run.bm25.k1=0.9", "run.x.run.gz": "run.x", "S1.txt.xz": "S1", "a.b": "a.b", "a": "a"}
    assert {name: stem(name) for name in names} == names


# -- JSON lines


@pytest.mark.parametrize("indent", [None, 1])
def test_a_file_may_be_one_array(tmp_path, indent):
    path = tmp_path / "a.json"
    path.write_text("\ufeff\n" + json.dumps(TEXTS, indent=indent, ensure_ascii=False) + "\n\n")
    assert list(read_rows(path)) == rows_of(TEXTS)
    path.write_text("[]")
    assert error_of(read_rows, path) == f"{path}: no rows"


@pytest.mark.parametrize(
    "text, line, reason",
    [
        (
            '[\n{"query_id": "a", "labels": [1]},\n{"query_id": "b", "labels": ["x"]}\n]',
            3,
            "labels[0]: expected a number or null",
        ),
        ('[\n{"query_id": "a", "labels": [1]},\n5\n]', 3, "expected an object, got 5"),
        ('[\n{"query_id": "a",\n "labels": [1}\n]', 3, "not JSON: Expecting ',' delimiter"),
        ('[\n{"query_id": "a", "labels": [1]}\n', 3, "not JSON: expected ',' or ']' after an element"),
        ('[\n{"query_id": "a", "labels": [1]},\n]', 3, "not JSON: Expecting value"),
        (
            '[{"query_id": "a", "labels": [1]}]\n{"query_id": "b", "labels": [1]}',
            2,
            "not JSON: there is more after the array",
        ),
        ('{\n "query_id": "a",\n "labels": [1]\n}', 1, "not JSON: Expecting property name enclosed in double quotes at chara"),
        ("[\n" + "[" * 100_000, 2, "not a row: nested too deeply"),
    ],
)
def test_a_broken_array_or_a_row_over_several_lines(tmp_path, text, line, reason):
    path = tmp_path / "a.json"
    path.write_text(text)
    error = error_of(read_rows, path)
    assert error.startswith(f"{path}:{line}: {reason}")
    assert ("jq -c" in error) is text.startswith("{")


@pytest.mark.parametrize(
    "line, reason",
    [
        ('{"query_id": "a", "query_id": "b", "labels": [1]}', "the key 'query_id' appears twice in one object"),
        ('{"query_id": ' + "9" * 5000 + "}", "Exceeds the limit"),
        ('{"query_id": "q", "labels": ' + "[" * 400 + "]" * 400 + "}", "labels[0]: expected a number or null, got [[["),
    ],
)
def test_json_of_odd_objects(tmp_path, line, reason):
    path = write_lines(tmp_path / "a.jsonl", line)
    assert error_of(read_rows, path).startswith(f"{path}:1: {reason}")


# B6
def test_columns_that_json_has_no_word_for(tmp_path):
    row = {
        "query_id": "q", "labels": [decimal.Decimal("2.50"), decimal.Decimal(3)], "price": decimal.Decimal("0.1"),
        "day": datetime.date(2024, 2, 29), "time": [datetime.datetime(2024, 2, 29, 12, 30, tzinfo=datetime.timezone.utc)],
        "took": datetime.timedelta(milliseconds=1500), "raw": {"bytes": b"a\xff"}, "rate": [0.5, math.nan],
    }  # fmt: skip
    write_rows(tmp_path / "a.jsonl", [row])
    assert json.loads((tmp_path / "a.jsonl").read_text()) == {
        "query_id": "q", "labels": [2.5, 3], "price": 0.1, "day": "2024-02-29", "time": ["2024-02-29T12:30:00+00:00"],
        "took": 1.5, "raw": {"bytes": "Yf8="}, "rate": [0.5, None],
    }  # fmt: skip


@pytest.mark.parametrize(
    "column, value, reason",
    [
        ("rate", [math.inf], "rate: JSON has no inf"),
        ("ensemble_logits", [math.nan], "ensemble_logits: JSON has no nan"),
        ("extra", {1, 2}, "extra: JSON cannot hold {1, 2}"),
    ],
)
def test_what_json_cannot_hold_names_query_and_column(tmp_path, column, value, reason):
    with pytest.raises(ValueError) as caught:
        write_rows(tmp_path / "a.jsonl", [{"query_id": "q", column: value}])
    assert str(caught.value) == f"query 'q': {reason}" and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "line, reason",
    [
        ("{", "not JSON: "),
        ("[1]", "expected an object, got [1]"),
        ("[" * 100_000, "not a row: nested too deeply"),
        ({"documents": ["a"]}, "query_id: expected a name, got null"),
        ({"query_id": "q1", "documents": ["a"]}, "query 'q1' appeared before; the documents of a query must be one row"),
        ('{"query_id": "q3", "teacher_logits": [[NaN, 1]]}', "teacher_logits[0][0]: expected a number or null, got NaN"),
        ({"query_id": "q3", "teacher_logits": [[1, 2, 3]]}, "teachers: expected ['cross encoder', 'bm25'] as in the rows bef"),
        (
            {"query_id": "q3", "teacher_logits": [[1, 2]], "teachers": ["bm25", "cross encoder"]},
            "teachers: expected ['cross encoder', 'bm25'] as in the rows before, got ['bm25', 'cross encoder']",
        ),
        ('{"query_id": "q3", "documents": ["\\ud800"]}', "documents[0]: not Unicode: surrogates not allowed at character 1"),
        ("\udcff", "not UTF-8: invalid start byte at byte 1"),
    ],
)
def test_a_broken_line_stops_or_is_counted(tmp_path, line, reason):
    path = tmp_path / "a.jsonl"
    lines = [json.dumps(TEXTS[0]), "", line if isinstance(line, str) else json.dumps(line), json.dumps(TEXTS[1])]
    path.write_bytes(("\ufeff" + "\r\n".join(lines)).encode(errors="surrogateescape"))
    assert error_of(read_rows, path).startswith(f"{path}:3: {reason}")
    bad_rows = BadRows()
    assert [row["query_id"] for row in read_rows(path, bad_rows=bad_rows)] == ["q1", "7"]
    assert bad_rows.count == 1 and bad_rows.reasons[0].startswith(f"{path}:3: {reason}")


def test_teachers_without_names_take_those_of_the_rows_before(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", TEXTS[0], {"query_id": "r", "teacher_logits": [[1, 2]]})
    assert [row["teachers"] for row in read_rows(path)] == [["cross encoder", "bm25"]] * 2


def test_bad_rows_keep_the_first_reasons(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", *["{"] * 25, TEXTS[0])
    bad_rows = BadRows(keep=3)
    assert len(list(read_rows(path, bad_rows=bad_rows))) == 1
    assert bad_rows.count == 25 and len(bad_rows.reasons) == 3


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.txt", "a.run", "a.parquet"])
def test_an_empty_file_has_no_rows(tmp_path, name):
    if name.endswith("parquet"):
        write_rows(tmp_path / name, [])
    else:
        (gzip.open if name.endswith("gz") else open)(tmp_path / name, "w").close()
    assert error_of(read_rows, tmp_path / name) == f"{tmp_path / name}: no rows"


@pytest.mark.parametrize("suffix, module", [(".gz", gzip), (".xz", lzma)])
@pytest.mark.parametrize("name", ["a.jsonl", "a.txt", "a.run"])
def test_a_damaged_file_is_named_even_where_bad_rows_are_skipped(tmp_path, suffix, module, name):
    lines = {
        "a.jsonl": lambda i: json.dumps({"query_id": f"q{i}", "labels": [i]}),
        "a.txt": lambda i: f"1 qid:{i} 1:{i}",
        "a.run": lambda i: f"{i} Q0 d{i} 1 {i} tag",
    }[name]
    whole = module.compress("".join(lines(i) + "\n" for i in range(5000)).encode())
    path = tmp_path / (name + suffix)
    for content in (whole[: len(whole) // 2], b"nothing of the kind"):
        path.write_bytes(content)
        assert error_of(read_rows, path, bad_rows=BadRows()).startswith(f"{path}: damaged file")


# -- several files and arguments


def test_several_files_are_one_data_set(tmp_path):
    one, two = write_lines(tmp_path / "1.jsonl", TEXTS[0]), write_lines(tmp_path / "2.jsonl", TEXTS[1])
    assert [row["query_id"] for row in read_rows([one, two])] == ["q1", "7"]
    assert error_of(read_rows, [one, one]).startswith(f"{one}:1: query 'q1' appeared before")
    assert "expected files of one format, got jsonl, parquet" in error_of(read_rows, [one, tmp_path / "3.parquet"])
    assert "expected files of one format, got no files" in error_of(read_rows, [])


def test_arguments_are_checked_before_the_first_row(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", TEXTS[0])
    with pytest.raises(ValueError, match="format: expected one of jsonl, .*, got 'csv'"):
        read_rows(path, format="csv")
    with pytest.raises(ValueError, match="qrels: not an option of the format jsonl"):
        read_rows(path, qrels=path)
    with pytest.raises(FileNotFoundError, match="nowhere.jsonl: no such file"):
        read_rows(tmp_path / "nowhere.jsonl")
    with pytest.raises(FileNotFoundError, match="qrels: no such file"):
        read_rows(path, format="trec", qrels=tmp_path / "qrels")
    with pytest.raises(FileNotFoundError, match="not a file"):
        read_rows(tmp_path, format="jsonl")


# A folder of Parquet parts
def test_a_folder_stands_for_the_parquet_files_in_it(tmp_path, datasets_cache):
    folder = tmp_path / "parts"
    folder.mkdir()
    for i in (1, 0):
        write_rows(folder / f"part-{i}.parquet", [check_row({"query_id": f"q{i}", "labels": [i]})])
    (folder / "_SUCCESS").touch()
    (folder / "._part-0.parquet").write_text("of another system")
    assert [row["query_id"] for row in read_rows(folder)] == ["q0", "q1"]
    assert load_dataset(folder)["query_id"] == ["q0", "q1"]
    with pytest.raises(FileNotFoundError, match="not a file, and not a folder of Parquet files"):
        read_rows(tmp_path)


# -- Parquet


def parquet_of(path, **columns):
    pq.write_table(pa.table(columns), path)
    return path


def test_parquet_reads_other_types_and_ignores_other_columns(tmp_path):
    path = parquet_of(
        tmp_path / "a.parquet",
        query_id=pa.array([5, 6]),
        labels=pa.array([[True, False], [True]]),
        teacher_logits=pa.array([[[1, 2], [3, None]], [[5, 6]]], pa.large_list(pa.list_(pa.float64(), 2))),
        split=["train", "train"],
    )
    rows = list(read_rows(path))
    assert [row["query_id"] for row in rows] == ["5", "6"] and rows[0]["labels"] == [1, 0]
    assert rows[0]["teacher_logits"] == [[1, 2], [3, None]] and rows[0]["teachers"] == ["teacher 1", "teacher 2"]


# B6
@pytest.mark.parametrize(
    "type, values",
    [
        (pa.uint16(), [3, None]),
        (pa.uint32(), [20000001, 0]),
        (pa.int64(), [20000001, 20000000]),
        (pa.uint64(), [2**53, 0]),
        (pa.float16(), [0.5, None]),
        (pa.bool_(), [True, False]),
        (pa.decimal128(12, 2), [decimal.Decimal("20000001.25"), None]),
        (pa.null(), [None, None]),
    ],
)
@pytest.mark.parametrize(
    "list_of", [pa.list_, pa.large_list, lambda type: pa.list_(type, 2), getattr(pa, "list_view", pa.list_)]
)
def test_parquet_numbers_of_any_type_are_exact(tmp_path, type, values, list_of):
    path = parquet_of(tmp_path / "a.parquet", query_id=["q"], labels=pa.array([values], list_of(type)))
    (row,) = read_rows(path)
    assert row["labels"] == values
    write_rows(tmp_path / "b.parquet", [row])
    assert next(read_rows(tmp_path / "b.parquet"))["labels"] == values


@pytest.mark.parametrize(
    "text", [pa.string(), pa.large_string(), getattr(pa, "string_view", pa.string)(), pa.binary(), pa.large_binary()]
)
def test_parquet_texts_of_any_type(tmp_path, text):
    path = parquet_of(
        tmp_path / "a.parquet",
        query_id=pa.array(["q"], text),
        documents=pa.array([["a", "日本"]], pa.list_(pa.string())).cast(pa.list_(text)),
        teachers=pa.array([["x"]], pa.list_(text)),
        teacher_logits=[[[1.0], [2.0]]],
    )
    (row,) = read_rows(path)
    assert (row["query_id"], row["documents"], row["teachers"]) == ("q", ["a", "日本"], ["x"])


def test_parquet_of_dictionaries(tmp_path):
    names = pa.ListArray.from_arrays(pa.array([0, 2, 4], pa.int32()), pa.array(["x", "y"] * 2).dictionary_encode())
    ids, logits = pa.array(["a", "b"]).dictionary_encode(), [[[1.0, 2.0]]] * 2
    path = parquet_of(tmp_path / "a.parquet", query_id=ids, teachers=names, teacher_logits=logits)
    assert [(row["query_id"], row["teachers"]) for row in read_rows(path)] == [("a", ["x", "y"]), ("b", ["x", "y"])]


@pytest.mark.parametrize(
    "name, column, wanted",
    [
        ("labels", pa.array([[datetime.date(2024, 1, 1)]]), "lists of numbers, got list<element: date32[day]>"),
        ("labels", pa.array([[2**62]], pa.list_(pa.timestamp("ns"))), "lists of numbers, got list<element: timestamp[ns]>"),
        ("labels", pa.array([["1"]]), "lists of numbers, got list<element: string>"),
        ("labels", pa.array([1.0]), "lists of numbers, got double"),
        ("labels", pa.array([[b"1"]]), "lists of numbers, got list<element: binary>"),
        ("teacher_logits", pa.array([[1.0]]), "lists of lists of numbers, got list<element: double>"),
        ("features", pa.array([[{"a": 1.0}]]), "lists of lists of numbers, got list<element: struct<a: double>>"),
        ("query", pa.array([5]), "texts, got int64"),
        ("query_id", pa.array([1.5]), "names, got double"),
        ("documents", pa.array([{"a": "b"}]), "lists of texts, got struct<a: string>"),
    ],
)
def test_parquet_columns_of_another_type_are_named(tmp_path, name, column, wanted):
    path = parquet_of(tmp_path / "a.parquet", **{"query_id": ["q"], "doc_ids": [["a"]], name: column})
    assert error_of(read_rows, path, bad_rows=BadRows()) == f"{path}: column {name}: expected {wanted}"


def test_parquet_values_that_no_row_can_hold_name_file_and_row(tmp_path):
    path = parquet_of(
        tmp_path / "a.parquet", query_id=["a", "b", "c"], documents=pa.array([[b"x"], [b"\xff"], [b"z"]]), labels=[[1.0]] * 3
    )
    assert error_of(read_rows, path).startswith(f"{path}: row 2: cannot be read: ")
    assert [row["query_id"] for row in read_rows(path, bad_rows=BadRows())] == ["a", "c"]
    path = parquet_of(tmp_path / "b.parquet", query_id=["a", "b"], labels=[[1.0], [math.nan]])
    assert error_of(read_rows, path).startswith(f"{path}: row 2: labels[0]: expected a number or null, got NaN")


def test_parquet_with_a_column_twice(tmp_path):
    pq.write_table(pa.table([["a"], [[1.0]], [[2.0]]], names=["query_id", "labels", "labels"]), tmp_path / "a.parquet")
    assert error_of(read_rows, tmp_path / "a.parquet") == f"{tmp_path / 'a.parquet'}: column labels: appears 2 times"


# A3
def test_parquet_counts_rows_over_the_whole_file(tmp_path):
    rows = [{"query_id": f"q{i}", "labels": [i], "teachers": ["x", "y"], "teacher_logits": [[1, 2]]} for i in range(400)]
    rows[174] |= {"teachers": ["y", "x"]}
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet", row_group_size=50)
    path = tmp_path / "a.parquet"
    assert error_of(read_rows, path) == f"{path}: row 175: teachers: expected ['x', 'y'] as in the rows before, got ['y', 'x']"


def test_parquet_names_file_and_row(tmp_path):
    path = parquet_of(tmp_path / "a.parquet", query_id=["a", "b", "c"], labels=[[1.0], [], [2.0]])
    assert error_of(read_rows, path) == f"{path}: row 2: labels: the query has no documents"
    bad_rows = BadRows()
    assert len(list(read_rows(path, bad_rows=bad_rows))) == 2 and bad_rows.count == 1


def test_parquet_without_a_query_id(tmp_path):
    path = parquet_of(tmp_path / "a.parquet", qid=["a"], labels=[[1.0]])
    assert error_of(read_rows, path) == f"{path}: missing column query_id, the file has 'qid', 'labels'"


@pytest.mark.parametrize("damage", ["cut", "junk", "holes"])
def test_parquet_damaged(tmp_path, damage):
    path = tmp_path / "a.parquet"
    write_rows(path, (check_row({"query_id": f"q{i}", "documents": [f"text {i}"], "labels": [i]}) for i in range(2000)))
    content = bytearray(path.read_bytes())
    if damage == "holes":
        content[100 : len(content) // 2] = bytes(len(content) // 2 - 100)
    path.write_bytes({"cut": content[:-50], "junk": b"junk", "holes": content}[damage])
    assert error_of(read_rows, path, bad_rows=BadRows()).startswith(f"{path}: damaged file")


# B1: pyarrow ended the process, so this reads in another one
def test_parquet_with_damaged_footers_never_ends_the_process(tmp_path):
    rows = [check_row(row) for row in TEXTS]
    file = io.BytesIO()
    from pile_fast.data.parquet import SCHEMA

    pq.write_table(pa.Table.from_pylist(rows, SCHEMA), file, row_group_size=1)
    (tmp_path / "whole.parquet").write_bytes(file.getvalue())
    code = """
import random, sys
from pathlib import Path
from pile_fast.data import DataError, read_rows
folder = Path(sys.argv[1])
whole = (folder / "whole.parquet").read_bytes()
footer = int.from_bytes(whole[-8:-4], "little")
read = refused = 0
seeds = [*range(200), 354, 1855, 2058, 2184, 2234, 2302]  # the last six ended the process with pyarrow 26
for seed in seeds:
    chance, content = random.Random(seed), bytearray(whole)
    for _ in range(chance.randint(1, 3)):
        content[chance.randrange(len(content) - 8 - footer, len(content) - 8)] = chance.randrange(256)
    path = folder / "a.parquet"
    path.write_bytes(content)
    try:
        read += len(list(read_rows(path))) > 0
    except DataError as error:
        refused += str(error).startswith(f"{path}: ")
print(read, refused)
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    read, refused = map(int, done.stdout.split())
    assert read + refused == 206 and read > 20 and refused > 100


def test_parquet_with_names_that_are_not_utf8(tmp_path):
    pq.write_table(
        pa.table({"query_id": ["q"], "labels": [[1.0]], "extra": [[{"a": 1}]]}), tmp_path / "a.parquet", store_schema=False
    )
    whole = (tmp_path / "a.parquet").read_bytes()
    for name in (b"element", b"list", b"extra", b"labels", b"query_id"):
        path = tmp_path / "b.parquet"
        path.write_bytes(whole.replace(name, b"\xff" * len(name)))
        assert path.read_bytes() != whole
        assert error_of(read_rows, path, bad_rows=BadRows()).startswith(f"{path}: damaged file"), name


def test_parquet_of_many_small_and_of_one_large_row_group(tmp_path):
    rows = [check_row({"query_id": f"q{i}", "labels": [i, 0]}) for i in range(2500)]
    write_rows(tmp_path / "a.parquet", rows)
    assert pq.ParquetFile(tmp_path / "a.parquet").num_row_groups == 3
    pq.write_table(pq.read_table(tmp_path / "a.parquet"), tmp_path / "b.parquet", row_group_size=7)
    assert list(read_rows(tmp_path / "a.parquet")) == list(read_rows(tmp_path / "b.parquet")) == rows


# -- LETOR, LightGBM and XGBoost


def test_letor_sizes_beside_the_file_stand_for_query_ids(tmp_path):
    path = write_lines(tmp_path / "train.txt", "1 1:0.5", "0 2:1", "2 1:3 # docid = X")
    write_lines(tmp_path / "train.txt.query", "2", "0", "1")
    rows = list(read_rows(path))
    assert [(row["query_id"], row["labels"], row["doc_ids"]) for row in rows] == [
        ("1", [1, 0], ["1.1", "1.2"]),
        ("3", [2], ["X"]),
    ]
    assert rows[0]["features"] == [[0.5, 0], [0, 1]]
    assert read_letor(path).query_ids == ("1", "3")


@pytest.mark.parametrize("data", ["train.txt", "train.txt.gz"])
@pytest.mark.parametrize("sizes", ["train.txt.group", "train.txt.query"])
def test_letor_sizes_of_xgboost_and_of_compressed_data(tmp_path, data, sizes):
    with (gzip.open if data.endswith("gz") else open)(tmp_path / data, "wt") as file:
        file.write("1 1:0.5\n0 2:1\n2 1:3\n")
    write_lines(tmp_path / sizes, "1", "2")
    assert [row["labels"] for row in read_rows(tmp_path / data)] == [[1], [0, 2]]
    other = {"train.txt.group": "train.txt.query", "train.txt.query": "train.txt.group"}[sizes]
    write_lines(tmp_path / other, "3")
    assert "the queries' sizes are given twice, by" in error_of(read_rows, tmp_path / data)


def test_letor_sizes_stay_in_step_where_lines_are_left_out(tmp_path):
    path = tmp_path / "train.txt"
    path.write_bytes(b"1 1:0.5\n\xff 1:2\n0 1:x\n2 1:3\n1 1:4\n")
    write_lines(tmp_path / "train.txt.query", "2", "0", "2", "1")
    bad_rows = BadRows()
    assert [(row["query_id"], row["labels"]) for row in read_rows(path, bad_rows=bad_rows)] == [
        ("1", [1]),
        ("3", [2]),
        ("4", [1]),
    ]
    assert bad_rows.count == 2
    write_lines(tmp_path / "train.txt.query", "2", "0", "x", "1")  # what comes after would go to another query
    assert error_of(read_rows, path, bad_rows=BadRows()).startswith(f"{path}.query:3: rows of a query: expected a whole number")


def test_letor_sizes_of_several_files_number_the_queries_on(tmp_path):
    for name, sizes in (("1.txt", ["1", "0", "1"]), ("2.txt", ["2"])):
        write_lines(tmp_path / name, "1 1:1", "0 1:2")
        write_lines(tmp_path / f"{name}.query", *sizes)
    assert [row["query_id"] for row in read_rows([tmp_path / "1.txt", tmp_path / "2.txt"])] == ["1", "3", "4"]


@pytest.mark.parametrize(
    "sizes, reason",
    [
        (["2"], ":3: the row belongs to no query: {path}.query counts fewer rows"),
        (["2", "2"], ".query: counts more rows than there are in the data"),
        (["2", "1", "3"], ".query: counts more rows than there are in the data"),
        (["2", "one"], ".query:2: rows of a query: expected a whole number, got 'one'"),
    ],
)
def test_letor_sizes_that_do_not_fit(tmp_path, sizes, reason):
    path = write_lines(tmp_path / "train.txt", "1 1:0.5", "0 2:1", "2 1:3")
    write_lines(tmp_path / "train.txt.query", *sizes)
    assert error_of(read_rows, path) == f"{path}{reason.format(path=path)}"


@pytest.mark.parametrize(
    "line, reason",
    [
        ("1 1:0.5", "expected 'label qid:Q 1:v ...', got '1 1:0.5'"),
        ("high qid:b 1:0.5", "label: expected a number, got 'high'"),
        ("1 qid:a 1:0.5", "query 'a' appeared before; the rows of a query must stand together"),
    ],
)
def test_letor_broken_line_stops_or_is_left_out(tmp_path, line, reason):
    path = write_lines(tmp_path / "a.txt", "1 qid:a 1:1", "0 qid:b 3:1", line, "1 qid:b 2:1")
    assert error_of(read_rows, path) == f"{path}:3: {reason}"
    bad_rows = BadRows()
    assert [row["labels"] for row in read_rows(path, bad_rows=bad_rows)] == [[1], [0, 1]]
    assert bad_rows.reasons == [f"{path}:3: {reason}"]


def test_letor_value_that_is_not_finite_names_query_and_feature(tmp_path):
    path = write_lines(tmp_path / "a.txt", "1 qid:a 1:1", "0 qid:b 3:nan")
    assert error_of(read_rows, path) == f"{path}:2: feature 3: expected a number that is finite in float32, got 'nan'"


def test_letor_absurd_index_is_not_taken_for_a_table_of_zeros(tmp_path):
    path = write_lines(tmp_path / "a.txt", "1 qid:a 1:1", "1 qid:a 999999999:1")
    reason = f"{path}:2: feature index: expected at most 100000, got 999999999"
    assert error_of(read_rows, path) == reason
    with pytest.raises(DataError) as caught:
        read_letor(path)
    assert str(caught.value) == reason


# B8
@pytest.mark.parametrize(
    "line",
    [
        "0 qid:1 1:0 5000:x", "0 qid:1 5000:nan", "nan qid:1 5000:1", "0 qid:0 5000:1", "0 5000:1", "0 qid:1 5000:1 6:1",
        "0 qid:1 5000:1 # docid = D", "0 qid:1 5000:1 # \udcff", "0 qid:1 5000:1 6000000:1",
    ],
)  # fmt: skip
def test_letor_line_that_is_left_out_leaves_no_trace(tmp_path, line):
    path = tmp_path / "a.txt"
    lines = ["1 qid:0 1:1", "1 qid:1 1:1 2:1 # docid = D", line, "0 qid:1 2:1"]
    path.write_bytes("\n".join(lines).encode(errors="surrogateescape"))
    bad_rows = BadRows()
    assert [row["features"] for row in read_rows(path, bad_rows=bad_rows)] == [[[1, 0]], [[1, 1], [0, 1]]]
    assert bad_rows.count == 1 and bad_rows.reasons[0].startswith(f"{path}:3: ")


# B7
@pytest.mark.parametrize(
    "line, reason",
    [
        ("1 qid:1 31_000:2", "feature index: expected a whole number, got '31_000'"),
        ("1 qid:1 2:1_0", "feature 2: expected a number, got '1_0'"),
        ("1_0 qid:1 2:1", "label: expected a number, got '1_0'"),
        ("1 qid:1 ٣:2", "feature index: expected a whole number, got '٣'"),
        ("1 qid:1 2:٣", "feature 2: expected a number, got '٣'"),
        ("٣ qid:1 2:1", "label: expected a number, got '٣'"),
        ("1 qid:1 2:1\u00a02_0:1", "feature index: expected a whole number, got '2_0'"),
        ("1 qid:1 +5:1", "feature index: expected a whole number, got '+5'"),
        ("1 qid:1 2:0x10", "feature 2: expected a number, got '0x10'"),
        ("9007199254740993 qid:1 2:1", "label: expected a whole number of at most 2^53, got '9007199254740993'"),
        (f"1 qid:1 {'9' * 5000}:1", "feature index: expected a whole number, got '9999"),
    ],
)
def test_letor_numbers_are_ascii_digits(tmp_path, line, reason):
    path = write_lines(tmp_path / "a.txt", "1 qid:0 1:1", line)
    assert error_of(read_rows, path).startswith(f"{path}:2: {reason}")
    with pytest.raises(DataError) as caught:
        read_letor(path)
    assert str(caught.value).startswith(f"{path}:2: {reason}")


def test_letor_blanks_of_any_kind_separate_features(tmp_path):
    path = write_lines(tmp_path / "a.txt", "1 qid:1 1:1", "0 qid:1\t1:1\u00a07:2\x1f9:1")
    assert [len(features) for features in next(read_rows(path))["features"]] == [9, 9]


def test_letor_is_written_exactly(tmp_path):
    rows = [check_row({"query_id": "q", "features": [[1, 0], [2, 0]], "labels": [20000001, 0.1], "doc_ids": ["a", "b"]})]
    write_rows(tmp_path / "a.txt", rows)
    assert (tmp_path / "a.txt").read_text().splitlines()[0] == "20000001 qid:q 1:1.0 2:0.0 # docid = a"
    assert list(read_rows(tmp_path / "a.txt")) == rows  # as wide as it was


def test_letor_parts_are_files_without_the_suffixes_of_their_format(tmp_path):
    for i in (1, 2):
        write_lines(tmp_path / f"fold.{i}.txt", f"1 qid:{i} 1:1")
    assert read_letor(tmp_path / "fold.1.txt", tmp_path / "fold.2.txt").parts == ("fold.1", "fold.2")


def test_letor_file_rows_are_the_data_sets(mq2008_folder):
    files = [mq2008_folder / f"mq2008/S{i}.txt.xz" for i in (1, 2)]
    lists, rows = read_letor(*files), list(read_rows(files))
    assert [row["query_id"] for row in rows] == list(lists.query_ids)
    assert [name for row in rows for name in row["doc_ids"]] == list(lists.doc_ids)
    assert [label for row in rows for label in row["labels"]] == lists.labels.tolist()


# -- TREC


@pytest.fixture
def trec(tmp_path):
    write_lines(tmp_path / "bm25.run", "q1 Q0 d1 1 12.5 x", "q1 Q0 d2 2 11 x", "q2 Q0 d9 1 3 x")
    with gzip.open(tmp_path / "dense.run.gz", "wt") as file:
        file.write("q3 Q0 d1 1 0.5 x\nq1 Q0 d3 1 0.9 x\nq1 Q0 d2 2 0.8 x\n\n")
    write_lines(tmp_path / "qrels.txt", "q1 0 d2 2", "q1 0 d8 1", "q3 0 d1 0")
    write_lines(tmp_path / "queries.tsv", "q1\tfirst", "q2\tsecond", "q3\tthird")
    write_lines(tmp_path / "docs.tsv", "d1\ttitle\tone", "d2\ttwo", "d3\t", "d9\tnine")
    return tmp_path


def test_runs_become_teachers(trec):
    files = {"qrels": trec / "qrels.txt", "queries": trec / "queries.tsv", "documents": trec / "docs.tsv"}
    rows = list(read_rows([trec / "bm25.run", trec / "dense.run.gz"], **files))
    assert [row["query_id"] for row in rows] == ["q1", "q2", "q3"]
    assert rows[0] == check_row(
        {
            "query_id": "q1",
            "query": "first",
            "doc_ids": ["d1", "d2", "d3"],
            "documents": ["title one", "two", ""],
            "labels": [None, 2, None],
            "teacher_logits": [[12.5, None], [11, 0.8], [None, 0.9]],
            "teachers": ["bm25", "dense"],
        }
    )
    assert rows[2]["teacher_logits"] == [[None, 0.5]] and rows[2]["labels"] == [0]
    zero = list(read_rows(trec / "bm25.run", qrels=trec / "qrels.txt", unjudged=0.0))
    assert [row["labels"] for row in zero] == [[0, 2], [0]]


@pytest.mark.parametrize(
    "line, reason",
    [
        ("q1 Q0 d5 3 1.0", "expected 'query Q0 document rank score tag', got 'q1 Q0 d5 3 1.0'"),
        ("q1 Q0 d5 3 high x", "score: expected a number, got 'high'"),
        ("q1 Q0 d1 3 1.0 x", "query 'q1', document 'd1': appears twice in the run"),
    ],
)
def test_run_with_a_broken_line(trec, line, reason):
    path = write_lines(trec / "bad.run", "q1 Q0 d1 1 2 x", line, "q1 Q0 d2 3 1 x", "q2 Q0 d1 1 1 x")
    assert error_of(read_rows, path) == f"{path}:2: {reason}"
    bad_rows = BadRows()
    assert [row["doc_ids"] for row in read_rows(path, bad_rows=bad_rows)] == [["d1", "d2"], ["d1"]]
    assert bad_rows.reasons == [f"{path}:2: {reason}"]


@pytest.mark.parametrize("score", ["nan", "-inf", "1e999"])
def test_run_with_a_score_that_is_not_finite(trec, score):
    path = write_lines(trec / "bad.run", "q1 Q0 d1 1 2 x", "q2 Q0 d1 1 3 x", f"q2 Q0 d2 2 {score} x")
    assert error_of(read_rows, path) == f"{path}:3: score: expected a number that is finite in float32, got '{score}'"


# C8
def test_run_whose_queries_interrupt_each_other(trec):
    lines = ["q1 Q0 d1 1 9 x", "q2 Q0 d1 1 8 x", "", "q1 Q0 d2 2 7 x", "q1 Q0 d3 3 6 x", "q3 Q0 d1 1 5 x", "q2 Q0 d7 2 4 x"]
    path = write_lines(trec / "mixed.run", *lines)
    rows = {row["query_id"]: dict(zip(row["doc_ids"], row["teacher_logits"], strict=True)) for row in read_rows(path)}
    assert rows == {"q1": {"d1": [9], "d2": [7], "d3": [6]}, "q2": {"d1": [8], "d7": [4]}, "q3": {"d1": [5]}}
    path = write_lines(path, *lines, "q1 Q0 d4 4 high x")
    assert error_of(read_rows, path) == f"{path}:8: score: expected a number, got 'high'"


@pytest.mark.parametrize(
    "file, line, reason",
    [
        ("qrels", "q1 0 d2", "expected 'query iteration document grade', got 'q1 0 d2'"),
        ("qrels", "q1 0 d2 good", "not a grade: expected a number, got 'good'"),
        ("qrels", "q1 0 d2 3", "query 'q1', document 'd2': appears twice, with different grades"),
        ("documents", "d1\tagain", "'d1' appeared before; it has one text"),
    ],
)
def test_trec_broken_companion_files(trec, file, line, reason):
    path = {"qrels": trec / "qrels.txt", "documents": trec / "docs.tsv"}[file]
    count = len(path.read_text().splitlines())
    path.write_text(path.read_text() + line + "\n")
    assert error_of(read_rows, trec / "bm25.run", **{file: path}) == f"{path}:{count + 1}: {reason}"


def test_trec_missing_texts_name_the_file(trec):
    write_lines(trec / "docs.tsv", "d1\tone", "d2\ttwo")
    run = trec / "bm25.run"
    assert error_of(read_rows, run, documents=trec / "docs.tsv") == f"{run}:3: document 'd9': no text in {trec / 'docs.tsv'}"
    write_lines(trec / "queries.tsv", "q2\tsecond")
    assert error_of(read_rows, run, queries=trec / "queries.tsv") == f"{run}:1: query 'q1': no text in {trec / 'queries.tsv'}"


def test_runs_of_one_name(trec):
    (trec / "bm25.txt").touch()
    reason = "teachers: expected runs of different names, got 'bm25', 'bm25'; name them NAME=FILE"
    assert error_of(read_rows, [trec / "bm25.run", trec / "bm25.txt"], format="trec") == reason


# Teachers' names
def test_runs_are_called_as_their_files_or_as_one_likes(trec):
    for name in ("run.x.txt", "run.y.txt", "run.bm25.k1=0.9.txt"):
        write_lines(trec / name, "q1 Q0 d1 1 2 x")
    paths = [trec / name for name in ("run.x.txt", "run.y.txt", "run.bm25.k1=0.9.txt")]
    (row,) = read_rows(paths, format="trec")
    assert row["teachers"] == ["run.x", "run.y", "run.bm25.k1=0.9"]
    (row,) = read_rows(paths, format="trec", teachers=["x", "y", "z"])
    assert row["teachers"] == ["x", "y", "z"]
    assert error_of(read_rows, paths, format="trec", teachers=["x"]) == "teachers: expected 3 names, one per run, got 1"


# C8
@pytest.mark.parametrize("separator", ["\t", " "])
def test_run_of_ranks_alone(trec, separator):
    path = write_lines(
        trec / "a.run", *(separator.join(line.split()) for line in ("q1 d1 1", "q1 d2 2", "q2 d9 1", "q1 d3 10"))
    )
    rows = list(read_rows(path))
    assert [row["teacher_logits"] for row in rows] == [[[-1], [-2], [-10]], [[-1]]] and rows[0]["doc_ids"] == ["d1", "d2", "d3"]


@pytest.mark.parametrize(
    "lines, number, reason",
    [
        (["q1 d1 1", "q1 d2 0"], 2, "rank: expected 1 or more, got 0"),
        (["q1 d1 1", "q1 d2 1.5"], 2, "rank: expected a whole number, got '1.5'"),
        (["q1 d1 1", "q1 d2 ٣"], 2, "rank: expected a whole number, got '٣'"),
        (["q1 d1 1", "q1 Q0 d2 2 1.0 x"], 2, "expected 'query document rank', got 'q1 Q0 d2 2 1.0 x'"),
        (["q1 Q0 d2 2 1.0 x", "q1 d1 1"], 2, "expected 'query Q0 document rank score tag', got 'q1 d1 1'"),
        (["q1 d1"], 1, "expected 'query Q0 document rank score tag' or 'query document rank', got 'q1 d1'"),
    ],
)
def test_run_of_ranks_alone_that_is_broken(trec, lines, number, reason):
    path = write_lines(trec / "a.run", *lines)
    assert error_of(read_rows, path) == f"{path}:{number}: {reason}"


# B8
def test_run_whose_first_line_is_cut_is_not_taken_for_ranks(trec):
    path = write_lines(trec / "a.run", "q1 Q0 d1", "q1 Q0 d2 2 1.0 x")
    bad_rows = BadRows()
    assert [row["doc_ids"] for row in read_rows(path, bad_rows=bad_rows)] == [["d2"]] and bad_rows.count == 1


# B7
def test_run_with_marks_and_odd_blanks(trec):
    path = trec / "a.run"
    path.write_bytes("\ufeff\nq1 Q0 d1 1 2 x\n\ufeffq1 Q0 d2 2 1 x\r\nq\u00a01\tQ0\td1\t1\t3\tx\n".encode())
    assert [(row["query_id"], row["doc_ids"]) for row in read_rows(path)] == [("q1", ["d1", "d2"]), ("q\u00a01", ["d1"])]


@pytest.mark.parametrize("score", ["1_000", "٣", "0x10", "", "1,5"])
def test_run_scores_are_ascii_digits(trec, score):
    path = write_lines(trec / "a.run", "q1 Q0 d1 1 2 x", f"q1 Q0 d2 2 {score or '-'} x")
    assert error_of(read_rows, path) == f"{path}:2: score: expected a number, got '{score or '-'}'"


@pytest.mark.parametrize("file", ["queries", "documents"])
@pytest.mark.parametrize(
    "line, reason", [(b"d1\t\xff", "not UTF-8: invalid start byte"), (b"d1 text", "expected 'name TAB text', got 'd1 text'")]
)
def test_texts_that_cannot_be_read_name_their_line(trec, file, line, reason):
    path = trec / "texts.tsv"
    path.write_bytes(b"x\tone\n" + line + b"\n")
    assert error_of(read_rows, trec / "bm25.run", **{file: path}).startswith(f"{path}:2: {reason}")
    bad_rows = BadRows()
    error = error_of(read_rows, trec / "bm25.run", bad_rows=bad_rows, **{file: path})  # no row has all of its texts
    assert error.startswith(f"{trec / 'bm25.run'}: no rows: all ") and bad_rows.reasons[0].startswith(f"{path}:2: {reason}")


# B9
@pytest.mark.parametrize("grade", ["nan", "inf", "-inf", "1e999", "1_0", "٣", "x", "9007199254740993"])
def test_qrels_of_what_is_not_a_grade(trec, grade):
    path = write_lines(trec / "qrels.txt", "q1 0 d1 1", f"q1 0 d2 {grade}")
    error = error_of(read_rows, trec / "bm25.run", qrels=path)
    assert error.startswith(f"{path}:2: not a grade: expected a ") and error.endswith(f"got '{grade}'")


# A11
@pytest.mark.parametrize("skip", [False, True])
def test_qrels_of_other_queries_stop_the_reader(trec, skip):
    path = write_lines(trec / "qrels.txt", "x1 0 d2 2", "x2 0 d1 1")
    error = error_of(read_rows, trec / "bm25.run", qrels=path, unjudged=0.0, bad_rows=BadRows() if skip else None)
    assert error == f"{path}: judges no query of the runs: theirs are such as 'q1', here such as 'x1'"


def test_qrels_without_a_good_line_stop_the_reader(trec):
    path = write_lines(trec / "qrels.txt", "q1 0 d2", "q1 0 d2 x")
    error = error_of(read_rows, trec / "bm25.run", qrels=path, bad_rows=BadRows())
    assert error.startswith(f"{path}: no judgements: all lines are broken, the first: {path}:1: expected 'query iteration")
    path.write_text("\n")
    assert error_of(read_rows, trec / "bm25.run", qrels=path) == f"{path}: no judgements"


def test_qrels_of_other_documents_stop_the_reader_that_would_label_none(trec):
    path = write_lines(trec / "qrels.txt", "q1 0 other 2")
    error = error_of(read_rows, trec / "bm25.run", qrels=path)
    assert error == f"{path}: judges none of the runs' 3 documents, so all would be unlabelled"
    rows = list(read_rows(trec / "bm25.run", qrels=path, unjudged=0.0))  # as trec_eval would have it
    assert [row["labels"] for row in rows] == [[0, 0], [0]]
    with pytest.raises(ValueError, match="unjudged: expected a finite label, got nan"):
        list(read_rows(trec / "bm25.run", qrels=path, unjudged=math.nan))


# -- qrels as a format of their own


def test_qrels_are_read_and_written(tmp_path):
    rows = rows_of(
        [{"query_id": "q1", "doc_ids": ["a", "b", "c"], "labels": [2, None, 0.5]}, {"query_id": "2", "labels": [-2]}]
    )
    write_rows(tmp_path / "a.qrels", rows)
    assert (tmp_path / "a.qrels").read_text() == "q1 0 a 2\nq1 0 c 0.5\n2 0 2.1 -2\n"
    back = list(read_rows(tmp_path / "a.qrels"))
    assert [(row["doc_ids"], row["labels"]) for row in back] == [(["a", "c"], [2, 0.5]), (["2.1"], [-2])]
    for content, reason in (
        ([TEXTS[0] | {"labels": None}], "no labels to write"),
        ([FEATURES[0] | {"query_id": "a b"}], "'a b'"),
    ):
        with pytest.raises(ValueError, match=reason):
            write_rows(tmp_path / "b.qrels", rows_of(content))
    assert [path.name for path in tmp_path.iterdir()] == ["a.qrels"]


def test_qrels_under_the_header_of_beir(tmp_path):
    path = write_lines(tmp_path / "a.qrels", "query-id\tcorpus-id\tscore", "q1\td1\t1", "q1\td2\t0")
    assert [(row["doc_ids"], row["labels"]) for row in read_rows(path)] == [(["d1", "d2"], [1, 0])]
    write_lines(path, "q1\td1\t1")
    assert error_of(read_rows, path) == f"{path}:1: expected 'query iteration document grade', got 'q1\\td1\\t1'"


def test_a_run_of_a_teacher_that_scored_nothing_is_refused(tmp_path):
    row = check_row({"query_id": "q", "teacher_logits": [[None, 1]], "teachers": ["a", "b"]})
    with pytest.raises(ValueError, match="there are no scores to write as a run"):
        write_rows(tmp_path / "a.run", [row], teacher="a")


# -- BGE and Tevatron


def test_bge_without_ids_and_scores(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", {"query": "x", "pos": ["a"], "neg": ["b", "c"]}, {"query": "y", "pos": ["d"]})
    rows = list(read_rows(path, format="bge"))
    assert [row["query_id"] for row in rows] == ["1", "2"] and rows[0]["labels"] == [1, 0, 0] and rows[0]["teachers"] == []


@pytest.mark.parametrize(
    "format, line, reason",
    [
        ("bge", {"query": "x", "neg": ["b"]}, "pos: expected a list, got null"),
        ("bge", {"query": "x", "pos": ["a"], "pos_scores": [1, 2]}, "pos_scores: expected 1 scores, got 2"),
        ("bge", {"query": "x", "pos": [3]}, "documents[0]: expected a text, got 3"),
        ("tevatron", {"query_id": "q", "passages": ["a"]}, "passages[0]: expected an object with a text, got 'a'"),
        ("bge", {"query": "x", "pos": "a"}, "pos: expected a list, got 'a'"),
        (
            "bge",
            {"query": "x", "pos": ["a"], "pos_scores": ["1_0"]},
            "teacher_logits[0][0]: expected a number or null, got '1_0'",
        ),
        ("tevatron", {"query_id": "q"}, "positive_passages: expected a list, got null"),
        (
            "tevatron",
            {"query_id": "q", "passages": [{"text": "a"}], "scores": [1, 2]},
            "teacher_logits: expected 1 entries like documents, got 2",
        ),
    ],
)
def test_bge_and_tevatron_broken_lines(tmp_path, format, line, reason):
    path = write_lines(tmp_path / "a.jsonl", line)
    assert error_of(read_rows, path, format=format) == f"{path}:1: {reason}"


# B10
@pytest.mark.parametrize(
    "lines, logits",
    [
        ([{"query": "x", "pos": ["a"], "neg": ["b", "c"], "pos_scores": [None], "neg_scores": [None, None]}], [[None] * 3]),
        (
            [
                {"query": "x", "pos": ["a"], "neg": ["b"]},
                {"query": "y", "pos": ["a"], "neg": ["b"], "pos_scores": [1], "neg_scores": [0]},
                {"query": "z", "pos": ["a"], "neg": ["b"], "neg_scores": [0.5]},
                {"query": "u", "pos": ["a"], "pos_scores": None},
            ],
            [[None, None], [1, 0], [None, 0.5], [None]],
        ),
    ],
)
def test_bge_lines_without_scores_are_a_teacher_that_scored_nothing(tmp_path, lines, logits):
    rows = list(read_rows(write_lines(tmp_path / "a.jsonl", *lines), format="bge"))
    assert [[score for (score,) in row["teacher_logits"]] for row in rows] == logits
    assert {tuple(row["teachers"]) for row in rows} == {("teacher",)}


# B8
@pytest.mark.parametrize("broken", [{"neg": [5]}, {"id": "a"}, {"neg_scores": [1, 2]}, {"neg_scores": ["x"]}])
def test_bge_line_that_is_left_out_leaves_no_trace(tmp_path, broken):
    line = {"id": "b", "query": "y", "pos": ["a"], "neg": ["b"], "pos_scores": [1], "neg_scores": [0]} | broken
    path = write_lines(tmp_path / "a.jsonl", {"id": "a", "query": "x", "pos": ["a"]}, line)
    bad_rows = BadRows()
    (row,) = read_rows(path, format="bge", bad_rows=bad_rows)
    assert row["teachers"] == [] and bad_rows.count == 1
    assert error_of(read_rows, path, format="bge").startswith(f"{path}:2: ")


# A6
@pytest.mark.parametrize(
    "line, logits, labels",
    [
        (
            {
                "query_id": "1",
                "query": "q",
                "positive_passages": [{"docid": "p", "text": "a", "score": 1}],
                "negative_passages": [{"docid": "n", "text": "b", "score": 0.75}],
            },
            [[1], [0.75]],
            [1, 0],
        ),
        (
            {"query_id": "1", "query": "q", "passages": [{"docid": "p", "text": "a", "score": 2}, {"docid": "n", "text": "b"}]},
            [[2], [None]],
            [None, None],
        ),
        ({"query_id": "1", "query": "q", "passages": [{"text": "a", "score": None}]}, [[None]], [None]),
    ],
)
def test_tevatron_scores_of_passages_are_the_teacher(tmp_path, line, logits, labels):
    other = {"query_id": "2", "query": "q", "positive_passages": [{"text": "a"}]}
    rows = list(read_rows(write_lines(tmp_path / "a.jsonl", other, line), format="tevatron"))
    assert rows[1]["teacher_logits"] == logits and rows[1]["labels"] == labels and rows[1]["teachers"] == ["teacher"]
    assert rows[0]["teacher_logits"] == [[None]] and rows[0]["teachers"] == ["teacher"]


# A6, B7
@pytest.mark.parametrize(
    "line, reason",
    [
        (
            {"query_id": "1", "passages": [{"text": "a"}, {"text": "b", "score": 1}], "scores": [1, 2]},
            "passages[1]: score: expected none beside the list of scores",
        ),
        (
            {"query_id": "1", "passages": [{"text": "a", "score": "1_0"}]},
            "teacher_logits[0][0]: expected a number or null, got '1",
        ),
        ({"query_id": "1", "passages": [{"text": "a", "title": 5}]}, "passages[0]: title: expected a text, got 5"),
        ({"query_id": "1", "passages": [{"text": None}]}, "passages[0]: expected an object with a text, got {'text': None}"),
        (
            {"query_id": "1", "passages": [{"text": "a", "docid": "x"}, {"text": "b"}]},
            "passages[1]: docid: expected one as the",
        ),
        (
            {"query_id": "1", "passages": [{"text": "a"}], "negative_passages": [{"text": "b"}]},
            "passages: expected either passages or negative_passages, got both",
        ),
        ({"query_id": "1", "positive_passages": [], "negative_passages": ["b"]}, "negative_passages[0]: expected an object"),
        ({"query_id": "1", "positive_passages": [{"text": "a", "docid": ["x"]}]}, "doc_ids[0]: expected a name, got ['x']"),
        ({"query_id": {"a": 1}, "positive_passages": [{"text": "a"}]}, "query_id: expected a name, got {'a': 1}"),
    ],
)
def test_tevatron_of_wrong_types(tmp_path, line, reason):
    path = write_lines(tmp_path / "a.jsonl", line)
    assert error_of(read_rows, path, format="tevatron").startswith(f"{path}:1: {reason}")


def test_tevatron_titles_and_scores(tmp_path):
    passages = [{"title": "T", "text": "a", "docid": "d1"}, {"title": "", "text": "b", "docid": 2}]
    path = write_lines(tmp_path / "a.jsonl", {"query_id": 3, "query": "x", "passages": passages, "scores": [0.5, None]})
    (row,) = read_rows(path, format="tevatron")
    assert row["documents"] == ["T a", "b"] and row["doc_ids"] == ["d1", "2"] and row["teacher_logits"] == [[0.5], [None]]


# -- datasets


@pytest.fixture
def datasets_cache(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


def test_dataset_holds_the_rows_and_follows_the_file(tmp_path, datasets_cache):
    path = write_lines(tmp_path / "a.jsonl", TEXTS[1])
    assert load_dataset(path)[0] == rows_of(TEXTS)[1]
    write_lines(path, *TEXTS)
    assert load_dataset(path)["query_id"] == ["q1", "7"]


def test_dataset_reports_bad_rows_also_from_the_cache(tmp_path, datasets_cache):
    path = write_lines(tmp_path / "a.jsonl", TEXTS[1], "{")
    for _ in range(2):
        bad_rows = BadRows()
        assert len(load_dataset(path, bad_rows=bad_rows)) == 1
        assert bad_rows.count == 1 and bad_rows.reasons[0].startswith(f"{path}:2: not JSON: ")
    with pytest.raises(ValueError, match=f"{path}:2: not JSON"):
        load_dataset(path)
