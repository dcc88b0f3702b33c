"""Training stops before numbers that are not finite do harm (A4, A5), and only then."""

import json
import math

import datasets
import numpy as np
import pytest
import torch
from transformers import Trainer, TrainingArguments

import pile_fast
from pile_fast.data.collator import FeatureCollator
from pile_fast.students import FeatureRanker, FeatureRankerConfig
from pile_fast.trainer import PileTrainer, last_checkpoint, pile_compute_loss_func

pytestmark = pytest.mark.usefixtures("one_thread")


def feature_rows(queries=24, teachers=2):
    random = np.random.default_rng(0)
    return [
        {"query_id": f"q{q}", "features": random.normal(size=(4, 3)).tolist(), "labels": [2, 0, 1, 0],
         "teacher_logits": random.normal(size=(4, teachers)).tolist(), "teachers": [f"t{m}" for m in range(teachers)]}
        for q in range(queries)
    ]  # fmt: skip


def poisoned(query=17):
    rows = feature_rows()
    rows[query]["features"][2][1] = math.nan
    return rows


def student(seed=0):
    torch.manual_seed(seed)
    return FeatureRanker(FeatureRankerConfig(num_features=3, hidden_sizes=(8,), dropout=0.0))


def arguments(folder, **options):
    options = {
        "per_device_train_batch_size": 4, "max_steps": 12, "save_strategy": "steps", "save_steps": 1, "logging_steps": 1,
        "report_to": "none", "disable_tqdm": True, "use_cpu": True, "train_sampling_strategy": "sequential",
    } | options  # fmt: skip
    return TrainingArguments(str(folder), **options)


def trainer(folder, rows, model=None, loss=None, passes=None, **options):
    return PileTrainer(
        model or student(), arguments(folder, **options), train_dataset=rows, loss=loss, max_documents_per_batch=passes
    )


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


class Stream(torch.utils.data.IterableDataset):
    def __init__(self, rows):
        self.rows = rows

    def __iter__(self):
        return iter(self.rows)


# q17 is in the fifth batch of four queries.
@pytest.mark.parametrize(
    "options, step",
    [
        ({}, 5),
        ({"max_grad_norm": 0.0}, 5),
        ({"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}, 5),
        ({"bf16": True}, 5),
        ({"passes": 3}, 5),
        ({"stream": True}, 5),
        ({"per_device_train_batch_size": 24, "save_steps": 2}, 1),
    ],
    ids=str,
)
def test_a_query_whose_loss_is_not_finite_is_named_and_nothing_is_kept_of_it(tmp_path, options, step):
    rows = Stream(poisoned()) if options.pop("stream", False) else poisoned()
    run = trainer(tmp_path, rows, **options)
    message = rf"^step {step}: the loss is not finite for query 'q17'; the student's logits are not finite there$"
    with pytest.raises(FloatingPointError, match=message):
        run.train()
    assert weights(run.model).isfinite().all()
    kept = last_checkpoint(tmp_path)
    assert kept == (str(tmp_path / f"checkpoint-{step - 1}") if step > 1 else None)
    if kept:
        assert torch.equal(weights(FeatureRanker.from_pretrained(kept)), weights(run.model))


# The labels of A4, and a loss of one's own: the logits are fine, the loss is not.
def test_a_loss_of_one_s_own_that_is_not_finite(tmp_path):
    def loss(logits, teachers, labels, cu_seqlens):
        losses = pile_fast.pile_loss(logits, teachers, labels, cu_seqlens=cu_seqlens, reduction="none")
        return torch.where(torch.arange(len(losses)) == 2, torch.inf, losses)

    with pytest.raises(FloatingPointError, match=r"^step 1: the loss is not finite for query 'q2'$"):
        trainer(tmp_path, feature_rows(), loss=loss).train()


def test_resumes_after_the_stop_once_the_rows_are_mended(tmp_path):
    with pytest.raises(FloatingPointError):
        trainer(tmp_path, poisoned()).train()
    run = trainer(tmp_path, feature_rows())
    run.train(resume_from_checkpoint=True)
    whole = trainer(tmp_path / "whole", feature_rows())
    whole.train()
    assert run.state.global_step == 12 and torch.equal(weights(run.model), weights(whole.model))


def break_gradients(model, value, times=10**9):
    left = [times]

    def spoil(gradient):
        left[0] -= 1
        return torch.full_like(gradient, value) if left[0] >= 0 else gradient

    model.layers[0].weight.register_hook(spoil)
    return model


@pytest.mark.parametrize("norm", [0.0, 1.0])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite(tmp_path, value, norm):
    run = trainer(tmp_path, feature_rows(), break_gradients(student(), value), max_grad_norm=norm)
    message = r"^step 1: the gradient of layers.0.weight is not finite; the step's queries: 'q0', 'q1', 'q2', 'q3'$"
    with pytest.raises(FloatingPointError, match=message):
        run.train()
    assert torch.equal(weights(run.model), weights(student()))


# Its squares overflow, so the Trainer's norm of it does: clipping would leave 0 of it, and no clipping NaN.
@pytest.mark.parametrize("norm", [0.0, 1.0])
def test_a_gradient_whose_norm_is_not_finite(tmp_path, norm):
    run = trainer(tmp_path, feature_rows(), break_gradients(student(), 1e25), max_grad_norm=norm)
    message = r"^step 1: the gradient is so large that its norm is not finite; the step's queries: 'q0', 'q1', 'q2', 'q3'$"
    with pytest.raises(FloatingPointError, match=message):
        run.train()


def scaled(run):
    """As on a GPU: on a CPU accelerate has no scaler of the loss."""
    run.accelerator.scaler, run.accelerator.native_amp = torch.amp.GradScaler("cpu"), True
    return run


# In float16 a gradient that overflows skips a step; only one that does so at any scale is an error.
def test_float16_overflow_is_no_error_unless_it_never_ends(tmp_path):
    run = scaled(trainer(tmp_path, feature_rows(), break_gradients(student(), math.inf, times=2), fp16=True))
    run.train()
    assert run.accelerator.scaler.get_scale() == 2.0**14 and run.state.global_step == 12
    assert weights(run.model).isfinite().all() and not torch.equal(weights(run.model), weights(student()))
    spoiled = break_gradients(student(), math.nan)
    endless = scaled(trainer(tmp_path / "endless", feature_rows(), spoiled, fp16=True, max_steps=60, save_strategy="no"))
    with pytest.raises(FloatingPointError, match=r"^step 31: the gradients are not finite in float16, however the loss is sca"):
        endless.train()
    assert torch.equal(weights(endless.model), weights(student()))
    with pytest.raises(FloatingPointError, match=r"^step 5: the loss is not finite for query 'q17'"):
        scaled(trainer(tmp_path / "rows", poisoned(), fp16=True)).train()


# The step itself overflows: there is no next loss that would tell.
@pytest.mark.parametrize("save", ["steps", "no"])
def test_a_model_that_its_last_step_broke_is_not_saved(tmp_path, save):
    options = {"learning_rate": 1e38, "optim": "sgd", "max_steps": 1, "lr_scheduler_type": "constant", "max_grad_norm": 0.0}
    rows = [row | {"features": [[1e4 * x for x in xs] for xs in row["features"]]} for row in feature_rows()]
    run = trainer(tmp_path, rows, **options, save_strategy=save)
    with pytest.raises(
        FloatingPointError, match=r"^step 1: the weight of layers.* is not finite after it; its queries: 'q0', "
    ):
        run.train()
    assert not list(tmp_path.glob("checkpoint-*"))
    with pytest.raises(FloatingPointError):
        run.save_model(tmp_path / "student")
    assert not (tmp_path / "student").exists()


@pytest.mark.parametrize("form, value", [(list, math.inf), (list, 1e39), (datasets.Dataset.from_list, -math.inf)])
def test_infinite_teacher_logits_count_as_missing_with_one_warning(tmp_path, form, value):
    rows, missing = feature_rows(), feature_rows()
    for query, document, teacher in ((3, 1, 0), (9, 0, 1)):
        rows[query]["teacher_logits"][document][teacher] = value
        missing[query]["teacher_logits"][document][teacher] = None
    run = trainer(tmp_path, form(rows), save_strategy="no")
    with pytest.warns(UserWarning) as warned:
        run.train()
    said = [str(warning.message) for warning in warned if "infinite" in str(warning.message)]
    assert said == [
        "teacher_logits: teacher 't0' gives document 2 of query 'q3' an infinite logit, which counts as missing; shown once"
    ]
    expected = trainer(tmp_path, missing, save_strategy="no")
    expected.train()
    assert torch.equal(weights(run.model), weights(expected.model))
    assert not torch.equal(weights(run.model), weights(student()))


def test_a_trainer_of_one_s_own_stops_and_warns_too(tmp_path):
    def own(rows):
        settings = arguments(tmp_path, remove_unused_columns=False, save_strategy="no")
        return Trainer(student(), settings, FeatureCollator(), train_dataset=rows, compute_loss_func=pile_compute_loss_func())

    with pytest.raises(FloatingPointError, match=r"^the loss is not finite for queries 'q17'$"):
        own(poisoned()).train()
    rows = feature_rows()
    rows[3]["teacher_logits"][1][0] = math.inf
    with pytest.warns(UserWarning, match="teacher 't0' gives document 2 of query 'q3' an infinite logit"):
        own(rows).train()


def test_rows_without_a_pair_are_said_once_and_named(tmp_path):
    rows = [
        {name: value[:1] if name not in ("query_id", "teachers") else value for name, value in row.items()}
        for row in feature_rows(8)
    ]
    with pytest.warns(UserWarning) as warned:
        trainer(tmp_path, rows, save_strategy="no").train()
    said = [str(warning.message) for warning in warned if "step" in str(warning.message)]
    assert len(said) == 1 and said[0].startswith("step 1: the loss of all its queries is 0 ('q0', 'q1', 'q2', 'q3'): none has")


def test_names_are_cut_short_where_there_are_many(tmp_path):
    rows = [row | {"features": [[math.nan] * 3] * 4} for row in feature_rows(9)]
    with pytest.raises(FloatingPointError, match=r"for queries 'q0', 'q1', 'q2', 'q3', 'q4' and 4 more; the student's"):
        trainer(tmp_path, rows, per_device_train_batch_size=9).train()
    for row in rows:  # without a name: the place in the batch
        del row["query_id"]
    with pytest.raises(FloatingPointError, match=r"for queries 1 of the batch, 2 of the batch, 3 of"):
        trainer(tmp_path, rows, per_device_train_batch_size=9).train()


def test_a_nan_logit_in_evaluation_is_named(tmp_path):
    run = PileTrainer(student(), arguments(tmp_path), eval_dataset=poisoned())
    with pytest.raises(FloatingPointError, match=r"^evaluation: the student's logits are NaN for queries 'q17'$"):
        run.evaluate()


# B2's labels, A4's weights: 2^(y - y_max) needs no more than float32.
def test_large_and_negative_labels_train_and_evaluate(tmp_path):
    rows = [row | {"labels": [1024, -2, 3, 2000]} for row in feature_rows(8)]
    loss = pile_fast.PILELoss(alpha=0.5, reduction="none")
    run = PileTrainer(student(), arguments(tmp_path, max_steps=2), train_dataset=rows, eval_dataset=rows, loss=loss)
    run.train()
    metrics = run.evaluate()
    assert all(math.isfinite(metrics[f"eval_{name}"]) for name in ("loss", "ndcg@10", "mrr", "map", "pnr"))
    json.dumps(metrics, allow_nan=False)
