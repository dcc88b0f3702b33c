"""`RankedLists`: queries with their documents' features, labels and teachers' scores, packed in memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator

import numpy as np
import torch
from torch import Tensor

from pile_fast.data.rows import RowChecker, show


@dataclasses.dataclass(frozen=True, eq=False)
class RankedLists:
    """A data set whose row is a query; a map-style `Dataset` for any PyTorch `DataLoader`.

    Query q owns the documents `cu_seqlens[q] : cu_seqlens[q + 1]`.

    Attributes:
        features: (D, F) float32.
        labels: (D,) float32, larger is better; NaN = unlabelled.
        teacher_logits: (D, M) float32; NaN = this teacher did not score this document. M may be 0.
        cu_seqlens: (Q + 1,) int64.
        query_ids: Q names.
        doc_ids: D names.
        teacher_names: M names.
        parts: Q names: the part of the data a query belongs to ("S1" ..), for `part` and `fold`.
    """

    features: Tensor
    labels: Tensor
    teacher_logits: Tensor
    cu_seqlens: Tensor
    query_ids: tuple[str, ...]
    doc_ids: tuple[str, ...]
    teacher_names: tuple[str, ...]
    parts: tuple[str, ...]

    def __post_init__(self) -> None:
        documents, queries = self.features.shape[0], self.cu_seqlens.shape[0] - 1
        for name, wanted in (
            ("labels", (documents,)),
            ("teacher_logits", (documents, len(self.teacher_names))),
            ("query_ids", (queries,)),
            ("doc_ids", (documents,)),
            ("parts", (queries,)),
        ):
            value = getattr(self, name)
            given = tuple(value.shape) if isinstance(value, Tensor) else (len(value),)
            if given != wanted:
                raise ValueError(f"{name}: expected {wanted}, got {given}")
        if documents != int(self.cu_seqlens[-1]):
            raise ValueError(f"cu_seqlens: expected the last entry to be D = {documents}, got {int(self.cu_seqlens[-1])}")

    @classmethod
    def from_rows(cls, rows: Iterable[dict], *, part: str = "all") -> RankedLists:
        """Rows with features, as `read_rows` gives them, in memory; all of one part.

        Raises:
            ValueError: there are no rows, one has no features, or its labels are not distinct in float32.

        >>> row = {"query_id": "q", "features": [[0.5], [2.0]], "labels": [1, None], "teacher_logits": [[0.3], [None]]}
        >>> RankedLists.from_rows([row]).teacher_logits
        tensor([[0.3000],
                [   nan]])
        """
        check = RowChecker()
        columns: dict[str, list[Tensor]] = {"features": [], "labels": [], "teacher_logits": []}
        names, doc_ids, lengths, teachers = [], [], [0], []
        for row in rows:
            row = check(row)
            if row["features"] is None:
                raise ValueError(f"query {row['query_id']!r}: expected features, the row has none")
            float32_labels(row["query_id"], row["labels"])
            names.append(row["query_id"])
            doc_ids += row["doc_ids"]
            lengths.append(len(doc_ids))
            teachers = row["teachers"]
            for name, parts in columns.items():
                # None becomes NaN
                parts.append(torch.from_numpy(np.array(row[name], dtype=np.float64).astype(np.float32)))
        if not names:
            raise ValueError("expected at least one row")
        return cls(
            **{name: torch.cat(parts) for name, parts in columns.items()},
            cu_seqlens=torch.tensor(lengths),
            query_ids=tuple(names),
            doc_ids=tuple(doc_ids),
            teacher_names=tuple(teachers),
            parts=(part,) * len(names),
        )

    def __len__(self) -> int:
        return len(self.query_ids)

    def __getitem__(self, query: int) -> dict[str, Tensor]:
        """One query: features (n, F), labels (n,), teacher_logits (n, M)."""
        # A bounds check of its own: it is what ends a plain `for row in lists`.
        if not -len(self) <= query < len(self):
            raise IndexError(f"query {query} of {len(self)}")
        start, end = self.cu_seqlens[query % len(self)].item(), self.cu_seqlens[query % len(self) + 1].item()
        return {name: getattr(self, name)[start:end] for name in ("features", "labels", "teacher_logits")}

    def rows(self) -> Iterator[dict]:
        """The queries as rows of the data schema (docs/data.md); NaN becomes None."""
        bounds = self.cu_seqlens.tolist()
        for q, query_id in enumerate(self.query_ids):
            of = slice(bounds[q], bounds[q + 1])
            labels, logits = (
                [None if x != x else x for x in tensor[of].flatten().tolist()] for tensor in (self.labels, self.teacher_logits)
            )
            m = len(self.teacher_names)
            yield {
                "query_id": query_id,
                "features": self.features[of].tolist(),
                "doc_ids": list(self.doc_ids[of]),
                "labels": labels,
                "teacher_logits": [logits[i * m : (i + 1) * m] for i in range(len(labels))],
                "teachers": list(self.teacher_names),
            }

    def select(self, queries: Iterable[int]) -> RankedLists:
        """The given queries, in the given order."""
        queries = list(queries)
        bounds = self.cu_seqlens.tolist()
        documents = [d for q in queries for d in range(bounds[q], bounds[q + 1])]
        lengths = [0, *(bounds[q + 1] - bounds[q] for q in queries)]
        return RankedLists(
            self.features[documents],
            self.labels[documents],
            self.teacher_logits[documents],
            torch.tensor(lengths).cumsum(0),
            tuple(self.query_ids[q] for q in queries),
            tuple(self.doc_ids[d] for d in documents),
            self.teacher_names,
            tuple(self.parts[q] for q in queries),
        )

    def part(self, *names: str) -> RankedLists:
        """The queries of the named parts."""
        if unknown := set(names) - set(self.parts):
            raise ValueError(f"part: expected some of {sorted(set(self.parts))}, got {sorted(unknown)}")
        return self.select(q for q, part in enumerate(self.parts) if part in names)

    def fold(self, number: int) -> tuple[RankedLists, RankedLists, RankedLists]:
        """(train, validation, test) of LETOR's five-fold rotation of the parts S1 .. S5: fold 1 is S1-S3, S4, S5."""
        if number not in range(1, 6):
            raise ValueError(f"fold: expected 1 to 5, got {number}")
        s = [f"S{(number - 1 + i) % 5 + 1}" for i in range(5)]
        return self.part(*s[:3]), self.part(s[3]), self.part(s[4])

    def with_teachers(self, teacher_logits: Tensor, names: Iterable[str]) -> RankedLists:
        """The same lists with other teachers, (D, M) or (D,): an ensemble's logits, for instance."""
        if teacher_logits.dim() == 1:
            teacher_logits = teacher_logits[:, None]
        return dataclasses.replace(self, teacher_logits=teacher_logits.to(torch.float32), teacher_names=tuple(names))


def float32_labels(query_id: str, labels: Iterable[float | None]) -> None:
    """Refuses labels of a query that differ, and would tie in float32.

    Raises:
        ValueError: two labels do.
    """
    distinct = sorted({label for label in labels if label is not None})
    rounded = np.array(distinct, dtype=np.float32)
    if (ties := np.flatnonzero(rounded[1:] == rounded[:-1])).size:
        low, high = distinct[ties[0]], distinct[ties[0] + 1]
        raise ValueError(f"query {query_id!r}: labels {show(low)} and {show(high)} are one number in float32")
