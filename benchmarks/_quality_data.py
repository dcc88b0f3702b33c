"""The data of the quality benchmark: MQ2008 folds with cross-fitted or real teachers, and ways to damage them."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pile_fast.data import RankedLists, load_mq2008, make_synthetic

CROSS_FIT_PARTS = 5
CROSSFIT, BOTTOM, NAN = "cross-fitted", "systems, bottom", "systems, NaN"
DATA_SETS = {
    CROSSFIT: "five models fitted to other training queries",
    BOTTOM: "23 TREC systems, a document not returned is below the end of the list",
    NAN: "23 TREC systems, a document not returned is not scored",
}


class Fold(NamedTuple):
    train: RankedLists
    validation: RankedLists
    test: RankedLists


def load(name: str, number: int, data: Path | None, cache: Path) -> Fold:
    """One official fold of a data set. The cross-fitted teachers are fitted once and kept in `cache`.

    Args:
        name: one of `DATA_SETS`.
        number: 1 to 5.
        data: folder with MQ2008; None = generated data of 60 queries, for a test of the machinery.
        cache: folder.
    """
    if data is None:
        # Parts of equal size; the generated teachers stand for all three data sets.
        lists = make_synthetic(100, seed=0)
    else:
        lists = load_mq2008(data, missing="nan" if name == NAN else "bottom")
    fold = Fold(*lists.fold(number))
    return (
        cross_fitted(fold, cache / f"cross-fitted-{'MQ2008' if data else 'generated'}-{number}.pt")
        if name == CROSSFIT
        else fold
    )


def cross_fitted(fold: Fold, path: Path) -> Fold:
    """The fold with five fitted models as teachers: on training queries each logit comes from a model that saw neither the
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


# Name and fit(features, labels, lengths of the queries) -> predict(features).
TEACHERS = {
    "LambdaMART, large trees": _lambdamart(n_estimators=100, num_leaves=31, learning_rate=0.05),
    "LambdaMART, small trees": _lambdamart(
        n_estimators=200, num_leaves=7, learning_rate=0.05, min_child_samples=50, colsample_bytree=0.3
    ),
    "logistic regression": _logistic,
    "random forest": _random_forest,
    "multi-layer perceptron": _mlp,
}

# Kinds of damage to the training queries and their levels: numbers of teachers out of five, or shares.
DAMAGES = {
    "useless": (1, 2, 3),
    "adversarial": (1, 2),
    "half": (1, 3, 5),
    "missing": (0.1, 0.3, 0.5, 0.7),
    "label noise": (0.1, 0.2, 0.3),
}


def damaged(lists: RankedLists, kind: str, level: float, number: int) -> RankedLists:
    """The training lists of fold `number` with one of `DAMAGES`.

    Which teachers are hit turns with the fold, so that over the folds it is every one of them as often.

    Args:
        kind: "useless": teachers replaced by noise; "adversarial": negated; "half": replaced by noise on a random half of
            the queries, each on one of its own; "missing": a share of all scores taken away at random; "label noise": the
            labels of a share of the documents shuffled among them.
    """
    generator = torch.Generator().manual_seed(number)
    t, count = lists.teacher_logits.clone(), len(lists.teacher_names)
    if kind == "label noise":
        labels = lists.labels.clone()
        hit = torch.randperm(len(labels), generator=generator)[: round(level * len(labels))]
        labels[hit] = labels[hit[torch.randperm(len(hit), generator=generator)]]
        return dataclasses.replace(lists, labels=labels)
    if kind == "missing":
        t[torch.rand(t.shape, generator=generator) < level] = torch.nan
    for teacher in [(number + i) % count for i in range(int(level))]:
        noise = torch.randn(len(t), generator=generator)
        if kind == "adversarial":
            noise = -t[:, teacher]
        elif kind == "half":
            good = torch.rand(len(lists), generator=generator) < 0.5
            noise = torch.where(good.repeat_interleave(lists.cu_seqlens.diff()), t[:, teacher], noise)
        t[:, teacher] = noise
    return lists.with_teachers(t, lists.teacher_names)
