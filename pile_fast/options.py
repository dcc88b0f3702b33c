"""The options of the ensemble and of the losses: one place for their names, their defaults and their checks.

An option set is a flat `NamedTuple` whose field order is the argument order of the registered ops, so that it can be
unpacked into a call. The two builders validate once per distinct set (they are cached) and cost a dictionary look-up
on every later call: short lists live or die by such overhead.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch

GRANULARITIES = ("document", "query")
NORMALIZATIONS = ("zscore", "center", "none")
PAIR_WEIGHTS = (None, "label_gap", "gain_gap")
PAIR_SUMS = ("auto", "direct", "chebyshev")
DISTILLATIONS = ("logistic", "mse")
REDUCTIONS = ("mean", "sum", "none")
DEFAULT_STEP_SIZE = {"document": 3.0, "query": 1.0}


class EnsembleOptions(NamedTuple):
    """Options of the iterative reweighting, validated. `pair_weight` is "none" where the user gave None."""

    iterations: int
    step_size: float
    granularity: str
    normalize: str
    temperature: float
    margin: float
    pair_weight: str
    pairwise: str


class LossOptions(NamedTuple):
    """Options of the student's loss, validated. `pair_weight` is "none" where the user gave None."""

    alpha: float
    distillation: str
    distillation_temperature: float
    pair_weight: str
    reduction: str
    pairwise: str


def number(name: str, value, *, low: float = -math.inf, high: float = math.inf, open_low: bool = False) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    # Comparisons, not math.isfinite: tracers with dynamic shapes hand in symbolic floats.
    inside = -math.inf < value < math.inf and value <= high and (value > low if open_low else value >= low)
    if not inside:
        bounds = f"{'>' if open_low else '>='} {low:g}" if low > -math.inf else "finite"
        if high < math.inf:
            bounds += f" and <= {high:g}"
        raise ValueError(f"{name}: expected a number {bounds}, got {value!r}")
    return float(value)


def choice(name: str, value, choices):
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, choices))}, got {value!r}")
    return "none" if value is None else value


def _cached(builder):
    """Cache a builder by its arguments; an unhashable argument goes to the builder itself, whose check names it."""
    cached = functools.lru_cache(maxsize=256, typed=True)(builder)

    @functools.wraps(builder)
    def build(*args):
        if torch.compiler.is_compiling():  # tracers cannot look into the cache
            return builder(*args)
        try:
            return cached(*args)
        except TypeError:
            return builder(*args)

    return build


@_cached
def ensemble_options(
    iterations, step_size, granularity, normalize, temperature, margin, pair_weight, pairwise
) -> EnsembleOptions:
    """Validate the ensemble's options; `step_size=None` becomes the granularity's default."""
    if isinstance(iterations, bool) or not isinstance(iterations, int):
        raise TypeError(f"iterations: expected an int, got {type(iterations).__name__}")
    if iterations < 0:
        raise ValueError(f"iterations: expected an int >= 0, got {iterations}")
    choice("granularity", granularity, GRANULARITIES)
    if step_size is None:
        step_size = DEFAULT_STEP_SIZE[granularity]
    return EnsembleOptions(
        iterations,
        number("step_size", step_size, low=0.0),
        granularity,
        choice("normalize", normalize, NORMALIZATIONS),
        number("temperature", temperature, low=0.0, open_low=True),
        number("margin", margin),
        choice("pair_weight", pair_weight, PAIR_WEIGHTS),
        choice("pairwise", pairwise, PAIR_SUMS),
    )


@_cached
def loss_options(alpha, distillation, distillation_temperature, pair_weight, reduction, pairwise) -> LossOptions:
    """Validate the options of the student's loss."""
    return LossOptions(
        number("alpha", alpha, low=0.0, high=1.0),
        choice("distillation", distillation, DISTILLATIONS),
        number("distillation_temperature", distillation_temperature, low=0.0, open_low=True),
        choice("pair_weight", pair_weight, PAIR_WEIGHTS),
        choice("reduction", reduction, REDUCTIONS),
        choice("pairwise", pairwise, PAIR_SUMS),
    )
