"""What peers/compare.py found, as markdown and as plots."""

from __future__ import annotations

from pathlib import Path

from _report import IDLE, grouped, number, table

OURS = "pile_fast"
TITLES = {
    "pairwise_logistic": "Pairwise logistic loss (RankNet on labels)",
    "pairwise_distillation": "Pairwise distillation, squared differences",
}


def of(rows: list[dict], section: str, op: str) -> list[dict]:
    return [row for row in rows if row["section"] == section and row["op"] == op]


def over_ours(row: dict, rows: list[dict]) -> float | None:
    """How many times longer than this package's default, on the same problem."""
    problem = ("queries", "documents", "dtype")
    same = [r for r in rows if r["provider"] == OURS and all(r[key] == row[key] for key in problem)]
    return row["p50_ms"] / same[0]["p50_ms"] if row["p50_ms"] and same and same[0]["p50_ms"] else None


def lines(rows: list[dict]) -> list[list[str]]:
    out = []
    for row in rows:
        dtype = "" if row["dtype"] == "float32" else f" {row['dtype']}"
        words = [f"{row['queries']:,}×{row['documents']:,}{dtype}", row["provider"]]
        if not row["p50_ms"]:
            out.append([*words, row["failure"], "", "", "", ""])
            continue
        spread = f"{number(row['p20_ms'])}–{number(row['p80_ms'])}"
        peak = row["peak_extra_bytes"]
        share = f"{row['fraction']:.2%}" if "fraction" in row else ""
        megabytes = "–" if peak is None else f"{peak / 1e6:,.1f}"
        out.append([*words, number(row["p50_ms"]), spread, number(over_ours(row, rows)), megabytes, share])
    return out


def markdown(result: dict) -> str:
    machine, rows = result["machine"], result["rows"]
    parts = [
        "# Beside other libraries\n",
        "Written by `benchmarks/peers/compare.py`; benchmarks/README.md explains the columns. Plots lie beside this page.\n",
        f"{machine['cpu']}, {machine['threads']} threads, {machine['instruction_set']}; "
        f"commit {(result['commit'] or 'unknown')[:12]}, {result['date']}. "
        "float32 where nothing else is said, forward + backward, one process per provider, in turns."
        + (" Quick run: figures mean nothing." if result["quick"] else "")
        + "\n",
    ]
    if (taken := machine["cores_taken_by_others"]) and taken > IDLE:
        parts.append(f"**The machine was not idle: other processes took {taken:.2f} cores. Do not trust these figures.**\n")
    known = {row["provider"]: row for row in rows if row["version"]}
    scales: dict = {}
    for row in rows:
        if row["scale"]:
            scales.setdefault(row["provider"], {})[row["op"]] = row["scale"]
    about = [
        [name, row["version"], row["environment"], "; ".join(f"`{op}`: {scale}" for op, scale in scales.get(name, {}).items())]
        for name, row in known.items()
    ]
    parts.append(table(["Provider", "Version", "Environment", "Its loss is the"], about))
    columns = ["Q×n", "Provider", "ms", "p20–p80", "× pile_fast", "peak extra MB", "of the limit"]
    headings = {
        "n": "by the lists' length",
        "queries": "by the number of lists",
        "ragged": "MQ2008's list lengths",
        "dtypes": "other dtypes",
    }
    for section, heading in headings.items():
        for op, title in TITLES.items():
            if found := of(rows, section, op):
                parts.append(f"## {title}, {heading}\n\n" + table(columns, lines(found)))
    if found := [row for row in rows if row["section"] == "step"]:
        step = next((row["p50_ms"] for row in found if row["provider"] == "MiniLM-L6 step"), None)
        body = []
        for row in found:
            share = f"{row['p50_ms'] / step:.3%}" if step and row["p50_ms"] else "–"
            body.append([row["provider"], number(row["p50_ms"]) if row["p50_ms"] else row["failure"], share])
        shape = f"{found[0]['queries']} queries of {found[0]['documents']} documents"
        heading = f"## Beside a cross-encoder's training step, {shape}, 128 tokens a pair\n\n"
        parts.append(heading + table(["Provider", "ms", "of the step"], body))
    return "\n".join(parts)


def plot(result: dict, folder: Path) -> None:
    """One picture per question, peers_*.png, a panel for each of the two losses; what was not measured is not drawn."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = result["rows"]
    colours = {name: f"C{index}" for index, name in enumerate(dict.fromkeys(row["provider"] for row in rows))}

    def times_faster(row):
        same = [r for r in rows if all(r[key] == row[key] for key in ("section", "op", "queries", "documents"))]
        eager = next((r["p50_ms"] for r in same if r["provider"] == "eager"), None)
        return eager / row["p50_ms"] if eager else None

    def megabytes(row):
        return row["peak_extra_bytes"] and row["peak_extra_bytes"] / 1e6

    length = ("n", "documents", "documents in a list (batches of 16,384, or one list)")
    questions = {
        "time_by_length": (*length, "ms", lambda row: row["p50_ms"]),
        "time_by_queries": ("queries", "queries", "lists of 32 documents", "ms", lambda row: row["p50_ms"]),
        "memory_by_length": (*length, "peak extra MB", megabytes),
        "against_eager": (*length, "times faster than eager", times_faster),
        "of_the_limit": (*length, "share of the machine's limit", lambda row: row.get("fraction")),
    }
    for question, (section, x, x_label, y_label, value) in questions.items():
        ops = [op for op in TITLES if of(rows, section, op)]
        if not ops:
            continue
        figure, panels = plt.subplots(1, len(ops), figsize=(6 * len(ops), 4.5), squeeze=False, layout="constrained")
        for panel, op in zip(panels[0], ops, strict=True):
            for group in grouped([row for row in of(rows, section, op) if row["p50_ms"]], lambda row: row["provider"]):
                points = [(row[x], value(row)) for row in sorted(group, key=lambda row: row[x])]
                points = [(at, y) for at, y in points if y]
                if points:
                    name = group[0]["provider"]
                    style = {"color": colours[name], "linewidth": 3 if name == OURS else 1.2, "marker": "o"}
                    panel.plot(*zip(*points, strict=True), label=name, **style)
            panel.set(xscale="log", yscale="log", xlabel=x_label, ylabel=y_label, title=TITLES[op])
            panel.grid(alpha=0.3)
            if panel.lines:
                panel.legend(fontsize=8)
        figure.savefig(folder / f"peers_{question}.png", dpi=120)
        plt.close(figure)
