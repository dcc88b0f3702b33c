"""Ensembles over Arrow tables and files: the same numbers as the functions give, whatever the layout of the columns."""

import pickle
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from pile_fast import pile_ensemble
from pile_fast.data import ResumableOutput, check_row, make_synthetic, offline, parquet, read_rows, write_rows
from pile_fast.data.offline import METHODS, OfflineEnsemble, ensemble_file
from pile_fast.ensembles import ENSEMBLES, StackingEnsemble, best_teacher_ensemble, mean_ensemble, shared_prior

pytestmark = pytest.mark.usefixtures("one_thread")


def synthetic_rows(queries=40, seed=0, documents=(1, 30)):
    """Rows with missing logits and labels, queries of one document, and some that nobody labelled."""
    lists = make_synthetic(queries, documents=documents, seed=seed)
    rows = []
    for q, (name, row) in enumerate(zip(lists.query_ids, lists, strict=True)):
        labels = [None if (i + q) % 5 == 4 else label for i, label in enumerate(row["labels"].tolist())]
        logits = [[None if x != x else x for x in xs] for xs in row["teacher_logits"].tolist()]
        if q % 7 == 3:
            logits[0] = [None] * len(logits[0])  # a document that no teacher scored
        content = {"query_id": name, "labels": labels, "teacher_logits": logits, "teachers": list(lists.teacher_names)}
        rows.append(check_row(content))
    return rows


def packed(rows):
    def tensor(values):
        return torch.from_numpy(np.array(values, dtype=np.float64).astype(np.float32))

    cu_seqlens = torch.tensor([0, *(len(row["labels"]) for row in rows)]).cumsum(0)
    logits = torch.cat([tensor(row["teacher_logits"]) for row in rows])
    return logits, torch.cat([tensor(row["labels"]) for row in rows]), cu_seqlens


def flat(column):
    """A list column's numbers, NaN for null."""
    values = column.combine_chunks().flatten()
    while not pa.types.is_floating(values.type):
        values = values.flatten()
    return torch.from_numpy(values.to_numpy(zero_copy_only=False).copy())


@pytest.fixture(scope="module")
def rows():
    return synthetic_rows()


@pytest.fixture(scope="module")
def table(rows):
    return parquet.rows_to_table(rows)


@pytest.fixture(scope="module")
def fit():
    return parquet.rows_to_table(synthetic_rows(30, seed=1))


# -- the numbers


@pytest.mark.parametrize("slots", [2**20, 40])
@pytest.mark.parametrize("method", sorted(set(METHODS) - {"stacking", "best", "pile"}))
def test_the_ensemble_is_the_functions(rows, table, method, slots, monkeypatch):
    monkeypatch.setattr(offline, "_PADDED_SLOTS", slots)  # few: many calls of queries of alike length
    logits, labels, cu_seqlens = packed(rows)
    wanted = ENSEMBLES[method](logits, labels, cu_seqlens=cu_seqlens)
    got = OfflineEnsemble(method, keep_weights=True)(table)
    torch.testing.assert_close(flat(got["ensemble_logits"]), wanted.logits, equal_nan=True)
    assert wanted.logits.isnan().any()
    per_document = wanted.weights.repeat_interleave(cu_seqlens.diff(), 0)
    torch.testing.assert_close(flat(got["ensemble_weights"]).view(per_document.shape), per_document)


@pytest.mark.parametrize("options", [{}, {"iterations": 3, "granularity": "query", "margin": 0.5, "pair_weight": "gain_gap"}])
def test_pile_is_the_same_to_the_bit(rows, table, options):
    logits, labels, cu_seqlens = packed(rows)
    wanted = pile_ensemble(logits, labels, cu_seqlens=cu_seqlens, return_weights=True, **options)
    for part in (table, table.slice(11, 9)):
        got = OfflineEnsemble("pile", keep_weights=True, **options)(part)
        start = int(cu_seqlens[0 if part is table else 11])
        values, weights = flat(got["ensemble_logits"]), flat(got["ensemble_weights"]).view(-1, logits.shape[1])
        torch.testing.assert_close(values, wanted.logits[start : start + len(values)], equal_nan=True, rtol=0, atol=0)
        per_document = wanted.weights
        if options:
            per_document = per_document.repeat_interleave(cu_seqlens.diff(), 0)
        torch.testing.assert_close(weights, per_document[start : start + len(values)], rtol=0, atol=0)


def test_best_of_each_query_and_best_of_all(rows, table, fit):
    logits, labels, cu_seqlens = packed(rows)
    oracle = best_teacher_ensemble(logits, labels, cu_seqlens=cu_seqlens, selection="query")
    torch.testing.assert_close(flat(OfflineEnsemble("best")(table)["ensemble_logits"]), oracle.logits, equal_nan=True)

    learnt = OfflineEnsemble("best", fit=fit, normalize="center")
    assert sorted(learnt.learnt) == [0, 0, 0, 0, 0, 1] and not learnt.needs_labels
    wanted = mean_ensemble(logits, cu_seqlens=cu_seqlens, normalize="center", prior=torch.tensor(learnt.learnt))
    got = learnt(table.drop_columns("labels"))["ensemble_logits"]
    torch.testing.assert_close(flat(got), wanted.logits, equal_nan=True)


def test_stacking_learns_from_other_rows(rows, table, fit):
    pytest.importorskip("sklearn")
    logits, _, cu_seqlens = packed(rows)
    learnt = OfflineEnsemble("stacking", fit=fit, C=0.5)
    from_logits, from_labels, from_starts = packed(synthetic_rows(30, seed=1))
    stacking = StackingEnsemble(C=0.5).fit(from_logits, from_labels, cu_seqlens=from_starts)
    assert learnt.learnt == stacking.weights.tolist()
    wanted = stacking(logits, cu_seqlens=cu_seqlens).logits
    torch.testing.assert_close(flat(learnt(table)["ensemble_logits"]), wanted, equal_nan=True)


def test_replace_makes_it_the_one_teacher(table):
    added, replaced = OfflineEnsemble()(table), OfflineEnsemble(replace=True)(table)
    rows = replaced.to_pylist()
    assert [[logit for (logit,) in row["teacher_logits"]] for row in rows] == added["ensemble_logits"].to_pylist()
    assert all(check_row(row)["teachers"] == ["ensemble"] for row in rows)


def test_other_columns_pass_through_as_they_are(table):
    extra = {
        "split": pa.array(["train", None] * 20).dictionary_encode(),
        "meta": pa.array([{"a": [1, 2], "b": None}] * 40),
        "when": pa.array(range(40), pa.timestamp("us")),
    }
    for name, column in extra.items():
        table = table.append_column(name, column)
    got = OfflineEnsemble()(table)
    assert got.column_names == table.column_names  # the empty ensemble_logits of the schema is filled
    assert got.drop_columns("ensemble_logits").equals(table.drop_columns("ensemble_logits"))


@pytest.mark.parametrize(
    "logits, labels",
    [
        (pa.large_list(pa.large_list(pa.float64())), pa.large_list(pa.float64())),
        (pa.list_(pa.list_(pa.float32(), 6)), pa.list_(pa.int8())),
    ],
)
def test_other_types_of_the_columns(rows, table, logits, labels):
    columns = {
        "teacher_logits": pa.array([row["teacher_logits"] for row in rows], logits),
        "labels": pa.array([[None if x is None else int(x) for x in row["labels"]] for row in rows], labels),
    }
    got = OfflineEnsemble()(pa.table(columns))["ensemble_logits"]
    assert got.to_pylist() == OfflineEnsemble()(table)["ensemble_logits"].to_pylist()


def test_chunks_and_empty_tables(table):
    chunked = pa.concat_tables([table.slice(0, 0), table.slice(0, 7), table.slice(7, 1), table.slice(8)])
    assert OfflineEnsemble()(chunked).equals(OfflineEnsemble()(table))
    for method in ("pile", "mean"):
        assert OfflineEnsemble(method)(table.slice(0, 0)).num_rows == 0


def test_rows_without_any_label_are_null_or_all_nulls(rows):
    unlabelled = [row | {"labels": [None] * len(row["labels"])} if q % 3 == 0 else row for q, row in enumerate(rows)]
    null = [row | {"labels": None} if q % 3 == 0 else row for q, row in enumerate(rows)]
    one, two = (OfflineEnsemble()(parquet.rows_to_table(content)) for content in (unlabelled, null))
    assert one["ensemble_logits"].equals(two["ensemble_logits"])
    assert not one["ensemble_logits"].equals(OfflineEnsemble()(parquet.rows_to_table(rows))["ensemble_logits"])


def test_pile_starts_from_weights_that_other_rows_share(rows, table, fit):
    logits, labels, cu_seqlens = packed(rows)
    from_logits, from_labels, from_starts = packed(synthetic_rows(30, seed=1))
    prior = shared_prior(from_logits, from_labels, cu_seqlens=from_starts, normalize="center")
    learnt = OfflineEnsemble("pile", fit=fit, normalize="center", iterations=2)
    wanted = pile_ensemble(logits, labels, cu_seqlens=cu_seqlens, prior=prior, normalize="center", iterations=2).logits
    assert learnt.learnt == prior.tolist() and "labels" in learnt.columns
    torch.testing.assert_close(flat(learnt(table)["ensemble_logits"]), wanted, equal_nan=True, rtol=0, atol=0)


def test_it_pickles_with_what_it_learnt(table, fit):
    for ensemble in (OfflineEnsemble("pile", iterations=2), OfflineEnsemble("best", fit=fit)):
        copy = pickle.loads(pickle.dumps(ensemble))
        assert copy(table).equals(ensemble(table)) and copy.settings == ensemble.settings


# -- what is refused


@pytest.mark.parametrize(
    "arguments, reason",
    [
        ({"method": "ae_kd"}, "method: ae_kd needs the student's logits, so it runs while the student is trained"),
        ({"method": "median"}, "method: expected one of mean, best, rrf, ca_mkd, ebkd, pile, stacking, got 'median'"),
        ({"method": "stacking"}, "fit: stacking needs data with labels"),
        ({"method": "mean", "fit": pa.table({})}, "fit: mean learns nothing from data"),
        ({"method": "best", "fit": pa.table({"labels": [[1]]})}, "missing column teacher_logits, there are labels"),
        ({"iterations": -1}, "iterations: expected an int >= 0, got -1"),
        ({"method": "rrf", "k": -1}, "k: expected"),
    ],
)
def test_arguments_that_do_not_fit_show_at_once(arguments, reason):
    with pytest.raises(ValueError) as caught:
        OfflineEnsemble(**arguments)
    assert str(caught.value).startswith(reason)


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"teacher_logits": None}, "row 12: teacher_logits: expected a list per document, got null"),
        ({"teacher_logits": [[1, 2], [3]]}, "row 12: teacher_logits[1]: expected 2 teachers as in the rows before, got 1"),
        ({"teacher_logits": [[1, 2], None]}, "row 12: teacher_logits[1]: expected a list with an entry per teacher, got null"),
        ({"teacher_logits": [[1, 2], [3, np.nan]]}, "row 12: teacher_logits[1][1]: expected a finite number, or null for 'n"),
        ({"teacher_logits": [[1, 2], [-np.inf, 1]]}, "row 12: teacher_logits[1][0]: expected a finite number, or null for 'n"),
        ({"labels": [1]}, "row 12: labels: expected 2 entries like teacher_logits, got 1"),
        ({"labels": [1, np.nan]}, "row 12: labels[1]: expected a finite number, or null for unlabelled, got nan"),
        ({"labels": [1, np.inf]}, "row 12: labels[1]: expected a finite number, or null for unlabelled, got inf"),
        ({"teachers": ["b", "a"]}, "row 12: teachers: expected ['a', 'b'], got ['b', 'a']"),
        ({"teachers": ["a"]}, "row 12: teachers: expected ['a', 'b'], got ['a']"),
    ],
)
@pytest.mark.parametrize("nulls", [False, True])
def test_a_broken_row_is_named(change, reason, nulls):
    good = {"query_id": "q", "labels": [1, 0], "teacher_logits": [[1, 2], [3, 4]], "teachers": ["a", "b"]}
    before = [good, {"query_id": "p", "labels": None, "teacher_logits": [[1, None]], "teachers": None} if nulls else good]
    schema = pa.schema([parquet.SCHEMA.field(name) for name in good])
    OfflineEnsemble()(pa.Table.from_pylist([*before, good], schema))
    with pytest.raises(ValueError) as caught:
        OfflineEnsemble()(pa.Table.from_pylist([*before, good | change, good], schema), first_row=9)
    assert str(caught.value).startswith(reason)


@pytest.mark.parametrize(
    "columns, reason",
    [
        ({"labels": [[1.0]]}, "missing column teacher_logits, there are labels"),
        ({"teacher_logits": [[[1.0]]]}, "missing column labels, there are teacher_logits"),
        (
            {"teacher_logits": [[1.0]], "labels": [[1.0]]},
            "column teacher_logits: expected lists of lists of numbers, got list<",
        ),
        ({"teacher_logits": [[[1.0]]], "labels": [["high"]]}, "column labels: expected lists of numbers, got list<"),
        ({"teacher_logits": [[["1.0"]]], "labels": [[1]]}, "column teacher_logits: expected lists of lists of numbers, got"),
        ({"teacher_logits": [[[]]], "labels": [[1]]}, "row 1: teacher_logits[0]: there are no teachers"),
    ],
)
def test_columns_that_do_not_fit(columns, reason):
    with pytest.raises(ValueError) as caught:
        OfflineEnsemble()(pa.table(columns))
    assert str(caught.value).startswith(reason)


# -- files


def test_every_range_of_rows_comes_whatever_the_row_groups(tmp_path):
    table = pa.table({"i": range(23), "list": [[str(i)] * (i % 4) for i in range(23)]})
    for group in (1, 4, 10, 23):
        pq.write_table(table, tmp_path / "a.parquet", row_group_size=group)
        for size in (1, 5, 8, 30):
            for start, stop in ((0, 23), (5, 20), (10, 15), (15, 23), (22, 23)):
                with parquet.open_parquet(tmp_path / "a.parquet") as file:
                    parts = list(parquet.read_tables(file, start, stop, size))
                assert [first for first, _ in parts] == list(range(start, stop, size))
                assert pa.concat_tables([part for _, part in parts]).equals(table.slice(start, stop - start))


def test_rows_at_a_time_follow_the_bytes_the_numbers_and_the_texts(tmp_path, monkeypatch):
    def rows_of(table):
        pq.write_table(table, tmp_path / "a.parquet", row_group_size=30)
        return parquet.rows_at_a_time(parquet.open_parquet(tmp_path / "a.parquet"))

    numbers = pa.table({"q": range(100), "x": [[[1.0, 2.0, 3.0]] * 10] * 100})  # 30 to a row
    texts = pa.table({"documents": [["the same text over and over"] * 10] * 100})  # 10 texts to a row
    assert rows_of(numbers) == rows_of(texts) == 100
    monkeypatch.setattr(parquet, "BATCH_VALUES", 240)
    assert rows_of(numbers) == 8 and rows_of(texts) == 3
    monkeypatch.setattr(parquet, "BATCH_VALUES", 1)
    assert rows_of(numbers) == 1
    monkeypatch.setattr(parquet, "BATCH_VALUES", 10**9)
    monkeypatch.setattr(parquet, "BATCH_BYTES", 1000)
    assert 1 <= rows_of(pa.table({"x": [np.random.default_rng(0).random(50)] * 1 + [np.zeros(50)] * 99})) < 100


@pytest.fixture
def small_parts(monkeypatch):
    monkeypatch.setattr(parquet, "BATCH_VALUES", 700)  # some six queries a part
    monkeypatch.setattr(parquet, "ROWS_PER_TABLE", 6)


@pytest.mark.parametrize("source", ["a.parquet", "a.jsonl.gz"])
@pytest.mark.parametrize("target", ["b.parquet", "b.jsonl"])
def test_from_file_to_file(tmp_path, rows, table, small_parts, source, target):
    write_rows(tmp_path / source, rows)
    done = []
    ensemble_file(tmp_path / source, tmp_path / target, OfflineEnsemble(), progress=done.append)
    wanted = [check_row(row) for row in OfflineEnsemble()(table).to_pylist()]
    got = list(read_rows(tmp_path / target))
    assert [row["ensemble_logits"] for row in got] == [row["ensemble_logits"] for row in wanted]
    assert [row["doc_ids"] for row in got] == [row["doc_ids"] for row in wanted]
    assert sum(done) == 40 and len(done) > 4
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([source, target])


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl"])
def test_goes_on_with_the_parts_that_are_missing(tmp_path, rows, small_parts, monkeypatch, name):
    write_rows(tmp_path / name, rows)
    ensemble_file(tmp_path / name, tmp_path / "whole.parquet", OfflineEnsemble())
    write, written = ResumableOutput.write, []

    def write_some(output, number, table):
        if len(written) == 3:
            raise KeyboardInterrupt
        written.append(number)
        write(output, number, table)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(ResumableOutput, "write", write_some)
        ensemble_file(tmp_path / name, tmp_path / "b.parquet", OfflineEnsemble())
    parts = tmp_path / "b.parquet.parts"
    (parts / "00000001.parquet").unlink()
    assert len(list(parts.glob("*.parquet"))) == 2
    computed = []
    ensemble_file(tmp_path / name, tmp_path / "b.parquet", OfflineEnsemble(), progress=computed.append)
    assert (tmp_path / "b.parquet").read_bytes() == (tmp_path / "whole.parquet").read_bytes()
    assert 0 < sum(computed) < 40


def test_any_column_passes_through_a_file(tmp_path, table, small_parts):
    count = table.num_rows
    extra = {
        "split": pa.array(["train", None, "a", "b"] * (count // 4)).dictionary_encode(),
        "meta": pa.array([{"a": [1, 2], "b": None}, None] * (count // 2)),
        "tags": pa.array([[{"name": "x", "value": 1.5}], []] * (count // 2)),
        "when": pa.array(range(count), pa.timestamp("us", "UTC")),
        "large": pa.array([f"text {i}" for i in range(count)], pa.large_string()),
        "bytes": pa.array([b"\x00\xff"] * count),
        "map": pa.array([[("k", 1)]] * count, pa.map_(pa.string(), pa.int32())),
        "price": pa.array([i * 0.5 for i in range(count)]).cast(pa.decimal128(10, 2)),
        "nothing": pa.nulls(count),
    }
    for name, column in extra.items():
        table = table.append_column(name, column)
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=9)
    ensemble_file(tmp_path / "a.parquet", tmp_path / "b.parquet", OfflineEnsemble())
    back = pq.read_table(tmp_path / "b.parquet")
    assert back.schema.equals(table.schema)
    assert back.drop_columns("ensemble_logits").to_pylist() == table.drop_columns("ensemble_logits").to_pylist()


def test_a_broken_row_is_named_by_file_and_row_in_the_file(tmp_path, rows, small_parts):
    broken = [*rows[:25], rows[25] | {"labels": [1.0]}, *rows[26:]]
    pq.write_table(parquet.rows_to_table(broken), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"a\.parquet:row 26: labels: expected \d+ entries like teacher_logits, got 1"):
        ensemble_file(tmp_path / "a.parquet", tmp_path / "b.parquet", OfflineEnsemble())
    assert not (tmp_path / "b.parquet").exists()


@pytest.mark.parametrize(
    "change, reason",
    [
        (
            lambda row: row | {"teachers": row["teachers"][::-1]},
            r"row 36: teachers: expected \['teacher 1', .*got \['teacher 6'",
        ),
        (
            lambda row: row | {"teachers": None, "teacher_logits": [xs[:2] for xs in row["teacher_logits"]]},
            r"row \d+: teacher_logits.*: expected 6 teachers as in the first row, got 2",
        ),
    ],
)
def test_teachers_are_the_same_in_every_part(tmp_path, rows, small_parts, change, reason):
    pq.write_table(parquet.rows_to_table([*rows[:35], *map(change, rows[35:])]), tmp_path / "a.parquet", row_group_size=35)
    with pytest.raises(ValueError, match=rf"a\.parquet:{reason}"):
        ensemble_file(tmp_path / "a.parquet", tmp_path / "b.parquet", OfflineEnsemble())


def test_other_options_do_not_go_on_with_the_parts(tmp_path, rows, small_parts, monkeypatch):
    write_rows(tmp_path / "a.parquet", rows)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(ResumableOutput, "finish", lambda output: (_ for _ in ()).throw(KeyboardInterrupt))
        ensemble_file(tmp_path / "a.parquet", tmp_path / "b.parquet", OfflineEnsemble())
    with pytest.raises(ValueError, match=r"unfinished output of other settings or another input \(ensemble differ\)"):
        ensemble_file(tmp_path / "a.parquet", tmp_path / "b.parquet", OfflineEnsemble(iterations=3))
    with pytest.raises(ValueError, match="a.parquet: the output would replace the input"):
        ensemble_file(tmp_path / "a.parquet", tmp_path / "a.parquet", OfflineEnsemble())


def test_no_rows(tmp_path):
    write_rows(tmp_path / "a.parquet", [])
    with pytest.raises(ValueError, match="a.parquet: no rows"):
        ensemble_file(tmp_path / "a.parquet", tmp_path / "b.parquet", OfflineEnsemble())
    assert [path.name for path in tmp_path.iterdir()] == ["a.parquet"]


MEMORY = """
import sys
import numpy as np, pyarrow as pa, pyarrow.parquet as pq, torch
from pile_fast.data import parquet
from pile_fast.data.offline import OfflineEnsemble, ensemble_file

torch.set_num_threads(1)
parquet.BATCH_VALUES = 2**17

def write(path, pairs, group):
    queries = 1000
    offsets = pa.array(np.arange(0, queries * 40 + 1, 40, dtype=np.int32))
    inner = pa.array(np.arange(0, queries * 160 + 1, 4, dtype=np.int32))
    logits = pa.array(np.random.default_rng(0).standard_normal(queries * 160, dtype=np.float32))
    table = pa.table({
        "query_id": pa.array(np.arange(queries).astype(str)),
        "labels": pa.ListArray.from_arrays(offsets, pa.array(np.tile(np.arange(4, dtype=np.float32), queries * 10))),
        "teacher_logits": pa.ListArray.from_arrays(offsets, pa.ListArray.from_arrays(inner, logits)),
    })
    with pq.ParquetWriter(path, table.schema) as writer:
        for _ in range(pairs // (40 * queries * group)):
            writer.write_table(pa.concat_tables([table] * group), row_group_size=2**30)

def peak():  # not ru_maxrss, in which the process that started this one counts
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) / 1024 for line in file if line.startswith("VmHWM"))

# The large files in a process of their own: what their table took would count.
if sys.argv[2] == "write":
    write(f"{sys.argv[1]}/small.parquet", 400_000, 1)
    write(f"{sys.argv[1]}/many.parquet", 2_400_000, 1)
    write(f"{sys.argv[1]}/one.parquet", 2_400_000, 60)
else:
    for name in ("small", "many", "one"):
        ensemble_file(f"{sys.argv[1]}/{name}.parquet", f"{sys.argv[1]}/out.parquet", OfflineEnsemble())
        print(name, peak(), flush=True)
"""


def test_memory_does_not_grow_with_the_file_or_its_row_groups(tmp_path):
    """2.4 million pairs, 80 MB decoded, in sixty row groups and in one, take no more than 400,000."""
    if sys.platform != "linux":
        pytest.skip("reads /proc/self/status")
    subprocess.run([sys.executable, "-c", MEMORY, tmp_path, "write"], check=True)
    out = subprocess.run([sys.executable, "-c", MEMORY, tmp_path, "run"], check=True, capture_output=True, text=True).stdout
    peaks = {name: float(peak) for name, peak in (line.split() for line in out.splitlines())}
    assert peaks["many"] - peaks["small"] < 50 and peaks["one"] - peaks["small"] < 50, peaks
    assert max(peaks.values()) < 1024
