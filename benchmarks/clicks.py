"""Learning from clicks: what inverse propensity weights gain, on generated clicks whose position bias is known.

python benchmarks/clicks.py              # a minute; writes results/clicks.json and the table of docs/clicks.md

A logging ranker of one feature showed each query's documents to some users. They looked at rank r with probability
(1 / r) ** bias, and clicked what they looked at with a probability that grows with its relevance. A linear student learns from
the clicks, by the softmax loss; test queries are judged by their true relevance.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import NamedTuple

import torch
from _timing import where
from scipy import stats
from torch import Tensor

from pile_fast import ranking_loss
from pile_fast.evaluation.metrics import ndcg

ROOT = Path(__file__).resolve().parents[1]
PAGE, RESULT = ROOT / "docs/clicks.md", ROOT / "benchmarks/results/clicks.json"
BEGIN, END = "<!-- results -->\n", "<!-- /results -->"
FEATURES, DOCUMENTS = 8, 20
SEEDS = range(10)


class Log(NamedTuple):
    """Queries (Q, N, ...) with what their users clicked."""

    features: Tensor  # (Q, N, F)
    relevance: Tensor  # (Q, N), grades 0 to 4
    clicks: Tensor  # (Q, N), how many users clicked the document
    propensity: Tensor  # (Q, N), the probability that a user looked at it


def generate(queries: int, users: int, bias: float, generator: torch.Generator) -> Log:
    features = torch.randn(queries, DOCUMENTS, FEATURES, generator=generator)
    quality = features[..., :4].sum(-1) / 2 + torch.randn(queries, DOCUMENTS, generator=generator) / 2
    relevance = (quality * 1.2 + 1).floor().clamp(0, 4)
    # The logging ranker knows a feature of the four that matter, and one that does not.
    shown = (features[..., 0] + features[..., 5]).argsort(1, descending=True).argsort(1)
    propensity = (1 / (1 + shown.float())) ** bias
    click = propensity * (0.05 + 0.95 * (2**relevance - 1) / 15)
    clicks = (torch.rand(users, queries, DOCUMENTS, generator=generator) < click).float().sum(0)
    return Log(features, relevance, clicks, propensity)


def student(log: Log, labels: Tensor, weights: Tensor | None, steps: int) -> Tensor:
    """(F,) the linear student that the softmax loss of these labels ends at."""
    w = torch.zeros(FEATURES, requires_grad=True)
    optimizer = torch.optim.Adam([w], lr=0.05)
    for _ in range(steps):
        optimizer.zero_grad()
        ranking_loss(log.features @ w, labels, kind="softmax", weights=weights).backward()
        optimizer.step()
    return w.detach()


def compare(seed: int, *, queries: int = 500, users: int = 20, bias: float = 1.0, steps: int = 200) -> dict[str, float]:
    """NDCG@10 by the true relevance of 500 other queries, for each way to learn."""
    generator = torch.Generator().manual_seed(seed)
    log, test = generate(queries, users, bias, generator), generate(500, 1, bias, generator)
    ways = {
        "clicks": student(log, log.clicks, None, steps),
        "clicks, weighted by 1 / propensity": student(log, log.clicks, 1 / log.propensity, steps),
        "true relevance": student(log, 2**log.relevance - 1, None, steps),
    }
    logger = torch.zeros(FEATURES)
    logger[[0, 5]] = 1
    return {
        name: ndcg(test.features @ w, test.relevance, k=10).item() for name, w in {"the logging ranker": logger, **ways}.items()
    }


def table(found: dict) -> str:
    """The page's table."""
    lines = ["| learned from | NDCG@10 | against unweighted clicks, 95 % |", "| :-- | --: | --: |"]
    base = torch.tensor(found["ndcg@10"]["clicks"], dtype=torch.float64)
    for name, values in found["ndcg@10"].items():
        own = torch.tensor(values, dtype=torch.float64)
        gap = own - base
        half = stats.t.ppf(0.975, len(gap) - 1) * gap.std().item() / math.sqrt(len(gap))
        against = "" if name == "clicks" else f"{gap.mean().item():+.4f} ± {half:.4f}"
        lines.append(f"| {name} | {own.mean().item():.4f} | {against} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.parse_args()
    torch.set_num_threads(1)
    runs = [compare(seed) for seed in SEEDS]
    found = where(1) | {"seeds": list(SEEDS), "ndcg@10": {name: [run[name] for run in runs] for name in runs[0]}}
    RESULT.write_text(json.dumps(found, indent=1) + "\n")
    text = PAGE.read_text()
    PAGE.write_text(text[: text.index(BEGIN) + len(BEGIN)] + table(found) + text[text.index(END) :])
    print(table(found))


if __name__ == "__main__":
    main()
