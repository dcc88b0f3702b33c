"""pile-fast evaluate: what is compared, what is written, what is said, what is refused."""

import json
import lzma
import math
import re
import shlex
import sys
from pathlib import Path

import ir_measures
import numpy as np
import pytest
import torch
from ir_measures import AP, ERR, RBP, RR, Judged, P, R, Success, nDCG

import pile_fast
from pile_fast.cli import main
from pile_fast.cli.evaluate_inputs import QUERIES_AT_ONCE
from pile_fast.data import find_data, load_mq2008, read_rows, write_rows
from pile_fast.data.wikiqa import load_wikiqa
from pile_fast.evaluation.metrics import average_precision, ndcg, pnr
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

    known = torch.tensor([math.nan if y is None else y for row in rows for y in row["labels"]])
    judged = [any(y is not None for y in row["labels"]) for row in rows]
    labels = torch.tensor([
        (y or 0.0) if q else math.nan for row, q in zip(rows, judged, strict=True) for y in row["labels"]
    ])  # fmt: skip
    layout = {"cu_seqlens": torch.tensor([0, *(len(row["doc_ids"]) for row in rows)]).cumsum(0)}
    flat = torch.cat(scores)
    values = {name: metric["value"] for name, metric in system(report, "ce")["metrics"].items()}
    assert values == {
        "map": pytest.approx(average_precision(flat, labels, **layout).item()),
        "pnr": pytest.approx(pnr(flat, known, ties="half", **layout).item()),
        "ndcg@5": pytest.approx(ndcg(flat, labels, k=5, gain="linear", **layout).item()),
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
    report = evaluate(text_file, "--teachers", "--qrels", "qrels.txt", "--metrics", "mrr,recall@100,pnr")
    counts = report["queries"]
    assert (counts["total"], counts["labelled"], counts["relevant"], counts["documents"]) == (len(rows), 20, 20, 40)
    # The relevant document that is not in the file is missed.
    assert 0 < system(report, "t0")["metrics"]["recall@100"]["value"] <= 0.5
    assert f"Dropped: {len(rows) - 20} queries without a label." in capsys.readouterr().out
    left_out = evaluate(text_file, "--teachers", "--qrels", "qrels.txt", "--unjudged", "skip", "--metrics", "mrr")
    mrr = system(left_out, "t0")["metrics"]["mrr"]["value"]
    assert mrr > system(report, "t0")["metrics"]["mrr"]["value"]
    assert "they were dropped from the rankings" in capsys.readouterr().out


def test_what_counts_and_what_is_dropped_is_said_with_numbers(text_rows, capsys):  # C1
    rows = text_rows(6, documents=(3, 9))
    for i, row in enumerate(rows):
        size = len(row["documents"])
        row["labels"] = [None] * size if i == 5 else [1 if i < 4 and d == 0 else 0 for d in range(size - 1)] + [None]
        row["teacher_logits"] = [[1.0, 2.0]] * size
    write_rows("data.jsonl", rows)
    zero = evaluate("data.jsonl", "--teachers", "--metrics", "map,mrr@3")
    out = capsys.readouterr().out
    assert "6 queries, 5 with a label, 4 with a relevant document (label >= 1), 4 with documents of different labels" in out
    assert "are those of the file's labels, which are all that is known" in out and "Dropped: 1 queries without a label" in out
    assert "Unlabelled: 5 documents that a system returned for these queries; they count as not relevant" in out
    assert "1 queries; in MAP, MRR@3 they count as 0" in out
    skipped = evaluate("data.jsonl", "--teachers", "--metrics", "map", "--empty", "skip")
    assert "in MAP they do not count" in capsys.readouterr().out
    assert system(skipped, "t0")["metrics"]["map"]["queries"] == 4 and system(zero, "t0")["metrics"]["map"]["queries"] == 5
    graded = evaluate("data.jsonl", "--teachers", "--metrics", "map", "--relevant-at", "2")
    assert graded["queries"]["relevant"] == 0 and system(graded, "t0")["metrics"]["map"]["value"] == 0
    evaluate("data.jsonl", "--teachers", "--metrics", "ndcg", "--gain", "exponential")
    assert "NDCG's gain: exponential" in capsys.readouterr().out


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
        (["--column", "ensemble_logits"], "--column ensemble_logits: query 'q0' of data.jsonl has no such column"),
        (["--run", "a=gone.run"], "gone.run: no such file"),
        (["--run", "a=other.run"], "--run a=other.run: none of its queries is in data.jsonl"),
        (["--run", "a=other.run", "--run", "a=other.run"], "two systems are called 'a'"),
        (["--run", "a=broken.run"], "broken.run:1: score: expected a number, got 'high'"),
        (["--teachers", "--qrels", "other.qrels"], "--qrels other.qrels: none of its queries is in data.jsonl"),
        (["--teachers", "--qrels", "gone.qrels"], "gone.qrels: No such file or directory"),
        (["--model", "m=mlp"], "--model m: data.jsonl: query 'q0': "),
        (["--model", "m=gone"], "gone: no such folder, and could not be loaded from the Hugging Face hub"),
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


@pytest.mark.parametrize("gain", ["linear", "exponential"])
def test_any_label_will_do(text_rows, gain, capsys):  # B2
    rows = text_rows(3, documents=(4, 4))
    for row, labels in zip(rows, ([-2, -1, 0, 3], [300, 1024, 0, -5], [1e6, 10, 0, None]), strict=True):
        row["labels"] = labels
        row["teacher_logits"] = [[-5.0 if label is None else label, 1.0] for label in labels]
    write_rows("data.jsonl", rows)
    report = evaluate("data.jsonl", "--teachers", "--gain", gain)
    assert report["per_query"]["t0"]["ndcg@10"] == [1, 1, 1] and 0 < system(report, "t1")["metrics"]["ndcg@10"]["value"] < 1
    error = error_of(capsys, "data.jsonl", "--teachers", "--metrics", "err@10")
    assert error.startswith("err: expected whole labels up to 4") and error.endswith("in query 'q1'")


def test_a_file_without_teachers_says_so(text_rows, capsys):
    rows = [{name: row[name] for name in ("query_id", "query", "documents", "labels")} for row in text_rows(2)]
    write_rows("data.jsonl", rows)
    assert error_of(capsys, "data.jsonl", "--teachers") == "--teachers: data.jsonl has no teachers"


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--metrics", "recall"], "expected ndcg, mrr or map, with @k or without, p, recall, "),
        (["--metrics", "dcg"], "pnr, opa, rbp; got 'dcg'"),
        (["--unjudged", "1"], "expected 0 or skip, got '1'"),
        (["--gain", "log"], "invalid choice: 'log'"),
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
    with open("old.run", "w") as run, open("new.run", "w") as new, open("qrels.txt", "w") as qrels:
        for row in rows:
            for i in range(len(row["documents"])):
                run.write(f"{row['query_id']} Q0 {row['query_id']}.{i + 1} {i + 1} {-i} old\n")
                new.write(f"{row['query_id']} Q0 {row['query_id']}.{i + 1} {i + 1} {i} new\n")
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
    assert commands == 5 and "0.75 2\n" in capsys.readouterr().out
    runs = json.loads(Path("reports/runs/metrics.json").read_text())
    assert runs["settings"]["baseline"] == "old" and system(runs, "old")["metrics"]["ndcg@10"]["value"] == 1


def test_wikiqas_published_numbers(text_data_folder):
    write_rows("test.parquet", load_wikiqa(text_data_folder("wikiqa"), "test"))
    report = evaluate("test.parquet", "--teachers", "--metrics", "map,mrr", "--empty", "skip")
    for name, wanted in (("CNN", (0.628, 0.637)), ("CNN-Cnt", (0.668, 0.682))):
        metrics = system(report, name)["metrics"]
        assert (metrics["map"]["queries"], metrics["mrr"]["queries"]) == (243, 243)
        assert (metrics["map"]["value"], metrics["mrr"]["value"]) == pytest.approx(wanted, abs=0.0006)


def test_rows_of_mq2008_are_ir_measures(mq2008_folder):
    """A file of rows with ties, documents that a system did not score, and queries without a relevant document."""
    lists = load_mq2008(mq2008_folder, systems=[9, 15])
    bounds = lists.cu_seqlens.tolist()
    rows = [
        {
            "query_id": lists.query_ids[q], "features": row["features"].tolist(), "labels": row["labels"].tolist(),
            "doc_ids": list(lists.doc_ids[bounds[q] : bounds[q + 1]]), "teachers": ["system 9", "system 15"],
            "teacher_logits": [[None if math.isnan(x) else x for x in logits] for logits in row["teacher_logits"].tolist()],
        }
        for q, row in enumerate(lists)
    ]  # fmt: skip
    write_rows("mq2008.parquet", rows)
    report = evaluate("mq2008.parquet", "--teachers", "--baseline", "system 15")
    assert report["queries"] == {"total": 784, "labelled": 784, "relevant": 564, "paired": 564, "documents": 15_211}
    assert system(report, "system 9")["metrics"]["ndcg@10"]["p"] > 0.05
    qrels = {row["query_id"]: dict(zip(row["doc_ids"], map(int, row["labels"]), strict=True)) for row in rows}
    for m, name in enumerate(("system 9", "system 15")):
        run = {
            row["query_id"]: {
                d: logits[m] for d, logits in zip(row["doc_ids"], row["teacher_logits"], strict=True) if logits[m] is not None
            }
            for row in rows
        }
        wanted = ir_measures.calc_aggregate([nDCG @ 10, AP, RR], qrels, {q: docs for q, docs in run.items() if docs})
        values = {metric: result["value"] for metric, result in system(report, name)["metrics"].items()}
        for metric, measure in (("ndcg@10", nDCG @ 10), ("map", AP), ("mrr", RR)):
            assert values[metric] == pytest.approx(wanted[measure], abs=1e-6)


# -- runs and qrels, beside ir-measures (A12, C1)


MEASURES = {
    "ndcg": nDCG, "ndcg@10": nDCG @ 10, "ndcg@3": nDCG @ 3, "map": AP, "map@5": AP @ 5, "mrr": RR, "p@5": P @ 5,
    "recall@20": R @ 20, "success@3": Success @ 3,
}  # fmt: skip


def random_files(seed, *, queries=40, judged=60, returned=40, lowest=-1, names="d{:03}"):
    """Qrels and two runs: ties, documents that nobody judged, relevant ones that no run returned, queries that one lacks."""
    rng = np.random.default_rng(seed)
    with open("q.txt", "w") as qrels:
        for q in range(2, queries):
            for d in rng.permutation(judged + 20)[: rng.integers(1, judged)]:
                qrels.write(f"q{q} 0 {names.format(d)} {rng.choice([lowest, 0, 0, 1, 2, 4])}\n")
        qrels.write(f"q{queries} 0 {names.format(1)} 1\nq{queries} 0 {names.format(2)} 0\n")  # no run has this query
    for name, lacks in (("a", 5), ("b", 9)):
        with open(f"{name}.run", "w") as run:
            for q in range(queries):
                if q != lacks:
                    for rank, d in enumerate(rng.permutation(judged + 20)[: rng.integers(1, returned)]):
                        score = float(rng.integers(0, 6) / 3 + rng.choice([0, 1e-12]))  # the float32 of both is the same
                        run.write(f"q{q} Q0 {names.format(d)} {rank} {score!r} t\n")


def read(reader, path):
    with open(path, encoding="utf-8") as file:
        return list(reader(file))


@pytest.mark.parametrize("seed", range(6))
def test_runs_and_qrels_are_ir_measures(seed):
    random_files(seed, lowest=-1 if seed % 2 else 0)
    report = evaluate("a.run", "b.run", "--qrels", "q.txt", "--metrics", ",".join(MEASURES))
    qrels = read(ir_measures.read_trec_qrels, "q.txt")
    for name in "ab":
        run = read(ir_measures.read_trec_run, f"{name}.run")
        values = {metric: result["value"] for metric, result in system(report, name)["metrics"].items()}
        wanted = ir_measures.calc_aggregate(list(MEASURES.values()), qrels, run)
        assert values == {metric: pytest.approx(wanted[measure], abs=5e-7) for metric, measure in MEASURES.items()}
        for value in ir_measures.iter_calc([nDCG @ 10, AP], qrels, run):
            q = report["query_ids"].index(value.query_id)
            metric = "map" if value.measure == AP else "ndcg@10"
            assert report["per_query"][name][metric][q] == pytest.approx(value.value, abs=5e-7)
    assert report["queries"]["total"] == 41 and report["queries"]["labelled"] == 39
    assert report["per_query"]["a"]["map"][0] is None  # q0 is not judged


def test_what_ir_measures_has_from_other_programs():
    """gdeval, cwl_eval, MS MARCO's and its own: each breaks ties in a way of its own, so here they get runs without any."""
    measures = {
        "err@5": ERR @ 5, "err@20": ERR @ 20, "rbp": RBP(rel=1), "judged@10": Judged @ 10, "mrr@5": RR @ 5,
    }  # fmt: skip
    random_files(1, lowest=-1)
    report = evaluate("a.run", "b.run", "--qrels", "q.txt", "--metrics", ",".join(measures))
    # gdeval knows only numbers for queries.
    qrels = [qrel._replace(query_id=qrel.query_id[1:]) for qrel in read(ir_measures.read_trec_qrels, "q.txt")]
    for name in "ab":
        run = [doc._replace(query_id=doc.query_id[1:]) for doc in read(ir_measures.read_trec_run, f"{name}.run")]
        run.sort(key=lambda doc: (doc.query_id, np.float32(doc.score), doc.doc_id), reverse=True)
        run = [doc._replace(score=float(len(run) - i)) for i, doc in enumerate(run)]
        wanted = ir_measures.calc_aggregate(list(measures.values()), qrels, run)
        values = {metric: result["value"] for metric, result in system(report, name)["metrics"].items()}
        assert values == {metric: pytest.approx(wanted[measure], abs=5e-7) for metric, measure in measures.items()}
        assert min(values.values()) > 0.05 and max(values.values()) < 0.9


def test_relevant_at_is_ir_measures_rel():
    random_files(2)
    report = evaluate("a.run", "--qrels", "q.txt", "--relevant-at", "2", "--metrics", "map,mrr,p@5,recall@20,ndcg")
    qrels, run = read(ir_measures.read_trec_qrels, "q.txt"), read(ir_measures.read_trec_run, "a.run")
    wanted = ir_measures.calc_aggregate([AP(rel=2), RR(rel=2), P(rel=2) @ 5, R(rel=2) @ 20, nDCG], qrels, run)
    values = [result["value"] for result in system(report, "a")["metrics"].values()]
    assert values == pytest.approx([wanted[m] for m in (AP(rel=2), RR(rel=2), P(rel=2) @ 5, R(rel=2) @ 20, nDCG)], abs=5e-7)


def test_names_are_compared_as_trec_eval_compares_them():
    """Byte by byte: all scores are tied, so the names alone decide."""
    names = ["Z", "a", "B", "10", "9", "é", "z", "ÿ", "日本", "\U0001f600", "\uffff", "a\u00a0b", "aa", "A-1"]
    with open("a.run", "w", encoding="utf-8") as run, open("q.txt", "w", encoding="utf-8") as qrels:
        for q, relevant in enumerate(names):
            qrels.write(f"q{q} 0 {relevant} 1\n")
            run.writelines(f"q{q} Q0 {name} 1 0.5 t\n" for name in names)
    report = evaluate("a.run", "--qrels", "q.txt", "--metrics", "mrr")
    qrels = {f"q{q}": {name: 1} for q, name in enumerate(names)}
    run = {f"q{q}": dict.fromkeys(names, 0.5) for q in range(len(names))}
    wanted = {value.query_id: value.value for value in ir_measures.iter_calc([RR], qrels, run)}
    assert report["per_query"]["a"]["mrr"] == pytest.approx([wanted[q] for q in report["query_ids"]])
    assert len(set(wanted.values())) == len(names)


def test_the_organisers_runs_of_cast_2021():
    """Real runs of 239 turns, 158 of them judged, a quarter of the documents judged; the numbers are trec_eval's."""
    folder = find_data("cast2021")
    if folder is None or not (folder / "cast2021").is_dir():
        pytest.skip("needs the cast2021 files: set PILE_FAST_DATA to the folder that holds cast2021/")
    runs = [folder / f"cast2021/{name}.run.xz" for name in ("org_manual_bm25", "org_convdr_bert")]
    report = evaluate(*runs, "--qrels", folder / "cast2021/qrels.txt.xz", "--metrics", "ndcg,ndcg@10,map,mrr,p@5,recall@100")
    assert report["queries"]["labelled"] == 158
    with lzma.open(folder / "cast2021/qrels.txt.xz", "rt") as file:
        qrels = list(ir_measures.read_trec_qrels(file))
    measures = [nDCG, nDCG @ 10, AP, RR, P @ 5, R @ 100]
    for path in runs:
        with lzma.open(path, "rt") as file:
            wanted = ir_measures.calc_aggregate(measures, qrels, ir_measures.read_trec_run(file))
        values = [result["value"] for result in system(report, path.name.removesuffix(".run.xz"))["metrics"].values()]
        assert values == pytest.approx([wanted[measure] for measure in measures], abs=5e-7)


def test_runs_are_the_same_by_whatever_door_they_come(capsys):
    """As DATA, under a name, beside rows that hold the same scores, with or without --teachers, and in any order."""
    random_files(3)
    wanted = evaluate("a.run", "b.run", "--qrels", "q.txt")
    named = evaluate("--run", "x=b.run", "--run", "y=a.run", "--qrels", "q.txt")
    for name, other in (("a", "y"), ("b", "x")):
        values = dict(zip(wanted["query_ids"], wanted["per_query"][name]["ndcg@10"], strict=True))
        assert values == dict(zip(named["query_ids"], named["per_query"][other]["ndcg@10"], strict=True))
        assert system(wanted, name)["metrics"]["map"]["value"] == pytest.approx(system(named, other)["metrics"]["map"]["value"])
    rows = list(read_rows(["a.run", "b.run"], format="trec"))
    write_rows("rows.jsonl", rows)
    teachers = evaluate("rows.jsonl", "--teachers", "--run", "again=b.run", "--qrels", "q.txt")
    for name in ("a", "b"):
        for metric, result in system(wanted, name)["metrics"].items():
            assert system(teachers, name)["metrics"][metric]["value"] == pytest.approx(result["value"])
    assert teachers["per_query"]["again"] == teachers["per_query"]["b"]
    assert system(evaluate("a.run", "--teachers", "--qrels", "q.txt"), "a")["kind"] == "run"
    capsys.readouterr()
    assert main(["evaluate", "a.run", "--qrels", "q.txt"]) == 0  # without --output nothing is written
    out = capsys.readouterr().out
    assert f"{system(wanted, 'a')['metrics']['ndcg@10']['value']:.4f}" in out and "Wrote" not in out
    assert "a returned nothing for 2 of the 39 queries; they count as 0." in out


def lines(path, *texts):
    Path(path).write_text("".join(f"{text}\n" for text in texts))


@pytest.mark.parametrize(
    "run, qrels, message",
    [
        ("q Q0 d 1 0.5 t", "other 0 d 1", "--qrels q.txt: none of its queries is in the run "),
        ("q Q0 d 1 0.5 t", "", "--qrels q.txt: no judgements"),
        ("", "q 0 d 1", "a.run: no rows"),
        ("q Q0 d 1 nan t", "q 0 d 1", "a.run:1: score: expected a number that is finite in float32, got 'nan'"),
        ("q Q0 d 1 -inf t", "q 0 d 1", "a.run:1: score: expected a number that is finite in float32, got '-inf'"),
        ("q Q0 d 1 1_0 t", "q 0 d 1", "a.run:1: score: expected a number, got '1_0'"),
        ("q Q0 d 1 1e39 t", "q 0 d 1", "a.run:1: score: expected a number that is finite in float32, got '1e39'"),
        ("q Q0 d 1 0.5 t\nq Q0 d 2 0.4 t", "q 0 d 1", "a.run:2: query 'q', document 'd': appears twice in the run"),
        ("q Q0 d 1 0.5", "q 0 d 1", "a.run:1: expected 'query Q0 document rank score tag'"),
        ("q Q0 d 1 0.5 t", "q 0 d 1\nq 0 d 0", "q.txt:2: query 'q', document 'd': appears twice"),
        ("q Q0 d 1 0.5 t", "q 0 d 1\nq 0 d 1", "q.txt:2: query 'q', document 'd': appears twice"),
        ("q Q0 d 1 0.5 t", "q 0 d nan", "q.txt:1: not a grade"),
        ("q Q0 d 1 0.5 t", "q 0 d", "q.txt:1: expected 'query iteration document grade'"),
    ],
)  # fmt: skip
def test_broken_runs_and_qrels_are_one_line(capsys, run, qrels, message):  # A11, B9
    lines("a.run", *run.split("\n"))
    lines("q.txt", *qrels.split("\n"))
    lines("good.run", "q Q0 d 1 1.0 t")
    for arguments in (["a.run"], ["--run", "x=a.run"], ["good.run", "a.run"]):
        assert error_of(capsys, *arguments, "--qrels", "q.txt").startswith(message)


def test_all_lines_broken_is_an_error_even_when_they_may_be_skipped(capsys):  # A11
    lines("a.run", "q Q0 d 1 1.0 t")
    lines("q.txt", "q d 1", "q 0 e x")
    assert error_of(capsys, "a.run", "--qrels", "q.txt", "--skip-bad-rows").startswith("--qrels q.txt: no judgements")
    lines("q.txt", "q 0 d 1")
    lines("a.run", "q Q0 d 1 high t")
    assert "a.run: no rows" in error_of(capsys, "a.run", "--qrels", "q.txt", "--skip-bad-rows")


def test_broken_lines_of_runs_and_qrels_are_skipped_and_counted(capsys):
    lines("a.run", "q Q0 d 1 1.0 t", "q Q0 e 1 high t", "q Q0 f 2 0.5 t", "q Q0 d 3 0.1 t", "q Q0 g 3")
    lines("q.txt", "q 0 f 1", "q 0 d", "q 0 e 0")
    report = evaluate("a.run", "--qrels", "q.txt", "--skip-bad-rows", "--metrics", "mrr")
    assert report["bad_rows"] == 4 and system(report, "a")["metrics"]["mrr"]["value"] == 0.5
    error = capsys.readouterr().err
    assert "Left out 4 broken rows or lines:" in error
    for where in ("a.run:2: ", "a.run:4: ", "a.run:5: ", "q.txt:2: "):
        assert where in error


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["a.run"], "nothing to evaluate: give --teachers"),
        (["a.run", "--teachers"], "a.run: a run has no labels: give --qrels FILE"),
        (["--qrels", "q.txt"], "nothing to evaluate: give DATA"),
        (["a.run", "folder/a.run", "--qrels", "q.txt"], "two systems are called 'a': a.run and folder/a.run"),
        (["a.run", "--run", "a=folder/a.run", "--qrels", "q.txt"], "two systems are called 'a'"),
        (["a.run", "--qrels", "q.txt", "--column", "ensemble_logits"], "--column: needs a file of queries as DATA"),
        (["a.run", "--qrels", "q.txt", "--model", "m=folder"], "--model: needs a file of queries as DATA"),
        (["a.run", "--qrels", "folder"], "folder: Is a directory"),
        (["a.run", "--qrels", "q.txt", "--baseline", "b"], "--baseline b: expected one of a"),
        (["unlabelled.jsonl", "--teachers"], "unlabelled.jsonl: no labels; judgements can come from --qrels FILE"),
    ],
)
def test_what_does_not_fit_together_is_one_line(capsys, arguments, message):
    Path("folder").mkdir()
    for path in ("a.run", "folder/a.run"):
        lines(path, "q Q0 d 1 1.0 t")
    lines("q.txt", "q 0 d 1")
    lines("unlabelled.jsonl", '{"query_id": "q", "doc_ids": ["d"], "teacher_logits": [[1]]}')
    assert error_of(capsys, *arguments).startswith(message)


def test_without_ir_measures_its_metrics_say_what_to_install(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "ir_measures", None)
    random_files(0)
    error = error_of(capsys, "a.run", "--qrels", "q.txt", "--metrics", "map,p@5")
    assert error == "evaluate --metrics map,p@5 needs ir_measures: pip install 'pile_fast[ir-measures]'"
    assert evaluate("a.run", "--qrels", "q.txt", "--metrics", "map")["systems"]


def test_a_folder_of_parquet_files_is_data(text_rows):
    Path("parts").mkdir()
    for part in range(2):
        rows = text_rows(3, seed=part)
        for row in rows:
            row["query_id"] += f".{part}"
        write_rows(f"parts/{part}.parquet", rows)
    assert evaluate("parts", "--teachers")["queries"]["total"] == 6


def test_run_files_are_called_as_they_are_named():
    """And with qrels alone beside them they are runs, whatever their suffix."""
    paths = ("run.bm25.k1=0.9.run", "run.x.txt", "run.y.txt", "input.bm25")
    for path in paths:
        lines(path, "q Q0 d 1 1.0 t")
    lines("q.txt", "q 0 d 1")
    for source in ([], ["--from", "trec"]):
        report = evaluate(*paths, *source, "--qrels", "q.txt")
        assert [entry["name"] for entry in report["systems"]] == ["run.bm25.k1=0.9", "run.x", "run.y", "input.bm25"]


def test_interleaved_and_three_column_runs():
    lines("a.run", "q Q0 d 1 1.0 t", "p Q0 d 1 1.0 t", "q Q0 e 1 2.0 t", "p Q0 e 1 2.0 t")
    lines("b.run", "q d 2", "q e 1", "p d 2", "p e 1")
    lines("q.txt", "q 0 d 1", "p 0 e 1")
    report = evaluate("a.run", "b.run", "--qrels", "q.txt", "--metrics", "mrr")
    assert report["per_query"] == {name: {"mrr": [0.5, 1]} for name in "ab"} and report["query_ids"] == ["q", "p"]


NASTY = "$x_{$ <script>alert(1)</script> [bold]b[/bold] :smile: a\\b {{ 7 }} \x1b[2J\u202e \n %s"


def test_names_of_any_kind_are_shown_and_plotted(capsys, tmp_path):  # B13
    write_rows("data.jsonl", [{
        "query_id": "q$", "doc_ids": ["a", "b"], "labels": [1, 0], "teacher_logits": [[1.0, 2.0, 1.0], [2.0, 1.0, 2.0]],
        "teachers": [NASTY, "$x$", "n" * 5000],
    }])  # fmt: skip
    report = evaluate("data.jsonl", "--teachers", "--baseline", NASTY)
    assert [entry["name"] for entry in report["systems"]] == [NASTY, "$x$", "n" * 5000]
    assert (tmp_path / "out/metrics.png").read_bytes().startswith(b"\x89PNG")
    text = "".join(capsys.readouterr().out.split())
    assert "\x1b" not in text and "\u202e" not in text
    shown = "$x_{$ <script>alert(1)</script> [bold]b[/bold] :smile: a\\b {{ 7 }} \\x1b[2J\\u202e \\n %s"
    assert f"differencefrom{''.join(shown.split())}," in text and "[bold]" in text and ":smile:" in text


def test_many_systems_fit_in_a_plot(tmp_path, monkeypatch):
    monkeypatch.setattr("pile_fast.evaluation.comparison_report._MOST_PLOTTED", 3)
    write_rows("data.jsonl", [{
        "query_id": "q", "doc_ids": ["a", "b"], "labels": [1, 0], "teachers": [f"t{m}" for m in range(15)],
        "teacher_logits": [[float(m) for m in range(15)], [7.0] * 15],
    }])  # fmt: skip
    assert len(evaluate("data.jsonl", "--teachers", "--metrics", "mrr")["systems"]) == 15
    assert (tmp_path / "out/metrics.png").stat().st_size > 10_000
