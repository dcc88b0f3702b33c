"""Boosted trees by this package's losses, with the real LightGBM and XGBoost. D1 to D6 are traps that others fell into."""

import copy
import pickle
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

lightgbm = pytest.importorskip("lightgbm", reason="needs LightGBM: pip install 'pile_fast[boosting]'")
xgboost = pytest.importorskip("xgboost", reason="needs XGBoost: pip install 'pile_fast[boosting]'")

import pile_fast  # noqa: E402
from pile_fast import terms  # noqa: E402
from pile_fast.backends import load, select  # noqa: E402
from pile_fast.batch import RankingBatch  # noqa: E402
from pile_fast.data import find_data, load_mq2008, read_letor  # noqa: E402
from pile_fast.evaluation.compare import evaluate  # noqa: E402
from pile_fast.evaluation.metrics import ndcg  # noqa: E402
from pile_fast.functional import derivatives  # noqa: E402
from pile_fast.integrations import boosting  # noqa: E402
from pile_fast.integrations.boosting import (  # noqa: E402
    lightgbm_metric,
    lightgbm_objective,
    pile_targets,
    xgboost_metric,
    xgboost_objective,
)
from pile_fast.options import loss_options  # noqa: E402

LIGHTGBM = {"verbose": -1, "num_threads": 1, "seed": 0, "deterministic": True, "force_row_wise": True}
XGBOOST = {"nthread": 1, "seed": 0, "disable_default_eval_metric": True}
LABEL_TERMS = ("logistic", "softmax", "lambdarank", "lambdarank@3", "lambdarank:metric=mrr", "approx_ndcg")
pytestmark = pytest.mark.usefixtures("one_thread")


class Data:
    """Queries whose labels follow two of the features, with noise."""

    def __init__(self, queries=60, longest=15, features=5, grades=5, seed=0):
        random = np.random.default_rng(seed)
        self.group = random.integers(2, longest + 1, queries)
        rows = self.group.sum()
        self.qid = np.repeat(np.arange(queries), self.group)
        self.x = random.normal(size=(rows, features)).round(
            1
        )  # fewer values than bins: how weights move those is not the subject
        self.truth = self.x[:, 0] + 0.5 * self.x[:, 1] ** 2
        noisy = self.truth + 0.5 * random.normal(size=rows)
        self.y = np.clip(np.floor(noisy + 1), 0, grades - 1)
        self.teachers = np.stack([self.truth + random.normal(size=rows) * noise for noise in (0.3, 1.0, 3.0)], 1)
        self.starts = torch.tensor([0, *np.cumsum(self.group)])

    def lightgbm(self, **options):
        return lightgbm.Dataset(self.x, self.y, group=self.group, **options)

    def xgboost(self, **options):
        return xgboost.DMatrix(self.x, self.y, qid=self.qid, **options)

    def ndcg(self, scores, k=10):
        scores = torch.as_tensor(np.asarray(scores, dtype=np.float64))
        return ndcg(scores, torch.from_numpy(self.y), cu_seqlens=self.starts, k=k, ties="average").item()


@pytest.fixture(scope="module")
def data():
    return Data()


@pytest.fixture(scope="module")
def other():
    return Data(seed=1)


def call(objective, scores, data, weight=None):
    """(gradient, second derivatives) by the signature that both scikit-learn forms share."""
    return objective(data.y, np.asarray(scores, dtype=np.float64), weight, data.group)


# -- what the objectives compute


@pytest.mark.parametrize("term", LABEL_TERMS)
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_gradients_are_those_of_the_loss_times_the_rows(data, term, alpha):
    """By autograd through the public loss, not by the function that the objectives call."""
    targets = pile_targets(data.teachers, data.y, group=data.group)
    z = torch.from_numpy(np.random.default_rng(1).normal(size=len(data.y))).requires_grad_()
    loss = 0.0
    if alpha > 0:
        own = pile_fast.distillation_loss(
            z, torch.from_numpy(targets), cu_seqlens=data.starts, reduction="none", backend="torch"
        )
        loss = loss + alpha * own.mean()
    if alpha < 1:
        own = pile_fast.ranking_loss(
            z, torch.from_numpy(data.y), kind=term, cu_seqlens=data.starts, reduction="none", backend="torch"
        )
        loss = loss + (1 - alpha) * own.mean()
    (wanted,) = torch.autograd.grad(len(data.y) * loss, z)
    gradient, hessian = call(lightgbm_objective(term, alpha=alpha, targets=targets), z.detach().numpy(), data)
    np.testing.assert_allclose(gradient, wanted.numpy(), rtol=1e-5, atol=1e-6)
    assert gradient.dtype == hessian.dtype == np.float32 and (hessian >= 0).all()


@pytest.mark.parametrize("term", LABEL_TERMS)
def test_derivatives_of_packed_lists_are_those_of_padded_ones(data, term):
    """PyTorch's backend takes packed lists by length; without cu_seqlens it pads all to the longest."""
    z, y = torch.from_numpy(np.random.default_rng(1).normal(size=len(data.y))), torch.from_numpy(data.y)
    weights, of_queries = torch.rand_like(z), torch.rand(len(data.group), dtype=z.dtype)
    targets, options = torch.randn_like(z), loss_options(alpha=0.4, label_loss=term)
    rows = {"student_logits": z, "labels": y, "weights": weights, "target_logits": targets}
    packed = derivatives(RankingBatch(**rows, query_weights=of_queries, cu_seqlens=data.starts), options, "torch")
    lengths = torch.from_numpy(data.group)
    mask = torch.arange(int(lengths.max())) < lengths.unsqueeze(1)
    padded = {name: torch.zeros(mask.shape, dtype=z.dtype).masked_scatter(mask, value) for name, value in rows.items()}
    whole = derivatives(RankingBatch(**padded, query_weights=of_queries, mask=mask), options, "torch")
    torch.testing.assert_close(packed.loss, whole.loss)
    torch.testing.assert_close(packed.gradient, whole.gradient[mask])
    torch.testing.assert_close(packed.hessian, whole.hessian[mask])


def test_both_libraries_get_the_same_in_all_forms(data):
    scores = np.random.default_rng(1).normal(size=len(data.y))
    for options in ({}, {"label_loss": "logistic", "pair_weight": "label_gap"}, {"label_loss": terms.Softmax(gain="exp2")}):
        wanted = call(lightgbm_objective(**options), scores, data)
        forms = [
            lightgbm_objective(**options)(scores, data.lightgbm().construct()),
            xgboost_objective(**options)(scores, data.xgboost()),
            xgboost_objective(**options)(scores, xgboost.QuantileDMatrix(data.x, data.y, qid=data.qid)),
            xgboost_objective(**options, qid=data.qid)(data.y, scores),
            xgboost_objective(**options, group=data.group)(data.y, scores, sample_weight=np.ones(len(scores))),
            xgboost_objective(**options, qid=[f"q{i}" for i in data.qid])(scores, xgboost.DMatrix(data.x, data.y)),
        ]
        for found in forms:
            factor = np.array([[1.0], [1.0 if found is forms[0] else 2.0]])  # of the second derivatives, XGBoost's convention
            np.testing.assert_allclose(found, factor * wanted, rtol=1e-6)


@pytest.mark.parametrize("term", LABEL_TERMS)
def test_weights_of_rows_and_of_queries(data, term):
    scores = np.random.default_rng(1).normal(size=len(data.y))
    random = np.random.default_rng(2)
    weights, of_queries = random.integers(0, 3, len(scores)).astype(float), random.uniform(0, 2, len(data.group))
    z = torch.from_numpy(scores).requires_grad_()
    loss = pile_fast.ranking_loss(
        z, torch.from_numpy(data.y), kind=term, cu_seqlens=data.starts, reduction="none", weights=torch.from_numpy(weights),
        backend="torch",
    )  # fmt: skip
    (wanted,) = torch.autograd.grad(len(scores) * loss.mean(), z)
    forms = [
        call(lightgbm_objective(term), scores, data, weights),
        lightgbm_objective(term)(scores, data.lightgbm(weight=weights).construct()),
        xgboost_objective(term, weights=weights)(scores, data.xgboost()),
        xgboost_objective(term, qid=data.qid)(data.y, scores, sample_weight=weights),
        xgboost_objective(term, qid=data.qid)(scores, xgboost.DMatrix(data.x, data.y, weight=weights)),
    ]
    for gradient, hessian in forms:
        np.testing.assert_allclose(gradient, wanted.numpy(), rtol=1e-5, atol=1e-6)
        assert (gradient[weights == 0] == 0).all() and (hessian[weights == 0] == 0).all()
    plain, weighted = (
        xgboost_objective(term)(scores, matrix) for matrix in (data.xgboost(), data.xgboost(weight=of_queries))
    )  # fmt: skip
    for own, found in zip(plain, weighted, strict=True):
        np.testing.assert_allclose(found, own * np.repeat(of_queries, data.group), rtol=1e-4, atol=1e-6)


def test_unlabelled_rows_take_part_in_the_distillation_alone(data):
    scores = np.random.default_rng(1).normal(size=len(data.y))
    hidden = np.random.default_rng(2).random(len(scores)) < 0.5
    marked = copy.copy(data)
    marked.y = np.where(hidden, -1, data.y)
    targets = pile_targets(data.teachers, marked.y, qid=data.qid, unlabelled=-1)
    np.testing.assert_array_equal(targets, pile_targets(data.teachers, np.where(hidden, np.nan, data.y), qid=data.qid))
    gradient, _ = call(lightgbm_objective(unlabelled=-1), scores, marked)
    assert (gradient[hidden] == 0).all() and (gradient[~hidden] != 0).any()
    gradient, _ = call(lightgbm_objective(unlabelled=-1, targets=targets, alpha=0.5), scores, marked)
    assert (gradient[hidden] != 0).all()
    with pytest.raises(ValueError, match="labels: expected labels >= 0 for 'lambdarank'"):
        call(lightgbm_objective(), scores, marked)


# -- the traps


@pytest.mark.parametrize("term", LABEL_TERMS)
@pytest.mark.parametrize("scores", ["equal", "tied", "apart"])
def test_d1_the_order_of_rows_changes_nothing(data, term, scores):
    """D1: also in the first round, when all predictions are equal."""
    random = np.random.default_rng(1)
    z = {"equal": np.zeros, "tied": lambda n: random.integers(0, 3, n), "apart": random.normal}[scores]
    z = np.asarray(z(len(data.y)) if scores != "apart" else random.normal(size=len(data.y)), dtype=np.float64)
    found = call(lightgbm_objective(term), z, data)
    assert np.abs(found[0]).max() > 0
    shuffled = copy.copy(data)
    for by in (random.random(len(z)), data.y, -data.y):
        order = np.lexsort([by, data.qid])
        shuffled.y = data.y[order]
        again = call(lightgbm_objective(term), z[order], shuffled)
        np.testing.assert_allclose(again, [own[order] for own in found], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("library", ["lightgbm", "xgboost"])
def test_d1_models_of_sorted_and_shuffled_files_are_equal(data, library):
    random = np.random.default_rng(1)
    models = []
    for by in (data.y, -data.y, random.random(len(data.y))):
        own = copy.copy(data)
        order = np.lexsort([by, data.qid])
        own.x, own.y = data.x[order], data.y[order]
        models.append(train(library, own, 10).predict(data.x if library == "lightgbm" else data.xgboost()))
    for model in models[1:]:
        np.testing.assert_allclose(model, models[0], rtol=1e-4, atol=1e-5)


def test_d1_metrics_do_not_look_at_the_order_of_rows(data):
    random = np.random.default_rng(1)
    for name in ("ndcg@3", "ndcg", "mrr", "mrr@2", "map", "pnr", "opa"):
        metric = lightgbm_metric(name)
        for z in (np.zeros(len(data.y)), random.integers(0, 3, len(data.y)).astype(float)):
            if name == "pnr" and not z.any():
                continue
            values = []
            for by in (data.y, -data.y, random.random(len(z))):
                order = np.lexsort([by, data.qid])
                values.append(metric(data.y[order], z[order], None, data.group)[1])
            assert values == pytest.approx([values[0]] * 3), name


@pytest.mark.parametrize("term", LABEL_TERMS)
def test_d2_labels_of_any_size(data, term):
    """D2: labels of 0 to 300 in LightGBM, which refuses them in its own objective, and in XGBoost."""
    large = copy.copy(data)
    large.y = np.round(data.y / data.y.max() * 300)
    with pytest.raises(lightgbm.basic.LightGBMError, match="not less than the number of label mappings"):
        lightgbm.train(LIGHTGBM | {"objective": "lambdarank"}, large.lightgbm(), 1)
    gradient, hessian = call(lightgbm_objective(term), np.zeros(len(large.y)), large)
    assert np.isfinite(gradient).all() and np.isfinite(hessian).all() and np.abs(gradient).max() > 0.1
    for library in ("lightgbm", "xgboost"):
        model = train(library, large, 10, objective=term)
        assert np.ptp(predict(library, model, large)) > 0.1
        assert large.ndcg(predict(library, model, large)) > large.ndcg(np.zeros(len(large.y))) + 0.1


@pytest.mark.parametrize("term", LABEL_TERMS)
@pytest.mark.parametrize("size", [0.0, 3.0, 30.0, 300.0])
def test_d3_second_derivatives_have_a_floor(data, term, size):
    """D3: no row alone asks for a step of more than ten temperatures, however wrong its predictions are."""
    temperature = 0.1 if term == "approx_ndcg" else 1.0
    gradient, hessian = call(lightgbm_objective(term), -size * data.y, data)
    moved = np.abs(gradient) > 0
    assert (np.abs(gradient[moved]) <= 10.001 * temperature * hessian[moved]).all() and np.isfinite(hessian).all()
    if term != "approx_ndcg":
        assert moved.any()  # that loss is flat where all ranks are settled


@pytest.mark.parametrize("library", ["lightgbm", "xgboost"])
@pytest.mark.parametrize("term", LABEL_TERMS)
def test_d3_trees_split_by_the_libraries_own_limits(library, term):
    """D3: also of few queries with long lists, whose pairs each weigh next to nothing; and they go on learning."""
    data = Data(queries=3, longest=300, seed=2)
    model = train(library, data, 20, objective=term)
    leaves = leaf_counts(library, model)
    assert min(leaves) > 2, leaves
    metric = lightgbm_metric("mrr" if "mrr" in term else "ndcg@10")
    before, after = (metric(data.y, z, None, data.group)[1] for z in (np.zeros(len(data.y)), predict(library, model, data)))
    assert after > max(0.7, before + 0.3)


@pytest.mark.parametrize("library", ["lightgbm", "xgboost"])
def test_d3_models_recover_from_a_wrong_start(library, data):
    """Predictions that are all in the wrong order, by a lot: second derivatives of nearly 0."""
    start = -30 * data.y
    if library == "lightgbm":
        dataset = data.lightgbm(init_score=start)
        model = lightgbm.train(LIGHTGBM | {"objective": lightgbm_objective("logistic")}, dataset, 60)
        scores = start + model.predict(data.x, raw_score=True)
    else:
        matrix = data.xgboost(base_margin=start)
        scores = xgboost.train(XGBOOST, matrix, 60, obj=xgboost_objective("logistic")).predict(matrix, output_margin=True)
    before = lightgbm_metric("opa")(data.y, start, None, data.group)[1]
    assert np.isfinite(scores).all() and before == 0
    assert lightgbm_metric("opa")(data.y, scores, None, data.group)[1] > 0.5


@pytest.mark.parametrize("term", LABEL_TERMS)
def test_d4_a_query_does_not_see_the_others(data, term):
    """D4: nor how long the longest is; but for the scale, the mean length."""
    scores = np.random.default_rng(1).normal(size=len(data.y))
    found = call(lightgbm_objective(term), scores, data)
    more = copy.copy(data)
    more.y = np.concatenate([data.y, np.arange(700) % 3])
    more.group = np.append(data.group, 700)
    again = call(lightgbm_objective(term), np.concatenate([scores, np.zeros(700)]), more)
    ratio = (len(more.y) / len(more.group)) / (len(data.y) / len(data.group))
    for own, longer in zip(found, again, strict=True):
        np.testing.assert_allclose(longer[: len(scores)] / ratio, own, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("term", LABEL_TERMS)
@pytest.mark.parametrize("library", ["lightgbm", "xgboost"])
def test_d6_no_pair_at_all(library, term):
    """D6: all labels equal, or one row per query: nothing to learn, and no NaN."""
    for group in ([5] * 40, [1] * 200, [200], [0, 200, 0]):
        data = Data(queries=1)
        data.x, data.y, data.group = np.random.default_rng(0).normal(size=(200, 3)), np.zeros(200), np.array(group)
        data.qid = np.repeat(np.arange(len(group)), group)
        gradient, hessian = call(lightgbm_objective(term), np.zeros(200), data)
        assert not gradient.any() and np.isfinite(hessian).all()
        if 0 not in group:
            scores = predict(library, train(library, data, 3, objective=term), data)
            assert np.ptp(scores) == 0 and np.isfinite(scores).all()


@pytest.mark.parametrize("term", ["softmax", "lambdarank@10"])
def test_a_list_longer_than_lightgbms_limit(term):
    rows = 10_500
    batch = RankingBatch(student_logits=torch.zeros(rows), labels=torch.zeros(rows), cu_seqlens=torch.tensor([0, rows]))
    by = select("auto", batch, None, loss_options(alpha=0.0, label_loss=term))
    if term != "softmax" and (by == "torch" or not hasattr(load(by), "derivatives")):
        pytest.skip(f"PyTorch's backend would take gigabytes for {term} of {rows:,} rows; needs a compiled one that has it")
    random = np.random.default_rng(0)
    x = random.normal(size=(rows, 3))
    y = (x[:, 0] + 0.1 * random.normal(size=rows) > 2).astype(float)
    with pytest.raises(lightgbm.basic.LightGBMError, match="10000"):
        lightgbm.train(LIGHTGBM | {"objective": "lambdarank"}, lightgbm.Dataset(x, y, group=[rows]), 1)
    objective = lightgbm_objective(term)
    model = lightgbm.train(LIGHTGBM | {"objective": objective}, lightgbm.Dataset(x, y, group=[rows]), 5)
    metric = lightgbm_metric("ndcg@10")
    assert metric(y, model.predict(x), None, [rows])[1] > 0.95 > metric(y, np.zeros(rows), None, [rows])[1]


# -- training


def train(library, data, rounds=20, objective="lambdarank@10", **options):
    if library == "lightgbm":
        return lightgbm.train(LIGHTGBM | {"objective": lightgbm_objective(objective, **options)}, data.lightgbm(), rounds)
    return xgboost.train(XGBOOST, data.xgboost(), rounds, obj=xgboost_objective(objective, **options))


def predict(library, model, data):
    return model.predict(data.x) if library == "lightgbm" else model.predict(data.xgboost())


def leaf_counts(library, model):
    if library == "lightgbm":
        return [tree["num_leaves"] for tree in model.dump_model()["tree_info"]]
    return [text.count("leaf=") for text in model.get_dump()]


@pytest.mark.parametrize("library", ["lightgbm", "xgboost"])
@pytest.mark.parametrize("term", LABEL_TERMS)
def test_models_learn_to_rank(library, term, data, other):
    scores = predict(library, train(library, data, 30, objective=term), other)
    assert other.ndcg(scores) > other.ndcg(np.zeros(len(other.y))) + 0.15


@pytest.mark.parametrize("kind", ["logistic", "mse", "kl"])
@pytest.mark.parametrize("library", ["lightgbm", "xgboost"])
def test_distillation_of_teachers(library, kind, data, other):
    """Few labels and good teachers: distilling beats the labels alone."""
    few = copy.copy(data)
    few.y = np.where(data.qid % 6 == 0, data.y, -1)
    targets = pile_targets(few.teachers, few.y, qid=few.qid, unlabelled=-1)
    alone = other.ndcg(predict(library, train(library, few, 30, unlabelled=-1), other))
    for alpha in (0.5, 1.0):
        options = {"distillation": kind, "alpha": alpha, "targets": targets, "unlabelled": -1}
        assert other.ndcg(predict(library, train(library, few, 30, **options), other)) > alone + 0.01


def test_early_stopping_of_lightgbm(data, other):
    for name in ("ndcg@10", "mrr", "opa"):
        valid, history = other.lightgbm(reference=(own := data.lightgbm())), {}
        callbacks = [lightgbm.early_stopping(5, verbose=False), lightgbm.record_evaluation(history)]
        params = LIGHTGBM | {"objective": lightgbm_objective(), "metric": "None", "learning_rate": 0.3}
        model = lightgbm.train(params, own, 200, valid_sets=[valid], feval=lightgbm_metric(name), callbacks=callbacks)
        values = history["valid_0"][name]
        assert len(values) == model.best_iteration + 5 < 200
        assert model.best_iteration == np.argmax(values) + 1
        scores = model.predict(other.x)
        assert max(values) == pytest.approx(lightgbm_metric(name)(other.y, scores, None, other.group)[1])


def test_early_stopping_of_xgboost(data, other):
    for name, more in (
        ("ndcg@10", {"early_stopping_rounds": 5}),
        ("opa", {"callbacks": [xgboost.callback.EarlyStopping(rounds=5, maximize=True)]}),
    ):
        history = {}
        model = xgboost.train(
            XGBOOST, data.xgboost(), 200, obj=xgboost_objective(), evals=[(other.xgboost(), "valid")], verbose_eval=False,
            custom_metric=xgboost_metric(name), evals_result=history, **more,
        )  # fmt: skip
        values = history["valid"][name]
        assert len(values) == model.best_iteration + 6 < 200
        assert model.best_iteration == np.argmax(values)


def test_lightgbms_scikit_learn_form(data, other):
    """Groups, weights, early stopping, and what scikit-learn does with estimators: cloning and pickling."""
    base = pytest.importorskip("sklearn.base")
    weights = np.random.default_rng(1).integers(0, 3, len(data.y)).astype(float)
    ranker = lightgbm.LGBMRanker(
        objective=lightgbm_objective(), n_estimators=100, learning_rate=0.3, metric="None", **LIGHTGBM
    )  # fmt: skip
    ranker = pickle.loads(pickle.dumps(base.clone(ranker)))
    ranker.fit(
        data.x, data.y, group=data.group, sample_weight=weights, eval_set=[(other.x, other.y)], eval_group=[other.group],
        eval_metric=lightgbm_metric("ndcg@5"), callbacks=[lightgbm.early_stopping(5, verbose=False)],
    )  # fmt: skip
    assert 1 < ranker.best_iteration_ < 95 and set(ranker.best_score_["valid_0"]) == {"ndcg@5"}
    params = LIGHTGBM | {"objective": lightgbm_objective(), "learning_rate": 0.3}
    native = lightgbm.train(params, data.lightgbm(weight=weights), ranker.best_iteration_)
    np.testing.assert_allclose(ranker.predict(other.x), native.predict(other.x), rtol=1e-6)


def test_xgboosts_scikit_learn_form(data, other):
    base = pytest.importorskip("sklearn.base")
    weights = np.random.default_rng(1).integers(0, 3, len(data.y)).astype(float)
    model = xgboost.XGBRegressor(
        objective=xgboost_objective(qid=data.qid), eval_metric=xgboost_metric("ndcg@5", qid=other.qid), n_estimators=100,
        early_stopping_rounds=5, n_jobs=1, random_state=0,
    )  # fmt: skip
    model = pickle.loads(pickle.dumps(base.clone(model)))
    model.fit(data.x, data.y, sample_weight=weights, eval_set=[(other.x, other.y)], verbose=False)
    assert 1 < model.best_iteration < 95
    values = model.evals_result()["validation_0"]["ndcg@5"]
    assert model.best_iteration == np.argmax(values)
    short = xgboost.XGBRegressor(objective=xgboost_objective(group=data.group), n_estimators=10, n_jobs=1, random_state=0)
    scores = short.fit(data.x, data.y, sample_weight=weights).predict(other.x)
    matrix = xgboost.DMatrix(data.x, data.y, weight=weights)
    native = xgboost.train(XGBOOST, matrix, 10, obj=xgboost_objective(qid=data.qid))
    np.testing.assert_allclose(scores, native.predict(xgboost.DMatrix(other.x)), rtol=1e-5, atol=1e-5)


def test_lightgbms_cross_validation_finds_the_targets_of_each_fold(data):
    model_selection = pytest.importorskip("sklearn.model_selection")
    targets = pile_targets(data.teachers, data.y, group=data.group)
    seen = []

    class Noted(boosting.LightGBMObjective):
        def __call__(self, *arguments):
            found = super().__call__(*arguments)
            seen.append((arguments[1].used_indices, found[0]))
            return found

    objective = lightgbm_objective(targets=targets)
    objective.__class__ = Noted
    params = LIGHTGBM | {"objective": objective, "metric": "None"}
    folds = model_selection.GroupKFold(3)
    done = lightgbm.cv(params, data.lightgbm(), 3, folds=folds, feval=lightgbm_metric("ndcg@10"))
    assert len(done["valid ndcg@10-mean"]) == 3
    rows, gradient = seen[0]
    lengths = np.unique(data.qid[rows], return_counts=True)[1]
    wanted = lightgbm_objective(targets=targets[rows])(data.y[rows], np.zeros(len(rows)), None, lengths)[0]
    np.testing.assert_allclose(gradient, wanted, rtol=1e-6)


def test_metrics_are_those_of_the_libraries(data):
    """Where the libraries' own have no ties to break."""
    scores = np.random.default_rng(1).normal(size=len(data.y))
    matrix = data.xgboost()
    booster = xgboost.Booster(XGBOOST | {"eval_metric": ["ndcg@5-", "ndcg-"]}, [matrix])
    matrix.set_base_margin(scores)
    own = [float(part.split(":")[1]) for part in booster.eval(matrix).split("\t")[1:]]
    ours = [xgboost_metric(name)(scores, matrix) for name in ("ndcg@5", "ndcg")]
    assert [name for name, _ in ours] == ["ndcg@5", "ndcg"]
    if len(own) == 2:
        assert [value for _, value in ours] == pytest.approx(own, abs=1e-5)
    dataset = data.lightgbm(init_score=scores)
    params = LIGHTGBM | {"objective": lightgbm_objective(), "metric": "ndcg", "eval_at": [5], "learning_rate": 1e-9}
    history = {}
    lightgbm.train(
        params, dataset, 1, valid_sets=[dataset], callbacks=[lightgbm.record_evaluation(history)],
        feval=[lightgbm_metric("ndcg", empty="one"), lightgbm_metric("map", relevant_at=3)],
    )  # fmt: skip
    wanted = lightgbm_metric("ndcg@5", empty="one")(data.y, scores, None, data.group)[1]
    assert history["training"]["ndcg@5"] == pytest.approx([wanted])


# -- what does not fit


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: lightgbm_objective("lambda"), "label_loss: expected one of 'logistic'"),
        (lambda: lightgbm_objective("lambdarank@x"), "label_loss: expected a whole number after cutoff="),
        (lambda: lightgbm_objective(distillation="huber"), "distillation: expected one of"),
        (lambda: lightgbm_objective(alpha=0.5), "targets: expected one for each row of the training data for alpha=0.5"),
        (lambda: lightgbm_objective(alpha=2, targets=[1.0]), "alpha: expected a number >= 0 and <= 1, got 2"),
        (lambda: lightgbm_objective(targets=[[1.0]]), r"targets: expected \(rows,\), got \(1, 1\)"),
        (lambda: lightgbm_objective(targets=["a"]), "targets: expected numbers, got list"),
        (lambda: lightgbm_objective(pair_weight="gap"), "pair_weight: expected one of"),
        (lambda: lightgbm_objective(backend="cude"), "backend: expected one of 'auto'"),
        (lambda: xgboost_objective(group=[2], qid=[0, 0]), "group: expected it or qid, got both"),
        (lambda: xgboost_objective(group=[2, -1]), "group: expected the sizes of the queries, whole numbers >= 0"),
        (lambda: xgboost_objective(group=[2.5]), "group: expected the sizes of the queries, whole numbers >= 0"),
        (lambda: xgboost_objective(qid=["a", "b", "a"]), "qid: expected the rows of a query together, got .*'a'"),
        (lambda: lightgbm_metric("accuracy"), "name: expected ndcg, mrr or map, with @k or without, pnr or opa, got"),
        (lambda: lightgbm_metric("pnr@10"), "name: expected"),
        (lambda: xgboost_metric("ndcg@0"), "name: expected"),
        (lambda: xgboost_metric("ndcg", gain="exp"), "gain: expected one of"),
        (lambda: xgboost_metric("ndcg", empty="nan"), "empty: expected one of"),
        (lambda: pile_targets([[1.0]], [1]), "group: expected the queries' sizes, or qid, got neither"),
        (lambda: pile_targets([1.0], [1], group=[1]), r"teacher_logits: expected \(rows, M\), got \(1,\)"),
        (lambda: pile_targets([[1.0]], [1, 2], group=[1]), "labels: expected 1 numbers, one per row, got 2"),
        (lambda: pile_targets([[1.0], [2.0]], [1, 2], group=[1]), "group: expected the sizes of queries of 2 rows in all"),
        (lambda: pile_targets([[1.0], [2.0]], [1, 2], qid=[1]), "qid: expected the sizes of queries of 2 rows in all"),
    ],
)  # fmt: skip
def test_wrong_arguments(make, message):
    with pytest.raises((TypeError, ValueError), match=message):
        make()


def test_missing_groups_and_wrong_lengths(data):
    rows = len(data.y)
    lgb = lightgbm_objective()
    with pytest.raises(ValueError, match="group: expected the queries' sizes, got none; pass lightgbm.Dataset"):
        lightgbm.train(LIGHTGBM | {"objective": lgb}, lightgbm.Dataset(data.x, data.y), 1)
    with pytest.raises(ValueError, match="LGBMRegressor knows no groups"):
        lightgbm.LGBMRegressor(objective=lgb, **LIGHTGBM).fit(data.x, data.y)
    with pytest.raises(ValueError, match="group: expected the queries' sizes, got none; pass xgboost.DMatrix"):
        xgboost.train(XGBOOST, xgboost.DMatrix(data.x, data.y), 1, obj=xgboost_objective())
    with pytest.raises(ValueError, match="scikit-learn interface hands over none"):
        xgboost.XGBRegressor(objective=xgboost_objective(), n_estimators=1).fit(data.x, data.y)
    with pytest.raises(ValueError, match="group: expected the queries' sizes"):
        xgboost_metric()(data.y, data.truth)
    with pytest.raises(ValueError, match=f"group: expected the sizes of queries of {rows} rows in all, got those of 7"):
        xgboost_objective(group=[7])(data.y, data.truth)
    targets = data.truth[1:]
    for library in ("lightgbm", "xgboost"):
        with pytest.raises(ValueError, match=f"targets: expected one for each of the {rows} rows .*, got {rows - 1}"):
            train(library, data, 1, targets=targets)
    with pytest.raises(ValueError, match="weights: expected them here or in the data, got both"):
        xgboost_objective(qid=data.qid, weights=data.y)(data.y, data.truth, sample_weight=data.y)
    with pytest.raises(ValueError, match="predictions: expected one per row"):
        call(lgb, np.zeros((rows, 2)), data)
    with pytest.raises(ValueError, match="predictions: expected finite ones"):
        call(lgb, np.where(np.arange(rows) == 3, np.nan, 0.0), data)
    with pytest.raises(ValueError, match="weights: expected finite weights >= 0"):
        call(lgb, np.zeros(rows), data, np.full(rows, -1.0))


def test_a_missing_library_names_the_extra():
    code = f"""if True:
        import sys
        sys.modules["lightgbm"] = sys.modules["xgboost"] = None
        from pile_fast.integrations import boosting
        for make in ({", ".join(f"boosting.{n}" for n in ("lightgbm_objective", "xgboost_objective", "lightgbm_metric", "xgboost_metric"))}):
            try:
                make()
            except ImportError as error:
                assert "pip install 'pile_fast[boosting]'" in str(error), error
            else:
                raise AssertionError(make)
        assert boosting.pile_targets([[1.0], [2.0]], [0, 1], group=[2]).shape == (2,)
    """  # noqa: E501
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_objectives_are_plain_data():
    objective = lightgbm_objective("lambdarank@5", targets=[1.0, 2.0], alpha=0.25)
    for twin in (copy.deepcopy(objective), pickle.loads(pickle.dumps(objective))):
        assert repr(twin) == repr(objective) == (
            "<LightGBMObjective: 0.25 × logistic:temperature=1 + 0.75 × lambdarank:cutoff=5,metric=ndcg,gain=exp2>"
        )  # fmt: skip
    assert repr(xgboost_metric("nDCG@5")) == "<XGBoostMetric: ndcg@5>"


# -- pages and data


@pytest.mark.parametrize("section", ["LightGBM", "XGBoost", "Distil teachers"])
def test_the_pages_examples(section):
    text = (Path(__file__).parents[1] / "docs/boosting.md").read_text()
    (example,) = re.findall(r"```python\n(.*?)```", text.split(f"## {section}\n")[1].split("\n## ")[0], re.DOTALL)
    names = {}
    exec(example, names)
    scores = names["booster"].predict(names["x"] if section != "XGBoost" else names["xgboost"].DMatrix(names["x"]))
    truth = np.clip(np.round(names["x"][:, 0] + names["x"][:, 1] * names["x"][:, 2]), 0, 4)
    assert lightgbm_metric("ndcg@10")(truth, scores, None, [20] * 60)[1] > 0.75


# -- as good as LightGBM's own


def folds():
    folder = find_data("mq2008")
    if folder is None or not (folder / "lightgbm_rank").is_dir():
        pytest.skip("needs MQ2008 and LightGBM's example: set PILE_FAST_DATA to the folder with mq2008/, lightgbm_rank/")
    yield tuple(read_letor(folder / "lightgbm_rank" / f"rank.{part}.xz") for part in ("train", "test"))
    mq2008 = load_mq2008(folder)
    fold = mq2008.fold(1)
    yield fold[0], fold[2]


def test_as_good_as_lightgbms_own_lambdarank():
    """Paired over the queries of LightGBM's example and of a fold of MQ2008; benchmarks/boosting.py has all folds."""
    scores, labels, lengths = {"own": [], "ours": []}, [], []
    for of_training, of_test in folds():
        for name, objective in (("own", "lambdarank"), ("ours", lightgbm_objective("lambdarank@10"))):
            dataset = lightgbm.Dataset(
                of_training.features.numpy(), of_training.labels.numpy(), group=of_training.cu_seqlens.diff().numpy()
            )
            model = lightgbm.train(LIGHTGBM | {"objective": objective}, dataset, 50)
            scores[name].append(torch.from_numpy(model.predict(of_test.features.numpy())))
        labels.append(of_test.labels)
        lengths.append(of_test.cu_seqlens.diff())
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), torch.cat(lengths).cumsum(0)])
    systems = {name: torch.cat(parts) for name, parts in scores.items()}
    result = evaluate(
        systems, torch.cat(labels), starts, metrics=["ndcg@10"], baseline="own", gain="exponential", empty="skip"
    ).results["ours"]["ndcg@10"]  # fmt: skip
    assert result.queries > 150
    # Not worse by the paired test, and by no more than the noise of so many queries.
    assert result.difference_high > 0 and result.difference > -0.02, result
