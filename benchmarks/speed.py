"""How fast pile_fast is on this CPU, beside PyTorch, and how far from what the CPU can do: see README.md.

python benchmarks/speed.py [--only a,b,...] [--quick] [--threads N] [--output DIR]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import _floors
import _overhead
import torch
from _cases import ITERATIONS, OPS, Check, Data, Op, call, make_data, plain_torch
from _report import BUSY, EAGER, SHAPES, goals, markdown
from _timing import OtherLoad, interleave, machine_slug, where
from tqdm import tqdm

PAIR_SUMS = ("direct", "chebyshev", "auto")
LONG = (262_144, 1_000_000)
LENGTHS = (1_000, 10_000, 100_000, 1_000_000)
CROSSOVER = (64, 96, 128, 192, 256, 384, 512)
MEMORY_SHAPES = ((1, 1_000_000, 8), (256, 1024, 8))


class Case(NamedTuple):
    """One thing to time."""

    provider: str
    data: Data
    run: Callable
    layout: str = ""
    before: Callable | None = None  # runs, not timed, right before each time
    check: bool = True  # False: it does not compute what `data` defines, so there is nothing to hold it against


class Run:
    """The rows of one run, one per thing measured, and how it is measured."""

    def __init__(self, threads: int, quick: bool, seconds: float):
        self.threads, self.quick, self.seconds = threads, quick, 0.1 if quick else seconds
        self.rows: list[dict] = []
        self.progress = tqdm(bar_format="{desc} [{elapsed}]", file=sys.stderr)

    def say(self, *words) -> None:
        self.progress.set_description_str(" · ".join(str(word) for word in words if word))

    def row(self, section: str, op: Op, provider: str, shape, layout: str = "") -> dict:
        queries, documents, teachers = shape
        row = dict(
            section=section, layout=layout, provider=provider, op=op.name, granularity=op.granularity, mode=op.mode,
            dtype="float32", queries=queries, documents=documents, teachers=teachers, iterations=ITERATIONS,
            p20_ms=None, p50_ms=None, p80_ms=None, reps=0, peak_extra_bytes=None,
        )  # fmt: skip
        self.rows.append(row)
        return row

    def time(self, section: str, op: Op, cases: list[Case], **interleaving) -> None:
        """Check the cases, then time those that are right, interleaved."""
        sound, check = {}, None
        for index, case in enumerate(cases):
            row = self.row(section, op, case.provider, case.data.shape, case.layout)
            start = time.perf_counter()
            try:
                if case.check and (check is None or check.data is not case.data):
                    self.say(section, op, case.data.shape, "reference in float64")
                    check = Check(op, case.data)
                self.say(section, op, case.data.shape, case.provider, "check")
                start = time.perf_counter()
                output = case.run()
                failure = check.failure(output) if case.check else ""
            except Exception as error:  # a provider that does not run is a line in the table, not the end of the run
                failure = f"failed: {type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
            row["first_call_ms"] = (time.perf_counter() - start) * 1e3  # of torch.compile: mostly compilation
            row["checked_against"] = f"{check.against} float64" if case.check and check else None
            row["label_pairs"] = case.data.label_pairs()
            if failure:
                row["failure"] = failure
            else:
                case.run()
                sound[index] = row
        self.say(section, op, cases[0].data.shape, "timing", ", ".join(cases[index].provider for index in sound))
        runs = {index: cases[index].run for index in sound}
        before = {index: cases[index].before for index in sound if cases[index].before}
        times = interleave(runs, self.seconds, before=before, **interleaving) if sound else {}
        for index, row in sound.items():
            row.update(times[index]._asdict())


def against_torch(run: Run) -> None:
    elsewhere = torch.ones(2**20)
    for shape in ((4, 16, 2), (2, 64, 3)) if run.quick else SHAPES:
        data = make_data(*shape)
        for op in OPS:
            eager = call(op, data, backend="torch") if op.name == "pile_ensemble" else plain_torch(op, data)
            cases = [Case(EAGER, data, eager)]
            if not run.quick:
                cases.append(Case("torch.compile", data, plain_torch(op, data, compiled=True)))
            cases += [Case(f"cpp {how}", data, call(op, data, backend="cpp", pairwise=how)) for how in PAIR_SUMS]
            # As in a training loop, where other operations have just used the threads and the caches.
            cases.append(Case(BUSY, data, call(op, data, backend="cpp"), before=lambda: elsewhere.mul(2)))
            run.time("a", op, cases)
            torch.compiler.reset()


def long_lists(run: Run) -> None:
    for documents in (2_000, 5_000) if run.quick else LONG:
        data = make_data(1, documents, 8)
        for op in OPS:
            run.time("b", op, [Case("cpp auto", data, call(op, data, backend="cpp"))])


def growth(run: Run) -> None:
    """One list of each length, and batches of lists of each length that hold the same documents in number."""
    lengths = (100, 1_000, 10_000) if run.quick else LENGTHS
    for layout in ("one list", "batch"):
        data = [make_data(1 if layout == "one list" else lengths[-1] // n, n, 8) for n in lengths]
        for op in OPS:
            run.time("c", op, [Case("cpp auto", d, call(op, d, backend="cpp"), layout) for d in data])


def memory(run: Run) -> None:
    for shape in ((1, 20_000, 8), (16, 256, 8)) if run.quick else MEMORY_SHAPES:
        for op in OPS:
            run.say("d", op, shape)
            row = run.row("d", op, "cpp auto", shape)
            script = str(Path(__file__).with_name("_memory.py"))
            arguments = [op.name, op.granularity, *map(str, shape), str(run.threads)]
            result = subprocess.run([sys.executable, script, *arguments], capture_output=True, text=True)
            if result.returncode:
                row["failure"] = f"failed: {result.stderr.strip().splitlines()[-1]}"
            else:
                row.update(json.loads(result.stdout))


def overhead(run: Run) -> None:
    data, op = make_data(1, 8, 2), OPS[-1]
    calls, computing = _overhead.calls(data)
    cases = [Case(name, data, function, check=name in computing) for name, function in calls.items()]
    run.time("e", op, cases, batch=20, max_rounds=10 if run.quick else 200)


def which_sum(run: Run) -> None:
    """Lists of about 16,384 documents in all by either sum, and by the one that is chosen."""
    for documents in (40,) if run.quick else CROSSOVER:
        data = make_data(2 if run.quick else 16_384 // documents, documents, 4)
        for op in OPS:
            run.time("g", op, [Case(f"cpp {how}", data, call(op, data, backend="cpp", pairwise=how)) for how in PAIR_SUMS])


SECTIONS = {"a": against_torch, "b": long_lists, "c": growth, "d": memory, "e": overhead, "g": which_sum}


def add_models(rows: list[dict], floors: dict) -> None:
    """What the machine would need for each kernel's row, and how near the kernel came."""
    for row in rows:
        if row["section"] in "abc" and row["provider"].startswith("cpp") and row["p50_ms"]:
            shape = row["queries"], row["documents"], row["teachers"]
            row.update(_floors.model(row["op"], row["granularity"], row["provider"][4:], shape, row["label_pairs"], floors))
            row["fraction"] = row[f"{row['binding']}_ms"] / row["p50_ms"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", default="a,b,c,d,e,f,g", help="sections to run: a against PyTorch, b one long list, c cost per document, "
        "d memory, e cost per call, f the machine's limits, g which sum (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--threads", type=int, default=2, help="threads of every provider (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=5.0, help="timing per table cell group (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="tiny shapes, few repetitions, no torch.compile: for a test")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("results"), help="default: %(default)s")
    args = parser.parse_args()
    only = args.only.split(",")
    if unknown := set(only) - {*SECTIONS, "f"}:
        parser.error(f"--only: no section {', '.join(sorted(unknown))}")

    torch.set_num_threads(args.threads)
    others = OtherLoad()
    run = Run(args.threads, args.quick, args.seconds)
    header = where(args.threads) | {"quick": args.quick, "sections": only}
    floors = None
    if "f" in only:
        run.say("f: the machine's limits")
        floors = _floors.measure(header["machine"]["instruction_set"], args.threads, args.quick)
    for name, section in SECTIONS.items():
        if name in only:
            section(run)
    run.say("done")
    run.progress.close()

    if floors and "skipped" not in floors:
        add_models(run.rows, floors)
    header["machine"]["cores_taken_by_others"] = others.cores()
    result = header | {"floors": floors, "goals": goals(run.rows), "rows": run.rows}
    folder = args.output / machine_slug(args.threads)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "speed.json").write_text(json.dumps(result, indent=1) + "\n")
    tables = markdown(result)
    (folder / "speed.md").write_text(tables)
    print(tables)
    return int(any("failure" in row for row in run.rows))


if __name__ == "__main__":
    sys.exit(main())
