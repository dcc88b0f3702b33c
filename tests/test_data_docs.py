"""docs/data.md does what it says."""

import doctest
import re
import shlex
from pathlib import Path

import pytest

from pile_fast.cli import main

PAGE = Path(__file__).parents[1] / "docs" / "data.md"


@pytest.mark.usefixtures("one_thread")
def test_examples_run_as_written(tmp_path, monkeypatch, capsys):
    pytest.importorskip("sklearn")
    monkeypatch.chdir(tmp_path)
    failed, tried = doctest.testfile(str(PAGE), module_relative=False)
    assert tried > 10 and failed == 0, capsys.readouterr().out
    commands = [line for block in re.findall(r"```sh\n(.*?)```", PAGE.read_text(), re.DOTALL) for line in block.splitlines()]
    assert len(commands) == 16
    for command in commands:
        program, *arguments = shlex.split(command)
        assert program == "pile-fast" and main(arguments) == 0, (command, capsys.readouterr().err)
    assert (tmp_path / "ensemble.run").read_text().startswith("q1 Q0 q1.1 1 ")
