"""``pile-fast score``: teacher logits from cross-encoders, bi-encoders, feature rankers and BM25, added to a file."""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import pile_fast
from pile_fast.cli.common import add_input, add_models, load_ranker, print_left_out, real_number, require, writable_folder
from pile_fast.cli.errors import UserError
from pile_fast.data import BadRows, fingerprint, read_rows
from pile_fast.data.files import refuse_same_file
from pile_fast.data.rows import groups, reject
from pile_fast.offline.resumable import ResumableOutput
from pile_fast.printable import printable
from pile_fast.teachers import BM25

KINDS = ("cross-encoder", "bi-encoder", "features", "bm25")
# A kill costs at most about so many documents' work.
DOCUMENTS_PER_PART = 1024


@dataclasses.dataclass
class Teacher:
    """A scorer and the name of its column.

    Attributes:
        score: rows, none of whose documents is empty → a sequence of logits per row.
    """

    name: str
    model: str
    kind: str | None
    score: Callable[[list[dict]], list] = dataclasses.field(init=False)  # once it is loaded

    def check(self, row: dict) -> None:
        """Raises ValueError if the row lacks what the teacher reads."""
        needed = ("features",) if self.kind == "features" else ("query", "documents")
        for column in needed:
            if row[column] is None or (column == "query" and not row["query"].strip()):
                raise ValueError(f"query {row['query_id']!r}: no {column}, which teacher {self.name!r} ({self.kind}) reads")

    def reads(self, row: dict) -> list[int]:
        """The documents that it scores: all but those without a text to read."""
        every = range(len(row["doc_ids"]))
        return list(every) if self.kind == "features" else [i for i in every if row["documents"][i].strip()]


@dataclasses.dataclass
class Totals:
    """What the first reading of the file found."""

    rows: int
    documents: int
    empty: int
    teachers: list[str]


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
    from pile_fast.offline.parts import DataSet

    data = DataSet(args.data, format=args.source)  # a missing file shows before models are loaded
    refuse_same_file(Path(args.output), data.files)
    args.files, args.source = data.files, data.format
    writable_folder(Path(args.output).parent)
    bad_rows = BadRows() if args.skip_bad_rows else None
    _load_models(args)
    settings = _settings(args)
    totals = _look_through(args, bad_rows)
    with ResumableOutput(args.output, settings) as output:
        _write_parts(output, args, totals)
        if fingerprint(*args.files) != settings["data"]:
            output.discard()
            raise UserError(f"{args.data}: changed while it was read, so nothing was written; run it again")
        output.finish()
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


def _look_through(args: argparse.Namespace, bad_rows: BadRows | None) -> Totals:
    """Read the whole file before the work begins: a broken row shows now, not after hours; BM25 gets its collection."""
    totals = Totals(0, 0, 0, [])
    collection: dict[str, None] = {}  # in the order they come
    lexical = [teacher for teacher in args.teachers if teacher.kind == "bm25"]
    for row in _rows(args, bad_rows):
        totals.rows += 1
        totals.documents += len(row["doc_ids"])
        totals.empty += len(row["doc_ids"]) - min(len(teacher.reads(row)) for teacher in args.teachers)
        totals.teachers = row["teachers"]
        if lexical:
            collection |= dict.fromkeys(row["documents"][i] for i in lexical[0].reads(row))
    if not totals.rows:
        raise UserError(f"{args.data}: no rows are left")
    taken = [teacher.name for teacher in args.teachers if teacher.name in totals.teachers]
    if taken and not args.overwrite:
        raise UserError(f"{args.data} has teacher {taken[0]!r} already: choose another name, or --overwrite it")
    totals.teachers = list(dict.fromkeys([*totals.teachers, *(teacher.name for teacher in args.teachers)]))
    if lexical:
        bm25 = BM25(collection, k1=args.k1, b=args.b)
        for teacher in lexical:
            teacher.score = lambda rows: [bm25.score(row["query"], row["documents"]).tolist() for row in rows]
    return totals


def _rows(args: argparse.Namespace, bad_rows: BadRows | None = None) -> Iterator[dict]:
    """The rows that the teachers can score."""
    if args.skip_bad_rows and bad_rows is None:
        bad_rows = BadRows()
    for row in read_rows(args.files, format=args.source, bad_rows=bad_rows):
        try:
            for teacher in args.teachers:
                teacher.check(row)
        except ValueError as error:
            reject(bad_rows, args.data, error)
            continue
        yield row


def _settings(args: argparse.Namespace) -> dict:
    """All that decides what is written: a run goes on only where these are the same."""

    def files(teacher: Teacher) -> list:
        """A model's files; of one from the hub there is only the name."""
        inside = Path(teacher.model).rglob("*") if teacher.kind != "bm25" else ()
        return fingerprint(*sorted(path for path in inside if path.is_file()))

    return {
        "data": fingerprint(*args.files),
        "teachers": [[teacher.name, teacher.model, teacher.kind, files(teacher)] for teacher in args.teachers],
        **{name: getattr(args, name) for name in ("source", "batch_size", "max_length", "device", "k1", "b", "skip_bad_rows")},
        "documents_per_part": DOCUMENTS_PER_PART,
        "pile_fast": pile_fast.__version__,
    }


def _write_parts(output: ResumableOutput, args: argparse.Namespace, totals: Totals) -> None:
    from tqdm import tqdm

    with tqdm(total=totals.documents, unit=" documents", disable=None) as bar:
        for number, rows in enumerate(groups(_rows(args), DOCUMENTS_PER_PART)):
            if number not in output.done:
                output.write(number, _score(rows, args.teachers))
            bar.update(sum(len(row["doc_ids"]) for row in rows))


def _score(rows: list[dict], teachers: list[Teacher]) -> list[dict]:
    """The rows with the teachers' logits."""
    scored = [
        row | {"teachers": list(row["teachers"]), "teacher_logits": list(map(list, row["teacher_logits"]))} for row in rows
    ]
    for teacher in teachers:
        read = [(row, places) for row in scored if (places := teacher.reads(row))]
        logits = teacher.score([_only(row, places) for row, places in read])
        columns = {}
        for (row, places), values in zip(read, logits, strict=True):
            columns[row["query_id"]] = dict(zip(places, values, strict=True))
        for row in scored:
            column = columns.get(row["query_id"], {})
            if not all(map(math.isfinite, column.values())):
                raise ValueError(f"teacher {teacher.name!r}: a logit of query {row['query_id']!r} is not finite")
            _set_column(row, teacher.name, [column.get(i) for i in range(len(row["doc_ids"]))])
    return scored


def _only(row: dict, places: list[int]) -> dict:
    """What a teacher reads of a row: some of its documents, and neither labels nor logits."""
    chosen = {name: row[name] and [row[name][i] for i in places] for name in ("documents", "features")}
    return {"query_id": row["query_id"], "query": row["query"], **chosen}


def _set_column(row: dict, name: str, logits: list[float | None]) -> None:
    """A known teacher's logits take the place of its old ones, a new teacher's come last."""
    known = name in row["teachers"]
    column = row["teachers"].index(name) if known else len(row["teachers"])
    for values, logit in zip(row["teacher_logits"], logits, strict=True):
        values[column : column + 1] = [logit]
    if not known:
        row["teachers"].append(name)
