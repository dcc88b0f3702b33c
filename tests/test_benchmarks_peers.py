"""benchmarks/peers: the driver on its two providers that are always there, its check and its limits."""

import csv
import importlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

FOLDER = Path(__file__).parent.parent / "benchmarks" / "peers"


@pytest.fixture
def compare(monkeypatch):
    pytest.importorskip("pile_fast._cpu")
    monkeypatch.syspath_prepend(FOLDER)
    return importlib.import_module("compare")


def run(folder, *arguments):
    command = [sys.executable, str(FOLDER / "compare.py"), "--quick", "--threads", "1", "--output", str(folder), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def test_quick_run(tmp_path):
    pytest.importorskip("pile_fast._cpu")
    process = run(tmp_path, "--only", "n", "--providers", "pile_fast,eager")
    (folder,) = tmp_path.iterdir()
    result = json.loads((folder / "peers.json").read_text())
    assert {"machine", "versions", "commit", "date", "floors"} <= result.keys() and result["quick"]
    rows = result["rows"]
    assert process.returncode == 0, (process.stderr, rows)
    assert {(row["op"], row["layout"], row["provider"]) for row in rows} == {
        (op, "equal", provider) for op in ("pairwise_logistic", "pairwise_distillation") for provider in ("pile_fast", "eager")
    }
    for row in rows:
        assert row["failure"] is None and row["checked_against"] == "reference float64"
        assert 0 < row["p20_ms"] <= row["p50_ms"] <= row["p80_ms"] and row["reps"] > 0
        assert row["version"] and row["mode"] == "forward+backward" and row["dtype"] == "float32"
        if "skipped" not in result["floors"]:
            assert row["bytes"] == 12 * row["total"] and 0 < row["fraction"] < 1
    with (folder / "peers.csv").open() as file:
        table = list(csv.DictReader(file))
    assert len(table) == len(rows) and {row["commit"] for row in table} == {result["commit"] or ""}
    assert {path.name for path in folder.glob("*.png")} == {
        f"peers_{name}.png" for name in ("time_by_length", "memory_by_length", "against_eager", "of_the_limit")
    }
    assert "| 2×40 | pile_fast |" in process.stdout
    assert (folder / "peers.md").read_text() == process.stdout.removesuffix("\n")


def test_a_provider_that_does_not_exist(tmp_path):
    process = run(tmp_path, "--providers", "pile_fast,unheard-of")
    assert process.returncode == 2 and "there is no unheard-of" in process.stderr


@pytest.mark.parametrize("op", ["pairwise_logistic", "pairwise_distillation"])
def test_the_check_tells_a_wrong_result(compare, op):
    lists = compare.make_lists([4, 1, 7])
    expected = compare.Expected(op, lists)
    pairs = lists.pairs(op)
    for scale, weights in compare.SCALES.items():
        weight = weights(pairs, lists.lengths)
        loss, gradient = weight @ expected.losses, (weight[:, None] * expected.gradients).astype(np.float32)
        assert expected.failure(scale, loss, gradient) == ""
        assert expected.failure(scale, loss, gradient[lists.valid]) == ""  # packed
        assert "loss" in expected.failure(scale, loss * 1.001, gradient)
        assert "loss" in expected.failure(scale, np.nan, gradient)
        off = gradient.copy()
        off[2, 3] += 1e-3 * np.abs(gradient).max()
        assert "gradient" in expected.failure(scale, loss, off)
        off[0, 6] = 1.0  # an empty slot
        off[2, 3] = gradient[2, 3]
        assert expected.failure(scale, loss, off) == ""
    assert expected.failure(None, 0.0, np.zeros(1)) == ""


def test_pairs_are_counted_once(compare):
    lists = compare.make_lists([1, 5, 40])
    for query, n in enumerate(lists.lengths):
        labels = lists.labels[query, :n]
        assert lists.pairs("pairwise_logistic")[query] == (labels[:, None] > labels).sum()
        assert lists.pairs("pairwise_distillation")[query] == n * (n - 1) // 2


def test_hopeless_sizes_are_not_tried(compare):
    comparison = compare.Comparison([], 1, True, 0.1)
    row = {"provider": "eager", "op": "pairwise_logistic"}
    provider = compare.PROVIDERS["eager"]
    size = {"documents": 65_536, "pairs": 65_536**2}
    assert comparison.estimate("n", row, provider, size) is None  # nothing known yet
    known = row | {
        "section": "n",
        "queries": 4,
        "documents": 4096,
        "total": 4 * 4096,
        "p20_ms": 2000.0,
        "p50_ms": 2500.0,
        "failure": None,
    }
    comparison.rows = [known | {"peak_extra_bytes": 3 * 2**30}]
    assert comparison.estimate("n", row, provider, size) == (
        "out of memory: would take about 192 GiB by what 4×4,096 took; the limit is 4"
    )
    comparison.rows = [known | {"peak_extra_bytes": 2**20}]
    assert comparison.estimate("n", row, provider, size).startswith("too slow: would take about 128 s")
    assert comparison.estimate("n", row, provider._replace(time_by="documents"), size) is None
    assert comparison.estimate("queries", row, provider, size) is None
    comparison.rows = [row | {"section": "n", "p50_ms": None, "failure": "wrong: loss"}]
    assert comparison.estimate("n", row, provider, size) == "wrong: loss"


def test_a_broken_provider_is_a_line_in_the_table(compare):
    """No environment; a provider that raises; one whose file is missing; beside one that works, on ragged lists."""
    comparison = compare.Comparison([], 1, True, 0.1)
    lists = compare.make_lists([3, 1, 5])
    providers = {
        "elsewhere": compare.Provider("allrank", environment="no-such-environment"),
        "raises": compare.Provider("pile_fast", "no-such-sum"),
        "dies": compare.Provider("no-such-file"),
        "works": compare.Provider("pile_fast", "auto"),
    }
    comparison.run("x", "pairwise_logistic", lists, providers)
    failures = {row["provider"]: row["failure"] for row in comparison.rows}
    assert failures["elsewhere"] == "not installed: make bench-peers-setup"
    assert failures["raises"].startswith("failed: ValueError: pairwise")
    assert failures["dies"].startswith("failed: FileNotFoundError")
    assert failures["works"] is None
    assert [row["provider"] for row in comparison.rows if row["p50_ms"]] == ["works"]
