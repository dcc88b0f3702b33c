"""A generator of ranked lists with imperfect teachers, to try things out without data.

The data is artificial, and so is every comparison of methods on it: the teachers make exactly the errors written below.
Use real data to judge quality.
"""

from __future__ import annotations

import numpy as np
import torch

from pile_fast.data.lists import RankedLists

# Per teacher: share of the true relevance in its signal, share of a wrong linear view of its own, noise, scale, offset,
# and which documents it leaves out: those below the best `list depth` share of its list, and a random share.
_TEACHERS = (
    # (truth, own view, noise, scale, offset, list depth, random share left out)
    (1.0, 0.3, 0.5, 1.0, 0.0, None, 0.0),
    (1.0, 0.8, 0.3, 12.0, 40.0, None, 0.1),
    (0.8, 0.5, 0.8, 0.05, 0.5, 0.5, 0.0),
    (0.6, 1.0, 0.5, 3.0, -5.0, None, 0.3),
    (0.4, 0.5, 1.5, 100.0, 0.0, 0.7, 0.0),
    (-0.3, 1.0, 0.5, 1.0, 0.0, None, 0.0),  # worse than chance
)
_GRADE_QUANTILES = (0.5, 0.75, 0.9, 0.97)


def make_synthetic(
    queries: int = 400, *, documents: tuple[int, int] = (5, 40), num_features: int = 20, seed: int = 0
) -> RankedLists:
    """Queries with features, grades 0 to 4 and six teachers; the same arguments give the same data.

    A document's true relevance is a non-linear function of its features; its grade is that plus noise, cut at fixed
    quantiles. A teacher mixes the true relevance with a wrong view of its own and noise, on its own scale, and leaves
    documents out (NaN); see `_TEACHERS`. Queries are dealt to the parts S1 .. S5 in turn.

    Args:
        queries: Q.
        documents: least and most documents of a query.
        num_features: F, at least 4.
        seed: of every random draw.
    """
    if queries < 1 or not 1 <= documents[0] <= documents[1] or num_features < 4:
        raise ValueError(
            "expected queries >= 1, 1 <= documents[0] <= documents[1] and num_features >= 4, "
            f"got {queries}, {documents}, {num_features}"
        )
    rng = np.random.default_rng(seed)
    lengths = rng.integers(documents[0], documents[1], size=queries, endpoint=True)
    cu_seqlens = np.concatenate([[0], lengths.cumsum()])
    total = int(cu_seqlens[-1])
    features = rng.standard_normal((total, num_features))

    relevance = features @ rng.standard_normal(num_features) / num_features**0.5
    relevance += 0.7 * np.tanh(2 * features[:, 0] * features[:, 1]) + 0.5 * np.abs(features[:, 2]) - 0.5 * features[:, 3] ** 2
    relevance = (relevance - relevance.mean()) / relevance.std()
    observed = relevance + 0.4 * rng.standard_normal(total)
    labels = np.digitize(observed, np.quantile(observed, _GRADE_QUANTILES))

    teachers = []
    for truth, view, noise, scale, offset, depth, left_out in _TEACHERS:
        own = features @ rng.standard_normal(num_features) / num_features**0.5
        score = truth * relevance + view * own + noise * rng.standard_normal(total)
        missing = rng.random(total) < left_out
        if depth is not None:
            for start, end in zip(cu_seqlens[:-1], cu_seqlens[1:], strict=True):
                returned = int(np.ceil(depth * (end - start)))
                missing[start + np.argsort(-score[start:end])[returned:]] = True
        teachers.append(np.where(missing, np.nan, offset + scale * score))
    return RankedLists(
        torch.from_numpy(features.astype(np.float32)),
        torch.from_numpy(labels.astype(np.float32)),
        torch.from_numpy(np.stack(teachers, 1).astype(np.float32)),
        torch.from_numpy(cu_seqlens),
        tuple(f"q{q}" for q in range(queries)),
        tuple(f"q{q}.{i}" for q, n in enumerate(lengths) for i in range(n)),
        tuple(f"teacher {m + 1}" for m in range(len(_TEACHERS))),
        tuple(f"S{q % 5 + 1}" for q in range(queries)),
    )
