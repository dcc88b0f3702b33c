import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "speed.py"


def run(tmp_path, *arguments):
    command = [sys.executable, str(SCRIPT), "--quick", "--threads", "1", "--output", str(tmp_path), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def test_quick_run(tmp_path):
    pytest.importorskip("pile_fast._cpu")
    process = run(tmp_path, "--only", "a,e,g")
    assert process.returncode == 0, process.stderr
    (path,) = tmp_path.glob("*/speed.json")
    result = json.loads(path.read_text())

    assert result["machine"]["threads"] == 1 and result["machine"]["cpu"] and result["machine"]["instruction_set"]
    assert result["versions"].keys() == {"python", "torch", "pile_fast"}
    assert {"commit", "date"} <= result.keys() and result["quick"]
    rows = result["rows"]
    assert {row["section"] for row in rows} == {"a", "e", "g"}
    assert {row["provider"] for row in rows if row["section"] == "a"} == {
        "eager", "cpp direct", "cpp chebyshev", "cpp auto", "after OpenMP: cpp auto",
    }  # fmt: skip
    assert {(row["op"], row["granularity"], row["mode"]) for row in rows if row["section"] == "a"} == {
        ("pile_ensemble", "document", "forward"),
        ("pile_ensemble", "query", "forward"),
        ("pile_loss", "document", "forward+backward"),
    }
    assert {"pile_loss", "PILELoss", "empty autograd.Function"} <= {row["provider"] for row in rows}
    for row in rows:
        assert "failure" not in row
        assert row["dtype"] == "float32" and row["reps"] > 0 and row["queries"] * row["documents"] * row["teachers"] > 0
        assert 0 < row["p20_ms"] <= row["p50_ms"] <= row["p80_ms"]
        assert row["section"] == "e" or row["checked_against"] == "reference float64"
    assert [goal["goal"] for goal in result["goals"]] == [
        "`pile_loss` 1×8×2, forward+backward: times an empty autograd.Function"
    ]
    assert path.with_name("speed.md").read_text() == process.stdout.removesuffix("\n")
    assert "| 4×16×2 | cpp auto |" in process.stdout
    assert "| `pile_loss` document, forward+backward | 2×40×4 |" in process.stdout


def test_a_section_that_does_not_exist(tmp_path):
    process = run(tmp_path, "--only", "a,x")
    assert process.returncode == 2 and "--only: no section x" in process.stderr
