"""The "torch" backend: `pile_fast.reference` behind the backend interface. Any device, O(n²) memory."""

from __future__ import annotations

import torch
from torch import Tensor

from pile_fast import reference
from pile_fast.backends.protocol import missing_term
from pile_fast.batch import PaddedView, RankingBatch, check_cu_seqlens
from pile_fast.options import EnsembleOptions, LossOptions

DEVICES: tuple[str, ...] = ()  # any


def unavailable() -> str:
    return ""


def refusal(batch: RankingBatch, ensemble: EnsembleOptions | None, loss: LossOptions | None) -> str:
    return missing_term(reference.TERMS, loss)


def ensemble(
    batch: RankingBatch, options: EnsembleOptions, return_weights: bool, return_trace: bool
) -> tuple[Tensor, Tensor, Tensor]:
    view = PaddedView(batch)
    result = _ensemble(view, batch, options, return_trace)
    weights = result.weights.new_empty(0)
    if return_weights:
        weights = view.unpad(result.weights, 0.0) if options.granularity == "document" else result.weights
    return view.unpad(result.logits, torch.nan), weights, result.trace


def pair_loss(batch: RankingBatch, options: LossOptions, with_gradient: bool) -> tuple[Tensor, Tensor]:
    view = PaddedView(batch)
    target = None if batch.target_logits is None else view.pad(batch.target_logits).to(batch.dtype)
    return _loss(view, batch, target, options, with_gradient)


def derivatives(batch: RankingBatch, options: LossOptions) -> tuple[Tensor, Tensor, Tensor]:
    """Lists of similar lengths together: whoever boosts trees hands over a whole data set, too much to pad to its longest."""
    student, cu_seqlens = batch.student_logits, batch.cu_seqlens
    if cu_seqlens is None or batch.num_queries == 0:
        return _derivatives(batch, options)
    check_cu_seqlens(cu_seqlens, student.shape[0])
    lengths = cu_seqlens.diff().long()
    size = lengths.clamp(min=1).double().log2().mul(2).ceil()
    sizes = size.unique()
    if len(sizes) == 1:
        return _derivatives(batch, options)
    loss = student.new_zeros(batch.num_queries, dtype=batch.dtype)
    gradient, hessian = (torch.zeros_like(student, dtype=batch.dtype) for _ in range(2))
    size_of_row = size.repeat_interleave(lengths)
    for one in sizes:
        queries, rows = (size == one).nonzero().squeeze(1), (size_of_row == one).nonzero().squeeze(1)
        own = lengths[queries]
        some = RankingBatch(
            student_logits=student[rows],
            target_logits=None if batch.target_logits is None else batch.target_logits[rows],
            labels=None if batch.labels is None else batch.labels[rows],
            weights=None if batch.weights is None else batch.weights[rows],
            query_weights=None if batch.query_weights is None else batch.query_weights[queries],
            cu_seqlens=torch.cat([own.new_zeros(1), own.cumsum(0)]),
        )
        loss[queries], gradient[rows], hessian[rows] = _derivatives(some, options)
    return loss, gradient, hessian


def _derivatives(batch: RankingBatch, options: LossOptions) -> tuple[Tensor, Tensor, Tensor]:
    view = PaddedView(batch)
    target = None if batch.target_logits is None else view.pad(batch.target_logits).to(batch.dtype)
    found = _per_query(view, batch, target, options, True)
    assert found.gradient is not None and found.hessian is not None
    return found.loss, view.unpad(found.gradient, 0.0), view.unpad(found.hessian, 0.0)


def pile_loss(
    batch: RankingBatch, of_ensemble: EnsembleOptions, of_loss: LossOptions, with_gradient: bool, with_pulls: bool
) -> tuple[Tensor, Tensor, Tensor]:
    view = PaddedView(batch)
    target, pulls = None, batch.teacher_logits.new_empty(0, dtype=batch.dtype)
    if of_loss.alpha > 0 or with_pulls:
        result = _ensemble(view, batch, of_ensemble, False)
        target, pulls = result.logits, result.pulls if with_pulls else pulls
    return *_loss(view, batch, target, of_loss, with_gradient), pulls


def pulls(batch: RankingBatch, options: EnsembleOptions) -> tuple[Tensor, Tensor]:
    result = _ensemble(PaddedView(batch), batch, options._replace(granularity="query", iterations=0), True)
    has_pairs = ~result.pulls.isnan().all(1)
    return result.pulls, torch.where(has_pairs, result.trace[:, 0], torch.nan)


def _ensemble(view: PaddedView, batch: RankingBatch, options: EnsembleOptions, return_trace: bool) -> reference.Ensemble:
    teachers, labels = view.pad(batch.teacher_logits).to(batch.dtype), view.labels(batch)
    assert labels is not None
    with torch.autocast(batch.device.type, enabled=False):
        return reference.ensemble(teachers, labels, view.valid, options, batch.prior, return_trace)


def _loss(
    view: PaddedView, batch: RankingBatch, target: Tensor | None, options: LossOptions, with_gradient: bool
) -> tuple[Tensor, Tensor]:
    per_query = _per_query(view, batch, target, options, with_gradient)
    with torch.no_grad(), torch.autocast(batch.device.type, enabled=False):
        loss, gradient = reference.reduce(per_query, options.reduction), per_query.gradient
        if gradient is None:
            return loss, loss.new_empty(0, dtype=batch.student_logits.dtype)
        if options.reduction == "mean":
            gradient = gradient / per_query.counts.sum().clamp(min=1)
    return loss, view.unpad(gradient, 0.0).to(batch.student_logits.dtype)


def _per_query(
    view: PaddedView, batch: RankingBatch, target: Tensor | None, options: LossOptions, derivatives: bool
) -> reference.PairLoss:
    student, labels, weights = view.pad(batch.student_logits).to(batch.dtype), view.labels(batch), view.pad(batch.weights)
    with torch.no_grad(), torch.autocast(batch.device.type, enabled=False):
        return reference.pair_loss(student, target, labels, view.valid, options, derivatives, weights, batch.query_weights)
