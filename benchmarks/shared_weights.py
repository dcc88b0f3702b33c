"""Weights that all queries share: how long their fit takes, and a loss with fixed ones beside granularity "document".

python benchmarks/shared_weights.py [--threads N]

Writes shared_weights.md to the machine's folder of results. Use an idle machine: the loads that others put on it are named.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import _cases
import torch
from _timing import OtherLoad, interleave, machine_slug, where

import pile_fast

RESULTS = Path(__file__).with_name("results")
DOCUMENTS, TEACHERS = 1_000_000, 8
LENGTHS = (10, 64, 500, 1_000_000)
SHAPES = (
    (32, 64, 4), (2048, 8, 4), (256, 32, 4), (256, 128, 4), (1024, 128, 4), (64, 512, 8), (16, 1024, 8), (1, 32768, 8),
)  # fmt: skip


def fits() -> list[str]:
    """Of a million documents, by the length of the lists."""
    data = {n: _cases.make_data(DOCUMENTS // n, n, TEACHERS) for n in LENGTHS}

    def fit(n: int):
        return lambda: pile_fast.pile_ensemble(data[n].teachers, data[n].labels, granularity="shared", return_weights=True)

    calls = {n: fit(n) for n in LENGTHS}
    for call in calls.values():
        call()
    times = interleave(calls, 120.0, min_rounds=5)
    rows = [f"| {DOCUMENTS // n:,} × {n:,} × {TEACHERS} | {times[n].p50_ms / 1e3:.2f} s |" for n in LENGTHS]
    return ["| queries × documents × teachers | fit of 40 iterations, and the ensemble |", "|---|--:|", *rows]


def losses() -> list[str]:
    """`pile_loss` and its gradient, fixed weights beside ten iterations of granularity "document", interleaved."""
    calls = {}
    for shape in SHAPES:
        data = _cases.make_data(*shape)
        weights = torch.linspace(1.0, 2.0, shape[2])
        ways = {"shared": dict(prior=weights, iterations=0), "document": dict(iterations=_cases.ITERATIONS)}
        for granularity, options in ways.items():

            def step(data=data, granularity=granularity, options=options):
                data.student.grad = None
                pile_fast.pile_loss(data.student, data.teachers, data.labels, granularity=granularity, **options).backward()

            step()
            calls[shape, granularity] = step
    times = interleave(calls, 60.0)
    rows = []
    for shape in SHAPES:
        shared, document = (times[shape, granularity].p50_ms for granularity in ("shared", "document"))
        name = " × ".join(f"{size:,}" for size in shape)
        rows.append(f"| {name} | {shared:.3f} ms | {document:.3f} ms | {document / shared:.1f} |")
    return ['| shape | fixed shared weights | "document" | ratio |', "|---|--:|--:|--:|", *rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="(default: %(default)s)")
    threads = parser.parse_args().threads
    torch.set_num_threads(threads)
    others, taken = OtherLoad(), where(threads)
    parts = [*losses(), "", *fits()]
    load = others.cores()
    lines = [
        "# Weights that all queries share",
        "",
        f"{taken['machine']['cpu']}, {threads} threads, {taken['machine']['instruction_set']}, {taken['date']}, commit "
        f"{taken['commit']}, torch {taken['versions']['torch']}. Medians of interleaved runs, loss with its gradient. Other "
        + ("programs: not known." if load is None else f"programs took {load:.1f} cores."),
        "",
        *parts,
        "",
    ]
    path = RESULTS / machine_slug(threads) / "shared_weights.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines))
    print(path.read_text())


if __name__ == "__main__":
    main()
