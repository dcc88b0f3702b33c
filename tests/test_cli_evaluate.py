"""pile-fast evaluate: what is compared, what is written, what is said, what is refused."""

import json
import math
import re
import shlex
from pathlib import Path

import pytest
import torch

import pile_fast
from pile_fast.cli import main
from pile_fast.cli.evaluate import QUERIES_AT_ONCE
from pile_fast.data import load_mq2008, read_rows, write_rows
from pile_fast.data.wikiqa import load_wikiqa
from pile_fast.metrics import average_precision, ndcg, pnr
from pile_fast.students import FeatureRanker, FeatureRankerConfig, load_ranker

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def text_file(text_rows):
    write_rows("data.jsonl", text_rows(QUERIES_AT_ONCE + 9))
    return "data.jsonl"


def evaluate(*arguments):
    assert main(["evaluate", *map(str, arguments), "--output", "out"]) == 0
    with open("out/metrics.json") as file:
        return json.load(file)


def system(report, name):
    return next(entry for entry in report["systems"] if entry["name"] == name)


def error_of(capsys, *arguments):
    capsys.readouterr()
    assert main(["evaluate", *map(str, arguments), "--output", "out"]) == 1
    text = capsys.readouterr().err
    assert text.count("\n") == 1 and "Traceback" not in text
    return text.strip().removeprefix("pile-fast: error: ")


def test_teachers_models_runs_and_the_ensemble_on_the_same_queries(
    text_file, tiny_text_model, tiny_tokenizer, capsys, tmp_path
):
    for folder, kind in (("cross", "cross-encoder"), ("encoder", "encoder")):
        tiny_text_model(kind).save_pretrained(folder)
        tiny_tokenizer.save_pretrained(folder)
    rows = [row | {"ensemble_logits": [float(i) for i in range(len(row["doc_ids"]))]} for row in read_rows(text_file)]
    write_rows("data.parquet", rows)
    scores = load_ranker("cross").score(rows)
    with open("cross.run", "w") as run:
        for row, logits in zip(rows, scores, strict=True):
            for name, score in zip(row["doc_ids"], logits.tolist(), strict=True):
                run.write(f"{row['query_id']} Q0 {name} 0 {score!r} x\n")

    report = evaluate(
        "data.parquet", "--teachers", "--column", "ensemble_logits", "--model", "ce=cross", "--model", "be=encoder",
        "--run", "old=cross.run", "--baseline", "ce", "--metrics", "map,pnr,ndcg@5", "--batch-size", "7",
    )  # fmt: skip
    assert [(entry["name"], entry["kind"]) for entry in report["systems"]] == [
        ("t0", "teacher"), ("t1", "teacher"), ("ensemble_logits", "column"), ("old", "run"), ("ce", "model"), ("be", "model"),
    ]  # fmt: skip
    assert report["query_ids"] == [row["query_id"] for row in rows]

    labels = torch.tensor([math.nan if y is None else y for row in rows for y in row["labels"]])
    layout = {"cu_seqlens": torch.tensor([0, *(len(row["doc_ids"]) for row in rows)]).cumsum(0)}
    flat = torch.cat(scores)
    values = {name: metric["value"] for name, metric in system(report, "ce")["metrics"].items()}
    assert values == {
        "map": pytest.approx(average_precision(flat, labels, empty="skip", **layout).item()),
        "pnr": pytest.approx(pnr(flat, labels, ties="half", **layout).item()),
        "ndcg@5": pytest.approx(ndcg(flat, labels, k=5, empty="skip", **layout).item()),
    }
    # The run holds the model's scores, so it is the model, also where the tests are concerned.
    old = system(report, "old")["metrics"]["map"]
    assert old["value"] == pytest.approx(values["map"]) and old["p"] > 0.5
    assert system(report, "ce")["metrics"]["map"]["p"] is None and system(report, "be")["metrics"]["map"]["p"] is not None
    per_query = report["per_query"]["ce"]["map"]
    known = [value for value in per_query if value is not None]
    assert len(per_query) == len(rows) and len(known) == system(report, "ce")["metrics"]["map"]["queries"]
    assert sum(known) / len(known) == pytest.approx(values["map"])

    assert (tmp_path / "out/metrics.png").read_bytes().startswith(b"\x89PNG")
    out = capsys.readouterr().out
    for name in ("t0", "ensemble_logits", "old", "ce", "be"):
        assert name in out
    assert f"{report['queries']['total']} queries, {report['queries']['labelled']} with a label" in out
    assert "difference from ce" in out and "Holm-corrected" in out


def test_numbers_do_not_depend_on_the_order_of_the_file_even_with_ties(text_rows):
    rows = text_rows(30)
    for row in rows:
        size = len(row["documents"])
        # All tied, the relevant ones first: in file order this system would look perfect.
        row["labels"] = sorted(([2, 1] + [0] * 9)[:size], reverse=True)
        row["teacher_logits"] = [[0.0, None]] * size
        row["doc_ids"] = [f"d{i}" for i in range(size)]
    write_rows("best_first.jsonl", rows)
    for row in rows:
        for name in ("labels", "documents", "doc_ids"):
            row[name] = row[name][::-1]
    write_rows("best_last.jsonl", rows)
    first, last = (
        evaluate(path, "--teachers", "--metrics", "ndcg,map,mrr,opa") for path in ("best_first.jsonl", "best_last.jsonl")
    )
    assert first["per_query"] == last["per_query"]
    for entry in first["systems"]:
        assert entry["metrics"]["mrr"]["value"] < 0.9 and entry["metrics"]["opa"]["value"] == 0
        assert entry["coverage"]["tied_pairs"] > 0 == entry["coverage"]["right_pairs"] + entry["coverage"]["wrong_pairs"]
    assert [entry["coverage"]["documents"] for entry in first["systems"]] == [first["queries"]["documents"], 0]


def test_qrels_take_the_place_of_labels(text_file, capsys):
    rows = list(read_rows(text_file))
    with open("qrels.txt", "w") as file:
        for row in rows[:20]:
            file.write(f"{row['query_id']} 0 {row['doc_ids'][0]} 2\n")
            file.write(f"{row['query_id']} 0 not-in-the-file 3\n")
    judged = evaluate(text_file, "--teachers", "--qrels", "qrels.txt", "--metrics", "mrr,pnr")
    assert judged["queries"]["labelled"] == judged["queries"]["relevant"] == judged["queries"]["documents"] == 20
    assert judged["queries"]["paired"] == 0 and system(judged, "t0")["metrics"]["pnr"]["value"] is None
    assert "No query has documents of different labels" in capsys.readouterr().out
    others = evaluate(text_file, "--teachers", "--qrels", "qrels.txt", "--unjudged", "0", "--metrics", "mrr,pnr")
    assert others["queries"]["labelled"] == len(rows) and others["queries"]["relevant"] == 20
    assert others["queries"]["documents"] == sum(len(row["doc_ids"]) for row in rows)


def test_queries_without_a_relevant_document_are_said_to_count_or_not(text_rows, capsys):
    rows = text_rows(6)
    for i, row in enumerate(rows):
        row["labels"] = [1 if i < 4 and d == 0 else 0 for d in range(len(row["documents"]))]
    write_rows("data.jsonl", rows)
    skipped = evaluate("data.jsonl", "--teachers", "--metrics", "map,mrr@3")
    assert "in MAP, MRR@3 they do not count" in capsys.readouterr().out
    zero = evaluate("data.jsonl", "--teachers", "--metrics", "map", "--empty", "zero")
    assert "in MAP they count as 0" in capsys.readouterr().out
    assert system(skipped, "t0")["metrics"]["map"]["queries"] == 4 and system(zero, "t0")["metrics"]["map"]["queries"] == 6
    graded = evaluate("data.jsonl", "--teachers", "--metrics", "map", "--relevant-at", "2")
    assert graded["queries"]["relevant"] == 0 and system(graded, "t0")["metrics"]["map"]["value"] is None


def test_broken_rows_can_be_left_out(text_file, capsys):
    with open(text_file, "a") as file:
        file.write('{"query_id": "x", "documents": ["a"], "labels": ["high"]}\n')
    assert "labels[0]: expected a number or null, got 'high'" in error_of(capsys, text_file, "--teachers")
    assert evaluate(text_file, "--teachers", "--skip-bad-rows")["bad_rows"] == 1
    assert "Left out 1 broken rows or lines:" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "nothing to evaluate: give --teachers, --column, --model or --run"),
        (["--teachers", "--baseline", "t9"], "--baseline t9: expected one of t0, t1"),
        (["--column", "ensemble_logits"], "--column ensemble_logits: query q0 of data.jsonl has no such column"),
        (["--run", "a=gone.run"], "gone.run: no such file"),
        (["--run", "a=other.run"], "--run a=other.run: none of its queries is in data.jsonl"),
        (["--run", "a=other.run", "--run", "a=other.run"], "two systems are called 'a'"),
        (["--run", "a=broken.run"], "broken.run:1: score: expected a number, got 'high'"),
        (["--teachers", "--qrels", "other.qrels"], "--qrels other.qrels: none of its queries is in data.jsonl"),
        (["--teachers", "--qrels", "gone.qrels"], "gone.qrels: No such file or directory"),
        (["--model", "m=mlp"], "--model m: data.jsonl: query 'q0': "),
        (["--model", "m=gone"], "gone: no such folder, and not to be had from the Hugging Face hub"),
    ],
)
def test_errors_are_one_line(text_file, capsys, monkeypatch, arguments, message):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    FeatureRanker(FeatureRankerConfig(num_features=2)).save_pretrained("mlp")
    for name, line in (
        ("other.run", "x Q0 d 1 0.5 t"), ("broken.run", "q0 Q0 q0.1 1 high t"), ("other.qrels", "x 0 d 1"),
    ):  # fmt: skip
        with open(name, "w") as file:
            file.write(line + "\n")
    assert error_of(capsys, text_file, *arguments).startswith(message)


def test_negative_labels_do_not_fit_ndcg(text_rows, capsys):
    rows = text_rows(2)
    rows[0]["labels"] = [-1] + [0] * (len(rows[0]["documents"]) - 1)
    write_rows("data.jsonl", rows)
    assert "labels: ndcg needs labels >= 0, got a negative one" in error_of(capsys, "data.jsonl", "--teachers")
    assert evaluate("data.jsonl", "--teachers", "--metrics", "pnr,opa")["queries"]["total"] == 2


def test_a_file_without_teachers_says_so(text_rows, capsys):
    rows = [{name: row[name] for name in ("query_id", "query", "documents", "labels")} for row in text_rows(2)]
    write_rows("data.jsonl", rows)
    assert error_of(capsys, "data.jsonl", "--teachers") == "--teachers: data.jsonl has no teachers"


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--metrics", "recall"], "expected ndcg, mrr or map, with @k or without, pnr or opa; got 'recall'"),
        (["--model", "folder"], "expected NAME=MODEL, got 'folder'"),
        (["--run", "=file"], "expected NAME=FILE, got '=file'"),
        (["--relevant-at", "nan"], "expected a number"),
    ],
)
def test_wrong_arguments_are_exit_code_2(capsys, arguments, message):
    assert main(["evaluate", "data.jsonl", "--output", "out", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_the_page_on_evaluation_runs_as_written(text_rows, tiny_text_model, tiny_tokenizer, capsys):
    page = (Path(pile_fast.__file__).parents[1] / "docs/evaluation.md").read_text()
    blocks = re.findall(r"```(bash|python)\n(.*?)```", page, re.DOTALL)
    rows = text_rows(12)
    write_rows("data.jsonl", rows)
    for name in ("cross-encoder", "student"):
        tiny_text_model("cross-encoder").save_pretrained(f"models/{name}")
        tiny_tokenizer.save_pretrained(f"models/{name}")
    with open("old.run", "w") as run, open("qrels.txt", "w") as qrels:
        for row in rows:
            for i in range(len(row["documents"])):
                run.write(f"{row['query_id']} Q0 {row['query_id']}.{i + 1} {i + 1} {-i} old\n")
            qrels.write(f"{row['query_id']} 0 {row['query_id']}.1 1\n")
    commands = 0
    for language, block in blocks:
        if language == "python":
            exec(block, {})
            continue
        for line in block.splitlines():
            program, *arguments = shlex.split(line)
            assert program == "pile-fast" and main(arguments) == 0, capsys.readouterr().err
            commands += 1
    assert commands == 4 and "0.75 2\n" in capsys.readouterr().out
    runs = json.loads(Path("reports/runs/metrics.json").read_text())
    assert runs["settings"]["baseline"] == "old" and system(runs, "old")["metrics"]["ndcg@10"]["value"] == 1


def test_wikiqas_published_numbers(text_data_folder):
    write_rows("test.parquet", load_wikiqa(text_data_folder("wikiqa"), "test"))
    report = evaluate("test.parquet", "--teachers", "--metrics", "map,mrr")
    for name, wanted in (("CNN", (0.628, 0.637)), ("CNN-Cnt", (0.668, 0.682))):
        metrics = system(report, name)["metrics"]
        assert (metrics["map"]["queries"], metrics["mrr"]["queries"]) == (243, 243)
        assert (metrics["map"]["value"], metrics["mrr"]["value"]) == pytest.approx(wanted, abs=0.0006)


def test_features_of_mq2008(mq2008_folder):
    """The best single system's NDCG@10 over the 564 queries with a relevant document, 0.702, but for how ties are broken."""
    lists = load_mq2008(mq2008_folder, systems=[9, 15])
    bounds = lists.cu_seqlens.tolist()
    write_rows("mq2008.parquet", (
        {
            "query_id": lists.query_ids[q], "features": row["features"].tolist(), "labels": row["labels"].tolist(),
            "doc_ids": list(lists.doc_ids[bounds[q] : bounds[q + 1]]), "teachers": ["system 9", "system 15"],
            "teacher_logits": [[None if math.isnan(x) else x for x in logits] for logits in row["teacher_logits"].tolist()],
        }
        for q, row in enumerate(lists)
    ))  # fmt: skip
    report = evaluate("mq2008.parquet", "--teachers", "--baseline", "system 15")
    assert report["queries"] == {"total": 784, "labelled": 784, "relevant": 564, "paired": 564, "documents": 15_211}
    best = system(report, "system 15")
    assert best["metrics"]["ndcg@10"]["value"] == pytest.approx(0.702, abs=0.004)
    assert best["metrics"]["ndcg@10"]["queries"] == 564 and best["coverage"]["documents"] < 15_211
    assert system(report, "system 9")["metrics"]["ndcg@10"]["p"] > 0.05
