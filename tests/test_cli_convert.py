import gzip
import json
import subprocess
import sys

import pytest
import torch

from pile_fast.cli import main
from pile_fast.data import RankedLists, check_row, load_mq2008, read_rows, write_rows

ROW = {
    "query_id": "q",
    "query": "text",
    "documents": ["a", "b"],
    "doc_ids": ["1", "2"],
    "labels": [1, 0],
    "teacher_logits": [[0.5], [0.25]],
    "teachers": ["teacher"],
    "features": [[1.0, 0.0], [0.0, 2.0]],
}


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def error_of(capsys, *arguments):
    """The one line that a command says it failed with."""
    assert main(list(arguments)) == 1
    text = capsys.readouterr().err
    assert text.count("\n") == 1 and text.startswith("pile-fast: error: ") and "Traceback" not in text
    return text.removeprefix("pile-fast: error: ").strip()


FILES = {
    "jsonl": "a.jsonl.gz",
    "parquet": "a.parquet",
    "letor": "a.svm",
    "trec": "teacher.run",
    "bge": "bge.jsonl",
    "tevatron": "t.jsonl",
    "qrels": "a.qrels",
}
# What each format keeps of a row; document names that BGE drops are made anew.
KEPT = {
    "jsonl": set(ROW),
    "parquet": set(ROW),
    "letor": {"query_id", "doc_ids", "labels", "features"},
    "trec": {"query_id", "doc_ids", "teacher_logits", "teachers"},
    "bge": {"query_id", "query", "documents", "labels", "teacher_logits", "teachers"},
    "tevatron": {"query_id", "query", "documents", "doc_ids", "teacher_logits", "teachers"},
    "qrels": {"query_id", "doc_ids", "labels"},
}


@pytest.mark.parametrize("target", FILES)
@pytest.mark.parametrize("source", FILES)
def test_from_every_format_to_every_other(capsys, tmp_path, source, target):
    needed = {"letor": {"features", "labels"}, "trec": {"teacher_logits"}, "bge": {"query", "documents", "labels"}}
    needed |= {"tevatron": {"query", "documents"}, "qrels": {"labels"}}
    write_rows(FILES[source], [check_row(ROW)], format=source)
    output = f"out/{FILES[target]}"
    (tmp_path / "out").mkdir()
    arguments = ["convert", FILES[source], "--output", output, "--from", source, "--to", target]
    if not needed.get(target, set()) <= KEPT[source]:
        assert error_of(capsys, *arguments)
        assert not list((tmp_path / "out").iterdir())
        return
    assert main(arguments) == 0
    assert capsys.readouterr() == (f"Wrote 1 queries to {output}.\n", "")  # no progress bar off a terminal
    (row,) = read_rows(output, format=target)
    kept = KEPT[source] & KEPT[target]
    assert {name: row[name] for name in kept - {"doc_ids"}} == {name: ROW[name] for name in kept - {"doc_ids"}}
    assert row["doc_ids"] == (ROW["doc_ids"] if "doc_ids" in kept else ["q.1", "q.2"])


def test_runs_with_judgements_and_texts(capsys, tmp_path):
    (tmp_path / "bm25.run").write_text("1 Q0 d1 1 7.5 x\n1 Q0 d2 2 7 x\n")
    (tmp_path / "dense.run").write_text("1 Q0 d2 1 0.5 x\n")
    (tmp_path / "qrels").write_text("1 0 d2 3\n")
    (tmp_path / "queries.tsv").write_text("1\twhat\n")
    with gzip.open("docs.tsv.gz", "wt") as file:
        file.write("d1\tone\nd2\ttwo\n")
    files = ["--qrels", "qrels", "--queries", "queries.tsv", "--documents", "docs.tsv.gz", "--unjudged", "0"]
    assert main(["convert", "bm25.run", "dense.run", "--output", "a.jsonl", *files]) == 0
    assert json.loads((tmp_path / "a.jsonl").read_text()) == {
        "query_id": "1", "query": "what", "documents": ["one", "two"], "doc_ids": ["d1", "d2"], "labels": [0, 3],
        "teacher_logits": [[7.5, None], [7, 0.5]], "teachers": ["bm25", "dense"],
    }  # fmt: skip
    assert main(["convert", "a.jsonl", "--output", "back.run", "--teacher", "dense"]) == 0
    assert (tmp_path / "back.run").read_text() == "1 Q0 d2 1 0.5 dense\n"
    assert "expected one of 'bm25', 'dense'; none was named" in error_of(capsys, "convert", "a.jsonl", "--output", "c.run")


# A11
@pytest.mark.parametrize(
    "qrels, skip, reason",
    [
        ("x 0 d1 1\n", [], "qrels: judges no query of the runs: theirs are such as '1', here such as 'x'"),
        ("x 0 d1 1\n", ["--unjudged", "0"], "qrels: judges no query of the runs: theirs are such as '1', here such as 'x'"),
        ("1 0 d9 1\n", [], "qrels: judges none of the runs' 1 documents, so all would be unlabelled"),
        (
            "1 0 d1\n1 d1 1\n",
            ["--skip-bad-rows"],
            "qrels: no judgements: all lines are broken, the first: qrels:1: expected 'q",
        ),
        ("1 0 d1 nan\n", ["--skip-bad-rows"], "qrels: no judgements: all lines are broken, the first: qrels:1: not a grade: e"),
        ("", [], "qrels: no judgements"),
    ],
)
def test_qrels_that_label_nothing_stop_the_command(capsys, tmp_path, qrels, skip, reason):
    (tmp_path / "a.run").write_text("1 Q0 d1 1 7.5 x\n")
    (tmp_path / "qrels").write_text(qrels)
    error = error_of(capsys, "convert", "a.run", "--output", "a.jsonl", "--qrels", "qrels", *skip)
    assert error.startswith(reason) and not (tmp_path / "a.jsonl").exists()


# Teachers' names
def test_runs_are_named_by_the_command_line(capsys, tmp_path):
    for name in ("run.x.txt", "run.y.txt", "k1=0.9.run"):
        (tmp_path / name).write_text("1 Q0 d1 1 7.5 x\n")

    def teachers(*arguments):
        assert main(["convert", *arguments, "--from", "trec", "--output", "a.jsonl"]) == 0
        return json.loads((tmp_path / "a.jsonl").read_text())["teachers"]

    assert teachers("run.x.txt", "run.y.txt") == ["run.x", "run.y"]
    assert teachers("first one=run.x.txt", "run.y.txt", "k1=0.9.run") == ["first one", "run.y", "k1=0.9"]
    assert teachers("a=k1=0.9.run") == ["a"]
    for arguments in (["run.x.txt", "run.x.txt"], ["a=run.x.txt", "a=run.y.txt"]):
        error = error_of(capsys, "convert", *arguments, "--from", "trec", "--output", "b.jsonl")
        assert "expected runs of different names" in error and "NAME=FILE" in error
    assert error_of(capsys, "convert", "a=none.run", "--output", "b.jsonl") == "a=none.run: no such file"


# C8
def test_documents_without_a_label_can_be_left_out(capsys, tmp_path):
    write_rows("a.jsonl", [check_row(ROW | {"labels": [1, None]}), check_row(ROW | {"query_id": "r", "labels": None})])
    for target, name in (("bge", "b.jsonl"), ("letor", "b.txt"), ("tevatron", "b.jsonl")):
        arguments = ["convert", "a.jsonl", "--output", name, "--to", target]
        if target != "tevatron":  # which holds the teacher's scores instead
            error = error_of(capsys, *arguments)
            assert error.startswith("query 'q'") and "document" in error and "convert --drop-unlabelled" in error
        assert main([*arguments, "--drop-unlabelled"]) == 0
        assert capsys.readouterr().out.splitlines()[1] == "Left out 3 documents without a label."
        (row,) = read_rows(name, format=target)
        assert row["query_id"] == "q" and len(row["doc_ids"]) == 1
    write_rows("a.jsonl", [check_row(ROW | {"labels": None})])
    assert error_of(capsys, "convert", "a.jsonl", "--output", "c.txt", "--drop-unlabelled") == "no query is left to write"
    assert not (tmp_path / "c.txt").exists()


# C8
def test_labels_become_qrels_and_come_back_beside_a_run(capsys, tmp_path):
    write_rows("a.jsonl", [check_row(ROW | {"labels": [20000001, 0]})])
    assert main(["convert", "a.jsonl", "--output", "a.txt", "--to", "qrels"]) == 0
    assert (tmp_path / "a.txt").read_text() == "q 0 1 20000001\nq 0 2 0\n"
    assert main(["convert", "a.jsonl", "--output", "teacher.run"]) == 0
    assert main(["convert", "teacher.run", "--qrels", "a.txt", "--output", "b.parquet"]) == 0
    assert next(read_rows("b.parquet"))["labels"] == [20000001, 0]


def test_control_characters_of_data_do_not_reach_the_terminal(capsys, tmp_path):
    hostile = "\x1b]0;title\x07\x1b[31m\u202e"
    texts = {
        "a.jsonl": json.dumps({"query_id": hostile, "labels": [1]}) * 2 + "\n",
        "b.jsonl": (json.dumps({"query_id": hostile, "labels": [1]}) + "\n") * 2,
        "c.jsonl": json.dumps({"query_id": "q", "doc_ids": [hostile, hostile]}),
        "d.jsonl": json.dumps({"query_id": "q", "labels": [hostile]}),
        "e.jsonl": json.dumps({"query_id": "q", "teachers": [hostile, "b"], "teacher_logits": [[1]]}),
        "a.txt": f"1 qid:{hostile} 1:1\n1 qid:x 1:1\n1 qid:{hostile} 1:1\n",
        "b.txt": f"{hostile} qid:1 1:1\n",
        "c.txt": f"1 qid:1 {hostile}:1\n",
        "a.run": f"1 Q0 {hostile} 1 1 x\n1 Q0 {hostile} 1 1 x\n",
        "b.run": f"1 Q0 a 1 {hostile} x\n",
        "c.run": f"{hostile}\n",
        "a.qrels": f"{hostile} 0 {hostile} 1\n{hostile} 0 {hostile} 2\n",
    }
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
        for skip in ([], ["--skip-bad-rows"]):
            main(["convert", name, "--output", "out.jsonl", *skip])
            told = capsys.readouterr()
            assert (told.err + told.out).replace("\n", "").isprintable(), name
            assert name in told.err


def test_a_broken_line_stops_the_command_or_is_reported(capsys, tmp_path):
    lines = [json.dumps(ROW | {"query_id": f"q{i}"}) for i in range(3)] + ["{"] * 12
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    arguments = ["convert", "a.jsonl", "--output", "b.parquet"]
    assert error_of(capsys, *arguments).startswith("a.jsonl:4: not JSON: ")
    assert not (tmp_path / "b.parquet").exists()
    assert main([*arguments, "--skip-bad-rows"]) == 0
    out, err = capsys.readouterr()
    assert out == "Wrote 3 queries to b.parquet.\n" and len(list(read_rows("b.parquet"))) == 3
    assert err.startswith("Left out 12 broken rows or lines, the first 10:\n  a.jsonl:4: not JSON") and err.count("\n") == 11
    (tmp_path / "a.jsonl").write_text("{\n{}\n")
    reason = error_of(capsys, *arguments, "--skip-bad-rows")
    assert reason.startswith("a.jsonl: no rows: all 2 are broken, the first: a.jsonl:1: not JSON")


def test_what_the_user_can_put_right_is_one_line(capsys, tmp_path):
    write_rows("a.jsonl", [check_row(ROW)])
    (tmp_path / "folder.jsonl").mkdir()
    assert error_of(capsys, "convert", "none.jsonl", "--output", "b.parquet") == "none.jsonl: no such file"
    assert error_of(capsys, "convert", "a.jsonl", "--output", "b") == (
        "b: the name does not tell the format; give it, one of jsonl, parquet, letor, trec, qrels, bge, tevatron"
    )
    reason = error_of(capsys, "convert", "a.jsonl", "--output", "none/b.jsonl")
    assert reason.endswith("none/b.jsonl: cannot write there: No such file or directory")
    assert error_of(capsys, "convert", "a.jsonl", "--output", "folder.jsonl").endswith("folder.jsonl: not a regular file")
    assert "qrels: not an option of the format jsonl" in error_of(
        capsys, "convert", "a.jsonl", "--output", "b.jsonl", "--qrels", "a.jsonl"
    )


@pytest.mark.parametrize("name", ["b.parquet", "b.jsonl", "b.jsonl.gz"])
def test_a_full_disk_is_one_line_and_leaves_nothing(capsys, tmp_path, disk_full, name):
    write_rows("a.jsonl", [check_row(ROW)])
    disk_full(tmp_path / name)
    assert "No space left on device" in error_of(capsys, "convert", "a.jsonl", "--output", name)
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "the following arguments are required: --output"),
        (["a.jsonl", "--output", "b", "--to", "csv"], "argument --to: invalid choice: 'csv'"),
        (["a.jsonl", "--output", "b", "--unjudged", "none"], "argument --unjudged: expected a number, got 'none'"),
        (["a.jsonl", "--output", "b", "--unjudged", "nan"], "argument --unjudged: expected a number, got 'nan'"),
        (["a.jsonl", "--output", "b", "--unjudged", "1_0"], "argument --unjudged: expected a number, got '1_0'"),
    ],
)
def test_wrong_command_line(capsys, arguments, message):
    assert main(["convert", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_help_imports_no_optional_library():
    code = (
        "import sys; from pile_fast.cli import main; main(['convert', '--help']); main(['ensemble', '--help']);"
        "sys.exit(bool({'pyarrow', 'datasets', 'ray', 'transformers', 'sklearn'} & sys.modules.keys()))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


def test_a_public_data_set_by_name(mq2008_folder, capsys):
    arguments = ["convert", "--data", str(mq2008_folder), "--dataset"]
    assert main([*arguments, "mq2008-S4", "--output", "all.parquet"]) == 0
    assert main([*arguments, "mq2008-S4", "--with-pairs", "--output", "pairs.parquet"]) == 0
    lists = load_mq2008(mq2008_folder, missing="bottom").part("S4")
    read = RankedLists.from_rows(read_rows("all.parquet"))
    for name in ("features", "labels", "teacher_logits", "cu_seqlens"):
        torch.testing.assert_close(getattr(read, name), getattr(lists, name), rtol=0, atol=0, equal_nan=True)
    assert (read.query_ids, read.doc_ids, read.teacher_names) == (lists.query_ids, lists.doc_ids, lists.teacher_names)
    pairs = [row["query_id"] for row in read_rows("pairs.parquet")]
    assert pairs == [q for q, row in zip(lists.query_ids, lists, strict=True) if len(row["labels"].unique()) > 1]
    assert 0 < len(pairs) < len(lists)


def test_a_public_data_set_that_is_not_there(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("PILE_FAST_DATA", raising=False)
    wikiqa = ("convert", "--output", "a.jsonl", "--dataset", "wikiqa-dev")
    assert "WikiQA-dev.txt: no such file" in error_of(capsys, *wikiqa, "--data", str(tmp_path))
    assert error_of(capsys, "convert", "--output", "a.jsonl") == "expected either INPUT files or --dataset"
    assert main([*wikiqa[:-1], "wikiqa"]) == 2 and "wikiqa-train" in capsys.readouterr().err
