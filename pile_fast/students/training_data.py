"""What `PileTrainer` can know of its data sets before the first step: by their first rows, for those that have a length."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pile_fast.data.collator import RankingTargets, order_of_teachers, pack_targets, queries_of
from pile_fast.data.lists import RankedLists

# Rows at a time, where teachers and labels are read before training.
_ROWS = 256
# Beside the metrics, of every evaluation.
_MEASURED = {"loss", "runtime", "samples_per_second", "steps_per_second", "model_preparation_time"}


class NamedLists(torch.utils.data.Dataset):
    """`RankedLists` whose rows also hold the names of the query and of the teachers."""

    def __init__(self, lists: RankedLists):
        self.lists = lists

    def __len__(self) -> int:
        return len(self.lists)

    def __getitem__(self, query: int) -> dict[str, Any]:
        names = {"query_id": self.lists.query_ids[query], "teachers": self.lists.teacher_names}
        return {**self.lists[query], **names}


def check_data(
    train: Any, evaluation: Any, collator: Any, *, needs_teachers: bool, needs_labels: bool, best_metric: str | None,
    metrics: set[str] | None,
) -> None:  # fmt: skip
    """Find what does not fit, before anything is computed.

    Args:
        train: the training set; of one without a length nothing is known before it is read.
        evaluation: None, a data set, or a dict of them by name.
        collator: from rows to a batch; what a foreign one makes is not looked at.
        needs_teachers, needs_labels: whether the loss cannot be without them.
        best_metric: the name of the metric that chooses the best model, if it is used.
        metrics: the names that an evaluation computes; None = not known.

    Raises:
        ValueError: an empty set; a first row that the collator refuses; no teachers or no labels to learn from; rows of
            evaluation that differ from those of training in their features or teachers; a `best_metric` that
            no evaluation computes.
    """
    sets = evaluation if isinstance(evaluation, dict) else {"": evaluation}
    trained = _first_batch(train, collator, "train_dataset")
    if trained is not None:
        targets = trained["labels"]
        if needs_teachers and not targets["teacher_logits"].shape[1]:
            raise ValueError(
                f"teacher_logits: expected at least one teacher in the training rows, got none for query {_query(targets)}; "
                "alpha=0 learns from the labels alone"
            )
        if needs_labels and not _has_labels(train):
            raise ValueError("labels: with alpha=0 they are all there is to learn from, and no training row has any")
    with_loss = True
    for name, dataset in sets.items():
        evaluated = _first_batch(dataset, collator, f"eval_dataset{f' {name!r}' if name else ''}")
        if evaluated is None:
            continue
        with_loss = with_loss and bool(not needs_teachers or evaluated["labels"]["teacher_logits"].shape[1])
        if trained is not None:
            _check_alike(trained, evaluated)
    if best_metric is None or metrics is None or not any(dataset is not None for dataset in sets.values()):
        return
    known = {f"{name}_{metric}" if name else metric for name in sets for metric in metrics | _MEASURED}
    if best_metric.removeprefix("eval_") not in known:
        raise ValueError(f"metric_for_best_model: expected one of {', '.join(sorted(metrics | {'loss'}))}, got {best_metric!r}")
    if not with_loss and best_metric.endswith("loss"):
        raise ValueError(
            f"metric_for_best_model: {best_metric!r} needs teachers in the rows of evaluation, which have none; choose one of "
            f"{', '.join(sorted(metrics))}"
        )


def _first_batch(dataset: Any, collator: Any, called: str) -> Mapping[str, Any] | None:
    """The first row of a data set with a length as a batch of `RankingTargets`; None where that cannot be had."""
    if not _has_first_row(dataset):
        return None
    if len(dataset) == 0:
        raise ValueError(f"{called}: no rows")
    batch = collator([dataset[0]])
    return batch if isinstance(batch, Mapping) and isinstance(batch.get("labels"), RankingTargets) else None


def labelled_targets(dataset: Any, collator: Any) -> Iterator[tuple[int, Any]]:
    """Teachers and labels of a data set that is no stream, without its texts and features: (rows, their targets) in turn.

    None for rows of which none has labels. Rows without `teacher_logits` are for a collator of the user's to read.

    Raises:
        ValueError: a row is broken; the message names the query.
    """
    if isinstance(dataset, NamedLists):
        lists = dataset.lists
        targets = RankingTargets(
            labels=lists.labels, teacher_logits=lists.teacher_logits, cu_seqlens=lists.cu_seqlens, queries=lists.query_ids,
            teachers=list(lists.teacher_names), infinite=None,
        )  # fmt: skip
        yield len(lists), targets
        return
    plain = isinstance(first := dataset[0], Mapping) and first.get("teacher_logits") is not None
    for start in range(0, len(dataset), _ROWS):
        count = min(_ROWS, len(dataset) - start)
        if not plain:
            yield count, collator([dataset[i] for i in range(start, start + count)]).get("labels")
            continue
        rows = [row for row in _rows_of(dataset, start, start + count) if row.get("labels") is not None]
        yield count, pack_targets(rows) if rows else None


def _rows_of(dataset: Any, start: int, end: int) -> Sequence[dict[str, Any]]:
    """Some rows; of a `datasets.Dataset` without a transform of the user's only the columns that are needed."""
    form = getattr(dataset, "format", None)
    names = getattr(dataset, "column_names", None)
    if isinstance(form, Mapping) and isinstance(names, list) and form.get("type") != "custom":
        wanted = [name for name in ("query_id", "labels", "teacher_logits", "teachers") if name in names]
        columns = dataset.with_format(None).select_columns(wanted)[start:end]
        return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    return [dataset[i] for i in range(start, end)]


def is_stream(dataset: Any) -> bool:
    """Whether its rows come one after the other, once a pass."""
    return not _has_first_row(dataset)


def _has_first_row(dataset: Any) -> bool:
    streams = isinstance(dataset, torch.utils.data.IterableDataset)
    return not streams and hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")


def teachers_of(dataset: Any) -> list[str] | None:
    """The names of the teachers in the first row of a data set with a length, if there are any."""
    if not _has_first_row(dataset) or len(dataset) == 0 or not isinstance(row := dataset[0], Mapping):
        return None
    return None if row.get("teachers") is None else [str(name) for name in row["teachers"]]


def _check_alike(trained: Mapping[str, Any], evaluated: Mapping[str, Any]) -> None:
    of = f"query {_query(evaluated['labels'])} of the evaluation rows"
    if isinstance(trained.get("features"), Tensor):
        wanted, given = trained["features"].shape[1], evaluated["features"].shape[1]
        if wanted != given:
            raise ValueError(f"{of}: features: expected {wanted} per document as in the training rows, got {given}")
    wanted, given = (batch["labels"]["teacher_logits"].shape[1] for batch in (trained, evaluated))
    if not given:
        return
    wanted_names, given_names = (batch["labels"].get("teachers") for batch in (trained, evaluated))
    if wanted_names and given_names:
        order_of_teachers(given_names, wanted_names, of, "the training data")
    elif wanted != given:
        raise ValueError(f"{of}: teacher_logits: expected {wanted} teachers as in the training rows, got {given}")


def _query(targets: RankingTargets) -> str:
    return queries_of(targets)[0]


def _has_labels(dataset: Any) -> bool:
    """Whether some row is labelled; True where only reading it all could tell."""
    if isinstance(dataset, NamedLists):
        return not bool(dataset.lists.labels.isnan().all())
    if isinstance(dataset, list):
        columns = [row.get("labels") for row in dataset if isinstance(row, Mapping)]
        return any(_is_label(label) for labels in columns if labels is not None for label in labels)
    table: Any = getattr(dataset, "data", None)
    if not hasattr(table, "column"):  # not a datasets.Dataset
        return True
    if "labels" not in table.column_names:
        return False
    chunks = table.column("labels").chunks
    return any(_is_label(label.as_py()) for chunk in chunks for label in chunk.flatten())


def _is_label(value: Any) -> bool:
    return value is not None and value == value
