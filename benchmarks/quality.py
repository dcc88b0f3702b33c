"""Whose students rank best: PILE's beside those of every other ensemble and of labels alone. See docs/quality.md.

python benchmarks/quality.py [--only a,b,...] [--processes N] [--report] [--smoke]

What is finished is kept in results/quality/*.jsonl, a line per unit of work: after a kill the same command resumes.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import datetime
import functools
import json
import math
import multiprocessing.connection
import os
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import _quality_data
import _quality_ensembles
import _quality_report
import torch
from _quality_data import BOTTOM, CROSSFIT, DAMAGES, DATA_SETS, NAN, Fold
from _quality_methods import DEFAULTS, METHODS
from _quality_students import train
from _timing import OtherLoad, where
from torch import Tensor
from tqdm import tqdm

from pile_fast.data import find_data
from pile_fast.evaluation.metrics import average_precision, mrr, ndcg, pair_counts

RESULTS = Path(__file__).with_name("results") / "quality"
CACHE = Path(__file__).parent.parent / "runs" / "quality"  # teachers' logits on MQ2008: data, so not in the repository
PHASES = ("ensembles", "tune", "compare", "damage", "defaults")


@dataclasses.dataclass(frozen=True)
class Plan:
    """How much is run."""

    data_sets: tuple[str, ...] = tuple(DATA_SETS)
    folds: tuple[int, ...] = (1, 2, 3, 4, 5)
    points: int | None = None  # of each method's grid; None = all
    tuning_seeds: tuple[int, ...] = tuple(range(100, 104))
    seeds: tuple[int, ...] = tuple(range(10))
    damage_seeds: tuple[int, ...] = tuple(range(3))
    damages: tuple[tuple[str, float], ...] = tuple((kind, level) for kind, levels in DAMAGES.items() for level in levels)
    defaults_seeds: tuple[int, ...] = tuple(range(200, 203))
    epochs: int = 15


SMOKE = Plan(
    data_sets=(CROSSFIT, BOTTOM), folds=(1,), points=1, tuning_seeds=(100,), seeds=(0, 1), damage_seeds=(0,),
    damages=tuple((kind, levels[-1]) for kind, levels in DAMAGES.items()), defaults_seeds=(200,), epochs=3,
)  # fmt: skip


class Unit(NamedTuple):
    """A piece of work that is done whole or not at all."""

    phase: str
    data: str
    fold: int
    method: str = ""  # of `METHODS`, or of `DEFAULTS` in the phase "defaults"
    damage: str = ""
    level: float = 0.0


def units(phase: str, plan: Plan) -> Iterator[Unit]:
    """In the order in which an unfinished run is of most use."""
    if phase == "damage":
        for fold in plan.folds:
            yield from (Unit(phase, CROSSFIT, fold, method, *damage) for damage in plan.damages for method in METHODS)
        return
    for data in plan.data_sets:
        for fold in plan.folds:
            if phase == "ensembles":
                yield Unit(phase, data, fold)
            elif phase in ("tune", "compare"):
                yield from (Unit(phase, data, fold, method) for method in METHODS)
            elif data != NAN:
                yield from (Unit(phase, data, fold, name) for name in DEFAULTS)


class Results:
    """The finished units of a phase, a JSON line each. A line is written in one piece; half a line, of a crash, is dropped."""

    def __init__(self, folder: Path, phase: str):
        self.path = folder / f"{phase}.jsonl"
        self.records: dict[Unit, dict] = {}
        if self.path.is_file():
            text = self.path.read_bytes()
            whole = text[: text.rfind(b"\n") + 1]
            if len(whole) < len(text):
                os.truncate(self.path, len(whole))
            for line in whole.splitlines():
                record = json.loads(line)
                self.records[Unit(*(record[field] for field in Unit._fields))] = record

    def add(self, unit: Unit, record: dict) -> None:
        record = unit._asdict() | record
        line = json.dumps(record, separators=(",", ":"), allow_nan=False) + "\n"
        with open(self.path, "ab", buffering=0) as file:
            file.write(line.encode())
        self.records[unit] = record


@functools.lru_cache(maxsize=4)
def _fold(data: str, number: int, folder: Path | None) -> Fold:
    return _quality_data.load(data, number, folder, CACHE)


def work(unit: Unit, plan: Plan, folder: Path | None, point: dict | None) -> dict:
    """What a unit finds; runs in a process of its own."""
    torch.set_num_threads(1)
    start = time.perf_counter()
    fold = _fold(unit.data, unit.fold, folder)
    if unit.phase == "ensembles":
        return _quality_ensembles.describe(fold)
    lists = _quality_data.damaged(fold.train, unit.damage, unit.level, unit.fold) if unit.damage else fold.train
    if unit.phase == "defaults":
        students, seeds = [DEFAULTS[unit.method](lists)], plan.defaults_seeds
    elif unit.phase == "tune":
        points, seeds = METHODS[unit.method].points()[: plan.points], plan.tuning_seeds
        students = METHODS[unit.method].students(lists, points)
    else:
        students, seeds = METHODS[unit.method].students(lists, [point]), plan.damage_seeds if unit.damage else plan.seeds
    stack, validation = train(students, seeds, lists, fold.validation, epochs=plan.epochs)
    record = {"seeds": list(seeds), "epochs": plan.epochs}
    if unit.phase == "tune":
        record["points"] = [p | {"validation": _rounded(v)} for p, v in zip(points, validation, strict=True)]
    else:
        record |= {"point": point, "validation": _rounded(validation[0])}
        scores = stack.scores(fold.test.features)[0]
        record |= quality_of(fold.test.labels, fold.test.cu_seqlens, scores, every_metric=unit.phase == "compare")
    return record | {"seconds": round(time.perf_counter() - start, 2)}


def quality_of(labels: Tensor, cu_seqlens: Tensor, scores: Tensor, every_metric: bool) -> dict:
    """Of scores (S, D): NDCG@10 per seed; with `every_metric` MRR and MAP too, and each query's means over the seeds."""
    seeds = scores.shape[0]
    lengths = cu_seqlens.diff().repeat(seeds)
    layout = {"cu_seqlens": torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)])}
    scores, labels = scores.flatten(), labels.repeat(seeds)
    ranked = {"empty": "skip", "reduction": "none"} | layout
    values = {"ndcg@10": ndcg(scores, labels, k=10, ties="average", **ranked)}
    if every_metric:
        counts = pair_counts(scores, labels, **layout)
        values["mrr"] = mrr(scores, labels, **ranked)
        values["map"] = average_precision(scores, labels, **ranked)
        values["concordant"] = counts.concordant + counts.tied / 2
        values["discordant"] = counts.discordant + counts.tied / 2
    values = {name: value.view(seeds, -1).double() for name, value in values.items()}
    quality = {"test": {name: _rounded(value.nanmean(1)) for name, value in values.items()}}
    if every_metric:  # the queries' values are for the tests, which compare students of undamaged data only
        quality["queries"] = {name: _rounded(value.mean(0)) for name, value in values.items()}
    return quality


def _rounded(values: Tensor) -> list[float | None]:
    return [None if math.isnan(v) else round(v, 5) for v in values.tolist()]


def best_point(record: dict) -> dict:
    """The grid point of the best mean over the tuning seeds on the validation queries."""
    best = max(record["points"], key=lambda p: sum(p["validation"]))
    return {name: value for name, value in best.items() if name != "validation"}


def run(phases: list[str], plan: Plan, data: Path | None, folder: Path, processes: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    results = {phase: Results(folder, phase) for phase in {*phases, "tune"}}
    start, others, finished = time.monotonic(), OtherLoad(), 0
    name = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")

    def note(what: dict) -> None:
        with open(folder / "runs.jsonl", "a") as file:
            file.write(json.dumps({"run": name} | what) + "\n")

    note({"phases": phases, "processes": processes, **where(1)})
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(processes, context, _end_with_the_parent) as pool:
        for phase in phases:
            todo = [unit for unit in units(phase, plan) if unit not in results[phase].records]
            futures = {}
            for unit in todo:
                point = None
                if phase in ("compare", "damage"):
                    tuned = results["tune"].records.get(Unit("tune", unit.data, unit.fold, unit.method))
                    if tuned is None:
                        raise SystemExit(f"{phase}: needs the phase tune first ({unit.data}, fold {unit.fold}, {unit.method})")
                    point = best_point(tuned)
                futures[pool.submit(work, unit, plan, data, point)] = unit
            try:
                done = concurrent.futures.as_completed(futures)
                for future in tqdm(done, desc=phase, total=len(futures), unit="unit", disable=not futures):
                    results[phase].add(futures[future], future.result() | {"run": name})
                    finished += 1
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
    # After the workers have ended, whose time is only then known to be this run's.
    minutes = (time.monotonic() - start) / 60
    note({"units": finished, "minutes": round(minutes, 1), "cores_taken_by_others": others.cores()})


def _end_with_the_parent() -> None:
    """Let a worker end when the run is killed; otherwise it would wait for work for ever."""
    sentinel = multiprocessing.parent_process().sentinel

    def watch() -> None:
        multiprocessing.connection.wait([sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def check(folder: Path) -> None:
    """That a run's figures are figures: complete, in range, and better than chance."""
    records = {phase: list(Results(folder, phase).records.values()) for phase in PHASES}
    assert all(records.values()), {phase: len(found) for phase, found in records.items()}
    for record in records["compare"]:
        values = [v for v in record["queries"]["ndcg@10"] if v is not None]
        assert values and all(0 <= v <= 1 for v in values), record
    for record in records["compare"] + records["damage"] + records["defaults"]:
        assert all(0 < v <= 1 for v in record["validation"] + record["test"]["ndcg@10"]), record
    for record in records["ensembles"]:
        quality = record["ensembles"]
        # With labels PILE fits them; without it is the mean of the teachers, to the bit.
        assert quality["pile"]["leak"] > quality["mean"]["leak"] and quality["pile"]["hidden"] == quality["mean"]["hidden"], (
            record
        )
    labels = [r for r in records["compare"] if r["method"] == "labels" and r["data"] == CROSSFIT]
    share = [sum(r["queries"]["concordant"]) / sum(r["queries"]["concordant"] + r["queries"]["discordant"]) for r in labels]
    assert min(share) > 0.6, (
        f"students of labels alone order {min(share):.2f} of the test pairs as the labels do: chance is 0.5"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(PHASES), help="phases to run (default: %(default)s)")
    parser.add_argument("--data", type=Path, help="folder with mq2008/ and mq2008_agg/ (default: $PILE_FAST_DATA, data/)")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="of one thread each (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=RESULTS, help="where results are and go (default: %(default)s)")
    parser.add_argument("--report", action="store_true", help="run nothing; write report.md and its plots beside the results")
    parser.add_argument("--smoke", action="store_true", help="a little of everything in a temporary folder, checked")
    args = parser.parse_args()
    phases = args.only.split(",")
    if unknown := set(phases) - set(PHASES):
        parser.error(f"--only: no phase {', '.join(sorted(unknown))}")
    if args.report:
        _quality_report.write(args.output)
        return 0
    data = find_data("mq2008", args.data)
    if data is not None and not (data / "mq2008").is_dir():
        data = None
    if args.smoke:
        with tempfile.TemporaryDirectory() as folder:
            run(list(PHASES), SMOKE, data, Path(folder), args.processes)
            check(Path(folder))
            print(_quality_report.tables(Path(folder))["students"])
        return 0
    if data is None:
        parser.error("needs MQ2008: --data, $PILE_FAST_DATA or data/ with mq2008/ and mq2008_agg/")
    run(phases, Plan(), data, args.output, args.processes)
    return 0


if __name__ == "__main__":
    sys.exit(main())
