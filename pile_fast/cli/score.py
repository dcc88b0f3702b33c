"""``pile-fast score``: teacher logits from cross-encoders, bi-encoders, feature rankers and BM25, added to a file."""

from __future__ import annotations

import argparse
from pathlib import Path

from pile_fast.cli.common import add_input, add_models, load_ranker, print_left_out, real_number, require, writable_folder
from pile_fast.cli.errors import UserError
from pile_fast.data import BadRows
from pile_fast.data.files import refuse_same_file
from pile_fast.offline.score import Teacher, score_file
from pile_fast.printable import printable

KINDS = ("cross-encoder", "bi-encoder", "features", "bm25")


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "score",
        help="teacher logits from cross-encoders, bi-encoders, feature rankers or BM25, added to a file of queries",
        description="Scores every document of a file with one or more teachers and writes the file with their logits as "
        "Parquet. Teachers that the file has already are kept. To resume after a kill, repeat the command. The "
        "finished file is the same, byte for byte, as without the kill.",
    )
    add_input(parser)
    parser.add_argument(
        "--teacher", metavar="NAME=MODEL[:KIND]", type=_teacher, action="append", required=True, dest="teachers",
        help=f"a folder or a name on the Hugging Face hub, and its kind ({', '.join(KINDS)}) where the model does not tell; "
        "or just bm25; may be given several times",
    )  # fmt: skip
    parser.add_argument("--output", metavar="FILE.parquet", required=True, help="the file to write")
    parser.add_argument("--overwrite", action="store_true", help="replace the logits of teachers that the file has already")
    add_models(parser)
    parser.add_argument("--k1", type=real_number(0), default=1.5, help="BM25: saturation of repeated words (default: 1.5)")
    parser.add_argument("--b", type=real_number(0, 1), default=0.75, help="BM25: discount of long documents (default: 0.75)")
    parser.set_defaults(run=run)


def _teacher(text: str) -> Teacher:
    name, _, model = text.partition("=") if text != "bm25" else ("bm25", "=", "bm25")
    kind = "bm25" if model == "bm25" else None
    base, colon, suffix = model.rpartition(":")
    if colon and suffix in KINDS:
        model, kind = base, suffix
    if not (name and model):
        raise argparse.ArgumentTypeError(f"expected NAME=MODEL, NAME=MODEL:KIND or bm25, got {text!r}")
    return Teacher(name, model, kind)


def run(args: argparse.Namespace) -> int:
    kinds = {teacher.kind for teacher in args.teachers}
    require("score", "pyarrow", "tqdm", *["bm25s"] * ("bm25" in kinds), *["transformers"] * (kinds != {"bm25"}))
    names = [teacher.name for teacher in args.teachers]
    if twice := {name for name in names if names.count(name) > 1}:
        raise UserError(f"--teacher: two are called {twice.pop()!r}")
    if Path(args.output).suffix != ".parquet":
        raise UserError(f"--output {args.output}: expected a name that ends in .parquet")
    from tqdm import tqdm

    from pile_fast.offline.parts import DataSet

    data = DataSet(args.data, format=args.source)  # a missing file shows before models are loaded
    refuse_same_file(Path(args.output), data.files)
    writable_folder(Path(args.output).parent)
    bad_rows = BadRows() if args.skip_bad_rows else None
    _load_models(args)
    settings = {name: getattr(args, name) for name in ("batch_size", "max_length", "device")}
    with tqdm(unit=" documents", disable=None) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done)

        totals = score_file(
            data, args.output, args.teachers, settings, k1=args.k1, b=args.b, overwrite=args.overwrite, bad_rows=bad_rows,
            progress=progress,
        )  # fmt: skip
    if totals.empty:
        print(f"{totals.empty:,} empty documents were not scored: their logits are null.")
    print_left_out(bad_rows)
    teachers = printable(", ".join(totals.teachers))
    print(f"Wrote {printable(args.output)}: {totals.rows:,} queries, {totals.documents:,} documents, {teachers}.")
    return 0


def _load_models(args: argparse.Namespace) -> None:
    for teacher in args.teachers:
        if teacher.kind == "bm25":
            continue
        ranker = load_ranker(teacher.model, kind=teacher.kind, max_length=args.max_length, device=args.device)
        teacher.kind = ranker.kind
        teacher.score = lambda rows, ranker=ranker: [
            scores.tolist() for scores in ranker.score(rows, batch_size=args.batch_size)
        ]
