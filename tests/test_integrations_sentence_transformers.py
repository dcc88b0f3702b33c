"""The loss in a real `CrossEncoderTrainer`, on a random BERT of two tiny layers."""

import logging
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import BertConfig, BertForSequenceClassification, BertTokenizer

import pile_fast
from pile_fast import reference
from pile_fast.options import loss_options

pytest.importorskip(
    "sentence_transformers", reason="needs sentence-transformers: pip install 'pile_fast[sentence-transformers]'"
)

from sentence_transformers import CrossEncoder, CrossEncoderTrainer, CrossEncoderTrainingArguments  # noqa: E402
from sentence_transformers.cross_encoder.losses import LambdaLoss  # noqa: E402

from pile_fast.integrations.sentence_transformers import PILELoss  # noqa: E402

WORDS = "panda bamboo paris city grass france eats is a the what bear".split()
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny-bert")
    vocab = folder / "vocab.txt"
    vocab.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]) + "\n")
    config = BertConfig(
        vocab_size=len(WORDS) + 5, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=32, num_labels=1, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        initializer_range=0.5,
    )  # fmt: skip
    torch.manual_seed(0)
    BertForSequenceClassification(config).save_pretrained(folder)
    BertTokenizer(str(vocab)).save_pretrained(folder)
    return folder


@pytest.fixture
def model(model_folder):
    return CrossEncoder(str(model_folder), device="cpu")


def make_rows(queries=8, seed=0):
    """Lists of 1 to 5 documents; the first teacher is right but for a fifth that is missing, the second is noise."""
    random = np.random.default_rng(seed)
    rows = {"query": [], "docs": [], "teachers": [], "labels": []}
    for query in range(queries):
        n = 1 + query % 5
        rows["query"].append(f"what is {WORDS[query % len(WORDS)]}")
        rows["docs"].append([" ".join(random.choice(WORDS, 4)) for _ in range(n)])
        grades = random.integers(0, 3, n)
        rows["labels"].append([float(g) if random.random() > 0.2 else float("nan") for g in grades])
        first = [float(g) + 0.1 * random.standard_normal() if random.random() > 0.2 else None for g in grades]
        rows["teachers"].append([[t, 10 * random.standard_normal()] for t in first])
    return rows


def as_batch(rows):
    """What the trainer's collator makes of rows."""
    return [rows["query"], rows["docs"], rows["teachers"]], [torch.tensor(labels) for labels in rows["labels"]]


def expected(model, rows, alpha=1.0, **options):
    """The loss of the same logits by `pile_fast.pile_loss`."""
    pairs = [(query, doc) for query, docs in zip(rows["query"], rows["docs"], strict=True) for doc in docs]
    logits = model(model.preprocess(pairs))["scores"].view(-1)
    teachers = torch.tensor([[np.nan if t is None else t for t in row] for query in rows["teachers"] for row in query])
    cu_seqlens = torch.tensor([0, *np.cumsum([len(docs) for docs in rows["docs"]])])
    labels = torch.tensor(sum(rows["labels"], []))
    return pile_fast.pile_loss(logits, teachers.float(), labels, cu_seqlens=cu_seqlens, alpha=alpha, **options)


def gradient(model, loss):
    model.zero_grad()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("options", [{}, {"granularity": "query", "pair_weight": "label_gap"}, {"prior": [1.0, 0.0]}])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("alpha", [1.0, 0.6, 0.0])
def test_is_the_loss_of_the_models_logits(model, alpha, reduction, options):
    rows = make_rows()
    loss = PILELoss(model, alpha=alpha, reduction=reduction, **options)(*as_batch(rows))
    plain = {name: torch.tensor(value) if name == "prior" else value for name, value in options.items()}
    wanted = expected(model, rows, alpha, reduction=reduction, **plain)
    if 0 < alpha < 1:
        assert list(loss) == ["distillation", "labels"]
        labels = expected(model, rows, 0.0, reduction="none", pair_weight=options.get("pair_weight")).sum()
        if reduction == "sum":
            torch.testing.assert_close(loss["labels"], 0.4 * labels)
        loss = torch.stack(list(loss.values())).sum()
    torch.testing.assert_close(loss, wanted)
    torch.testing.assert_close(gradient(model, loss), gradient(model, wanted))


def test_the_terms_divide_by_the_queries_with_a_pair(model):
    """A query of one document, one without a labelled pair, one whose only second document no teacher scored, an empty one."""
    rows = {
        "query": ["what"] * 4,
        "docs": [["panda"], ["bear", "city"], ["grass", "paris"], ["a"]],
        "teachers": [[[1.0, 2.0]], [[1.0, 0.0], [2.0, None]], [[None, 1.0], [None, None]], [[None, None]]],
        "labels": [[1.0], [1.0, float("nan")], [1.0, 0.0], [float("nan")]],
    }
    rows["query"].append("is"), rows["docs"].append([]), rows["teachers"].append([]), rows["labels"].append([])
    for prior in (None, [0.0, 1.0]):  # without the first teacher no query but the third has a pair
        loss = PILELoss(model, alpha=0.5, prior=prior)(*as_batch(rows))
        wanted = expected(model, rows, 0.5, prior=None if prior is None else torch.tensor(prior))
        labels = expected(model, rows, 0.0, reduction="sum") * 0.5 / (2 if prior is None else 1)
        torch.testing.assert_close(loss["labels"], labels)
        torch.testing.assert_close(loss["distillation"] + loss["labels"], wanted)


@pytest.mark.parametrize("size", [None, -1, 1, 3, 100])
def test_mini_batches_do_not_change_it(model, size):
    rows, calls = make_rows(), []
    model.register_forward_hook(lambda module, args, output: calls.append(len(args[0]["input_ids"])))
    loss = PILELoss(model, mini_batch_size=size)(*as_batch(rows))
    total = sum(map(len, rows["docs"]))
    chunk = {None: 8, -1: total}.get(size, size)
    assert calls == [min(chunk, total - begin) for begin in range(0, total, chunk)]
    torch.testing.assert_close(loss, expected(model, rows))


def test_teachers_may_come_one_per_column_or_with_the_labels(model):
    rows = make_rows()
    inputs, labels = as_batch(rows)
    loss = PILELoss(model)
    wanted = loss(inputs, labels)
    columns = [[[row[m] for row in query] for query in rows["teachers"]] for m in range(2)]
    torch.testing.assert_close(loss([*inputs[:2], *columns], labels), wanted)
    both = [
        torch.cat([own[:, None], torch.tensor([[np.nan if t is None else t for t in row] for row in query])], 1).float()
        for own, query in zip(labels, rows["teachers"], strict=True)
    ]
    torch.testing.assert_close(loss(inputs[:2], both), wanted)
    torch.testing.assert_close(loss(inputs, [own.nan_to_num(1).long() for own in labels]),
                               loss(inputs, [own.nan_to_num(1) for own in labels]))  # fmt: skip


def train(model, folder, rows, loss, **arguments):
    arguments = CrossEncoderTrainingArguments(
        str(folder), per_device_train_batch_size=4, learning_rate=5e-3, logging_steps=4, report_to="none", use_cpu=True,
        disable_tqdm=True, save_strategy="no", **arguments,
    )  # fmt: skip
    trainer = CrossEncoderTrainer(model, arguments, train_dataset=rows, eval_dataset=rows, loss=loss)
    trainer.train()
    return trainer


def test_trains_in_the_librarys_trainer(model, tmp_path):
    rows = Dataset.from_dict(make_rows(16))
    loss = PILELoss(model, alpha=0.6)
    trainer = train(model, tmp_path, rows, loss, num_train_epochs=6)
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert entries[-1]["loss"] < 0.8 * entries[0]["loss"]
    for entry in entries:
        assert entry["distillation"] + entry["labels"] == pytest.approx(entry["loss"], rel=1e-3)
    assert {"eval_loss", "eval_distillation", "eval_labels"} <= trainer.evaluate().keys() | {
        key for entry in trainer.state.log_history for key in entry
    }

    trainer.save_model(tmp_path / "saved")
    pairs = [("what is panda", "bear"), ("what is panda", "paris city")]
    again = CrossEncoder(str(tmp_path / "saved"), device="cpu")
    np.testing.assert_array_equal(model.predict(pairs), again.predict(pairs))
    card = (tmp_path / "saved" / "README.md").read_text()
    assert "PILELoss" in card and '"alpha": 0.6' in card and "cai2022pile" in card


def test_trains_as_lambda_loss_does(model, tmp_path):
    """The same call on the same rows but for the teachers' column: what 'drop-in' means."""
    rows = Dataset.from_dict(make_rows())
    labelled = Dataset.from_dict({k: v for k, v in make_rows().items() if k != "teachers"})
    for loss, data in ((LambdaLoss(model, mini_batch_size=2), labelled), (PILELoss(model, mini_batch_size=2), rows)):
        trainer = train(model, tmp_path, data, loss, max_steps=2)
        assert trainer.state.global_step == 2
    assert PILELoss(model).get_config_dict().keys() >= {"mini_batch_size", "activation_fn", "alpha", "prior"}


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda inputs, labels: (inputs, None), "labels: expected a column named"),
        (lambda inputs, labels: (inputs, torch.zeros(8)), "labels: expected per query"),
        (lambda inputs, labels: (inputs[:1], labels), "got 1 column"),
        (lambda inputs, labels: (inputs[:2], labels), r"labels: expected \(n, 1 \+ M\)"),
        (lambda inputs, labels: (inputs, [own[:, None].expand(-1, 3) for own in labels]), r"labels: expected \(n,\) beside"),
        (lambda inputs, labels: (inputs, [labels[0][:0], *labels[1:]]), "labels: expected 1, one per document, for query 0"),
        (lambda inputs, labels: ([inputs[0], [[]] * 8], [own[:0] for own in labels]), "at least one document"),
        (lambda inputs, labels: ([*inputs[:2], [["text"], *inputs[2][1:]]], labels), "column 3, query 0 of the batch: exp"),
        (lambda inputs, labels: ([*inputs[:2], [[[1.0, {}]], *inputs[2][1:]]], labels), "column 3, query 0 of the batch: exp"),
        (lambda inputs, labels: ([*inputs[:2], [[[1.0]], *inputs[2][1:]]], labels), r"same number of teachers .* \[1, 2\]"),
        (lambda inputs, labels: ([*inputs[:2], [[[1.0, np.inf]], *inputs[2][1:]]], labels), "infinite"),
        (lambda inputs, labels: ([*inputs[:2], [inputs[2][1], *inputs[2][1:]]], labels), r"expected teachers' logits \(1,\)"),
        (lambda inputs, labels: ([inputs[0], [None, *inputs[1][1:]], inputs[2]], labels), "PILELoss: .*None"),
    ],
)  # fmt: skip
def test_bad_batches_raise_value_errors(model, change, message):
    """Never TypeError: the trainer would run the forward a second time."""
    inputs, labels = change(*as_batch(make_rows()))
    with pytest.raises(ValueError, match=message):
        PILELoss(model)(inputs, labels, prompt=None, task=None)


def test_bad_options(model, model_folder):
    with pytest.raises(ValueError, match="num_labels=1, got num_labels=2"):
        PILELoss(CrossEncoder(str(model_folder), num_labels=2, device="cpu", model_kwargs={"ignore_mismatched_sizes": True}))
    with pytest.raises(ValueError, match="reduction: expected 'mean' or 'sum'"):
        PILELoss(model, reduction="none")
    with pytest.raises(ValueError, match="alpha"):
        PILELoss(model, alpha=2.0)


def test_warns_once_of_teachers_that_teach_nothing(model, caplog):
    n, queries = 5, 4
    teachers = [[[float(i), None, 0.5, float(i > 3), float(i * q)] for i in range(n)] for q in range(queries)]
    inputs = [["what"] * queries, [["panda"] * n] * queries, teachers]
    labels = [torch.arange(n)] * queries
    loss = PILELoss(model)
    with caplog.at_level(logging.WARNING, "pile_fast"):
        loss(inputs, labels)
        loss(inputs, labels)
    assert [re.search(r"teacher (\d) of 5 (.*)\.", message).groups() for message in caplog.messages] == [
        ("2", "scored no two documents of any query"),
        ("3", "gives all documents of a query the same logit"),
        ("4", "ties 60% of the pairs of documents: saturated? Logits teach more than probabilities"),
    ]


def test_counts_queries_as_the_reference_does(model):
    """The divisor of the logged terms against the rule it repeats."""
    from pile_fast.integrations.sentence_transformers import _queries_with_a_pair

    labels = torch.randint(0, 2, (200, 3)).float()
    labels[torch.rand(labels.shape) < 0.3] = torch.nan
    teachers = torch.randn(200, 3, 2)
    teachers[torch.rand(teachers.shape) < 0.6] = torch.nan
    target = torch.where(teachers.isnan().all(-1), torch.nan, 0.0)
    options = loss_options(0.5, "logistic", 1.0, None, "mean", "auto")
    pairs = reference.pair_loss(torch.zeros(200, 3), target, labels, torch.ones(200, 3, dtype=torch.bool), options).has_pairs
    count = _queries_with_a_pair(teachers.flatten(0, 1), labels.flatten(), torch.arange(0, 603, 3, dtype=torch.int32), None)
    assert 0 < count < 200 and count == pairs.sum()


def test_the_documented_example(model_folder, tmp_path, monkeypatch):
    text = (Path(__file__).parent.parent / "docs" / "integrations.md").read_text()
    example = re.search(r"## sentence-transformers.*?```python\n(.*?)```", text, re.DOTALL).group(1)
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(example.replace("cross-encoder/ms-marco-MiniLM-L6-v2", str(model_folder)), names)
    before = BertForSequenceClassification.from_pretrained(model_folder).classifier.weight
    assert not torch.equal(names["model"][0].auto_model.classifier.weight, before)
