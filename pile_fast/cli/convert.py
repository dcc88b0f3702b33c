"""``pile-fast convert``: rows from one format to another."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from pile_fast.cli.common import add_format, add_qrels, add_skip_bad_rows, print_left_out, progress
from pile_fast.cli.errors import UserError
from pile_fast.data.formats import FORMATS, read_rows, write_rows
from pile_fast.data.named import NAMED, read_named, with_pairs
from pile_fast.data.rows import BadRows, check_row, drop_unlabelled
from pile_fast.data.trec import named_runs


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "convert",
        help="between JSON lines, Parquet, LETOR/SVMlight, TREC runs and qrels, BGE and Tevatron",
        description="Reads queries in one format, checks them and writes them in another. The format of a file is told by "
        "its name (.jsonl, .parquet, .txt or .svm for LETOR, .run and .qrels for TREC; then .gz or .xz) or by --from and --to. "
        "Several TREC runs become one teacher each. A broken line stops the command with its file, number and reason.",
    )
    parser.add_argument(
        "input", nargs="*", metavar="INPUT", help="files of one format; TREC: a run per teacher, as FILE or NAME=FILE"
    )
    parser.add_argument(
        "--dataset", choices=NAMED, metavar="NAME", help=f"instead of INPUT, public data that is at hand: {', '.join(NAMED)}"
    )
    parser.add_argument("--data", metavar="DIR", help="where the data sets' folders lie (default: $PILE_FAST_DATA, data/)")
    parser.add_argument("--output", required=True, metavar="FILE", help="the file to write, replaced when it is complete")
    add_format(parser, "the input")
    parser.add_argument("--to", dest="target", choices=FORMATS, metavar="FORMAT", help="of the output")
    add_qrels(parser)
    parser.add_argument("--queries", metavar="FILE", help="TREC: the queries' texts, 'name TAB text'")
    parser.add_argument("--documents", metavar="FILE", help="TREC: the documents' texts, 'name TAB text'")
    parser.add_argument(
        "--teacher", metavar="NAME",
        help="to TREC, BGE or Tevatron, which hold one: whose scores; 'ensemble' = what pile-fast ensemble wrote "
        "(default: the ensemble if there is one, else the only teacher)",
    )  # fmt: skip
    parser.add_argument("--drop-unlabelled", action="store_true", help="leave out documents without a label")
    parser.add_argument("--with-pairs", action="store_true", help="leave out queries whose labels order no two documents")
    add_skip_bad_rows(parser)
    parser.set_defaults(run=run)


def _rows(args: argparse.Namespace, bad_rows: BadRows | None) -> Iterator[dict]:
    if args.dataset:
        return map(check_row, read_named(args.dataset, args.data))
    options = {name: getattr(args, name) for name in ("qrels", "queries", "documents", "unjudged")}
    paths, teachers = named_runs(args.input)
    return read_rows(paths, format=args.source, bad_rows=bad_rows, teachers=teachers, **options)


def run(args: argparse.Namespace) -> int:
    if bool(args.input) == bool(args.dataset):
        raise UserError("expected either INPUT files or --dataset")
    bad_rows = BadRows() if args.skip_bad_rows else None
    queries = documents = 0

    def labelled(rows: Iterator[dict]) -> Iterator[dict]:
        nonlocal documents
        for row in rows:
            size = len(row["doc_ids"])
            kept = drop_unlabelled(row)
            documents += size - (len(kept["doc_ids"]) if kept else 0)
            if kept:
                yield kept

    def counted(rows: Iterator[dict]) -> Iterator[dict]:
        nonlocal queries
        for row in rows:
            queries += 1
            yield row
        if not queries:
            raise UserError("no query is left to write")

    rows = _rows(args, bad_rows)
    if args.drop_unlabelled:
        rows = labelled(rows)
    if args.with_pairs:
        rows = with_pairs(rows)
    write_rows(args.output, progress(counted(rows)), format=args.target, teacher=args.teacher)
    print(f"Wrote {queries:,} queries to {args.output}.")
    if documents:
        print(f"Left out {documents:,} documents without a label.")
    print_left_out(bad_rows)
    return 0
