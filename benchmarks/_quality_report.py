"""The quality benchmark's statistics, tables and plot, from its results files alone."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from _quality_data import BOTTOM, CAST, CAST_NAN, DAMAGES, DATA_SETS, FITTED, NAN
from scipy import stats

SHARED, SHARED_LABELS = "PILE, shared", "PILE, shared + labels"
BASELINES = ("mean", "labels", "mean + labels", "stacking + labels")
NEGATED = ("negated", 2)
PAGE = """# Quality: all tables

Written by `python benchmarks/quality.py --report` from the `.jsonl` files beside this page.
[docs/quality.md](../../../docs/quality.md) says what was compared and what was found. PILE's methods are in bold. All
figures are NDCG@10 on test queries.

## Students

*All*: the mean over the queries of all collections. MQ2008's queries have several sets of teachers; a query counts once,
with its mean over them. The set with NaN was run with all labels only, so compare within a column. The best with all labels
comes first.

{students}

![NDCG@10 of every student minus that of the mean's student](students.png)

## The tests

One family of comparisons, stated in `family` of `benchmarks/_quality_report.py`. Difference with its 95 % interval, p of
the paired t-test over queries, and p after Holm's correction over all rows; bold where that is below 0.05.

{tests}

## Every set of teachers

In parentheses: the difference to the mean's student with half its 95 % interval.

{sets}

## Every collection together, by NDCG@10, MRR and MAP

Plain means over folds and seeds of the data sets with all labels.

{metrics}

## Damaged teachers

The training queries of the two data sets with fitted teachers are damaged, those to validate and to test on are not. The
grid points are those chosen without damage.

- *noise*: so many of the six teachers are noise.
- *negated*: so many are negated.
- *scaled*: so many are replaced by the exponential of three times their z-scores: the order is the same.
- *missing*: this share of all scores is NaN.

In parentheses: the difference to the mean's student with half its 95 % interval.

Mean over the queries of both data sets.

{damage}

## Missing scores

The same runs, where a document that a run did not return is below its end ("bottom") or has no score (NaN).

{missing}

## Variants

PILE, shared, with one option away from its default; no tuning (learning rate 0.01, temperature 1), one set of seeds. The
mean over all queries as above, without the sets with NaN. In parentheses: the difference to the default with half its 95 %
interval.

{variants}

*one fitted scale*: the target times the one factor that fits the labels best. *free weights*: Σ β_m t̃_m with β ≥ 0 fitted to
the labels, with the same pull to equal weights, which is a temperature for each teacher.

## Teachers and their weights

The first row of a set has the teachers' own NDCG@10 and that of ensembles, on the test queries; weights were fitted to the
training queries. Means over folds. *r*: mean correlation of two teachers' logits.

{teachers}

## Text

Three seeds; WikiQA has 237 test questions, Cranfield 225. Measured before weights that all queries share were there.

{text}

## The run

{run}
"""


class Found(NamedTuple):
    """The students of one method on one data set and share of the labels."""

    queries: np.ndarray  # NDCG@10 of all test queries, the folds' one after the other; NaN = the query has none
    test: dict[str, float]  # other metrics' means


Key = tuple[str, float]  # data set, share of the labels


def read(folder: Path, phase: str) -> list[dict]:
    path = folder / f"{phase}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


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


def flat(folder: Path, phase: str) -> list[dict]:
    """A record for each thing that the units found."""
    return [r | found for r in whole_folds(read(folder, phase)) for found in r["found"]]


def joined(records: list[dict]) -> Found:
    """The folds of a method, one after the other."""
    folds = sorted(records, key=lambda r: r["fold"])
    names = folds[0]["test"]
    values = np.array([v for r in folds for v in r["queries"]], dtype=float)
    return Found(values, {name: float(np.mean([r["test"][name] for r in folds])) for name in names})


def compared(folder: Path, phase: str = "compare") -> dict[Key, dict[str, Found]]:
    """(data set, share) → method → what was found."""
    out: dict[Key, dict[str, Found]] = {}
    for (data, share, method), records in grouped(flat(folder, phase), "data", "share", "method").items():
        out.setdefault((data, share), {})[method] = joined(records)
    return out


def pooled(found: dict[Key, dict[str, Found]], share: float, only: Iterable[str] = tuple(DATA_SETS)) -> dict[str, np.ndarray]:
    """Method → NDCG@10 of the queries of all collections; a query's is the mean over its sets of teachers."""
    sets: dict[str, list[dict[str, Found]]] = {}
    for data in only:
        if (data, share) in found:
            sets.setdefault(DATA_SETS[data][0], []).append(found[data, share])
    if not sets:
        return {}
    methods = [m for m in next(iter(sets.values()))[0] if all(m in of for each in sets.values() for of in each)]
    return {m: np.concatenate([np.mean([of[m].queries for of in each], 0) for each in sets.values()]) for m in methods}


def shares(found: dict[Key, dict[str, Found]]) -> list[float]:
    return sorted({share for _, share in found}, reverse=True)


def paired(ours: np.ndarray, theirs: np.ndarray) -> tuple[float, float, float, float]:
    """Mean difference over queries, its 95 % interval, and p of the paired t-test."""
    difference = ours - theirs
    difference = difference[~np.isnan(difference)]
    if not difference.any():
        return 0.0, 0.0, 0.0, 1.0
    test = stats.ttest_1samp(difference, 0.0)
    low, high = test.confidence_interval(0.95)
    return float(difference.mean()), float(low), float(high), float(test.pvalue)


def holm(p: Iterable[float]) -> np.ndarray:
    """Holm's step-down adjustment: p values that may be held against 0.05 all at once."""
    p = np.asarray(list(p), dtype=float)
    order = p.argsort()
    adjusted = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)).clip(max=1.0)
    out = np.empty_like(p)
    out[order] = adjusted
    return out


class Pair(NamedTuple):
    """One comparison of the family."""

    where: str
    ours: str
    theirs: str
    values: tuple[np.ndarray, np.ndarray]


def family(folder: Path) -> Iterator[Pair]:
    """All comparisons that are tested, which share one Holm correction.

    Of students of PILE with shared weights:
    over all collections, with all labels, against every other method, and with the label loss against its baselines;
    on each set of teachers, against the mean;
    over all collections with fewer labels, without and with the label loss, against the baselines;
    and with two negated teachers of six, against the mean.
    """
    found = compared(folder)
    everything = pooled(found, 1.0)

    def pair(where: str, values: dict[str, np.ndarray], ours: str, theirs: str) -> Iterator[Pair]:
        if ours in values and theirs in values and ours != theirs:
            yield Pair(where, ours, theirs, (values[ours], values[theirs]))

    for method in everything:
        yield from pair("all", everything, SHARED, method)
    for method in BASELINES:
        yield from pair("all", everything, SHARED_LABELS, method)
    for data in DATA_SETS:
        values = {method: of.queries for method, of in found.get((data, 1.0), {}).items()}
        yield from pair(data, values, SHARED, "mean")
    for share in shares(found)[1:]:
        for ours in (SHARED, SHARED_LABELS):
            for method in BASELINES[:3]:
                yield from pair(f"all, {share:.0%} of the labels", pooled(found, share), ours, method)
    yield from pair("two of six teachers negated", damages(folder).get(NEGATED, {}), SHARED, "mean")


def tested(folder: Path) -> list[tuple[Pair, tuple[float, float, float, float], float]]:
    """Each comparison with its difference, interval and p, and p after Holm."""
    pairs = list(family(folder))
    found = [paired(*pair.values) for pair in pairs]
    return list(zip(pairs, found, holm(p for *_, p in found), strict=True))


def table(head: list[str], rows: Iterable[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _name(method: str) -> str:
    return f"**{method}**" if method.startswith("PILE") else method


def _p(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def _beside(ours: np.ndarray, theirs: np.ndarray) -> str:
    """The mean, and the difference to another with half its interval."""
    difference, low, _, _ = paired(ours, theirs)
    return f"{np.nanmean(ours):.4f} ({difference:+.4f} ± {difference - low:.4f})"


def _students(folder: Path) -> str:
    found = compared(folder)
    everything = {share: pooled(found, share) for share in shares(found)}
    if not any(everything.values()):
        return ""
    datas = [data for data in DATA_SETS if (data, 1.0) in found]
    head = ["student of", "all", *datas, *(f"all, {share:.0%} of labels" for share in list(everything)[1:])]
    rows = []
    for method in sorted(everything[1.0], key=lambda m: -np.nanmean(everything[1.0][m])):
        values = [everything[1.0][method], *(found[data, 1.0][method].queries for data in datas)]
        values += [of.get(method) for of in list(everything.values())[1:]]
        rows.append([_name(method), *("–" if v is None else f"{np.nanmean(v):.4f}" for v in values)])
    return table(head, rows)


def _tests(folder: Path) -> str:
    rows = []
    for pair, (difference, low, high, p), adjusted in tested(folder):
        cells = [pair.where, f"{pair.ours} − {pair.theirs}", f"{difference:+.4f}", f"{low:+.4f} to {high:+.4f}", _p(p)]
        rows.append([*cells, f"**{_p(adjusted)}**" if adjusted < 0.05 else _p(adjusted)])
    return table(["where", "students", "difference", "95 %", "p", "p, Holm"], rows) if rows else ""


def _sets(folder: Path) -> str:
    found = compared(folder)
    parts = []
    for share in shares(found):
        datas = [data for data in DATA_SETS if (data, share) in found]
        methods = list(found[datas[0], share]) if datas else []
        rows = []
        for method in methods:
            each = [found[data, share] for data in datas]
            rows.append([_name(method), *(_beside(of[method].queries, of["mean"].queries) for of in each)])
        parts.append(f"{share:.0%} of the labels\n\n" + table(["student of", *datas], rows))
    return "\n\n".join(parts)


def _metrics(folder: Path) -> str:
    found = compared(folder)
    datas = [data for data in DATA_SETS if (data, 1.0) in found]
    if not datas:
        return ""
    names = {"ndcg@10": "NDCG@10", "mrr": "MRR", "map": "MAP"}
    rows = []
    for method in found[datas[0], 1.0]:
        each = [found[data, 1.0][method].test for data in datas]
        rows.append([_name(method), *(f"{np.mean([test[name] for test in each]):.4f}" for name in names)])
    return table(["student of", *names.values()], rows)


def damages(folder: Path) -> dict[tuple[str, float], dict[str, np.ndarray]]:
    """Kind and level → method → values of the queries of both data sets."""
    out = {}
    groups = grouped(flat(folder, "damage"), "damage", "level")
    for kind, level in (damage for damage in DAMAGES if damage in groups):
        records = groups[kind, level]
        found: dict[Key, dict[str, Found]] = {}
        for (data, method), of in grouped(records, "data", "method").items():
            found.setdefault((data, 1.0), {})[method] = joined(of)
        out[kind, level] = pooled(found, 1.0, FITTED)
    return out


def _damage(folder: Path) -> str:
    hurt = damages(folder)
    if not hurt:
        return ""
    methods = list(next(iter(hurt.values())))
    whole = pooled(compared(folder), 1.0, FITTED)
    everything = {"none": whole} | {f"{kind} {level:g}": of for (kind, level), of in hurt.items()}
    rows = [[what, *(_beside(of[m], of["mean"]) for m in methods)] for what, of in everything.items()]
    return table(["damage", *map(_name, methods)], rows)


def _missing(folder: Path) -> str:
    found = compared(folder)
    rows = []
    for bottom, nan in ((BOTTOM, NAN), (CAST, CAST_NAN)):
        for method, of in found.get((nan, 1.0), {}).items():
            if method in found.get((CAST_NAN, 1.0), {}):
                ours = found[bottom, 1.0][method].queries
                rows.append([bottom, _name(method), f"{np.nanmean(ours):.4f}", _beside(of.queries, ours)])
    return table(["runs of", "student of", "bottom", "NaN (difference)"], rows) if rows else ""


def _variants(folder: Path) -> str:
    found = compared(folder, "variants")
    if not found:
        return ""
    each = {share: pooled(found, share) for share in shares(found)}
    names = next(iter(each.values()))
    rows = [[name, *(_beside(of[name], of["default"]) for of in each.values())] for name in names]
    return table(["target", *(f"{share:.0%} of the labels" for share in each)], rows)


def _teachers(folder: Path) -> str:
    rows = []
    groups = grouped(whole_folds(read(folder, "teachers")), "data")
    for data in (data for data in DATA_SETS if (data,) in groups):
        records = groups[data,]

        def mean(values: Iterable[float]) -> str:
            return f"{np.mean(list(values)):.3f}"

        names = records[0]["teachers"]
        each = "; ".join(f"{name} {mean(r['teachers'][name] for r in records)}" for name in names)
        head = [data, f"r = {mean(r['correlation'] for r in records)}, {np.mean([r['missing'] for r in records]):.0%} missing"]
        rows.append([*head, mean(r["mean"] for r in records), each])
        for share in records[0]["shared"]:
            weights = np.mean([r["shared"][share]["weights"] for r in records], 0)
            shown = "; ".join(f"{name} {weight:.2f}" for name, weight in zip(names, weights, strict=True) if weight > 0.005)
            rows.append(["", f"shared, {float(share):.0%} of labels", mean(r["shared"][share]["test"] for r in records), shown])
    return table(["teachers", "", "ensemble", "each"], rows) if rows else ""


def _text(folder: Path) -> str:
    """Lines of quality_text.py."""
    records = read(folder, "text")
    if not records:
        return ""
    found = {
        data: {m: joined(of) for (m,), of in grouped(rs, "method").items()} for (data,), rs in grouped(records, "data").items()
    }
    methods = next(iter(found.values()))
    rows = [[_name(m), *(_beside(of[m].queries, of["mean"].queries) for of in found.values())] for m in methods]
    at = next((record["where"] for record in records if "where" in record), None)
    return table(["student of", *found], rows) + (f"\n\n{_measured(at)}" if at else "")


def _measured(where: dict) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in where["versions"].items())
    return f"{where['date']}, commit {where['commit']}, {where['machine']['cpu']}, {versions}."


def _run(folder: Path) -> str:
    runs = read(folder, "runs")
    if not runs:
        return ""
    last = {}
    for line in runs:  # two of each run, one from its start and one from its end
        last = last | line if line["run"] == last.get("run") else line
    phases = ("compare", "damage", "variants", "teachers")
    units = {p: read(folder, p) for p in phases}
    seeds = {len(r["seeds"]) for p in phases for r in units[p] if "seeds" in r}
    folds = len({r["fold"] for r in whole_folds(units["compare"])})
    work = "; ".join(f"{p}: {len(of):,} units, {sum(r['seconds'] for r in of) / 60:.0f} min" for p, of in units.items())
    took = ""
    if "units" in last:
        others = last["cores_taken_by_others"]
        took = f" It did {last['units']:,} units in {last['minutes']:.0f} minutes, {last['processes']} at a time"
        took += f"; other programs took {others:.0%} of a core." if others is not None else "."
    return (
        f"{folds} folds, {'/'.join(map(str, sorted(seeds)))} seeds. Last run {_measured(last)}{took} Time of the units, {work}."
    )


def tables(folder: Path) -> dict[str, str]:
    """Every table, by name."""
    blocks = {
        "students": _students, "tests": _tests, "sets": _sets, "metrics": _metrics, "damage": _damage, "missing": _missing,
        "variants": _variants, "teachers": _teachers, "text": _text, "run": _run,
    }  # fmt: skip
    return {name: block(folder) or "Not measured yet." for name, block in blocks.items()}


def page(folder: Path) -> str:
    return PAGE.format(**tables(folder))


def write(folder: Path) -> None:
    """The page of all tables, and its plot, into `folder`."""
    (folder / "report.md").write_text(page(folder))
    _plot_students(folder, folder / "students.png")


def _plot_students(folder: Path, path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    found = compared(folder)
    if not found:
        return
    panels = {share: pooled(found, share) for share in shares(found)}
    order = sorted(panels[1.0], key=lambda m: float(np.nanmean(panels[1.0][m])))
    figure = Figure(figsize=(4.2 * len(panels), 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (share, of) in zip(figure.subplots(1, len(panels), squeeze=False).flat, panels.items(), strict=True):
        for y, method in enumerate(order):
            # Differences to the mean's student vary less between queries than the values: their interval is the one that tells.
            if method not in of:
                continue
            difference, low, high, _ = paired(of[method], of["mean"])
            color = "tab:green" if method.startswith("PILE") else "tab:gray"
            axes.errorbar(difference, y, xerr=[[difference - low], [high - difference]], fmt="o", color=color, capsize=2)
        axes.set_yticks(range(len(order)), order, fontsize=8)
        axes.axvline(0, color="black", linewidth=0.6)
        axes.set_title(f"{share:.0%} of the labels", fontsize=10)
        axes.set_xlabel("NDCG@10 minus that of the mean's student", fontsize=8)
        axes.locator_params(axis="x", nbins=4)
    figure.savefig(path, dpi=110)
