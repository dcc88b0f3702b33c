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
}
# What each format keeps of a row; document names that BGE drops are made anew.
KEPT = {
    "jsonl": set(ROW),
    "parquet": set(ROW),
    "letor": {"query_id", "doc_ids", "labels", "features"},
    "trec": {"query_id", "doc_ids", "teacher_logits", "teachers"},
    "bge": {"query_id", "query", "documents", "labels", "teacher_logits", "teachers"},
    "tevatron": {"query_id", "query", "documents", "doc_ids", "teacher_logits", "teachers"},
}


@pytest.mark.parametrize("target", FILES)
@pytest.mark.parametrize("source", FILES)
def test_from_every_format_to_every_other(capsys, tmp_path, source, target):
    needed = {"letor": {"features", "labels"}, "trec": {"teacher_logits"}, "bge": {"query", "documents", "labels"}}
    needed["tevatron"] = {"query", "documents"}
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
        (["a.jsonl", "--output", "b", "--unjudged", "none"], "argument --unjudged: invalid float value: 'none'"),
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
