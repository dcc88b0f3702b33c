"""The teachers' weights that all queries share, in a training: learned before it or in it, saved, resumed, evaluated."""

import dataclasses
import json

import datasets
import pytest
import torch
from test_trainer_data import Stream, arguments, feature_rows, own, student, weights
from transformers import TrainerCallback

import pile_fast
from pile_fast.data import RankedLists, TeacherWeights, make_synthetic
from pile_fast.data.collator import FeatureCollator, pack_targets
from pile_fast.trainer import PileTrainer, pile_compute_loss_func

pytestmark = pytest.mark.usefixtures("one_thread")


def rows_with_a_good_teacher(queries=40, unlabelled=0):
    """The second teacher is right, the first one guesses."""
    rows = feature_rows(queries, names=("bad", "good"))
    for q, row in enumerate(rows):
        row["teacher_logits"] = [
            [scores[0], float(label)] for scores, label in zip(row["teacher_logits"], row["labels"], strict=True)
        ]
        if q < unlabelled:
            row["labels"] = None if q % 2 else [None] * len(row["labels"])
    return rows


def turned(row):
    return row | {"teachers": row["teachers"][::-1], "teacher_logits": [scores[::-1] for scores in row["teacher_logits"]]}


def trainer(folder, rows, evaluation=None, loss=None, callbacks=None, **options):
    return PileTrainer(
        student(), arguments(folder, **options), train_dataset=rows, eval_dataset=evaluation, loss=loss, callbacks=callbacks
    )


def fitted(rows):
    return pile_fast.PILELoss().fit([pack_targets(rows)])


# Two teachers' orders among the rows, and rows without a label, in which nothing is read of the teachers.
FORMS = [list, datasets.Dataset.from_list, lambda rows: datasets.Dataset.from_list(rows).with_transform(lambda rows: rows)]


@pytest.mark.parametrize("form", FORMS)
def test_the_loss_is_fitted_on_all_rows_before_the_first_step(tmp_path, form, capfd):
    rows = rows_with_a_good_teacher(unlabelled=10)
    run = trainer(tmp_path, form([row if q % 3 else turned(row) for q, row in enumerate(rows)]))
    seen = []
    run.loss.register_forward_pre_hook(lambda loss, _: seen.append((bool(loss.fitted), loss.weights.clone())))
    run.train()
    wanted = fitted([turned(row) for row in rows if row["labels"]])  # the first row's order: good, bad
    assert len(seen) == 3 and all(ready and torch.equal(own, wanted.weights) for ready, own in seen)
    assert run.loss.weights[0] > 0.7 and run.loss.labelled_queries == 30
    entry = run.state.log_history[0]
    assert entry["teacher_weight/good"] == pytest.approx(run.loss.weights[0].item())
    assert "Teachers' weights" not in capfd.readouterr().err  # disable_tqdm


def test_ranked_lists_are_fitted_on(tmp_path):
    lists = RankedLists.from_rows(rows_with_a_good_teacher())
    run = trainer(tmp_path, lists)
    run.train()
    assert torch.equal(run.loss.weights, fitted(rows_with_a_good_teacher()).weights)


def test_one_progress_bar_over_all_rows(tmp_path, capfd):
    trainer(tmp_path, rows_with_a_good_teacher(600), disable_tqdm=False).train()
    err = capfd.readouterr().err
    assert "Teachers' weights: 100%" in err and "600/600" in err


def test_texts_are_not_read_for_it(tmp_path, monkeypatch):
    rows = datasets.Dataset.from_list([row | {"documents": ["x"] * len(row["labels"])} for row in rows_with_a_good_teacher()])
    columns = []
    select = datasets.Dataset.select_columns

    def spy(self, names):
        columns.append(names)
        return select(self, names)

    monkeypatch.setattr(datasets.Dataset, "select_columns", spy)
    run = trainer(tmp_path, rows)
    run.train()
    assert columns == [["query_id", "labels", "teacher_logits", "teachers"]] and run.loss.fitted


def test_a_loss_that_is_fitted_keeps_its_weights(tmp_path):
    loss = pile_fast.PILELoss(reduction="none").fit([pack_targets([turned(row) for row in rows_with_a_good_teacher()])])
    before = loss.weights.clone()
    trainer(tmp_path, rows_with_a_good_teacher(), loss=loss).train()
    assert torch.equal(loss.weights, before)


@pytest.mark.parametrize("options", [{"iterations": 0}, {"granularity": "query"}, {"alpha": 0.0}])
def test_a_loss_without_such_weights_is_not_fitted(tmp_path, options):
    run = trainer(tmp_path, rows_with_a_good_teacher(), loss=pile_fast.PILELoss(reduction="none", **options))
    run.train()
    assert not run.loss.fitted and run.teacher_weights() is None
    run.save_model(tmp_path / "student")
    assert not (tmp_path / "student/teacher_weights.json").exists()


def test_no_labels_leave_the_mean_and_a_warning(tmp_path):
    with pytest.warns(UserWarning, match="no query has two documents whose labels differ"):
        run = trainer(tmp_path, rows_with_a_good_teacher(8, unlabelled=8))
        run.train()
    assert run.loss.fitted and run.teacher_weights().weights == {"bad": 0.5, "good": 0.5}
    assert run.teacher_weights().labelled_queries == 0


def test_evaluation_uses_the_weights_and_leaves_them(tmp_path):
    rows, other = rows_with_a_good_teacher(), feature_rows(9, names=("bad", "good"), seed=3)
    run = trainer(tmp_path, rows, other)
    first = run.evaluate()["eval_loss"]  # as training will: the loss is fitted to the training rows here already
    state = {name: value.clone() for name, value in run.loss.state_dict().items()}
    targets = pack_targets(other)
    with torch.no_grad():
        logits = run.model(torch.tensor([x for row in other for x in row["features"]]))
    losses = pile_fast.pile_loss(
        logits, targets["teacher_logits"], targets["labels"], cu_seqlens=targets["cu_seqlens"], prior=run.loss.weights,
        iterations=0, reduction="none",
    )  # fmt: skip
    assert first == pytest.approx(losses.mean().item(), rel=1e-5)
    run.train()
    run.evaluate()
    assert all(torch.equal(value, state[name]) for name, value in run.loss.state_dict().items())


def test_the_weights_are_saved_beside_the_student(tmp_path):
    run = trainer(tmp_path, rows_with_a_good_teacher(unlabelled=4), save_strategy="steps", save_steps=2)
    run.train()
    run.save_model(str(tmp_path / "student"))
    for folder in ("student", "checkpoint-2"):
        saved = TeacherWeights.load(tmp_path / folder / "teacher_weights.json")
        assert list(saved.weights) == ["bad", "good"] and saved.labelled_queries == 36
        assert torch.equal(torch.tensor([*saved.weights.values()]), run.loss.weights)
        assert saved.options["granularity"] == "shared" and saved.pile_fast == pile_fast.__version__
        assert saved == run.teacher_weights()
    assert "good" in json.loads((tmp_path / "student/teacher_weights.json").read_text())["weights"]


# -- steps in training


class Seen(TrainerCallback):
    def __init__(self, loss):
        self.loss, self.weights = loss, []

    def on_step_end(self, *args, **kwargs):
        self.weights.append(self.loss.weights.tolist())


@pytest.mark.parametrize("accumulated", [1, 2])
def test_a_stream_takes_a_step_of_the_weights_with_each_of_its_own(tmp_path, accumulated):
    rows = rows_with_a_good_teacher(16)
    loss, other = (pile_fast.PILELoss(reduction="none") for _ in range(2))
    seen = Seen(loss)
    options = {"per_device_train_batch_size": 4 // accumulated, "gradient_accumulation_steps": accumulated}
    run = trainer(tmp_path, Stream(rows), loss=loss, callbacks=[seen], max_steps=10, **options)
    run.train()
    for step in range(10):  # two and a half passes
        other.set_epoch(step // 4)
        targets = pack_targets(rows[4 * (step % 4) : 4 * (step % 4) + 4])
        logits = torch.zeros(len(targets["labels"]), requires_grad=True)
        other(logits, targets["teacher_logits"], targets["labels"], cu_seqlens=targets["cu_seqlens"])
        assert seen.weights[step] == pytest.approx(other.weights.tolist(), abs=1e-5)
    assert loss.labelled_queries == 16 and not loss.fitted and seen.weights[-1][1] > seen.weights[0][1] > 0.5
    assert run.teacher_weights().weights["good"] == seen.weights[-1][1]


class Stop(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 5:
            raise KeyboardInterrupt


@pytest.mark.parametrize("form", [list, Stream])
def test_resumed_training_goes_on_with_the_same_weights(tmp_path, form):
    rows = rows_with_a_good_teacher(16)
    options = {"max_steps": 8, "save_strategy": "steps", "save_steps": 2}
    whole = trainer(tmp_path / "whole", form(rows), **options)
    whole.train()
    with pytest.raises(KeyboardInterrupt):
        trainer(tmp_path, form(rows), callbacks=[Stop()], **options).train()
    resumed = trainer(tmp_path, form(rows), **options)
    resumed.train(resume_from_checkpoint=True)
    assert all(torch.equal(value, whole.loss.state_dict()[name]) for name, value in resumed.loss.state_dict().items())
    assert torch.equal(weights(resumed.model), weights(whole.model))
    (tmp_path / "checkpoint-4/pile_loss.pt").unlink()  # one of an older version: a list is fitted on again
    if form is list:
        again = trainer(tmp_path, rows, **options)
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
        assert torch.equal(again.loss.weights, whole.loss.weights)


# -- a Trainer of one's own


def test_an_own_trainer_s_loss_is_fitted_by_its_attribute(tmp_path):
    rows = rows_with_a_good_teacher(12)
    compute_loss = pile_compute_loss_func(alpha=0.5)
    compute_loss.loss.fit(torch.utils.data.DataLoader(rows, 4, collate_fn=FeatureCollator()))
    before = compute_loss.loss.weights.clone()
    run = own(tmp_path, student(), FeatureCollator(), rows, rows, compute_loss)
    run.train()
    ours = trainer(tmp_path, rows, loss=pile_fast.PILELoss(alpha=0.5, reduction="none"))
    ours.train()
    assert torch.equal(weights(run.model), weights(ours.model))
    assert torch.equal(compute_loss.loss.weights, before) and before[1] > 0.7


def test_an_own_trainer_s_evaluation_changes_no_weights(tmp_path):
    rows = rows_with_a_good_teacher(12)
    compute_loss = pile_compute_loss_func(accumulation_steps=1)
    run = own(tmp_path, student(), FeatureCollator(), rows, rows, compute_loss)
    run.train()
    state = {name: value.clone() for name, value in compute_loss.loss.state_dict().items()}
    assert state["weights"][1] > state["weights"][0] and state["labelled_queries"] == 12
    run.evaluate()
    assert all(torch.equal(value, state[name]) for name, value in compute_loss.loss.state_dict().items())


# -- few labels


def test_the_label_term_counts_by_the_share_of_labelled_queries(tmp_path):
    """The mean loss over all queries is alpha · mean D + (1 − alpha) · (labelled / all) · mean R over the labelled."""
    lists = make_synthetic(40, documents=(3, 8), num_features=4)
    labels = lists.labels.clone()
    labels[: int(lists.cu_seqlens[30])] = torch.nan
    lists = dataclasses.replace(lists, labels=labels)
    alpha, layout = 0.7, {"cu_seqlens": lists.cu_seqlens, "reduction": "none"}
    loss = pile_fast.PILELoss(alpha=alpha, reduction="none")
    run = PileTrainer(
        student(4), arguments(tmp_path, max_steps=1, per_device_train_batch_size=40), train_dataset=lists, loss=loss
    )
    with torch.no_grad():
        logits = run.model(lists.features)
    run.train()
    prior = run.loss.weights
    distilled = pile_fast.pile_loss(logits, lists.teacher_logits, labels, prior=prior, iterations=0, **layout).mean()
    ranked = pile_fast.ranking_loss(logits, labels, **layout)
    counts = ranked > 0
    share = counts.sum().item() / 40
    assert 0 < share <= 0.25
    wanted = alpha * distilled + (1 - alpha) * share * ranked[counts].mean()
    assert run.state.log_history[0]["loss"] == pytest.approx(wanted.item(), abs=1e-4)
