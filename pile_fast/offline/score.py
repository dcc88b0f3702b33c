"""Teachers' logits added to the rows of a data set of any size."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pile_fast
from pile_fast.data.files import fingerprint
from pile_fast.data.formats import read_rows
from pile_fast.data.rows import BadRows, groups, reject
from pile_fast.offline.resumable import ResumableOutput
from pile_fast.teachers import BM25

if TYPE_CHECKING:
    from pile_fast.offline.parts import DataSet

# A kill costs at most about so many documents' work.
DOCUMENTS_PER_PART = 1024


@dataclasses.dataclass
class Teacher:
    """A scorer and the name of its column.

    Attributes:
        model: a folder, or a name on the Hugging Face hub; "bm25".
        kind: a `pile_fast.students.KINDS`, or "bm25".
        score: rows, none of whose documents is empty → a sequence of logits per row. That of BM25 is made of the file.
    """

    name: str
    model: str
    kind: str | None
    score: Callable[[list[dict]], list] = dataclasses.field(init=False)

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

    def files(self) -> list:
        """The fingerprint of the model's files; of one from the hub there is only the name."""
        inside = Path(self.model).rglob("*") if self.kind != "bm25" else ()
        return fingerprint(*sorted(path for path in inside if path.is_file()))


@dataclasses.dataclass
class Totals:
    """What the first reading of the file found: among the documents, those `empty` to some teacher."""

    rows: int = 0
    documents: int = 0
    empty: int = 0
    teachers: list[str] = dataclasses.field(default_factory=list)


def score_file(
    data: DataSet, output: str | os.PathLike, teachers: Sequence[Teacher], settings: dict, *, k1: float = 1.5, b: float = 0.75,
    overwrite: bool = False, bad_rows: BadRows | None = None, progress: Callable[[int, int], None] = lambda done, total: None,
) -> Totals:  # fmt: skip
    """Write the rows with the teachers' logits as Parquet. It resumes after a kill, see `ResumableOutput`.

    Args:
        data: the rows.
        output: the file to write.
        teachers: scorers; those that the rows have already are kept.
        settings: what else decides the result, as JSON: how the models run.
        k1, b: BM25's.
        overwrite: replace the logits of teachers that the rows have already.
        bad_rows: counts broken rows and those that a teacher cannot read, which are left out; None = the first one raises.
        progress: called with the number of documents done since the last call, and that of all.

    Raises:
        ValueError: a row is broken or lacks what a teacher reads, a teacher is there already, a logit is not finite, the output
            was begun with other settings, or the data changed while it was read.
        OSError: a file cannot be read or written.
    """
    before = data.fingerprint()
    totals = _look_through(data, teachers, bad_rows, overwrite, k1, b)
    settings = {
        **settings, "data": before, "format": data.format, "k1": k1, "b": b, "skip_bad_rows": bad_rows is not None,
        "teachers": [[teacher.name, teacher.model, teacher.kind, teacher.files()] for teacher in teachers],
        "documents_per_part": DOCUMENTS_PER_PART, "pile_fast": pile_fast.__version__,
    }  # fmt: skip
    with ResumableOutput(output, settings) as out:
        rows = _readable(data, teachers, None if bad_rows is None else BadRows())
        for number, part in enumerate(groups(rows, DOCUMENTS_PER_PART)):
            if number not in out.done:
                out.write(number, _score(part, teachers))
            progress(sum(len(row["doc_ids"]) for row in part), totals.documents)
        if data.fingerprint() != before:
            out.discard()
            raise ValueError(f"{data.name}: changed while it was read, so nothing was written; run it again")
        out.finish()
    return totals


def _look_through(
    data: DataSet, teachers: Sequence[Teacher], bad_rows: BadRows | None, overwrite: bool, k1: float, b: float
) -> Totals:
    """Read the whole file before the work begins: a broken row shows now, not after hours; BM25 gets its collection."""
    totals = Totals()
    collection: dict[str, None] = {}  # in the order they come
    lexical = [teacher for teacher in teachers if teacher.kind == "bm25"]
    for row in _readable(data, teachers, bad_rows):
        totals.rows += 1
        totals.documents += len(row["doc_ids"])
        totals.empty += len(row["doc_ids"]) - min(len(teacher.reads(row)) for teacher in teachers)
        totals.teachers = row["teachers"]
        if lexical:
            collection |= dict.fromkeys(row["documents"][i] for i in lexical[0].reads(row))
    if not totals.rows:
        raise ValueError(f"{data.name}: no rows are left")
    taken = [teacher.name for teacher in teachers if teacher.name in totals.teachers]
    if taken and not overwrite:
        raise ValueError(f"{data.name} has teacher {taken[0]!r} already: choose another name, or --overwrite it")
    totals.teachers = list(dict.fromkeys([*totals.teachers, *(teacher.name for teacher in teachers)]))
    if lexical:
        bm25 = BM25(collection, k1=k1, b=b)
        for teacher in lexical:
            teacher.score = lambda rows: [bm25.score(row["query"], row["documents"]).tolist() for row in rows]
    return totals


def _readable(data: DataSet, teachers: Sequence[Teacher], bad_rows: BadRows | None) -> Iterator[dict]:
    """The rows that the teachers can score."""
    for row in read_rows(data.files, format=data.format, bad_rows=bad_rows):
        try:
            for teacher in teachers:
                teacher.check(row)
        except ValueError as error:
            reject(bad_rows, data.name, error)
            continue
        yield row


def _score(rows: list[dict], teachers: Sequence[Teacher]) -> list[dict]:
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
