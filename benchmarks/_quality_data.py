"""Data of the quality benchmark: collections in five folds, fitted or real teachers, fewer labels, damaged teachers."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pile_fast.data import RankedLists, load_mq2008, make_synthetic, read_letor
from pile_fast.data.trec import read_rows as read_runs
from pile_fast.ensembles import mean_ensemble

CROSS_FIT_PARTS = 5
MQ2008, BOTTOM, NAN, CAST, CAST_NAN, EXAMPLE = (
    "MQ2008, fitted", "MQ2008, systems", "MQ2008, systems, NaN", "CAsT 2021", "CAsT 2021, NaN", "LightGBM's example",
)  # fmt: skip
# Name → the collection of queries, and what its teachers are.
DATA_SETS = {
    MQ2008: ("MQ2008", "six models fitted to other training queries"),
    BOTTOM: ("MQ2008", "23 TREC systems; a document not returned is below the end of the list"),
    NAN: ("MQ2008", "23 TREC systems; a document not returned has no score"),
    CAST: ("CAsT 2021", "the organisers' five runs; a document not returned is below the end of the run"),
    EXAMPLE: ("LightGBM's example", "six models fitted to other training queries"),
}
FITTED = (MQ2008, EXAMPLE)
FEW = 5  # queries with a relevant document that validation keeps at least


class Fold(NamedTuple):
    train: RankedLists
    validation: RankedLists
    test: RankedLists


def load(name: str, number: int, data: Path | None, cache: Path) -> Fold:
    """One of five folds of a data set. Fitted teachers are fitted once and kept in `cache`.

    Args:
        name: one of `DATA_SETS`, or `CAST_NAN`.
        number: 1 to 5.
        data: folder with the collections; None = generated data of 100 queries, for a test of the machinery.
        cache: folder.
    """
    fold = Fold(*_collection(name, data).fold(number))
    if name not in FITTED:
        return fold
    kind = "MQ2008" if name == MQ2008 else "example"
    return cross_fitted(fold, cache / f"{kind if data else 'generated'}-{len(TEACHERS)}-{number}.pt")


@functools.lru_cache(maxsize=2)
def _collection(name: str, data: Path | None) -> RankedLists:
    if data is None:
        return make_synthetic(100, seed=0)  # the generated teachers stand for all real ones
    if name in (CAST, CAST_NAN):
        return _cast(data / "cast2021", "bottom" if name == CAST else "nan")
    if name == EXAMPLE:
        files = (data / "lightgbm_rank" / f"rank.{part}.xz" for part in ("train", "test"))
        return _dealt(read_letor(*files))
    return load_mq2008(data, missing="nan" if name == NAN else "bottom")


def _dealt(lists: RankedLists) -> RankedLists:
    """Queries dealt to the parts S1 .. S5 in a random order."""
    order = np.random.default_rng(0).permutation(len(lists))
    parts = np.empty(len(lists), dtype=object)
    parts[order] = [f"S{i % 5 + 1}" for i in range(len(lists))]
    return dataclasses.replace(lists, parts=tuple(parts))


# All runs are teachers; the student's features come from the two that are cheap to have.
CAST_FEATURES = ("org_manual_bm25", "org_manual_ance")
CAST_TEACHERS = (*CAST_FEATURES, "org_convdr", "org_convdr_bert", "org_manual_ance_bert")


def _cast(folder: Path, missing: str) -> RankedLists:
    """TREC CAsT 2021: the 158 judged turns, whose documents are those of any of the five runs; unjudged ones are unlabelled.

    The turns of a conversation are in one part, as they are about one topic.
    """
    runs = [folder / f"{name}.run.xz" for name in CAST_TEACHERS]
    rows = read_runs(runs, teachers=CAST_TEACHERS, qrels=folder / "qrels.txt.xz")
    judged = [row for row in rows if any(label is not None for label in row["labels"])]
    conversations = list(dict.fromkeys(row["query_id"].split("_")[0] for row in judged))
    features, labels, logits = [], [], []
    for row in judged:
        teachers = torch.tensor(np.array(row["teacher_logits"], dtype=np.float64))  # None becomes NaN
        sources = [[doc.startswith(source) for source in ("MARCO", "KILT", "WAPO")] for doc in row["doc_ids"]]
        columns = [feature for run in teachers[:, : len(CAST_FEATURES)].T for feature in _run_features(run)]
        features.append(torch.cat([torch.stack(columns, 1), torch.tensor(sources, dtype=torch.float64)], 1))
        labels.append(torch.tensor(np.array(row["labels"], dtype=np.float64)))
        if missing == "bottom":
            lowest = teachers.nan_to_num(nan=torch.inf).amin(0)
            step = (teachers.nan_to_num(nan=-torch.inf).amax(0) - lowest) / teachers.isfinite().sum(0)
            # One mean step below the run's last document.
            teachers = torch.where(teachers.isnan() & lowest.isfinite(), lowest - step, teachers)
        logits.append(teachers)
    lengths = torch.tensor([0, *map(len, labels)])
    return RankedLists(
        torch.cat(features).float(),
        torch.cat(labels).float(),
        torch.cat(logits).float(),
        lengths.cumsum(0),
        tuple(row["query_id"] for row in judged),
        tuple(doc for row in judged for doc in row["doc_ids"]),
        CAST_TEACHERS,
        tuple(f"S{conversations.index(row['query_id'].split('_')[0]) % 5 + 1}" for row in judged),
    )


def _run_features(scores: Tensor) -> list[Tensor]:
    """Of a run's scores (n,): whether it returned the document, its score from 0 to 1, reciprocal rank and log rank."""
    returned = scores.isfinite()
    low, high = scores.nan_to_num(nan=torch.inf).min(), scores.nan_to_num(nan=-torch.inf).max()
    rank = scores.nan_to_num(nan=-torch.inf).argsort(descending=True, stable=True).argsort().double() + 1
    last = returned.sum().double() + 1
    relative = torch.where(returned, (scores - low) / (high - low).clamp(min=1e-9), 0.0)
    rank = torch.where(returned, rank, last)
    return [returned.double(), relative, torch.where(returned, 1 / rank, 0.0), rank.log()]


def with_share(lists: RankedLists, share: float, number: int, *, keep_few: bool = False) -> RankedLists:
    """The lists with labels on a random share of the queries, the others unlabelled; the draw is the fold's.

    Smaller shares keep a part of what larger ones keep.

    Args:
        share: in (0, 1].
        number: of the fold.
        keep_few: on more queries, if need be, until `FEW` of them have a relevant document (for validation).
    """
    if share == 1:
        return lists
    lengths = lists.cu_seqlens.diff()
    relevant = torch.tensor([bool((y > 0).any()) for y in lists.labels.split(lengths.tolist())])
    order = torch.randperm(len(lists), generator=torch.Generator().manual_seed(number))
    count = max(1, round(share * len(lists)))
    if keep_few:
        count = max(count, int((relevant[order].cumsum(0) < FEW).sum()) + 1)
    kept = torch.zeros(len(lists), dtype=torch.bool)
    kept[order[:count]] = True
    return dataclasses.replace(lists, labels=lists.labels.where(kept.repeat_interleave(lengths), torch.nan))


def cross_fitted(fold: Fold, path: Path) -> Fold:
    """The fold with fitted models as teachers: on training queries each logit comes from a model that saw neither the
    query nor its labels, on the others from one fitted to all training queries."""
    if path.is_file():
        logits = torch.load(path)
    else:
        logits = _fit_teachers(fold)
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_suffix(f".{os.getpid()}")
        torch.save(logits, aside)
        aside.replace(path)
    return Fold(*(lists.with_teachers(t, TEACHERS) for lists, t in zip(fold, logits, strict=True)))


def _fit_teachers(fold: Fold) -> list[Tensor]:
    train, *others = fold
    logits = torch.empty(len(train.labels), len(TEACHERS))
    shuffled = np.random.default_rng(0).permutation(len(train))
    query_of = torch.arange(len(train)).repeat_interleave(train.cu_seqlens.diff())
    for held_out in np.array_split(shuffled, CROSS_FIT_PARTS):
        inside = torch.isin(query_of, torch.from_numpy(held_out))
        kept = train.select(sorted(set(range(len(train))) - set(held_out.tolist())))
        logits[inside] = _predict(kept, train.features[inside])
    features = torch.cat([lists.features for lists in others])
    return [logits, *_predict(train, features).split([len(lists.labels) for lists in others])]


def _predict(train: RankedLists, features: Tensor) -> Tensor:
    """(D, M) logits of every teacher, fitted to `train`."""
    x, y, lengths = train.features.numpy(), train.labels.numpy(), train.cu_seqlens.diff().numpy()
    columns = [fit(x, y, lengths)(features.numpy()) for fit in TEACHERS.values()]
    return torch.from_numpy(np.stack(columns, 1).astype(np.float32))


def _lambdamart(**options) -> Callable:
    def fit(x, y, lengths):
        import lightgbm

        model = lightgbm.LGBMRanker(random_state=0, n_jobs=1, deterministic=True, force_row_wise=True, verbose=-1, **options)
        return model.fit(x, y.astype(int), group=lengths).predict

    return fit


def _logistic(x, y, lengths) -> Callable:
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    return make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=1000)).fit(x, y > 0).decision_function


def _random_forest(x, y, lengths) -> Callable:
    from sklearn.ensemble import RandomForestRegressor

    return RandomForestRegressor(100, min_samples_leaf=5, max_features="sqrt", random_state=0, n_jobs=1).fit(x, y).predict


def _mlp(x, y, lengths) -> Callable:
    from sklearn.neural_network import MLPRegressor
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    model = MLPRegressor(hidden_layer_sizes=(64,), alpha=1e-2, max_iter=40, early_stopping=True, random_state=0)
    return make_pipeline(StandardScaler(), model).fit(x, y).predict


def _boosted_regression(x, y, lengths) -> Callable:
    import lightgbm

    options = dict(n_estimators=100, num_leaves=15, learning_rate=0.05, min_child_samples=20, colsample_bytree=0.5)
    model = lightgbm.LGBMRegressor(random_state=0, n_jobs=1, deterministic=True, force_row_wise=True, verbose=-1, **options)
    return model.fit(x, y).predict


# Name and fit(features, labels, lengths of the queries) -> predict(features).
TEACHERS = {
    "LambdaMART, large trees": _lambdamart(n_estimators=100, num_leaves=31, learning_rate=0.05),
    "LambdaMART, small trees": _lambdamart(
        n_estimators=200, num_leaves=7, learning_rate=0.05, min_child_samples=50, colsample_bytree=0.3
    ),
    "logistic regression": _logistic,
    "random forest": _random_forest,
    "multi-layer perceptron": _mlp,
    "boosted regression": _boosted_regression,
}

# Kinds of damage to the training queries and their levels: numbers of teachers out of six, or shares.
DAMAGES = (("noise", 1), ("noise", 3), ("negated", 1), ("negated", 2), ("scaled", 3), ("missing", 0.5))


def damaged(lists: RankedLists, kind: str, level: float, number: int) -> RankedLists:
    """The training lists of fold `number` with one of `DAMAGES`.

    Which teachers are hit turns with the fold.

    Args:
        kind: "noise": teachers replaced by noise; "negated"; "scaled": the exponential of three times their z-scores, which
            keeps the order and lets a few documents stand out; "missing": a share of all scores taken away at random.
    """
    generator = torch.Generator().manual_seed(number)
    t, count = lists.teacher_logits.clone(), len(lists.teacher_names)
    if kind == "missing":
        t[torch.rand(t.shape, generator=generator) < level] = torch.nan
        return lists.with_teachers(t, lists.teacher_names)
    for teacher in [(number + i) % count for i in range(int(level))]:
        if kind == "noise":
            t[:, teacher] = torch.randn(len(t), generator=generator)
        elif kind == "negated":
            t[:, teacher] = -t[:, teacher]
        else:
            z = mean_ensemble(t[:, [teacher]], cu_seqlens=lists.cu_seqlens).logits
            t[:, teacher] = (3 * z).exp()
    return lists.with_teachers(t, lists.teacher_names)
