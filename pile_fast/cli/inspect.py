"""``pile-fast inspect``: what a file holds, and where its labels and teachers disagree."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path

import pile_fast
from pile_fast.cli.common import add_input, print_left_out, progress, require, whole_number, writable_folder, write_json
from pile_fast.data import BadRows, atomic_path, read_rows
from pile_fast.evaluation.inspection import Contents, inspect
from pile_fast.evaluation.inspection_report import plot, write_html
from pile_fast.printable import decimal, percent, printable

LONGEST_EXCERPT = 300
MOST_PRINTED = 50


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "inspect",
        help="where teachers disagree with labels and with each other: coverage, saturation, quality, suspicious labels",
        description="Looks at a file's labels and teachers: how much each teacher scored and how well, which are saturated, "
        "which agree, and which labels most of them contradict. Writes report.html, report.png and report.json.",
    )
    add_input(parser)
    parser.add_argument(
        "--most", type=whole_number(0), default=20, metavar="N", help="suspicious queries and pairs to list (default: 20)"
    )
    parser.add_argument("--output", metavar="DIR", required=True, help="where the report goes")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    require("inspect", "matplotlib", "rich", "jinja2", "tqdm")

    output = writable_folder(args.output)
    bad_rows = BadRows() if args.skip_bad_rows else None
    contents = Contents.from_rows(_rows(args, bad_rows))
    report = inspect(contents, most=args.most)
    _add_texts(contents, report, args)
    report = {"data": args.data, "pile_fast": pile_fast.__version__, "bad_rows": bad_rows.count if bad_rows else 0, **report}
    paths = {kind: output / f"report.{kind}" for kind in ("html", "png", "json")}
    title = f"{printable(Path(args.data).name)}: labels and teachers"
    write_json(paths["json"], report)
    with atomic_path(paths["png"]) as temporary:
        plot(contents, report, title, temporary)
    with atomic_path(paths["html"]) as temporary:
        write_html(report, title, paths["png"], temporary)
    _print(report)
    print_left_out(bad_rows)
    print(f"Wrote {paths['html']}, {paths['png']} and {paths['json']}.")
    return 0


def _rows(args: argparse.Namespace, bad_rows: BadRows | None) -> Iterable[dict]:
    return progress(read_rows(args.data, format=args.source, bad_rows=bad_rows))


def _add_texts(contents: Contents, report: dict, args: argparse.Namespace) -> None:
    """Names of the suspicious documents; query and documents, if the file has texts: it is read again up to the last wanted."""
    wanted: dict[str, list[dict]] = {}
    for entry in report["suspicious_queries"] + report["suspicious_pairs"]:
        wanted.setdefault(entry["query_id"], []).append(entry)
        entry["query"] = None
    starts = dict(zip(contents.query_ids, contents.cu_seqlens.tolist(), strict=False)) if wanted else {}
    for entry in report["suspicious_pairs"]:
        for side in ("lower", "higher"):
            entry[side]["doc_id"] = contents.doc_ids[starts[entry["query_id"]] + entry[side]["position"]]
            entry[side]["document"] = None
    if not contents.any_text:
        wanted = {}
    for row in _rows(args, BadRows() if args.skip_bad_rows else None) if wanted else ():
        for entry in wanted.pop(row["query_id"], ()):
            entry["query"] = _excerpt(row["query"])
            for document in (entry[side] for side in ("lower", "higher") if side in entry):
                document["document"] = _excerpt(row["documents"][document["position"]]) if row["documents"] else None
        if not wanted:
            break
    for entry in report["suspicious_pairs"]:
        for side in ("lower", "higher"):
            del entry[side]["position"]


def _excerpt(text: str | None) -> str | None:
    return text if text is None or len(text) <= LONGEST_EXCERPT else text[:LONGEST_EXCERPT].rstrip() + " …"


def _print(report: dict) -> None:
    import rich.box
    import rich.console
    import rich.table
    from rich.text import Text  # not markup: a name may hold brackets and :colons:

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
        for teacher in report["teachers"][:MOST_PRINTED]:
            table.add_row(
                Text(printable(teacher["name"])),
                percent(teacher["coverage"]),
                *(percent(teacher.get(key)) for key in ("near_min", "near_max", "constant_lists")),
                *(decimal(teacher.get(key)) for key in ("pnr", "ndcg@10", "pile_weight", "mean_weight")),
            )
        rich.console.Console().print(table)
        if len(report["teachers"]) > MOST_PRINTED:
            print(f"And {len(report['teachers']) - MOST_PRINTED:,} more teachers, in the report.")
        print("PNR and NDCG@10 (gain 2^label - 1) on the documents that the teacher scored, against the labels.")
    print("\n".join(f"- {printable(finding)}" for finding in report["findings"]))
