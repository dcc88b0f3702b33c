"""The losses on labels and "kl" beside eager PyTorch, plain RankNet, and the memory that they have to read.

python benchmarks/label_losses.py [--threads N]

Three tables, loss with its gradient: times of lists by length beside eager PyTorch, which is checked first; the cost per
document of long lists beside RankNet's; and what of the memory's speed "kl" and "softmax" reach. Writes label_losses.md to the
machine's folder of results. Use an idle machine: the loads that others put on it are named.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from _timing import OtherLoad, interleave, machine_slug, where
from torch import Tensor

import pile_fast

RESULTS = Path(__file__).with_name("results")
SHAPES = ((512, 32), (128, 128), (64, 512))
LONG = (1_000, 10_000, 100_000, 1_000_000)
KINDS = ("logistic", "lambdarank", "lambdarank@10", "approx_ndcg", "softmax")


def make(queries: int, documents: int) -> tuple[Tensor, Tensor]:
    """Logits, and five grades that they do not know."""
    g = torch.Generator().manual_seed(documents)
    labels = (1.2 * torch.randn(queries, documents, generator=g) + 1).round().clamp(0, 4)
    return torch.randn(queries, documents, generator=g).requires_grad_(), labels


def eager_lambdarank(z: Tensor, y: Tensor) -> Tensor:
    """As one writes it: ranks by sorting, then all pairs."""
    gain = 2**y - 1
    discount = 1 / torch.log2(torch.arange(z.shape[1]) + 2.0)
    ideal = (gain.sort(1, descending=True).values * discount).sum(1)
    d = discount[z.argsort(1, descending=True).argsort(1)]
    change = (gain[:, :, None] - gain[:, None]).clamp(min=0) * (d[:, :, None] - d[:, None]).abs()
    return ((change * F.softplus(z[:, None] - z[:, :, None])).sum((1, 2)) / ideal).mean()


def eager_approx_ndcg(z: Tensor, y: Tensor) -> Tensor:
    gain = 2**y - 1
    ideal = (gain.sort(1, descending=True).values / torch.log2(torch.arange(z.shape[1]) + 2.0)).sum(1)
    rank = 0.5 + torch.sigmoid((z[:, None] - z[:, :, None]) / 0.1).sum(2)
    return (1 - (gain / torch.log2(1 + rank)).sum(1) / ideal).mean()


EAGER = {"lambdarank": eager_lambdarank, "approx_ndcg": eager_approx_ndcg}


def step(loss, z: Tensor, *arguments, **options):
    def call() -> None:
        z.grad = None
        loss(z, *arguments, **options).backward()

    call()
    return call


def beside_eager() -> list[str]:
    calls = {}
    for shape in SHAPES:
        z, y = make(*shape)
        for kind, eager in EAGER.items():
            ours = pile_fast.ranking_loss(z, y, kind=kind)
            torch.testing.assert_close(ours, eager(z, y), rtol=1e-4, atol=1e-5)
            wanted, got = (torch.autograd.grad(loss, z)[0] for loss in (eager(z, y), ours))
            torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-4 * wanted.abs().max().item())
            calls[shape, kind, "eager"] = step(eager, z, y)
            calls[shape, kind, "ours"] = step(pile_fast.ranking_loss, z, y, kind=kind)
    times = interleave(calls, 150.0, min_rounds=5)
    rows = []
    for shape in SHAPES:
        for kind in EAGER:
            eager, ours = (times[shape, kind, name].p50_ms for name in ("eager", "ours"))
            rows.append(f"| {shape[0]} × {shape[1]} | {kind} | {ours:.3f} ms | {eager:,.1f} ms | {eager / ours:,.0f} |")
    return ["| lists × documents | loss | pile_fast | eager | ratio |", "|---|---|--:|--:|--:|", *rows]


def long_lists() -> list[str]:
    calls = {}
    for n in LONG:
        z, y = make(1, n)
        for kind in KINDS:
            calls[n, kind] = step(pile_fast.ranking_loss, z, y, kind=kind)
    times = interleave(calls, 60.0, min_rounds=5)
    rows = []
    for kind in KINDS:
        cells = [f"{times[n, kind].p50_ms * 1e6 / n:,.1f}" for n in LONG]
        ratio = times[LONG[-1], kind].p50_ms / times[LONG[-1], "logistic"].p50_ms
        rows.append(f"| {kind} | {' | '.join(cells)} | {ratio:.1f} |")
    head = " | ".join(f"1 × {n:,}" for n in LONG)
    last = "1,000,000 beside logistic"
    return [f"| ns per document | {head} | {last} |", f"|---|{'--:|' * (len(LONG) + 1)}", *rows]


def memory() -> list[str]:
    """Bytes that must move: logits and target or labels read, the gradient written; the limit copies as many."""
    n = LONG[-1]
    z, y = make(1, n)
    source, target = torch.randn(3 * n // 2), torch.empty(3 * n // 2)
    calls = {
        "kl": step(pile_fast.distillation_loss, z, torch.randn(1, n), kind="kl"),
        "softmax": step(pile_fast.ranking_loss, z, y, kind="softmax"),
        "limit": lambda: target.copy_(source),
    }
    times = interleave(calls, 20.0, min_rounds=10)
    limit = times["limit"].p50_ms
    rows = [f"| {kind} | {times[kind].p50_ms:.2f} ms | {times[kind].p50_ms / limit:.1f} |" for kind in ("kl", "softmax")]
    return [f"| 1 × {n:,} | time | times the limit of {limit:.2f} ms |", "|---|--:|--:|", *rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="(default: %(default)s)")
    threads = parser.parse_args().threads
    torch.set_num_threads(threads)
    others, taken = OtherLoad(), where(threads)
    parts = [*beside_eager(), "", *long_lists(), "", *memory()]
    load = others.cores()
    lines = [
        "# Losses on labels, and kl",
        "",
        f"{taken['machine']['cpu']}, {threads} threads, {taken['machine']['instruction_set']}, {taken['date']}, commit "
        f"{taken['commit']}, torch {taken['versions']['torch']}. Medians of interleaved runs, loss with its gradient. Other "
        + ("programs: not known." if load is None else f"programs took {load:.1f} cores."),
        "",
        *parts,
        "",
    ]
    path = RESULTS / machine_slug(threads) / "label_losses.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines))
    print(path.read_text())


if __name__ == "__main__":
    main()
