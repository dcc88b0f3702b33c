"""Results of docs/text.md: from the reports that its commands wrote to benchmarks/results/text/ and into the page's table.

python benchmarks/text_results.py runs/text
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from _report import table
from _timing import where

ROOT = Path(__file__).resolve().parents[1]
SETS = ("wikiqa", "cranfield")
BEGIN, END = "<!-- results -->\n", "<!-- /results -->"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="the page's output folder, e.g. runs/text")
    folder = parser.parse_args().folder
    results = ROOT / "benchmarks/results/text"
    results.mkdir(parents=True, exist_ok=True)
    tables = []
    for name in SETS:
        report = json.loads((folder / name / "metrics.json").read_text())
        kept = {key: report[key] for key in ("settings", "queries", "systems")} | where(torch.get_num_threads())
        (results / f"{name}.json").write_text(json.dumps(kept, indent=1) + "\n")
        tables.append(f"{name}, {report['queries']['total']} queries\n\n{_table(report['systems'])}\n")
    page = ROOT / "docs/text.md"
    text = page.read_text()
    before, after = text[: text.index(BEGIN) + len(BEGIN)], text[text.index(END) :]
    page.write_text(before + "\n".join(tables) + after)


def _table(systems: list[dict]) -> str:
    metrics = list(systems[0]["metrics"])
    rows = []
    for system in sorted(systems, key=lambda system: -system["metrics"][metrics[0]]["value"]):
        first = system["metrics"][metrics[0]]
        p = "" if first.get("p_holm") is None else "< .001" if first["p_holm"] < 0.001 else f"{first['p_holm']:.3f}"
        values = [f"{system['metrics'][metric]['value']:.3f}" for metric in metrics]
        rows.append([system["name"], *values, f"{first['low']:.3f} to {first['high']:.3f}", p])
    return table(["System", *metrics, f"{metrics[0]}, 95 %", "p (Holm) against `labels`"], rows)


if __name__ == "__main__":
    main()
