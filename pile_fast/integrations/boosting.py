"""Boosted trees of LightGBM and XGBoost, trained by this package's losses and distilled from several teachers.

=====================  ===========================================  =================================================
what                   LightGBM                                     XGBoost
=====================  ===========================================  =================================================
objective              `lightgbm_objective`                         `xgboost_objective`
metric                 `lightgbm_metric`                            `xgboost_metric`
targets from teachers  `pile_targets`                               `pile_targets`
=====================  ===========================================  =================================================

Both libraries add up what an objective returns for the rows of a leaf, and their limits (``min_sum_hessian_in_leaf``,
``min_child_weight``, ``lambda``) are absolute numbers, made for losses with a term per row. The losses here are one number per
query. So an objective is

    rows × the mean of the loss over all queries,

as a loss per row would be: each query counts the same, whatever its length, and the libraries' defaults fit. A row's second
derivative is at least its gradient divided by 10 τ, τ the temperature of the term, or 1: no row alone asks for a longer step
than ten temperatures. Without that bound a pair in the wrong order by 10 asks for a step of 22,000, and the one relevant
document of a softmax over a long list for one as long as the list; their second derivatives are nearly 0. Distillation "mse"
has constant second derivatives, and no bound: its steps are as long as the targets are large.

Documents with equal predictions, as all are in the first round, share what their ranks offer, in objectives and in metrics. So
the order of a query's rows never matters.

docs/boosting.md says when to use which. A library is imported when something is made for it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from typing_extensions import Unpack

from pile_fast import checks
from pile_fast.backends import check_name
from pile_fast.batch import RankingBatch
from pile_fast.evaluation import metrics
from pile_fast.extras import needs_extra
from pile_fast.functional import derivatives, pile_ensemble
from pile_fast.options import EnsembleKeywords, LossOptions, loss_options
from pile_fast.terms import Term

# An array of numbers, or what NumPy makes one of: a list, a pandas Series, a tensor.
Array = Any
# What a row alone may ask for, in temperatures. A pair of equal logits asks for 2; a much lower bound than this would slow down
# training where nothing is wrong.
_LONGEST_STEP = 10.0
_UNBOUNDED = ("distill_mse",)  # their steps have the targets' scale
_METRICS = ("ndcg", "mrr", "map", "pnr", "opa")


class _Rows(NamedTuple):
    """What a library hands over."""

    scores: np.ndarray  # (D,)
    labels: np.ndarray  # (D,)
    lengths: np.ndarray  # (Q,)
    weights: np.ndarray | None  # (D,)
    query_weights: np.ndarray | None  # (Q,)
    chosen: np.ndarray | None  # (D,) of which rows of the whole data these are; None = all


def pile_targets(
    teacher_logits: Array,
    labels: Array,
    *,
    group: Array | None = None,
    qid: Array | None = None,
    unlabelled: float | None = None,
    **options: Unpack[EnsembleKeywords],
) -> np.ndarray:
    """The PILE ensemble of the teachers' scores, as the `targets` of an objective.

    Args:
        teacher_logits: (rows, M), what M teachers say of each row; NaN = this teacher did not score it.
        labels: (rows,), larger is better; NaN = unlabelled.
        group: sizes of the queries, in the order of the rows; or give `qid`.
        qid: (rows,), each row's query; the rows of a query stand together.
        unlabelled: a label that stands for none, such as -1.
        options: those of `pile_fast.pile_ensemble`, such as `granularity`, `iterations` and `normalize`.

    Returns:
        (rows,), float64; NaN where no teacher scored the row.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.

    >>> teachers = np.array([[0.3, 5.0], [0.1, 9.0], [0.2, 1.0]])
    >>> int(pile_targets(teachers, [0, 1, 0], group=[3]).argmax())  # the second teacher is right
    1
    """
    logits = _array("teacher_logits", teacher_logits)
    if logits.ndim != 2:
        raise ValueError(f"teacher_logits: expected (rows, M), got {logits.shape}; a column per teacher")
    lengths = _lengths(group, qid, len(logits))
    if lengths is None:
        raise ValueError("group: expected the queries' sizes, or qid, got neither")
    y = _labels(_column("labels", labels, len(logits)), unlabelled)
    return pile_ensemble(torch.from_numpy(logits), y, cu_seqlens=_starts(lengths), **options).logits.numpy()


class _Objective:
    """What the objectives of both libraries have in common. Plain data, so that estimators can copy and pickle it."""

    def __init__(
        self, label_loss: str | Term, distillation: str | Term, alpha: float | None, pair_weight: str | None, pairwise: str,
        targets: Array | None, unlabelled: float | None, backend: str,
    ) -> None:  # fmt: skip
        if targets is None and alpha:
            raise ValueError(f"targets: expected one for each row of the training data for alpha={alpha:g}, got None")
        alpha = (0.0 if targets is None else 1.0) if alpha is None else alpha
        self.options = loss_options(
            alpha=alpha, distillation=distillation, label_loss=label_loss, pair_weight=pair_weight, pairwise=pairwise
        )
        self.targets = None if targets is None else _column("targets", targets)
        self.unlabelled = None if unlabelled is None else checks.number("unlabelled", unlabelled)
        self.backend = check_name(backend)

    def __repr__(self) -> str:
        options = self.options
        parts = [f"{options.alpha:g} × {options.distillation}"] if options.alpha > 0 else []
        parts += [f"{1 - options.alpha:g} × {options.label_loss}"] if options.alpha < 1 else []
        return f"<{type(self).__name__}: {' + '.join(parts)}>"

    def _derivatives(self, rows: _Rows) -> tuple[np.ndarray, np.ndarray]:
        """Gradient and second derivatives (rows,), float32, as both libraries keep them."""
        scores, options = torch.from_numpy(rows.scores), self.options
        targets = None
        if options.alpha > 0:
            assert self.targets is not None
            own = self.targets if rows.chosen is None or len(self.targets) == len(rows.scores) else self.targets[rows.chosen]
            if len(own) != len(rows.scores):
                raise ValueError(
                    f"targets: expected one for each of the {len(rows.scores)} rows of the training data, got {len(own)}"
                )
            targets = torch.from_numpy(own)
        batch = RankingBatch(
            student_logits=scores,
            target_logits=targets,
            labels=_labels(rows.labels, self.unlabelled) if options.alpha < 1 else None,
            cu_seqlens=_starts(rows.lengths),
            weights=None if rows.weights is None else torch.from_numpy(rows.weights),
            query_weights=None if rows.query_weights is None else torch.from_numpy(rows.query_weights),
        )
        gradient, hessian = torch.zeros_like(scores), torch.zeros_like(scores)
        # Term by term: each has its own bound.
        for share, alpha, term in (
            (options.alpha, 1.0, options.distillation),
            (1 - options.alpha, 0.0, options.label_loss),
        ):
            if share > 0:
                own_gradient, own_hessian = _bounded(batch, options._replace(alpha=alpha), term, self.backend)
                gradient += share * own_gradient
                hessian += share * own_hessian
        scale = len(scores) / max(len(rows.lengths), 1)
        if not gradient.isfinite().all():
            raise ValueError("predictions: expected finite ones, got NaN or infinity; is the learning rate too high?")
        return (scale * gradient).float().numpy(), (scale * hessian).float().numpy()


def _bounded(batch: RankingBatch, options: LossOptions, term: Term, backend: str) -> tuple[Tensor, Tensor]:
    found = derivatives(batch, options, backend)
    if term.key in _UNBOUNDED:
        return found.gradient, found.hessian
    longest = _LONGEST_STEP * getattr(term, "temperature", 1.0)
    return found.gradient, torch.maximum(found.hessian, found.gradient.abs() / longest)


class LightGBMObjective(_Objective):
    """See `lightgbm_objective`, which makes it."""

    def __call__(
        self, y_true: Array, y_pred: Array, weight: Array | None = None, group: Array | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """(gradient, second derivatives) of (predictions, Dataset), or of (labels, predictions, weights, group)."""
        return self._derivatives(_of_lightgbm(y_true, y_pred, weight, group))


def lightgbm_objective(
    label_loss: str | Term = "lambdarank@10",
    *,
    distillation: str | Term = "logistic",
    alpha: float | None = None,
    targets: Array | None = None,
    pair_weight: Literal["label_gap", "gain_gap"] | None = None,
    pairwise: Literal["auto", "direct", "chebyshev"] = "auto",
    unlabelled: float | None = None,
    backend: str = "auto",
) -> LightGBMObjective:
    """An objective for LightGBM: ``lightgbm.train({"objective": ...})`` or ``LGBMRanker(objective=...)``.

    The loss is that of `pile_fast.pile_loss`, with the targets in the teachers' place. Lists may be longer than the 10,000 rows
    at which LightGBM's own ranking objectives stop, labels may be any numbers, and `Dataset`'s weights are `weights` of
    `pile_fast.ranking_loss`, what each row counts. The module's docstring has the scale.

    Args:
        label_loss: a label term, see `pile_fast.terms`: "lambdarank@10", "logistic", "softmax", "approx_ndcg", ...
        distillation: a distillation term: "logistic", "mse", "kl", ...
        alpha: weight of the distillation against the labels, from 0 to 1; None = 1 with targets, else 0.
        targets: (rows,), the logits to distil, such as `pile_targets`; a row for each of the training data, NaN = none. In
            ``lightgbm.cv`` those of the whole data.
        pair_weight: of the pairs of label loss "logistic": None, "label_gap" or "gain_gap".
        pairwise: how pairs are summed: "auto", "direct" or "chebyshev".
        unlabelled: a label that stands for none, such as -1; LightGBM takes no NaN.
        backend: see `pile_fast.available_backends`.

    Raises:
        ImportError: LightGBM is missing.
        TypeError, ValueError: an argument does not fit. Called without groups, or with labels that are no gains, the objective
            raises ValueError too.

    >>> import lightgbm
    >>> random = np.random.default_rng(0)
    >>> x, y = random.normal(size=(400, 5)), random.integers(0, 5, 400)
    >>> data = lightgbm.Dataset(x, y, group=[20] * 20)
    >>> params = {"objective": lightgbm_objective("lambdarank@10"), "verbose": -1}
    >>> lightgbm.train(params, data, num_boost_round=5).num_trees()
    5
    >>> ranker = lightgbm.LGBMRanker(objective=lightgbm_objective(), n_estimators=5, verbose=-1)
    >>> ranker.fit(x, y, group=[20] * 20).n_estimators_
    5
    """
    with needs_extra("boosting"):
        import lightgbm  # noqa: F401
    return LightGBMObjective(label_loss, distillation, alpha, pair_weight, pairwise, targets, unlabelled, backend)


class XGBoostObjective(_Objective):
    """See `xgboost_objective`, which makes it."""

    def __init__(self, *arguments: Any, group: Array | None, qid: Array | None, weights: Array | None) -> None:
        super().__init__(*arguments)
        self.weights = None if weights is None else _column("weights", weights)
        self.lengths = _lengths(group, qid)

    def __call__(
        self, y_true: Array, y_pred: Array, sample_weight: Array | None = None
    ) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
        """(gradient, second derivatives) of (predictions, DMatrix), or of (labels, predictions, weights)."""
        rows = _of_xgboost(y_true, y_pred, sample_weight, self.lengths)
        if self.weights is not None:
            if rows.weights is not None:
                raise ValueError("weights: expected them here or in the data, got both")
            rows = rows._replace(weights=_column("weights", self.weights, len(rows.scores)))
        gradient, hessian = self._derivatives(rows)
        return gradient, 2 * hessian  # as in XGBoost's own


def xgboost_objective(
    label_loss: str | Term = "lambdarank@10",
    *,
    distillation: str | Term = "logistic",
    alpha: float | None = None,
    targets: Array | None = None,
    pair_weight: Literal["label_gap", "gain_gap"] | None = None,
    pairwise: Literal["auto", "direct", "chebyshev"] = "auto",
    group: Array | None = None,
    qid: Array | None = None,
    weights: Array | None = None,
    unlabelled: float | None = None,
    backend: str = "auto",
) -> XGBoostObjective:
    """An objective for XGBoost: ``xgboost.train(..., obj=...)`` or ``XGBRegressor(objective=...)``.

    As `lightgbm_objective`, but with twice the second derivatives, as XGBoost's own ranking objectives have them (both rows of
    a pair move), so that its learning rates fit; and but for what XGBoost hands over:

    - ``xgboost.train``: the groups of the `DMatrix`, by its ``group=`` or ``qid=``. Its weights are then one per query, by
      XGBoost's rule; those of rows are `weights` here.
    - scikit-learn's form: no groups, so give the training data's here. `XGBRanker` refuses all objectives but its own: take
      `XGBRegressor`. Its ``sample_weight`` is one per row.

    Args:
        label_loss, distillation, alpha, targets, pair_weight, pairwise, unlabelled, backend: see `lightgbm_objective`.
        group: sizes of the training data's queries, in the order of its rows.
        qid: or each row's query; the rows of a query stand together.
        weights: (rows,), what each row counts, >= 0.

    Raises:
        ImportError: XGBoost is missing.
        TypeError, ValueError: see `lightgbm_objective`.

    >>> import xgboost
    >>> random = np.random.default_rng(0)
    >>> x, y, qid = random.normal(size=(400, 5)), random.integers(0, 5, 400), np.arange(400) // 20
    >>> data = xgboost.DMatrix(x, y, qid=qid)
    >>> xgboost.train({}, data, num_boost_round=5, obj=xgboost_objective("lambdarank@10")).num_boosted_rounds()
    5
    >>> model = xgboost.XGBRegressor(objective=xgboost_objective(qid=qid), n_estimators=5)
    >>> model.fit(x, y).predict(x).shape
    (400,)
    """
    with needs_extra("boosting"):
        import xgboost  # noqa: F401
    return XGBoostObjective(
        label_loss,
        distillation,
        alpha,
        pair_weight,
        pairwise,
        targets,
        unlabelled,
        backend,
        group=group,
        qid=qid,
        weights=weights,
    )


class _Metric:
    """A metric by its name, on the queries that a library hands over."""

    def __init__(self, name: str, gain: str, empty: str, relevant_at: float, unlabelled: float | None) -> None:
        base, at, k = name.lower().partition("@") if isinstance(name, str) else ("", "", "")
        with_k = k.isascii() and k.isdecimal() and int(k) > 0
        if base not in _METRICS or (at and not (with_k and base in ("ndcg", "mrr", "map"))):
            raise ValueError(f"name: expected ndcg, mrr or map, with @k or without, pnr or opa, got {name!r}")
        self.base, self.k = base, int(k) if at else None
        self.gain = checks.choice("gain", gain, metrics.GAINS)
        self.empty = checks.choice("empty", empty, ("zero", "one", "skip"))
        self.relevant_at = checks.number("relevant_at", relevant_at)
        self.unlabelled = None if unlabelled is None else checks.number("unlabelled", unlabelled)
        self.__name__ = f"{base}@{self.k}" if at else base  # by which the libraries call it

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {self.__name__}>"

    def _value(self, rows: _Rows) -> float:
        scores, labels = torch.from_numpy(rows.scores), _labels(rows.labels, self.unlabelled)
        starts = _starts(rows.lengths)
        if self.base == "ndcg":
            options = {"k": self.k, "gain": self.gain, "empty": self.empty}
            return float(metrics.ndcg(scores, labels, cu_seqlens=starts, ties="average", **options))  # type: ignore[arg-type]
        if self.base == "pnr":
            return float(metrics.pnr(scores, labels, cu_seqlens=starts))  # type: ignore[arg-type]
        if self.base == "opa":
            return float(metrics.opa(scores, labels, cu_seqlens=starts, ties="half"))
        # These rank equal scores by the order of the rows: the irrelevant ones first, or sorted files would look good.
        query = torch.repeat_interleave(torch.from_numpy(rows.lengths))
        order = labels.argsort(stable=True)
        order = order[query[order].argsort(stable=True)]
        metric = metrics.mrr if self.base == "mrr" else metrics.average_precision
        return float(
            metric(
                scores[order], labels[order], cu_seqlens=starts, k=self.k, relevant_at=self.relevant_at, empty=self.empty
            )
        )  # fmt: skip


class LightGBMMetric(_Metric):
    """See `lightgbm_metric`, which makes it."""

    def __call__(
        self, y_true: Array, y_pred: Array, weight: Array | None = None, group: Array | None = None
    ) -> tuple[str, float, bool]:
        """(name, value, True: higher is better) of (predictions, Dataset), or of (labels, predictions, weights, group)."""
        return self.__name__, self._value(_of_lightgbm(y_true, y_pred, weight, group)), True


def lightgbm_metric(
    name: str = "ndcg@10",
    *,
    gain: Literal["exponential", "linear"] = "exponential",
    empty: Literal["zero", "one", "skip"] = "zero",
    relevant_at: float = 1,
    unlabelled: float | None = None,
) -> LightGBMMetric:
    """A metric for LightGBM: ``lightgbm.train(..., feval=...)`` or ``LGBMRanker.fit(..., eval_metric=...)``.

    One of `pile_fast.evaluation.metrics`, the mean over queries; weights do not count. Equal predictions never profit from the
    order of rows: in NDCG they share their mean gain, in MRR and MAP the irrelevant ones come first, in OPA they are half
    right. ``"metric": "None"`` in LightGBM's parameters leaves its own metrics out, which early stopping would look at too.

    Args:
        name: "ndcg", "mrr" or "map", with @k or without, "pnr" or "opa".
        gain: of NDCG: "exponential" as LightGBM's own, or "linear".
        empty: value of a query without a relevant document; LightGBM's own NDCG has "one".
        relevant_at: for MRR and MAP, the least label of a relevant document.
        unlabelled: a label that stands for none; such rows are left out.

    Raises:
        ImportError: LightGBM is missing.
        ValueError: an argument does not fit, or the data have no groups.

    >>> import lightgbm
    >>> random = np.random.default_rng(0)
    >>> x, y = random.normal(size=(400, 5)), random.integers(0, 5, 400)
    >>> train = lightgbm.Dataset(x[:300], y[:300], group=[20] * 15)
    >>> valid = lightgbm.Dataset(x[300:], y[300:], group=[20] * 5, reference=train)
    >>> params = {"objective": lightgbm_objective(), "metric": "None", "verbose": -1}
    >>> stop, metric = lightgbm.early_stopping(5, verbose=False), lightgbm_metric("ndcg@10")
    >>> model = lightgbm.train(params, train, 50, valid_sets=[valid], feval=metric, callbacks=[stop])
    >>> list(model.best_score["valid_0"])
    ['ndcg@10']
    """
    with needs_extra("boosting"):
        import lightgbm  # noqa: F401
    return LightGBMMetric(name, gain, empty, relevant_at, unlabelled)


class XGBoostMetric(_Metric):
    """See `xgboost_metric`, which makes it."""

    def __init__(self, *arguments: Any, group: Array | None, qid: Array | None) -> None:
        super().__init__(*arguments)
        self.lengths = _lengths(group, qid)

    def __call__(self, y_true: Array, y_pred: Array, sample_weight: Array | None = None) -> Any:
        """(name, value) of (predictions, DMatrix), or the value of (labels, predictions)."""
        value = self._value(_of_xgboost(y_true, y_pred, sample_weight, self.lengths))
        return (self.__name__, value) if _is_of("xgboost", "DMatrix", y_pred) else value


def xgboost_metric(
    name: str = "ndcg@10",
    *,
    gain: Literal["exponential", "linear"] = "exponential",
    empty: Literal["zero", "one", "skip"] = "zero",
    relevant_at: float = 1,
    group: Array | None = None,
    qid: Array | None = None,
    unlabelled: float | None = None,
) -> XGBoostMetric:
    """A metric for XGBoost: ``xgboost.train(..., custom_metric=...)`` or ``XGBRegressor(eval_metric=...)``.

    As `lightgbm_metric`. XGBoost takes a metric for one to minimise unless its name begins with "ndcg" or "map": stop early
    by another one with ``xgboost.callback.EarlyStopping(rounds, maximize=True)``.

    Args:
        name, gain, empty, relevant_at, unlabelled: see `lightgbm_metric`.
        group, qid: in scikit-learn's form, which hands over no groups, those of the set to evaluate, see `xgboost_objective`.

    Raises:
        ImportError: XGBoost is missing.
        ValueError: an argument does not fit, or there are no groups.

    >>> import xgboost
    >>> random = np.random.default_rng(0)
    >>> x, y, qid = random.normal(size=(400, 5)), random.integers(0, 5, 400), np.arange(400) // 20
    >>> train, valid = (xgboost.DMatrix(x[of], y[of], qid=qid[of]) for of in (slice(300), slice(300, 400)))
    >>> options = {"obj": xgboost_objective(), "custom_metric": xgboost_metric("ndcg@10"), "early_stopping_rounds": 5}
    >>> params = {"disable_default_eval_metric": True}
    >>> model = xgboost.train(params, train, 50, evals=[(valid, "valid")], verbose_eval=False, **options)
    >>> model.best_iteration < 45
    True
    """
    with needs_extra("boosting"):
        import xgboost  # noqa: F401
    return XGBoostMetric(name, gain, empty, relevant_at, unlabelled, group=group, qid=qid)


def _is_of(library: str, name: str, value: object) -> bool:
    """Whether a value is of a library's class. Made for it, an objective may also be called where it is not installed."""
    return any(base.__name__ == name and base.__module__.split(".")[0] == library for base in type(value).__mro__)


def _of_lightgbm(first: Array, second: Any, weight: Array | None, group: Array | None) -> _Rows:
    chosen = None
    if _is_of("lightgbm", "Dataset", second):
        scores, labels, weight, group = first, second.get_label(), second.get_weight(), second.get_group()
        chosen = None if second.used_indices is None else np.asarray(second.used_indices)
    else:
        labels, scores = first, second
    if group is None:
        raise ValueError(
            "group: expected the queries' sizes, got none; pass lightgbm.Dataset(..., group=sizes), or group=sizes to "
            "LGBMRanker.fit (LGBMRegressor knows no groups)"
        )
    scores = _predictions(scores)
    lengths = _lengths(group, None, len(scores))
    assert lengths is not None
    weights = None if weight is None else _column("weight", weight, len(scores))
    return _Rows(scores, _column("label", labels, len(scores)), lengths, weights, None, chosen)


def _of_xgboost(first: Array, second: Any, sample_weight: Array | None, bound: np.ndarray | None) -> _Rows:
    lengths, query_weights = bound, None
    if _is_of("xgboost", "DMatrix", second):
        scores, labels = first, second.get_label()
        weights = second.get_weight()
        sample_weight = weights if len(weights) else None
        pointers = np.asarray(second.get_uint_info("group_ptr"))
        if len(pointers):
            lengths = np.diff(pointers.astype(np.int64))
            query_weights, sample_weight = sample_weight, None  # by XGBoost's rule
    else:
        labels, scores = first, second
    if lengths is None:
        raise ValueError(
            "group: expected the queries' sizes, got none; pass xgboost.DMatrix(..., qid=ids), or qid=ids to what "
            "pile_fast makes: XGBoost's scikit-learn interface hands over none"
        )
    scores = _predictions(scores)
    lengths = _fitting(lengths, len(scores))
    weights = None if sample_weight is None else _column("sample_weight", sample_weight, len(scores))
    by_query = None if query_weights is None else _column("weight", query_weights, len(lengths))
    return _Rows(scores, _column("label", labels, len(scores)), lengths, weights, by_query, None)


def _array(name: str, values: Array) -> np.ndarray:
    try:
        # A copy only if need be, but never memory that torch may not take: read-only, or of a negative stride.
        array = np.require(values, dtype=np.float64, requirements=["C", "W"])
    except (TypeError, ValueError):
        raise TypeError(f"{name}: expected numbers, got {type(values).__name__}") from None
    return array


def _column(name: str, values: Array, rows: int | None = None) -> np.ndarray:
    """(rows,) float64."""
    array = _array(name, values)
    if array.ndim != 1:
        raise ValueError(f"{name}: expected (rows,), got {array.shape}")
    if rows is not None and len(array) != rows:
        raise ValueError(f"{name}: expected {rows} numbers, one per row, got {len(array)}")
    return array


def _predictions(values: Array) -> np.ndarray:
    array = _array("predictions", values)
    if array.ndim != 1:
        raise ValueError(f"predictions: expected one per row, got {array.shape}; a ranker has one output")
    return array


def _labels(labels: np.ndarray, unlabelled: float | None) -> Tensor:
    y = torch.from_numpy(labels)
    return y if unlabelled is None else torch.where(y == unlabelled, torch.nan, y)


def _lengths(group: Array | None, qid: Array | None, rows: int | None = None) -> np.ndarray | None:
    """(Q,) int64, the queries' sizes; None where neither is given."""
    if group is not None and qid is not None:
        raise ValueError("group: expected it or qid, got both")
    if qid is not None:
        ids = np.asarray(qid)
        if ids.ndim != 1:
            raise ValueError(f"qid: expected (rows,), got {ids.shape}")
        first = np.flatnonzero(np.concatenate([np.ones(min(len(ids), 1), bool), ids[1:] != ids[:-1]]))
        names, times = np.unique(ids[first], return_counts=True)
        if (times > 1).any():
            raise ValueError(f"qid: expected the rows of a query together, got {names[times > 1][0]!r} in two places")
        return _fitting(np.diff(np.append(first, len(ids))), rows, "qid")
    if group is None:
        return None
    sizes = _array("group", group)
    if sizes.ndim != 1 or not ((sizes >= 0) & (sizes % 1 == 0) & (sizes < math.inf)).all():
        raise ValueError("group: expected the sizes of the queries, whole numbers >= 0, got others")
    return _fitting(sizes.astype(np.int64), rows)


def _fitting(lengths: np.ndarray, rows: int | None, name: str = "group") -> np.ndarray:
    if rows is not None and int(lengths.sum()) != rows:
        raise ValueError(f"{name}: expected the sizes of queries of {rows} rows in all, got those of {int(lengths.sum())}")
    return lengths


def _starts(lengths: Sequence[int] | np.ndarray) -> Tensor:
    """(Q + 1,) cu_seqlens."""
    return torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64))
