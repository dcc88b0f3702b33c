"""What ``pile-fast demo`` shows of its students and their teachers: two tables, a picture, and all numbers as JSON."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from pile_fast.cli.demo_students import LABELS_ONLY, MEAN, RUNS, SHARES, Outcome, ndcg_of_scores

# More teachers than these are summed up in one row.
_MOST_TEACHERS = 8


class Estimate(NamedTuple):
    """A mean over queries: the 95 % interval is `value` ± `margin`."""

    value: float
    margin: float

    def text(self, sign: str = "") -> str:
        return "–" if math.isnan(self.value) else f"{self.value:{sign}.3f} ±{self.margin:.3f}"


class StudentRow(NamedTuple):
    """One row of the table of students: NDCG@10, and how far it is from two others on the same queries."""

    name: str
    labels: float | None  # share of the training queries that kept them; None = it sees none
    ndcg: Estimate
    minus_mean: Estimate | None
    minus_labels_only: Estimate | None  # at the same share; of the mean's student at all labels


class TeacherRow(NamedTuple):
    """One row of the table of teachers: NDCG@10 on the students' test queries, and PILE's weight by share of labels."""

    name: str
    ndcg: float
    weights: dict[float, float]


def estimate(values: Tensor) -> Estimate:
    """Of values (Q,) per query; NaN = the query does not count."""
    values = values[~values.isnan()].double()
    margin = 1.96 * values.std().item() / len(values) ** 0.5 if len(values) > 1 else math.nan
    return Estimate(values.mean().item(), margin)


def student_rows(outcome: Outcome) -> list[StudentRow]:
    ndcg, rows = outcome.ndcg, []
    for kind, share in RUNS:
        values, of_mean, of_labels = ndcg[kind, share], ndcg[MEAN, None], ndcg[LABELS_ONLY, share or 1.0]
        rows.append(
            StudentRow(
                kind.name, share, estimate(values), None if kind is MEAN else estimate(values - of_mean),
                None if kind is LABELS_ONLY else estimate(values - of_labels),
            )
        )  # fmt: skip
    return rows


def teacher_rows(outcome: Outcome) -> list[TeacherRow]:
    """The heaviest first."""
    test, rows = outcome.test, []
    for m, name in enumerate(test.teacher_names):
        scores = test.teacher_logits[:, m].nan_to_num(nan=-math.inf)  # what it did not score comes last
        weights = {share: of[m].item() for share, of in outcome.weights.items()}
        rows.append(TeacherRow(name, estimate(ndcg_of_scores(scores, test)).value, weights))
    return sorted(rows, key=lambda row: row.weights[1.0], reverse=True)


def percent(share: float | None) -> str:
    return "none" if share is None else "all" if share == 1 else f"{share:.0%}".replace("%", " %")


def print_tables(students: list[StudentRow], teachers: list[TeacherRow], caption: str) -> None:
    import rich
    import rich.box
    import rich.table

    table = rich.table.Table(title=f"Held-out queries: {caption}", box=rich.box.SIMPLE)
    table.add_column("student of", no_wrap=True)
    for name in ("labels", "NDCG@10", "vs mean", "vs labels"):
        table.add_column(name, justify="right")
    for i, row in enumerate(students):
        last = i + 1 == len(students) or students[i + 1].labels != row.labels
        differences = (of.text("+") if of else "" for of in (row.minus_mean, row.minus_labels_only))
        table.add_row(row.name, percent(row.labels), row.ndcg.text(), *differences, end_section=last)
    rich.print(table)

    table = rich.table.Table(title="Teachers, and PILE's weights by share of labels", box=rich.box.SIMPLE)
    table.add_column("teacher", no_wrap=True)
    for name in ("NDCG@10", *(f"weight ({percent(share)})" for share in SHARES)):
        table.add_column(name, justify="right")
    for of in _shortened(teachers):
        table.add_row(*of)
    rich.print(table)


def _shortened(teachers: list[TeacherRow]) -> list[list[str]]:
    shown = teachers if len(teachers) <= _MOST_TEACHERS else teachers[: _MOST_TEACHERS - 1]
    rows = [[row.name, f"{row.ndcg:.3f}", *(f"{row.weights[share]:.3f}" for share in SHARES)] for row in shown]
    if rest := teachers[len(shown) :]:
        low, high = min(row.ndcg for row in rest), max(row.ndcg for row in rest)
        together = (f"{sum(row.weights[share] for row in rest):.3f}" for share in SHARES)
        rows.append([f"{len(rest)} others together", f"{low:.3f} to {high:.3f}", *together])
    return rows


def plot(students: list[StudentRow], caption: str, path: Path) -> None:
    """A dot and an interval for each student and share of labels: NDCG@10, and the difference to the mean's student."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(row.name for row in students))
    colors = {None: "tab:gray", SHARES[0]: "tab:blue", SHARES[1]: "tab:orange"}
    figure = Figure(figsize=(9, 1.6 + 0.55 * len(names)), layout="constrained")
    FigureCanvasAgg(figure)
    quality, difference = figure.subplots(1, 2, sharey=True)
    labelled = set()
    for row in students:
        # The shares of one kind of student one below the other.
        shift = {None: 0.0, SHARES[0]: -0.15, SHARES[1]: 0.15}[row.labels]
        legend = {None: "no labels", SHARES[0]: "all labels"}.get(row.labels, f"{percent(row.labels)} of the labels")
        for axes, of in ((quality, row.ndcg), (difference, row.minus_mean)):
            if of is not None:
                axes.errorbar(
                    of.value, names.index(row.name) + shift, xerr=of.margin, fmt="o", color=colors[row.labels], capsize=3,
                    label=None if axes is difference or legend in labelled else legend,
                )  # fmt: skip
        labelled.add(legend)
    quality.set_yticks(range(len(names)), [f"student of {name}" for name in names])
    quality.set_ylim(len(names) - 0.5, -0.5)
    quality.set_xlabel("NDCG@10")
    difference.axvline(0, color=colors[None], linestyle=":")
    difference.set_xlabel("NDCG@10 minus that of the mean's student")
    for axes in (quality, difference):
        axes.grid(axis="x", alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    figure.suptitle(f"{caption}\nwith 95 % intervals over queries", fontsize=10)
    figure.savefig(path, dpi=130)


def as_json(students: list[StudentRow], teachers: list[TeacherRow]) -> dict[str, Any]:
    """Estimates as [value, margin]."""
    return {
        "students": [row._asdict() for row in students],
        "teachers": [row._asdict() | {"weights": {percent(s): w for s, w in row.weights.items()}} for row in teachers],
    }
