"""From a trainer's columns to ranked lists: which column holds the query, the documents, the teachers' logits, the labels.

sentence-transformers hands a loss the columns of a batch by their order, without their names, and the labels apart. Two kinds
of rows are told from each other by the second column, lists of texts or a text. Nothing here needs the library.
"""

from __future__ import annotations

import dataclasses
import numbers
import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

# In this order the library looks for the column of labels.
LABEL_COLUMNS = ("label", "labels", "score", "scores")
_QUERIES = {"query", "question", "anchor"}
_IDENTIFIERS = re.compile(r"(.*_)?(id|ids|idx)")
_LISTS = (list, tuple, np.ndarray, Tensor)


@dataclasses.dataclass(frozen=True)
class Names:
    """Names of a batch's columns: per input, and for the labels, those that it may have."""

    inputs: tuple[tuple[str, ...], ...]
    label: tuple[str, ...]

    @classmethod
    def of(cls, datasets: Iterable[Sequence[str]], inputs: int, labels: bool) -> Names:
        """From the data sets' columns, of which the batch's have `inputs` and perhaps labels."""
        found: list[list[str]] = []
        found_labels: list[str] = []
        for columns in datasets:
            label = next((name for name in LABEL_COLUMNS if name in columns), None)
            names = [name for name in columns if name != label]
            if len(names) == inputs and (label is not None) == labels:
                found.append(names)
                found_labels += [label] if label else []
        by_input = tuple(tuple(dict.fromkeys(names)) for names in zip(*found, strict=True)) or ((),) * inputs
        return cls(by_input, tuple(dict.fromkeys(found_labels)))

    def at(self, index: int) -> str:
        """How an error calls an input column, counted from 0."""
        names = self.inputs[index]
        return f"column {' or '.join(map(repr, names))}" if names else f"column {index + 1}"

    @property
    def known(self) -> bool:
        return all(self.inputs)

    @property
    def labels(self) -> str:
        return f"column {' or '.join(map(repr, self.label))}" if self.label else "the labels"

    @property
    def scores(self) -> bool:
        """Whether the labels' column is called as teachers' logits may be."""
        return bool({"score", "scores"} & set(self.label))


@dataclasses.dataclass(frozen=True)
class RankedBatch:
    """Q queries with D documents in all, as a loss takes them.

    Attributes:
        lengths: documents per query.
        teachers: (D, M) float32, NaN = did not score; None = there are none.
        labels: (D,), NaN = unlabelled; None = there are none.
        reading: how each column was read, in words.
        told: whether the user should see that: a trainer's columns, or a reading that was a choice.
    """

    lengths: list[int]
    teachers: Tensor | None
    labels: Tensor | None
    reading: str
    told: bool


def read_lists(inputs: Sequence[Sequence], labels: Any, alpha: float, names: Names) -> tuple[list[list], RankedBatch]:
    """(the documents of each query, what the loss needs) of columns of queries, documents, and teachers' logits.

    Args:
        inputs: the columns: queries; lists of documents, or several columns of one document each; teachers' logits.
        labels: per query (n,) or (n, 1 + M), or None.
        alpha: of the loss, which needs teachers at alpha > 0 and labels at alpha < 1.
        names: the columns'.

    Raises:
        ValueError: a column does not fit; the message names it and the row.
    """
    if len(inputs) < 2:
        raise ValueError(f"inputs: expected queries, documents and teachers' logits, got {len(inputs)} column(s)")
    kinds = [_kind(column) for column in inputs]
    texts = _documents_in_columns(kinds, names)
    check_names(names, texts > 1)
    queries = inputs[0]
    for row, query in enumerate(queries):
        if not _is_text(query):
            at = f"{names.at(0)}, query {row} of the batch"
            raise ValueError(f"query: expected a text in the first column, got {_called(query)} ({at})")
    if texts > 1:
        columns, documents = inputs[1 + texts :], [list(row) for row in zip(*inputs[1 : 1 + texts], strict=True)]
    else:
        columns, documents = inputs[2:], [_as_list(row) for row in inputs[1]]
    for row, own in enumerate(documents):
        at = f"{names.at(1)}, query {row} of the batch"
        if not isinstance(own, list):
            raise ValueError(f"documents: expected a list of texts, got {_called(own)} ({at})")
        for number, document in enumerate(own):
            if not _is_text(document):
                at = f"{names.at(1 + number if texts > 1 else 1)}, query {row} of the batch"
                raise ValueError(f"documents: expected texts, got {_called(document)} for document {number} ({at})")
    lengths = [len(own) for own in documents]
    if not sum(lengths):
        raise ValueError("inputs: expected at least one document in a batch, got none")
    teachers = _flatten_columns(columns, lengths, queries, names, 1 + texts) if columns else None
    return documents, _with_labels(lengths, teachers, labels, alpha, names, texts)


def read_tuples(queries: int, documents: int, labels: Tensor | None, alpha: float, names: Names) -> RankedBatch:
    """The same of columns of one document each that are read already, with labels (Q, n) or (Q, n, 1 + M) or None."""
    check_names(names, True)
    return _with_labels([documents] * queries, None, labels, alpha, names, documents)


def without_null(labels: list, column: str, equal_rows: bool) -> list:
    """A batch's labels with NaN for None, as lists that a tensor can be made of.

    Args:
        labels: per row a number, a list, or a list of lists. A row's None is a NaN of its own, of no shape; with `equal_rows`,
            of the other rows' shape.
        column: their name.

    Raises:
        ValueError: a row has a text, or numbers of documents that differ; the message names it.
    """
    rows = [_fill(value, f"column {column!r}, row {row} of the batch") for row, value in enumerate(labels)]
    lists = [value for value in rows if isinstance(value, _LISTS)]
    if not lists and any(value is not None for value in labels):
        return labels  # single numbers, another loss's
    if not lists:
        return rows if equal_rows else [np.array(value) for value in rows]
    blank = (np.asarray(lists[0], dtype=float) * np.nan).tolist() if equal_rows else np.array(np.nan)
    return [value if isinstance(value, _LISTS) else blank for value in rows]


def _fill(value: Any, at: str) -> Any:
    if value is None:
        return np.nan
    if isinstance(value, (str, bytes)):
        raise ValueError(f"labels: expected numbers or null, got {value!r} ({at})")
    if not isinstance(value, (list, tuple)):
        return value
    widths = {len(item) for item in value if isinstance(item, _LISTS)}
    if len(widths) > 1 or widths and any(not isinstance(item, _LISTS) and item is not None for item in value):
        raise ValueError(f"labels: expected equally many numbers for every document ({at})")
    return [[np.nan] * min(widths) if item is None and widths else _fill(item, at) for item in value]


def is_list_of_texts_or_numbers(value: Any) -> bool:
    return isinstance(value, _LISTS) and _kind([value]) is not None and not any(isinstance(item, dict) for item in value)


def check_names(names: Names, tuples: bool) -> None:
    """Raise ValueError for columns whose names do not fit how they would be read."""
    for index, own in enumerate(names.inputs):
        if identifiers := [name for name in own if _IDENTIFIERS.fullmatch(name)]:
            raise ValueError(
                f"{names.at(index)}: looks like identifiers, but would be taken for texts or logits; remove it with "
                f"dataset.remove_columns({identifiers[0]!r})"
            )
        if {"label", "labels"} & set(own):
            raise ValueError(f"{names.labels} and {names.at(index)}: which of them holds the labels? Keep or rename one")
        if tuples and index and _QUERIES & set(own) and not _QUERIES & set(names.inputs[0]):
            raise ValueError(
                f"query: expected in the first column, got {names.at(0)} there and {names.at(index)} as a document; order "
                "the columns with dataset.select_columns"
            )


def _documents_in_columns(kinds: list[str | None], names: Names) -> int:
    """How many columns of a document each there are; 1 stands for one column of lists."""
    if kinds[1] == "numbers":
        raise ValueError(f"documents: expected a list of texts in the second column, got numbers ({names.at(1)})")
    if kinds[1] != "text":
        return 1
    texts = next((i for i, kind in enumerate(kinds[1:]) if kind != "text"), len(kinds) - 1)
    lists = [index for index, kind in enumerate(kinds) if kind == "texts"]
    if texts > 1 and not lists and "text" not in kinds[1 + texts :]:
        return texts
    message = f"documents: expected a list of texts, got a string ({names.at(1)})"
    if lists:
        message += f"; {names.at(lists[0])} has lists of texts: order the columns query, documents, teachers' logits, no others"
    elif texts > 1:
        message += f"; with a text per column, teachers' logits come after the last text, not before {_last(kinds, names)}"
    else:
        message += "; with a text per column, at least two documents"
    raise ValueError(message)


def _last(kinds: list[str | None], names: Names) -> str:
    return names.at(max(index for index, kind in enumerate(kinds) if kind == "text"))


def _kind(column: Sequence) -> str | None:
    """What a column holds: "text", "texts" (lists of them), "numbers" (or lists of them); None for nothing at all."""
    for value in column:
        if isinstance(value, _LISTS):
            item = next((item for item in value if item is not None), None)
            if item is not None:
                return "texts" if _is_text(item) else "numbers"
        elif value is not None:
            return "text" if _is_text(value) else "numbers"
    return None


def _is_text(value: Any) -> bool:
    """Whether a model may take it for a text: whatever is no number and no list, for models of images and the like."""
    return value is not None and not isinstance(value, (*_LISTS, numbers.Number, np.generic)) or isinstance(value, str)


def _as_list(value: Any) -> Any:
    return list(value) if isinstance(value, _LISTS) else value


def _called(value: Any) -> str:
    if value is None:
        return "None"
    if isinstance(value, str):
        return "a string"
    kinds = ((_LISTS, "a list"), (dict, "a dict"), ((numbers.Number, np.generic), "a number"))
    return next((name for kind, name in kinds if isinstance(value, kind)), f"a {type(value).__name__}")


def _flatten_columns(columns: Sequence[Sequence], lengths: list[int], queries: Sequence, names: Names, first: int) -> Tensor:
    """Teachers' logits of all documents (D, M), float32, NaN for None."""
    flat = []
    for index, column in enumerate(columns, first):
        rows: list[np.ndarray | None] = []
        for row, (n, values) in enumerate(zip(lengths, column, strict=True)):
            try:
                rows.append(None if values is None else _matrix(values, n))
            except ValueError as error:
                at = f"{names.at(index)}, query {row} of the batch"
                raise ValueError(f"{at}: {error} (query {_shown(queries[row])})") from None
        widths = {matrix.shape[1] for matrix in rows if matrix is not None and len(matrix)}
        if len(widths) > 1:
            raise ValueError(f"{names.at(index)}: expected the same number of teachers for every query, got {sorted(widths)}")
        # A query's None: none of them scored a document of it.
        blank = np.full((max(lengths), *(widths or {1})), np.nan, np.float32)
        flat.append(np.concatenate([blank[:n] if own is None or not n else own for own, n in zip(rows, lengths, strict=True)]))
    return torch.from_numpy(np.concatenate(flat, 1))


def _matrix(values: Any, n: int) -> np.ndarray:
    """A query's logits (n, M), float32, NaN for None."""
    if isinstance(values, Tensor):
        values = values.tolist()
    if isinstance(values, (list, tuple)):
        values = [value.tolist() if isinstance(value, Tensor) else value for value in values]
        widths = {len(value) for value in values if isinstance(value, _LISTS)}
        if len(widths) == 1:  # a document's None: no teacher scored it
            values = [[None] * min(widths) if value is None else value for value in values]
        elif widths:
            counts = [len(value) if isinstance(value, _LISTS) else 1 for value in values]
            other = next(i for i, count in enumerate(counts) if count != counts[0])
            found = f"document 0 has {counts[0]}, document {other} has {counts[other]}"
            raise ValueError(f"expected teachers' logits, as many for every document; {found}")
    try:
        matrix = np.asarray(values)
        if matrix.dtype.kind not in "fiubO":
            raise TypeError(f"got {matrix.dtype.type.__name__}")
        for value in matrix.flat if matrix.dtype.kind == "O" else ():
            if value is not None and not isinstance(value, numbers.Real):
                raise TypeError(f"got {value!r}")
        with np.errstate(over="ignore"):  # infinite, and told of as such
            matrix = matrix.astype(np.float32)  # None becomes NaN
    except (TypeError, ValueError) as error:
        raise ValueError(f"expected teachers' logits, n or n × M numbers or None; {error}") from None
    if matrix.ndim not in (1, 2) or len(matrix) != n:
        turned = ": the documents' dimension comes first" if matrix.ndim == 2 and matrix.shape[1] == n else ""
        raise ValueError(f"expected teachers' logits ({n},) or ({n}, M), got {matrix.shape}{turned}")
    return matrix.reshape(n, -1) if n else np.empty((0, 0), np.float32)


def _with_labels(
    lengths: list[int], teachers: Tensor | None, labels: Any, alpha: float, names: Names, texts: int
) -> RankedBatch:
    """Add the labels, which may bring the teachers with them.

    Lists: labels (n,), or (n, 1 + M), label first. A text per column: the same, but that (n,) without columns of teachers is
    what one teacher says, as in the library's own distillation losses, unless alpha = 0; the labels then are 1, 0, ..., 0.
    """
    places = [f"{names.at(i)}" for i in range(len(names.inputs))]
    documents = f"documents: {places[1]}" if texts == 1 else f"documents: {places[1]} to {places[texts]}"
    reading, certain = f"query: {places[0]}, {documents}", True
    if teachers is not None:
        reading += f", teachers: {teachers.shape[1]} in {' and '.join(places[1 + texts :])}"
    own = None if labels is None else _per_query(labels, lengths, teachers is not None, names, texts)
    flat = None if own is None else torch.cat([values for values, n in zip(own, lengths, strict=True) if n])
    implied = texts > 1
    if flat is not None and flat.dim() == 2:
        if names.scores:
            raise ValueError(
                f"{names.labels}: was taken for the labels, by its name, and holds {flat.shape[1]} numbers per document; call "
                "it 'teachers' if these are teachers' logits, 'labels' if the first of them is the label"
            )
        flat, teachers = flat[:, 0], flat[:, 1:].float()
        reading += f", labels: the first number per document of {names.labels}, teachers: the other {teachers.shape[1]}"
        implied = False
    elif flat is not None and implied and teachers is None and alpha > 0:
        teachers, flat = flat.float().unsqueeze(1), None
        reading += f", teachers: one in {names.labels}"
    elif flat is not None:
        reading += f", labels: {names.labels}"
        certain, implied = not names.scores, False
    if flat is None and implied:
        flat = torch.cat([(torch.arange(n) == 0).float() for n in lengths])
        reading += f", labels: 1 for {places[1]}, 0 for the other documents"
        certain = False
    if flat is not None and flat.is_floating_point() and bool((infinite := flat.isinf()).any()):
        row = int(torch.repeat_interleave(torch.tensor(lengths))[int(infinite.nonzero()[0, 0])])
        raise ValueError(f"labels: expected finite numbers or NaN, got {flat[infinite][0].item()} for query {row} of the batch")
    if teachers is None:
        if alpha > 0:
            raise ValueError(
                "labels: expected (n, 1 + M), label and teachers' logits, or further columns of teachers' logits, or alpha=0; "
                f"got no teacher at alpha={alpha:g}. Taken were {reading}; a column named {', '.join(LABEL_COLUMNS)} is taken "
                "for the labels, so name the teachers' one 'teachers'"
            )
        reading, certain = reading + ", no teachers", False
    if flat is None:
        if alpha < 1:
            raise ValueError(
                f"labels: expected a column named {', '.join(LABEL_COLUMNS)} (null or NaN = unlabelled), or alpha=1, got none "
                f"at alpha={alpha:g}. Taken were {reading}"
            )
        reading, certain = reading + ", no labels", False
    return RankedBatch(lengths, teachers, flat, reading, names.known or not certain)


def _per_query(labels: Any, lengths: list[int], columns: bool, names: Names, texts: int) -> list[Tensor]:
    """Each query's labels, (n,) or (n, 1 + M); reads shapes only, and the single numbers."""
    if texts > 1:
        wanted = "(n,), a number per document"
    elif columns:
        wanted = "(n,) beside columns of teachers' logits"
    else:
        wanted = "(n,), or (n, 1 + M) with the teachers' logits"
    given = [torch.as_tensor(_fill(own, f"{names.labels}, query {row} of the batch")) for row, own in enumerate(labels)]
    if len(given) != len(lengths):
        raise ValueError(f"labels: expected an entry per query, {len(lengths)}, got {len(given)}")
    for row, (n, own) in enumerate(zip(lengths, given, strict=True)):
        if own.dim() == 0:
            if not own.isnan():
                raise ValueError(f"labels: expected per query {wanted}; got one number per query ({names.labels})")
            continue
        if len(own) != n:
            hint = ", what a teacher says of it, not of differences" if texts > 1 and len(own) == n - 1 else ""
            raise ValueError(
                f"labels: expected {n}, one per document{hint}, for query {row} of the batch, got {len(own)} ({names.labels})"
            )
        if n and (own.dim() > 2 or own.dim() == 2 and (columns or own.shape[1] < 2)):
            raise ValueError(f"labels: expected {wanted}; query {row} of the batch has {tuple(own.shape)} ({names.labels})")
    shapes = {own.shape[1:] for n, own in zip(lengths, given, strict=True) if n and own.dim()}
    if len(shapes) > 1:
        found = sorted(shape[0] - 1 if shape else 0 for shape in shapes)
        raise ValueError(f"labels: expected the same number of teachers for every query, got {found} ({names.labels})")
    # A query's null: all of it is unlabelled, and no teacher scored it.
    shape = next(iter(shapes), torch.Size())
    return [
        torch.full((n, *shape), torch.nan, dtype=torch.float64, device=own.device) if own.dim() == 0 else own
        for n, own in zip(lengths, given, strict=True)
    ]


def _shown(query: Any) -> str:
    text = repr(query)
    return text if len(text) <= 60 else text[:57] + "..."
