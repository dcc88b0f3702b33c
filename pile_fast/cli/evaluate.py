"""``pile-fast evaluate``: models, runs, teachers and ensembles on the same labelled queries, with paired tests."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import math
from array import array
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import pile_fast
from pile_fast.cli.common import (
    add_input,
    decimal,
    load_ranker,
    named,
    percent,
    print_left_out,
    real_number,
    require,
    whole_number,
    writable_folder,
    write_json,
)
from pile_fast.cli.errors import UserError, user_errors
from pile_fast.data import BadRows, atomic_path, read_rows
from pile_fast.data.trec import read_qrels
from pile_fast.evaluation import BOOTSTRAP_SAMPLES, DEFAULT_METRICS, PERMUTATIONS, Evaluation, Metric, evaluate, tie_order

QUERIES_AT_ONCE = 64  # read, then scored by the models, so that texts of the whole file are never in memory
SIGNIFICANT = 0.05


@dataclasses.dataclass
class System:
    """A ranker to evaluate, and its scores (NaN = not scored) of the documents read so far."""

    kind: str  # "teacher", "column", "model", "run"
    name: str
    source: str
    scores: array = dataclasses.field(default_factory=lambda: array("d"))


def add_parser(commands) -> None:
    parser = commands.add_parser(
        "evaluate",
        help="models, TREC runs, teachers and ensembles on the same labelled queries, with confidence intervals and tests",
        description="Compares rankers on the labelled queries of a file: per-query metrics, means with 95 % confidence "
        "intervals, and paired significance tests against a baseline. Writes a table, metrics.json and metrics.png.",
    )
    add_input(parser)
    parser.add_argument("--teachers", action="store_true", help="evaluate the file's teachers")
    parser.add_argument(
        "--column", choices=["ensemble_logits"], action="append", default=[], help="evaluate the file's ensemble"
    )
    parser.add_argument(
        "--model",
        metavar="NAME=MODEL",
        type=named("MODEL"),
        action="append",
        default=[],
        help="evaluate a model: a folder, or a name on the Hugging Face hub; may be given several times",
    )
    parser.add_argument(
        "--run",
        metavar="NAME=FILE",
        type=named("FILE"),
        action="append",
        default=[],
        dest="runs",
        help="evaluate a TREC run file; may be given several times",
    )
    parser.add_argument("--qrels", metavar="FILE", help="TREC qrels, in place of the file's labels")
    parser.add_argument(
        "--unjudged", type=real_number(-math.inf), metavar="LABEL",
        help="label of what the qrels do not list (default: unlabelled; trec_eval takes 0)",
    )  # fmt: skip
    parser.add_argument(
        "--metrics", type=_metrics, default=list(DEFAULT_METRICS), help=f"default: {','.join(DEFAULT_METRICS)}; also opa, @k"
    )
    parser.add_argument("--baseline", metavar="NAME", help="test the other systems against this one")
    parser.add_argument(
        "--relevant-at", type=real_number(-math.inf), default=1.0, metavar="LABEL",
        help="MRR and MAP: a document is relevant from this label on (default: 1)",
    )  # fmt: skip
    parser.add_argument(
        "--empty", choices=("skip", "zero", "one"), default="skip",
        help="queries without a relevant document: leave them out of NDCG, MRR and MAP, or count them as 0 or 1 "
        "(default: skip)",
    )  # fmt: skip
    parser.add_argument("--batch-size", type=whole_number(1), default=64, help="documents a model scores at once (default: 64)")
    parser.add_argument("--max-length", type=whole_number(1), help="tokens a text model reads (default: the model's)")
    parser.add_argument("--device", help="where models run, e.g. cuda (default: the model's choice)")
    parser.add_argument("--seed", type=whole_number(0), default=0, help="of the resampling (default: 0)")
    parser.add_argument("--output", metavar="DIR", required=True, help="where metrics.json and metrics.png go")
    parser.set_defaults(run=run)


def _metrics(text: str) -> list[str]:
    try:
        return list(dict.fromkeys(Metric(name.strip()).name for name in text.split(",")))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error).removeprefix("metrics: ")) from None


def run(args: argparse.Namespace) -> int:
    require("evaluate", "matplotlib", "rich", "tqdm", *["transformers"] * bool(args.model))
    if not (args.teachers or args.column or args.model or args.runs):
        raise UserError("nothing to evaluate: give --teachers, --column, --model or --run")
    output = writable_folder(args.output)
    bad_rows = BadRows() if args.skip_bad_rows else None
    with user_errors(args.output):
        query_ids, labels, cu_seqlens, systems = _read(args, bad_rows)
        if args.baseline is not None and args.baseline not in systems:
            raise UserError(f"--baseline {args.baseline}: expected one of {', '.join(systems)}")
        scores = {name: _tensor(system.scores) for name, system in systems.items()}
        evaluation = evaluate(
            scores, labels, cu_seqlens, metrics=args.metrics, baseline=args.baseline, relevant_at=args.relevant_at,
            empty=args.empty, seed=args.seed,
        )  # fmt: skip
        write_json(output / "metrics.json", _report(evaluation, systems, query_ids, args, bad_rows))
        with atomic_path(output / "metrics.png") as temporary:
            _plot(evaluation, args, temporary)
    _print_table(evaluation, systems, args)
    print("\n".join(_explain(evaluation, args)))
    print_left_out(bad_rows)
    print(f"Wrote {output / 'metrics.json'} and {output / 'metrics.png'}.")
    return 0


def _read(args: argparse.Namespace, bad_rows: BadRows | None) -> tuple[list[str], Tensor, Tensor, dict[str, System]]:
    """Query ids, labels (D,), cu_seqlens, and the systems with their scores."""
    from tqdm import tqdm

    rows = read_rows(args.data, format=args.source, bad_rows=bad_rows)
    qrels = read_qrels(Path(args.qrels)) if args.qrels else None
    systems: dict[str, System] = {}

    def add(kind: str, name: str, source: str) -> System:
        if name in systems:
            raise UserError(f"two systems are called {name!r}")
        systems[name] = System(kind, name, source)
        return systems[name]

    first = next(rows)
    teachers = [add("teacher", name, args.data) for name in first["teachers"]] if args.teachers else []
    if args.teachers and not teachers:
        raise UserError(f"--teachers: {args.data} has no teachers")
    columns = [add("column", name, args.data) for name in dict.fromkeys(args.column)]
    runs = [(add("run", name, path), _read_run(path)) for name, path in args.runs]
    models = [(add("model", name, path), _load_model(name, path, args)) for name, path in args.model]

    query_ids, lengths, labels = [], [0], array("d")
    for batch in _batches(tqdm(itertools.chain([first], rows), unit=" queries", disable=None)):
        scored = [(system, _model_scores(system, ranker, batch, args)) for system, ranker in models]
        for i, row in enumerate(batch):
            query_id, names = row["query_id"], row["doc_ids"]
            if columns and row["ensemble_logits"] is None:
                raise UserError(f"--column ensemble_logits: query {query_id} of {args.data} has no such column")
            found = [(system.scores, [logits[m] for logits in row["teacher_logits"]]) for m, system in enumerate(teachers)]
            found += [(system.scores, row[system.name]) for system in columns]
            found += [(system.scores, _listed(run.get(query_id, {}), names)) for system, run in runs]
            found += [(system.scores, scores[i].tolist()) for system, scores in scored]
            found.append((labels, row["labels"] if qrels is None else _listed(qrels.get(query_id, {}), names, args.unjudged)))
            order = tie_order(query_id, names)
            for column, values in found:
                column.extend(math.nan if values[d] is None else values[d] for d in order)
            query_ids.append(query_id)
            lengths.append(len(names))

    known = set(query_ids)
    for system, run in runs:
        if not known & run.keys():
            raise UserError(f"--run {system.name}={system.source}: none of its queries is in {args.data}")
    if qrels is not None and not known & qrels.keys():
        raise UserError(f"--qrels {args.qrels}: none of its queries is in {args.data}")
    return query_ids, _tensor(labels), torch.tensor(lengths).cumsum(0), systems


def _listed(values: dict[str, float], names: list[str], otherwise: float | None = None) -> list[float | None]:
    return [values.get(name, otherwise) for name in names]


def _read_run(path: str) -> dict[str, dict[str, float]]:
    """Scores by query and document."""
    return {
        row["query_id"]: {name: score for name, (score,) in zip(row["doc_ids"], row["teacher_logits"], strict=True)}
        for row in read_rows(path, format="trec")
    }


def _tensor(values: array) -> Tensor:
    return torch.from_numpy(np.array(values))


def _batches(rows: Iterator[dict]) -> Iterator[list[dict]]:
    while batch := list(itertools.islice(rows, QUERIES_AT_ONCE)):
        yield batch


def _load_model(name: str, path: str, args: argparse.Namespace):
    with user_errors(f"--model {name}"):
        return load_ranker(path, max_length=args.max_length, device=args.device)


def _model_scores(system: System, ranker, rows: list[dict], args: argparse.Namespace) -> list[Tensor]:
    try:
        return ranker.score(rows, batch_size=args.batch_size)
    except ValueError as error:
        raise UserError(f"--model {system.name}: {args.data}: {error}") from error


def _sorted(evaluation: Evaluation, metrics: list[str]) -> list[str]:
    """The systems, best first by the first metric."""

    def key(name: str) -> float:
        value = evaluation.results[name][metrics[0]].value
        return math.inf if math.isnan(value) else -value

    return sorted(evaluation.results, key=key)


def _print_table(evaluation: Evaluation, systems: dict[str, System], args: argparse.Namespace) -> None:
    import rich.box
    import rich.console
    import rich.markup
    import rich.table

    table = rich.table.Table(title=rich.markup.escape(args.data), box=rich.box.SIMPLE_HEAD, leading=1)
    table.add_column("system")
    any_system = next(iter(evaluation.results.values()))
    for name in args.metrics:
        table.add_column(f"{name.upper()}\nn = {any_system[name].queries:,}", justify="right", no_wrap=True)
    table.add_column("not\nscored", justify="right")
    table.add_column("tied\npairs", justify="right")
    for name in _sorted(evaluation, args.metrics):
        coverage = evaluation.coverage[name]
        label = f"{rich.markup.escape(name)}\n[dim]{systems[name].kind}{', baseline' * (name == args.baseline)}[/dim]"
        cells = []
        for result in evaluation.results[name].values():
            lines = [f"[bold]{decimal(result.value)}[/bold]", f"[dim]{decimal(result.low)}–{decimal(result.high)}[/dim]"]
            if result.p is not None:
                significant = result.p_holm < SIGNIFICANT
                color = ("green" if result.difference > 0 else "red") if significant else "dim"
                difference = "+" * (result.difference > 0) + decimal(result.difference)
                lines.append(f"[{color}]{difference} p {_p(result.p_holm)}{'*' if significant else ' '}[/{color}]")
            cells.append("\n".join(lines))
        table.add_row(label, *cells, f"{evaluation.queries.documents - coverage.documents:,}", percent(coverage.tied_share))
    console = rich.console.Console()
    if not console.is_terminal:  # a pipe has no width; never break numbers for it
        console = rich.console.Console(width=60 + 20 * len(args.metrics))
    console.print(table)


def _p(value: float) -> str:
    return "<.001" if value < 0.001 else decimal(value)


def _explain(evaluation: Evaluation, args: argparse.Namespace) -> Iterator[str]:
    """The lines under the table: which queries count, what was filled in, what was tested."""
    queries = evaluation.queries
    yield (
        f"{queries.total:,} queries, {queries.labelled:,} with a label, {queries.relevant:,} with a relevant document "
        f"(label >= {args.relevant_at:g}), {queries.paired:,} with documents of different labels."
    )
    if not queries.paired:
        yield "No query has documents of different labels: nothing here can tell rankers apart."
    if queries.relevant < queries.labelled:
        treated = {"skip": "do not count", "zero": "count as 0", "one": "count as 1"}[args.empty]
        ranked = ", ".join(name.upper() for name in args.metrics if Metric(name).base not in ("pnr", "opa"))
        if ranked:
            yield f"Queries without a relevant document say nothing about rankers; in {ranked} they {treated}."
    if args.column:
        yield (
            f"{', '.join(args.column)}: an ensemble that was given these queries' labels (pile, ca_mkd, best) is a training "
            "target; its figures say nothing about a ranker."
        )
    partial = sum(coverage.documents < queries.documents for coverage in evaluation.coverage.values())
    if partial:
        yield (
            f"{partial} of {len(evaluation.coverage)} systems did not score all of the {queries.documents:,} labelled "
            "documents; what a system did not score ranks last. Two such documents tie, which PNR counts as half right."
        )
    yield f"Below each value: its 95 % confidence interval over queries (bootstrap, {BOOTSTRAP_SAMPLES:,} samples)."
    if args.baseline is None:
        yield "No tests: name a --baseline to test the others against."
    elif len(evaluation.results) > 1:
        yield (
            f"Then the difference from {args.baseline}, and p of a paired randomisation test ({PERMUTATIONS:,} exchanges, "
            f"Holm-corrected over the systems, a metric at a time); * = p < {SIGNIFICANT}."
        )


def _report(evaluation: Evaluation, systems: dict[str, System], query_ids: list[str], args, bad_rows) -> dict:
    counts = evaluation.queries
    return {
        "data": args.data,
        "qrels": args.qrels,
        "pile_fast": pile_fast.__version__,
        "settings": {
            "metrics": args.metrics, "baseline": args.baseline, "relevant_at": args.relevant_at, "empty": args.empty,
            "unjudged": args.unjudged, "seed": args.seed, "bootstrap_samples": BOOTSTRAP_SAMPLES, "permutations": PERMUTATIONS,
        },
        "queries": dataclasses.asdict(counts),
        "bad_rows": bad_rows.count if bad_rows else 0,
        "systems": [
            {
                "name": name,
                "kind": system.kind,
                "source": system.source,
                "coverage": dataclasses.asdict(evaluation.coverage[name]),
                "metrics": {
                    metric: {
                        field.name: getattr(result, field.name)
                        for field in dataclasses.fields(result)
                        if field.name != "per_query"
                    }
                    for metric, result in evaluation.results[name].items()
                },
            }
            for name, system in systems.items()
        ],
        "query_ids": query_ids,
        "per_query": {
            name: {metric: result.per_query.tolist() for metric, result in results.items()}
            for name, results in evaluation.results.items()
        },
    }  # fmt: skip


def _plot(evaluation: Evaluation, args: argparse.Namespace, path: Path) -> None:
    """A panel per metric: every system's value and interval, coloured by the test against the baseline."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = _sorted(evaluation, args.metrics)[::-1]
    widest = max(len(name) for name in names)
    figure = Figure(figsize=(1.5 + 0.07 * widest + 2.6 * len(args.metrics), 1.6 + 0.26 * len(names)), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(args.metrics), sharey=True, squeeze=False)[0]
    for axes, metric in zip(panels, args.metrics, strict=True):
        for position, name in enumerate(names):
            result = evaluation.results[name][metric]
            color = _color(result, name == args.baseline)
            if math.isfinite(result.value):
                axes.hlines(position, result.low, result.high, color=color, linewidth=1.5)
                axes.plot(result.value, position, "o", color=color, markersize=5)
            else:
                axes.annotate(
                    decimal(result.value), (0.97, position), xycoords=("axes fraction", "data"), ha="right", va="center"
                )
        if args.baseline is not None:
            axes.axvline(evaluation.results[args.baseline][metric].value, color="black", linestyle=":", linewidth=1)
        axes.set_title(f"{metric.upper()}  (n = {evaluation.results[names[0]][metric].queries:,})", fontsize=10)
        axes.locator_params(axis="x", nbins=5)
        axes.grid(axis="x", alpha=0.3)
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_yticks(range(len(names)), names, fontsize=8)
    panels[0].set_ylim(-0.6, len(names) - 0.4)
    note = "95 % confidence intervals over queries"
    if args.baseline is not None:
        note += f"; dotted: {args.baseline}; green better, red worse (paired test, Holm-corrected p < {SIGNIFICANT})"
    figure.supxlabel(note, fontsize=8)
    figure.savefig(path, dpi=130)


def _color(result, is_baseline: bool) -> str:
    if is_baseline:
        return "black"
    if result.p is None or not result.p_holm < SIGNIFICANT:
        return "tab:blue" if result.p is None else "tab:gray"
    return "tab:green" if result.difference > 0 else "tab:red"
