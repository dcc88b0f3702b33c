"""Interleaved timing, and where a measurement was taken."""

from __future__ import annotations

import datetime
import gc
import os
import platform
import random
import re
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from _turn import take_times

import pile_fast
from pile_fast import _cpu

# Shorter calls notice what ran before them: data evicted from the caches; another provider's threads, which spin for some
# milliseconds more; their own, which sleep and may wake on a core that is taken. In a training loop none of that happens.
SHORT = 0.05
PAUSE = 0.01
WARM = 0.02
TURN = 0.02  # seconds of one provider before the next has its turn


class Times(NamedTuple):
    p20_ms: float
    p50_ms: float
    p80_ms: float
    reps: int


def turn(run: Callable, repeats: int, batch: int, short: bool, before: Callable | None = None) -> list[float]:
    """Seconds of `repeats` times `batch` calls of `run`, which was called before."""
    if short:
        time.sleep(PAUSE)
    return take_times(run, repeats, batch, WARM if short else 0.0, before)


def interleave(
    calls: dict[Any, Callable], seconds: float, *, before: dict[Any, Callable] | None = None, batch: int = 1,
    min_rounds: int = 5, max_rounds: int = 60, turn: Callable = turn,
) -> dict[Any, Times]:  # fmt: skip
    """Time `calls` in rounds, each of which gives every call one turn, in random order.

    A turn takes one time or, of short calls, up to 20. A short call's turn begins with a pause and calls that do not count.
    Calls too short for the clock are timed `batch` at a time.

    Args:
        calls: what to time; each was called before.
        seconds: about how long all of it may take, within `min_rounds` and `max_rounds`.
        before: what runs, not timed, right before each time of some calls.
        turn: how a turn is taken, if `calls` are not functions of this process.
    """
    before = before or {}
    cost = {name: turn(run, 1, batch, False)[0] for name, run in calls.items()}
    repeats = {name: min(20, max(1, int(TURN / (spent * batch)))) for name, spent in cost.items()}
    one_round = sum(cost[name] * batch * repeats[name] for name in calls)
    rounds = min(max_rounds, max(min_rounds, int(seconds / one_round)))
    times = {name: [] for name in calls}
    shuffled, order = random.Random(0), list(calls)
    gc.collect()
    gc.disable()
    try:
        for _ in range(rounds):
            shuffled.shuffle(order)
            for name in order:
                more = [before[name]] if name in before else []
                times[name] += turn(calls[name], repeats[name], batch, cost[name] < SHORT, *more)
    finally:
        gc.enable()
    return {name: Times(*(np.percentile(t, [20, 50, 80]) * 1e3).tolist(), len(t) * batch) for name, t in times.items()}


def where(threads: int) -> dict:
    """Machine, versions, commit and date of a measurement."""
    return {
        "machine": {
            "cpu": cpu_name(),
            "cores": os.cpu_count(),
            "threads": threads,
            "instruction_set": _cpu.instruction_set(),
            "system": f"{platform.system()} {platform.machine()}",
        },
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "pile_fast": pile_fast.__version__},
        "commit": _commit(),
        "date": datetime.date.today().isoformat(),
    }


class OtherLoad:
    """How many cores' worth of time other processes took since this was made. An eager call on two threads that has to share
    its cores takes many times as long, and every ratio to it becomes a fiction."""

    def __init__(self):
        self.start = self._now()

    def cores(self) -> float | None:
        """None where the system does not say."""
        now = self._now()
        if now is None or self.start is None:
            return None
        elapsed, everyone, own = (after - before for after, before in zip(now, self.start, strict=True))
        return max(0.0, everyone - own) / elapsed if elapsed > 0 else None

    @staticmethod
    def _now() -> tuple[float, float, float] | None:
        try:
            user, nice, system, _, _, irq, softirq, steal = map(int, Path("/proc/stat").read_text().split()[1:9])
        except (OSError, ValueError):
            return None
        busy = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
        return time.monotonic(), busy, sum(os.times()[:4])


def cpu_name() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        text = ""
    names = re.findall(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    if not names:
        return platform.processor() or platform.machine()
    name = names[0].strip()
    if any(c.isdigit() for c in name):
        return name
    # A virtual machine may hide the model, which two results must not be confused about.
    family, model = (re.search(rf"^{key}\s*:\s*(\d+)$", text, re.MULTILINE) for key in ("cpu family", "model"))
    return f"{name} family {family[1]} model {model[1]}" if family and model else name


def machine_slug(threads: int) -> str:
    name = re.sub(r"\((r|tm)\)|\bcpu\b|@.*", " ", cpu_name().lower())
    return re.sub(r"[^a-z0-9]+", "-", f"{name} {threads} threads").strip("-")


def _commit() -> str | None:
    """The checkout's commit, with a + if its tracked files differ from it (results apart, which measuring writes)."""

    def git(*arguments):
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    sources = ("--", ":/", ":(top,exclude)benchmarks/results")
    try:
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no", *sources) else "")
    except (OSError, subprocess.CalledProcessError):
        return None
