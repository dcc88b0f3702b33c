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
import itertools
import json
import math
import multiprocessing.connection
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import _quality_data
import _quality_report
import torch
from _quality_data import CAST, CAST_NAN, DAMAGES, DATA_SETS, EXAMPLE, FITTED, NAN, Fold, damaged, with_share
from _quality_methods import MAIN, METHODS, VARIANTS, calibrated, pile, weighted
from _quality_students import Student, quality_on, train
from _timing import OtherLoad, where
from torch import Tensor
from tqdm import tqdm

from pile_fast.data import RankedLists, find_data
from pile_fast.evaluation.metrics import average_precision, mrr, ndcg

RESULTS = Path(__file__).with_name("results") / "quality"
CACHE = Path(__file__).parent.parent / "runs" / "quality"  # fitted teachers' logits: data, so not in the repository
FOLDERS = ("mq2008", "mq2008_agg", "cast2021", "lightgbm_rank")
PHASES = ("compare", "damage", "teachers", "variants")
SHARES = (1.0, 0.2, 0.05)  # of the queries, whose labels are used


@dataclasses.dataclass(frozen=True)
class Plan:
    """How much is run."""

    data_sets: tuple[str, ...] = tuple(DATA_SETS)
    folds: tuple[int, ...] = (1, 2, 3, 4, 5)
    methods: tuple[str, ...] = tuple(METHODS)
    points: int = 1  # of each method's grid of three
    seeds: tuple[int, ...] = tuple(range(3))
    damages: tuple[tuple[str, float], ...] = DAMAGES
    epochs: int = 10


SMOKE = Plan(
    data_sets=(CAST, EXAMPLE), folds=(1,), seeds=(0, 1), damages=(("negated", 2), ("scaled", 3)), epochs=2
)  # fmt: skip


class Unit(NamedTuple):
    """A piece of work that is done whole or not at all."""

    phase: str
    data: str
    fold: int
    damage: str = ""
    level: float = 0.0


def units(phase: str, plan: Plan) -> Iterator[Unit]:
    """In the order in which an unfinished run is of most use."""
    for fold in plan.folds:
        for data in plan.data_sets:
            if phase == "damage":
                if data in FITTED:
                    yield from (Unit(phase, data, fold, *damage) for damage in plan.damages)
            elif data != NAN or phase != "variants":
                yield Unit(phase, data, fold)
        if phase == "compare" and CAST in plan.data_sets:
            yield Unit(phase, CAST_NAN, fold)


def runs_of(data: str, methods: Sequence[str]) -> list[tuple[str, tuple[float, ...]]]:
    """The methods that are run on a data set, and the shares of labels that they are run with.

    With fewer labels those run that do not depend on the labels, which costs nothing more, and the main ones.
    """
    if data == CAST_NAN:
        return [(method, SHARES[:1]) for method in methods if method in MAIN]
    every = data != NAN
    return [(m, SHARES if every and (m in MAIN or not METHODS[m].labelled) else SHARES[:1]) for m in methods]


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


def work(unit: Unit, plan: Plan, folder: Path | None, points: dict[str, dict] | None) -> dict:
    """What a unit finds; runs in a process of its own. `points`: in the phase "damage" the chosen one of each method."""
    torch.set_num_threads(1)
    start = time.perf_counter()
    fold = _fold(unit.data, unit.fold, folder)
    record = {"seeds": list(plan.seeds), "epochs": plan.epochs}
    if unit.phase == "compare":
        record["found"] = _compare(fold, unit, plan)
    elif unit.phase == "damage":
        record["found"] = _damage(fold, unit, plan, points)
    elif unit.phase == "variants":
        record["found"] = _variants(fold, unit, plan)
    else:
        record = describe(fold)
    return record | {"seconds": round(time.perf_counter() - start, 2)}


def _labelled(fold: Fold, shares: Sequence[float], number: int) -> tuple[list[RankedLists], list[RankedLists]]:
    """The training and the validation queries, labelled by each of the shares."""
    train = [with_share(fold.train, share, number) for share in shares]
    return train, [with_share(fold.validation, share, number, keep_few=True) for share in shares]


def _compare(fold: Fold, unit: Unit, plan: Plan) -> list[dict]:
    """For each method and share of labels its students at the point of the best mean on the validation queries."""
    lists, validations = _labelled(fold, SHARES, unit.fold)
    students: list[Student] = []
    runs = []  # method, share, its point, its student
    for name, shares in runs_of(unit.data, plan.methods):
        method = METHODS[name]
        for i in range(len(shares)):
            points = method.points()[: plan.points]
            if method.labelled or i == 0:  # one that does not depend on the labels is trained once
                first = len(students)
                students += [method.student(lists[i], **point) for point in points]
            runs.append((name, i, points, first))
    stacks = train(students, plan.seeds, fold.train, validations, epochs=plan.epochs)
    scores = [stack.scores(fold.test.features) for stack, _ in stacks]
    found = []
    for name, i, points, first in runs:
        validation = stacks[i][1][first : first + len(points)].mean(1)
        best = int(validation.argmax())
        chosen = {"method": name, "share": SHARES[i], "point": points[best], "validation": round(float(validation[best]), 4)}
        found.append(chosen | quality_of(fold.test.labels, fold.test.cu_seqlens, scores[i][first + best], MRR_AND_MAP))
    return found


def _damage(fold: Fold, unit: Unit, plan: Plan, points: dict[str, dict]) -> list[dict]:
    lists = damaged(fold.train, unit.damage, unit.level, unit.fold)
    students = [METHODS[name].student(lists, **point) for name, point in points.items()]
    ((stack, _),) = train(students, plan.seeds, lists, [fold.validation], epochs=plan.epochs)
    scores = stack.scores(fold.test.features)
    return [{"method": name} | quality_of(fold.test.labels, fold.test.cu_seqlens, scores[k]) for k, name in enumerate(points)]


def _variants(fold: Fold, unit: Unit, plan: Plan) -> list[dict]:
    """Students of `VARIANTS`, with all labels and with the fewest."""
    shares = (SHARES[0], SHARES[-1])
    lists, validations = _labelled(fold, shares, unit.fold)
    keys = [(i, name) for i in range(len(shares)) for name in VARIANTS]
    students = [Student(VARIANTS[name](lists[i]), lists[i].labels) for i, name in keys]
    stacks = train(students, plan.seeds, fold.train, validations, epochs=plan.epochs)
    scores = [stack.scores(fold.test.features) for stack, _ in stacks]
    return [
        {"method": name, "share": shares[i]} | quality_of(fold.test.labels, fold.test.cu_seqlens, scores[i][k])
        for k, (i, name) in enumerate(keys)
    ]


def describe(fold: Fold) -> dict:
    """The teachers (NDCG@10 on the test queries, mean correlation of two, share of missing scores) and the weights that all
    queries share, fitted to the training queries by each share of labels, with their ensemble's NDCG@10 on the test queries."""
    test, t = fold.test, calibrated(fold.test)

    def score(logits: Tensor) -> float:
        """What has no logit ranks last."""
        return round(float(quality_on(test, logits.nan_to_num(nan=-1e4)[None, None])), 5)

    each = calibrated(fold.train)
    found = [(a * b).nanmean() for a, b in itertools.combinations(each.T, 2)]
    weights = {}
    for share in SHARES:
        w = pile(with_share(fold.train, share, 1), granularity="shared").weights
        weights[str(share)] = {"weights": _rounded(w), "test": score(weighted(t, w))}
    return {
        "teachers": dict(zip(test.teacher_names, map(score, test.teacher_logits.T), strict=True)),
        "mean": score(weighted(t, torch.ones(t.shape[1]))),
        "shared": weights,
        "correlation": round(float(torch.stack(found).nanmean()), 3),
        "missing": round(float(fold.train.teacher_logits.isnan().float().mean()), 3),
    }


MRR_AND_MAP = {"mrr": mrr, "map": average_precision}


def quality_of(labels: Tensor, cu_seqlens: Tensor, scores: Tensor, others: Mapping[str, Callable] = {}) -> dict:
    """Of scores (S, D): NDCG@10 and `others` per seed, and each query's NDCG@10 as the mean over the seeds."""
    seeds = scores.shape[0]
    lengths = cu_seqlens.diff().repeat(seeds)
    layout = {"cu_seqlens": torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)])}
    ranked = {"empty": "skip", "reduction": "none"} | layout
    scores, labels = scores.flatten(), labels.repeat(seeds)
    values = {"ndcg@10": ndcg(scores, labels, k=10, ties="average", **ranked)}
    values |= {name: metric(scores, labels, **ranked) for name, metric in others.items()}
    values = {name: value.view(seeds, -1).double() for name, value in values.items()}
    return {
        "test": {name: _rounded(value.nanmean(1)) for name, value in values.items()},
        "queries": _rounded(values["ndcg@10"].mean(0)),
    }


def _rounded(values: Tensor) -> list[float | None]:
    return [None if math.isnan(v) else round(v, 4) for v in values.tolist()]


def run(phases: list[str], plan: Plan, data: Path | None, folder: Path, processes: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    results = {phase: Results(folder, phase) for phase in {*phases, "compare"}}
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
                points = _chosen(results["compare"], unit) if phase == "damage" else None
                futures[pool.submit(work, unit, plan, data, points)] = unit
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


def _chosen(results: Results, unit: Unit) -> dict[str, dict]:
    """The points that the comparison chose with all labels, without damage."""
    compared = results.records.get(Unit("compare", unit.data, unit.fold))
    if compared is None:
        raise SystemExit(f"damage: needs the phase compare first ({unit.data}, fold {unit.fold})")
    return {f["method"]: f["point"] for f in compared["found"] if f["share"] == SHARES[0] and f["method"] in MAIN}


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
    for record in records["compare"] + records["damage"] + records["variants"]:
        for found in record["found"]:
            values = [v for v in found["queries"] if v is not None]
            assert values and all(0 <= v <= 1 for v in values) and all(0 < v <= 1 for v in found["test"]["ndcg@10"]), record
    for record in records["teachers"]:
        assert record["shared"]["1.0"]["test"] > min(record["teachers"].values()), record  # weights that know the labels
        assert all(abs(sum(of["weights"]) - 1) < 0.01 for of in record["shared"].values()), record


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(PHASES), help="phases to run (default: %(default)s)")
    parser.add_argument("--data", type=Path, help=f"folder with {', '.join(FOLDERS)} (default: $PILE_FAST_DATA, data/)")
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
    missing = [name for name in FOLDERS if data is None or not (data / name).is_dir()]
    if args.smoke:
        with tempfile.TemporaryDirectory() as folder:
            run(list(PHASES), SMOKE, None if missing else data, Path(folder), args.processes)
            check(Path(folder))
            print(_quality_report.tables(Path(folder))["students"])
        return 0
    if missing:
        parser.error(
            f"--data, $PILE_FAST_DATA or data/: expected a folder with {', '.join(FOLDERS)}; lacks {', '.join(missing)}"
        )
    run(phases, Plan(), data, args.output, args.processes)
    return 0


if __name__ == "__main__":
    sys.exit(main())
