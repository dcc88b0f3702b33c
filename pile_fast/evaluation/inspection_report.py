"""The pictures and the HTML page of `pile_fast.evaluation.inspection.inspect`'s report."""

from __future__ import annotations

import base64
import math
from pathlib import Path
from typing import Any

import numpy as np

from pile_fast.evaluation.inspection import Contents
from pile_fast.printable import decimal, percent, printable, short

_BINS = 40
_MOST_PLOTTED = 60  # teachers
_LONGEST_NAME = 40  # in the plot
_MOST_ANNOTATED = 10  # names along a matrix; more numbers than these would not be legible


def plot(contents: Contents, report: dict, title: str, path: Path) -> None:
    """One page of panels as a PNG; a panel without its data says what is missing."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    count = min(len(contents.teachers), _MOST_PLOTTED)
    if count < len(contents.teachers):
        title += f"; the first {count} of {len(contents.teachers):,} teachers"
    tall = max(3.2, 1.2 + 0.19 * count)
    heights = [max(3.0, 0.8 * tall), tall, tall] if count else [3.0]  # without teachers there is no more than one row
    figure = Figure(figsize=(15 if count else 10, 0.5 + sum(heights)), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=12, parse_math=False)
    panels = figure.subplots(len(heights), 3 if count else 2, height_ratios=heights).ravel()
    for axes in panels:
        axes.tick_params(labelsize=8)
    _plot_lengths(panels[0], contents)
    _plot_labels(panels[1], contents, report["labels"])
    if count:
        teachers, agreement = report["teachers"][:count], report["agreement"]
        shown = [*range(count), *range(len(contents.teachers), len(agreement["names"]))]  # the labels are last
        _plot_coverage(panels[2], teachers)
        _plot_logits(panels[3], contents, count)
        _plot_saturation(panels[4], teachers)
        _plot_quality(panels[5], teachers)
        _plot_matrix(figure, panels[6], agreement, shown, "pair_agreement", "Share of pairs ordered alike", 0.0)
        _plot_matrix(figure, panels[7], agreement, shown, "kendall_tau", "Kendall's tau-b, mean over queries", -1.0)
        _plot_weights(panels[8], teachers)
    figure.savefig(path, dpi=110)


def _missing(axes: Any, title: str, reason: str) -> None:
    axes.set_title(title, fontsize=10)
    axes.text(0.5, 0.5, reason, ha="center", va="center", color="gray", transform=axes.transAxes)
    axes.set_xticks([])
    axes.set_yticks([])


def _plot_lengths(axes: Any, contents: Contents) -> None:
    lengths = contents.lengths.numpy()
    widest = int(lengths.max())
    if widest > 200:
        axes.hist(lengths, bins=np.geomspace(max(1, lengths.min()), widest + 1, 31), color="tab:blue")
        axes.set_xscale("log")
    else:
        axes.hist(lengths, bins=np.arange(0.5, widest + 1.5, max(1, round(widest / 40))), color="tab:blue")
    axes.set_title(f"Documents per query (median {np.median(lengths):g}, most {widest:,})", fontsize=10)
    axes.set_ylabel("queries", fontsize=8)


def _plot_labels(axes: Any, contents: Contents, labels: dict) -> None:
    if not labels["labelled"]:
        _missing(axes, "Labels", "no labels")
        return
    if labels["counts"] is not None:
        bars = axes.bar(list(labels["counts"]), list(labels["counts"].values()), color="tab:blue")
        axes.bar_label(bars, fmt="{:,.0f}", fontsize=8)
        axes.margins(y=0.12)
    else:
        values = contents.labels.numpy()
        axes.hist(values[~np.isnan(values)], bins=_BINS, color="tab:blue")
    axes.set_title(f"Labels ({labels['unlabelled']:,} documents unlabelled)", fontsize=10)
    axes.set_ylabel("documents", fontsize=8)


def _rows(axes: Any, teachers: list[dict]) -> np.ndarray:
    """Teachers from top to bottom; their heights."""
    positions = np.arange(len(teachers))[::-1]
    axes.set_yticks(positions, [short(teacher["name"], _LONGEST_NAME) for teacher in teachers], fontsize=7, parse_math=False)
    axes.set_ylim(-0.6, len(teachers) - 0.4)
    axes.grid(axis="x", alpha=0.3)
    return positions


def _legend(axes: Any) -> None:
    """Below the panel, where it hides no bar."""
    axes.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.07), ncols=3, frameon=False)


def _column(teachers: list[dict], key: str) -> list[float]:
    return [math.nan if teacher.get(key) is None else teacher[key] for teacher in teachers]


def _plot_coverage(axes: Any, teachers: list[dict]) -> None:
    axes.barh(_rows(axes, teachers), _column(teachers, "coverage"), color="tab:blue")
    axes.set_xlim(0, 1)
    axes.set_title("Share of documents scored", fontsize=10)


def _plot_logits(axes: Any, contents: Contents, count: int) -> None:
    density = np.zeros((count, _BINS))
    for m, logits in enumerate(contents.teacher_logits[:, :count].double().numpy().T):
        known = logits[~np.isnan(logits)]
        if len(known) and known.min() < known.max():
            place = (known - known.min()) / (known.max() - known.min())
            density[m] = np.histogram(place, bins=_BINS, range=(0, 1))[0] / len(known)
    axes.imshow(density, aspect="auto", cmap="Blues", extent=(0, 1, len(density) - 0.5, -0.5), vmin=0, vmax=0.2)
    names = [short(name, _LONGEST_NAME) for name in contents.teachers[:count]]
    axes.set_yticks(range(count), names, fontsize=7, parse_math=False)
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["lowest", "", "middle", "", "highest"])
    axes.set_title("Logits between the teacher's lowest and highest", fontsize=10)


def _plot_saturation(axes: Any, teachers: list[dict]) -> None:
    positions = _rows(axes, teachers)
    for key, label, color, shift in (
        ("near_min", "logits at the lowest", "tab:blue", 0.27),
        ("near_max", "logits at the highest", "tab:orange", 0.0),
        ("constant_lists", "constant lists", "tab:red", -0.27),
    ):
        axes.barh(positions + shift, _column(teachers, key), height=0.25, color=color, label=label)
    axes.set_xlim(0, 1)
    _legend(axes)
    axes.set_title("Saturation", fontsize=10)


def _plot_quality(axes: Any, teachers: list[dict]) -> None:
    title = "Against the labels, on what the teacher scored"
    if not any(teacher.get("pairs") for teacher in teachers):
        _missing(axes, title, "no labelled pairs")
        return
    positions = _rows(axes, teachers)
    axes.plot(_column(teachers, "pair_accuracy"), positions, "o", color="tab:blue", label="pairs in the right order")
    axes.plot(_column(teachers, "ndcg@10"), positions, "s", color="tab:orange", label="NDCG@10", markersize=5)
    axes.axvline(0.5, color="gray", linestyle=":", linewidth=1)
    axes.set_xlim(0, 1)
    _legend(axes)
    axes.set_title(title, fontsize=10)


def _plot_matrix(figure: Any, axes: Any, agreement: dict, shown: list[int], key: str, title: str, low: float) -> None:
    if len(agreement["names"]) < 2:
        _missing(axes, title, "needs two teachers, or a teacher and labels")
        return
    from matplotlib import colormaps

    names = [short(agreement["names"][m], _LONGEST_NAME) for m in shown]
    matrix = np.array(agreement[key], dtype=float)[np.ix_(shown, shown)]
    image = axes.imshow(matrix, cmap=colormaps["RdBu"].with_extremes(bad="lightgray"), vmin=low, vmax=1, aspect="auto")
    axes.set_xticks(range(len(names)), names, rotation=90 if len(names) > 4 else 0, fontsize=7, parse_math=False)
    axes.set_yticks(range(len(names)), names, fontsize=7, parse_math=False)
    if len(names) <= _MOST_ANNOTATED:
        middle, reach = (1 + low) / 2, (1 - low) / 2
        for (a, b), value in np.ndenumerate(matrix):
            if not math.isnan(value):
                color = "white" if abs(value - middle) > 0.7 * reach else "black"
                axes.text(b, a, f"{value:.2f}", ha="center", va="center", fontsize=7, color=color)
    figure.colorbar(image, ax=axes).ax.tick_params(labelsize=7)
    axes.set_title(title, fontsize=10)


def _plot_weights(axes: Any, teachers: list[dict]) -> None:
    title = "Mean weight in PILE, and in the plain mean (|)"
    if not any("pile_weight" in teacher for teacher in teachers):
        _missing(axes, title, "no labelled pairs")
        return
    positions = _rows(axes, teachers)
    axes.barh(positions, _column(teachers, "pile_weight"), color="tab:blue")
    axes.plot(_column(teachers, "mean_weight"), positions, "|", color="black", markersize=9, markeredgewidth=1.5)
    axes.set_xlim(left=0)
    axes.set_title(title, fontsize=10)


def write_html(report: dict, title: str, picture: Path, path: Path) -> None:
    """The whole report in one file: the picture inside it, nothing fetched, no script, all text escaped."""
    import jinja2

    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"percent": percent, "decimal": decimal, "printable": printable}
    encoded = base64.b64encode(picture.read_bytes()).decode()
    path.write_text(environment.from_string(_PAGE).render(report=report, title=title, picture=encoded), encoding="utf-8")


_PAGE = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 75rem; padding: 0 1rem; color: #222; }
h2 { margin-top: 2.2rem; }
img { max-width: 100%; }
table { border-collapse: collapse; font-size: 13px; }
th, td { padding: .25rem .6rem; border-bottom: 1px solid #ddd; text-align: right; vertical-align: top; }
th:first-child, td:first-child, td.text { text-align: left; }
td.text { max-width: 26rem; overflow-wrap: anywhere; }
.scroll { overflow-x: auto; }
small { color: #666; }
</style>
</head>
<body>
<h1>{{ title }}</h1>
<p>{{ "{:,}".format(report.queries) }} queries, {{ "{:,}".format(report.documents) }} documents,
{{ report.list_lengths.min }} to {{ "{:,}".format(report.list_lengths.max) }} a query (median
{{ "{:g}".format(report.list_lengths.median) }}); {{ report.teachers | length }} teachers;
{% if report.texts %}texts for {{ "{:,}".format(report.texts) }} queries{% else %}no texts{% endif %};
{% if report.num_features %}{{ report.num_features }} features{% else %}no features{% endif %}.<br>
{{ "{:,}".format(report.labels.labelled) }} documents are labelled, {{ "{:,}".format(report.labels.queries_with_relevant) }}
queries have a label above 0, {{ "{:,}".format(report.labels.queries_with_pairs) }} have documents of different labels
({{ "{:,}".format(report.labels.pairs) }} pairs).</p>
<h2>Look at this first</h2>
<ul>
{% for finding in report.findings %}
<li>{{ finding | printable }}</li>
{% else %}
<li>Nothing stands out.</li>
{% endfor %}
</ul>
<h2>Overview</h2>
<p><img alt="Panels: list lengths, labels, coverage, logits, saturation, quality, agreement, weights"
 src="data:image/png;base64,{{ picture }}"></p>
{% if report.teachers %}
<h2>Teachers</h2>
<div class="scroll">
<table>
<tr><th>teacher</th><th>scored</th><th>queries</th><th>lowest</th><th>highest</th><th>spread within<br>a query</th>
<th>at the<br>lowest</th><th>at the<br>highest</th><th>constant<br>lists</th><th>labelled<br>pairs</th>
<th>in the<br>right order</th><th>PNR</th><th>tied</th><th>NDCG@10</th>
<th>weight<br>in PILE</th><th>weight in<br>the mean</th></tr>
{% for t in report.teachers %}
<tr><td>{{ t.name | printable }}</td><td>{{ t.coverage | percent }}</td><td>{{ "{:,}".format(t.queries_scored) }}</td>
{% if t.scored %}
<td>{{ t.min | decimal }}</td><td>{{ t.max | decimal }}</td><td>{{ t.median_query_std | decimal }}</td>
<td>{{ t.near_min | percent }}</td><td>{{ t.near_max | percent }}</td><td>{{ t.constant_lists | percent }}</td>
<td>{{ "{:,}".format(t.pairs) }}</td><td>{{ t.pair_accuracy | percent }}</td><td>{{ t.pnr | decimal }}</td>
<td>{{ t.tied_pairs | percent }}</td><td>{{ t["ndcg@10"] | decimal }}</td>
<td>{{ t.get("pile_weight") | decimal }}</td><td>{{ t.get("mean_weight") | decimal }}</td>
{% else %}
<td colspan="13">scored nothing</td>
{% endif %}
</tr>
{% endfor %}
</table>
</div>
<p><small>Quality is judged on the documents that the teacher scored, so teachers that scored different ones are judged on
different pairs; <code>pile-fast evaluate</code> ranks all documents. In PNR and the right order a tied pair is half
right.</small></p>
{% endif %}
{% if report.suspicious_queries %}
<h2>Queries whose labels the teachers contradict</h2>
<p>By the mean of the calibrated teachers; a wrong label, a wrong query, or teachers that fail alike.</p>
<table>
<tr><th>query</th><th></th><th>pairs against<br>the labels</th><th>pairs with<br>the labels</th></tr>
{% for q in report.suspicious_queries %}
<tr><td>{{ q.query_id | printable }}</td><td class="text">{{ q.query or "" }}</td>
<td>{{ q.pairs_against }}</td><td>{{ q.pairs_alike }}</td></tr>
{% endfor %}
</table>
{% endif %}
{% if report.suspicious_pairs %}
<h2>Pairs whose labels the teachers contradict</h2>
<p>The document of the lower label stands higher with most teachers that scored both.</p>
<table>
<tr><th>query</th><th></th><th>lower label</th><th></th><th>higher label</th><th></th><th>teachers against : with</th></tr>
{% for p in report.suspicious_pairs %}
<tr><td>{{ p.query_id | printable }}</td><td class="text">{{ p.query or "" }}</td>
{% for d in (p.lower, p.higher) %}
<td>{{ "{:g}".format(d.label) }}</td><td class="text"><small>{{ d.doc_id | printable }}</small><br>{{ d.document or "" }}</td>
{% endfor %}
<td>{{ p.teachers_against }} : {{ p.teachers_alike }}</td></tr>
{% endfor %}
</table>
{% elif report.teachers and report.labels.pairs %}
<p>No labelled pair is contradicted by most of the teachers.</p>
{% endif %}
</body>
</html>
"""
