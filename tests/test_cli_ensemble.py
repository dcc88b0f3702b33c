import json
import os
import random
import signal
import subprocess
import sys
import time

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pile_fast.cli import main
from pile_fast.data import make_synthetic, read_rows, write_rows
from pile_fast.data.rows import check_row
from pile_fast.ensembles import OFFLINE
from pile_fast.offline.ensemble import OfflineEnsemble

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


@pytest.mark.parametrize("method", OFFLINE)
def test_every_method(capsys, method):
    write_rows("a.parquet", make_rows())
    write_rows("fit.jsonl", make_rows(20, seed=1))
    arguments = ["--method", method, *(["--fit", "fit.jsonl"] if method == "stacking" else [])]
    assert main(["ensemble", "a.parquet", "--output", "b.parquet", *arguments]) == 0
    out, err = capsys.readouterr()
    assert out.splitlines()[-1] == "Wrote b.parquet." and err == ""  # no progress bar off a terminal
    assert out.startswith("Teachers' weights") == (method in ("pile", "stacking"))
    table = pq.read_table("b.parquet")
    fit = pa.Table.from_pylist(list(make_rows(20, seed=1)), table.schema) if method == "stacking" else None
    wanted = OfflineEnsemble(method, fit=fit)(pq.read_table("a.parquet"))
    assert table.equals(wanted)
    assert table["ensemble_logits"].null_count == 0


def test_options_reach_the_ensemble():
    write_rows("a.parquet", make_rows())
    options = ["--iterations", "3", "--step-size", "0.5", "--granularity", "query", "--normalize", "center"]
    options += ["--temperature", "2", "--margin", "0.25", "--pair-weight", "label_gap"]
    assert main(["ensemble", "a.parquet", "--output", "b.parquet", "--keep-weights", *options]) == 0
    ensemble = OfflineEnsemble(
        "pile", keep_weights=True, iterations=3, step_size=0.5, granularity="query", normalize="center",
        temperature=2.0, margin=0.25, pair_weight="label_gap",
    )  # fmt: skip
    assert pq.read_table("b.parquet").equals(ensemble(pq.read_table("a.parquet")))


def test_help_says_which_methods_take_an_option(capsys):
    assert main(["ensemble", "--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "all methods: calibration per query" in text and "best, ca_mkd, ebkd, pile: unit of differences" in text
    assert " rrf: a document at rank" in text and " pile: difference that a pair" in text


def test_json_lines_in_and_out_and_replaced_teachers(capsys):
    write_rows("a.jsonl", make_rows())
    assert main(["ensemble", "a.jsonl", "--output", "b.jsonl", "--method", "mean", "--replace"]) == 0
    row = next(read_rows("b.jsonl"))
    assert row["teachers"] == ["ensemble"] and row["ensemble_logits"] is None and row["documents"]
    assert main(["convert", "b.jsonl", "--output", "b.run"]) == 0


def test_what_the_user_can_put_right_is_one_line(capsys, tmp_path):
    write_rows("a.parquet", make_rows(3))
    assert error_of(capsys, "none.parquet", "--output", "b.parquet").startswith("none.parquet: no such file")
    assert error_of(capsys, "a.parquet", "--output", "a.parquet") == "a.parquet: the output would replace the input"
    assert error_of(capsys, "a.parquet", "--output", "b.csv").startswith("b.csv: the name does not tell the format")
    assert error_of(capsys, "a.parquet", "--output", "none/b.parquet").endswith(
        "none/b.parquet: cannot write there: No such file or directory"
    )
    reason = error_of(capsys, "a.parquet", "--output", "b.parquet", "--method", "mean", "--margin", "1", "--step-size", "2")
    assert reason == "--margin, --step-size: not an option of --method mean"
    reason = error_of(capsys, "a.parquet", "--output", "b.parquet", "--method", "stacking")
    assert reason.startswith("fit: stacking needs data with labels")
    assert error_of(capsys, "a.parquet", "--output", "b.parquet", "--fit", "none.jsonl", "--method", "best").startswith(
        "none.jsonl"
    )
    (tmp_path / "junk.parquet").write_bytes(b"junk")
    assert error_of(capsys, "junk.parquet", "--output", "b.parquet").startswith("junk.parquet: damaged file")
    pq.write_table(pq.read_table("a.parquet").drop_columns("labels"), "unlabelled.parquet")
    document = ["--granularity", "document"]
    assert "missing column labels" in error_of(capsys, "unlabelled.parquet", "--output", "b.parquet", *document)
    assert error_of(capsys, "a.parquet", "--output", "b.parquet", "--weights", "junk.parquet").startswith("junk.parquet: expec")
    line = error_of(capsys, "a.parquet", "--output", "b.parquet", "--missing", "bottom", "--normalize", "logit")
    assert line.startswith("--missing bottom: does not go with --normalize logit")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.parquet", "junk.parquet", "unlabelled.parquet"]


# A2: the right teacher, wherever it stands
@pytest.mark.parametrize("method", ["best", "stacking", "pile"])
@pytest.mark.parametrize("test", ["test.jsonl", "test.parquet"])
@pytest.mark.parametrize("dev", ["dev.jsonl", "dev.parquet"])
def test_fit_and_input_are_matched_by_name(capsys, method, test, dev):
    def rows(names):
        for q in range(8):
            labels = [2, 0, 1] if q % 3 else [1, 2, 0]
            scores = {"good": labels, "bad": [-label for label in labels]}
            logits = [list(x) for x in zip(*(scores[name] for name in names), strict=True)]
            yield check_row({"query_id": f"q{q}", "labels": labels, "teacher_logits": logits, "teachers": names})

    write_rows(dev, rows(["good", "bad"]))
    logits = []
    for names in (["good", "bad"], ["bad", "good"]):
        write_rows(test, rows(names))
        assert main(["ensemble", test, "--output", "out.jsonl", "--method", method, "--fit", dev]) == 0
        logits.append([row["ensemble_logits"] for row in read_rows("out.jsonl")])
    assert logits[0] == [pytest.approx(values, abs=1e-6) for values in logits[1]]
    for row in read_rows("out.jsonl"):
        order = sorted(range(3), key=lambda i: row["ensemble_logits"][i])
        assert [row["labels"][i] for i in order] == [0, 1, 2]
    capsys.readouterr()
    for names, reason in (
        (["other", "good"], "'bad' of fit is missing, the rows have other, good"),
        (["good", "bad", "third"], "nothing is known of 'third', fit has good, bad"),
    ):
        write_rows(test, ({**row, "teachers": names, "teacher_logits": [[0.0] * len(names)] * 3} for row in rows(["good"])))
        for output in ("b.parquet", "b.jsonl"):
            line = error_of(capsys, test, "--output", output, "--method", method, "--fit", dev)
            assert line == f"{test}: teachers: {reason}"
    assert not os.path.exists("b.parquet") and not os.path.exists("b.parquet.parts")


# A11
def test_nothing_to_learn_from_and_no_labels_to_go_by(capsys, tmp_path):
    write_rows("a.jsonl", make_rows(5))
    write_rows("none.jsonl", (row | {"labels": [None] * len(row["labels"])} for row in make_rows(5)))
    write_rows("all.jsonl", (row | {"labels": [1.0] * len(row["labels"])} for row in make_rows(5)))
    for method in ("best", "pile", "stacking"):
        for fit in ("none.jsonl", "all.jsonl"):
            line = error_of(capsys, "a.jsonl", "--output", "b.jsonl", "--method", method, "--fit", fit)
            assert line.startswith(f"{fit}: nothing to learn from, in no query two documents have labels that differ")
    for own in ("document", "query"):
        line = error_of(capsys, "none.jsonl", "--output", "b.jsonl", "--granularity", own)
        assert line == "none.jsonl: no document has a label, and the method pile goes by labels; mean, rrf and ebkd need none"
    warning = "in no query two documents have labels that differ, and the method pile goes by such pairs"
    assert main(["ensemble", "all.jsonl", "--output", "b.jsonl", "--granularity", "document"]) == 0
    assert capsys.readouterr().err == f"pile-fast: warning: all.jsonl: {warning}\n"
    # Weights that all queries share then are the mean's.
    for data in ("all.jsonl", "none.jsonl", "bare.parquet"):
        if data == "bare.parquet":
            write_rows("full.parquet", make_rows(5))
            pq.write_table(pq.read_table("full.parquet").drop_columns("labels"), data)
        assert main(["ensemble", data, "--output", "b.jsonl"]) == 0
        line = f"pile-fast: warning: {data}: {warning}: all teachers count the same, as in the mean\n"
        assert capsys.readouterr().err == line
        assert main(["ensemble", data, "--output", "mean.jsonl", "--method", "mean"]) == 0
        one, two = ([row["ensemble_logits"] for row in read_rows(path)] for path in ("b.jsonl", "mean.jsonl"))
        assert one == [pytest.approx(values, abs=1e-6) for values in two]
        capsys.readouterr()


# A teacher that is right and one that is wrong; the labels of the last rows are not known.
def judged_rows(queries=60, seed=0, names=("good", "bad"), unlabelled=0.0):
    rows = []
    generator = random.Random(seed)
    for q in range(queries):
        labels = [generator.randrange(3) for _ in range(generator.randint(2, 6))]
        logits = [[label + generator.random(), generator.random() - label] for label in labels]
        logits = [scores if names[0] == "good" else scores[::-1] for scores in logits]
        labels = [None] * len(labels) if q >= queries * (1 - unlabelled) else labels
        rows.append(check_row({"query_id": f"q{q}", "labels": labels, "teacher_logits": logits, "teachers": list(names)}))
    return rows


def logits_of(path):
    return [row["ensemble_logits"] for row in read_rows(path)]


def test_weights_are_learned_from_the_whole_input_first_and_printed(capsys, monkeypatch):
    rows = judged_rows(unlabelled=0.5)
    write_rows("a.parquet", rows)
    assert main(["ensemble", "a.parquet", "--output", "whole.parquet", "--keep-weights"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("Teachers' weights (from ") and "labelled queries): good 1, bad " in out
    # In parts, as JSON lines, from several files and from a folder: the same bits.
    monkeypatch.setattr("pile_fast.data.parquet.BATCH_VALUES", 40)
    assert main(["ensemble", "a.parquet", "--output", "parts.parquet", "--keep-weights"]) == 0
    assert pq.read_table("parts.parquet").equals(pq.read_table("whole.parquet"))
    assert main(["ensemble", "a.parquet", "--output", "parts.jsonl"]) == 0
    os.mkdir("data")
    write_rows("data/1.parquet", rows[:7])
    write_rows("data/2.parquet", rows[7:])
    assert main(["ensemble", "data", "--output", "folder.parquet"]) == 0
    assert logits_of("parts.jsonl") == logits_of("folder.parquet") == logits_of("whole.parquet")


def test_saved_weights_are_used_by_name(capsys, tmp_path):
    write_rows("dev.jsonl", judged_rows())
    fitted = OfflineEnsemble("pile").fitted([], ["good", "bad"])  # no pair: the mean
    assert fitted.learnt == [0.5, 0.5]
    write_rows("test.jsonl", judged_rows(9, seed=1, names=("bad", "good"), unlabelled=1.0))
    assert main(["ensemble", "test.jsonl", "--output", "fit.jsonl", "--fit", "dev.jsonl", "--normalize", "center"]) == 0
    weights = capsys.readouterr().out.splitlines()[0]
    from pile_fast.offline.ensemble import read_fit

    learned = OfflineEnsemble("pile", fit=read_fit("dev.jsonl"), normalize="center").weights
    assert str(learned) in weights
    learned.save("teacher_weights.json")
    # The scale of the teachers is that of the file, unless another one is asked for.
    assert main(["ensemble", "test.jsonl", "--output", "saved.jsonl", "--weights", "teacher_weights.json"]) == 0
    assert logits_of("saved.jsonl") == logits_of("fit.jsonl")
    capsys.readouterr()
    assert (
        main(["ensemble", "test.jsonl", "--output", "none.jsonl", "--weights", "teacher_weights.json", "--normalize", "none"])
        == 0
    )
    assert logits_of("none.jsonl") != logits_of("fit.jsonl")
    capsys.readouterr()
    line = error_of(capsys, "test.jsonl", "--output", "x.jsonl", "--weights", "teacher_weights.json", "--fit", "dev.jsonl")
    assert line == "weights: are for the method pile, and in the place of fit"


@pytest.mark.parametrize("data", ["a.jsonl", "a.parquet"])
@pytest.mark.parametrize("method", ["pile", "mean"])
def test_many_missing_scores_are_told_and_may_be_the_bottom(capsys, data, method):
    rows = judged_rows(30)
    for row in rows:
        row["teacher_logits"] = [[good, bad if i == 0 else None] for i, (good, bad) in enumerate(row["teacher_logits"])]
    write_rows(data, rows)
    missing = sum(len(row["labels"]) - 1 for row in rows)
    scores = 2 * sum(len(row["labels"]) for row in rows)
    assert main(["ensemble", data, "--output", "b.jsonl", "--method", method]) == 0
    err = capsys.readouterr().err
    assert err.startswith(f"pile-fast: warning: {data}: {missing:,} of {scores:,} scores of the teachers are missing (")
    assert "--missing bottom reads them as below the end of the teacher's list" in err and err.count("\n") == 1
    assert main(["ensemble", data, "--output", "c.jsonl", "--method", method, "--missing", "bottom"]) == 0
    assert capsys.readouterr().err == "" and logits_of("b.jsonl") != logits_of("c.jsonl")


# C8, and a folder without --ray
def test_a_folder_and_several_files(capsys, tmp_path):
    os.mkdir("data")
    rows = list(make_rows(30))
    write_rows("data/2.parquet", rows[20:])
    write_rows("data/1.parquet", rows[:20])
    write_rows("all.parquet", rows)
    for inputs in (["data"], ["data/1.parquet", "data/2.parquet"]):
        assert main(["ensemble", *inputs, "--output", "b.parquet"]) == 0
        assert main(["ensemble", "all.parquet", "--output", "whole.parquet"]) == 0
        assert list(read_rows("b.parquet")) == list(read_rows("whole.parquet"))
    turned = [row | {"teachers": row["teachers"][::-1]} for row in rows[20:]]
    write_rows("data/2.parquet", turned)
    capsys.readouterr()
    for output in ("c.parquet", "c.jsonl"):
        assert error_of(capsys, "data", "--output", output).startswith("data/2.parquet: row 1: teachers: expected ['teacher 1'")
    assert error_of(capsys, "data", "--output", "data/2.parquet") == "data/2.parquet: the output would replace the input"
    write_rows("fit.jsonl", rows)
    assert error_of(capsys, "all.parquet", "--output", "fit.jsonl", "--method", "best", "--fit", "fit.jsonl") == (
        "fit.jsonl: the output would replace the input"
    )
    os.mkdir("empty")
    assert error_of(capsys, "empty", "--output", "c.parquet").startswith("empty: a folder without Parquet files")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "all.parquet", "b.parquet", "data", "empty", "fit.jsonl", "whole.parquet"
    ]  # fmt: skip


def test_runs_as_they_come(capsys, tmp_path):
    (tmp_path / "a.run").write_text("q Q0 d1 1 2.0 a\nq Q0 d2 2 1.0 a\n")
    (tmp_path / "b.run").write_text("q Q0 d2 1 9.0 b\nq Q0 d1 2 3.0 b\n")
    (tmp_path / "qrels").write_text("q 0 d1 1\n")
    assert main(["ensemble", "a.run", "b.run", "--output", "c.jsonl", "--method", "mean", "--normalize", "none"]) == 0
    row = next(read_rows("c.jsonl"))
    assert row["teachers"] == ["a", "b"]
    assert dict(zip(row["doc_ids"], row["ensemble_logits"], strict=True)) == {"d1": 2.5, "d2": 5.0}
    assert main(["ensemble", "bm25=a.run", "b.run", "--output", "named.jsonl", "--method", "mean"]) == 0
    assert json.loads((tmp_path / "named.jsonl").read_text())["teachers"] == ["bm25", "b"]
    assert main(["ensemble", "a.run", "b.run", "--output", "c.run", "--qrels", "qrels", "--unjudged", "0"]) == 0
    best = (tmp_path / "c.run").read_text().split()[2]
    assert best == "d1"
    capsys.readouterr()
    assert "no document has a label, and the method pile goes by labels (of runs: by qrels)" in error_of(
        capsys, "a.run", "b.run", "--output", "d.run", "--granularity", "document"
    )
    assert not os.path.exists("d.run")


def test_parquet_rows_as_other_formats_are_checked_rows(capsys, tmp_path):
    table = pa.table({"query_id": ["q", "p"], "teacher_logits": [[[1.0], [2.0]]] * 2, "extra": ["x", "y"]})
    pq.write_table(table, "a.parquet")
    assert main(["ensemble", "a.parquet", "--output", "b.run", "--method", "mean"]) == 0
    assert (tmp_path / "b.run").read_text().split()[:3] == ["q", "Q0", "q.2"]
    assert main(["ensemble", "a.parquet", "--output", "b.jsonl", "--method", "mean"]) == 0
    assert '"extra": "x"' in (tmp_path / "b.jsonl").read_text()
    capsys.readouterr()
    pq.write_table(table.append_column("doc_ids", pa.array([["d", "e"], ["d", "d"]])), "a.parquet")
    assert error_of(capsys, "a.parquet", "--output", "c.run", "--method", "mean") == (
        "a.parquet: row 2: doc_ids: document 'd' appears twice"
    )
    pq.write_table(table.set_column(0, "query_id", pa.array(["q", "q"])), "a.parquet")
    assert error_of(capsys, "a.parquet", "--output", "c.run", "--method", "mean") == (
        "a.parquet: row 2: query 'q' appeared before; the documents of a query must be one row"
    )
    assert not os.path.exists("c.run")


def test_control_characters_of_names_are_shown(capsys):
    evil = "\x1b[31m\u202e\r"
    write_rows("a.jsonl", (row | {"teachers": [f"t{m}" for m in range(6)]} for row in make_rows(3)))
    write_rows("fit.jsonl", (row | {"teachers": [*(f"t{m}" for m in range(5)), evil]} for row in make_rows(3)))
    line = error_of(capsys, "a.jsonl", "--output", "b.jsonl", "--method", "best", "--fit", "fit.jsonl")
    assert "\\x1b[31m\\u202e\\r" in line and not {"\x1b", "\u202e", "\r"} & set(line)


# B15: threads read and write ahead meanwhile
INTERRUPTED = """
import sys, time
from pile_fast.cli import main
from pile_fast.data import parquet
parquet.BATCH_VALUES = 2600
read = parquet.read_tables
def slowly(*arguments):
    for part in read(*arguments):
        time.sleep(0.2)
        yield part
parquet.read_tables = slowly
sys.argv[1:] = ["ensemble", "a.parquet", "--output", "b.parquet", "--method", "mean"]
sys.exit(main())
"""


def test_an_interrupt_ends_it_within_a_second_or_so(tmp_path):
    write_rows("a.parquet", make_rows(1200))
    process = subprocess.Popen([sys.executable, "-c", INTERRUPTED], stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not (tmp_path / "b.parquet.parts/00000001.parquet").exists():
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    start = time.monotonic()
    assert process.communicate(timeout=10)[1] == "pile-fast: interrupted\n"
    assert process.returncode == 130 and time.monotonic() - start < 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.parquet", "b.parquet.parts"]


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
        (["a", "--output", "b", "--temperature", "0"], "argument --temperature: expected a number > 0, got 0.0"),
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
from pile_fast.data import parquet

parquet.BATCH_VALUES = 2600  # some 30 queries a part
parts, rng = Path("b.parquet.parts"), random.Random(int(sys.argv[1]))

def run(output):
    child = os.fork()
    if child == 0:
        os._exit(main(["ensemble", "a.parquet", "--output", output, "--keep-weights"]))
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
