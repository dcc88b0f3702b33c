"""Ensembles over Arrow tables and files: the same numbers as the functions give, whatever the layout of the columns."""

import json
import os
import pickle
import subprocess
import sys
from decimal import Decimal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from pile_fast import PILELoss, pile_ensemble
from pile_fast.data import TeacherWeights, check_row, make_synthetic, missing_as_bottom, parquet, read_rows, write_rows
from pile_fast.ensembles import ENSEMBLES, OFFLINE, StackingEnsemble, best_teacher_ensemble, mean_ensemble
from pile_fast.offline import ensemble as offline
from pile_fast.offline.ensemble import OfflineEnsemble, ensemble_file
from pile_fast.offline.resumable import ResumableOutput

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
@pytest.mark.parametrize("method", sorted(set(OFFLINE) - {"stacking", "best", "pile"}))
def test_the_ensemble_is_the_functions(rows, table, method, slots, monkeypatch):
    monkeypatch.setattr(offline, "_PADDED_SLOTS", slots)  # few: many calls of queries of alike length
    logits, labels, cu_seqlens = packed(rows)
    wanted = ENSEMBLES[method](logits, labels, cu_seqlens=cu_seqlens)
    got = OfflineEnsemble(method, keep_weights=True)(table)
    torch.testing.assert_close(flat(got["ensemble_logits"]), wanted.logits, equal_nan=True)
    assert wanted.logits.isnan().any()
    per_document = wanted.weights.repeat_interleave(cu_seqlens.diff(), 0)
    torch.testing.assert_close(flat(got["ensemble_weights"]).view(per_document.shape), per_document)


@pytest.mark.parametrize(
    "options",
    [
        {"granularity": "document"},
        {"iterations": 3, "granularity": "query", "margin": 0.5, "pair_weight": "gain_gap"},
        {"iterations": 0},
    ],
)
def test_pile_is_the_same_to_the_bit(rows, table, options):
    logits, labels, cu_seqlens = packed(rows)
    wanted = pile_ensemble(logits, labels, cu_seqlens=cu_seqlens, return_weights=True, **options)
    for part in (table, table.slice(11, 9)):
        got = OfflineEnsemble("pile", keep_weights=True, **options)(part)
        start = int(cu_seqlens[0 if part is table else 11])
        values, weights = flat(got["ensemble_logits"]), flat(got["ensemble_weights"]).view(-1, logits.shape[1])
        torch.testing.assert_close(values, wanted.logits[start : start + len(values)], equal_nan=True, rtol=0, atol=0)
        per_document = wanted.weights
        if options.get("granularity") == "query":
            per_document = per_document.repeat_interleave(cu_seqlens.diff(), 0)
        if "granularity" not in options:
            per_document = per_document.expand(len(logits), -1)
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


# Queries without a label are in the file, and get the same weights.
def shared_weights(rows, **options):
    """(weights, labelled queries) that the rows' queries share."""
    logits, labels, cu_seqlens = packed(rows)
    loss = PILELoss(**options).fit([(logits, labels, None, cu_seqlens)])
    return loss.weights, int(loss.labelled_queries)


def test_pile_s_weights_are_those_that_all_rows_share(rows, table):
    logits, labels, cu_seqlens = packed(rows)
    weights, labelled = shared_weights(rows)
    torch.testing.assert_close(weights, pile_ensemble(logits, labels, cu_seqlens=cu_seqlens, return_weights=True).weights)
    wanted = pile_ensemble(logits, labels, cu_seqlens=cu_seqlens, prior=weights, iterations=0).logits
    got = OfflineEnsemble("pile", keep_weights=True)(table)
    torch.testing.assert_close(flat(got["ensemble_logits"]), wanted, equal_nan=True, rtol=0, atol=0)
    shown = flat(got["ensemble_weights"]).view(-1, 6)
    torch.testing.assert_close(shown, weights.expand(len(logits), -1))
    assert weights.max() > 0.25 and 0 < labelled < len(rows)


@pytest.mark.parametrize("own", [{}, {"granularity": "query", "iterations": 2}, {"granularity": "document", "step_size": 0.5}])
def test_pile_s_weights_come_from_other_rows(rows, table, fit, own):
    logits, labels, cu_seqlens = packed(rows)
    weights, labelled = shared_weights(synthetic_rows(30, seed=1), normalize="center")
    learnt = OfflineEnsemble("pile", fit=fit, normalize="center", **own)
    assert learnt.learnt == weights.tolist() and learnt.labelled_queries == labelled
    steps = own or {"iterations": 0}
    wanted = pile_ensemble(logits, labels, cu_seqlens=cu_seqlens, prior=weights, normalize="center", **steps).logits
    torch.testing.assert_close(flat(learnt(table)["ensemble_logits"]), wanted, equal_nan=True, rtol=0, atol=0)
    assert ("labels" in learnt.columns) == bool(own)
    if not own:  # then labels of these rows change nothing
        assert learnt(table.drop_columns("labels"))["ensemble_logits"].equals(learnt(table)["ensemble_logits"])
        weighed = OfflineEnsemble("pile", weights=learnt.weights, normalize="center")
        assert weighed(table).equals(learnt(table)) and weighed.settings["learnt"] == learnt.settings["learnt"]


def test_weights_learnt_before_go_by_name(rows):
    names = [f"t{m}" for m in range(6)]
    table = parquet.rows_to_table([row | {"teachers": names} for row in rows])
    weights = TeacherWeights({name: float(m) for m, name in enumerate(names[::-1])})
    got = flat(OfflineEnsemble("pile", weights=weights, keep_weights=True)(table)["ensemble_weights"]).view(-1, 6)
    torch.testing.assert_close(got[0] / got[0].sum(), torch.arange(5.0, -1.0, -1.0) / 15)
    with pytest.raises(ValueError, match="row 1: teachers: 'x' of fit is missing"):
        OfflineEnsemble("pile", weights=TeacherWeights({"x": 1.0}))(table)
    for method, more in (("mean", {}), ("pile", {"fit": table})):
        with pytest.raises(ValueError, match="weights: are for the method pile, and in the place of fit"):
            OfflineEnsemble(method, weights=weights, **more)


@pytest.mark.parametrize("method", ["pile", "mean", "best"])
def test_missing_scores_may_be_the_bottom(rows, method, fit):
    table = parquet.rows_to_table(rows)
    logits, labels, cu_seqlens = packed(rows)
    filled = [
        row | {"teacher_logits": [[None if x != x else x for x in scores] for scores in own.tolist()]}
        for row, own in zip(rows, missing_as_bottom(logits, cu_seqlens).split(cu_seqlens.diff().tolist()), strict=True)
    ]
    options = {"fit": fit} if method == "best" else {}
    got = OfflineEnsemble(method, missing="bottom", **options)(table)
    assert got["teacher_logits"].equals(table["teacher_logits"])
    plain = OfflineEnsemble(method, **options)
    if method != "best":
        wanted = plain(parquet.rows_to_table(filled))["ensemble_logits"]
        torch.testing.assert_close(flat(got["ensemble_logits"]), flat(wanted), equal_nan=True)
    assert not got["ensemble_logits"].equals(plain(table)["ensemble_logits"])
    with pytest.raises(ValueError, match="missing: expected"):
        OfflineEnsemble(method, missing="top", **options)


def test_it_pickles_with_what_it_learnt(table, fit):
    for ensemble in (OfflineEnsemble("pile", iterations=2), OfflineEnsemble("best", fit=fit)):
        copy = pickle.loads(pickle.dumps(ensemble))
        assert copy(table).equals(ensemble(table)) and copy.settings == ensemble.settings


# -- teachers by name (A2)


def two_teachers(names, good, *, queries=6, name="q"):
    """Rows of three documents in which the teacher called `good` is right and the other one wrong, and both unlike."""
    rows = []
    for q in range(queries):
        labels = [2.0, 1.0, 0.0] if q % 2 else [0.0, 1.0, 2.0]
        right, wrong = [3.0 * label + q for label in labels], [5.0 - label * label for label in labels]
        columns = [right if teacher == good else wrong for teacher in names]
        logits = [list(scores) for scores in zip(*columns, strict=True)]
        rows.append(check_row({"query_id": f"{name}{q}", "labels": labels, "teacher_logits": logits, "teachers": list(names)}))
    return rows


def nameless(rows):
    return parquet.rows_to_table(rows).drop_columns("teachers")


@pytest.mark.parametrize("method", ["best", "pile", "stacking"])
def test_learnt_weights_go_to_the_teachers_of_their_names(method):
    fit = parquet.rows_to_table(two_teachers(["good", "bad", "worse"], "good"))
    same, turned = (
        parquet.rows_to_table(two_teachers(names, "good")) for names in (["good", "bad", "worse"], ["worse", "good", "bad"])
    )
    ensemble = OfflineEnsemble(method, fit=fit, keep_weights=True)
    assert ensemble.teachers == ["good", "bad", "worse"] and ensemble.settings["teachers"] == ensemble.teachers
    wanted, got = ensemble(same), ensemble(turned)
    torch.testing.assert_close(flat(got["ensemble_logits"]), flat(wanted["ensemble_logits"]))
    assert got["teacher_logits"].equals(turned["teacher_logits"])  # only looked at in another order
    weights = flat(got["ensemble_weights"]).view(-1, 3)[:, [1, 2, 0]]
    torch.testing.assert_close(weights, flat(wanted["ensemble_weights"]).view(-1, 3))
    assert (weights[:, 0] > weights[:, 1]).all()


@pytest.mark.parametrize(
    "fit, rows, reason",
    [
        (["a", "b"], ["a", "c"], "row 1: teachers: 'b' of fit is missing, the rows have a, c"),
        (["a", "b"], ["x", "y"], "row 1: teachers: 'a' of fit is missing, the rows have x, y"),
        (["a", "b"], ["a"], "row 1: teachers: 'b' of fit is missing, the rows have a"),
        (["a", "b"], ["b", "c", "a"], "row 1: teachers: nothing is known of 'c', fit has a, b"),
        (["a", "b"], None, "row 1: teachers: no names in the rows, but in fit; name the teachers"),
        (None, ["a", "b"], "row 1: teachers: no names in fit, but in the rows; name the teachers"),
    ],
)
def test_teachers_that_fit_does_not_know_are_refused(fit, rows, reason):
    one, two = (
        nameless(two_teachers(["a", "b"], "a")) if names is None else parquet.rows_to_table(two_teachers(names, "a"))
        for names in (fit, rows)
    )
    with pytest.raises(ValueError) as caught:
        OfflineEnsemble("best", fit=one)(two)
    assert str(caught.value).startswith(reason)


def test_teachers_without_names_are_matched_by_position():
    rows = two_teachers(["a", "b"], "a")
    ensemble = OfflineEnsemble("best", fit=nameless(rows))
    wanted = OfflineEnsemble("best", fit=parquet.rows_to_table(rows))(parquet.rows_to_table(rows))["ensemble_logits"]
    assert ensemble(nameless(rows))["ensemble_logits"].equals(wanted)
    called = [row | {"teachers": ["teacher 1", "teacher 2"]} for row in rows]  # what readers call them
    assert ensemble(parquet.rows_to_table(called))["ensemble_logits"].equals(wanted)
    with pytest.raises(ValueError, match="row 1: teacher_logits: expected 2 teachers as in fit, got 3"):
        ensemble(nameless(two_teachers(["a", "b", "c"], "a")))


# -- what is refused


@pytest.mark.parametrize(
    "arguments, reason",
    [
        ({"method": "ae_kd"}, "method: ae_kd needs the student's logits, so it runs while the student is trained"),
        ({"method": "median"}, "method: expected one of mean, best, rrf, ca_mkd, ebkd, pile, stacking, got 'median'"),
        ({"method": "stacking"}, "fit: stacking needs data with labels"),
        ({"method": "mean", "fit": pa.table({})}, "fit: mean learns nothing from data"),
        ({"method": "best", "fit": pa.table({"labels": [[1]]})}, "fit: missing column teacher_logits, there are labels"),
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
    with pytest.raises(ValueError, match=r"a\.parquet: row 26: labels: expected \d+ entries like teacher_logits, got 1"):
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
    with pytest.raises(ValueError, match=rf"a\.parquet: {reason}"):
        ensemble_file(tmp_path / "a.parquet", tmp_path / "b.parquet", OfflineEnsemble())


def change_in_place(path):
    """Another content of equal size and time, as `cp -p` leaves it."""
    status, content = path.stat(), bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


# A13
@pytest.mark.parametrize("source", ["a.parquet", "a.jsonl"])
@pytest.mark.parametrize("target", ["b.parquet", "b.jsonl"])
def test_an_input_that_changes_while_it_is_read_gives_no_output(tmp_path, rows, small_parts, source, target):
    write_rows(tmp_path / source, rows)
    (tmp_path / "b.jsonl").write_text("old")
    done = []

    def change_at_the_end(count):
        done.append(count)
        if sum(done) == len(rows):
            change_in_place(tmp_path / source)

    with pytest.raises(ValueError, match=rf"{source}: changed while it was read, so nothing was written; run it again"):
        ensemble_file(tmp_path / source, tmp_path / target, OfflineEnsemble(), progress=change_at_the_end)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([source, "b.jsonl"])
    assert (tmp_path / "b.jsonl").read_text() == "old"


def test_an_input_that_changed_since_is_not_gone_on_with(tmp_path, rows, small_parts, monkeypatch):
    write_rows(tmp_path / "a.parquet", rows)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(ResumableOutput, "finish", lambda output: (_ for _ in ()).throw(KeyboardInterrupt))
        ensemble_file(tmp_path / "a.parquet", tmp_path / "b.parquet", OfflineEnsemble())
    content = (tmp_path / "a.parquet").read_bytes()
    change_in_place(tmp_path / "a.parquet")
    assert (tmp_path / "a.parquet").stat().st_size == len(content)
    with pytest.raises(ValueError, match=r"another input \(.*input differ\)"):
        ensemble_file(tmp_path / "a.parquet", tmp_path / "b.parquet", OfflineEnsemble())


# A3: one check for every output
@pytest.mark.parametrize("source", ["a.parquet", "a.jsonl"])
@pytest.mark.parametrize("target", ["b.parquet", "b.jsonl"])
@pytest.mark.parametrize("names", [["teacher 6", *[f"teacher {m}" for m in range(1, 6)]], ["x", *[f"y{m}" for m in range(5)]]])
def test_teachers_that_change_within_a_file_are_refused_by_file_and_row(tmp_path, rows, small_parts, source, target, names):
    content = [*rows[:35], *(row | {"teachers": names} for row in rows[35:])]
    if source == "a.parquet":
        pq.write_table(parquet.rows_to_table(content), tmp_path / source, row_group_size=10)
    else:
        (tmp_path / source).write_text("".join(json.dumps(row) + "\n" for row in content))
    where = " row 36" if source == "a.parquet" else "36"
    with pytest.raises(ValueError, match=rf"{source}:{where}: teachers: expected \['teacher 1', .*got \['{names[0]}'"):
        ensemble_file(tmp_path / source, tmp_path / target, OfflineEnsemble("mean"))
    assert [path.name for path in tmp_path.iterdir()] == [source]


@pytest.mark.parametrize("target", ["b.parquet", "b.jsonl"])
def test_teachers_that_change_from_no_names_to_others_are_refused(tmp_path, rows, small_parts, target):
    content = [
        row | {"teachers": None if q < 3 else list("abcdef") if q < 20 else list("fedcba")} for q, row in enumerate(rows)
    ]
    pq.write_table(parquet.rows_to_table(content), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"a.parquet: row 4: teachers: expected \['teacher 1', .*, got \['a', 'b'"):
        ensemble_file(tmp_path / "a.parquet", tmp_path / target, OfflineEnsemble("mean"))


@pytest.mark.parametrize("target", ["b.parquet", "b.jsonl"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("type", [pa.float16(), pa.float32(), pa.float64()])
def test_a_score_that_is_not_finite_is_named_by_file_and_row(tmp_path, rows, small_parts, target, value, type):
    table = parquet.rows_to_table(rows)
    logits = [[[None if x is None else np.float16(x) for x in xs] for xs in row["teacher_logits"]] for row in rows]
    logits[29][0][2] = np.float16(value)
    table = table.set_column(table.column_names.index("teacher_logits"), "teacher_logits", pa.array(logits, _lists(type)))
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=8)
    with pytest.raises(ValueError, match=rf"a.parquet: row 30: teacher_logits\[0\]\[2\]: expected a finite .*, got {value}"):
        ensemble_file(tmp_path / "a.parquet", tmp_path / target, OfflineEnsemble("mean"))
    assert [path.name for path in tmp_path.iterdir()] == ["a.parquet"]


def _lists(type):
    return pa.list_(pa.list_(type))


# A11
@pytest.mark.parametrize("target", ["b.parquet", "b.jsonl"])
@pytest.mark.parametrize("source", ["a.parquet", "a.jsonl"])
def test_a_file_without_labels_is_refused_by_a_method_that_goes_by_them(tmp_path, rows, fit, small_parts, source, target):
    unlabelled = [row | {"labels": [None] * len(row["labels"])} for row in rows]
    write_rows(tmp_path / source, unlabelled)
    for method in ("pile", "best", "ca_mkd"):
        with pytest.raises(ValueError, match=rf"{source}: no document has a label, and the method {method} goes by labels"):
            own = {"granularity": "document"} if method == "pile" else {}
            ensemble_file(tmp_path / source, tmp_path / target, OfflineEnsemble(method, **own))
    assert [path.name for path in tmp_path.iterdir()] == [source]
    for ensemble in (OfflineEnsemble("mean"), OfflineEnsemble("pile", fit=fit), OfflineEnsemble("best", fit=fit)):
        ensemble_file(tmp_path / source, tmp_path / target, ensemble)
        assert len(list(read_rows(tmp_path / target))) == len(rows)


def test_labels_that_order_nothing_are_warned_of(tmp_path, rows, small_parts):
    write_rows(tmp_path / "a.parquet", [row | {"labels": [1.0] * len(row["labels"])} for row in rows])
    with pytest.warns(UserWarning, match="a.parquet: in no query two documents have labels that differ, and the method pile"):
        ensemble_file(tmp_path / "a.parquet", tmp_path / "b.parquet", OfflineEnsemble())


def test_pile_that_learnt_needs_no_column_of_labels(table, fit):
    ensemble = OfflineEnsemble("pile", fit=fit)
    unlabelled = table.set_column(
        table.column_names.index("labels"), "labels", pa.nulls(table.num_rows, pa.list_(pa.float32()))
    )
    wanted = ensemble(unlabelled)["ensemble_logits"]
    assert ensemble(table.drop_columns("labels"))["ensemble_logits"].equals(wanted)


@pytest.mark.parametrize("method", ["best", "pile", "stacking"])
@pytest.mark.parametrize("labels", [lambda n: [None] * n, lambda n: [1.0] * n, lambda n: None])
def test_fit_without_a_pair_is_refused(tmp_path, rows, method, labels):
    content = parquet.rows_to_table([row | {"labels": labels(len(row["labels"]))} for row in rows])
    with pytest.raises(ValueError, match="fit: nothing to learn from, in no query two documents have labels that differ"):
        OfflineEnsemble(method, fit=content)


def test_a_pair_that_no_teacher_scored_is_none(rows):
    row = {"query_id": "q", "labels": [1.0, 0.0], "teacher_logits": [[None, None], [1.0, 2.0]], "teachers": ["a", "b"]}
    with pytest.raises(ValueError, match="fit: nothing to learn from"):
        OfflineEnsemble("best", fit=parquet.rows_to_table([row]))


# B6: labels that float32 would tie
@pytest.mark.parametrize("type", [pa.int64(), pa.uint32(), pa.float64(), pa.decimal128(12, 2)])
def test_large_labels_do_not_tie(type):
    logits = pa.array([[[1.0, 0.0], [0.0, 2.0], [0.5, 0.1]]])
    number = Decimal if pa.types.is_decimal(type) else int
    first, second = (
        OfflineEnsemble()(pa.table({"teacher_logits": logits, "labels": pa.array([list(map(number, labels))], pa.list_(type))}))
        for labels in ([20000001, 20000000, 0], [2, 1, 0])
    )
    assert first["ensemble_logits"].equals(second["ensemble_logits"])


def test_whole_numbers_that_nothing_holds_are_refused_as_labels():
    table = pa.table({"teacher_logits": [[[1.0]], [[1.0], [2.0]]], "labels": [None, [1, 2**53 + 1]]})
    with pytest.raises(
        ValueError, match=r"row 2: labels\[1\]: expected a whole number up to 2\^53 or null .*, got 9007199254740993"
    ):
        OfflineEnsemble()(table)


@pytest.mark.parametrize("type", [pa.int64(), pa.uint8(), pa.float16(), pa.float64(), pa.decimal128(12, 2), pa.bool_()])
def test_scores_of_other_types(type):
    values = [[[1, 0], [0, None], [1, 1]]]
    numbers = [[[None if x is None else np.float16(x) for x in xs] for xs in row] for row in values]
    logits = pa.array(numbers, _lists(pa.float16())).cast(_lists(pa.float32())).cast(_lists(type))
    wanted = OfflineEnsemble("mean")(pa.table({"teacher_logits": pa.array(values, _lists(pa.float32()))}))
    assert OfflineEnsemble("mean")(pa.table({"teacher_logits": logits}))["ensemble_logits"].equals(wanted["ensemble_logits"])


def test_scores_beyond_2_to_the_24_are_rounded_not_refused():
    logits = pa.array([[[20000001, 0], [5, 2**60]]])
    assert OfflineEnsemble("mean")(pa.table({"teacher_logits": logits}))["ensemble_logits"].null_count == 0


@pytest.mark.parametrize(
    "teachers, reason",
    [
        (pa.array([[1, 2]]), "column teachers: expected lists of names, got list<"),
        (pa.array(["a"]), "column teachers: expected lists of names, got string"),
        (pa.array([["a", "a"]]), "row 1: teachers: expected 2 different names, got ['a', 'a']"),
        (pa.array([["a", None]]), "row 1: teachers: expected 2 different names, got ['a', None]"),
        (pa.array([["a", ""]]), "row 1: teachers: expected 2 different names, got ['a', '']"),
        (pa.array([[]], pa.list_(pa.string())), "row 1: teachers: expected 2 names, got []"),
    ],
)
def test_names_that_are_none(teachers, reason):
    with pytest.raises(ValueError) as caught:
        OfflineEnsemble("mean")(pa.table({"teacher_logits": [[[1.0, 2.0]]], "teachers": teachers}))
    assert str(caught.value).startswith(reason)


@pytest.mark.parametrize(
    "type",
    [
        pa.list_(pa.string_view()),
        pa.large_list(pa.large_string()),
        pa.list_(pa.string(), 6),
        pa.list_(pa.dictionary(pa.int32(), pa.string())),
    ],
)
def test_names_of_other_types(rows, table, fit, type):
    names = pa.array([row["teachers"] for row in rows], type)
    other = table.set_column(table.column_names.index("teachers"), "teachers", names)
    ensemble = OfflineEnsemble("best", fit=fit)
    assert ensemble(other)["ensemble_logits"].equals(ensemble(table)["ensemble_logits"])


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
from pile_fast.offline.ensemble import OfflineEnsemble, ensemble_file

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
    def run(name, called, **options):
        ensemble_file(f"{sys.argv[1]}/{name}.parquet", f"{sys.argv[1]}/out.parquet", OfflineEnsemble(**options))
        print(called, peak(), flush=True)

    for name in ("small", "many", "one"):
        run(name, name, granularity="document")
    run("many", "shared")
"""


def test_memory_does_not_grow_with_the_file_or_its_row_groups(tmp_path):
    """2.4 million pairs, 80 MB decoded, in sixty row groups and in one, take no more than 400,000. Weights that all queries
    share are fitted to all labelled documents at once, at less than 250 bytes each."""
    if sys.platform != "linux":
        pytest.skip("reads /proc/self/status")
    subprocess.run([sys.executable, "-c", MEMORY, tmp_path, "write"], check=True)
    out = subprocess.run([sys.executable, "-c", MEMORY, tmp_path, "run"], check=True, capture_output=True, text=True).stdout
    peaks = {name: float(peak) for name, peak in (line.split() for line in out.splitlines())}
    assert peaks["many"] - peaks["small"] < 50 and peaks["one"] - peaks["small"] < 50, peaks
    assert max(peaks.values()) < 1024 and peaks["shared"] - peaks["small"] < 2.4 * 250
