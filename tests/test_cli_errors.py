"""What a command ends with: one line and an exit code for what the user can put right, a traceback for a fault of ours."""

import io
import json
import lzma
import os
import sys
import warnings
import zlib
from pathlib import Path

import pyarrow as pa
import pytest

from pile_fast.cli import info, main
from pile_fast.cli.errors import UserError
from pile_fast.extras import EXTRAS
from pile_fast.printable import printable


@pytest.fixture
def command(monkeypatch):
    """A function that makes `pile-fast info` do something else."""
    return lambda function: monkeypatch.setattr(info, "run", lambda args: function())


def missing(name):
    return ModuleNotFoundError(f"No module named {name!r}", name=name)


def raised(error):
    def run():
        raise error

    return run


# Issue 15, item 5: what (the text), where (the file), what to do.
@pytest.mark.parametrize(
    "error, line",
    [
        (UserError("--output out: no"), "--output out: no"),
        (ValueError("a.jsonl:7: labels: expected 3"), "a.jsonl:7: labels: expected 3"),
        (ValueError("three\n  lines\nof text"), "three lines of text"),
        (TypeError("iterations: expected an int, got float"), "iterations: expected an int, got float"),
        (FileNotFoundError(2, "No such file or directory", "a.jsonl"), "a.jsonl: No such file or directory"),
        (OSError(28, "No space left on device"), "No space left on device"),
        (OSError("the hub said no\nmore"), "the hub said no more"),
        (missing("pyarrow.parquet"), "this command needs pyarrow: pip install 'pile_fast[train]'"),
        (missing("ray"), "this command needs ray: pip install 'pile_fast[ray]'"),
        (missing("abacus"), "this command needs abacus: pip install abacus"),
        (missing("pile_fast.students"), "this installation of pile_fast is incomplete, install it again: No module named"),
        (
            ImportError("cannot import name 'X' from 'transformers'", name="transformers"),
            "the transformers that is installed does not fit (cannot import name 'X' from 'transformers'): "
            "pip install --upgrade 'pile_fast[train]'",
        ),
        (ImportError("needs scikit-learn: pip install 'pile_fast[ensembles]'"), "needs scikit-learn: pip install"),
        (MemoryError(), "out of memory; smaller batches"),
        (pa.ArrowMemoryError("malloc of size 1 failed"), "out of memory; smaller batches"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "out of memory; smaller batches"),
        (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"), "text that is not Unicode: 'utf-8' codec can't"),
        (pa.ArrowInvalid("Parquet magic bytes not found"), "Parquet magic bytes not found"),
        (pa.ArrowNotImplementedError("no such cast"), "no such cast"),
        (zlib.error("Error -3"), "damaged file: Error -3"),
        (lzma.LZMAError("Corrupt input data"), "damaged file: Corrupt input data"),
        (EOFError("Compressed file ended"), "damaged file: Compressed file ended"),
    ],
)
def test_an_exception_that_input_explains_is_one_line_and_exit_code_1(command, capsys, error, line):
    command(raised(error))
    assert main(["info"]) == 1
    text = capsys.readouterr().err
    assert text.startswith(f"pile-fast: error: {line}") and text.count("\n") == 1 and text.endswith("\n")


def test_damaged_json_is_one_line(command, capsys):
    command(lambda: json.loads("{"))
    assert main(["info"]) == 1
    assert capsys.readouterr().err.startswith("pile-fast: error: not JSON: Expecting property name")


def unpack():
    _one, _two = [1]


@pytest.mark.parametrize(
    "function, error",
    [
        (lambda: 1 / 0, ZeroDivisionError),
        (lambda: {}["a"], KeyError),
        (lambda: None + 1, TypeError),
        (raised(TypeError("unsupported")), TypeError),
        (raised(AssertionError()), AssertionError),
        (raised(RuntimeError("shapes")), RuntimeError),
        (unpack, ValueError),  # not said by anyone: an operation that failed
        (lambda: list(zip([1], [], strict=True)), ValueError),
        (lambda: max([]), ValueError),
    ],
)
def test_a_fault_of_ours_is_not_hidden(command, function, error):
    command(function)
    with pytest.raises(error):
        main(["info"])


def test_errors_without_a_file_are_about_the_output(capsys, tmp_path, monkeypatch):
    from pile_fast.cli import convert

    monkeypatch.setattr(convert, "run", lambda args: raised(OSError(28, "No space left on device"))())
    assert main(["convert", "a.jsonl", "--output", "b.jsonl"]) == 1
    assert capsys.readouterr().err == "pile-fast: error: b.jsonl: No space left on device\n"


def test_the_traceback_behind_a_line(command, capsys, monkeypatch):
    command(raised(ValueError("a.jsonl:7: no")))
    monkeypatch.setenv("PILE_FAST_DEBUG", "1")
    assert main(["info"]) == 1
    text = capsys.readouterr().err
    assert text.startswith("Traceback") and text.endswith("pile-fast: error: a.jsonl:7: no\n")


# B13: control characters of data never reach the terminal
@pytest.mark.parametrize(
    "text, shown",
    [
        ("plain é 日本 \u200d\u200c \xa0", "plain é 日本 \u200d\u200c \xa0"),
        ("\x1b[2J\x1b]0;title\x07", r"\x1b[2J\x1b]0;title\x07"),
        ("a\rb\nc\td\x00\x7f\x08", r"a\rb\nc\td\x00\x7f\x08"),
        ("\x9b31m\x85", r"\x9b31m\x85"),  # C1
        ("\u202egnp.exe\u2066\u200e\u061c", r"\u202egnp.exe\u2066\u200e\u061c"),  # text turned around
        ("\u2028\u2029\u200b\ufeff\xad", r"\u2028\u2029\u200b\ufeff\xad"),
        ("\udcff \U000e0041", r"\udcff \U000e0041"),
        (7, "7"),
    ],
)
def test_printable(text, shown):
    assert printable(text) == shown
    assert printable(shown) == shown


def test_control_characters_in_errors_and_warnings_are_shown_not_sent(command, capsys):
    name = "\x1b[31mred\x9b\u202e\r"

    def run():
        warnings.warn(f"teacher {name!s} is odd", UserWarning, stacklevel=1)
        raise ValueError(f"query {name}: no")

    command(run)
    before = warnings.showwarning
    assert main(["info"]) == 1
    assert warnings.showwarning is before
    assert capsys.readouterr().err == (
        "pile-fast: warning: teacher \\x1b[31mred\\x9b\\u202e\\r is odd\n"
        "pile-fast: error: query \\x1b[31mred\\x9b\\u202e\\r: no\n"
    )
    assert main(["in\x1bfo"]) == 2
    assert "\x1b" not in capsys.readouterr().err


def test_a_line_has_an_end(command, capsys):
    command(raised(ValueError("x" * 10**6)))
    assert main(["info"]) == 1
    assert len(capsys.readouterr().err) < 2100


def test_standard_output_that_lacks_a_character(command, monkeypatch):
    out = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(out, encoding="ascii"))
    command(lambda: print("é ∞") or 0)
    assert main(["info"]) == 0
    assert out.getvalue() == b"\\xe9 \\u221e\n" and sys.stdout.errors == "strict"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_standard_output_on_a_full_disk(command, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdout", open("/dev/full", "w"))
    command(lambda: print("é") or 0)
    assert main(["info"]) == 1
    assert capsys.readouterr().err == "pile-fast: error: standard output: No space left on device\n"
    sys.stdout.close()  # which flushes it once more


# C8: empty folders left behind after an error
@pytest.mark.parametrize(
    "arguments",
    [
        ["evaluate", "none.jsonl", "--teachers", "--output", "new/deep/out"],
        ["inspect", "none.jsonl", "--output", "new/deep/out"],
        ["score", "data.jsonl", "--teacher", "bm25", "--output", "new/deep/out.parquet"],
    ],
)
def test_folders_made_for_nothing_go_again(capsys, tmp_path, monkeypatch, arguments):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data.jsonl").write_text('{"query_id": "q", "labels": [1]}\n')
    assert main(arguments) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["data.jsonl"]
    (tmp_path / "new").mkdir()
    assert main(arguments) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data.jsonl", "new"]  # which was there
    assert list((tmp_path / "new").iterdir()) == []
    (tmp_path / "new" / "deep").mkdir()
    (tmp_path / "new" / "deep" / "mine").touch()
    assert main(arguments) == 1
    assert [path.name for path in (tmp_path / "new" / "deep").iterdir()] == ["mine"]


def test_every_extra_that_is_named_is_there():
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    assert set(EXTRAS.values()) <= project["optional-dependencies"].keys()
