"""Precision, recall, ERR and the like by ir-measures (https://ir-measur.es), for `pile_fast.evaluation`.

ir-measures passes each to a program of its own: pytrec_eval (trec_eval), gdeval, cwl_eval. They break ties differently and
fail on some names of queries and documents. So they get numbers for names and ranks for scores: the order is ours, which is
trec_eval's, and the formula is theirs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pile_fast.extras import needs_extra

if TYPE_CHECKING:
    from pile_fast.evaluation.compare import Judgements
    from pile_fast.evaluation.metrics import Lists

AT_K = ("p", "recall", "success", "judged", "err")
PLAIN = ("rbp",)
_HIGHEST_ERR_GRADE = 4  # gdeval's scale: the chance that a document of grade g satisfies is (2^g − 1) / 2^4


class Evaluator:
    """Values of some metrics per query, for one system after the other.

    Args:
        metrics: (name, base, k) of each.
        judgements: what is relevant, and in which queries.
        query_ids: names of the queries, for errors; None = their numbers from 0.

    Raises:
        ValueError: labels that ERR does not know, or a program that ir-measures needs is missing.
        ImportError: ir-measures is not installed.
    """

    def __init__(
        self, metrics: Sequence[tuple[str, str, int | None]], judgements: Judgements, query_ids: Sequence[str] | None = None
    ):
        self._evaluators: list[Any] = []
        self._names: dict[Any, tuple[str, str]] = {}
        if not metrics:
            return
        with needs_extra("ir-measures"):
            import ir_measures
        self._has_relevant = judgements.per_query(judgements.relevant) > 0
        self._has_gain = judgements.per_query(judgements.labels > 0) > 0
        self._judged_queries = judgements.judged_queries
        by_relevance: dict[Any, tuple[str, str]] = {}
        by_grade: dict[Any, tuple[str, str]] = {}
        for name, base, k in metrics:
            measure = {
                "p": ir_measures.P, "recall": ir_measures.R, "success": ir_measures.Success, "judged": ir_measures.Judged,
                "err": ir_measures.ERR, "rbp": ir_measures.RBP(rel=1),
            }[base]  # fmt: skip
            (by_grade if base == "err" else by_relevance)[measure if k is None else measure @ k] = (name, base)
        for wanted, grades in ((by_relevance, judgements.relevant), (by_grade, judgements.labels)):
            if not wanted:
                continue
            if wanted is by_grade:
                _check_err(judgements, query_ids)
            documents = judgements.judged.nonzero()[:, 0]
            qrels: dict[str, dict[str, int]] = {}
            for q, d, grade in zip(
                judgements.query[documents].tolist(), documents.tolist(), grades[documents].long().tolist(), strict=True
            ):
                qrels.setdefault(str(q), {})[str(d)] = grade
            try:
                self._evaluators.append(ir_measures.evaluator(list(wanted), qrels))
            except ValueError as error:
                raise ValueError(f"{', '.join(name for name, _ in wanted.values())}: {error}") from error
            self._names |= wanted

    def __call__(self, lists: Lists) -> dict[str, tuple[Tensor, Tensor]]:
        """name → (Q,) values, and whether the query has what makes them more than 0."""
        if not self._evaluators:
            return {}
        ranked, rank = lists.ranking, lists.rank
        if lists.retrieved is not None:
            returned = lists.retrieved[ranked]
            ranked, rank = ranked[returned], rank[returned]
        slots = lists.used.nonzero()[:, 0]
        run: dict[str, dict[str, float]] = {}
        for q, d, r in zip(lists.query[ranked].tolist(), slots[ranked].tolist(), rank.tolist(), strict=True):
            run.setdefault(str(q), {})[str(d)] = -r
        values = {}
        for name, base in self._names.values():
            filled = self._has_gain if base == "err" else self._judged_queries if base == "judged" else self._has_relevant
            values[name] = (torch.zeros(len(filled), dtype=torch.float64), filled)
        for evaluator in self._evaluators:
            for metric in evaluator.iter_calc(run):
                values[self._names[metric.measure][0]][0][int(metric.query_id)] = metric.value
        return values


def _check_err(judgements: Judgements, query_ids: Sequence[str] | None) -> None:
    labels = judgements.labels
    bad = ((labels > _HIGHEST_ERR_GRADE) | (labels != labels.round())) & judgements.judged
    if bool(bad.any()):
        first = int(bad.nonzero()[0])
        query = int(judgements.query[first])
        raise ValueError(
            f"err: expected whole labels up to {_HIGHEST_ERR_GRADE}, where the scale of gdeval, which computes it, ends; "
            f"got {labels[first].item():g} in query {query if query_ids is None else query_ids[query]!r}"
        )
