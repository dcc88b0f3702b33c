"""Data sets of any kind, what does not fit known before the first step, Trainers of one's own (B3, B4, B11, B12, C4, C6)."""

import math

import datasets
import numpy as np
import pytest
import torch
from transformers import DefaultDataCollator, Trainer, TrainingArguments

import pile_fast
from pile_fast.data import RankedLists
from pile_fast.data.collator import BiEncoderCollator, CrossEncoderCollator, FeatureCollator
from pile_fast.students import FeatureRanker, FeatureRankerConfig
from pile_fast.trainer import PileTrainer, pile_compute_loss_func

pytestmark = pytest.mark.usefixtures("one_thread")


def feature_rows(queries=13, names=("good", "bad"), seed=0):
    random = np.random.default_rng(seed)
    sizes = random.integers(2, 6, queries)
    return [
        {"query_id": f"q{q}", "features": random.normal(size=(n, 3)).tolist(), "labels": [1, *[0] * (n - 1)],
         "teacher_logits": random.normal(size=(n, len(names))).tolist(), "teachers": list(names)}
        for q, n in enumerate(sizes)
    ]  # fmt: skip


def without(rows, *names):
    return [{name: value for name, value in row.items() if name not in names} for row in rows]


def student(features=3):
    torch.manual_seed(0)
    return FeatureRanker(FeatureRankerConfig(num_features=features, hidden_sizes=(4,), dropout=0.0))


def arguments(folder, **options):
    options = {
        "per_device_train_batch_size": 4, "per_device_eval_batch_size": 4, "max_steps": 3, "save_strategy": "no",
        "logging_steps": 1, "report_to": "none", "disable_tqdm": True, "use_cpu": True, "learning_rate": 0.1,
        "train_sampling_strategy": "sequential",
    } | options  # fmt: skip
    return TrainingArguments(str(folder), **options)


def trainer(folder, rows=None, evaluation=None, model=None, loss=None, collator=None, **options):
    return PileTrainer(
        model or student(), arguments(folder, **options), train_dataset=rows, eval_dataset=evaluation, loss=loss,
        data_collator=collator,
    )  # fmt: skip


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def trained(*args, **options):
    run = trainer(*args, **options)
    run.train()
    return weights(run.model)


class Stream(torch.utils.data.IterableDataset):
    def __init__(self, rows):
        self.rows = rows

    def __iter__(self):
        return iter(self.rows)


def of_datasets(rows):
    return datasets.Dataset.from_list(rows).to_iterable_dataset()


def generated(rows):
    return datasets.IterableDataset.from_generator(lambda: iter(rows))


STREAMS = [Stream, of_datasets, generated]


# B4: the rows as they come, the first not lost to the names of the teachers.
@pytest.mark.parametrize("stream", STREAMS)
def test_streams_train_and_evaluate_as_lists_do(tmp_path, stream):
    rows, evaluation = feature_rows(), feature_rows(7, seed=1)
    # Weights that all queries share would be learned in training, and beforehand from a list.
    loss = pile_fast.PILELoss(granularity="document", reduction="none")
    run = trainer(tmp_path, stream(rows), stream(evaluation), loss=loss, max_steps=6)
    run.train()
    other = trainer(tmp_path, rows, evaluation, loss=loss, max_steps=6)
    other.train()
    assert torch.equal(weights(run.model), weights(other.model))
    entries = [entry for entry in run.state.log_history if "loss" in entry]
    assert len(entries) == 6 and {"teacher_weight/good", "teacher_weight/bad"} <= entries[0].keys()
    metrics, expected = run.evaluate(), other.evaluate()
    for name in ("loss", "ndcg@10", "mrr", "map", "pnr"):
        assert metrics[f"eval_{name}"] == pytest.approx(expected[f"eval_{name}"], rel=1e-6)


class Sized(Stream):
    def __len__(self):
        return len(self.rows)


def test_a_stream_that_knows_its_length(tmp_path):
    rows = feature_rows(10)
    run = trainer(tmp_path, Sized(rows), Sized(rows), max_steps=-1, num_train_epochs=2)
    run.train()
    assert run.state.global_step == 6 and math.isfinite(run.evaluate()["eval_loss"])


def test_streams_that_end_within_a_step(tmp_path):
    options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    rows = feature_rows(10)  # the last two would be half a step: the next pass begins with a whole one
    streamed = trained(tmp_path, Stream(rows), max_steps=4, **options)
    assert torch.equal(streamed, trained(tmp_path, Stream(rows[:8]), max_steps=4, **options))
    with pytest.raises(ValueError, match="train_dataset: gave fewer rows than an optimiser step takes, which is 4"):
        trained(tmp_path, Stream(rows[:1]), **options)
    with pytest.raises(ValueError, match="train_dataset: gave fewer rows"):
        trained(tmp_path, Stream([]))
    with pytest.raises(ValueError, match="max_steps has to be specified|max_steps must be set"):
        trained(tmp_path, Stream(rows), max_steps=-1)


@pytest.mark.parametrize("empty", [list, datasets.Dataset.from_list])
def test_empty_data_sets(tmp_path, empty):
    with pytest.raises(ValueError, match="^train_dataset: no rows"):
        trained(tmp_path, empty([]))
    with pytest.raises(ValueError, match="^eval_dataset 'b': no rows"):
        trained(tmp_path, feature_rows(), {"a": feature_rows(), "b": empty([])})


# B12
@pytest.mark.parametrize("format", ["numpy", "torch"])
def test_a_dataset_s_format_changes_no_step(tmp_path, format):
    rows = datasets.Dataset.from_list(feature_rows())
    assert torch.equal(trained(tmp_path, rows.with_format(format)), trained(tmp_path, rows))


# C6: matched by name, in training and in evaluation.
def test_teachers_are_matched_by_name(tmp_path):
    rows = feature_rows()
    swapped = [
        row | {"teachers": row["teachers"][::-1], "teacher_logits": [scores[::-1] for scores in row["teacher_logits"]]}
        for row in rows
    ]
    loss = pile_fast.PILELoss(prior=torch.tensor([3.0, 1.0]), reduction="none")
    mixed = rows[:4] + swapped[4:6] + rows[6:8] + swapped[8:]
    run, other = trainer(tmp_path, mixed, swapped, loss=loss), trainer(tmp_path, rows, rows, loss=loss)
    assert run.evaluate()["eval_loss"] == other.evaluate()["eval_loss"]
    for one in (run, other):
        one.train()
    assert torch.equal(weights(run.model), weights(other.model))
    assert run.evaluate()["eval_loss"] == other.evaluate()["eval_loss"]
    with pytest.raises(ValueError, match="query 'q0' of the evaluation rows: teachers: no 'bad', which the training data has"):
        trained(tmp_path, rows, feature_rows(names=("good", "ugly")))
    with pytest.raises(ValueError, match="query 'q4': teachers: no 'bad', which query 'q0' has; got 'good', 'ugly'"):
        trained(tmp_path, rows[:4] + feature_rows(names=("good", "ugly"))[4:])


class Counting(FeatureRanker):
    calls = 0

    def forward(self, features, labels=None):
        self.calls += 1
        return super().forward(features, labels)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda row: row | {"features": [xs[:2] for xs in row["features"]]}, "features: expected 3 per document as in the tr"),
        (lambda row: row | {"teacher_logits": [s[:1] for s in row["teacher_logits"]], "teachers": ["good"]},
         "teachers: no 'bad'"),
        (lambda row: row | {"teacher_logits": [s[:1] for s in row["teacher_logits"]], "teachers": None},
         "teacher_logits: expected 2 teachers as in the training rows, got 1"),
        (lambda row: without([row], "features")[0], "no 'features'"),
    ],
)  # fmt: skip
def test_evaluation_rows_that_do_not_fit_are_known_before_the_first_step(tmp_path, change, message):
    model = Counting(FeatureRankerConfig(num_features=3))
    with pytest.raises(ValueError, match=message):
        trained(tmp_path, feature_rows(), list(map(change, feature_rows(3))), model=model)
    assert model.calls == 0


@pytest.mark.parametrize("lists", [list, RankedLists.from_rows])
def test_evaluation_needs_no_teachers(tmp_path, lists):
    rows = without(feature_rows(7), "teacher_logits", "teachers")
    run = trainer(tmp_path, lists(feature_rows()), lists(rows), eval_strategy="steps", eval_steps=1)
    with pytest.warns(UserWarning) as warned:
        run.train()
        metrics = run.evaluate()
    assert sum("the rows have no teachers, so there is no loss" in str(warning.message) for warning in warned) == 1
    assert "eval_loss" not in metrics
    full = trainer(tmp_path, feature_rows(), feature_rows(7), model=run.model).evaluate()
    assert all(metrics[f"eval_{name}"] == full[f"eval_{name}"] for name in ("ndcg@10", "mrr", "map", "pnr"))


def best(**options):
    return {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1,
            "load_best_model_at_end": True} | options  # fmt: skip


def test_best_model_by_a_metric_that_there_is_not(tmp_path):
    bare = without(feature_rows(7), "teacher_logits", "teachers")
    with pytest.raises(ValueError, match="metric_for_best_model: 'loss' needs teachers in the rows of evaluation"):
        trained(tmp_path, feature_rows(), bare, **best())
    with pytest.raises(ValueError, match="metric_for_best_model: expected one of loss, map, mrr, ndcg@10, pnr, got 'ndcg@5'"):
        trained(tmp_path, feature_rows(), bare, **best(metric_for_best_model="ndcg@5"))
    for name in ("ndcg@10", "eval_map"):
        trained(tmp_path / name, feature_rows(), bare, **best(metric_for_best_model=name, greater_is_better=True))
    two = {"a": bare, "b": feature_rows(7)}
    trained(tmp_path / "two", feature_rows(), two, **best(metric_for_best_model="b_mrr"))


@pytest.mark.parametrize("form", [list, datasets.Dataset.from_list, RankedLists.from_rows])
def test_nothing_to_learn_from_is_known_before_the_first_step(tmp_path, form):
    bare = without(feature_rows(), "teacher_logits", "teachers")
    with pytest.raises(
        ValueError, match="^teacher_logits: expected at least one teacher in the training rows, got none for que"
    ):
        trained(tmp_path, form(bare))
    labels = pile_fast.PILELoss(alpha=0.0, reduction="none")
    for rows in (without(feature_rows(), "labels"), [row | {"labels": [None] * len(row["labels"])} for row in feature_rows()]):
        with pytest.raises(ValueError, match="^labels: with alpha=0 they are all there is to learn from, and no training row"):
            trained(tmp_path, form(rows), loss=labels)
    trained(tmp_path, form(bare), loss=labels)


def test_lists_of_one_and_of_ten_thousand_documents_and_names_that_come_twice(tmp_path):
    random = np.random.default_rng(0)
    rows = [
        {"query_id": "same", "features": random.normal(size=(n, 3)), "labels": random.integers(0, 3, n),
         "teacher_logits": random.normal(size=(n, 2))}
        for n in (1, 10_000, 2)
    ]  # fmt: skip
    run = trainer(tmp_path, rows, rows, max_steps=2)
    run.train()
    assert weights(run.model).isfinite().all() and not torch.equal(weights(run.model), weights(student()))
    assert math.isfinite(run.evaluate()["eval_ndcg@10"])


# B12: the Trainer's other ways to hand predictions to the metrics.
@pytest.mark.parametrize(
    "options", [{"eval_do_concat_batches": False}, {"batch_eval_metrics": True}, {"eval_accumulation_steps": 1}]
)
def test_metrics_however_the_predictions_come(tmp_path, options):
    expected = trainer(tmp_path, evaluation=feature_rows()).evaluate()
    run = trainer(tmp_path, evaluation=feature_rows(), **options)
    for _ in range(2):
        metrics = run.evaluate()
        assert {n: metrics[f"eval_{n}"] for n in ("ndcg@10", "mrr", "map", "pnr", "loss")} == pytest.approx(
            {n: expected[f"eval_{n}"] for n in ("ndcg@10", "mrr", "map", "pnr", "loss")}
        )


def own(folder, model, collator, rows, evaluation=None, loss=None, **options):
    """A plain Trainer by the recipe of docs/training.md."""
    options = {"remove_unused_columns": False, "prediction_loss_only": True} | options
    return Trainer(
        model, arguments(folder, **options), collator, train_dataset=rows, eval_dataset=evaluation,
        compute_loss_func=loss or pile_compute_loss_func(alpha=0.5),
    )  # fmt: skip


# B11
@pytest.mark.parametrize("kind", ["features", "cross-encoder", "bi-encoder"])
@pytest.mark.parametrize("names", [{}, {"label_names": ["labels"]}])
def test_a_plain_trainer_evaluates_every_student(tmp_path, kind, names, tiny_text_model, tiny_tokenizer, text_rows):
    rows = feature_rows() if kind == "features" else text_rows(9)
    model = student() if kind == "features" else tiny_text_model(kind)
    collator = {"features": lambda _: FeatureCollator(), "bi-encoder": BiEncoderCollator, "cross-encoder": CrossEncoderCollator}
    compute_loss = pile_compute_loss_func(alpha=0.5)
    compute_loss.loss.fit([collator[kind](tiny_tokenizer)(rows)])
    run = own(tmp_path, model, collator[kind](tiny_tokenizer), rows, rows, compute_loss, **names)
    run.train()
    assert math.isfinite(run.evaluate()["eval_loss"])
    tokenizer = None if kind == "features" else tiny_tokenizer
    ours = PileTrainer(
        model, arguments(tmp_path), train_dataset=rows, eval_dataset=rows, processing_class=tokenizer,
        loss=pile_fast.PILELoss(alpha=0.5, reduction="none"),
    )  # fmt: skip
    assert run.evaluate()["eval_loss"] == pytest.approx(ours.evaluate()["eval_loss"], rel=1e-5)


def test_students_given_labels_without_a_loss_say_so(tmp_path, tiny_text_model, tiny_tokenizer, text_rows):
    for model, collator, rows in (
        (student(), FeatureCollator(), feature_rows()),
        (tiny_text_model("bi-encoder"), BiEncoderCollator(tiny_tokenizer), text_rows(5)),
    ):
        run = Trainer(model, arguments(tmp_path, remove_unused_columns=False), collator, train_dataset=rows)
        with pytest.raises(ValueError, match="^labels: a student gives logits and has no loss of its own; use .*PileTrainer"):
            run.train()


# C4
def test_a_trainer_s_mistakes_say_what_to_do(tmp_path, tiny_text_model, tiny_tokenizer, text_rows):
    columns = "remove_unused_columns=False"
    model, texts = tiny_text_model("cross-encoder"), CrossEncoderCollator(tiny_tokenizer)
    for rows in (text_rows(5), datasets.Dataset.from_list(text_rows(5))):
        with pytest.raises(ValueError, match=f"no 'documents', which this student needs; the row has .*{columns}"):
            own(tmp_path, model, texts, rows, remove_unused_columns=True).train()
    with pytest.raises(ValueError, match=f"teacher_logits: expected at least one teacher, as alpha is 0.5, .*{columns}"):
        own(tmp_path, student(), FeatureCollator(), feature_rows(), remove_unused_columns=True).train()
    foreign = [{"features": [0.0, 1.0, 2.0], "labels": 1.0}] * 8
    wanted = r"labels: expected the RankingTargets that a collator of pile_fast.data.collator makes, got a tensor "
    with pytest.raises(ValueError, match=wanted):
        own(tmp_path, student(), DefaultDataCollator(), foreign).train()
    with pytest.raises(ValueError, match=wanted):
        trained(tmp_path, foreign, collator=DefaultDataCollator())
    with pytest.raises(ValueError, match="labels: expected the RankingTargets .*, got NoneType"):
        own(tmp_path, student(), DefaultDataCollator(), without(foreign, "labels")).train()
    for rows, collator in ((feature_rows(), FeatureCollator()), (foreign, DefaultDataCollator())):
        with pytest.raises(TypeError, match=r"^PILELoss: expected tensors; the compute_loss_func .*pile_compute_loss_func\("):
            own(tmp_path, student(), collator, rows, loss=pile_fast.PILELoss(alpha=0.5)).train()


# B3: 40 positions of which a RoBERTa's first two are the padding's; the tokenizer knows no limit.
def test_a_trainer_s_own_collator_cuts_texts_to_the_positions(tmp_path, tiny_tokenizer):
    from transformers import RobertaConfig, RobertaForSequenceClassification

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    model = RobertaForSequenceClassification(
        RobertaConfig(vocab_size=40, max_position_embeddings=40, pad_token_id=1, num_labels=1, **sizes)
    )
    rows = [
        {"query_id": "q", "query": "red", "documents": ["tree " * 60, "house"], "labels": [1, 0], "teacher_logits": [[1], [0]]}
    ]
    tokenizer = type(tiny_tokenizer)(
        tokenizer_object=tiny_tokenizer.backend_tokenizer, pad_token="[UNK]", model_input_names=["input_ids", "attention_mask"]
    )
    run = PileTrainer(model, arguments(tmp_path, max_steps=1), processing_class=tokenizer, train_dataset=rows)
    assert run.data_collator.max_length == 38
    run.train()
