import json
import os
import re
import subprocess
import sys

import pytest

import pile_fast
from pile_fast.cli import demo, main
from pile_fast.students import FeatureRanker

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def no_data_around(tmp_path, monkeypatch):
    monkeypatch.delenv("PILE_FAST_DATA", raising=False)
    monkeypatch.chdir(tmp_path)


def last_line(text):
    """The error, which must be one line without a stack trace."""
    assert text.count("\n") == 1 and "Traceback" not in text
    return text.strip()


def test_python_m_tells_versions_and_backends():
    result = subprocess.run([sys.executable, "-m", "pile_fast"], capture_output=True, text=True, check=True)
    lines = dict(line.split(None, 1) for line in result.stdout.splitlines() if not line.startswith("backend"))
    assert lines["pile_fast"] == pile_fast.__version__ and lines["python"].startswith(sys.version.split()[0])
    assert {"torch", "transformers", "threads", "devices"} <= lines.keys()
    backends = [line for line in result.stdout.splitlines() if line.startswith("backend")]
    for line, (name, status) in zip(backends, pile_fast.available_backends().items(), strict=True):
        assert name in line and ("works" in line if status.available else status.reason in line)


def test_a_reader_that_leaves_early_is_no_error():
    reader, writer = os.pipe()
    os.close(reader)
    result = subprocess.run([sys.executable, "-m", "pile_fast", "info"], stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (result.returncode, result.stderr) == (141, "")


def test_info_imports_no_optional_library():
    code = (
        "import sys; from pile_fast.cli import main; main(['info']);"
        "sys.exit(bool({'transformers', 'rich', 'matplotlib', 'sklearn', 'datasets'} & sys.modules.keys()))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "required: command"),
        (["distil"], "invalid choice: 'distil'"),
        (["demo", "--missing", "no"], "argument --missing: invalid choice: 'no'"),
        (["demo", "--epochs", "0"], "argument --epochs: expected a whole number >= 1, got '0'"),
        (["demo", "--seed", "-1"], "argument --seed: expected a whole number >= 0, got '-1'"),
        (["demo", "--what"], "unrecognized arguments: --what"),
    ],
)
def test_wrong_command_line_is_one_line_and_exit_code_2(capsys, arguments, message):
    assert main(arguments) == 2
    assert message in last_line(capsys.readouterr().err)


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["demo", "--help"], ["info", "--help"]])
def test_help_and_version(capsys, arguments):
    assert main(arguments) == 0
    assert capsys.readouterr().out


def test_data_folder_without_the_files_names_the_missing_one(capsys, tmp_path):
    (tmp_path / "here").mkdir()
    assert main(["demo", "--data", "here"]) == 1
    assert last_line(capsys.readouterr().err) == "pile-fast: error: here/mq2008/S1.txt: no such file, nor with .xz or .gz"
    assert main(["demo", "--data", "nowhere"]) == 1
    assert last_line(capsys.readouterr().err) == "pile-fast: error: data folder nowhere does not exist"


def test_broken_data_file_is_one_line(capsys, tmp_path):
    (tmp_path / "mq2008").mkdir()
    (tmp_path / "mq2008_agg").mkdir()
    for name in ("mq2008/S2.txt", "mq2008/S3.txt", "mq2008/S4.txt", "mq2008/S5.txt", "mq2008_agg/mq2008_teachers.csv"):
        (tmp_path / name).touch()
    (tmp_path / "mq2008/S1.txt").write_text("1 qid:1 1:1\n1 qid:1 one:1\n")
    assert main(["demo", "--data", str(tmp_path)]) == 1
    assert f"{tmp_path}/mq2008/S1.txt:2: feature index: expected a whole number" in last_line(capsys.readouterr().err)


def test_unwritable_output_is_refused_before_any_work(capsys, tmp_path, monkeypatch):
    (tmp_path / "taken").touch()
    monkeypatch.setattr(demo, "_load", lambda *args: pytest.fail("data was read"))
    assert main(["demo", "--output", "taken/below"]) == 1
    assert last_line(capsys.readouterr().err).startswith("pile-fast: error: --output taken/below: cannot write there: ")


def test_missing_extra_names_the_install_command(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "rich", None)
    assert main(["demo"]) == 1
    assert last_line(capsys.readouterr().err) == "pile-fast: error: the demo needs rich: pip install 'pile_fast[train]'"


def check_demo(capsys, output, teachers):
    """The tables and metrics.json say the same, of every student and teacher; the picture and a student are there."""
    lines = capsys.readouterr().out.splitlines()
    report = json.loads((output / "metrics.json").read_text())
    quality = {(row["name"], row["labels"]): row["ndcg"][0] for row in report["students"]}
    assert len(report["students"]) == len(quality) == 9
    # Labels that the mean's student does not see cannot change it, so there is one.
    assert [key for key in quality if key[1] is None] == [("mean", None)]
    for share, shown in ((1.0, "all"), (0.2, "20 %")):
        names = [name for name, of in quality if of == share]
        assert names == ["labels only", "mean + labels", "PILE shared", "PILE shared + labels"]
        for row in report["students"]:
            if row["labels"] == share:
                assert 0 < row["ndcg"][0] <= 1 and 0 < row["ndcg"][1] < 0.2
                assert row["minus_mean"][0] == pytest.approx(row["ndcg"][0] - quality["mean", None])
                (line,) = (line for line in lines if re.match(rf" *{re.escape(row['name'])} +{shown} ", line))
                for (value, margin), sign in ((row["ndcg"], ""), (row["minus_mean"], "+")):
                    assert f"{value:{sign}.3f} ±{margin:.3f}" in line
    assert len(report["teachers"]) == teachers
    for share in ("all", "20 %"):
        assert sum(row["weights"][share] for row in report["teachers"]) == pytest.approx(1)
    heaviest = report["teachers"][0]
    (line,) = (line for line in lines if re.match(rf" *{heaviest['name']} ", line))
    assert f"{heaviest['weights']['all']:.3f}" in line and f"{heaviest['weights']['20 %']:.3f}" in line
    assert (output / "quality.png").read_bytes().startswith(b"\x89PNG")
    assert isinstance(FeatureRanker.from_pretrained(output / "student"), FeatureRanker)
    return lines, report


def test_demo_on_generated_data_says_so_and_shows_the_benefit(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "find_data", lambda *args: None)  # a checkout may have data/ of its own
    assert main(["demo", "--quick"]) == 0
    lines, report = check_demo(capsys, tmp_path / "runs/demo", teachers=6)
    assert "GENERATED" in lines[0] and "GENERATED" in report["data"]
    assert report["test_queries"] == 80
    for row in report["students"]:
        if row["name"].startswith("PILE"):
            value, margin = row["minus_mean"]
            assert value > margin
    # "teacher 1" and "teacher 2" are the good ones, "teacher 6" misleads.
    for share in ("all", "20 %"):
        weights = {row["name"]: row["weights"][share] for row in report["teachers"]}
        assert sorted(weights, key=weights.__getitem__, reverse=True)[:2] == ["teacher 1", "teacher 2"]
        assert min(weights, key=weights.__getitem__) == "teacher 6"


@pytest.mark.parametrize("missing, read_as", [("bottom", "below the end of its list"), ("nan", "not scored")])
def test_demo_on_mq2008(capsys, tmp_path, mq2008_folder, missing, read_as):
    arguments = ["--data", str(mq2008_folder), "--output", str(tmp_path / "out"), "--missing", missing]
    assert main(["demo", *arguments, "--epochs", "1", "--quick"]) == 0
    lines, report = check_demo(capsys, tmp_path / "out", teachers=23)
    assert lines[0].startswith("MQ2008 in ") and read_as in lines[0]
    assert report["test_queries"] == 156 and report["folds"] == [1]
    assert any("others together" in line for line in lines)
