"""The Lightning-IR loss, against the installed Lightning-IR (`make test-lightning-ir` installs it)."""

import re
from pathlib import Path

import pandas
import pytest
import torch

import pile_fast

pytest.importorskip("lightning_ir", reason="needs lightning-ir: make test-lightning-ir")

import jsonargparse  # noqa: E402
from lightning import Trainer  # noqa: E402
from lightning_ir import CrossEncoderModule, CrossEncoderOutput, RunDataset, TrainBatch  # noqa: E402
from lightning_ir.loss import ScoringLossFunction  # noqa: E402
from lightning_ir.models import MonoConfig  # noqa: E402
from transformers import BertConfig, BertModel, BertTokenizer  # noqa: E402

from pile_fast.integrations.lightning_ir import PILELoss  # noqa: E402

B, N, M = 3, 5, 2
# Weights of each document's own: they need no `fit` to be compared with `pile_fast.pile_loss` on a batch.
OWN = {"granularity": "document"}
WORDS = "panda bamboo paris city grass france".split()
pytestmark = pytest.mark.usefixtures("one_thread")


def batch(targets):
    queries = [f"what is {word}" for word in WORDS[:B]]
    docs = [[f"{word} is {other}" for other in WORDS[:N]] for word in WORDS[:B]]
    return TrainBatch(queries=queries, docs=docs, query_ids=list("abc"), targets=targets)


@pytest.fixture
def parts():
    labels = torch.randint(0, 3, (B, N)).double()  # a run's columns arrive as float64
    labels[0, 1] = torch.nan
    return torch.randn(B, N, requires_grad=True), labels, torch.randn(B, N, M).double()


@pytest.mark.parametrize("column", [0, 1, -1])
@pytest.mark.parametrize("options", [OWN, {"alpha": 0.5, "granularity": "query", "prior": [1.0, 3.0]}])
def test_takes_labels_and_teachers_apart(parts, column, options):
    scores, labels, teachers = parts
    columns = list(teachers.unbind(-1))
    columns.insert(column % (M + 1), labels)
    targets = torch.stack(columns, -1)
    plain = {name: torch.tensor(value) if name == "prior" else value for name, value in options.items()}
    wanted = pile_fast.pile_loss(scores, teachers.float(), labels, **plain)
    loss = PILELoss(label_column=column, **options)
    got = loss.compute_loss(CrossEncoderOutput(scores=scores), batch(targets))
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, wanted)
    flat = loss.compute_loss(CrossEncoderOutput(scores=scores), batch(targets.flatten(0, 1)))  # as in its validation
    torch.testing.assert_close(flat, wanted)
    got.backward()
    assert scores.grad.abs().sum() > 0


def test_missing_value(parts):
    scores, labels, teachers = parts
    teachers[0, :2, 1] = torch.nan
    wanted = pile_fast.pile_loss(scores, teachers.float(), labels, **OWN)
    filled = torch.cat([labels.unsqueeze(-1), teachers.nan_to_num(0.0)], -1)
    output = CrossEncoderOutput(scores=scores)
    torch.testing.assert_close(PILELoss(missing_value=0.0, **OWN).compute_loss(output, batch(filled)), wanted)
    assert not torch.isclose(PILELoss(**OWN).compute_loss(output, batch(filled)), wanted)


def test_bad_targets(parts):
    scores, labels, teachers = parts
    output = CrossEncoderOutput(scores=scores)
    with pytest.raises(ValueError, match="got none"):
        PILELoss().compute_loss(output, batch(None))
    with pytest.raises(ValueError, match=r"targets: expected \(3, 5, K\).*got \(3, 5\)"):
        PILELoss().compute_loss(output, batch(labels))
    with pytest.raises(ValueError, match=r"got \(3, 4, 2\)"):
        PILELoss().compute_loss(output, batch(teachers[:, :4]))
    with pytest.raises(ValueError, match="label_column: expected one of 2 target columns, got 2"):
        PILELoss(label_column=2).compute_loss(output, batch(teachers))
    with pytest.raises(ValueError, match="reduction"):
        PILELoss(reduction="none")


# C3: each may be left out where the loss needs none.
def test_without_teachers_or_labels(parts):
    scores, labels, teachers = parts
    output = CrossEncoderOutput(scores=scores)
    missing = torch.full((B, N, 1), torch.nan)
    got = PILELoss(alpha=0.0).compute_loss(output, batch(labels.unsqueeze(-1)))
    torch.testing.assert_close(got, pile_fast.pile_loss(scores, missing, labels, alpha=0.0))
    wanted = pile_fast.pile_loss(scores, teachers.float(), torch.full((B, N), torch.nan))
    torch.testing.assert_close(PILELoss(label_column=None).compute_loss(output, batch(teachers)), wanted)
    one = pile_fast.pile_loss(scores, teachers[..., :1].float(), torch.full((B, N), torch.nan))
    torch.testing.assert_close(PILELoss(label_column=None).compute_loss(output, batch(teachers[..., :1])), one)
    with pytest.raises(ValueError, match="label_column: expected a number at alpha=0.5, got None"):
        PILELoss(label_column=None, alpha=0.5)


def test_infinite_logits_count_as_missing_and_are_told_of_once(parts, caplog):
    scores, labels, teachers = parts
    output, loss = CrossEncoderOutput(scores=scores), PILELoss(**OWN)
    teachers[1, 2, 0] = -torch.inf
    got = loss.compute_loss(output, batch(torch.cat([labels.unsqueeze(-1), teachers], -1)))
    loss.compute_loss(output, batch(torch.cat([labels.unsqueeze(-1), teachers], -1)))
    assert caplog.messages == ["PILELoss: teacher 1 gave an infinite logit for query 'b'; it counts as missing."]
    teachers[1, 2, 0] = torch.nan
    torch.testing.assert_close(got, pile_fast.pile_loss(scores, teachers.float(), labels, **OWN))


def test_targets_of_a_run_file(tmp_path):
    """Columns in the file's order, holes filled with 0: what the documentation says of `RunDataset`."""
    run = {
        "query_id": ["a", "a", "b", "b"], "doc_id": ["1", "2", "3", "4"], "rank": [1, 2, 1, 2], "query": ["x", "x", "y", "y"],
        "text": ["p", "q", "r", "s"], "label_score": [2.0, 1.0, 0.0, 1.0], "bm25_score": [12.0, 9.0, float("nan"), 1.0],
        "an_encoders_score": [4.1, 0.3, 1.0, 2.0],
    }  # fmt: skip
    pandas.DataFrame(run).to_parquet(tmp_path / "run.parquet")
    data = RunDataset(tmp_path / "run.parquet", targets="score", depth=2, sample_size=2)
    scores = torch.randn(2, 2)
    got = PILELoss(missing_value=0.0, **OWN).compute_loss(
        CrossEncoderOutput(scores=scores), batch(torch.stack([data[query].targets for query in range(2)]))
    )
    labels, bm25, encoder = (torch.tensor(run[name], dtype=torch.float32).view(2, 2) for name in list(run)[-3:])
    torch.testing.assert_close(got, pile_fast.pile_loss(scores, torch.stack([bm25, encoder], -1), labels, **OWN))


def test_weights_that_all_queries_share_are_fitted_to_the_batches(parts):
    scores, labels, teachers = parts
    batches = [batch(torch.cat([own.unsqueeze(-1), teachers], -1)) for own in (labels, labels.flip(1))]
    batches[1].targets = batches[1].targets.flatten(0, 1)  # as in its validation
    loss = PILELoss().fit(batches)
    wanted = pile_fast.PILELoss().fit([(teachers.float(), own) for own in (labels, labels.flip(1))])
    assert torch.equal(loss.loss.weights, wanted.weights) and loss.loss.fitted
    got = loss.compute_loss(CrossEncoderOutput(scores=scores), batches[0])
    torch.testing.assert_close(got, pile_fast.pile_loss(scores, teachers.float(), labels, prior=wanted.weights, iterations=0))
    assert torch.equal(loss.loss.weights, wanted.weights)


def test_without_fit_training_takes_steps_of_the_weights_and_validation_none(parts):
    scores, labels, teachers = parts
    targets = batch(torch.cat([labels.unsqueeze(-1), teachers], -1))
    loss = PILELoss()
    loss.compute_loss(CrossEncoderOutput(scores=scores), targets)
    weights = loss.loss.weights.clone()
    assert weights[0] != weights[1]
    loss.compute_loss(CrossEncoderOutput(scores=scores.detach()), targets)
    assert torch.equal(loss.loss.weights, weights)


def test_trains_a_cross_encoder(tmp_path, parts):
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "what", "is", *WORDS]) + "\n")
    BertTokenizer(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path)
    config = BertConfig(
        vocab_size=13, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=32, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, initializer_range=0.5,
    )  # fmt: skip
    BertModel(config).save_pretrained(tmp_path)
    _, labels, teachers = parts
    targets = torch.cat([labels.unsqueeze(-1), teachers], -1).flatten(0, 1)
    module = CrossEncoderModule(str(tmp_path), config=MonoConfig(), loss_functions=[(PILELoss(alpha=0.5), 2.0)])
    module.set_optimizer(torch.optim.AdamW, lr=5e-3)
    trainer = Trainer(max_epochs=12, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
                      enable_model_summary=False, default_root_dir=tmp_path)  # fmt: skip
    losses = []
    module.log = lambda name, value, **_: losses.append(value.item()) if name == "PILELoss" else None
    trainer.fit(module, torch.utils.data.DataLoader([batch(targets)], batch_size=None, collate_fn=lambda b: batch(targets)))
    assert len(losses) == 12 and losses[-1] < 0.8 * losses[0]


def test_can_be_named_in_a_configuration():
    parser = jsonargparse.ArgumentParser()
    parser.add_argument("--losses", type=list[ScoringLossFunction])
    named = {"class_path": "pile_fast.integrations.lightning_ir.PILELoss", "init_args": {"alpha": 0.7, "prior": [1.0, 2.0]}}
    (loss,) = parser.instantiate_classes(parser.parse_object({"losses": [named]})).losses
    assert isinstance(loss, PILELoss) and loss.loss.options["alpha"] == 0.7 and loss.loss.prior.tolist() == [1.0, 2.0]


def test_the_documented_example():
    text = (Path(__file__).parent.parent / "docs" / "integrations.md").read_text()
    example = re.search(r"## Lightning-IR.*?```python\n(.*?)```", text, re.DOTALL).group(1)
    names = {}
    exec(example, names)
    assert names["scores"].grad.abs().sum() > 0
