import os
import random
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pile_fast.cli import main
from pile_fast.data import make_synthetic, read_rows, write_rows
from pile_fast.data.offline import METHODS, OfflineEnsemble
from pile_fast.data.rows import check_row

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def make_rows(queries=30, seed=0):
    lists = make_synthetic(queries, documents=(1, 20), seed=seed)
    for name, row in zip(lists.query_ids, lists, strict=True):
        logits = [[None if x != x else x for x in xs] for xs in row["teacher_logits"].tolist()]
        content = {"query_id": name, "labels": row["labels"].tolist(), "teacher_logits": logits}
        yield check_row(content | {"teachers": list(lists.teacher_names), "query": "text", "documents": ["text"] * len(logits)})


def error_of(capsys, *arguments):
    """The one line that a command says it failed with."""
    assert main(["ensemble", *arguments]) == 1
    text = capsys.readouterr().err
    assert text.count("\n") == 1 and text.startswith("pile-fast: error: ") and "Traceback" not in text
    return text.removeprefix("pile-fast: error: ").strip()


@pytest.mark.parametrize("method", METHODS)
def test_every_method(capsys, method):
    write_rows("a.parquet", make_rows())
    write_rows("fit.jsonl", make_rows(20, seed=1))
    arguments = ["--method", method, *(["--fit", "fit.jsonl"] if method == "stacking" else [])]
    assert main(["ensemble", "a.parquet", "--output", "b.parquet", *arguments]) == 0
    assert capsys.readouterr() == ("Wrote b.parquet.\n", "")  # no progress bar off a terminal
    table = pq.read_table("b.parquet")
    fit = pa.Table.from_pylist(list(make_rows(20, seed=1)), table.schema) if method == "stacking" else None
    wanted = OfflineEnsemble(method, fit=fit)(pq.read_table("a.parquet"))
    assert table.equals(wanted)
    assert table["ensemble_logits"].null_count == 0


def test_options_reach_the_ensemble():
    write_rows("a.parquet", make_rows())
    options = ["--iterations", "3", "--step-size", "0.5", "--granularity", "query", "--normalize", "center"]
    options += ["--temperature", "2", "--margin", "0.25", "--pair-weight", "label_gap"]
    assert main(["ensemble", "a.parquet", "--output", "b.parquet", "--weights", *options]) == 0
    ensemble = OfflineEnsemble(
        "pile", keep_weights=True, iterations=3, step_size=0.5, granularity="query", normalize="center",
        temperature=2.0, margin=0.25, pair_weight="label_gap",
    )  # fmt: skip
    assert pq.read_table("b.parquet").equals(ensemble(pq.read_table("a.parquet")))


def test_help_says_which_methods_take_an_option(capsys):
    assert main(["ensemble", "--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "all methods: calibration of each teacher" in text and "best, ca_mkd, ebkd, pile: unit of logit" in text
    assert " rrf: a document at rank" in text and " pile: difference a pair" in text


def test_json_lines_in_and_out_and_replaced_teachers(capsys):
    write_rows("a.jsonl", make_rows())
    assert main(["ensemble", "a.jsonl", "--output", "b.jsonl", "--method", "mean", "--replace"]) == 0
    row = next(read_rows("b.jsonl"))
    assert row["teachers"] == ["ensemble"] and row["ensemble_logits"] is None and row["documents"]
    assert main(["convert", "b.jsonl", "--output", "b.run"]) == 0


def test_what_the_user_can_put_right_is_one_line(capsys, tmp_path):
    write_rows("a.parquet", make_rows(3))
    assert error_of(capsys, "none.parquet", "--output", "b.parquet").startswith("none.parquet: No such file")
    assert error_of(capsys, "a.parquet", "--output", "a.parquet") == "a.parquet: the output would replace the input"
    assert error_of(capsys, "a.parquet", "--output", "b.csv").startswith("b.csv: the name does not tell the format")
    assert error_of(capsys, "a.parquet", "--output", "none/b.parquet").endswith(
        "none/b.parquet.parts: No such file or directory"
    )
    reason = error_of(capsys, "a.parquet", "--output", "b.parquet", "--method", "mean", "--margin", "1", "--step-size", "2")
    assert reason == "--margin, --step-size: not an option of --method mean"
    assert error_of(capsys, "a.parquet", "--output", "b.parquet", "--temperature", "0").startswith("temperature: expected")
    reason = error_of(capsys, "a.parquet", "--output", "b.parquet", "--method", "stacking")
    assert reason.startswith("fit: stacking needs data with labels")
    assert error_of(capsys, "a.parquet", "--output", "b.parquet", "--fit", "none.jsonl", "--method", "best").startswith(
        "none.jsonl"
    )
    (tmp_path / "junk.parquet").write_bytes(b"junk")
    assert error_of(capsys, "junk.parquet", "--output", "b.parquet").startswith("junk.parquet: damaged file")
    pq.write_table(pq.read_table("a.parquet").drop_columns("labels"), "unlabelled.parquet")
    assert "missing column labels" in error_of(capsys, "unlabelled.parquet", "--output", "b.parquet")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.parquet", "junk.parquet", "unlabelled.parquet"]


def test_a_full_disk_is_one_line_and_keeps_the_old_file(capsys, tmp_path, disk_full):
    write_rows("a.parquet", make_rows(3))
    (tmp_path / "b.jsonl").write_text("old")
    disk_full(tmp_path / "b.jsonl")
    assert "No space left on device" in error_of(capsys, "a.parquet", "--output", "b.jsonl")
    assert (tmp_path / "b.jsonl").read_text() == "old" and len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["a", "--output", "b", "--method", "ae_kd"], "argument --method: invalid choice: 'ae_kd'"),
        (["a", "--output", "b", "--iterations", "many"], "argument --iterations: invalid int value: 'many'"),
        (["a"], "the following arguments are required: --output"),
    ],
)
def test_wrong_command_line(capsys, arguments, message):
    assert main(["ensemble", *arguments]) == 2
    assert message in capsys.readouterr().err


# Forks the command from a process that has the libraries loaded, kills it, and at last lets it end.
KILLED = """
import os, random, signal, sys, time
from pathlib import Path
from pile_fast.cli import main
from pile_fast.data import offline, parquet

parquet.BATCH_VALUES = 2600  # some 30 queries a part
parts, rng = Path("b.parquet.parts"), random.Random(int(sys.argv[1]))

def run(output):
    child = os.fork()
    if child == 0:
        os._exit(main(["ensemble", "a.parquet", "--output", output, "--weights"]))
    return child

def whole():
    return len(list(parts.glob("[0-9]*.parquet"))) if parts.exists() else 0

assert os.waitpid(run("whole.parquet"), 0)[1] == 0
total = -(-1200 // parquet.rows_at_a_time(parquet.open_parquet("a.parquet")))
for least in sorted(rng.randrange(1, total) for _ in range(4)) + [total]:  # the last one: while the parts are joined
    child = run("b.parquet")
    ended = False
    while whole() < least and not ended:
        ended = os.waitpid(child, os.WNOHANG)[0] != 0
        time.sleep(0.0005)
    if ended:
        break
    time.sleep(rng.random() * 0.01)
    os.kill(child, signal.SIGKILL)
    if os.waitpid(child, 0)[1] == 0:
        break
    print("killed with", whole(), "of", total, flush=True)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(run("b.parquet"), 0)[1]))
"""


def test_killed_at_random_moments_and_resumed_it_writes_the_same_file(tmp_path):
    if not hasattr(os, "fork"):
        pytest.skip("needs os.fork")
    write_rows("a.parquet", make_rows(1200))
    seed = random.randrange(10**6)
    result = subprocess.run([sys.executable, "-c", KILLED, str(seed)], capture_output=True, text=True)
    assert result.returncode == 0, (seed, result.stdout, result.stderr)
    assert result.stdout.count("killed with") >= 3, result.stdout
    assert (tmp_path / "b.parquet").read_bytes() == (tmp_path / "whole.parquet").read_bytes(), (seed, result.stdout)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.parquet", "b.parquet", "whole.parquet"]
