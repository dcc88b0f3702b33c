"""What ``pile-fast evaluate`` says and writes: the table, the conventions in words, and metrics.json."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

import pile_fast
from pile_fast.cli.common import finite
from pile_fast.cli.evaluate_inputs import Inputs, System
from pile_fast.data import BadRows, atomic_path
from pile_fast.evaluation.compare import BOOTSTRAP_SAMPLES, MOST_UNITS, PERMUTATIONS, Evaluation, Metric
from pile_fast.evaluation.comparison_report import SIGNIFICANT, best_first, decimal4
from pile_fast.printable import decimal, percent, printable

_MOST_LISTED = 10


def print_table(evaluation: Evaluation, systems: dict[str, System], args: argparse.Namespace) -> None:
    import rich.box
    import rich.console
    import rich.table
    from rich.text import Text  # not markup: a name may hold brackets and :colons:

    sources = dict.fromkeys([*args.data, *(path for _, path in args.runs)])
    table = rich.table.Table(title=Text(printable(", ".join(sources))), box=rich.box.SIMPLE_HEAD, leading=1)
    table.add_column("system", overflow="fold", min_width=8)
    any_system = next(iter(evaluation.results.values()))
    for name in args.metrics:
        table.add_column(f"{name.upper()}\nn = {any_system[name].queries:,}", justify="right", no_wrap=True)
    table.add_column("not\nreturned", justify="right")
    table.add_column("tied\npairs", justify="right")
    for name in best_first(evaluation):
        coverage = evaluation.coverage[name]
        label = Text(printable(name))
        label.append(f"\n{systems[name].kind}{', baseline' * (name == args.baseline)}", "dim")
        cells = []
        for result in evaluation.results[name].values():
            cell = Text(decimal4(result.value), "bold")
            cell.append_text(Text(f"\n{decimal4(result.low)}–{decimal4(result.high)}", "not bold dim"))
            if result.difference is not None and result.p_holm is not None:
                significant = result.p_holm < SIGNIFICANT
                color = ("green" if result.difference > 0 else "red") if significant else "dim"
                difference = "+" * (result.difference > 0) + decimal4(result.difference)
                text = f"\n{difference} p {_p(result.p_holm)}{'*' if significant else ' '}"
                cell.append_text(Text(text, f"not bold {color}"))
            cells.append(cell)
        table.add_row(label, *cells, f"{evaluation.queries.documents - coverage.documents:,}", percent(coverage.tied_share))
    console = rich.console.Console()
    if not console.is_terminal:  # a pipe has no width; never break numbers for it
        console = rich.console.Console(width=60 + 22 * len(args.metrics))
    console.print(table)


def _p(value: float) -> str:
    return "<.001" if value < 0.001 else decimal(value)


def explain(evaluation: Evaluation, inputs: Inputs, args: argparse.Namespace) -> Iterator[str]:
    """The lines under the table: which queries count, by which conventions, what was filled in, what was tested."""
    queries, coverage = evaluation.queries, evaluation.coverage
    yield (
        f"{queries.total:,} queries, {queries.labelled:,} with a label, {queries.relevant:,} with a relevant document "
        f"(label >= {args.relevant_at:g}), {queries.paired:,} with documents of different labels."
    )
    if not queries.paired:
        yield "No query has documents of different labels: nothing here can tell rankers apart."
    ranked = [name for name in args.metrics if Metric(name).base not in ("pnr", "opa")]
    if ranked:
        yield from _conventions(evaluation, ranked, args)
    if args.column:
        yield (
            f"{', '.join(args.column)}: an ensemble that was given these queries' labels (pile, ca_mkd, best) is a training "
            "target; its figures say nothing about a ranker."
        )
    pairs = [name.upper() for name in args.metrics if name in ("pnr", "opa")]
    partial = sum(entry.documents < queries.documents for entry in coverage.values())
    if partial and pairs:
        yield (
            f"{', '.join(pairs)}: pairs of the {queries.documents:,} labelled documents; {partial} of {len(coverage)} systems "
            "did not return all of them. What a system did not return ranks last; two such documents tie, which PNR counts "
            "as half right and OPA as wrong."
        )
    units = "queries" if queries.labelled <= MOST_UNITS else f"{MOST_UNITS:,} random blocks of queries"
    yield f"Below each value: its 95 % confidence interval (bootstrap over {units}, {BOOTSTRAP_SAMPLES:,} samples)."
    if args.baseline is None:
        yield "No tests: name a --baseline to test the others against."
    elif len(evaluation.results) > 1:
        yield (
            f"Then the difference from {printable(args.baseline)}, and p of a paired randomisation test ({PERMUTATIONS:,} "
            f"exchanges, Holm-corrected over the systems, a metric at a time); * = p < {SIGNIFICANT}."
        )


def _conventions(evaluation: Evaluation, ranked: list[str], args: argparse.Namespace) -> Iterator[str]:
    """How the ranked metrics count, and whom it concerns."""
    queries, coverage = evaluation.queries, evaluation.coverage
    bases = {Metric(name).base for name in ranked}
    source = f"the qrels, {printable(args.qrels)}" if args.qrels else "the file's labels, which are all that is known"
    yield (
        f"{', '.join(map(str.upper, ranked))} as trec_eval counts: relevant and ideal documents are those of {source}; what "
        "a system did not return earns nothing; equal scores (float32) in descending order of document names; the mean is "
        "over all queries with a label, as in ir-measures and trec_eval -c."
    )
    if "ndcg" in bases:
        meaning = "the label, as trec_eval" if args.gain == "linear" else "2^label - 1, as LightGBM; trec_eval: --gain linear"
        yield f"NDCG's gain: {args.gain} ({meaning}); a label below 0 gains nothing."
    if unlabelled := queries.total - queries.labelled:
        yield f"Dropped: {unlabelled:,} queries without a label."
    most = max(entry.unjudged for entry in coverage.values())
    if most:
        least = min(entry.unjudged for entry in coverage.values())
        number = f"{most:,}" if least == most else f"{least:,} to {most:,}"
        treated = (
            "count as not relevant (--unjudged skip leaves them out)"
            if args.unjudged == "zero"
            else "were dropped from the rankings (--unjudged 0 counts them as not relevant, as trec_eval does)"
        )
        yield f"Unlabelled: {number} documents that a system returned for these queries; they {treated}."
    if empty := queries.labelled - queries.relevant:
        treated = {
            "skip": "they do not count (dropped; --empty zero counts them as 0, as trec_eval does)",
            "zero": "they count as 0 (--empty skip leaves them out)",
            "one": "they count as 1",
        }[args.empty]
        names = ", ".join(map(str.upper, ranked))
        yield f"No relevant document, so nothing to tell rankers apart: {empty:,} queries; in {names} {treated}."
    lacking = {name: queries.labelled - entry.queries for name, entry in coverage.items() if entry.queries < queries.labelled}
    for name, missing in list(lacking.items())[:_MOST_LISTED]:
        yield f"{printable(name)} returned nothing for {missing:,} of the {queries.labelled:,} queries; they count as 0."
    if len(lacking) > _MOST_LISTED:
        yield f"So did {len(lacking) - _MOST_LISTED:,} more systems for some queries."


def write_report(
    path: Path, evaluation: Evaluation, inputs: Inputs, args: argparse.Namespace, bad_rows: BadRows | None
) -> None:
    """metrics.json: all numbers, and for every query each system's values (null where a query does not count)."""
    report = {
        "data": args.data[0] if len(args.data) == 1 else args.data,
        "qrels": args.qrels,
        "pile_fast": pile_fast.__version__,
        "settings": {
            "metrics": args.metrics, "baseline": args.baseline, "relevant_at": args.relevant_at, "gain": args.gain,
            "unjudged": args.unjudged, "empty": args.empty, "ties": "document name, descending",
            "mean_over": "all queries with a label", "seed": args.seed, "bootstrap_samples": BOOTSTRAP_SAMPLES,
            "permutations": PERMUTATIONS,
        },
        "queries": dataclasses.asdict(evaluation.queries),
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
            for name, system in inputs.systems.items()
        ],
    }  # fmt: skip
    # The long lists in one line each: a million numbers on lines of their own take Python's slow encoder.
    with atomic_path(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        file.write(json.dumps(finite(report), indent=1, allow_nan=False).removesuffix("\n}"))
        file.write(f',\n "query_ids": {json.dumps(inputs.query_ids)},\n "per_query": {{')
        for s, (name, results) in enumerate(evaluation.results.items()):
            file.write(f"{',' * (s > 0)}\n  {json.dumps(name)}: {{")
            for m, (metric, result) in enumerate(results.items()):
                file.write(f"{',' * (m > 0)}\n   {json.dumps(metric)}: {_numbers(result.per_query)}")
            file.write("\n  }")
        file.write("\n }\n}\n")


def _numbers(values: np.ndarray) -> str:
    known = np.isfinite(values)
    numbers = values.tolist()
    return json.dumps(numbers if known.all() else [x if k else None for x, k in zip(numbers, known.tolist(), strict=True)])
