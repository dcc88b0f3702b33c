"""``pile-fast inspect``: what a file holds, and where its labels and teachers disagree."""

from __future__ import annotations

import argparse
from pathlib import Path

import pile_fast
from pile_fast.cli.common import as_json, require, whole_number, writable_folder
from pile_fast.cli.errors import UserError

LONGEST_EXCERPT = 300


def add_parser(commands) -> None:
    parser = commands.add_parser(
        "inspect",
        help="where teachers disagree with labels and with each other: coverage, saturation, quality, suspicious labels",
        description="Looks at a file's labels and teachers: how much each teacher scored and how well, which are saturated, "
        "which agree, and which labels most of them contradict. Writes report.html, report.png and report.json.",
    )
    parser.add_argument("data", metavar="DATA", help="a file of queries: .jsonl, .parquet, LETOR")
    parser.add_argument(
        "--most", type=whole_number(0), default=20, metavar="N", help="suspicious queries and pairs to list (default: 20)"
    )
    parser.add_argument("--skip-bad-rows", action="store_true", help="count broken rows instead of stopping at the first")
    parser.add_argument("--output", metavar="DIR", required=True, help="where the report goes")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    require("inspect", "matplotlib", "rich", "jinja2", "tqdm")
    from pile_fast.inspection import Contents, inspect
    from pile_fast.inspection_report import plot, write_html

    output = writable_folder(args.output)
    try:
        contents = Contents.from_rows(_rows(args, notes := []))
        report = inspect(contents, most=args.most)
        _add_texts(report, args)
    except (OSError, ValueError) as error:
        raise UserError(str(error)) from error
    report["findings"] = notes + report["findings"]
    report = {"data": args.data, "pile_fast": pile_fast.__version__} | report
    _print(report)
    paths = {kind: output / f"report.{kind}" for kind in ("html", "png", "json")}
    title = f"{Path(args.data).name}: labels and teachers"
    paths["json"].write_text(as_json(report))
    plot(contents, report, title, paths["png"])
    write_html(report, title, paths["png"], paths["html"])
    print(f"Wrote {paths['html']}, {paths['png']} and {paths['json']}.")
    return 0


def _rows(args: argparse.Namespace, notes: list[str]):
    """The file's rows; at its end, `notes` tells of the broken ones."""
    from tqdm import tqdm

    from pile_fast.data import BadRows, read_rows

    bad_rows = BadRows() if args.skip_bad_rows else None
    yield from tqdm(read_rows(args.data, bad_rows=bad_rows), unit=" queries", disable=None)
    if bad_rows is not None and bad_rows.count:
        notes.append(f"{bad_rows.count:,} broken rows were left out, the first: {bad_rows.reasons[0]}")


def _add_texts(report: dict, args: argparse.Namespace) -> None:
    """Query and documents of what is suspicious: the file is read once more, for the few texts that are shown."""
    wanted: dict[str, list[dict]] = {}
    for entry in report["suspicious_queries"] + report["suspicious_pairs"]:
        wanted.setdefault(entry["query_id"], []).append(entry)
    if not wanted:
        return
    for row in _rows(args, []):
        for entry in wanted.get(row["query_id"], ()):
            entry["query"] = _excerpt(row["query"])
            for document in (entry[side] for side in ("lower", "higher") if side in entry):
                position = document.pop("position")
                document["doc_id"] = row["doc_ids"][position]
                document["document"] = _excerpt(row["documents"][position]) if row["documents"] else None


def _excerpt(text: str | None) -> str | None:
    return text if text is None or len(text) <= LONGEST_EXCERPT else text[:LONGEST_EXCERPT].rstrip() + " …"


def _print(report: dict) -> None:
    import rich.box
    import rich.console
    import rich.markup
    import rich.table

    from pile_fast.inspection_report import decimal, percent

    labels, lengths = report["labels"], report["list_lengths"]
    print(
        f"{report['queries']:,} queries, {report['documents']:,} documents ({lengths['min']} to {lengths['max']:,} a query, "
        f"median {lengths['median']:g}), {labels['labelled']:,} labelled; "
        f"{labels['queries_with_relevant']:,} queries with a label above 0."
    )
    if report["teachers"]:
        table = rich.table.Table(box=rich.box.SIMPLE_HEAD, collapse_padding=True, pad_edge=False)
        table.add_column("teacher", overflow="fold", min_width=10)
        for name in (
            "scored",
            "at\nlowest",
            "at\nhighest",
            "const.\nlists",
            "PNR",
            "NDCG\n@10",
            "PILE\nweight",
            "mean\nweight",
        ):
            table.add_column(name, justify="right")
        for teacher in report["teachers"]:
            table.add_row(
                rich.markup.escape(teacher["name"]),
                percent(teacher["coverage"]),
                *(percent(teacher.get(key)) for key in ("near_min", "near_max", "constant_lists")),
                *(decimal(teacher.get(key)) for key in ("pnr", "ndcg@10", "pile_weight", "mean_weight")),
            )
        rich.console.Console().print(table)
        print("PNR and NDCG@10 on the documents that the teacher scored, against the labels.")
    print("\n".join(f"- {finding}" for finding in report["findings"]))
