"""Rows of every format: what each maps to, what comes back after a round trip, and what is said about broken files."""

import gzip
import json
import lzma
import math

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pile_fast.data import BadRows, check_row, ensemble_as_teacher, load_dataset, read_letor, read_rows, write_rows
from pile_fast.data.formats import format_of
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


# -- JSON lines


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


def test_parquet_of_many_small_and_of_one_large_row_group(tmp_path):
    rows = [check_row({"query_id": f"q{i}", "labels": [i, 0]}) for i in range(2500)]
    write_rows(tmp_path / "a.parquet", rows)
    assert pq.ParquetFile(tmp_path / "a.parquet").num_row_groups == 3
    pq.write_table(pq.read_table(tmp_path / "a.parquet"), tmp_path / "b.parquet", row_group_size=7)
    assert list(read_rows(tmp_path / "a.parquet")) == list(read_rows(tmp_path / "b.parquet")) == rows


# -- LETOR and LightGBM


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
    path = write_lines(tmp_path / "a.txt", "1 qid:a 999999999:1")
    assert "feature index: expected at most 100000, got 999999999" in error_of(read_rows, path)


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
