"""Missing scores as the bottom of a teacher's list, and the file of teachers' weights."""

import json

import pytest
import torch

import pile_fast
from pile_fast.data import TeacherWeights, load_mq2008, missing_as_bottom
from pile_fast.data.missing import many_missing, row_with_bottom

NAN = torch.nan


def test_a_missing_score_is_below_the_end_of_the_teacher_s_list():
    logits = torch.tensor([[4.0, NAN], [NAN, NAN], [2.0, NAN], [5.0, 7.0], [NAN, 7.0], [NAN, NAN]])
    given = logits.clone()
    filled = missing_as_bottom(logits, torch.tensor([0, 3, 6]))
    assert torch.equal(logits.nan_to_num(99), given.nan_to_num(99))  # not written
    # The mean step of two documents 2 apart is 1; one document, or several of one score, have none: 1.
    wanted = torch.tensor([[4.0, NAN], [1.0, NAN], [2.0, NAN], [5.0, 7.0], [4.0, 7.0], [4.0, 6.0]])
    torch.testing.assert_close(filled, wanted, equal_nan=True, rtol=0, atol=0)
    assert torch.equal(missing_as_bottom(logits, torch.tensor([0, 3, 6]), value=-1.0)[[1, 4, 5], 0], torch.full((3,), -1.0))


@pytest.mark.parametrize("scale", [1.0, 1e-20, 1e20])
@pytest.mark.parametrize("offset", [0.0, 1e6, -1e6])
def test_it_is_below_at_any_scale(offset, scale):
    logits = (offset + torch.tensor([[1.0], [2.0], [3.0], [NAN]])) * scale
    for own in (logits, logits[[0, 0, 3]], logits[[1, 3]]):
        filled = missing_as_bottom(own, torch.tensor([0, len(own)]))
        assert filled.isfinite().all() and (filled[-1] < filled[:-1]).all()


def test_infinite_logits_and_queries_without_documents():
    logits = torch.tensor([[torch.inf], [2.0], [1.0], [-torch.inf]])
    filled = missing_as_bottom(logits, torch.tensor([0, 0, 4, 4]))
    assert filled.flatten().tolist() == [0.5, 2.0, 1.0, 0.5]
    with pytest.raises(ValueError, match="cu_seqlens: expected the last entry to be D = 4, got"):
        missing_as_bottom(logits, torch.tensor([0, 3]))
    with pytest.raises(ValueError, match=r"teacher_logits: expected \(D, M\), got \(4,\)"):
        missing_as_bottom(logits[:, 0], torch.tensor([0, 4]))


def test_of_a_row():
    row = {"query_id": "q", "teacher_logits": [[3.0, None], [None, None], [1.0, None]]}
    assert row_with_bottom(row) == {"query_id": "q", "teacher_logits": [[3.0, None], [0.0, None], [1.0, None]]}
    assert row_with_bottom({"teacher_logits": None}) == {"teacher_logits": None}
    assert row_with_bottom({"teacher_logits": [[], []]})["teacher_logits"] == [[], []]


def test_mq2008_reads_the_same_bottom(mq2008_folder):
    missing, bottom = (load_mq2008(mq2008_folder, missing=name) for name in ("nan", "bottom"))
    filled = missing_as_bottom(missing.teacher_logits, missing.cu_seqlens, value=0.0)
    torch.testing.assert_close(filled, bottom.teacher_logits, equal_nan=True, rtol=0, atol=0)
    assert missing.teacher_logits.isnan().sum() > bottom.teacher_logits.isnan().sum() > 0


def test_what_is_said_of_many_missing_scores():
    assert many_missing(0, 0) is None and many_missing(10, 30) is None
    assert many_missing(1100, 3000).startswith("1,100 of 3,000 scores of the teachers are missing (37%)")


def test_weights_come_back_to_the_bit(tmp_path):
    labels = torch.tensor([[2.0, 1.0, 0.0], [0.0, 1.0, 2.0]])
    teachers = torch.stack([labels, -labels, torch.randn(2, 3)], -1)
    loss = pile_fast.PILELoss(margin=0.5).fit([(teachers, labels)])
    path = tmp_path / "teacher_weights.json"
    TeacherWeights.of(loss, ["good", "bad", "größer\x1b"]).save(path)
    weights = TeacherWeights.load(path)
    assert torch.equal(torch.tensor([*weights.weights.values()]), loss.weights)
    assert list(weights.weights) == ["good", "bad", "größer\x1b"] and weights.labelled_queries == 2
    assert weights.options["margin"] == 0.5 and weights.options["normalize"] == "zscore"
    assert weights.pile_fast == pile_fast.__version__ and str(weights).startswith("good 0.")
    with pytest.raises(ValueError, match="teachers: expected a name for each of the loss's 3 weights, got 1"):
        TeacherWeights.of(loss, ["good"])


@pytest.mark.parametrize(
    "content", ["[]", "{", "{}", '{"weights": {}, "labelled_queries": 1}', '{"weights": {"a": -1}, "labelled_queries": 1}',
                '{"weights": {"a": "1"}}', '{"weights": {"a": NaN}}', '{"weights": {"a": 1}, "labelled_queries": null}'],
)  # fmt: skip
def test_another_file_is_refused_by_name(tmp_path, content):
    (tmp_path / "w.json").write_text(content)
    with pytest.raises(ValueError, match=r"w\.json: expected teachers' weights as teacher_weights\.json has them"):
        TeacherWeights.load(tmp_path / "w.json")


def test_a_bad_weight_keeps_the_old_file(tmp_path):
    path = tmp_path / "teacher_weights.json"
    TeacherWeights({"a": 1.0}).save(path)
    with pytest.raises(TypeError):
        TeacherWeights({"a": object()}).save(path)
    assert json.loads(path.read_text())["weights"] == {"a": 1.0} and len(list(tmp_path.iterdir())) == 1
