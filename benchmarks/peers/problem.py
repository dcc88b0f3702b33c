"""What every provider is given, and how a provider's loss is normalised. Needs NumPy alone: a worker may have no PyTorch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

OPS = ("pairwise_logistic", "pairwise_distillation")

# A provider's loss is Σ_q weight_q · (mean over q's pairs). These are the weights, from each query's numbers of pairs and of
# documents. Pairs are those with different labels (logistic), or all i < j (distillation).
SCALES = {
    "mean over queries of the mean over pairs": lambda pairs, lengths: (pairs > 0) / max(1, (pairs > 0).sum()),
    "mean over all pairs of the batch": lambda pairs, lengths: pairs / max(1, pairs.sum()),
    "mean over queries of the sum over pairs, in bits": lambda pairs, lengths: pairs / len(pairs) / np.log(2),
    "mean over all ordered pairs of the batch, i = j too": lambda pairs, lengths: 2 * pairs / (lengths**2).sum(),
}


class Lists(NamedTuple):
    """Padded lists; slots from a list's length on hold zeros."""

    scores: np.ndarray  # (Q, N) float32, the student's
    labels: np.ndarray  # (Q, N) float32, grades 0 to 4
    targets: np.ndarray  # (Q, N) float32, logits to distil
    lengths: np.ndarray  # (Q,) int64

    @property
    def ragged(self) -> bool:
        return bool((self.lengths < self.scores.shape[1]).any())

    @property
    def valid(self) -> np.ndarray:
        """(Q, N) bool: the slots that hold a document."""
        return np.arange(self.scores.shape[1]) < self.lengths[:, None]

    def pairs(self, op: str) -> np.ndarray:
        """(Q,) number of pairs of each query, each counted once."""
        same = self.lengths * (self.lengths - 1) // 2
        if op == "pairwise_distillation":
            return same
        for grade in range(5):
            count = ((self.labels == grade) & self.valid).sum(1)
            same = same - count * (count - 1) // 2
        return same


def make_lists(lengths: Sequence[int], seed: int = 0) -> Lists:
    """Graded labels, targets that know them, and an undertrained student."""
    lengths = np.asarray(lengths, np.int64)
    random, shape = np.random.default_rng(seed), (len(lengths), int(lengths.max()))
    labels = random.integers(0, 5, shape).astype(np.float32)
    targets = labels + random.standard_normal(shape, np.float32)
    scores = 0.3 * labels + random.standard_normal(shape, np.float32)
    valid = np.arange(shape[1]) < lengths[:, None]
    return Lists(*(np.where(valid, values, np.float32(0)) for values in (scores, labels, targets)), lengths)
