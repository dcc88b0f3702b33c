"""The methods of the quality benchmark: each makes students from training lists and has one knob of its own."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import NamedTuple

from _quality_students import MovingTarget, Student
from torch import Tensor

from pile_fast import ensembles, pile_ensemble
from pile_fast.data import RankedLists
from pile_fast.options import DEFAULT_STEP_SIZE

LEARNING_RATES = (3e-3, 1e-2)
TEMPERATURES = (0.5, 1.0, 2.0)
ALPHAS = (0.3, 0.6, 1.0)  # 1: no labels after all
# The epochs at whose start the targets that move with the student are computed. To solve AE-KD's programmes in every
# epoch would take ten times as long as to train.
AE_KD_EPOCHS, GOVERN_EPOCHS = (0, 1, 2, 4, 8), range(1000)


class Method(NamedTuple):
    """A way to make a student.

    Attributes:
        student: (training lists, knob=value) -> Student.
        knob: what is tuned beside the learning rate.
        values: of the knob, as many for every method.
    """

    student: Callable[..., Student]
    knob: str
    values: tuple

    def points(self) -> list[dict]:
        """The grid."""
        return [{self.knob: value, "learning_rate": rate} for value, rate in itertools.product(self.values, LEARNING_RATES)]

    def students(self, lists: RankedLists, points: list[dict]) -> list[Student]:
        """One for each point; what to distil is computed once for points that differ in the learning rate alone."""
        make = functools.lru_cache(lambda value: self.student(lists, **{self.knob: value}))
        return [make(point[self.knob])._replace(learning_rate=point["learning_rate"]) for point in points]


def by(ensemble: Callable) -> Callable[..., Tensor]:
    """(lists, **options) -> logits (D,) of an ensemble of `pile_fast.ensembles`."""

    def target(lists: RankedLists, **options) -> Tensor:
        return ensemble(lists.teacher_logits, lists.labels, cu_seqlens=lists.cu_seqlens, **options).logits

    return target


def stacking(lists: RankedLists, **options) -> Tensor:
    layout = {"cu_seqlens": lists.cu_seqlens}
    fitted = ensembles.StackingEnsemble(**options).fit(lists.teacher_logits, lists.labels, **layout)
    return fitted(lists.teacher_logits, **layout).logits


def pile_from_shared_weights(lists: RankedLists, **options) -> Tensor:
    prior = ensembles.shared_prior(lists.teacher_logits, lists.labels, cu_seqlens=lists.cu_seqlens)
    return by(pile_ensemble)(lists, prior=prior, **options)


def distil(target: Callable[..., object], knob: str | None = None, values: tuple = TEMPERATURES) -> Method:
    """Distil a target. The knob is an option of the target; None = the temperature of the distillation."""

    def student(lists: RankedLists, **option) -> Student:
        return (
            Student(target(lists), lists.labels, **option) if knob is None else Student(target(lists, **option), lists.labels)
        )

    return Method(student, knob or "temperature", values)


def with_labels(target: Callable[..., object]) -> Method:
    """Distil a target and learn from the labels at once; the knob is the share of the distillation."""
    return Method(lambda lists, alpha: Student(target(lists), lists.labels, alpha), "alpha", ALPHAS)


def moving(ensemble: Callable, when) -> Callable[..., MovingTarget]:
    """The target of an ensemble that depends on the student."""

    def target(lists: RankedLists, **options) -> MovingTarget:
        return MovingTarget(lambda z: by(ensemble)(lists, student_logits=z, **options), when)

    return target


_mean, _pile = by(ensembles.mean_ensemble), by(pile_ensemble)
METHODS = {
    "labels": Method(
        lambda lists, pair_weight: Student(None, lists.labels, 0.0, pair_weight=pair_weight),
        "pair_weight",
        (None, "label_gap", "gain_gap"),
    ),
    "mean": distil(_mean),
    "mean + labels": with_labels(_mean),
    "best teacher": distil(by(ensembles.best_teacher_ensemble)),
    "RRF": distil(by(ensembles.rrf_ensemble), "k", (10.0, 60.0, 200.0)),
    "CA-MKD": distil(by(ensembles.ca_mkd_ensemble), "temperature", (0.3, 1.0, 3.0)),
    "EBKD": distil(by(ensembles.ebkd_ensemble), "temperature", (0.3, 1.0, 3.0)),
    "AE-KD": distil(moving(ensembles.ae_kd_ensemble, AE_KD_EPOCHS), "max_weight", (0.3, 0.5, 1.0)),
    "GOVERN": distil(moving(ensembles.govern_ensemble, GOVERN_EPOCHS)),
    "stacking": distil(stacking, "C", (0.01, 0.1, 1.0)),
    "stacking + labels": with_labels(stacking),
    "PILE": distil(_pile, "step_size", (0.3, 1.0, 3.0)),
    "PILE + labels": with_labels(_pile),
    "PILE, query": distil(functools.partial(_pile, granularity="query"), "step_size", (1.0, 3.0, 10.0)),
    "PILE, query, shared prior": distil(
        functools.partial(pile_from_shared_weights, granularity="query"), "step_size", (1.0, 3.0, 10.0)
    ),
    "PILE, shared prior": distil(pile_from_shared_weights, "step_size", (0.3, 1.0, 3.0)),
    "PILE, shared prior + labels": with_labels(pile_from_shared_weights),
    "PILE, query, shared prior + labels": with_labels(functools.partial(pile_from_shared_weights, granularity="query")),
}


def _one_option_away(alpha: float = 1.0, pair_weight: str | None = None, **options) -> Callable[[RankedLists], Student]:
    def student(lists: RankedLists) -> Student:
        target = _pile(lists, pair_weight=pair_weight, **options)
        return Student(target, lists.labels, alpha, pair_weight=pair_weight, learning_rate=LEARNING_RATES[0])

    return student


def _defaults() -> dict[str, Callable[[RankedLists], Student]]:
    """For the study of defaults: for either granularity, one option at a time away from them."""
    studied = {
        "iterations": (1, 3, 30, 100),
        "step_size": (0.03, 0.1, 0.3, 1.0, 3.0, 10.0),
        "normalize": ("center", "none"),
        "temperature": (0.3, 3.0),
        "margin": (0.5, 1.0, 2.0),
        "alpha": (0.25, 0.5, 0.75),
        "pair_weight": ("label_gap", "gain_gap"),
    }
    found = {}
    for granularity in ("document", "query"):
        found[granularity] = _one_option_away(granularity=granularity)
        for option, values in studied.items():
            for value in values:
                if (option, value) != ("step_size", DEFAULT_STEP_SIZE[granularity]):
                    found[f"{granularity}, {option} {value}"] = _one_option_away(granularity=granularity, **{option: value})
    return found


DEFAULTS = _defaults()
