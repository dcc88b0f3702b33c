"""The quality benchmark's statistics, tables and plots, from its results files alone."""

from __future__ import annotations

import functools
import itertools
import json
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy import stats

OURS = (
    "PILE", "PILE + labels", "PILE, query", "PILE, query, shared prior", "PILE, query, shared prior + labels",
    "PILE, shared prior", "PILE, shared prior + labels",
)  # fmt: skip
TESTED = ("PILE", "PILE, shared prior", "PILE, query, shared prior", "PILE, query, shared prior + labels")
METRICS = {"ndcg@10": "NDCG@10", "mrr": "MRR", "map": "MAP", "pnr": "PNR"}
RESAMPLES = 2000
PAGE = """# Quality: all tables

Written by `python benchmarks/quality.py --report` from the `.jsonl` files beside this page.
[docs/quality.md](../../../docs/quality.md) says what was compared and what was found. This package's methods are in
bold. A test or validation figure is NDCG@10 unless it says otherwise.

## Students

Mean NDCG@10 on the test queries, best mean rank over the three sets of teachers first.

{students}

![NDCG@10 of every student minus that of the mean ensemble's student](students.png)

## Students by every metric

In parentheses: the 95 % interval, by bootstrap over queries.

{values}

## Differences and their tests

Difference in NDCG@10 with its 95 % interval, then p of the paired t-test over queries. In parentheses: p after Holm's
correction over all comparisons in that column; bold where it is below 0.05.

{tests}

## The ensembles themselves

NDCG@10 of the targets. An ensemble that is given the labels of the queries it is judged on looks superb and has learnt
nothing: with the labels hidden PILE is the mean. Only the students above are rankers to compare. The last row has the
teachers' own NDCG@10 on the test queries, and how far they agree: the mean correlation of two teachers' calibrated
logits on the training queries.

{leak}

## Damaged teachers, missing scores, wrong labels

The training queries of the cross-fitted data are damaged, those to validate and to test on are not. The grid points are
those chosen without damage.

- *useless*: so many of the five teachers are noise.
- *adversarial*: so many are negated.
- *half*: so many are noise on a random half of the queries.
- *missing*: this share of all logits is NaN.
- *label noise*: the labels of this share of the documents are shuffled among them. The teachers were fitted to the
  right ones.

Mean NDCG@10 of three seeds. Column 0 is the comparison above, on the same folds and as many of its seeds. The best
under the worst damage comes first.

{damage}

![Students under damage](damage.png)

## Defaults

One option at a time away from the defaults of either granularity, learning rate 0.003, three seeds. In parentheses: the
difference to the defaults of the same granularity.

{defaults}

## Text

NDCG@10, three seeds; WikiQA has 237 test questions, Cranfield 225.

{text}

## The run

{run}
"""


def read(folder: Path, phase: str) -> list[dict]:
    path = folder / f"{phase}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def per_query(records: Iterable[dict]) -> dict[str, np.ndarray]:
    """Values of all test queries, the folds' one after the other; NaN = the query has none. Seeds are averaged before."""
    folds = sorted(records, key=lambda r: r["fold"])
    names = folds[0]["queries"]
    values = {name: np.array([v for r in folds for v in r["queries"][name]], dtype=float) for name in names}
    if "concordant" in values:
        pairs = values["concordant"] + values["discordant"]
        values["pnr"] = np.where(pairs > 0, values["concordant"] / np.where(pairs > 0, pairs, 1), np.nan)
    return values


def mean(values: dict[str, np.ndarray], metric: str) -> float:
    """Over the queries that have a value; PNR is the ratio of all pairs in the right order to those in the wrong one."""
    if metric == "pnr":
        return values["concordant"].sum() / values["discordant"].sum()
    return float(np.nanmean(values[metric]))


def interval(values: dict[str, np.ndarray], metric: str) -> tuple[float, float]:
    """95 %, bootstrap over queries."""
    rows = _resamples(len(values["ndcg@10"]))
    if metric == "pnr":
        draws = values["concordant"][rows].sum(1) / values["discordant"][rows].sum(1)
    else:
        draws = np.nanmean(values[metric][rows], 1)
    return tuple(np.percentile(draws, [2.5, 97.5]))


@functools.lru_cache(maxsize=1)
def _resamples(count: int) -> np.ndarray:
    return np.random.default_rng(0).integers(count, size=(RESAMPLES, count))


def paired(ours: np.ndarray, theirs: np.ndarray) -> tuple[float, float, float, float]:
    """Mean difference over queries, its 95 % interval, and p of the paired t-test."""
    difference = ours - theirs
    difference = difference[~np.isnan(difference)]
    if not difference.any():
        return 0.0, 0.0, 0.0, 1.0
    test = stats.ttest_1samp(difference, 0.0)
    low, high = test.confidence_interval(0.95)
    return difference.mean(), low, high, float(test.pvalue)


def holm(p: Iterable[float]) -> np.ndarray:
    """Holm's step-down adjustment: p values that may be held against 0.05 all at once."""
    p = np.asarray(list(p), dtype=float)
    order = p.argsort()
    adjusted = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)).clip(max=1.0)
    out = np.empty_like(p)
    out[order] = adjusted
    return out


def whole_folds(records: list[dict]) -> list[dict]:
    """What a run that was not finished did of a phase: the records of the folds that have all that any fold has."""
    by_fold = grouped(records, "fold")
    most = max(map(len, by_fold.values()), default=0)
    return [r for of in by_fold.values() if len(of) == most for r in of]


def grouped(records: Iterable[dict], *fields: str) -> dict[tuple, list[dict]]:
    groups = defaultdict(list)
    for record in records:
        groups[tuple(record[field] for field in fields)].append(record)
    return dict(groups)


def table(head: list[str], rows: Iterable[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def tables(folder: Path) -> dict[str, str]:
    """Every table, by name."""
    blocks = {
        "students": _students(folder),
        "values": _values(folder),
        "tests": _tests(folder),
        "leak": _leak(folder),
        "damage": _damage(folder),
        "defaults": _defaults(folder),
        "text": _text(folder),
        "run": _run(folder),
    }
    return {name: block or "Not measured yet." for name, block in blocks.items()}


def compared(folder: Path, phase: str = "compare") -> dict[str, dict[str, dict[str, np.ndarray]]]:
    """Data set → method → metric → per-query values, of the data sets that have every method in all of their folds."""
    records = read(folder, phase)
    methods = {r["method"] for r in records}
    return {
        data: {method: per_query(found) for (method,), found in grouped(of, "method").items()}
        for (data,), of in grouped(records, "data").items()
        if len(of) == len(methods) * len({r["fold"] for r in of})
    }


def averaged(found: dict[str, dict[str, dict[str, np.ndarray]]]) -> dict[str, dict[str, np.ndarray]]:
    """Each query's mean over data sets of the same queries, for the methods that all of them have."""
    sets = list(found.values())
    methods = [m for m in sets[0] if all(m in of for of in sets)]
    return {m: {metric: np.mean([of[m][metric] for of in sets], 0) for metric in METRICS} for m in methods}


def ranks(found: dict[str, dict[str, dict[str, np.ndarray]]]) -> dict[str, float]:
    """Mean rank by NDCG@10 over the data sets of the methods that all of them have."""
    if not found:
        return {}
    methods = [m for m in next(iter(found.values())) if all(m in of for of in found.values())]
    each = [stats.rankdata([-mean(of[m], "ndcg@10") for m in methods]) for of in found.values()]
    return dict(zip(methods, np.mean(each, 0), strict=True))


def _students(folder: Path, phase: str = "compare") -> str:
    found = compared(folder, phase)
    rank = ranks(found)
    rows = []
    for method in sorted(rank, key=rank.get):
        values = (f"{mean(of[method], 'ndcg@10'):.4f}" for of in found.values())
        rows.append([_name(method), f"{rank[method]:.1f}", *values])
    return table(["student of", "mean rank", *found], rows) if rows else ""


def _text(folder: Path) -> str:
    """Lines of the same form as those of compare.jsonl, by quality_text.py; older ones do not say where they were measured."""
    at = next((record["where"] for record in read(folder, "text") if "where" in record), None)
    return _students(folder, "text") + (f"\n\n{_measured(at)}" if at else "")


def _measured(where: dict) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in where["versions"].items())
    return f"{where['date']}, commit {where['commit']}, {where['machine']['cpu']}, {versions}."


def _values(folder: Path) -> str:
    parts = []
    for data, of in compared(folder).items():
        rows = []
        for method, values in sorted(of.items(), key=lambda item: -mean(item[1], "ndcg@10")):
            cells = [_name(method)]
            for metric in METRICS:
                digits = 2 if metric == "pnr" else 3
                low, high = interval(values, metric)
                cells.append(f"{mean(values, metric):.{digits + 1}f} ({low:.{digits}f} to {high:.{digits}f})")
            rows.append(cells)
        parts.append(f"{data}\n\n" + table(["student of", *METRICS.values()], rows))
    return "\n\n".join(parts)


def _name(method: str) -> str:
    return f"**{method}**" if method in OURS else method


class Comparison(NamedTuple):
    difference: float
    low: float  # 95 % interval
    high: float
    p: float
    holm: float  # p adjusted over the comparisons of one method with all others on one data set by one metric


def comparisons(of: dict[str, dict[str, np.ndarray]], ours: str, metric: str) -> dict[str, Comparison]:
    """`ours` against every other method of a data set."""
    found = {m: paired(of[ours][metric], values[metric]) for m, values in of.items() if m != ours}
    adjusted = holm(test[3] for test in found.values())
    return {m: Comparison(*test, h) for (m, test), h in zip(found.items(), adjusted, strict=True)}


def _p(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def _tests(folder: Path) -> str:
    parts = []
    found_in = compared(folder)
    queries = {len(values["ndcg@10"]) for of in found_in.values() for values in of.values()}
    if len(found_in) > 1 and len(queries) == 1:
        found_in["average over the sets of teachers"] = averaged(found_in)
    for data, of in found_in.items():
        tested = [ours for ours in TESTED if ours in of]
        found = {(ours, metric): comparisons(of, ours, metric) for ours in tested for metric in METRICS}
        rows = []
        for method in of:
            cells = [method]
            for ours in tested:
                if method == ours:
                    cells += ["", ""]
                    continue
                c = found[ours, "ndcg@10"][method]
                p = f"{_p(c.p)} ({_p(c.holm)})"
                cells += [f"{c.difference:+.4f} ({c.low:+.4f} to {c.high:+.4f})", f"**{p}**" if c.holm < 0.05 else p]
            if tested:
                others = [found[tested[0], metric].get(method) for metric in ("mrr", "map", "pnr")]
                cells.append(" / ".join(f"{'+' if c.difference > 0 else '−'} {_p(c.holm)}" for c in others if c))
            rows.append(cells)
        head = ["against"]
        for ours in tested:
            head += [f"{ours} minus it", "p (Holm)"]
        head += [f"{ours} by MRR / MAP / PNR: sign, p after Holm" for ours in tested[:1]]
        parts.append(f"{data}\n\n" + table(head, rows))
    return "\n\n".join(parts)


def _leak(folder: Path) -> str:
    groups = grouped(read(folder, "ensembles"), "data")
    if not groups:
        return ""
    head = ["ensemble"]
    for (data,) in groups:
        head += [f"{data}: training queries", "test, labels given", "test, labels hidden"]
    rows = []
    for name in next(iter(groups.values()))[0]["ensembles"]:
        cells = [name]
        for records in groups.values():
            for column in ("train", "leak", "hidden"):
                cells.append(f"{np.mean([r['ensembles'][name][column] for r in records]):.3f}")
        rows.append(cells)
    teachers = ["*teachers, worst to best*"]
    for records in groups.values():
        low, high = np.percentile(np.mean([r["teachers"] for r in records], 0), [0, 100])
        correlation = np.mean([r["correlation"] for r in records])
        teachers += [f"correlation {correlation:.2f}", "", f"{low:.3f} to {high:.3f}"]
    return table(head, [*rows, teachers])


def damage_curves(folder: Path) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """Kind of damage → method → (level, mean NDCG@10 over folds and seeds); level 0 is the comparison itself."""
    damaged, whole = whole_folds(read(folder, "damage")), read(folder, "compare")
    curves: dict = {}
    for (kind, method), records in grouped(damaged, "damage", "method").items():
        data, folds = records[0]["data"], {r["fold"] for r in records}
        seeds = len(records[0]["seeds"])
        clean = [r for r in whole if (r["data"], r["method"]) == (data, method) and r["fold"] in folds]
        points = [(0.0, np.mean([r["test"]["ndcg@10"][:seeds] for r in clean]))] if clean else []
        for (level,), of in sorted(grouped(records, "level").items()):
            points.append((level, np.mean([r["test"]["ndcg@10"] for r in of])))
        curves.setdefault(kind, {})[method] = points
    return curves


def _damage(folder: Path) -> str:
    parts = []
    for kind, curves in damage_curves(folder).items():
        levels = sorted({level for points in curves.values() for level, _ in points})
        rows = []
        for method, points in sorted(curves.items(), key=lambda item: -item[1][-1][1]):
            of = dict(points)
            rows.append([_name(method), *(f"{of[level]:.4f}" for level in levels)])
        parts.append(f"{kind}\n\n" + table(["student of", *(f"{level:g}" for level in levels)], rows))
    folds = ", ".join(str(fold) for fold in sorted({r["fold"] for r in whole_folds(read(folder, "damage"))}))
    return f"Folds {folds}.\n\n" + "\n\n".join(parts) if parts else ""


def _defaults(folder: Path) -> str:
    groups = grouped(whole_folds(read(folder, "defaults")), "method", "data")
    datas = list(dict.fromkeys(data for _, data in groups))
    rows = []
    for name in dict.fromkeys(name for name, _ in groups):
        cells = [name]
        for data in datas:
            records, base = groups[name, data], groups[name.split(",")[0], data]
            validation, usual = (np.mean([r["validation"] for r in of]) for of in (records, base))
            cells.append(f"{validation:.4f} ({validation - usual:+.4f})")
            cells.append(f"{np.mean([r['test']['ndcg@10'] for r in records]):.4f}")
        rows.append(cells)
    head = ["granularity, option"]
    for data in datas:
        head += [f"{data}: validation", "test"]
    return table(head, rows) if rows else ""


def _run(folder: Path) -> str:
    runs = read(folder, "runs")
    if not runs:
        return ""
    last = {}
    for line in runs:  # two of each run, one from its start and one from its end
        last = last | line if line["run"] == last.get("run") else line
    seconds = {p: sum(r.get("seconds", 0) for r in read(folder, p)) for p in ("tune", "compare", "damage", "defaults")}
    counts = {p: len(read(folder, p)) for p in seconds}
    work = "; ".join(f"{p}: {counts[p]:,} units, {seconds[p] / 60:.0f} min" for p in seconds)
    took = ""
    if "units" in last:
        others = last["cores_taken_by_others"]
        took = f" It did {last['units']:,} units in {last['minutes']:.0f} minutes, {last['processes']} at a time"
        took += f"; other programs took {others:.0%} of a core." if others is not None else "."
    return f"Last run {_measured(last)}{took} Time of one core, {work}."


def page(folder: Path) -> str:
    return PAGE.format(**tables(folder))


def write(folder: Path) -> None:
    """The page of all tables, and its plots, into `folder`."""
    (folder / "report.md").write_text(page(folder))
    _plot_students(folder, folder / "students.png")
    _plot_damage(folder, folder / "damage.png")


def _figure(columns: int, rows: int, size: tuple[float, float]):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False).flat


def _plot_students(folder: Path, path: Path) -> None:
    found = compared(folder)
    if not found:
        return
    figure, panels = _figure(len(found), 1, (4.2 * len(found), 4.6))
    for axes, (data, of) in zip(panels, found.items(), strict=True):
        methods = sorted(of, key=lambda m: mean(of[m], "ndcg@10"))
        for y, method in enumerate(methods):
            # Differences to the mean ensemble vary less between queries than the values: their interval is the one that tells.
            difference, low, high, _ = paired(of[method]["ndcg@10"], of["mean"]["ndcg@10"])
            color = "tab:green" if method in OURS else "tab:gray"
            axes.errorbar(difference, y, xerr=[[difference - low], [high - difference]], fmt="o", color=color, capsize=2)
        axes.set_yticks(range(len(methods)), methods, fontsize=8)
        axes.axvline(0, color="black", linewidth=0.6)
        axes.set_title(data, fontsize=10)
        axes.set_xlabel("NDCG@10 minus that of the mean's student", fontsize=8)
        axes.locator_params(axis="x", nbins=4)
    figure.savefig(path, dpi=110)


def _plot_damage(folder: Path, path: Path) -> None:
    import matplotlib

    curves = damage_curves(folder)
    if not curves:
        return
    figure, panels = _figure(len(curves), 1, (3.6 * len(curves), 4.6))
    colors = itertools.cycle(matplotlib.colormaps["tab20"].colors)
    style = {}
    for axes, (kind, of) in zip(panels, curves.items(), strict=True):
        for method, points in of.items():
            style.setdefault(method, {"color": next(colors), "linestyle": "-" if method in OURS else "--"})
            axes.plot(
                *zip(*points, strict=True), marker=".", label=method, linewidth=2 if method in OURS else 1, **style[method]
            )
        axes.set_title(kind, fontsize=10)
        axes.tick_params(labelsize=8)
        axes.locator_params(axis="x", nbins=4)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=7, fontsize=8)
    panels[0].set_ylabel("NDCG@10 of the student")
    figure.savefig(path, dpi=110)
