"""Taking times; needs no PyTorch, for processes that have none."""

from __future__ import annotations

import time
from collections.abc import Callable


def take_times(run: Callable, repeats: int, batch: int, warm: float, before: Callable | None = None) -> list[float]:
    """Seconds of `run`, `repeats` times over `batch` calls, after `warm` seconds of calls that do not count.

    `before` runs right before each time and is not timed.
    """
    end = time.perf_counter() + warm
    while time.perf_counter() < end:
        run()
    times = []
    for _ in range(repeats):
        if before:
            before()
        start = time.perf_counter()
        for _ in range(batch):
            run()
        times.append((time.perf_counter() - start) / batch)
    return times
