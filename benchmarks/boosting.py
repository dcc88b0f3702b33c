"""Boosted trees by this package's losses beside the libraries' own objectives: NDCG@10 of test queries, paired by query.

python benchmarks/boosting.py            # about a quarter of an hour; writes results/boosting.json and results/boosting.md

Five folds of MQ2008 and of LightGBM's ranking example, so that every query is a test query once. Both sides have the library's
default parameters and 100 rounds, one thread, and no early stopping. "sampled" is LightGBM with 80 % of the rows and of the
features in each round; its three seeds are averaged per query. The data are in the folder that PILE_FAST_DATA or --data names.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from pathlib import Path

import lightgbm
import numpy as np
import torch
import xgboost
from _quality_data import BOTTOM, EXAMPLE, Fold, _collection, with_share
from _report import table
from _timing import where
from scipy import stats

from pile_fast.data import RankedLists, find_data
from pile_fast.ensembles import mean_ensemble
from pile_fast.evaluation.metrics import ndcg
from pile_fast.integrations.boosting import lightgbm_objective, pile_targets, xgboost_objective

RESULTS = Path(__file__).parent / "results"
PAGE = Path(__file__).parents[1] / "docs/boosting.md"
BEGIN, END = "<!-- results -->\n", "<!-- /results -->"
ROUNDS = 100
SHARE = 0.1  # of the training queries that keep their labels, for distillation
OWN_LIGHTGBM, OWN_XGBOOST = "LightGBM's own lambdarank", "XGBoost's own rank:ndcg"
SAMPLED = {"bagging_fraction": 0.8, "bagging_freq": 1, "feature_fraction": 0.8}
Scores = np.ndarray


def fit_lightgbm(train: RankedLists, test: RankedLists, objective: object, **params: object) -> Scores:
    labels = train.labels.nan_to_num(nan=-1.0).numpy()
    data = lightgbm.Dataset(train.features.numpy(), labels, group=train.cu_seqlens.diff().numpy())
    fixed = {"verbose": -1, "num_threads": 1, "deterministic": True, "force_row_wise": True}
    return lightgbm.train({**fixed, "objective": objective, **params}, data, ROUNDS).predict(test.features.numpy())


def fit_xgboost(train: RankedLists, test: RankedLists, objective: object) -> Scores:
    data = xgboost.DMatrix(train.features.numpy(), train.labels.numpy())
    data.set_group(train.cu_seqlens.diff().numpy())
    params, obj = ({"objective": objective}, None) if isinstance(objective, str) else ({}, objective)
    model = xgboost.train({"nthread": 1, **params}, data, ROUNDS, obj=obj)
    return model.predict(xgboost.DMatrix(test.features.numpy()))


def distilled(alpha: float, how: str) -> Callable[[Fold, int], Scores]:
    """Trees from teachers and a tenth of the labels."""

    def fit(fold: Fold, number: int) -> Scores:
        train = with_share(fold.train, SHARE, number)
        group = train.cu_seqlens.diff().numpy()
        if how == "labels":
            return fit_lightgbm(train, fold.test, lightgbm_objective("lambdarank@10", unlabelled=-1))
        if how == "mean":
            targets = mean_ensemble(train.teacher_logits, train.labels, cu_seqlens=train.cu_seqlens).logits.numpy()
        else:
            targets = pile_targets(train.teacher_logits.numpy(), train.labels.numpy(), group=group)
        objective = lightgbm_objective("lambdarank@10", alpha=alpha, targets=targets, unlabelled=-1)
        return fit_lightgbm(train, fold.test, objective)

    return fit


def by_lightgbm(objective: str, **params: object) -> Callable[[Fold, int], Scores]:
    return lambda fold, number: fit_lightgbm(
        fold.train, fold.test, "lambdarank" if objective == OWN_LIGHTGBM else lightgbm_objective(objective), **params
    )


def by_xgboost(objective: str) -> Callable[[Fold, int], Scores]:
    return lambda fold, number: fit_xgboost(
        fold.train, fold.test, "rank:ndcg" if objective == OWN_XGBOOST else xgboost_objective(objective)
    )


SEEDS = (1, 2, 3)
# Section → (data sets, name → its fits, one per seed). The first is what the others are compared with.
SECTIONS: dict[str, tuple[tuple[str, ...], dict[str, list[Callable[[Fold, int], Scores]]]]] = {
    "LightGBM": (
        (EXAMPLE, BOTTOM),
        {
            name: [by_lightgbm(name)]
            for name in (OWN_LIGHTGBM, "lambdarank@10", "lambdarank", "logistic", "softmax:gain=exp2", "approx_ndcg")
        },
    ),
    "LightGBM, sampled": (
        (EXAMPLE, BOTTOM),
        {name: [by_lightgbm(name, seed=seed, **SAMPLED) for seed in SEEDS] for name in (OWN_LIGHTGBM, "lambdarank@10")},
    ),
    "XGBoost": ((EXAMPLE, BOTTOM), {name: [by_xgboost(name)] for name in (OWN_XGBOOST, "lambdarank@10")}),
    "LightGBM, labels on a tenth of the training queries": (
        (BOTTOM,),
        {
            "lambdarank@10, labels alone": [distilled(0.0, "labels")],
            "mean of the teachers, alpha=1": [distilled(1.0, "mean")],
            "PILE, alpha=1": [distilled(1.0, "pile")],
            "PILE, alpha=0.5 with lambdarank@10": [distilled(0.5, "pile")],
        },
    ),
}
COLLECTIONS = {EXAMPLE: "LightGBM's example", BOTTOM: "MQ2008"}


def measure(data: Path, only: str | None) -> list[dict]:
    rows = []
    for section, (data_sets, methods) in SECTIONS.items():
        if only and only not in section:
            continue
        for data_set in data_sets:
            base = None
            for name, fits in methods.items():
                values, seconds = [], 0.0
                for number in range(1, 6):
                    fold = Fold(*_collection(data_set, data).fold(number))
                    test, begin = fold.test, time.perf_counter()
                    scores = [torch.from_numpy(np.asarray(fit(fold, number), dtype=np.float64)) for fit in fits]
                    seconds += (time.perf_counter() - begin) / len(fits)
                    options = {"cu_seqlens": test.cu_seqlens, "k": 10, "ties": "average", "empty": "skip", "reduction": "none"}
                    values.append(np.mean([ndcg(s, test.labels, **options).numpy() for s in scores], 0))
                per_query = np.concatenate(values)
                per_query = per_query[~np.isnan(per_query)]
                base = per_query if base is None else base
                difference = per_query - base
                half = stats.t.ppf(0.975, len(base) - 1) * difference.std(ddof=1) / math.sqrt(len(base))
                row = {
                    "section": section,
                    "data": COLLECTIONS[data_set],
                    "objective": name,
                    "queries": len(base),
                    "ndcg@10": per_query.mean(),
                    "difference": difference.mean(),
                    "half_interval": half,
                    "p": None if base is per_query else float(stats.ttest_rel(per_query, base).pvalue),
                    "seconds": seconds / 5,
                }
                print(f"{section:20} {row['data']:20} {name:36} {row['ndcg@10']:.4f} {row['difference']:+.4f}", flush=True)
                rows.append(row)
    return rows


def markdown(found: dict) -> str:
    """The page of a run."""
    versions = " and ".join(f"{name} {version}" for name, version in found["libraries"].items())
    parts = [
        f"# Boosted trees\n\nWritten by `benchmarks/boosting.py`, {found['date']}, with {versions}.\n"
        "The difference is to the first row of a table, with its 95 % interval; p is the paired t-test's over the queries.\n"
    ]
    for section, data in dict.fromkeys((row["section"], row["data"]) for row in found["rows"]):
        own = [row for row in found["rows"] if (row["section"], row["data"]) == (section, data)]
        parts.append(f"## {section}: {data}, {own[0]['queries']} queries\n")
        parts.append(table(["Objective", *FIGURES], [[row["objective"], *_figures(row)] for row in own]))
    return "\n".join(parts)


FIGURES = ("NDCG@10", "difference", "p")


def _figures(row: dict) -> list[str]:
    against = (
        ["", ""]
        if row["p"] is None
        else [f"{row['difference']:+.4f} ± {row['half_interval']:.4f}", "< .001" if row["p"] < 0.001 else f"{row['p']:.3f}"]
    )
    return [f"{row['ndcg@10']:.4f}", *against]


def summary(found: dict) -> str:
    """The table of docs/boosting.md: the default objective beside the library's own, and distillation."""
    chosen = [
        row
        for row in found["rows"]
        if row["objective"] in (OWN_LIGHTGBM, OWN_XGBOOST, "lambdarank@10") or "tenth" in row["section"]
    ]
    return table(
        ["Data", "Library", "Objective", *FIGURES],
        [[row["data"], row["section"], row["objective"], *_figures(row)] for row in chosen],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=find_data("mq2008"))
    parser.add_argument("--only", help="the sections whose names hold this; the others keep their figures")
    parser.add_argument("--report", action="store_true", help="write the page of the last run anew")
    args = parser.parse_args()
    path = RESULTS / "boosting.json"
    if not args.report:
        if args.data is None:
            parser.error("needs the data: set PILE_FAST_DATA, or --data")
        torch.set_num_threads(1)
        rows = measure(args.data, args.only)
        if args.only:
            done = {(row["section"], row["data"], row["objective"]): row for row in rows}
            old = json.loads(path.read_text())["rows"]
            rows = [done.get((row["section"], row["data"], row["objective"]), row) for row in old]
        versions = {"lightgbm": lightgbm.__version__, "xgboost": xgboost.__version__}
        path.write_text(json.dumps(where(1) | {"libraries": versions, "rows": rows}, indent=1) + "\n")
    found = json.loads(path.read_text())
    path.with_suffix(".md").write_text(markdown(found))
    text = PAGE.read_text()
    PAGE.write_text(text[: text.index(BEGIN) + len(BEGIN)] + summary(found) + text[text.index(END) :])


if __name__ == "__main__":
    main()
