"""pile-fast score: what it adds, what it keeps, what it refuses, and that a kill costs nothing but time."""

import json
import math
import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from pile_fast.cli import main, score
from pile_fast.data import read_rows, write_rows
from pile_fast.offline import score as runner
from pile_fast.students import FeatureRanker, FeatureRankerConfig, load_ranker
from pile_fast.teachers import BM25

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def text_file(text_rows):
    write_rows("data.jsonl", text_rows(9))
    return "data.jsonl"


@pytest.fixture
def models(tiny_text_model, tiny_tokenizer):
    """Folders of a cross-encoder, a plain encoder and a classifier."""
    for name, kind, options in (
        ("cross", "cross-encoder", {}), ("encoder", "encoder", {}), ("classifier", "cross-encoder", {"outputs": 3}),
    ):  # fmt: skip
        tiny_text_model(kind, seed=len(name), **options).save_pretrained(name)
        tiny_tokenizer.save_pretrained(name)


def error_of(capsys, *arguments):
    """The command's one line of error, without a stack trace."""
    capsys.readouterr()
    assert main(["score", *map(str, arguments)]) == 1
    text = capsys.readouterr().err
    assert text.count("\n") == 1 and "Traceback" not in text
    return text.strip().removeprefix("pile-fast: error: ")


def column(path, name):
    return [[logits[row["teachers"].index(name)] for logits in row["teacher_logits"]] for row in read_rows(path)]


# -- BM25


def by_hand(query, document, collection, k1, b):
    """Lucene's BM25, written out."""
    words = [text.split() for text in dict.fromkeys(collection)]
    average = sum(map(len, words)) / len(words)
    total = 0.0
    for term in query.split():
        found = sum(term in text for text in words)
        idf = math.log(1 + (len(words) - found + 0.5) / (found + 0.5))
        count = document.split().count(term)
        total += idf * count / (count + k1 * (1 - b + b * len(document.split()) / average))
    return total


@pytest.mark.parametrize("k1, b", [(1.5, 0.75), (0.9, 0.0), (2.0, 1.0)])
def test_bm25_is_the_formula_on_the_distinct_documents(k1, b):
    collection = ["red apple tree", "apple apple", "old river bank house", "apple apple", "tall tree"]
    bm25 = BM25(collection, k1=k1, b=b)
    for query in ("apple", "red tree", "tree tree", "zebra"):
        wanted = [by_hand(query, document, collection, k1, b) for document in collection]
        np.testing.assert_allclose(bm25.score(query, collection), wanted, rtol=1e-5, atol=1e-7)


def test_bm25_of_nothing_to_match_is_zero():
    assert BM25(["", "!", "a b"]).score("apple", ["!", ""]).tolist() == [0, 0]  # no word in the whole collection
    assert BM25(["red apple"]).score("?", ["red apple"]).tolist() == [0]
    with pytest.raises(KeyError):
        BM25(["red apple"]).score("apple", ["another"])


def test_bm25_command_adds_a_column_with_the_statistics_of_the_whole_file(text_file, text_rows, monkeypatch):
    monkeypatch.setattr(runner, "DOCUMENTS_PER_PART", 7)  # several parts, one collection
    assert main(["score", text_file, "--teacher", "bm25", "--k1", "1.2", "--b", "0.5", "--output", "out.parquet"]) == 0
    rows = text_rows(9)
    bm25 = BM25([document for row in rows for document in row["documents"]], k1=1.2, b=0.5)
    for row, logits in zip(rows, column("out.parquet", "bm25"), strict=True):
        assert logits == bm25.score(row["query"], row["documents"]).tolist()


# -- models


def test_several_teachers_in_one_file_keep_what_was_there(text_file, models, capsys):
    teachers = ["bm25", "ce=cross", "be=encoder", "lexical=bm25:bm25"]
    assert main(["score", text_file, *(f for t in teachers for f in ("--teacher", t)), "--output", "out.parquet"]) == 0
    size = sum(map(len, column("out.parquet", "ce")))
    wanted = f"Wrote out.parquet: 9 queries, {size} documents, t0, t1, bm25, ce, be, lexical.\n"
    assert capsys.readouterr().out == wanted
    before, after = list(read_rows(text_file)), list(read_rows("out.parquet"))
    assert after[0]["teachers"] == ["t0", "t1", "bm25", "ce", "be", "lexical"]
    for name, folder in (("ce", "cross"), ("be", "encoder")):
        wanted = load_ranker(folder).score(before)
        for given, logits in zip(column("out.parquet", name), wanted, strict=True):
            torch.testing.assert_close(torch.tensor(given), logits, rtol=1e-4, atol=1e-5)
    assert column("out.parquet", "lexical") == column("out.parquet", "bm25")
    for old, new in zip(before, after, strict=True):
        for name in ("query_id", "query", "documents", "doc_ids", "labels"):
            assert old[name] == new[name]
        kept = [logits[:2] for logits in new["teacher_logits"]]
        assert kept == [[x and pytest.approx(x, rel=1e-6) for x in logits] for logits in old["teacher_logits"]]


def test_a_teacher_of_the_same_name_is_replaced_only_when_asked(text_file, capsys):
    assert error_of(capsys, text_file, "--teacher", "t0=bm25", "--output", "out.parquet") == (
        "data.jsonl has teacher 't0' already: choose another name, or --overwrite it"
    )
    assert main(["score", text_file, "--teacher", "t0=bm25", "--overwrite", "--output", "out.parquet"]) == 0
    assert main(["score", text_file, "--teacher", "bm25", "--output", "plain.parquet"]) == 0
    assert next(read_rows("out.parquet"))["teachers"] == ["t0", "t1"]
    assert column("out.parquet", "t0") == column("plain.parquet", "bm25")
    assert column("out.parquet", "t1") == column("plain.parquet", "t1")


def test_features_are_scored_by_a_feature_ranker_and_by_nothing_else(capsys):
    rows = [{"query_id": f"q{q}", "features": [[q, 1.0], [2.0, q]], "labels": [1, None]} for q in range(3)]
    write_rows("features.jsonl", rows)
    FeatureRanker(FeatureRankerConfig(num_features=2, hidden_sizes=(4,))).save_pretrained("mlp")
    assert main(["score", "features.jsonl", "--teacher", "mlp=mlp", "--output", "out.parquet"]) == 0
    wanted = [scores.tolist() for scores in load_ranker("mlp").score(rows)]
    assert column("out.parquet", "mlp") == [pytest.approx(scores, rel=1e-5) for scores in wanted]
    FeatureRanker(FeatureRankerConfig(num_features=3)).save_pretrained("wide")
    assert error_of(capsys, "features.jsonl", "--teacher", "m=wide", "--output", "no.parquet") == (
        "features: expected (D, F) = (D, 3), got (6, 2)"
    )
    assert error_of(capsys, "features.jsonl", "--teacher", "m=mlp", "--device", "abacus", "--output", "no.parquet").startswith(
        "--device abacus: "
    )
    assert error_of(capsys, "features.jsonl", "--teacher", "bm25", "--output", "no.parquet") == (
        "features.jsonl: query 'q0': no query, which teacher 'bm25' (bm25) reads"
    )


def test_a_feature_ranker_on_texts_says_so(text_file, capsys):
    FeatureRanker(FeatureRankerConfig(num_features=2)).save_pretrained("mlp")
    assert error_of(capsys, text_file, "--teacher", "m=mlp", "--output", "no.parquet") == (
        "data.jsonl: query 'q0': no features, which teacher 'm' (features) reads"
    )


def test_empty_documents_are_not_scored(models, capsys):
    rows = [
        {"query_id": "a", "query": "red", "documents": ["red apple", "", "  ", "tree"]},
        {"query_id": "b", "query": "tree", "documents": [""]},
    ]
    write_rows("data.jsonl", rows)
    assert main(["score", "data.jsonl", "--teacher", "bm25", "--teacher", "ce=cross", "--output", "out.parquet"]) == 0
    for name in ("bm25", "ce"):
        first, second = column("out.parquet", name)
        assert [logit is None for logit in first] == [False, True, True, False] and second == [None]
    assert "3 empty documents were not scored: their logits are null.\n" in capsys.readouterr().out


def test_a_logit_that_is_not_finite_is_an_error(text_file, models, tiny_text_model, capsys):
    model = tiny_text_model("cross-encoder")
    torch.nn.init.constant_(model.classifier.bias, math.inf)
    model.save_pretrained("cross")
    message = error_of(capsys, text_file, "--teacher", "ce=cross", "--output", "out.parquet")
    assert message == "teacher 'ce': a logit of query 'q0' is not finite"


# -- bad input


def test_model_errors_are_one_line(text_file, models, capsys, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    arguments = [text_file, "--output", "out.parquet", "--teacher"]
    assert "classifier: a ranker needs a cross-encoder with one output, this one has 3" in error_of(
        capsys, *arguments, "c=classifier"
    )
    assert "no/such-model: no such folder, and could not be loaded from the Hugging Face hub" in error_of(
        capsys, *arguments, "c=no/such-model"
    )
    assert "encoder: not a trained cross-encoder" in error_of(capsys, *arguments, "c=encoder:cross-encoder")
    os.mkdir("hollow")
    assert "hollow: no model in this folder" in error_of(capsys, *arguments, "c=hollow")
    assert os.listdir("hollow") == [] and not os.path.exists("out.parquet")


def write_features():
    rows = [{"query_id": f"q{q}", "features": [[q, 1.0], [2.0, q]], "labels": [1, None]} for q in range(3)]
    write_rows("features.jsonl", rows)
    FeatureRanker(FeatureRankerConfig(num_features=2, hidden_sizes=(4,))).save_pretrained("mlp")


@pytest.mark.parametrize(
    "damage",
    [
        lambda: os.truncate("mlp/model.safetensors", os.path.getsize("mlp/model.safetensors") // 2),
        lambda: open("mlp/model.safetensors", "wb").write(b"junk"),
        lambda: open("mlp/config.json", "w").write("{"),
        lambda: open("mlp/config.json", "wb").write(b"\xff\xfe"),
        lambda: open("mlp/config.json", "w").write(
            open("mlp/config.json").read().replace('"num_features": 2', '"num_features": 3')
        ),
        lambda: (os.remove("mlp/model.safetensors"), open("mlp/pytorch_model.bin", "wb").write(b"junk")),
    ],
)
def test_a_damaged_model_is_one_line_that_names_it(capfd, damage):
    write_features()
    damage()
    line = error_of(capfd, "features.jsonl", "--teacher", "m=mlp", "--output", "new/out.parquet")
    assert line.startswith("mlp: a file of the model is damaged or of another model: ")
    assert not os.path.exists("new")


def test_a_file_is_not_scored_into_itself(capsys):
    write_features()
    assert main(["score", "features.jsonl", "--teacher", "m=mlp", "--output", "data.parquet"]) == 0
    before = open("data.parquet", "rb").read()
    for name in ("data.parquet", "link.parquet"):
        if name == "link.parquet":
            os.symlink("data.parquet", name)
        arguments = ["data.parquet", "--teacher", "n=mlp", "--output", name]
        assert error_of(capsys, *arguments) == f"{name}: the output would replace the input"
    assert open("data.parquet", "rb").read() == before


# A13
def test_a_file_that_changes_while_it_is_scored_gives_no_output(text_file, capsys, monkeypatch):
    real, status, content = runner._score, os.stat(text_file), open(text_file).read()

    def change(rows, teachers):
        with open(text_file, "w") as file:
            file.write(content.replace("1.0", "2.0"))
        os.utime(text_file, ns=(status.st_atime_ns, status.st_mtime_ns))
        return real(rows, teachers)

    monkeypatch.setattr(runner, "_score", change)
    line = error_of(capsys, text_file, "--teacher", "bm25", "--output", "out.parquet")
    assert line == "data.jsonl: changed while it was read, so nothing was written; run it again"
    assert os.listdir() == ["data.jsonl"] and os.stat(text_file).st_size == status.st_size


def test_a_folder_is_scored_and_names_are_shown(text_rows, capsys):
    os.mkdir("data")
    rows = text_rows(9)
    write_rows("data/1.parquet", rows[:4])
    write_rows("data/2.parquet", rows[4:])
    assert main(["score", "data", "--teacher", "\x1b[31mred\u202e=bm25", "--output", "out.parquet"]) == 0
    assert "9 queries" in (out := capsys.readouterr().out) and "\\x1b[31mred\\u202e" in out and "\x1b" not in out
    assert [row["query_id"] for row in read_rows("out.parquet")] == [f"q{i}" for i in range(9)]
    assert error_of(capsys, "data", "--teacher", "bm25", "--output", "data/1.parquet") == (
        "data/1.parquet: the output would replace the input"
    )


def test_broken_rows_stop_it_before_the_work_or_are_counted(text_rows, capsys, monkeypatch):
    lines = [json.dumps(row) for row in text_rows(4)]
    lines[2] = json.dumps({"query_id": "late", "documents": ["red"], "teachers": ["t0", "t1"], "teacher_logits": [[0, 1]]})
    lines.append('{"query_id": "last", "query": "red", "documents": [7]}')
    with open("data.jsonl", "w") as file:
        file.write("\n".join(lines) + "\n")
    arguments = ["data.jsonl", "--teacher", "bm25", "--output", "out.parquet"]
    with monkeypatch.context() as patch:
        patch.setattr(runner, "_score", lambda *a: pytest.fail("work began"))
        assert error_of(capsys, *arguments) == "data.jsonl: query 'late': no query, which teacher 'bm25' (bm25) reads"
    assert main(["score", *arguments, "--skip-bad-rows"]) == 0
    told = capsys.readouterr().err
    assert "Left out 2 broken rows or lines:\n" in told and "query 'late': no query" in told
    assert "data.jsonl:5: documents[0]: expected a text, got 7" in told
    assert [row["query_id"] for row in read_rows("out.parquet")] == ["q0", "q1", "q3"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["data.jsonl", "--teacher", "bm25", "--output", "out.csv"], "--output out.csv: expected a name that ends in .parquet"),
        (["data.jsonl", "--teacher", "bm25", "--output", "data.jsonl/out.parquet"], "--output data.jsonl: cannot write there"),
        (["gone.jsonl", "--teacher", "bm25", "--output", "out.parquet"], "gone.jsonl: no such file"),
        (["data.jsonl", "--teacher", "bm25", "--teacher", "bm25", "--output", "o.parquet"], "--teacher: two are called 'bm25'"),
    ],
)
def test_wrong_files_and_names(text_file, capsys, arguments, message):
    assert error_of(capsys, *arguments).startswith(message)


@pytest.mark.parametrize(
    "text, wanted",
    [
        ("bm25", ("bm25", "bm25", "bm25")),
        ("lexical=bm25", ("lexical", "bm25", "bm25")),
        ("a=models/b", ("a", "models/b", None)),
        ("a=features", ("a", "features", None)),  # a folder of that name
        ("a=features:features", ("a", "features", "features")),
        ("a=C:/models/b", ("a", "C:/models/b", None)),
        ("a=org/b:bi-encoder", ("a", "org/b", "bi-encoder")),
    ],
)
def test_teacher_argument(text, wanted):
    teacher = score._teacher(text)
    assert (teacher.name, teacher.model, teacher.kind) == wanted


@pytest.mark.parametrize("teacher", ["minilm", "=bm25", "name=", "name=:cross-encoder"])
def test_wrong_teacher_is_exit_code_2(capsys, teacher):
    assert main(["score", "data.jsonl", "--teacher", teacher, "--output", "out.parquet"]) == 2
    assert "expected NAME=MODEL, NAME=MODEL:KIND or bm25" in capsys.readouterr().err


def test_going_on_with_other_settings_is_refused(text_file, capsys, monkeypatch):
    monkeypatch.setattr(runner, "DOCUMENTS_PER_PART", 1)
    real = runner._score
    with monkeypatch.context() as patch:
        patch.setattr(runner, "_score", lambda rows, teachers: real(rows, teachers) if rows[0]["query_id"] != "q3" else 1 / 0)
        with pytest.raises(ZeroDivisionError):
            main(["score", text_file, "--teacher", "bm25", "--output", "out.parquet"])
    assert not os.path.exists("out.parquet")
    message = error_of(capsys, text_file, "--teacher", "bm25", "--k1", "2", "--output", "out.parquet")
    assert "other settings or another input (k1 differ)" in message
    scored = []
    monkeypatch.setattr(runner, "_score", lambda rows, teachers: scored.append(rows[0]["query_id"]) or real(rows, teachers))
    assert main(["score", text_file, "--teacher", "bm25", "--output", "out.parquet"]) == 0
    assert scored[0] == "q3" and len(list(read_rows("out.parquet"))) == 9


# Small parts, so that there is much to interrupt.
DRIVER = """
import sys, torch
from pile_fast.cli import main
from pile_fast.offline import score
torch.set_num_threads(1)
score.DOCUMENTS_PER_PART = 6
sys.exit(main())
"""


def test_killed_at_random_moments_the_file_is_the_same(text_rows, models, tmp_path, monkeypatch):
    write_rows("data.jsonl", text_rows(150))
    command = ["score", "data.jsonl", "--teacher", "bm25", "--teacher", "ce=cross", "--output"]
    parts = tmp_path / "killed.parquet.parts"
    moments = random.Random(7)
    for _ in range(3):
        process = subprocess.Popen([sys.executable, "-c", DRIVER, *command, "killed.parquet"], stderr=subprocess.DEVNULL)
        before = len(list(parts.glob("*.parquet")))
        wanted = before + moments.randint(1, 8)
        while process.poll() is None and len(list(parts.glob("*.parquet"))) < wanted:
            time.sleep(0.001)
        time.sleep(moments.uniform(0, 0.05))
        process.kill()
        assert process.wait() == -signal.SIGKILL, "the work was done before the kill"
        assert not os.path.exists("killed.parquet")
        assert len(list(parts.glob("*.parquet"))) > before
    finished = subprocess.run([sys.executable, "-c", DRIVER, *command, "killed.parquet"], capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    assert not parts.exists()
    monkeypatch.setattr(runner, "DOCUMENTS_PER_PART", 6)
    assert main([*command, "whole.parquet"]) == 0
    assert (tmp_path / "killed.parquet").read_bytes() == (tmp_path / "whole.parquet").read_bytes()
