"""``pile-fast convert``: rows from one format to another."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from pile_fast.cli.common import add_format, add_skip_bad_rows, print_left_out
from pile_fast.cli.errors import UserError, user_errors
from pile_fast.data.formats import FORMATS, read_rows, write_rows
from pile_fast.data.named import NAMED, read_named, with_pairs
from pile_fast.data.rows import BadRows, check_row


def add_parser(commands) -> None:
    parser = commands.add_parser(
        "convert",
        help="between JSON lines, Parquet, LETOR/SVMlight, TREC runs, BGE and Tevatron",
        description="Reads queries in one format, checks them and writes them in another. The format of a file is told by "
        "its name (.jsonl, .parquet, .txt or .svm for LETOR, .run for TREC; then .gz or .xz) or by --from and --to. Several "
        "TREC runs become one teacher each. A broken line stops the command with its file, number and reason.",
    )
    parser.add_argument("input", nargs="*", metavar="INPUT", help="files of one format; TREC: a run per teacher")
    parser.add_argument(
        "--dataset", choices=NAMED, metavar="NAME", help=f"instead of INPUT, public data that is at hand: {', '.join(NAMED)}"
    )
    parser.add_argument("--data", metavar="DIR", help="where the data sets' folders lie (default: $PILE_FAST_DATA, data/)")
    parser.add_argument("--output", required=True, metavar="FILE", help="the file to write, replaced once it is whole")
    add_format(parser, "the input")
    parser.add_argument("--to", dest="target", choices=FORMATS, metavar="FORMAT", help="of the output")
    parser.add_argument("--qrels", metavar="FILE", help="TREC: judgements, 'query iteration document grade'")
    parser.add_argument(
        "--unjudged", type=float, metavar="LABEL", help="TREC: label of what the qrels do not list (default: unlabelled)"
    )
    parser.add_argument("--queries", metavar="FILE", help="TREC: the queries' texts, 'name TAB text'")
    parser.add_argument("--documents", metavar="FILE", help="TREC: the documents' texts, 'name TAB text'")
    parser.add_argument(
        "--teacher",
        metavar="NAME",
        help="to TREC, BGE or Tevatron, which hold one: whose scores; 'ensemble' = what pile-fast ensemble wrote "
        "(default: the ensemble if there is one, else the only teacher)",
    )
    parser.add_argument("--with-pairs", action="store_true", help="leave out queries whose labels order no two documents")
    add_skip_bad_rows(parser)
    parser.set_defaults(run=run)


def _rows(args: argparse.Namespace, bad_rows: BadRows | None) -> Iterator[dict]:
    if args.dataset:
        return map(check_row, read_named(args.dataset, args.data))
    options = {name: getattr(args, name) for name in ("qrels", "queries", "documents", "unjudged")}
    return read_rows(args.input, format=args.source, bad_rows=bad_rows, **options)


def run(args: argparse.Namespace) -> int:
    if bool(args.input) == bool(args.dataset):
        raise UserError("expected either INPUT files or --dataset")
    bad_rows = BadRows() if args.skip_bad_rows else None
    count = 0

    def counted(rows: Iterator[dict]) -> Iterator[dict]:
        nonlocal count
        for row in rows:
            count += 1
            yield row

    with user_errors(args.output):
        from tqdm import tqdm

        rows = _rows(args, bad_rows)
        if args.with_pairs:
            rows = with_pairs(rows)
        with tqdm(counted(rows), unit=" queries", disable=None) as progress:  # None: only on a terminal
            try:
                write_rows(args.output, progress, format=args.target, teacher=args.teacher)
            except ValueError as error:
                if bad_rows is not None and bad_rows.count and count == 0:
                    raise UserError(f"{error}: all {bad_rows.count} are broken, the first: {bad_rows.reasons[0]}") from None
                raise
    print(f"Wrote {count} queries to {args.output}.")
    print_left_out(bad_rows)
    return 0
