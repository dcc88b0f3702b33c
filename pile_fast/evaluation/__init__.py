"""Ranking metrics, comparisons of systems with intervals and tests, and inspection of a file's labels and teachers."""

from pile_fast.evaluation.compare import DEFAULT_METRICS, EMPTY, Coverage, Evaluation, Metric, QueryCounts, Result, evaluate
from pile_fast.evaluation.metrics import GAINS, average_precision, mrr, ndcg, opa, pair_counts, pnr

__all__ = [
    "DEFAULT_METRICS", "EMPTY", "GAINS", "Coverage", "Evaluation", "Metric", "QueryCounts", "Result", "average_precision",
    "evaluate", "mrr", "ndcg", "opa", "pair_counts", "pnr",
]  # fmt: skip
