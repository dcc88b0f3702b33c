"""A few seconds of `make fuzz`, and that what it looks for would be found."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import fuzz  # noqa: E402

from pile_fast.data import DataError  # noqa: E402


@pytest.mark.parametrize("group", fuzz.TARGETS)
def test_mutated_files_are_read_or_refused_with_file_and_place(group):
    counts, found = fuzz.fuzz(group, start=1000, count={"json": 250, "text": 600, "parquet": 200}[group], names=[])
    assert not found
    assert counts["read"] > 20 and counts["refused"] > 100 and counts["neither"] == 0


@pytest.mark.parametrize("target", [target for make in fuzz.TARGETS.values() for target in make().items()], ids=lambda t: t[0])
def test_a_file_as_it_was_is_read(tmp_path, target):
    for name, content in target[1].files.items():
        (tmp_path / name).write_bytes(content)
    assert target[1].read(tmp_path, None) > 0


@pytest.mark.parametrize(
    "error, reason",
    [
        (KeyError("x"), "KeyError instead of DataError"),
        (ValueError("{folder}/a.run:1: reason"), "ValueError instead of DataError"),
        (DataError("{folder}/b.run:1", "reason"), "does not begin with the name of a file"),
        (DataError("{folder}/a.run", "reason"), "does not say where in the file"),
        (DataError("{folder}/a.run:1", "reason"), None),
        (DataError("{folder}/a.run", "no rows"), None),
    ],
)
def test_what_is_allowed(tmp_path, error, reason):
    target = fuzz.text_targets()["run"]
    error.args = tuple(text.format(folder=tmp_path) for text in error.args)
    if isinstance(error, DataError):
        error = DataError(*error.args)
    assert fuzz.allowed(error, tmp_path, target) == reason


def test_a_process_that_ends_is_found(monkeypatch, tmp_path):
    broken = tmp_path / "fuzz.py"
    text = Path(fuzz.__file__).read_text()
    broken.write_text(
        text.replace('    source = random.Random(f"{name} {seed}")\n', "    seed == 3 and os.abort()\n", 1) + "\n"
    )
    assert broken.read_text().count("os.abort()") == 1
    monkeypatch.setattr(fuzz, "__file__", str(broken))
    counts, found = fuzz.fuzz("json", start=3, count=1, names=["jsonl"])
    assert counts["neither"] == 1 and found[0].startswith("--target jsonl --seed 3: the process ended with -6")
