"""The methods of the quality benchmark: each makes a student from training lists, a learning rate and one knob of its own."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import NamedTuple

from _quality_students import MovingTarget, Student

from pile_fast import ensembles, pile_ensemble
from pile_fast.data import RankedLists
from pile_fast.options import DEFAULT_STEP_SIZE

LEARNING_RATES = (3e-3, 1e-2)
TEMPERATURES, ALPHAS, PAIR_WEIGHTS = (0.5, 1.0, 2.0), (0.25, 0.5, 0.75), (None, "label_gap", "gain_gap")
# Their targets move with the student. A full solution of AE-KD's programmes in every step would take a hundred times as long
# as the step.
AE_KD_EPOCHS, GOVERN_EPOCHS = (0, 1, 2, 4, 8), range(1000)


class Method(NamedTuple):
    """A way to make a student.

    Attributes:
        target: training lists -> what to distil, None = labels alone.
        knob: the field of `Student` that is tuned beside the learning rate.
        values: of the knob, as many for every method.
        fixed: the other fields.
    """

    target: Callable[[RankedLists], object] | None
    knob: str = "temperature"
    values: tuple = TEMPERATURES
    fixed: dict = {}

    def points(self) -> list[dict]:
        """The grid."""
        return [{"learning_rate": rate, self.knob: value} for rate, value in itertools.product(LEARNING_RATES, self.values)]

    def students(self, lists: RankedLists, points: list[dict]) -> list[Student]:
        target = None if self.target is None else self.target(lists)
        return [Student(target, lists.labels, **self.fixed, **point) for point in points]


def with_labels(target: Callable[[RankedLists], object]) -> Method:
    return Method(target, "alpha", ALPHAS)


def by(ensemble: Callable, **options) -> Callable[[RankedLists], object]:
    """The target that an ensemble of `pile_fast.ensembles` gives."""
    return lambda lists: ensemble(lists.teacher_logits, lists.labels, cu_seqlens=lists.cu_seqlens, **options).logits


def moving(ensemble: Callable, when) -> Callable[[RankedLists], MovingTarget]:
    def target(lists: RankedLists) -> MovingTarget:
        return MovingTarget(lambda z: by(ensemble, student_logits=z)(lists), when)

    return target


def stacking(lists: RankedLists):
    layout = {"cu_seqlens": lists.cu_seqlens}
    fitted = ensembles.StackingEnsemble().fit(lists.teacher_logits, lists.labels, **layout)
    return fitted(lists.teacher_logits, **layout).logits


METHODS = {
    "labels": Method(None, "pair_weight", PAIR_WEIGHTS, {"alpha": 0.0}),
    "mean": Method(by(ensembles.mean_ensemble)),
    "mean + labels": with_labels(by(ensembles.mean_ensemble)),
    "best teacher": Method(by(ensembles.best_teacher_ensemble)),
    "RRF": Method(by(ensembles.rrf_ensemble)),
    "CA-MKD": Method(by(ensembles.ca_mkd_ensemble)),
    "EBKD": Method(by(ensembles.ebkd_ensemble)),
    "AE-KD": Method(moving(ensembles.ae_kd_ensemble, AE_KD_EPOCHS)),
    "GOVERN": Method(moving(ensembles.govern_ensemble, GOVERN_EPOCHS)),
    "stacking": Method(stacking),
    "PILE": Method(by(pile_ensemble)),
    "PILE + labels": with_labels(by(pile_ensemble)),
    "PILE, query": Method(by(pile_ensemble, granularity="query")),
    "PILE, query + labels": with_labels(by(pile_ensemble, granularity="query")),
}


def _pile(alpha: float = 1.0, pair_weight: str | None = None, **options) -> Callable[[RankedLists], Student]:
    target = by(pile_ensemble, pair_weight=pair_weight, **options)
    return lambda lists: Student(target(lists), lists.labels, alpha, pair_weight=pair_weight, learning_rate=LEARNING_RATES[0])


def _defaults() -> dict[str, Callable[[RankedLists], Student]]:
    """For the study of defaults: one option at a time away from them, for either granularity."""
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
        found[granularity] = _pile(granularity=granularity)
        for option, values in studied.items():
            for value in values:
                if (option, value) != ("step_size", DEFAULT_STEP_SIZE[granularity]):
                    found[f"{granularity}, {option} {value}"] = _pile(granularity=granularity, **{option: value})
    return found


DEFAULTS = _defaults()
