"""Text students: `PileTrainer`, a Trainer of one's own, gradient caching, several processes, resuming."""

import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
import torch
import trainer_worker as worker
from transformers import TrainerCallback, TrainingArguments

import pile_fast
from pile_fast.cli import main
from pile_fast.data.collator import BiEncoderCollator, CrossEncoderCollator
from pile_fast.students import KINDS, FeatureRanker, FeatureRankerConfig, gradient_cache, load_ranker
from pile_fast.trainer import PileTrainer, last_checkpoint, loss_components, ranking_quality

WORKER = Path(__file__).with_name("trainer_worker.py")

TEXT = ["cross-encoder", "bi-encoder"]
QUERIES = 22  # steps of 8: the third is short

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def folder(tmp_path, tiny_text_model, tiny_tokenizer, text_rows):
    """Students of every kind and the rows, saved."""
    for kind in TEXT:
        tiny_text_model(kind).save_pretrained(tmp_path / kind)
        tiny_tokenizer.save_pretrained(tmp_path / kind)
    FeatureRanker(FeatureRankerConfig(num_features=3, hidden_sizes=(8,), dropout=0.0)).save_pretrained(tmp_path / "features")
    rows = [row | {"features": torch.randn(len(row["documents"]), 3).tolist()} for row in text_rows(QUERIES)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    return tmp_path


def batch(kind, tokenizer, rows):
    inputs = (BiEncoderCollator if kind == "bi-encoder" else CrossEncoderCollator)(tokenizer)(rows)
    return inputs, inputs.pop("labels")


def gradient(model, inputs, targets, size, autocast=False):
    """(loss, gradient, random state afterwards) of one batch."""
    torch.manual_seed(1)
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        logits = gradient_cache.forward_in_passes(model.train(), inputs, size)
    loss = pile_fast.pile_loss(logits.float(), targets["teacher_logits"], targets["labels"], cu_seqlens=targets["cu_seqlens"])
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]), torch.get_rng_state()


# 1: every text alone; 7: the last pass is short; 16: a bi-encoder's queries need one pass, its documents several.
@pytest.mark.parametrize("size", [1, 7, 16])
@pytest.mark.parametrize("kind", TEXT)
def test_passes_give_the_loss_and_gradient_of_the_whole(kind, size, tiny_text_model, tiny_tokenizer, text_rows):
    model = tiny_text_model(kind)
    inputs, targets = batch(kind, tiny_tokenizer, text_rows(5))
    loss, whole, _ = gradient(model, inputs, targets, None)
    loss_in_passes, in_passes, _ = gradient(model, inputs, targets, size)
    assert loss_in_passes == pytest.approx(loss, rel=1e-5)
    torch.testing.assert_close(in_passes, whole, rtol=1e-4, atol=1e-6 * whole.abs().max().item())
    assert whole.abs().max() > 0


# Dropout draws by pass, so the step to equal is that of the same passes with all their activations kept.
@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated")
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", TEXT)
def test_passes_with_dropout_run_twice_alike(
    monkeypatch, kind, autocast, checkpointing, tiny_text_model, tiny_tokenizer, text_rows
):
    model = tiny_text_model(kind, dropout=0.3)
    if checkpointing:
        model.gradient_checkpointing_enable()
    inputs, targets = batch(kind, tiny_tokenizer, text_rows(6))
    loss, cached, state = gradient(model, inputs, targets, 7, autocast)
    monkeypatch.setattr(gradient_cache, "checkpoint", lambda function, use_reentrant, **inputs: function(**inputs))
    kept_loss, kept, kept_state = gradient(model, inputs, targets, 7, autocast)
    assert loss == kept_loss and torch.equal(state, kept_state)
    torch.testing.assert_close(cached, kept, rtol=1e-5, atol=1e-6 * kept.abs().max().item())
    without = gradient(model.apply(lambda m: setattr(m, "p", 0.0) if isinstance(m, torch.nn.Dropout) else None),
                       inputs, targets, 7, autocast)[0]  # fmt: skip
    assert loss != without  # there was dropout


def test_bf16_passes_sum_their_gradients_in_float32(tiny_text_model, tiny_tokenizer, text_rows):
    model = tiny_text_model("cross-encoder")
    inputs, targets = batch("cross-encoder", tiny_tokenizer, text_rows(40))
    _, found, _ = gradient(model, inputs, targets, 2, True)

    # By hand: the loss's gradient with respect to the logits, then each pass on its own.
    def forward(tokens):
        with torch.autocast("cpu", torch.bfloat16):
            return model(**tokens).logits.squeeze(1).float()

    order, passes = gradient_cache._split(inputs, 2)
    with torch.no_grad():
        logits = torch.cat([forward(tokens) for tokens in passes])[order.argsort()]
    logits.requires_grad_()
    teachers, labels, cu_seqlens = (targets[name] for name in ("teacher_logits", "labels", "cu_seqlens"))
    pile_fast.pile_loss(logits, teachers, labels, cu_seqlens=cu_seqlens).backward()
    model.zero_grad()
    for tokens, upstream in zip(passes, logits.grad[order].split(2), strict=True):
        forward(tokens).backward(upstream)
    expected = torch.cat([p.grad.flatten() for p in model.parameters()])
    assert len(passes) > 90 and (found - expected).norm() < 1e-5 * expected.norm()


@pytest.mark.parametrize("kind", TEXT)
def test_no_pass_is_larger_or_more_padded_than_it_must_be(kind, tiny_text_model, tiny_tokenizer, text_rows):
    model = tiny_text_model(kind)
    inputs, targets = batch(kind, tiny_tokenizer, text_rows(9))
    calls = []
    embeddings = (model.encoder if kind == "bi-encoder" else model.bert).embeddings
    embeddings.register_forward_pre_hook(lambda module, args, kwargs: calls.append(kwargs["input_ids"]), with_kwargs=True)
    gradient(model, inputs, targets, 8)
    documents = len(targets["labels"])
    passes = -(-documents // 8) + (2 if kind == "bi-encoder" else 0)  # 9 queries in two passes
    assert len(calls) == 2 * passes - 1  # the last one keeps its activations
    for tokens in calls:
        assert len(tokens) <= 8 and (tokens > 0).any(0).all()  # no column of padding alone
    lengths = [tokens.shape[1] for tokens in calls[passes - -(-documents // 8) : passes]]
    assert lengths == sorted(lengths, reverse=True) and lengths[0] > lengths[-1]


def test_left_padding_is_cut_too(tiny_text_model, tiny_tokenizer, text_rows):
    inputs, _ = batch("cross-encoder", tiny_tokenizer, text_rows(9))
    left = {name: tensor.flip(1) for name, tensor in inputs.items()}
    _, passes = gradient_cache._split(left, 8)
    assert all(tokens["attention_mask"].any(0).all() for tokens in passes)


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("kind", TEXT)
def test_steps_do_not_depend_on_passes_nor_accumulation_nor_whose_trainer_it_is(folder, kind, accumulation):
    expected, losses, _ = worker.steps(folder, kind, max_steps=3)
    start = worker.trainer(folder, kind).model
    assert (expected - torch.cat([p.detach().flatten() for p in start.parameters()])).abs().max() > 1e-3
    batches = {"per_device_train_batch_size": 8 // accumulation, "gradient_accumulation_steps": accumulation, "max_steps": 3}
    for case in ({}, {"passes": 5}, {"own": True}):
        weights, logged, _ = worker.steps(folder, kind, **case, **batches)
        torch.testing.assert_close(weights, expected, rtol=1e-3, atol=2e-5)
        assert logged == pytest.approx(losses, abs=2e-4)  # the Trainer rounds what it logs


@pytest.mark.parametrize("kind", TEXT)
def test_bf16_steps_in_passes(folder, kind):
    expected = worker.steps(folder, kind, bf16=True)[0]
    weights = worker.steps(folder, kind, bf16=True, passes=5)[0]
    full = worker.steps(folder, kind)[0]
    assert (weights - expected).norm() < 2 * (expected - full).norm() and not torch.equal(expected, full)


# 2 processes × 4 queries: their numbers of passes differ. In evaluation the last batch is short, and queries are repeated
# to fill it.
@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")
def test_two_processes_take_the_same_steps_as_one(folder):
    one = {"per_device_train_batch_size": 4, "evaluation": True, "per_device_eval_batch_size": 5}
    two = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    cases = {"features": {"kind": "features"} | two, "features evaluated": {"kind": "features"} | one}
    for kind in TEXT:
        cases[f"{kind} in passes"] = {"kind": kind, "passes": 3} | one
        cases[f"{kind} in passes, accumulated"] = {"kind": kind, "passes": 3} | two
        cases[f"{kind} with its own Trainer"] = {"kind": kind, "own": True} | two
    # A5: both stop at once, or the next case would wait for ever.
    cases["spoiled"] = {"kind": "features", "spoil": "features", "train_sampling_strategy": "sequential"} | two
    cases["spoiled gradient"] = {"kind": "features", "spoil": "gradient"} | two
    cases["stream"] = {"kind": "features", "stream": True} | one
    cases["checkpointing"] = cases["cross-encoder in passes"] | {"gradient_checkpointing": True, "evaluation": None}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", WORKER]
    result = subprocess.run(
        [*launch, folder, json.dumps(cases)], capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert result.returncode == 0, result.stderr
    expected = {kind: worker.steps(folder, kind, evaluation=True) for kind in KINDS}
    results = torch.load(folder / "results.pt")
    message = r"step 1: the loss is not finite for query 'q5'; the student's logits are not finite there"
    assert re.fullmatch(message, results.pop("spoiled"))
    message = r"step 1: the gradient of layers.0.weight is not finite; the step's queries: ('q\d+', ){4}'q\d+' and 3 more"
    assert re.fullmatch(message, results.pop("spoiled gradient"))
    fitted = worker.LEARNED[0]
    expected["stream"] = worker.steps(folder, "features", stream=True, evaluation=True)
    # The teachers' weights: the same bits on both processes; fitted, also those of one process.
    first, second = (torch.load(folder / f"learned{rank}.pt") for rank in range(2))
    for name, state in first.items():
        if "own" not in cases[name]:
            assert all(torch.equal(value, second[name][key]) for key, value in state.items()), name
            wanted = worker.LEARNED[0] if name == "stream" else fitted
            assert state["fitted"] == (name != "stream") and state["labelled_queries"] == wanted["labelled_queries"] > 0
            torch.testing.assert_close(state["weights"], wanted["weights"], rtol=1e-5 if name == "stream" else 0, atol=0)
    cases["stream"]["kind"] = "stream"
    for name, (weights, _, metrics) in results.items():
        one, _, one_metrics = expected[cases[name]["kind"]]
        torch.testing.assert_close(weights, one, rtol=1e-3, atol=2e-5, msg=name)
        for metric in ("ndcg@10", "mrr", "map", "pnr") if metrics else ():
            assert metrics[f"eval_{metric}"] == pytest.approx(one_metrics[f"eval_{metric}"], rel=1e-4), name


class Interrupt(TrainerCallback):
    def on_step_end(self, arguments, state, control, **kwargs):
        if state.global_step == 5:
            raise KeyboardInterrupt


# Stopped after step 5 in the second epoch, resumed from step 4: three batches of the epoch are skipped.
def test_resumed_training_ends_at_the_same_weights(folder, tiny_text_model):
    tiny_text_model("cross-encoder", dropout=0.3).save_pretrained(folder / "cross-encoder")
    settings = {"kind": "cross-encoder", "passes": 5, "max_steps": 8, "per_device_train_batch_size": 4,
                "gradient_accumulation_steps": 2, "optim": "adamw_torch", "learning_rate": 1e-2,
                "save_strategy": "steps", "save_steps": 2}  # fmt: skip
    expected, losses, _ = worker.steps(folder, **settings, output_dir=folder / "whole")
    with pytest.raises(KeyboardInterrupt):
        worker.trainer(folder, **settings, callbacks=[Interrupt()]).train()
    # As if killed while it wrote the next one, and in the middle of another.
    shutil.copytree(folder / "out/checkpoint-4", folder / "out/checkpoint-6")
    (folder / "out/checkpoint-6/trainer_state.json").write_text('{"global_step": 6')
    (folder / "out/checkpoint-8").mkdir()
    run = worker.trainer(folder, **settings)
    run.train(resume_from_checkpoint=True)
    weights = torch.cat([p.detach().flatten() for p in run.model.parameters()])
    assert torch.equal(weights, expected)
    assert [entry["loss"] for entry in run.state.log_history if "loss" in entry] == losses


def test_only_whole_checkpoints_are_resumed(tmp_path):
    def checkpoint(step, processes=1):
        path = tmp_path / f"checkpoint-{step}"
        path.mkdir()
        (path / "trainer_state.json").write_text("{}")
        for name in ["rng_state.pth"] if processes == 1 else [f"rng_state_{i}.pth" for i in range(processes)]:
            torch.save({"cpu": torch.get_rng_state()}, path / name)
        return path

    assert last_checkpoint(tmp_path) is None
    assert last_checkpoint(tmp_path / "nowhere") is None
    whole = checkpoint(9)
    (tmp_path / "checkpoint-best").mkdir()
    assert last_checkpoint(tmp_path) == str(whole)
    cut = checkpoint(10) / "rng_state.pth"
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")  # by number, not by name
    cut.write_bytes(cut.read_bytes()[:-100])
    assert last_checkpoint(tmp_path) == str(whole)
    two = checkpoint(11, processes=2)
    assert last_checkpoint(tmp_path, processes=2) == str(two)
    assert last_checkpoint(tmp_path, processes=3) is None
    (two / "rng_state_1.pth").unlink()
    assert last_checkpoint(tmp_path, processes=2) is None
    with pytest.raises(ValueError, match="No valid checkpoint found"):
        PileTrainer(ranker_of_two(), arguments(tmp_path / "none"), train_dataset=FEATURES).train(resume_from_checkpoint=True)


FEATURES = [
    {"query_id": "a", "features": [[0.0, 1.0], [1.0, 0.0], [1.0, 1.0]], "labels": [2, 0, None],
     "teacher_logits": [[1.0, 0.0], [0.5, 0.2], [None, None]], "teachers": ["good", "bad"]},
    {"query_id": "b", "features": [[0.3, 0.1], [0.2, 0.9]], "labels": [0, 1], "teacher_logits": [[0.1, 0.3], [None, 0.1]],
     "teachers": ["good", "bad"]},
]  # fmt: skip


def ranker_of_two():
    return FeatureRanker(FeatureRankerConfig(num_features=2, hidden_sizes=(4,), dropout=0.0))


def arguments(folder, **options):
    options = {"max_steps": 1, "save_strategy": "no", "report_to": "none", "disable_tqdm": True, "use_cpu": True,
               "logging_steps": 1} | options  # fmt: skip
    return TrainingArguments(str(folder), **options)


def as_dataset(rows):
    return datasets.Dataset.from_list(rows)


@pytest.mark.parametrize("form", [list, as_dataset])
def test_rows_in_any_form_train_a_feature_ranker(tmp_path, form):
    model = ranker_of_two()
    with torch.no_grad():
        logits = model(torch.tensor([x for row in FEATURES for x in row["features"]]))
    nan = torch.nan
    teachers = torch.tensor([[1.0, 0.0], [0.5, 0.2], [nan, nan], [0.1, 0.3], [nan, 0.1]])
    labels = torch.tensor([2.0, 0.0, nan, 0.0, 1.0])
    # The batch is all of the training rows: the weights are those that it is fitted to.
    expected = pile_fast.pile_loss(logits, teachers, labels, cu_seqlens=torch.tensor([0, 3, 5]), alpha=0.5)
    run = PileTrainer(
        model, arguments(tmp_path), loss=pile_fast.PILELoss(alpha=0.5, reduction="none"), train_dataset=form(FEATURES)
    )
    run.train()
    assert run.state.log_history[0]["loss"] == pytest.approx(expected.item(), abs=1e-4)


def test_labels_alone_need_no_teachers(tmp_path):
    rows = [{name: row[name] for name in ("query_id", "features", "labels")} for row in FEATURES]
    loss = pile_fast.PILELoss(alpha=0.0, reduction="none")
    run = PileTrainer(ranker_of_two(), arguments(tmp_path), loss=loss, train_dataset=rows)
    run.train()
    entry = run.state.log_history[0]
    assert entry["loss"] == pytest.approx(entry["label_loss"], abs=1e-4) and "distillation_loss" not in entry
    with pytest.raises(ValueError, match="teacher_logits: expected at least one teacher"):
        PileTrainer(ranker_of_two(), arguments(tmp_path), train_dataset=rows).train()


@pytest.mark.parametrize(
    "row, message",
    [
        ({"features": [[0.0, 1.0], [1.0]]}, "query 'c': features: expected numbers, equally many per document"),
        ({"labels": ["high", "low"]}, "query 'c': labels: expected numbers, equally many per document: .*'high'"),
        ({"labels": [1]}, "query 'c': labels: expected one per document, 2, got 1"),
        ({"teacher_logits": [[0.1], [0.2]]}, "query 'c': teacher_logits: expected as many teachers as in query 'a', 2, got 1"),
        ({"teacher_logits": [0.1, 0.2]}, r"query 'c': teacher_logits: expected 2 dimension\(s\), got \(2,\)"),
        ({"features": None, "documents": ["x", "y"]}, "query 'c': no 'features', which this student needs; the row has"),
        ({"features": []}, "query 'c': no documents"),
    ],
)
def test_row_that_does_not_fit_is_named(tmp_path, row, message):
    broken = FEATURES[1] | {"query_id": "c"} | row
    with pytest.raises(ValueError, match=message):
        PileTrainer(ranker_of_two(), arguments(tmp_path), train_dataset=[FEATURES[0], broken]).train()


def test_arguments_that_do_not_fit(tmp_path, tiny_text_model, tiny_tokenizer, text_rows):
    with pytest.raises(ValueError, match="processing_class: expected the text model's tokenizer, got None"):
        PileTrainer(tiny_text_model("cross-encoder"), arguments(tmp_path))
    with pytest.raises(ValueError, match="max_documents_per_batch: expected a whole number >= 1, got 0"):
        PileTrainer(ranker_of_two(), arguments(tmp_path), max_documents_per_batch=0)
    two = PileTrainer(tiny_text_model("cross-encoder", outputs=2), arguments(tmp_path), processing_class=tiny_tokenizer,
                      train_dataset=text_rows(1, documents=(3, 3)))  # fmt: skip
    with pytest.raises(ValueError, match=r"model: expected one logit per document, \(3,\), got \(3, 2\)"):
        two.train()


@pytest.mark.parametrize("kind", TEXT)
def test_evaluation_measures_every_query(folder, kind, text_rows):
    rows = text_rows(13, seed=3)
    run = worker.trainer(folder, kind, evaluation=as_dataset(rows), passes=4, per_device_eval_batch_size=5)
    metrics = run.evaluate()
    scores = torch.cat(load_ranker(folder / kind).score(rows))
    lengths = torch.tensor([0, *(len(row["documents"]) for row in rows)]).cumsum(0)
    labels = torch.tensor([torch.nan if y is None else float(y) for row in rows for y in row["labels"]])
    for name, value in ranking_quality(scores, labels, cu_seqlens=lengths).items():
        assert metrics[f"eval_{name}"] == pytest.approx(value, abs=1e-6)
    assert {"eval_ndcg@10", "eval_mrr", "eval_map", "eval_pnr"} <= metrics.keys()


def test_rank_cut_of_the_metric(tmp_path):
    metrics = PileTrainer(ranker_of_two(), arguments(tmp_path), k=3, eval_dataset=FEATURES).evaluate()
    assert "eval_ndcg@3" in metrics and "eval_ndcg@10" not in metrics


def test_loss_components_and_teacher_weights_are_logged(folder):
    run = worker.trainer(folder, "cross-encoder", max_steps=4, logging_steps=2, passes=5)
    seen = []
    run.add_callback(Seen(seen))
    run.train()
    entries = [entry for entry in run.state.log_history if "loss" in entry]
    assert [entry["step"] for entry in entries] == [2, 4] and set(seen) == entries[-1].keys() - {"step"}
    for entry in entries:
        weights = [entry[f"teacher_weight/{name}"] for name in ("t0", "t1")]
        assert sum(weights) == pytest.approx(1, abs=1e-5) and min(weights) > 0
        assert 0 < entry["teacher_weight_entropy"] <= math.log(2) + 1e-6
        assert entry["distillation_loss"] > 0 and entry["label_loss"] > 0
    quiet = worker.trainer(folder, "cross-encoder", log=False)
    quiet.train()
    assert {name for entry in quiet.state.log_history for name in entry} & {"label_loss", "teacher_weight_entropy"} == set()


class Seen(TrainerCallback):
    """What TensorBoard and the like are given."""

    def __init__(self, seen):
        self.seen = seen

    def on_log(self, arguments, state, control, logs, **kwargs):
        if "loss" in logs:
            self.seen[:] = sorted(logs)


@pytest.mark.parametrize("options", [{}, {"granularity": "query"}, {"distillation": "mse", "prior": torch.tensor([3.0, 1.0])}])
def test_components_are_the_parts_of_the_loss(tiny_tokenizer, text_rows, options):
    _, targets = batch("cross-encoder", tiny_tokenizer, text_rows(12))
    logits = torch.randn(len(targets["labels"]))
    layout = (targets["teacher_logits"], targets["labels"], None, targets["cu_seqlens"])
    loss = pile_fast.PILELoss(alpha=0.3, **options)
    if loss.learns:
        loss.fit([targets])
    found = loss_components(loss, logits, targets, ["a", "b"])
    for name, alpha in (("distillation_loss", 1.0), ("label_loss", 0.0)):
        part = pile_fast.PILELoss(alpha=alpha, **options)
        part = part.fit([targets]) if part.learns else part
        assert found[name] == pytest.approx(part(logits, *layout).item(), rel=1e-5)
    if loss.learns:
        assert [found["teacher_weight/a"], found["teacher_weight/b"]] == pytest.approx(loss.weights.tolist())
    mean = loss_components(pile_fast.PILELoss(iterations=0), logits, targets)
    if not options:  # teachers that are both there weigh the same before the first step
        assert mean["teacher_weight_entropy"] > found["teacher_weight_entropy"]
        assert {"teacher_weight/1", "teacher_weight/2"} <= mean.keys()


def test_the_documentation_s_snippets_run(tmp_path, monkeypatch, tiny_text_model, tiny_tokenizer, text_rows):
    text = (Path(__file__).parents[1] / "docs/training.md").read_text()
    text = text.replace("sentence-transformers/all-MiniLM-L6-v2", str(tmp_path / "model"))
    text = text.replace("--num-layers 3", "--num-layers 2").replace("num_layers: 3", "num_layers: 2")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    tiny_text_model("encoder").save_pretrained("model")
    tiny_tokenizer.save_pretrained("model")
    for name in ("train", "validation"):
        Path(f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in text_rows(9)))
    blocks = re.findall(r"```(\w+)\n(.*?)```", text, re.S)
    Path("run.yaml").write_text(next(code for language, code in blocks if language == "yaml"))
    commands = [shlex.split(code.replace("\\\n", "")) for language, code in blocks if language == "bash"]
    ours = [command for command in commands if command[0] == "pile-fast"]
    torchrun = ["torchrun", "--nproc-per-node=2", "-m", "pile_fast"]  # is run by test_cli_train
    assert len(ours) == 2 and [command[:4] for command in commands if command not in ours] == [torchrun]
    for command in ours:
        assert main(command[1:]) == 0
    scope = {}
    for language, code in blocks:
        if language == "python":
            exec(code, scope)
    assert scope["ranker"].kind == "cross-encoder"
