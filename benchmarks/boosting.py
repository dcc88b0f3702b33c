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
from _quality_data import BOTTOM, EXAMPLE, Fold, load, with_share
from _report import table
from _timing import where
from scipy import stats

from pile_fast.data import RankedLists, find_data
from pile_fast.ensembles import mean_ensemble
from pile_fast.evaluation.metrics import ndcg
from pile_fast.integrations.boosting import lightgbm_objective, pile_targets, xgboost_objective

RESULTS = Path(__file__).parent / "results"
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


def distilled(alpha: float, how: str) -> Callable[[Fold], Scores]:
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


def by_lightgbm(objective: str) -> Callable[[Fold, int], Scores]:
    def fit(fold: Fold, number: int) -> Scores:
        own = objective == OWN_LIGHTGBM
        return fit_lightgbm(fold.train, fold.test, "lambdarank" if own else lightgbm_objective(objective))

    return fit


def by_lightgbm_sampled(objective: str, seed: int) -> Callable[[Fold, int], Scores]:
    def fit(fold: Fold, number: int) -> Scores:
        own = objective == OWN_LIGHTGBM
        return fit_lightgbm(fold.train, fold.test, "lambdarank" if own else lightgbm_objective(objective), seed=seed, **SAMPLED)

    return fit


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
        {name: [by_lightgbm_sampled(name, seed) for seed in SEEDS] for name in (OWN_LIGHTGBM, "lambdarank@10")},
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
                    fold = load(data_set, number, data, Path()) if data_set == BOTTOM else _example(number, data)
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


def _example(number: int, data: Path) -> Fold:
    from _quality_data import _collection

    return Fold(*_collection(EXAMPLE, data).fold(number))


def markdown(found: dict) -> str:
    """The page of a run."""
    parts = [
        f"# Boosted trees\n\nWritten by `benchmarks/boosting.py`, {found['date']}. Difference to the first row of a table:\n"
    ]
    parts += ["mean over test queries, 95 % interval and p of the paired t-test.\n"]
    for section in dict.fromkeys(row["section"] for row in found["rows"]):
        for data in dict.fromkeys(row["data"] for row in found["rows"] if row["section"] == section):
            own = [row for row in found["rows"] if (row["section"], row["data"]) == (section, data)]
            lines = [
                [
                    row["objective"],
                    f"{row['ndcg@10']:.4f}",
                    *(
                        ["", ""]
                        if row["p"] is None
                        else [f"{row['difference']:+.4f} ± {row['half_interval']:.4f}", f"{row['p']:.3f}"]
                    ),
                ]
                for row in own
            ]
            parts += [f"\n## {section}: {data}, {own[0]['queries']} queries\n"]
            parts += [table(["objective", "NDCG@10", "difference", "p"], lines), ""]
    return "\n".join(parts).rstrip() + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=find_data("mq2008"))
    parser.add_argument("--only", help="the sections whose names hold this; prints, writes nothing")
    parser.add_argument("--report", action="store_true", help="write the page of the last run anew")
    args = parser.parse_args()
    path = RESULTS / "boosting.json"
    if not args.report:
        if args.data is None:
            parser.error("needs the data: set PILE_FAST_DATA, or --data")
        torch.set_num_threads(1)
        rows = measure(args.data, args.only)
        if args.only:
            return
        versions = {"lightgbm": lightgbm.__version__, "xgboost": xgboost.__version__}
        path.write_text(json.dumps(where(1) | {"libraries": versions, "rows": rows}, indent=1) + "\n")
    path.with_suffix(".md").write_text(markdown(json.loads(path.read_text())))


if __name__ == "__main__":
    main()
