"""The goals, and a run's result as markdown."""

from __future__ import annotations

from _overhead import EMPTY

EAGER = "eager"
BUSY = "after OpenMP: cpp auto"
# Factors over eager an ensemble should reach; a loss half of them.
SHAPES = {(256, 32, 4): 20, (256, 128, 4): 120, (64, 512, 8): 1000, (16, 1024, 8): 2000}
LONG_DOCUMENTS, LONG_GOAL_MS = 262_144, 40.0
GROWTH_GOAL, MEMORY_GOAL, CALL_GOAL = 1.5, 3.0, 1.5
IDLE = 0.05  # cores that other processes may take before the figures are called into question


def shape(row: dict) -> tuple[int, int, int]:
    return row["queries"], row["documents"], row["teachers"]


def times(row: dict) -> str:
    """Q×N×M"""
    return "×".join(f"{size:,}" for size in shape(row))


def title(row: dict) -> str:
    return f"`{row['op']}` {row['granularity']}, {row['mode']}"


def grouped(rows: list[dict], key) -> list[list[dict]]:
    groups: dict = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return list(groups.values())


def of_section(rows: list[dict], section: str) -> list[dict]:
    return [row for row in rows if row["section"] == section]


def ratios_to_eager(group: list[dict]) -> dict[str, float]:
    median = {row["provider"]: row["p50_ms"] for row in group if row["p50_ms"]}
    return {name: median[EAGER] / ms for name, ms in median.items()} if EAGER in median else {}


def per_document_ns(row: dict) -> float:
    return row["p50_ms"] * 1e6 / (row["queries"] * row["documents"])


def growths(rows: list[dict]) -> list[list[dict]]:
    """Section c by op and layout, each from the shortest lists to the longest."""
    return [
        sorted(group, key=lambda row: row["documents"])
        for group in grouped(of_section(rows, "c"), lambda row: (title(row), row["layout"]))
    ]


def goals(rows: list[dict]) -> list[dict]:
    """Every goal that the run measured: what was wanted and what was reached (None: no figure), both in the goal's unit."""
    found = []

    def goal(what: str, wanted: float, reached: float | None, at_least: bool = False) -> None:
        met = reached is not None and (reached >= wanted if at_least else reached <= wanted)
        found.append({"goal": what, "at_least" if at_least else "at_most": wanted, "reached": reached, "met": met})

    for group in grouped(of_section(rows, "a"), lambda row: (title(row), shape(row))):
        if wanted := SHAPES.get(shape(group[0])):
            half = 2 if group[0]["op"] == "pile_loss" else 1
            reached = ratios_to_eager(group).get("cpp auto")
            goal(f"{title(group[0])}, {times(group[0])}: times faster than eager", wanted / half, reached, at_least=True)
    for row in of_section(rows, "b"):
        if row["documents"] == LONG_DOCUMENTS and row["op"] == "pile_ensemble":
            goal(f"{title(row)}, {times(row)}: ms", LONG_GOAL_MS, row["p50_ms"])
    for group in growths(rows):
        reached = per_document_ns(group[-1]) / per_document_ns(group[0]) if group[0]["p50_ms"] and group[-1]["p50_ms"] else None
        span = f"{group[0]['documents']:,} to {group[-1]['documents']:,}"
        goal(f"{title(group[0])}, {group[0]['layout']}: growth of the cost per document, {span}", GROWTH_GOAL, reached)
    for row in of_section(rows, "d"):
        peak = row["peak_extra_bytes"]
        reached = None if peak is None else peak / row["input_bytes"]
        goal(f"{title(row)}, {times(row)}: peak extra memory over the inputs", MEMORY_GOAL, reached)
    median = {row["provider"]: row["p50_ms"] for row in of_section(rows, "e")}
    if median:
        reached = median["pile_loss"] / median[EMPTY] if median["pile_loss"] and median[EMPTY] else None
        goal("`pile_loss` 1×8×2, forward+backward: times an empty autograd.Function", CALL_GOAL, reached)
    return found


def number(x: float | None, digits: int = 3) -> str:
    """Three significant digits, no exponent."""
    if x is None:
        return "–"
    decimals = 0 if abs(x) >= 100 else 1 if abs(x) >= 10 else 2 if abs(x) >= 1 else digits
    return f"{x:,.{decimals}f}"


def timed(row: dict, scale: float = 1.0) -> list[str]:
    """Median and p20–p80, or why there is none."""
    if row["p50_ms"] is None:
        return [row.get("failure", "–"), ""]
    return [number(row["p50_ms"] * scale), f"{number(row['p20_ms'] * scale)}–{number(row['p80_ms'] * scale)}"]


def limit(row: dict) -> list[str]:
    """Which limit binds, the model's milliseconds, the fraction reached."""
    if "fraction" not in row:
        return ["", "", ""]
    return [row["binding"], number(row[f"{row['binding']}_ms"]), f"{row['fraction']:.0%}"]


LIMIT = ["limit", "limit ms", "reached"]


def table(columns: list[str], rows: list[list[str]]) -> str:
    """Columns whose title begins with a capital hold words, the others figures."""
    aligned = [":--" if column[:1].isupper() else "--:" for column in columns]
    lines = [columns, aligned, *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def markdown(result: dict) -> str:
    rows, machine, versions = result["rows"], result["machine"], result["versions"]
    parts = [
        "# Speed on the CPU\n",
        "Written by `benchmarks/speed.py`; benchmarks/README.md explains the columns. The goals are ratios to the reference\n"
        "run eagerly, in the same process. 'batch' compares 1,000 lists of 1,000 documents with one list of 1,000,000: the\n"
        "short lists stay in L2, the long one streams from memory, which is the difference.\n",
        f"{machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads, {machine['instruction_set']}; "
        f"Python {versions['python']}, PyTorch {versions['torch']}, pile_fast {versions['pile_fast']}, "
        f"commit {(result['commit'] or 'unknown')[:12]}, {result['date']}. float32, T = 10."
        + (" Quick run: figures mean nothing." if result["quick"] else "")
        + "\n",
    ]
    if (taken := machine["cores_taken_by_others"]) and taken > IDLE:
        parts.append(f"**The machine was not idle: other processes took {taken:.2f} cores. Do not trust these figures.**\n")

    def add(heading: str, body: list[str]) -> None:
        parts.append(f"## {heading}\n\n" + "\n".join(body))

    if result["goals"]:
        lines = []
        for goal in result["goals"]:
            wanted = f"≥ {goal['at_least']:g}" if "at_least" in goal else f"≤ {goal['at_most']:g}"
            lines.append([goal["goal"], wanted, number(goal["reached"]), "yes" if goal["met"] else "**no**"])
        add("Goals", [table(["Goal", "wanted", "reached", "met"], lines)])
    if floors := result["floors"]:
        lines = [
            [f"copy, threads: {threads}", f"{rate:.1f} GB/s read + written"]
            for threads, rate in floors["copy_bytes_per_ns"].items()
        ]
        for threads, rates in floors.get("vectors_per_ns", {}).items():
            lines += [
                [f"{what}, threads: {threads}", f"{rate * floors['lanes']:.1f} G/s ({rate:.2f} vectors/ns)"]
                for what, rate in rates.items()
            ]
        if "skipped" in floors:
            lines.append(["arithmetic", f"not measured: {floors['skipped']}"])
        add("The machine's limits", [table(["What", "rate"], lines)])
    for group in grouped(of_section(rows, "a"), title):
        lines = []
        for same in grouped(group, shape):
            ratio = ratios_to_eager(same)
            lines += [
                [times(row), row["provider"], *timed(row), number(ratio.get(row["provider"])), *limit(row)] for row in same
            ]
        add(f"Against PyTorch: {title(group[0])}", [table(["Q×N×M", "Provider", "ms", "p20–p80", "× eager", *LIMIT], lines)])
    if group := of_section(rows, "b"):
        lines = [[title(row), times(row), *timed(row), *limit(row)] for row in group]
        add("One long list", [table(["Call", "Q×N×M", "ms", "p20–p80", *LIMIT], lines)])
    if groups := growths(rows):
        lines = []
        for group in groups:
            base = per_document_ns(group[0]) if group[0]["p50_ms"] else None
            for row in group:
                timings = timed(row, 1e6 / (row["queries"] * row["documents"]))
                grown = per_document_ns(row) / base if base and row["p50_ms"] else None
                lines.append([title(row), row["layout"], times(row), *timings, number(grown), *limit(row)])
        add("Cost per document", [table(["Call", "Layout", "Q×N×M", "ns / document", "p20–p80", "growth", *LIMIT], lines)])
    if found := of_section(rows, "g"):
        lines = []
        for same in grouped(found, lambda row: (title(row), shape(row))):
            median = {row["provider"]: timed(row)[0] for row in same}
            lines.append([title(same[0]), times(same[0]), *(median[f"cpp {how}"] for how in ("direct", "chebyshev", "auto"))])
        add("Which sum", [table(["Call", "Q×N×M", "direct ms", "chebyshev ms", "auto ms"], lines)])
    if group := of_section(rows, "d"):
        lines = []
        for row in group:
            if row["peak_extra_bytes"] is None:
                lines.append([title(row), times(row), row["failure"], "", "", "", ""])
                continue
            size = [row["input_bytes"], row["peak_extra_bytes"], row["held_bytes"]]
            share = [f"{extra / row['input_bytes']:.2f}" for extra in size[1:]]
            lines.append([title(row), times(row), *(f"{x / 1e6:.1f}" for x in size), *share])
        columns = ["Call", "Q×N×M", "inputs MB", "peak extra MB", "held after MB", "peak / inputs", "held / inputs"]
        add("Memory", [table(columns, lines)])
    if group := of_section(rows, "e"):
        empty = next(row["p50_ms"] for row in group if row["provider"] == EMPTY)
        lines = []
        for row in group:
            lines.append([row["provider"], *timed(row, 1e3), number(row["p50_ms"] / empty if row["p50_ms"] else None)])
        add("Cost per call, 1×8×2", [table(["Call", "µs", "p20–p80", "× empty"], lines)])
    return "\n".join(parts)
