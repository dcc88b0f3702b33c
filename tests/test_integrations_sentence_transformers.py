"""The loss in a real `CrossEncoderTrainer`, on a random BERT of two tiny layers."""

import logging
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from contract.problems import terms_of
from datasets import Dataset
from transformers import BertConfig, BertForSequenceClassification, BertTokenizer

import pile_fast
from pile_fast import reference
from pile_fast.options import loss_options

pytest.importorskip(
    "sentence_transformers", reason="needs sentence-transformers: pip install 'pile_fast[sentence-transformers]'"
)

from sentence_transformers import CrossEncoder, CrossEncoderTrainer, CrossEncoderTrainingArguments  # noqa: E402
from sentence_transformers.cross_encoder.evaluation import CrossEncoderRerankingEvaluator  # noqa: E402
from sentence_transformers.cross_encoder.losses import LambdaLoss  # noqa: E402

from pile_fast.integrations.sentence_transformers import PILELoss  # noqa: E402

WORDS = "panda bamboo paris city grass france eats is a the what bear".split()
# Weights of each document's own: they need no `fit` to be compared with `pile_fast.pile_loss` on a batch.
OWN = {"granularity": "document"}
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


@pytest.mark.parametrize(
    "options",
    [OWN, {"granularity": "query", "pair_weight": "label_gap"}, {"prior": [1.0, 0.0]}, OWN | {"label_loss": "lambdarank@3"}],
)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("alpha", [1.0, 0.6, 0.0])
def test_is_the_loss_of_the_models_logits(model, alpha, reduction, options):
    rows = make_rows()
    loss = PILELoss(model, alpha=alpha, reduction=reduction, **options)(*as_batch(rows))
    plain = {name: torch.tensor(value) if name == "prior" else value for name, value in options.items()}
    wanted = expected(model, rows, alpha, reduction=reduction, **plain)
    if 0 < alpha < 1:
        assert list(loss) == ["distillation", "labels"]
        of_labels = {name: options[name] for name in ("pair_weight", "label_loss") if name in options}
        labels = expected(model, rows, 0.0, reduction="none", **of_labels).sum()
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
    loss = PILELoss(model, mini_batch_size=size, **OWN)(*as_batch(rows))
    total = sum(map(len, rows["docs"]))
    chunk = {None: 8, -1: total}.get(size, size)
    assert calls == [min(chunk, total - begin) for begin in range(0, total, chunk)]
    torch.testing.assert_close(loss, expected(model, rows, **OWN))


def test_teachers_may_come_one_per_column_or_with_the_labels(model):
    rows = make_rows()
    inputs, labels = as_batch(rows)
    loss = PILELoss(model).fit(Dataset.from_dict(rows))
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


def fitted(rows):
    """The weights that the rows' queries share."""
    teachers = torch.tensor([[np.nan if t is None else t for t in row] for query in rows["teachers"] for row in query])
    cu_seqlens = torch.tensor([0, *np.cumsum([len(docs) for docs in rows["docs"]])])
    labels = torch.tensor(sum(rows["labels"], []))
    return pile_fast.PILELoss().fit([(teachers.float(), labels, None, cu_seqlens)]).weights


@pytest.mark.parametrize("alpha", [1.0, 0.6])
def test_weights_that_all_queries_share_are_fitted_to_a_data_set(model, tmp_path, alpha):
    rows = make_rows(600)
    data = Dataset.from_dict(rows)
    loss = PILELoss(model, alpha=alpha).fit(data)
    weights = fitted(rows)
    assert weights[0] > 0.8 and torch.equal(loss.loss.weights, weights)
    for same in ({"a": data.select(range(300)), "b": data.select(range(300, 600))}, data.with_format("numpy")):
        assert torch.equal(PILELoss(model).fit(same).loss.weights, weights)
    train(model, tmp_path, data, loss, max_steps=2).evaluate()
    assert torch.equal(loss.loss.weights, weights)
    small = make_rows(8)
    found = loss(*as_batch(small))
    found = found if alpha == 1 else sum(found.values())
    torch.testing.assert_close(found, expected(model, small, alpha, prior=weights, iterations=0))


def test_without_fit_training_takes_steps_of_the_weights_and_evaluation_none(model, tmp_path):
    loss = PILELoss(model)
    trainer = train(model, tmp_path, Dataset.from_dict(make_rows(16)), loss, num_train_epochs=2)
    weights = loss.loss.weights.clone()
    assert not loss.loss.fitted and weights[0] > weights[1]
    trainer.evaluate()
    assert torch.equal(loss.loss.weights, weights)
    assert loss.get_config_dict()["granularity"] == "shared"


def test_rows_that_cannot_be_fitted_to(model):
    rows = make_rows(4)
    with pytest.raises(RuntimeError, match="PILELoss.fit: nothing to fit"):
        PILELoss(model, granularity="query").fit(Dataset.from_dict(rows))
    with pytest.raises(ValueError, match=r"documents: expected a list of texts, got a string \(column 'query'\)"):
        PILELoss(model).fit(Dataset.from_dict({"id": list("abcd"), **rows}))
    with pytest.warns(UserWarning, match="no query has two documents whose labels differ"):
        PILELoss(model).fit(Dataset.from_dict({name: rows[name] for name in ("query", "docs", "teachers")}))


def train(model, folder, rows, loss, evaluator=None, **arguments):
    arguments = CrossEncoderTrainingArguments(
        str(folder), per_device_train_batch_size=4, learning_rate=5e-3, logging_steps=4, report_to="none", use_cpu=True,
        disable_tqdm=True, save_strategy="no", **arguments,
    )  # fmt: skip
    trainer = CrossEncoderTrainer(model, arguments, train_dataset=rows, eval_dataset=rows, loss=loss, evaluator=evaluator)
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
        (lambda inputs, labels: (inputs, [["high"], *labels[1:]]), "expected numbers or null, got 'high'"),
        (lambda inputs, labels: (inputs[:2], None), "labels: expected .* got no teacher at alpha=1"),
        (lambda inputs, labels: (inputs, torch.zeros(8)), "labels: expected per query"),
        (lambda inputs, labels: (inputs[:1], labels), "got 1 column"),
        (lambda inputs, labels: (inputs[:2], labels), r"labels: expected \(n, 1 \+ M\)"),
        (lambda inputs, labels: (inputs, [own[:, None].expand(-1, 3) for own in labels]), r"labels: expected \(n,\) beside"),
        (lambda inputs, labels: (inputs, [labels[0][:0], *labels[1:]]), "labels: expected 1, one per document, for query 0"),
        (lambda inputs, labels: ([inputs[0], [[]] * 8], [own[:0] for own in labels]), "at least one document"),
        (lambda inputs, labels: ([*inputs[:2], [["text"], *inputs[2][1:]]], labels), "column 3, query 0 of the batch: exp"),
        (lambda inputs, labels: ([*inputs[:2], [[[1.0, {}]], *inputs[2][1:]]], labels), "column 3, query 0 of the batch: exp"),
        (lambda inputs, labels: ([*inputs[:2], [[[1.0]], *inputs[2][1:]]], labels), r"same number of teachers .* \[1, 2\]"),
        (lambda inputs, labels: (inputs, [own * np.inf for own in labels]), "labels: expected finite numbers or NaN, got"),
        # C2
        (lambda inputs, labels: ([inputs[0], inputs[0], inputs[2]], labels), "expected a list of texts, got a string"),
        (lambda inputs, labels: ([inputs[1], inputs[0], inputs[2]], labels), r"got a string \(column 2\); column 1 has lists"),
        (lambda inputs, labels: ([inputs[0], *inputs], labels), r"got a string \(column 2\); column 3 has lists of texts"),
        (lambda inputs, labels: ([range(8), *inputs[1:]], labels), r"query: .*, got a number \(column 1, query 0"),
        (lambda inputs, labels: ([inputs[0], range(8), inputs[2]], labels), "got numbers"),
        (lambda inputs, labels: ([inputs[0], inputs[0], inputs[2], inputs[0]], labels), "column 2"),
        (lambda inputs, labels: ([inputs[0], [["a", None], *inputs[1][1:]], inputs[2]], labels), "got None for document 1"),
        (lambda inputs, labels: ([inputs[0], ["text", *inputs[1][1:]], inputs[2]], labels), "got a string .column 2"),
        (lambda inputs, labels: ([inputs[0], ["a"] * 8, ["b"] * 7 + [None]], [torch.ones(2)] * 8), "1 .column 3, query 7"),
        # Teachers' logits
        (lambda inputs, labels: ([*inputs[:2], [["1.5"], *inputs[2][1:]]], labels), "column 3, query 0 of the batch: exp"),
        (lambda inputs, labels: ([*inputs[:2], [inputs[2][0], [[1.0, 2.0], [3.0]], *inputs[2][2:]]], labels),
         r"column 3, query 1 of the batch: .* document 0 has 2, document 1 has 1 \(query 'what is bamboo'\)"),
        (lambda inputs, labels: ([*inputs[:2], [*inputs[2][:2], [[1.0, 2.0, 3.0]] * 2, *inputs[2][3:]]], labels),
         r"query 2 of the batch: expected .* \(3,\) or \(3, M\), got \(2, 3\): the documents' dimension comes first"),
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
    with pytest.raises(ValueError, match="model: expected a CrossEncoder, got a str$"):
        PILELoss("cross-encoder/ms-marco-MiniLM-L6-v2")


NULL = [[1, 0], [1, None, 0], [None, None], [0, 2]]
ROWS = {
    "query": ["what is panda", "what is paris", "bear", "city"],
    "docs": [["panda", "bear city"], ["paris", "city", "grass"], ["bear", "a"], ["city", "the"]],
    "teachers": [[[1.0, 2.0], [0.0, None]], [[1.0, 2.0], [0.0, 1.0], [3.0, 4.0]], [[1.0, 2.0], [0.0, 1.0]], [[0.0, 1.0]] * 2],
    "labels": NULL,
}
TUPLES = {
    "query": ROWS["query"], "positive": ["panda", "paris", "bear", "city"], "negative": ["city", "the", "grass", "a"],
    "label": [[3.0, 1.0], [2.0, 0.5], [1.0, 2.0], [0.0, None]],
}  # fmt: skip


def only(rows, *columns, **changed):
    rows = rows | changed
    return {name: rows[name] for name in columns or rows}


def first_loss(model, folder, rows, loss):
    """The loss of all rows in one batch by the trainer."""
    arguments = CrossEncoderTrainingArguments(
        str(folder), per_device_eval_batch_size=8, report_to="none", use_cpu=True, disable_tqdm=True
    )
    rows = rows if isinstance(rows, (Dataset, dict)) and "query" not in rows else Dataset.from_dict(rows)
    trainer = CrossEncoderTrainer(model, arguments, eval_dataset=rows, loss=loss)
    return torch.tensor(trainer.evaluate()["eval_loss"])


def by_hand(model, documents, teachers, labels, alpha):
    """`pile_fast.pile_loss` of lists of documents, None = missing."""
    rows = {"query": ROWS["query"], "docs": documents}
    rows["labels"] = [[np.nan if label is None else label for label in own] for own in labels]
    rows["teachers"] = teachers
    with torch.no_grad():
        return expected(model.eval(), rows, alpha, **OWN)


# C3: each may be left out where the loss needs none; a null label is unlabelled.
@pytest.mark.parametrize(
    "columns, alpha, taken",
    [
        (("query", "docs", "teachers", "labels"), 0.6, "teachers: 2 in column 'teachers', labels: column 'labels'"),
        (("query", "docs", "labels"), 0.0, "labels: column 'labels', no teachers"),
        (("query", "docs", "teachers"), 1.0, "teachers: 2 in column 'teachers', no labels"),
    ],
)
def test_rows_with_nulls_and_without_teachers_or_labels(model, tmp_path, caplog, columns, alpha, taken):
    blank = [[None] * len(docs) for docs in ROWS["docs"]]
    labels = NULL if "labels" in columns else blank
    teachers = ROWS["teachers"] if "teachers" in columns else [[[None]] * len(docs) for docs in ROWS["docs"]]
    loss = first_loss(model, tmp_path, only(ROWS, *columns), PILELoss(model, alpha=alpha, **OWN))
    torch.testing.assert_close(loss, by_hand(model, ROWS["docs"], teachers, labels, alpha), rtol=1e-4, atol=1e-5)
    told = [record for record in caplog.records if "in the first batch, query" in record.message]
    assert [record.message.removeprefix("PILELoss: in the first batch, query: column 'query', documents: column 'docs', ")
            for record in told] == [taken + "."]  # fmt: skip


# C2: rows of `MarginMSELoss` and `DistillKLDivLoss`.
@pytest.mark.parametrize("alpha", [1.0, 0.5, 0.0])
def test_a_text_per_column(model, tmp_path, caplog, alpha):
    documents = [list(pair) for pair in zip(TUPLES["positive"], TUPLES["negative"], strict=True)]
    teachers, labels = [[[t] for t in row] for row in TUPLES["label"]], [[1, 0]] * 4
    loss = first_loss(model, tmp_path, TUPLES, PILELoss(model, alpha=alpha, **OWN))
    assert "documents: column 'positive' to column 'negative'" in caplog.text
    if alpha == 0:
        labels = TUPLES["label"]
        assert "labels: column 'label', no teachers" in caplog.text
    else:
        assert "teachers: one in column 'label', labels: 1 for column 'positive', 0 for the other documents" in caplog.text
    torch.testing.assert_close(loss, by_hand(model, documents, teachers, labels, alpha), rtol=1e-4, atol=1e-5)


def test_a_text_per_column_with_labels_and_teachers_of_ones_own(model, tmp_path):
    documents = [list(pair) for pair in zip(TUPLES["positive"], TUPLES["negative"], strict=True)]
    teachers = [[[1.0, 2.0], [0.0, None]], [[0.0, 2.0], [3.0, 1.0]], [[1.0, 1.0], [2.0, 0.0]], [[None, None], [1.0, 0.0]]]
    labels = [[0, 1], [2, 0], [None, 1], [0, 0]]
    wanted = by_hand(model, documents, teachers, labels, 0.5)
    texts = only(TUPLES, "query", "positive", "negative")
    both = [[[label, *own] for label, own in zip(*pair, strict=True)] for pair in zip(labels, teachers, strict=True)]
    for columns in ({"label": both}, {"teachers": teachers, "label": labels}):
        loss = first_loss(model, tmp_path, texts | columns, PILELoss(model, alpha=0.5, **OWN))
        torch.testing.assert_close(loss, wanted, rtol=1e-4, atol=1e-5)
    loss = first_loss(model, tmp_path, texts | {"teachers": teachers}, PILELoss(model, alpha=0.5, **OWN))
    torch.testing.assert_close(loss, by_hand(model, documents, teachers, [[1, 0]] * 4, 0.5), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "rows, alpha, message",
    [
        # C2
        ({"query_id": list("abcd")} | ROWS, 1.0, r"documents: expected a list of texts, got a string \(column 'query'\)"),
        (only(ROWS, "docs", "query", "teachers", "labels"), 1.0, r"got a string \(column 'query'\); column 'docs' has lists"),
        ({"query_id": list("abcd")} | TUPLES, 1.0, "column 'query_id': looks like identifiers"),
        ({"query_id": list("abcd")} | only(TUPLES, "query", "positive", "label"), 1.0, "column 'query_id': looks like identif"),
        (only(TUPLES, "positive", "query", "negative", "label"), 1.0, "query: expected in the first column, got column 'posi"),
        (only(TUPLES, "query", "positive", "label"), 1.0, r"got a string \(column 'positive'\); .* at least two documents"),
        (only(TUPLES, "query", "positive", label=[1.0, 0.0, 1.0, 0.0]), 1.0, r"a string \(column 'positive'\)"),
        (TUPLES | {"label": [1.0, 2.0, 3.0, 4.0]}, 1.0, r"got one number per query \(column 'label'\)"),
        (only(TUPLES, "query", "positive", "negative", "third", "label", third=list("abcd")), 1.0, "3, .* not of differences"),
        (ROWS | {"doc_ids": [[1] * len(docs) for docs in ROWS["docs"]]}, 1.0, "column 'doc_ids': looks like identifiers"),
        (ROWS | {"labels": [[1, 0, 0], *NULL[1:]]}, 1.0, r"labels: expected 2, .* got 3 \(column 'labels'\)"),
        (ROWS | {"labels": [["high"] * len(own) for own in NULL]}, 1.0, r"null, got 'high' \(column 'labels', row 0"),
        (ROWS | {"label": NULL}, 1.0, "column 'label' and column 'labels': which of them"),
        # C3
        (only(ROWS, "query", "docs", "teachers"), 0.5, "labels: expected a column named label, labels, score, scores"),
        (only(ROWS, "query", "docs", "labels"), 0.5, "got no teacher at alpha=0.5"),
        (only(ROWS, "query", "docs", "scores", scores=ROWS["teachers"]), 1.0, "column 'scores': was taken for the labels"),
        (only(ROWS, "query", "docs", "scores", scores=NULL), 1.0, "got no teacher at alpha=1. Taken were .* column 'scores'"),
    ],
)  # fmt: skip
def test_rows_that_are_not_what_the_loss_takes(model, tmp_path, rows, alpha, message):
    with pytest.raises(ValueError, match=message) as error:
        first_loss(model, tmp_path, rows, PILELoss(model, alpha=alpha))
    assert "\n" not in str(error.value)


def test_infinite_logits_count_as_missing_and_are_told_of_once(model, caplog):
    rows = make_rows()
    teachers = [[[t if m else np.inf for m, t in enumerate(own)] for own in query] for query in rows["teachers"]]
    missing = [[[t if m else None for m, t in enumerate(own)] for own in query] for query in rows["teachers"]]
    inputs, labels = as_batch(rows)
    loss = PILELoss(model)
    found = loss([*inputs[:2], teachers], labels)
    torch.testing.assert_close(found, PILELoss(model)([*inputs[:2], missing], labels))
    loss([*inputs[:2], teachers], labels)
    told = [message for message in caplog.messages if "infinite" in message]
    assert told == [
        "PILELoss: teacher 1 gave an infinite logit for query 0 of the batch ('what is panda'); it counts as missing."
    ]


def test_several_data_sets_and_losses(model, tmp_path, caplog):
    """Names that differ, a prompt for each, a loss for each: the other's null stays an error of its own."""
    other = {"question": ROWS["query"], "answers": ROWS["docs"], "scores": ROWS["teachers"], "label": NULL}
    data = {"one": Dataset.from_dict(ROWS), "two": Dataset.from_dict(other)}
    with caplog.at_level(logging.WARNING, "pile_fast"):
        trainer = train(model, tmp_path, data, PILELoss(model), max_steps=4, prompts={"one": "what ", "two": "the "})
    assert trainer.state.global_step == 4 and "documents: column 'docs' or 'answers'" in caplog.text
    labelled = {"query": ROWS["query"], "docs": ROWS["docs"], "labels": [[1.0] * len(docs) for docs in ROWS["docs"]]}
    losses = {"one": PILELoss(model), "two": LambdaLoss(model)}
    trainer = train(model, tmp_path, data | {"two": Dataset.from_dict(labelled)}, losses, max_steps=4)
    assert trainer.state.global_step == 4


def test_another_loss_sees_no_difference(model, tmp_path):
    labelled = Dataset.from_dict(only(ROWS, "query", "docs", "labels"))
    with pytest.raises(RuntimeError, match="Could not infer dtype of NoneType"):
        train(model, tmp_path, labelled, LambdaLoss(model), max_steps=1)


@pytest.mark.parametrize(
    "arguments",
    [{"bf16": True}, {"gradient_checkpointing": True}, {"eval_strategy": "steps", "eval_steps": 1}],
)
def test_arguments_of_the_trainer(model, tmp_path, arguments):
    samples = [{"query": "what is panda", "positive": ["panda"], "negative": ["bear city", "paris"]}]
    evaluator = CrossEncoderRerankingEvaluator(samples, name="dev", show_progress_bar=False)
    rows, loss = Dataset.from_dict(ROWS), PILELoss(model, alpha=0.5)
    trainer = train(model, tmp_path, rows, loss, evaluator, max_steps=2, **arguments)
    log = trainer.state.log_history
    losses = [entry[key] for entry in log for key in ("train_loss", "eval_loss") if key in entry]
    assert losses and all(np.isfinite(losses)) and max(losses) < 5
    if "eval_strategy" in arguments:
        assert len(losses) == 3 and sum("eval_dev_map" in entry for entry in log) == 2


def test_gradient_accumulation_takes_the_mean_of_the_batches(model_folder, tmp_path):
    """Four batches of two equal rows are a step as one batch of eight is."""
    rows = Dataset.from_dict({name: [own[4]] * 8 for name, own in make_rows(8).items()})
    weights = []
    for accumulated in (True, False):
        model = CrossEncoder(str(model_folder), device="cpu")
        sizes = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
        if not accumulated:
            sizes = {"per_device_train_batch_size": 8}
        arguments = CrossEncoderTrainingArguments(
            str(tmp_path), **sizes, max_steps=1, report_to="none", use_cpu=True, disable_tqdm=True, save_strategy="no",
            optim="sgd", learning_rate=1.0, max_grad_norm=1e9, lr_scheduler_type="constant",
        )  # fmt: skip
        trainer = CrossEncoderTrainer(model, arguments, train_dataset=rows, loss=PILELoss(model).fit(rows))
        trainer.train()
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    torch.testing.assert_close(*weights, rtol=1e-4, atol=1e-5)


# C7: it predicts what it was trained on.
def test_predicts_the_logits(model, tmp_path, caplog):
    train(model, tmp_path, Dataset.from_dict(ROWS), PILELoss(model), max_steps=2).save_model(tmp_path / "saved")
    pairs = [(ROWS["query"][0], document) for document in ROWS["docs"][0]]
    with torch.no_grad():
        logits = model(model.preprocess(pairs))["scores"].view(-1).numpy()
    again = CrossEncoder(str(tmp_path / "saved"), device="cpu")
    assert isinstance(again.activation_fn, torch.nn.Identity)
    np.testing.assert_allclose(again.predict(pairs), logits, rtol=1e-4, atol=1e-5)
    # A model that the trainer makes anew.
    arguments = CrossEncoderTrainingArguments(str(tmp_path), max_steps=1, report_to="none", use_cpu=True, save_strategy="no")
    trainer = CrossEncoderTrainer(
        model_init=lambda: CrossEncoder(str(tmp_path / "saved"), device="cpu", activation_fn=torch.nn.Tanh()),
        args=arguments, train_dataset=Dataset.from_dict(ROWS), loss=lambda model: PILELoss(model),
    )  # fmt: skip
    trainer.train()
    assert "query: column 'query', documents: column 'docs'" in caplog.messages[-1]
    assert trainer.model is trainer.loss.model and trainer.model.activation_fn is trainer.loss.activation_fn
    squeezed = PILELoss(model, activation_fn=torch.nn.Sigmoid())
    assert squeezed.model.activation_fn is squeezed.activation_fn


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


@pytest.mark.parametrize("term", terms_of("label"), ids=str)
def test_counts_queries_as_the_reference_does(term):
    """The divisor of the logged terms against the rule it repeats."""
    from pile_fast.integrations.sentence_transformers import _queries_that_count

    labels = torch.randint(0, 2, (200, 3)).float()
    labels[torch.rand(labels.shape) < 0.3] = torch.nan
    teachers = torch.randn(200, 3, 2)
    teachers[torch.rand(teachers.shape) < 0.6] = torch.nan
    target = torch.where(teachers.isnan().all(-1), torch.nan, 0.0)
    options = loss_options(alpha=0.5, label_loss=term)
    pairs = reference.pair_loss(torch.zeros(200, 3), target, labels, torch.ones(200, 3, dtype=torch.bool), options).counts
    packed = teachers.flatten(0, 1), labels.flatten(), torch.arange(0, 603, 3, dtype=torch.int32)
    count = _queries_that_count(*packed, None, term)
    assert 0 < count < 200 and count == pairs.sum()


def test_the_documented_examples(model_folder, tmp_path, monkeypatch):
    text = (Path(__file__).parent.parent / "docs" / "integrations.md").read_text()
    section = re.search(r"## sentence-transformers\n(.*?)\n## ", text, re.DOTALL).group(1)
    examples = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    assert len(examples) == 3
    monkeypatch.chdir(tmp_path)
    for example in examples:
        names = {}
        exec(re.sub('"(cross-encoder|sentence-transformers)/.*?"', repr(str(model_folder)), example), names)
        if "args" in names:
            weights = dict(names["model"][0].auto_model.named_parameters())
            before = BertForSequenceClassification.from_pretrained(model_folder).bert.embeddings.word_embeddings.weight
            (after,) = (weight for name, weight in weights.items() if name.endswith("word_embeddings.weight"))
            assert not torch.equal(after, before)
