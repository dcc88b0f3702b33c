"""What `pile-fast demo` trains and how it counts; tests/test_cli.py runs the command."""

import math
import re
from pathlib import Path

import pytest
import torch

import pile_fast
from pile_fast.cli import demo_report, demo_students
from pile_fast.data import make_synthetic

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def lists():
    return make_synthetic(60, documents=(2, 9), num_features=6, seed=3)


@pytest.mark.parametrize("share, queries", [(1.0, 60), (0.2, 12), (0.0, 0)])
def test_labels_are_kept_by_whole_queries(lists, share, queries):
    kept = demo_students.keep_labels(lists, share, seed=1)
    for before, after in zip(lists, kept, strict=True):
        assert after["labels"].isnan().all() or torch.equal(after["labels"], before["labels"])
        assert torch.equal(after["features"], before["features"])
    assert sum(not row["labels"].isnan().any() for row in kept) == queries


def test_no_run_sees_a_test_query(lists, monkeypatch):
    """Every query is judged once, by students that were trained on none of its fold; every kind sees the same labels."""
    trained, judged = [], []

    def train(seen, loss, epochs, seed):
        trained.append(
            (
                set(seen.query_ids),
                frozenset(q for q, row in zip(seen.query_ids, seen, strict=True) if not row["labels"].isnan().any()),
            )
        )
        return None

    def judge(student, test):
        judged.append(set(test.query_ids))
        return torch.ones(len(test))

    monkeypatch.setattr(demo_students, "train_student", train)
    monkeypatch.setattr(demo_students, "ndcg_of", judge)
    outcome = demo_students.cross_validate(lists, folds=range(1, 6), repeats=2, epochs=1, seed=0, trained=lambda: None)
    runs = len(demo_students.RUNS)
    assert len(trained) == len(judged) == 5 * 2 * runs
    for (seen, _), test in zip(trained, judged, strict=True):
        assert not seen & test and seen | test == set(lists.query_ids)
    assert sorted(outcome.test.query_ids) == sorted(lists.query_ids)
    for start in range(0, len(trained), runs):
        labelled = {share: set() for _, share in demo_students.RUNS}
        for (_, share), (_, of) in zip(demo_students.RUNS, trained[start : start + runs], strict=True):
            labelled[share].add(of)
        assert all(len(of) == 1 for of in labelled.values())
        assert [len(*labelled[share]) for share in (1.0, 0.2)] == [48, 10]


def test_weights_are_those_of_the_training_labels_alone(lists):
    """The labels of the test queries may be anything."""
    one = demo_students.cross_validate(lists, folds=(1,), repeats=1, epochs=1, seed=0, trained=lambda: None)
    train = lists.part("S1", "S2", "S3", "S4")
    ensemble = pile_fast.pile_ensemble(
        train.teacher_logits, train.labels, cu_seqlens=train.cu_seqlens, granularity="shared", return_weights=True
    )
    torch.testing.assert_close(one.weights[1.0], ensemble.weights, rtol=1e-4, atol=1e-6)


def test_queries_of_the_outcome_are_in_the_order_of_their_values(lists):
    outcome = demo_students.cross_validate(lists, folds=(1, 2), repeats=1, epochs=1, seed=0, trained=lambda: None)
    values = outcome.ndcg[demo_students.PILE_AND_LABELS, 1.0]
    assert outcome.test.parts == ("S5",) * 12 + ("S1",) * 12
    of_first_fold = demo_students.ndcg_of(outcome.student, outcome.test)[:12]
    torch.testing.assert_close(values[:12], of_first_fold, equal_nan=True)


def test_a_difference_is_taken_query_by_query():
    """Two rankers that differ by a constant: the difference is sure, however much the queries vary."""
    values = torch.tensor([0.1, 0.9, 0.4, math.nan, 0.6])
    lower = demo_report.estimate(values)
    assert lower.value == pytest.approx(0.5) and lower.margin == pytest.approx(1.96 * values[~values.isnan()].std() / 2)
    difference = demo_report.estimate(values + 0.01 - values)
    assert difference.value == pytest.approx(0.01) and difference.margin < 1e-6
    assert demo_report.estimate(torch.tensor([math.nan])).text() == "–"


def test_the_page_says_how_the_generated_teachers_are_made():
    from pile_fast.data.synthetic import _TEACHERS

    page = (Path(__file__).parents[1] / "docs/demo.md").read_text()
    found = re.findall(r"^\| \d, \w+ \|(.*)\|$", page, re.MULTILINE)
    rows = [tuple(None if cell.strip() == "all" else float(cell) for cell in row.split("|")) for row in found]
    assert rows == list(_TEACHERS)
