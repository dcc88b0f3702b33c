"""The loss in a real `SentenceTransformerTrainer`, on a random BERT of two tiny layers."""

import logging

import numpy as np
import pytest
import torch
from datasets import Dataset

import pile_fast

pytest.importorskip(
    "sentence_transformers", reason="needs sentence-transformers: pip install 'pile_fast[sentence-transformers]'"
)

from sentence_transformers import (  # noqa: E402
    CrossEncoder,
    CrossEncoderTrainer,
    CrossEncoderTrainingArguments,
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer.losses import MatryoshkaLoss, MultipleNegativesRankingLoss  # noqa: E402
from sentence_transformers.util import pairwise_dot_score  # noqa: E402

from pile_fast.integrations.sentence_transformers import BiEncoderPILELoss, PILELoss  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")
TEXTS = {
    "query": ["red apple", "blue river", "the old house", "a tree"],
    "positive": ["the red apple", "river runs blue", "house of old", "green tree"],
    "negative_1": ["a blue bank", "the small apple", "tall tree sleeps", "over river"],
    "negative_2": ["fast", "slow bank", "new apple", "under house"],
}
TEACHER = [[3.0, 1.0, 0.0], [1.0, 2.0, None], [2.0, 0.0, 1.0], [1.0, 0.0, 0.5]]
LABELS = [[2, 0, 1], [None, 1, 0], [None, None, None], [1, 1, 0]]
BOTH = [
    [[label, t, -2.0 * t if t else None] for label, t in zip(*pair, strict=True)] for pair in zip(LABELS, TEACHER, strict=True)
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("encoder")


@pytest.fixture
def model(folder, tiny_text_model, tiny_tokenizer):
    if not any(folder.iterdir()):
        tiny_text_model("encoder").save_pretrained(folder)
        tiny_tokenizer.save_pretrained(folder)
    return SentenceTransformer(str(folder), device="cpu")


def trainer(model, folder, rows, loss, **arguments):
    arguments = SentenceTransformerTrainingArguments(
        str(folder), per_device_train_batch_size=4, per_device_eval_batch_size=8, learning_rate=5e-3, report_to="none",
        use_cpu=True, disable_tqdm=True, save_strategy="no", **arguments,
    )  # fmt: skip
    rows = Dataset.from_dict(rows) if "query" in rows else rows
    return SentenceTransformerTrainer(model, arguments, train_dataset=rows, eval_dataset=rows, loss=loss)


def nan(values):
    return torch.tensor([[np.nan if value is None else value for value in row] for row in values])


def similarities(model, fct):
    queries, *documents = (model.encode(texts, convert_to_tensor=True) for texts in TEXTS.values())
    return torch.stack([fct(queries, own) for own in documents], 1)


@pytest.mark.parametrize(
    "labels, alpha, taken",
    [
        (TEACHER, 1.0, "teachers: one in column 'label', labels: 1 for column 'positive', 0 for the other documents"),
        (TEACHER, 0.4, "teachers: one in column 'label', labels: 1 for column 'positive', 0 for the other documents"),
        (LABELS, 0.0, "labels: column 'label', no teachers"),
        (BOTH, 0.4, "labels: the first number per document of column 'label', teachers: the other 2"),
        (None, 0.0, "labels: 1 for column 'positive', 0 for the other documents, no teachers"),
    ],
)
def test_is_the_loss_of_the_similarities(model, tmp_path, caplog, labels, alpha, taken):
    rows = TEXTS | ({} if labels is None else {"label": labels})
    with caplog.at_level(logging.INFO, "pile_fast"):
        loss = BiEncoderPILELoss(model, alpha=alpha)
        if alpha > 0:  # to the rows that `pile_loss` below is fitted to
            loss.fit(Dataset.from_dict(rows))
        found = trainer(model, tmp_path, rows, loss).evaluate()["eval_loss"]
    told = "query: column 'query', documents: column 'positive' to column 'negative_2', " + taken
    assert f"PILELoss: in the first batch, {told}." in caplog.messages
    first = torch.tensor([[1.0, 0.0, 0.0]] * 4)
    if labels is BOTH:
        both = torch.stack([nan(row) for row in BOTH])
        own, teachers = both[..., 0], both[..., 1:]
    else:
        own = nan(LABELS) if labels is LABELS else first
        teachers = nan(TEACHER if labels is TEACHER else [[None] * 3] * 4).unsqueeze(-1)
    wanted = pile_fast.pile_loss(20 * similarities(model, model.similarity_pairwise), teachers, own, alpha=alpha)
    assert found == pytest.approx(wanted.item(), rel=1e-4, abs=1e-5)


def test_similarity_and_scale(model, tmp_path):
    loss = BiEncoderPILELoss(model, similarity_fct=pairwise_dot_score, scale=0.5, prior=[2.0])
    found = trainer(model, tmp_path, TEXTS | {"scores": TEACHER}, loss).evaluate()["eval_loss"]
    wanted = pile_fast.pile_loss(0.5 * similarities(model, pairwise_dot_score), nan(TEACHER).unsqueeze(-1), torch.zeros(4, 3))
    assert found == pytest.approx(wanted.item(), rel=1e-4)
    config = loss.get_config_dict()
    assert (config["similarity_fct"], config["scale"], config["prior"]) == ("pairwise_dot_score", 0.5, [2.0])
    model.similarity_fn_name = "dot"
    assert BiEncoderPILELoss(model).similarity_fct(torch.ones(1, 2), torch.ones(1, 2)).item() == 2.0
    with pytest.raises(ValueError, match="scale: expected a number > 0"):
        BiEncoderPILELoss(model, scale=0.0)


@pytest.mark.parametrize("arguments", [{}, {"bf16": True}, {"gradient_checkpointing": True}])
def test_trains_in_the_librarys_trainer(model, tmp_path, arguments):
    rows = TEXTS | {"label": BOTH}
    run = trainer(model, tmp_path, rows, BiEncoderPILELoss(model, alpha=0.6), num_train_epochs=8, logging_steps=4, **arguments)
    run.train()
    losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    assert losses[-1] < 0.8 * losses[0]
    run.save_model(tmp_path / "saved")
    again = SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    tolerance = 0.1 if "bf16" in arguments else 1e-5  # the trained model stays in mixed precision
    np.testing.assert_allclose(again.encode(TEXTS["query"]), model.encode(TEXTS["query"]), rtol=tolerance, atol=tolerance)
    card = (tmp_path / "saved" / "README.md").read_text()
    assert "BiEncoderPILELoss" in card and '"alpha": 0.6' in card and "cai2022pile" in card


def test_in_other_losses_and_from_a_stream(model, tmp_path):
    stream = Dataset.from_dict(TEXTS | {"label": TEACHER}).to_iterable_dataset()
    matryoshka = MatryoshkaLoss(model, BiEncoderPILELoss(model, alpha=0.5), [32, 16])
    run = trainer(model, tmp_path, stream, matryoshka, max_steps=2)
    assert np.isfinite(run.train().training_loss)
    losses = {"one": BiEncoderPILELoss(model), "two": MultipleNegativesRankingLoss(model)}
    data = {"one": Dataset.from_dict(TEXTS | {"label": TEACHER}), "two": Dataset.from_dict(TEXTS)}
    assert np.isfinite(trainer(model, tmp_path, data, losses, max_steps=2).train().training_loss)


@pytest.mark.parametrize(
    "rows, message",
    [
        ({"query_id": list("abcd")} | TEXTS | {"label": [[*row, 0.0] for row in TEACHER]}, "column 'query_id': looks like"),
        (TEXTS | {"label": [1.0, 2.0, 3.0, 4.0]}, r"got one number per query \(column 'label'\)"),
        (TEXTS | {"label": [row[:2] for row in TEACHER]}, "labels: expected 3, .* not of differences, .* got 2"),
        (TEXTS | {"label": [[["high"]] * 3] * 4}, "labels: expected numbers or null, got 'high'"),
        (TEXTS | {"label": [[[1, 2.0], [1], [0, 1.0]]] * 4}, "equally many numbers .* .column 'label', row 0"),
        (TEXTS | {"label": [[1.0, float("inf"), 0.0]] * 4}, None),
        (TEXTS, "got no teacher at alpha=1"),
        ({"query": TEXTS["query"], "docs": list(zip(*list(TEXTS.values())[1:], strict=True)), "label": TEACHER},
         "column 'docs': expected a text, got a list; SentenceTransformerTrainer takes a text per column"),
        (TEXTS | {"teachers": TEACHER, "label": LABELS}, "column 'teachers': expected a text, got a list"),
        ({"query": TEXTS["query"], "positive": TEXTS["positive"], "label": [1.0] * 4}, "at least two columns of them"),
    ],
)  # fmt: skip
def test_rows_that_are_not_what_the_loss_takes(model, tmp_path, caplog, rows, message):
    run = trainer(model, tmp_path, rows, BiEncoderPILELoss(model))
    if message is None:
        run.evaluate()
        assert "PILELoss: teacher 1 gave an infinite logit for query 0 of the batch; it counts as missing." in caplog.messages
    else:
        with pytest.raises(ValueError, match=message):
            run.evaluate()


# C4: the class for one kind of model, given the other; the class for tensors, given columns.
def test_the_wrong_class_says_which_is_right(model, tmp_path, tiny_text_model, tiny_tokenizer):
    with pytest.raises(
        ValueError, match="expected a CrossEncoder, got a SentenceTransformer; for it there is BiEncoderPILELoss"
    ):
        PILELoss(model)
    tiny_text_model("cross-encoder").save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    other = CrossEncoder(str(tmp_path), device="cpu")
    with pytest.raises(ValueError, match="expected a SentenceTransformer, got a CrossEncoder; for it there is PILELoss"):
        BiEncoderPILELoss(other)
    wanted = (
        r"student_logits: expected a torch.Tensor, got .*; .* has PILELoss\(model, ...\) and BiEncoderPILELoss\(model, ...\)"
    )
    with pytest.raises(TypeError, match=wanted):
        trainer(model, tmp_path, TEXTS | {"label": [[1.0, 0.0, 0.0]] * 4}, pile_fast.PILELoss()).evaluate()
    arguments = CrossEncoderTrainingArguments(str(tmp_path), report_to="none", use_cpu=True, disable_tqdm=True)
    for rows in (TEXTS | {"label": [[1.0, 0.0, 0.0]] * 4}, TEXTS):
        run = CrossEncoderTrainer(other, arguments, eval_dataset=Dataset.from_dict(rows), loss=pile_fast.PILELoss())
        with pytest.raises(TypeError, match=wanted):
            run.evaluate()
