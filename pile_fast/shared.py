"""Weights that all queries share, above the backends: fitted to a batch, or a step of them (docs/algorithm.md, section 2a).

A backend says how each query pulls on the teachers at given weights (`Backend.pulls`). Here the pulls are added up, in an order
that does not depend on threads, and `reference.shared_step` follows.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from pile_fast.backends.protocol import Backend
from pile_fast.batch import RankingBatch
from pile_fast.options import EnsembleOptions, LossOptions
from pile_fast.reference import shared_step, widest_dtype

# Below it a weight would be 0 in float32, and a teacher of weight 0 counts as missing.
_SMALLEST = torch.finfo(torch.float32).tiny


def weights_of(exponents: Tensor, prior: Tensor | None = None) -> Tensor:
    """(M,) weights ∝ prior · exp(exponents), on the simplex; only a prior of 0 gives 0."""
    energy = exponents if prior is None else exponents + prior.to(exponents.dtype).log()
    weights = energy.softmax(-1).clamp(min=_SMALLEST)
    return weights if prior is None else torch.where(prior > 0, weights, 0.0)


def totals(pulls: Tensor, losses: Tensor | None = None) -> Tensor:
    """What queries' pulls (Q, M), NaN where there is none, come to: (2M + 2,), which adds up over batches and processes.

    By teacher the sum of its pulls, then by teacher how many there are; the number of queries with a pair, and the sum of
    their `losses` (Q,).
    """
    there = ~pulls.isnan()
    counts = there.any(1, keepdim=True)
    losses = pulls.new_zeros(pulls.shape[0]) if losses is None else losses
    columns = [pulls.nan_to_num(), there, counts, torch.where(counts, losses.unsqueeze(1), 0.0)]
    rows = torch.cat([column.to(widest_dtype(pulls.device)) for column in columns], 1)
    rows = torch.cat([rows.new_zeros(1, rows.shape[1]), rows])
    # A CPU's sum goes by the number of threads; a running sum does not.
    return rows.cumsum(0)[-1] if rows.device.type == "cpu" else rows.sum(0)


def step(exponents: Tensor, total: Tensor, queries: Tensor | float | None, options: EnsembleOptions) -> Tensor:
    """`reference.shared_step` by `totals`; `queries`: how many are labelled in all of the data, None = those of `total`."""
    teachers = exponents.shape[-1]
    mean = total[:teachers] / total[teachers : 2 * teachers].clamp(min=1)
    here = total[2 * teachers]
    moved = shared_step(exponents, mean.to(exponents.dtype), here if queries is None else queries, options)
    return torch.where(here > 0, moved, exponents).to(exponents.dtype)


def fit(backend: Backend, batch: RankingBatch, options: EnsembleOptions, return_trace: bool) -> tuple[Tensor, Tensor]:
    """(M,) exponents fitted to a batch, and the mean label loss before each iteration and after the last, if asked for."""
    own = getattr(backend, "fit_shared", None)
    if own is not None:
        exponents, trace = own(batch, options, return_trace)
        return exponents, trace
    teachers, trace = batch.num_teachers, []
    exponents = torch.zeros(teachers, dtype=widest_dtype(batch.device), device=batch.device)
    for iteration in range(options.iterations + return_trace):
        total = totals(*backend.pulls(batch.with_prior(weights_of(exponents, batch.prior)), options))
        trace.append(total[-1] / total[-2].clamp(min=1))
        if iteration < options.iterations:
            exponents = step(exponents, total, None, options)
    empty = exponents.new_empty(0)
    return exponents, (torch.stack(trace) if return_trace else empty).to(batch.dtype)


def ensemble(
    backend: Backend, batch: RankingBatch, options: EnsembleOptions, return_weights: bool, return_trace: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """`Backend.ensemble` for granularity "shared": weights (M,), trace (iterations + 1,)."""
    exponents, trace = fit(backend, batch, options, return_trace)
    weights = weights_of(exponents, batch.prior)
    logits, _, _ = backend.ensemble(batch.with_prior(weights), _fixed(options), False, False)
    shown = (weights / weights.sum()).to(batch.dtype)
    return logits, shown if return_weights else shown.new_empty(0), trace


def pile_loss(
    backend: Backend, batch: RankingBatch, of_ensemble: EnsembleOptions, of_loss: LossOptions, with_gradient: bool,
    with_pulls: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """`Backend.pile_loss` for granularity "shared"."""
    if of_ensemble.iterations > 0 and of_loss.alpha > 0:
        exponents, _ = fit(backend, batch, of_ensemble, False)
        batch = batch.with_prior(weights_of(exponents, batch.prior))
    return backend.pile_loss(batch, _fixed(of_ensemble), of_loss, with_gradient, with_pulls)


@functools.lru_cache(maxsize=64)
def _fixed(options: EnsembleOptions) -> EnsembleOptions:
    """The ensemble by the weights in `prior`, as backends take it."""
    return options if options.iterations == 0 else options._replace(iterations=0)
