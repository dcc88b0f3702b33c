import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

import pile_fast
from pile_fast.cli import main, train
from pile_fast.data import TeacherWeights, make_synthetic, missing_as_bottom, write_rows
from pile_fast.students import BiEncoder, FeatureRanker, FeatureRankerConfig, load_ranker

pytestmark = pytest.mark.usefixtures("one_thread")

QUICK = ["--use-cpu", "--disable-tqdm", "True", "--max-steps", "3", "--learning-rate", "0.01", "--logging-steps", "1"]


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def features():
    """train.jsonl and validation.jsonl with features and the teachers "teacher 1" to "teacher 6"."""
    lists = make_synthetic(40, documents=(2, 8), num_features=5)
    rows = [{"query_id": name, **{key: as_lists(tensor) for key, tensor in row.items()}, "teachers": list(lists.teacher_names)}
            for name, row in zip(lists.query_ids, lists, strict=True)]  # fmt: skip
    write("train.jsonl", rows[:30])
    write("validation.jsonl", rows[30:])
    return rows


def as_lists(tensor):
    def none(value):
        return [none(item) for item in value] if isinstance(value, list) else None if value != value else value

    return none(tensor.tolist())


def write(path, rows):
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def text(tiny_text_model, tiny_tokenizer, text_rows):
    """train.parquet, validation.jsonl and the folder "encoder"."""
    write_rows("train.parquet", text_rows(20))
    write_rows("validation.jsonl", text_rows(6, seed=1))
    tiny_text_model("encoder", dropout=0.1).save_pretrained("encoder")
    tiny_tokenizer.save_pretrained("encoder")


def run(*arguments, output="out"):
    """The trained weights of a command that must end well."""
    assert main(["train", *arguments, *QUICK, "--output-dir", output]) == 0
    return load_file(f"{output}/model.safetensors")


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def error(capsys, *arguments):
    """The exit code and the one line that the command ends with, after whatever progress there was."""
    code = main(["train", *arguments])
    err = capsys.readouterr().err
    assert err.count("error:") == 1 and "Traceback" not in err
    return code, err.strip().splitlines()[-1]


FEATURES = ("train.jsonl", "--student", "features")


def test_feature_student_from_files_to_a_saved_ranker(capsys, features):
    run(*FEATURES, "--validation", "validation.jsonl", "--hidden-sizes", "8", "--ndcg-k", "3", "--alpha", "0.5")
    out = capsys.readouterr().out
    metrics = json.loads(Path("out/eval_results.json").read_text())
    for name in ("loss", "ndcg@3", "mrr", "map", "pnr"):
        assert f"{name} {metrics[f'eval_{name}']:.4f}" in out
    assert out.strip().endswith("Wrote out.") and not Path("out/student.tmp").exists()
    student = load_ranker("out")
    assert isinstance(student.model, FeatureRanker) and student.model.config.hidden_sizes == [8]
    assert student.model.mean.abs().max() > 0  # standardised on the training rows
    scores = student.score(features[30:])
    assert [len(s) for s in scores] == [len(row["labels"]) for row in features[30:]]
    logs = json.loads(Path("out/trainer_state.json").read_text())["log_history"]
    assert logs[0]["label_loss"] > 0 and 0 < logs[0]["teacher_weight/teacher 1"] < 1
    weights = TeacherWeights.load("out/teacher_weights.json")  # as they were when training began
    assert logs[0]["teacher_weight/teacher 1"] == pytest.approx(weights.weights["teacher 1"])
    assert list(weights.weights) == features[0]["teachers"] and 0 < weights.labelled_queries <= 30
    assert f"Teachers' weights (from {weights.labelled_queries} labelled queries): {weights}." in out.splitlines()


@pytest.mark.parametrize("student, extra", [("cross-encoder", []), ("bi-encoder", ["--pooling", "cls", "--scale", "9"])])
def test_text_student(student, extra, text, text_rows):
    run("train.parquet", "--student", student, "--model", "encoder", "--num-layers", "1", "--max-length", "16", *extra,
        "--validation", "validation.jsonl", "--max-documents-per-batch", "8")  # fmt: skip
    ranker = load_ranker("out")
    assert ranker.kind == student and ranker.collator.max_length == 16
    config = ranker.model.config
    if student == "bi-encoder":
        assert isinstance(ranker.model, BiEncoder) and (config.pooling, config.scale) == ("cls", 9.0)
    assert getattr(config, "encoder", config).num_hidden_layers == 1
    assert all(scores.isfinite().all() for scores in ranker.score(text_rows(3)))
    assert {"eval_ndcg@10", "eval_map"} <= json.loads(Path("out/eval_results.json").read_text()).keys()


def test_trained_student_is_a_start_for_another(text):
    student = ("train.parquet", "--student", "bi-encoder", "--model")
    weights = run(*student, "encoder", "--scale", "3", "--similarity", "dot")
    assert main(["train", *student, "out", *QUICK, "--learning-rate", "0", "--scale", "4", "--output-dir", "more"]) == 0
    assert same(weights, load_file("more/model.safetensors"))
    config = load_ranker("more").model.config
    assert (config.scale, config.similarity) == (4, "dot")
    run(*student, "out", "--num-layers", "1", output="less")
    assert load_ranker("less").model.config.encoder.num_hidden_layers == 1


def test_teacher_columns_are_the_teachers_there_are(text, text_rows, features):
    rows = [row | {"teacher_logits": [scores[::-1] for scores in row["teacher_logits"]], "teachers": ["t1", "t0"]}
            for row in text_rows(20)]  # fmt: skip
    write_rows("swapped.jsonl", rows)
    write_rows("one.jsonl", [row | {"teacher_logits": [s[1:] for s in row["teacher_logits"]], "teachers": ["t0"]}
                             for row in rows])  # fmt: skip
    student = ("--student", "cross-encoder", "--model", "encoder")
    chosen = run("swapped.jsonl", *student, "--teacher-columns", "t0", output="chosen")
    assert same(chosen, run("one.jsonl", *student, output="one"))
    assert not same(chosen, run("swapped.jsonl", *student, output="both"))
    logs = json.loads(Path("chosen/trainer_state.json").read_text())["log_history"]
    assert logs[0]["teacher_weight/t0"] == 1

    write("two.jsonl", [row | {"teacher_logits": [[s[4], s[1]] for s in row["teacher_logits"]], "teachers": ["e", "b"]}
                        for row in features])  # fmt: skip
    write("all.jsonl", features)
    chosen = run("all.jsonl", "--student", "features", "--teacher-columns", "teacher 5", "teacher 2", output="f1")
    assert same(chosen, run("two.jsonl", "--student", "features", output="f2"))


@pytest.mark.parametrize("kind", ["features", "text"])
def test_ensemble_logits_are_distilled_as_they_are(kind, text, features, text_rows):
    rows, student = (
        (features, ("--student", "features"))
        if kind == "features"
        else (text_rows(20), ("--student", "cross-encoder", "--model", "encoder"))
    )
    for row in rows:
        logits = torch.tensor([[torch.nan if t is None else t for t in scores] for scores in row["teacher_logits"]])
        labels = torch.tensor([torch.nan if y is None else float(y) for y in row["labels"]])
        own = pile_fast.pile_ensemble(logits[None], labels[None], iterations=3, granularity="document")
        row["ensemble_logits"] = as_lists(own.logits[0])
    write("ensembled.jsonl", rows)
    student += ("--alpha", "0.5")  # both go by label, so their sums have one order: Adam makes much of a gradient's rounding
    offline = run("ensembled.jsonl", *student, "--ensemble-logits", output="offline")
    assert not Path("offline/teacher_weights.json").exists()
    online = run("ensembled.jsonl", *student, "--iterations", "3", "--granularity", "document", output="online")
    for name in online:
        torch.testing.assert_close(offline[name], online[name], rtol=1e-3, atol=1e-5)
    assert not same(online, run("ensembled.jsonl", *student, "--iterations", "0", output="mean"))


@pytest.mark.parametrize("kind", ["features", "text"])
def test_shared_weights_offline_are_those_of_training(kind, text, features, text_rows):
    student = ("--student", "features") if kind == "features" else ("--student", "cross-encoder", "--model", "encoder")
    write("all.jsonl", features if kind == "features" else text_rows(20))
    online = run("all.jsonl", *student, output="online")
    assert main(["ensemble", "all.jsonl", "--output", "ensembled.jsonl"]) == 0
    offline = run("ensembled.jsonl", *student, "--ensemble-logits", output="offline")
    weighed = ["ensemble", "all.jsonl", "--output", "weighed.jsonl", "--weights", "online/teacher_weights.json"]
    assert main(weighed) == 0
    assert Path("weighed.jsonl").read_text() == Path("ensembled.jsonl").read_text()
    for name in online:
        torch.testing.assert_close(offline[name], online[name], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("kind", ["features", "text"])
@pytest.mark.parametrize("chosen", [[], ["--teacher-columns", "t1"]])
def test_many_missing_scores_are_told_and_may_be_the_bottom(capsys, kind, chosen, text, features, text_rows):
    student = ("--student", "features") if kind == "features" else ("--student", "cross-encoder", "--model", "encoder")
    rows, filled = [], []
    for row in features if kind == "features" else text_rows(20):
        scores = [[s[0], s[1] if i % 4 == 0 else None] for i, s in enumerate(row["teacher_logits"])]
        rows.append(row | {"teacher_logits": scores, "teachers": ["t0", "t1"]})
        logits = torch.tensor([[torch.nan if t is None else t for t in own] for own in scores])
        bottom = as_lists(missing_as_bottom(logits, torch.tensor([0, len(scores)])))
        filled.append(rows[-1] | {"teacher_logits": bottom})
    write("cut.jsonl", rows)
    write("filled.jsonl", filled)
    capsys.readouterr()
    as_missing = run("cut.jsonl", *student, *chosen, output="nan")
    lost, total = (sum(t is None for row in rows for s in row["teacher_logits"] for t in s[len(chosen) // 2 :]),
                   sum(len(s[len(chosen) // 2 :]) for row in rows for s in row["teacher_logits"]))  # fmt: skip
    err = capsys.readouterr().err
    assert f"pile-fast: warning: cut.jsonl: {lost:,} of {total:,} scores of the teachers are missing (" in err
    read = run("cut.jsonl", *student, *chosen, "--missing", "bottom", output="bottom")
    assert "are missing" not in capsys.readouterr().err
    assert same(read, run("filled.jsonl", *student, *chosen, output="filled")) and not same(read, as_missing)


@pytest.mark.parametrize("suffix", ["yaml", "json"])
def test_config_file_and_flags_that_override_it(features, suffix):
    options = {
        "data": ["train.jsonl"], "student": "features", "output_dir": "out", "hidden-sizes": [4], "alpha": 0.25,
        "teacher_columns": ["teacher 1", "teacher 3"], "use_cpu": True, "disable_tqdm": True, "max_steps": 9,
        "learning_rate": "1e-2", "optim": "sgd", "lr_scheduler_kwargs": {}, "no_loss_components": True,
        "skip_bad_rows": False, "validation": None, "report_to": ["none"],
    }  # fmt: skip
    dump = yaml.safe_dump if suffix == "yaml" else json.dumps
    Path(f"run.{suffix}").write_text(dump(options))
    assert main(["train", "--config", f"run.{suffix}", "--max-steps", "2", "--logging-steps", "1"]) == 0
    flags = ["train.jsonl", "--student", "features", "--output_dir", "flags", "--hidden-sizes", "4", "--alpha", "0.25",
             "--teacher-columns", "teacher 1", "teacher 3", "--use_cpu", "--disable_tqdm", "True", "--max_steps", "2",
             "--learning_rate", "1e-2", "--optim", "sgd"]  # fmt: skip
    assert main(["train", *flags]) == 0
    assert same(load_file("out/model.safetensors"), load_file("flags/model.safetensors"))
    state = json.loads(Path("out/trainer_state.json").read_text())
    assert state["global_step"] == 2 and "label_loss" not in state["log_history"][0]


@pytest.mark.parametrize(
    "content, message",
    [
        ("tempo: 3", "--config run.yaml: unknown option 'tempo'"),
        ("- 3", "--config run.yaml: expected options as 'name: value', got list"),
        ("alpha: [", "--config run.yaml: while parsing"),
        ("learning_rate: fast", "--config run.yaml: argument --learning_rate/--learning-rate: invalid float value: 'fast'"),
        ("student: tree", "--config run.yaml: argument --student: invalid choice: 'tree'"),
        (None, "--config run.yaml: No such file or directory"),
    ],
)
def test_broken_config_file(capsys, content, message):
    if content is not None:
        Path("run.yaml").write_text(content)
    code, line = error(capsys, "--config", "run.yaml")
    assert code == 2 and line.startswith(f"pile-fast train: error: {message}")


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "DATA is missing"),
        (["x.jsonl", "--output-dir", "out"], "--student is missing"),
        (["x.jsonl", "--student", "features"], "--output-dir is missing"),
        (["x.jsonl", "--student", "tree"], "argument --student: invalid choice: 'tree'"),
        (["x.jsonl", "--student", "bi-encoder", "--output-dir", "out"], "--student bi-encoder needs --model"),
        (["x.jsonl", "--num-layers", "0"], "argument --num-layers: expected a whole number >= 1, got '0'"),
        (["x.jsonl", "--learning-rate", "fast"], "argument --learning_rate/--learning-rate: invalid float value: 'fast'"),
        (["x.jsonl", "--alpha", "2"], "argument --alpha: expected a number >= 0 and <= 1, got 2.0"),
        (["x.jsonl", "--label-loss", "hinge"], "argument --label-loss: expected one of 'logistic'"),
        (["x.jsonl", "--distillation", "logistic:temperature=0"], "argument --distillation: Logistic: temperature: expected a"),
        (["x.jsonl", "--config"], "argument --config: expected one argument"),
        (["x.jsonl", "--tempo", "3"], "unrecognized arguments: --tempo"),
    ],
)
def test_wrong_command_line(capsys, arguments, message):
    code, line = error(capsys, *arguments)
    assert code == 2 and message in line


OUT = ("--output-dir", "out", "--use-cpu")
BEST = ("--load-best-model-at-end", "--save-strategy", "epoch")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("none.jsonl", "--student", "features"), "none.jsonl: no such file"),
        ((*FEATURES, "--teacher-columns", "bm25"), "--teacher-columns: no teacher 'bm25' in the data, there are: teacher 1, "),
        ((*FEATURES, "--prior", "1", "2"), "--prior: expected a weight for each of the 6 teachers, got 2"),
        ((*FEATURES, "--ensemble-logits"), "query 'q0': no ensemble_logits; write them with pile-fast ensemble"),
        ((*FEATURES, "--ensemble-logits", "--iterations", "3"), "--iterations: does not go with --ensemble-logits"),
        ((*FEATURES, "--ensemble-logits", "--teacher-columns", "a"), "--teacher-columns: does not go with --ensemble-logits"),
        ((*FEATURES, "--save-strategy", "steps", "--load-best-model-at-end", "--validation", "validation.jsonl"),
         "--load_best_model_at_end requires the save and eval strategy to match"),
        ((*FEATURES, "--report-to", "codecarbon"), "requires `codecarbon` to be installed"),
        ((*FEATURES, "--model", "."), ".: no model in this folder, it has no config.json"),
        ((*FEATURES, "--resume-from-checkpoint", "nowhere"), "nowhere"),
        (("train.jsonl", "--student", "cross-encoder", "--model", "ranker"), "query 'q0': no 'query', which a cross-encoder"),
        (("labels.jsonl", "--student", "features"), "the data has no teacher_logits: add teachers (pile-fast score), or train"),
        (("broken.jsonl", "--student", "features"), "broken.jsonl:2: "),
    ],
)  # fmt: skip
def test_what_the_user_can_put_right(capsys, features, arguments, message):
    write("labels.jsonl", [{name: row[name] for name in ("query_id", "features", "labels")} for row in features])
    write("broken.jsonl", [features[0], features[1] | {"labels": ["good"]}])
    FeatureRanker(FeatureRankerConfig(num_features=5)).save_pretrained("ranker")
    code, line = error(capsys, *arguments, *OUT)
    assert code == 1 and line.startswith("pile-fast: error: ") and message in line
    assert not Path("out/config.json").exists()


def test_text_student_s_model_that_is_not_there(capsys, monkeypatch, text):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    student = ("train.parquet", "--student", "cross-encoder", *OUT)
    code, line = error(capsys, *student, "--model", "nobody/none")
    assert code == 1 and "nobody/none: no such folder, and could not be loaded from the Hugging Face hub: " in line
    code, line = error(capsys, *student, "--model", "encoder", "--num-layers", "3")
    assert code == 1 and "encoder: has 2 layers, of which the first 3 cannot be kept" in line


# A4, A5: files cannot hold what is not finite, a step can make it.
def test_numbers_that_are_not_finite_end_the_command(capsys, features):
    wild = ("--learning-rate", "1e38", "--optim", "sgd", "--save-steps", "1", "--max-grad-norm", "0")
    code, line = error(capsys, *FEATURES, *QUICK, *OUT, *wild)
    assert code == 1 and re.match(r"pile-fast: error: step 2: the loss is not finite for queries 'q\d+', 'q\d+', ", line)
    assert "; training stopped there and the last checkpoint is out/checkpoint-1. Look at these queries, or try a lower" in line
    assert [path.name for path in Path("out").iterdir()] == ["checkpoint-1"]
    once = ("--max-steps", "1", "--per-device-train-batch-size", "2")
    write("train.jsonl", [row | {"features": [[1e5 * x for x in xs] for xs in row["features"]]} for row in features])
    FeatureRanker(FeatureRankerConfig(num_features=5, hidden_sizes=())).save_pretrained("start")
    code, line = error(capsys, *FEATURES, *QUICK, *wild, *once, "--model", "start", "--output-dir", "new", "--use-cpu")
    assert code == 1 and "error: step 1: the weight of layers.0.weight is not finite after it; its queries: 'q" in line
    assert "there is no checkpoint" in line and not Path("new").exists()


# B2
def test_validation_with_negative_and_very_large_grades(capsys, features):
    write("validation.jsonl", [row | {"labels": [-2, 2000, *[1024] * (len(row["labels"]) - 2)]} for row in features[30:]])
    run(*FEATURES, "--validation", "validation.jsonl")
    metrics = json.loads(Path("out/eval_results.json").read_text())
    assert all(np.isfinite(metrics[f"eval_{name}"]) for name in ("loss", "ndcg@10", "mrr", "map", "pnr"))


def without(rows, *names):
    return [{name: value for name, value in row.items() if name not in names} for row in rows]


def swapped(rows):
    return [
        row | {"teachers": row["teachers"][::-1], "teacher_logits": [scores[::-1] for scores in row["teacher_logits"]]}
        for row in rows
    ]


def evaluated(output="out"):
    metrics = json.loads(Path(f"{output}/eval_results.json").read_text())
    return {name: value for name, value in metrics.items() if train._is_quality(name)}


# C6
@pytest.mark.parametrize("kind", ["features", "text"])
@pytest.mark.parametrize("flags", [[], ["--teacher-columns"], ["--ensemble-logits"]], ids=str)
def test_validation_without_teachers_gives_metrics_without_a_loss(capsys, kind, flags, text, features, text_rows):
    rows, student = (
        (features, ("--student", "features"))
        if kind == "features"
        else (text_rows(20), ("--student", "bi-encoder", "--model", "encoder"))
    )
    flags = flags + rows[0]["teachers"][:1] if flags == ["--teacher-columns"] else flags
    write("train.jsonl", [row | {"ensemble_logits": row["labels"]} for row in rows])
    write("validation.jsonl", without(rows[:9], "teachers", "teacher_logits"))
    run("train.jsonl", *student, *flags, "--validation", "validation.jsonl")
    captured = capsys.readouterr()
    assert captured.err.count("the rows have no teachers, so there is no loss, only metrics") == 1
    assert evaluated().keys() == {"eval_ndcg@10", "eval_mrr", "eval_map", "eval_pnr"} and "loss " not in captured.out


@pytest.mark.parametrize("kind", ["features", "text"])
def test_validation_s_teachers_are_matched_by_name(kind, text, features, text_rows):
    rows, student = (
        (features, ("--student", "features"))
        if kind == "features"
        else (text_rows(20), ("--student", "bi-encoder", "--model", "encoder"))
    )
    write("train.jsonl", rows)
    prior = ("--prior", *map(str, range(1, len(rows[0]["teachers"]) + 1)))
    more = [row | {"teachers": ["more", *row["teachers"]], "teacher_logits": [[9.0, *s] for s in row["teacher_logits"]]}
            for row in rows[:9]]  # fmt: skip
    for name, validation in (("same", rows[:9]), ("swapped", swapped(rows[:9])), ("more", more)):
        write("validation.jsonl", validation)
        run("train.jsonl", *student, *prior, "--validation", "validation.jsonl", output=name)
    assert evaluated("same") == evaluated("swapped") == evaluated("more")


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda row: row | {"features": [xs[:-1] for xs in row["features"]]},
         "query 'q30' of the evaluation rows: features: expected 5 per document as in the training rows, got 4"),
        (lambda row: row | {"teachers": ["x", *row["teachers"][1:]]}, "--validation: no teacher 'teacher 1' in its rows, as "),
        (lambda row: without([row], "features")[0], "query 'q30': expected features, the row has none"),
    ],
)  # fmt: skip
def test_validation_that_does_not_fit_is_known_before_the_first_step(capsys, features, change, message):
    write("validation.jsonl", list(map(change, features[30:])))
    code, line = error(capsys, *FEATURES, "--validation", "validation.jsonl", *QUICK, *OUT, "--save-steps", "1")
    assert code == 1 and message in line and not Path("out").exists()


def test_row_without_a_text_is_known_before_the_first_step(capsys, text, text_rows):
    rows = text_rows(20)
    for column in ("query", "documents"):
        write("gap.jsonl", [*rows[:9], *without(rows[9:10], column), *rows[10:]])
        code, line = error(capsys, "gap.jsonl", "--student", "bi-encoder", "--model", "encoder", *OUT)
        assert code == 1 and f"gap.jsonl: query 'q9': no {column!r}, which a bi-encoder needs" in line


# B12, C6, C8, and nothing of a folder where nothing was done.
@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--deepspeed", "ds.json"), "an option of the Trainer needs deepspeed"),
        (("--validation", "labels.jsonl", *BEST), "metric_for_best_model: 'loss' needs teachers in the rows of evaluation"),
        (
            ("--validation", "labels.jsonl", *BEST, "--metric-for-best-model", "ndcg@3"),
            "metric_for_best_model: expected one of",
        ),
    ],
)
def test_what_is_known_before_the_first_step(capsys, features, arguments, message):
    if "deepspeed" in message and importlib.util.find_spec("deepspeed"):
        pytest.skip("deepspeed is installed")
    Path("ds.json").write_text("{}")
    write("labels.jsonl", without(features, "teachers", "teacher_logits"))
    code, line = error(capsys, *FEATURES, *arguments, "--output-dir", "a/b", "--use-cpu")
    assert code == 1 and message in line and not Path("a").exists()


def test_labels_alone_without_a_label(capsys, features):
    write("train.jsonl", without(features, "labels"))
    code, line = error(capsys, *FEATURES, *QUICK, *OUT, "--alpha", "0")
    assert code == 1 and "labels: with alpha=0 they are all there is to learn from, and no training row has any" in line
    Path("empty.jsonl").touch()
    code, line = error(capsys, "empty.jsonl", "--student", "features", *OUT)
    assert code == 1 and "empty.jsonl: no rows" in line and not Path("out").exists()


@pytest.mark.parametrize("flags", [["--eval-do-concat-batches", "false"], ["--batch-eval-metrics", "true"]], ids=str)
def test_metrics_however_the_predictions_come(features, flags):
    run(*FEATURES, "--validation", "validation.jsonl", output="plain")
    run(*FEATURES, "--validation", "validation.jsonl", *flags, "--per-device-eval-batch-size", "3", output="other")
    assert evaluated("other") == pytest.approx(evaluated("plain"))


# B3
def test_tokens_that_the_model_has_no_positions_for_or_too_few(capsys, text):
    student = ("train.parquet", "--model", "encoder", *OUT, "--student")
    code, line = error(capsys, *student, "cross-encoder", "--max-length", "41")
    assert code == 1 and "max_length: expected at most 40, the positions that encoder has, got 41" in line
    for kind, least in (("cross-encoder", 5), ("bi-encoder", 3)):
        code, line = error(capsys, *student, kind, "--max-length", str(least - 1))
        assert code == 1 and f"max_length: expected at least {least}, to read one token of each text, got {least - 1}" in line


# C8: the hub's own library asks five times over half a minute.
def test_a_hub_that_cannot_be_reached_is_asked_once(capsys, monkeypatch, text):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("pile_fast.students.ranker.hf_hub_url", lambda *_: "http://127.0.0.1:9/none")
    begin = time.monotonic()
    code, line = error(capsys, "train.parquet", "--student", "cross-encoder", "--model", "nobody/none", *OUT)
    assert time.monotonic() - begin < 10
    assert (
        code == 1
        and "nobody/none: no such folder, and could not be loaded from the Hugging Face hub: cannot reach 127." in line
    )


def test_broken_rows_can_be_left_out(capsys, features):
    write("train.jsonl", [features[0], {"query_id": "x"}, *features[1:]])
    run(*FEATURES, "--skip-bad-rows")
    assert "Left out 1 broken rows or lines:\n  train.jsonl:2: " in capsys.readouterr().err


def test_a_run_is_not_written_over_another(capsys, features):
    run(*FEATURES)
    code, line = error(capsys, *FEATURES, *OUT)
    assert code == 1 and "--output-dir out: holds a training run already" in line
    Path("file").touch()
    code, line = error(capsys, *FEATURES, "--output-dir", "file/below")
    assert code == 1 and "--output-dir file/below: cannot write there: Not a directory" in line


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_disk_full(capsys, features):
    Path("out/checkpoint-3").mkdir(parents=True)
    Path("out/checkpoint-3/optimizer.pt").symlink_to("/dev/full")
    code, line = error(capsys, *FEATURES, *QUICK, *OUT, "--resume-from-checkpoint")
    assert code == 1 and line.startswith("pile-fast: error: --output-dir out: cannot write a checkpoint: ")


# Whoever finds a config.json finds a whole student.
def test_student_half_written_is_none(monkeypatch, features):
    class Killed(Exception):
        pass

    def replace(path, target):
        if Path(target).name != "model.safetensors":
            raise Killed
        os.rename(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", replace)
        with pytest.raises(Killed):
            run(*FEATURES)
    assert not Path("out/config.json").exists()
    resumed = run(*FEATURES, "--resume-from-checkpoint")
    assert same(resumed, run(*FEATURES, output="whole")) and load_ranker("out").kind == "features"


STEPS = ("--max-steps", "24", "--save-steps", "2", "--per-device-train-batch-size", "2", "--save-total-limit", "2",
         "--gradient-accumulation-steps", "2", "--max-documents-per-batch", "4")  # fmt: skip


def killed(arguments, checkpoint, delay):
    """Start the command and SIGKILL it, `delay` seconds after the folder of a checkpoint appears."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_DATASETS_CACHE": str(Path("cache").absolute())}
    process = subprocess.Popen(
        [sys.executable, "-m", "pile_fast", "train", *arguments], env=environment, stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        while process.poll() is None and not Path(checkpoint).exists():
            time.sleep(0.001)
        time.sleep(delay)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    return process.returncode


# The moment is another one in every run: most often in the middle of writing a checkpoint.
def test_killed_and_resumed_run_ends_at_the_same_weights(capsys, text):
    arguments = ("train.parquet", "--student", "cross-encoder", "--model", "encoder", *QUICK, *STEPS)
    assert main(["train", *arguments, "--output-dir", "whole"]) == 0
    random = np.random.default_rng()
    step, delay = 2 * random.integers(1, 5), random.uniform(0, 0.05)
    code = killed([*arguments, "--output-dir", "killed"], f"killed/checkpoint-{step}", delay)
    assert code == -signal.SIGKILL, "it ended before it was killed"
    assert not Path("killed/config.json").exists()
    capsys.readouterr()
    assert main(["train", *arguments, "--output-dir", "killed", "--resume-from-checkpoint"]) == 0
    assert capsys.readouterr().out.startswith(("Resuming from killed/checkpoint-", "No complete checkpoint in killed"))
    weights = load_file("killed/model.safetensors"), load_file("whole/model.safetensors")
    assert same(*weights), f"killed {delay} s after checkpoint {step} appeared"


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")
def test_torchrun(text, tiny_text_model):
    tiny_text_model("encoder").save_pretrained("encoder")  # without dropout
    arguments = ["train.parquet", "--student", "bi-encoder", "--model", "encoder", "--validation", "validation.jsonl", *QUICK,
                 "--optim", "sgd", "--learning-rate", "0.5", "--max-documents-per-batch", "8", "--max-steps", "2"]  # fmt: skip
    assert main(["train", *arguments, "--output-dir", "one", "--per-device-train-batch-size", "8"]) == 0
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "pile_fast", "train"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_DATASETS_CACHE": str(Path("cache").absolute())}
    result = subprocess.run(
        [*launch, *arguments, "--output-dir", "two", "--per-device-train-batch-size", "4"], env=environment,
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("Wrote two.") == 1
    one, two = load_file("one/model.safetensors"), load_file("two/model.safetensors")
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-3, atol=5e-4)


def test_help_puts_our_options_first(capsys):
    assert main(["train", "--help"]) == 0
    out = capsys.readouterr().out
    places = [out.index(f"\n{group}") for group in ("data:", "student:", "loss (", "run:", "options of transformers' Trainer:")]
    assert places == sorted(places) and "default: None" not in out
    for flag in ("--student", "--alpha", "--learning-rate", "--fsdp", "--torch-compile"):
        assert flag in out
    assert out.index("--learning-rate") > places[-1]


def test_training_libraries_missing(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "accelerate", None)
    code, line = error(capsys, "x.jsonl")
    assert code == 1 and line == "pile-fast: error: training needs accelerate: pip install 'pile_fast[train]'"


def test_every_kind_is_offered():
    from pile_fast.students import KINDS

    assert train._KINDS == KINDS
