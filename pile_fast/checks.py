"""Checks of values that users give: each returns the value as it is used, or raises an error that begins with the name.

Written so that `torch.compile` can trace them: values may be symbolic numbers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence


def number(name: str, value: object, *, low: float = -math.inf, high: float = math.inf, open_low: bool = False) -> float:
    """A finite number from `low` to `high`; `open_low`: `low` itself is none."""
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


def count(name: str, value: object) -> int:
    """An int >= 0."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
    if value < 0:
        raise ValueError(f"{name}: expected an int >= 0, got {value}")
    return value


def positive_count(name: str, value: object) -> int:
    """An int >= 1."""
    if count(name, value) == 0:
        raise ValueError(f"{name}: expected an int >= 1, got 0")
    return int(value)  # type: ignore[call-overload, no-any-return]


def choice(name: str, value: object, choices: Sequence[str | None]) -> str:
    """One of the choices; None is called "none"."""
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, choices))}, got {value!r}")
    return "none" if value is None else str(value)
