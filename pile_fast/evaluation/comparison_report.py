"""The picture of an `Evaluation`."""

from __future__ import annotations

import math
from pathlib import Path

from pile_fast.evaluation.compare import Evaluation, Result
from pile_fast.printable import decimal, short

SIGNIFICANT = 0.05
_MOST_PLOTTED = 100
_LONGEST_NAME = 60  # in the plot


def best_first(evaluation: Evaluation) -> list[str]:
    """The systems, best first by the first metric."""

    def key(name: str) -> float:
        value = next(iter(evaluation.results[name].values())).value
        return math.inf if math.isnan(value) else -value

    return sorted(evaluation.results, key=key)


def decimal4(value: float | None) -> str:
    return decimal(value, places=4)  # as trec_eval prints


def plot(evaluation: Evaluation, baseline: str | None, path: Path) -> None:
    """A panel per metric: every system's value and interval, coloured by the test against the baseline."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = best_first(evaluation)
    metrics = list(evaluation.results[names[0]])
    best, names = len(names), names[:_MOST_PLOTTED][::-1]
    shown = [short(name, _LONGEST_NAME) for name in names]
    widest = max(map(len, shown))
    figure = Figure(figsize=(1.5 + 0.07 * widest + 2.6 * len(metrics), 1.6 + 0.26 * len(names)), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(metrics), sharey=True, squeeze=False)[0]
    for axes, metric in zip(panels, metrics, strict=True):
        for position, name in enumerate(names):
            result = evaluation.results[name][metric]
            color = _color(result, name == baseline)
            if math.isfinite(result.value):
                axes.hlines(position, result.low, result.high, color=color, linewidth=1.5)
                axes.plot(result.value, position, "o", color=color, markersize=5)
            else:
                axes.annotate(
                    decimal4(result.value), (0.97, position), xycoords=("axes fraction", "data"), ha="right", va="center"
                )
        if baseline is not None:
            axes.axvline(evaluation.results[baseline][metric].value, color="black", linestyle=":", linewidth=1)
        axes.set_title(f"{metric.upper()}  (n = {evaluation.results[names[0]][metric].queries:,})", fontsize=10)
        axes.locator_params(axis="x", nbins=5)
        axes.grid(axis="x", alpha=0.3)
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_yticks(range(len(names)), shown, fontsize=8, parse_math=False)
    panels[0].set_ylim(-0.6, len(names) - 0.4)
    note = "95 % confidence intervals over queries"
    if best > len(names):
        note += f"; the best {len(names)} of {best:,} systems by {metrics[0].upper()}"
    if baseline is not None:
        name = short(baseline, _LONGEST_NAME)
        note += f"; dotted: {name}; green better, red worse (paired test, Holm-corrected p < {SIGNIFICANT})"
    figure.supxlabel(note, fontsize=8, parse_math=False)
    figure.savefig(path, dpi=130)


def _color(result: Result, is_baseline: bool) -> str:
    if is_baseline:
        return "black"
    if result.difference is None or result.p_holm is None:
        return "tab:blue"
    return "tab:gray" if not result.p_holm < SIGNIFICANT else "tab:green" if result.difference > 0 else "tab:red"
