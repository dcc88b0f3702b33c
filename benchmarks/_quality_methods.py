"""The methods of the quality benchmark: each makes students from training lists and has one knob of its own."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from _quality_students import MovingTarget, Student
from torch import Tensor

from pile_fast import PILEEnsemble, ensembles, pile_ensemble, ranking_loss
from pile_fast.data import RankedLists

# The default, or the middle, comes first: a plan may take fewer points.
TEMPERATURES = (1.0, 0.5, 2.0)
ALPHAS = (0.5, 0.25, 0.75)
# The epochs at whose start the targets that move with the student are computed. To solve AE-KD's programmes in every
# epoch would take many times as long as to train.
AE_KD_EPOCHS, GOVERN_EPOCHS = (0, 3), range(1000)


class Method(NamedTuple):
    """A way to make a student.

    Attributes:
        student: (training lists, knob=value) -> Student.
        knob: what is tuned.
        values: of the knob, as many for every method.
        labelled: whether the student depends on the training queries' labels.
    """

    student: Callable[..., Student]
    knob: str
    values: tuple
    labelled: bool

    def points(self) -> list[dict]:
        """The grid."""
        return [{self.knob: value} for value in self.values]


def by(ensemble: Callable, **fixed) -> Callable[..., Tensor]:
    """(lists, **options) -> logits (D,) of an ensemble of `pile_fast.ensembles`."""

    def target(lists: RankedLists, **options) -> Tensor:
        return ensemble(lists.teacher_logits, lists.labels, cu_seqlens=lists.cu_seqlens, **fixed, **options).logits

    return target


def stacking(lists: RankedLists, **options) -> Tensor:
    layout = {"cu_seqlens": lists.cu_seqlens}
    fitted = ensembles.StackingEnsemble(**options).fit(lists.teacher_logits, lists.labels, **layout)
    return fitted(lists.teacher_logits, **layout).logits


def calibrated(lists: RankedLists) -> Tensor:
    """(D, M) teachers' logits as every method sees them."""
    one = functools.partial(ensembles.mean_ensemble, cu_seqlens=lists.cu_seqlens)
    return torch.stack([one(t[:, None]).logits for t in lists.teacher_logits.T], 1)


def weighted(t: Tensor, weights: Tensor) -> Tensor:
    """(D,) weighted means of the present of calibrated logits (D, M)."""
    present = t.isfinite()
    share = (present * weights).sum(1)
    return torch.where(present.any(1), (t.nan_to_num() * weights).sum(1) / share, torch.nan)


def pile(lists: RankedLists, **options) -> PILEEnsemble:
    return pile_ensemble(lists.teacher_logits, lists.labels, cu_seqlens=lists.cu_seqlens, return_weights=True, **options)


def pile_shared(lists: RankedLists, **options) -> Tensor:
    return pile(lists, granularity="shared", **options).logits


def distil(
    target: Callable[..., object], knob: str | None = None, values: tuple = TEMPERATURES, *, labelled: bool, kind="logistic"
) -> Method:
    """Distil a target. The knob is an option of the target; None = the temperature of the distillation."""

    def student(lists: RankedLists, **option) -> Student:
        if knob is None:
            return Student(target(lists), lists.labels, distillation=kind, **option)
        return Student(target(lists, **option), lists.labels, distillation=kind)

    return Method(student, knob or "temperature", values, labelled)


def with_labels(target: Callable[..., object]) -> Method:
    """Distil a target and learn from the labels at once; the knob is the share of the distillation."""
    return Method(lambda lists, alpha: Student(target(lists), lists.labels, alpha), "alpha", ALPHAS, True)


def from_labels(knob: str, values: tuple, label_loss: str = "logistic") -> Method:
    return Method(lambda lists, **option: Student(None, lists.labels, 0.0, label_loss=label_loss, **option), knob, values, True)


def moving(ensemble: Callable, when) -> Callable[..., MovingTarget]:
    """The target of an ensemble that depends on the student."""

    def target(lists: RankedLists, **options) -> MovingTarget:
        return MovingTarget(lambda z: by(ensemble)(lists, student_logits=z, **options), when)

    return target


_mean = by(ensembles.mean_ensemble)
METHODS = {
    "labels": from_labels("pair_weight", (None, "label_gap", "gain_gap")),
    "labels, softmax": from_labels("temperature", TEMPERATURES, "softmax"),
    "mean": distil(_mean, labelled=False),
    "mean, KL": distil(_mean, labelled=False, kind="kl"),
    "mean, MarginMSE": distil(_mean, labelled=False, kind="mse"),
    "mean + labels": with_labels(_mean),
    "RRF": distil(by(ensembles.rrf_ensemble), "k", (60.0, 10.0, 200.0), labelled=False),
    "CA-MKD": distil(by(ensembles.ca_mkd_ensemble), "temperature", (1.0, 0.3, 3.0), labelled=True),
    "EBKD": distil(by(ensembles.ebkd_ensemble), "temperature", (1.0, 0.3, 3.0), labelled=False),
    "AE-KD": distil(moving(ensembles.ae_kd_ensemble, AE_KD_EPOCHS), "max_weight", (1.0, 0.5, 0.3), labelled=False),
    "GOVERN": distil(moving(ensembles.govern_ensemble, GOVERN_EPOCHS), labelled=False),
    "stacking": distil(stacking, "C", (1.0, 0.1, 0.01), labelled=True),
    "stacking + labels": with_labels(stacking),
    "PILE, shared": distil(pile_shared, labelled=True),
    "PILE, shared + labels": with_labels(pile_shared),
    "PILE, document": distil(by(pile_ensemble, granularity="document"), "step_size", (3.0, 1.0, 0.3), labelled=True),
    "PILE, query": distil(by(pile_ensemble, granularity="query"), "step_size", (1.0, 3.0, 10.0), labelled=True),
}
# Those that the parts on damage and on missing scores are run with.
MAIN = ("labels", "mean", "mean + labels", "stacking", "PILE, shared", "PILE, shared + labels")


def one_scale(lists: RankedLists) -> Tensor:
    """PILE, shared, times the one factor that fits the labels best."""
    s = pile_shared(lists)
    return s * _fitted(lists, s[:, None], pull=False)


def free_weights(lists: RankedLists) -> Tensor:
    """Σ β_m t̃_m with β ≥ 0 from the labels, with the same pull to equal weights: a temperature for each teacher."""
    t = calibrated(lists)
    beta = _fitted(lists, t, pull=True)
    return weighted(t, beta + 1e-9) * beta.sum()


def _fitted(lists: RankedLists, t: Tensor, *, pull: bool) -> Tensor:
    """(M,) β ≥ 0 of the least mean label loss of Σ β_m t_m, plus 1/(2n) Σ (M β_m / Σ β − 1)² with `pull`."""
    from scipy.optimize import minimize

    labels = [y[y.isfinite()] for y in lists.labels.split(lists.cu_seqlens.diff().tolist())]
    n = max(1, sum(len(y) > 0 and bool(y.max() > y.min()) for y in labels))  # queries with a pair

    def objective(x):
        beta = torch.tensor(x, dtype=torch.float32, requires_grad=True)
        s = weighted(t, beta + 1e-9) * beta.sum()
        loss = ranking_loss(s, lists.labels, cu_seqlens=lists.cu_seqlens, reduction="sum") / n
        if pull:
            loss = loss + (len(x) * beta / (beta.sum() + 1e-9) - 1).square().sum() / (2 * n)
        (gradient,) = torch.autograd.grad(loss, beta)
        return loss.item(), gradient.double().numpy()

    count = t.shape[1]
    found = minimize(objective, [1 / count] * count, jac=True, bounds=[(0.0, 10.0)] * count, method="L-BFGS-B")
    return torch.tensor(found.x, dtype=torch.float32)


def _variants() -> dict[str, Callable[[RankedLists], Tensor]]:
    """Targets: the mean, PILE with shared weights, and that with one option away from its default."""
    studied = {
        "iterations": (10, 160),
        "step_size": (1.0, 10.0),
        "shrinkage": (0.0, 0.1, 10.0),
        "normalize": ("center", "none", "minmax"),
        "temperature": (0.3, 3.0),
    }
    one_away = {
        f"{option} {value:g}" if isinstance(value, float) else f"{option} {value}": functools.partial(
            pile_shared, **{option: value}
        )
        for option, values in studied.items()
        for value in values
    }
    return {"mean": _mean, "default": pile_shared} | one_away | {"one fitted scale": one_scale, "free weights": free_weights}


VARIANTS = _variants()
