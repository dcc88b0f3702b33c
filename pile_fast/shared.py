"""Weights that all queries share, above the backends: fitted to a batch, or a step of them (docs/algorithm.md, section 2a).

A backend says how each query pulls on the teachers at given weights (`Backend.pulls`). Here the pulls are added up, in an order
that does not depend on threads, and `reference.shared_step` follows.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pile_fast.backends.protocol import Backend
from pile_fast.batch import LABEL_LIMIT, RankingBatch, check_cu_seqlens, label_error
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


def step(exponents: Tensor, total: Tensor, queries: Tensor | None, options: EnsembleOptions) -> Tensor:
    """`reference.shared_step` by `totals`; `queries`: how many are labelled in all of the data, None = those of `total`."""
    teachers = exponents.shape[-1]
    mean = total[:teachers] / total[teachers : 2 * teachers].clamp(min=1)
    here = total[2 * teachers]
    moved = shared_step(exponents, mean.to(exponents.dtype), here if queries is None else queries, options)
    return torch.where(here > 0, moved, exponents).to(exponents.dtype)


def fit(backend: Backend, batch: RankingBatch, options: EnsembleOptions, return_trace: bool) -> tuple[Tensor, Tensor]:
    """(M,) exponents fitted to a batch, and the mean label loss before each iteration and after the last, if asked for."""
    exponents = torch.zeros(batch.num_teachers, dtype=widest_dtype(batch.device), device=batch.device)
    if options.iterations == 0 and not return_trace:
        return exponents, exponents.new_empty(0, dtype=batch.dtype)
    own = getattr(backend, "fit_shared", None)
    if own is not None:
        fitted: tuple[Tensor, Tensor] = own(batch, options, return_trace)
        return fitted
    trace = []
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


def over_processes(total: Tensor) -> Tensor:
    """`totals` of all processes together, the same bits in each; what it is given where there is one."""
    if not _distributed():
        return total
    parts = total.new_empty(dist.get_world_size() * total.shape[0])
    dist.all_gather_into_tensor(parts, total)
    # In the order of the processes, whatever order a reduction would take.
    return functools.reduce(torch.add, parts.view(-1, total.shape[0]).unbind())


def collect(batches: Iterable[Any], *, sharded: bool) -> tuple[Tensor, Tensor, Tensor] | None:
    """The queries of `PILELoss.fit`'s batches that have a pair, packed: (teacher_logits, labels, cu_seqlens); None = none has.

    Raises:
        TypeError, ValueError: see `PILELoss.fit`.
    """
    parts = []
    for number, given in enumerate(batches, 1):
        try:
            if (part := _labelled(given)) is not None:
                parts.append(part)
            if parts and parts[-1][0].shape[-1] != parts[0][0].shape[-1]:
                raise ValueError(
                    f"teacher_logits: expected {parts[0][0].shape[-1]} teachers as before, got {parts[-1][0].shape[-1]}"
                )
        except (TypeError, ValueError) as error:
            raise type(error)(f"batch {number}: {error}") from None
    if sharded and _distributed():
        every: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(every, [tuple(tensor.cpu() for tensor in part) for part in parts])
        parts = [part for process in every for part in process]
    if not parts:
        warnings.warn("no query has two documents whose labels differ: the teachers' weights stay as they were", stacklevel=3)
        return None
    lengths = torch.cat([part[2] for part in parts])
    dtype = functools.reduce(torch.promote_types, (part[1].dtype for part in parts))
    return (
        torch.cat([part[0] for part in parts]),
        torch.cat([part[1].to(dtype) for part in parts]),
        torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]),
    )


def _labelled(given: Any) -> tuple[Tensor, Tensor, Tensor] | None:
    """(teacher_logits, labels, lengths) of the queries with two different labels; None = there is none."""
    if isinstance(given, Mapping):
        inside = given.get("labels")
        given = inside if isinstance(inside, Mapping) else given
        given = tuple(given.get(name) for name in ("teacher_logits", "labels", "mask", "cu_seqlens"))
    if not isinstance(given, (tuple, list)) or not 2 <= len(given) <= 4:
        raise TypeError(f"expected a mapping or (teacher_logits, labels[, mask[, cu_seqlens]]), got {type(given).__name__}")
    teacher_logits, labels, mask, cu_seqlens = [*given, None, None][:4]
    if teacher_logits is None:
        raise TypeError("teacher_logits: expected a torch.Tensor, got None")
    if labels is None:
        return None
    batch = RankingBatch(teacher_logits=teacher_logits, labels=labels, mask=mask, cu_seqlens=cu_seqlens)
    teacher_logits, labels, device = batch.teacher_logits, batch.labels, batch.device
    queries = torch.arange(batch.num_queries, device=device)
    if batch.cu_seqlens is None:
        there = torch.ones_like(labels, dtype=torch.bool) if batch.mask is None else batch.mask
        lengths = there.sum(1)
        teacher_logits, labels = teacher_logits[there], labels[there]
    else:
        check_cu_seqlens(batch.cu_seqlens, batch.slots)
        lengths = batch.cu_seqlens.diff().long()
        end = int(batch.cu_seqlens[-1])
        teacher_logits, labels = teacher_logits[:end], labels[:end]
    query = queries.repeat_interleave(lengths)
    wide = labels.to(widest_dtype(device))
    wrong = wide.isinf() if labels.is_floating_point() else wide.abs() >= LABEL_LIMIT
    if wrong.any():
        raise label_error(integer=not labels.is_floating_point(), query=int(query[wrong][0]))
    known = wide.isfinite() & teacher_logits.isfinite().any(-1)
    unknown = torch.full((batch.num_queries,), -torch.inf, dtype=wide.dtype, device=device)
    highest = unknown.scatter_reduce(0, query, torch.where(known, wide, -torch.inf), "amax")
    lowest = (-unknown).scatter_reduce(0, query, torch.where(known, wide, torch.inf), "amin")
    differ = highest > lowest
    if not differ.any():
        return None
    kept = differ[query]
    return teacher_logits[kept], labels[kept], lengths[differ]


def _distributed() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
