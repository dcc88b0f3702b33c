"""Trained students opened by sentence-transformers (C7): the same embeddings, the same logits."""

import numpy as np
import pytest
import torch
from transformers import TrainingArguments

from pile_fast.students import load_ranker
from pile_fast.students.ranker import load_cross_encoder
from pile_fast.trainer import PileTrainer

pytest.importorskip(
    "sentence_transformers", reason="needs sentence-transformers: pip install 'pile_fast[sentence-transformers]'"
)

from sentence_transformers import CrossEncoder, SentenceTransformer  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")


def train(model, tokenizer, rows, folder):
    """A student folder as `PileTrainer` saves it."""
    args = TrainingArguments(
        str(folder / "run"), max_steps=2, per_device_train_batch_size=2, report_to="none", use_cpu=True, disable_tqdm=True,
        save_strategy="no", learning_rate=1e-3,
    )  # fmt: skip
    trainer = PileTrainer(model, args, train_dataset=rows, processing_class=tokenizer)
    trainer.train()
    trainer.save_model(str(folder / "student"))
    return folder / "student"


@pytest.mark.parametrize("pooling, similarity", [("mean", "cosine"), ("cls", "dot")])
def test_bi_encoder_is_a_sentence_transformers_folder(
    tmp_path, pooling, similarity, tiny_text_model, tiny_tokenizer, text_rows
):
    rows = text_rows(6)
    model = tiny_text_model("bi-encoder", pooling=pooling, similarity=similarity, scale=5.0)
    folder = train(model, tiny_tokenizer, rows, tmp_path)
    other = SentenceTransformer(str(folder), device="cpu")
    assert other.similarity_fn_name == similarity and other.max_seq_length == tiny_tokenizer.model_max_length
    texts = [text for row in rows for text in row["documents"]]
    tokens = tiny_tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
    embeddings = model.eval()(**{name: tokens[name] for name in ("input_ids", "attention_mask", "token_type_ids")}).detach()
    torch.testing.assert_close(other.encode(texts, convert_to_tensor=True), embeddings, rtol=1e-5, atol=1e-6)
    own = load_ranker(folder)
    assert own.kind == "bi-encoder" and own.model.config.scale == 5.0
    for row, scores in zip(rows, own.score(rows), strict=True):
        similarities = other.similarity(other.encode([row["query"]]), other.encode(row["documents"]))[0]
        torch.testing.assert_close(5.0 * similarities, scores, rtol=1e-4, atol=1e-4)
    other.save(str(tmp_path / "again"))  # and back
    assert load_ranker(tmp_path / "again").score(rows[:1])[0].tolist() == pytest.approx(own.score(rows[:1])[0].tolist())


@pytest.mark.parametrize("loaded", [True, False])
def test_cross_encoder_predicts_the_logits(tmp_path, loaded, tiny_text_model, tiny_tokenizer, text_rows):
    rows = text_rows(6)
    model = tiny_text_model("cross-encoder")
    if loaded:  # as the command does; the folder asks for a sigmoid
        model.config.sentence_transformers = {"activation_fn": "torch.nn.modules.activation.Sigmoid"}
        model.save_pretrained(tmp_path / "start")
        model = load_cross_encoder(str(tmp_path / "start"), trained=False)
    folder = train(model, tiny_tokenizer, rows, tmp_path)
    other = CrossEncoder(str(folder), device="cpu")
    for row, scores in zip(rows, load_ranker(folder).score(rows), strict=True):
        predicted = other.predict([(row["query"], document) for document in row["documents"]])
        np.testing.assert_allclose(predicted, scores.numpy(), rtol=1e-4, atol=1e-5)
