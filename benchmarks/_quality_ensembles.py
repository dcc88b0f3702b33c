"""The teachers and their ensembles themselves, without a student: how well they rank, and how far the teachers agree."""

from __future__ import annotations

import functools
import itertools

import torch
from _quality_data import Fold
from _quality_students import quality_on
from torch import Tensor

from pile_fast import ensembles
from pile_fast.data import RankedLists


def describe(fold: Fold) -> dict:
    """NDCG@10 on the training queries, whose labels the ensembles see; on the test queries with their labels, which is a leak;
    and on the test queries without, as the ensembles would rank in service. And the teachers' NDCG@10 and agreement there."""
    train, test = fold.train, fold.test
    unlabelled = torch.full_like(test.labels, torch.nan)
    rows = {}
    for name, ensemble in (
        ensembles.ENSEMBLES | {"pile, query": functools.partial(ensembles.ENSEMBLES["pile"], granularity="query")}
    ).items():
        if name not in ensembles.NEEDS_STUDENT:
            rows[name] = [
                _score(lists, ensemble(lists.teacher_logits, labels, cu_seqlens=lists.cu_seqlens).logits)
                for lists, labels in ((train, train.labels), (test, test.labels), (test, unlabelled))
            ]
    # These two learn from the training queries what they use on the test queries.
    best = ensembles.best_teacher_ensemble(train.teacher_logits, train.labels, cu_seqlens=train.cu_seqlens)
    alone = ensembles.mean_ensemble(test.teacher_logits, cu_seqlens=test.cu_seqlens, prior=best.weights.clamp(min=1e-6))
    rows["best"][2] = _score(test, alone.logits)
    stacking = ensembles.StackingEnsemble().fit(train.teacher_logits, train.labels, cu_seqlens=train.cu_seqlens)
    seen, new = (_score(lists, stacking(lists.teacher_logits, cu_seqlens=lists.cu_seqlens).logits) for lists in (train, test))
    rows["stacking"] = [seen, new, new]

    each = [ensembles.mean_ensemble(t[:, None], cu_seqlens=train.cu_seqlens).logits for t in train.teacher_logits.T]
    agreement = torch.stack([(a * b).nanmean() for a, b in itertools.combinations(each, 2)]).nanmean()
    return {
        "ensembles": {name: dict(zip(("train", "leak", "hidden"), row, strict=True)) for name, row in rows.items()},
        "teachers": [_score(test, t) for t in test.teacher_logits.T],
        "correlation": round(float(agreement), 3),
    }


def _score(lists: RankedLists, logits: Tensor) -> float:
    """What has no logit ranks last."""
    return round(float(quality_on(lists, logits.nan_to_num(nan=-1e4)[None, None])), 5)
