"""The students that ``pile-fast demo`` compares: trained by a plain loop, judged on queries that none of them has seen."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from pile_fast import PILELoss
from pile_fast.data import RankedLists, pack_queries
from pile_fast.evaluation.metrics import ndcg
from pile_fast.students import FeatureRanker, FeatureRankerConfig

QUERIES_PER_STEP = 32
LEARNING_RATE = 1e-2
HIDDEN_SIZES = (32,)
# Shares of the training queries that keep their labels.
SHARES = (1.0, 0.2)


@dataclasses.dataclass(frozen=True, eq=False)
class Kind:
    """How one student learns.

    Attributes:
        name: in tables.
        options: of its `PILELoss`.
        sees_labels: of training queries; the others are the same at every share of labels.
        fits: whether its loss learns the teachers' weights from labels before the first step.
    """

    name: str
    options: dict[str, Any]
    sees_labels: bool = True
    fits: bool = False


MEAN = Kind("mean", {"iterations": 0}, sees_labels=False)
LABELS_ONLY = Kind("labels only", {"alpha": 0.0})
MEAN_AND_LABELS = Kind("mean + labels", {"iterations": 0, "alpha": 0.5})
PILE = Kind("PILE shared", {}, fits=True)
PILE_AND_LABELS = Kind("PILE shared + labels", {"alpha": 0.5}, fits=True)
KINDS = (MEAN, LABELS_ONLY, MEAN_AND_LABELS, PILE, PILE_AND_LABELS)
# What is trained: each kind with each share of labels, and what sees no labels once, with None.
Run = tuple[Kind, float | None]
RUNS: tuple[Run, ...] = (
    *((kind, None) for kind in KINDS if not kind.sees_labels),
    *((kind, share) for share in SHARES for kind in KINDS if kind.sees_labels),
)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What came out of `cross_validate`.

    Attributes:
        test: the queries that were judged, fold after fold.
        ndcg: by run its students' NDCG@10 (Q,) on the queries of `test`, the mean over the repeats; NaN = the query has no
            relevant document.
        weights: by share of labels the teachers' weights (M,) that PILE learned, the mean over folds and repeats.
        student: of `PILE_AND_LABELS` with all labels, the first that was trained.
    """

    test: RankedLists
    ndcg: dict[Run, Tensor]
    weights: dict[float, Tensor]
    student: FeatureRanker


def cross_validate(
    lists: RankedLists, *, folds: Sequence[int], repeats: int, epochs: int, seed: int, trained: Callable[[], None]
) -> Outcome:
    """Train every run on four of the five parts of the data and judge it on the fifth.

    A run chooses nothing by its results, so no part is needed for that. Within a repeat all runs have the same initial weights,
    the same order of queries and the same labelled queries.

    Args:
        lists: queries in the parts S1 .. S5.
        folds: numbers from 1 to 5.
        repeats: students of each run per fold, whose seeds are `seed`, `seed` + 1, ...
        epochs: of training.
        trained: called after each student; there are len(folds) · repeats · len(RUNS).
    """
    ndcg: dict[Run, list[Tensor]] = {run: [] for run in RUNS}
    weights: dict[float, list[Tensor]] = {share: [] for share in SHARES}
    students, judged = [], []
    for fold in folds:
        *_, test = lists.fold(fold)
        held_out = set(test.parts)
        mine = [q for q, part in enumerate(lists.parts) if part in held_out]
        train = lists.select(sorted(set(range(len(lists))) - set(mine)))
        judged += mine
        values: dict[Run, list[Tensor]] = {run: [] for run in RUNS}
        for number in range(seed, seed + repeats):
            for kind, share in RUNS:
                seen = train if share is None else keep_labels(train, share, number)
                loss = PILELoss(**kind.options)
                if kind.fits:
                    loss.fit(batches(seen, [range(len(seen))]))
                    weights[share or 1.0].append(loss.weights)
                student = train_student(seen, loss, epochs, number)
                values[kind, share].append(ndcg_of(student, test))
                if (kind, share) == (PILE_AND_LABELS, 1.0):
                    students.append(student)
                trained()
        for run, of in values.items():
            ndcg[run].append(torch.stack(of).mean(0))
    return Outcome(
        lists.select(judged),
        {run: torch.cat(parts) for run, parts in ndcg.items()},
        {share: torch.stack(parts).mean(0) for share, parts in weights.items()},
        students[0],
    )


def keep_labels(lists: RankedLists, share: float, seed: int) -> RankedLists:
    """The lists with the labels of a random share of the queries alone; the others are unlabelled, and still distilled."""
    order = torch.randperm(len(lists), generator=torch.Generator().manual_seed(seed))
    kept = torch.zeros(len(lists), dtype=torch.bool)
    kept[order[: round(share * len(lists))]] = True
    kept = kept.repeat_interleave(lists.cu_seqlens.diff())
    return dataclasses.replace(lists, labels=torch.where(kept, lists.labels, torch.nan))


def train_student(lists: RankedLists, loss: PILELoss, epochs: int, seed: int) -> FeatureRanker:
    """A student of the lists' features, trained with a loss: the loop that a user would write."""
    torch.manual_seed(seed)
    student = FeatureRanker(FeatureRankerConfig(lists.features.shape[1], HIDDEN_SIZES, dropout=0.0))
    student.fit_standardization(lists.features)
    optimizer = torch.optim.Adam(student.parameters(), lr=LEARNING_RATE)
    steps = [queries for _ in range(epochs) for queries in torch.randperm(len(lists)).split(QUERIES_PER_STEP)]
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=len(steps))
    for batch in batches(lists, [queries.tolist() for queries in steps]):
        logits = student(batch.pop("features"))
        loss(logits, **batch).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return student.eval()


def batches(lists: RankedLists, steps: Iterable[Iterable[int]]) -> Iterable[dict[str, Tensor]]:
    """Packed batches of the queries of each step."""
    rows = [lists[q] for q in range(len(lists))]
    return (pack_queries([rows[q] for q in queries]) for queries in steps)


@torch.no_grad()
def ndcg_of(student: FeatureRanker, lists: RankedLists) -> Tensor:
    """NDCG@10 (Q,) of a student's scores; NaN = the query has no relevant document."""
    return ndcg_of_scores(student(lists.features), lists)


def ndcg_of_scores(scores: Tensor, lists: RankedLists) -> Tensor:
    """NDCG@10 (Q,) of scores (D,); equal scores share their gain. NaN = the query has no relevant document."""
    return ndcg(scores, lists.labels, cu_seqlens=lists.cu_seqlens, k=10, ties="average", empty="skip", reduction="none")
