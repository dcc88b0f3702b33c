"""The "torch" backend: `pile_fast.reference` behind the backend interface. Any device, O(n²) memory."""

from __future__ import annotations

import torch
from torch import Tensor

from pile_fast import reference
from pile_fast.batch import PaddedView, RankingBatch
from pile_fast.options import EnsembleOptions, LossOptions

DEVICES: tuple[str, ...] = ()  # any


def unavailable() -> str:
    return ""


def refusal(batch: RankingBatch) -> str:
    return ""


def ensemble(
    batch: RankingBatch, options: EnsembleOptions, return_weights: bool, return_trace: bool
) -> tuple[Tensor, Tensor, Tensor]:
    view = PaddedView(batch)
    with torch.autocast(_device(batch), enabled=False):
        result = _ensemble(view, batch, options, return_trace, batch.dtype)
    weights = result.weights.new_empty(0)
    if return_weights:
        weights = view.unpad(result.weights, 0.0) if options.granularity == "document" else result.weights
    return view.unpad(result.logits, torch.nan), weights, result.trace


def pair_loss(batch: RankingBatch, options: LossOptions, with_gradient: bool) -> tuple[Tensor, Tensor]:
    view = PaddedView(batch)
    dtype = batch.dtype
    target = None if batch.target_logits is None else view.pad(batch.target_logits).to(dtype)
    return _loss(view, batch, target, options, with_gradient, dtype)


def pile_loss(
    batch: RankingBatch, ensemble_options: EnsembleOptions, loss_options: LossOptions, with_gradient: bool
) -> tuple[Tensor, Tensor]:
    view = PaddedView(batch)
    dtype = batch.dtype
    target = None
    if loss_options.alpha > 0:
        with torch.autocast(_device(batch), enabled=False):
            target = _ensemble(view, batch, ensemble_options, False, dtype).logits
    return _loss(view, batch, target, loss_options, with_gradient, dtype)


def _ensemble(view, batch, options, return_trace, dtype) -> reference.Ensemble:
    teachers, labels = view.pad(batch.teacher_logits).to(dtype), view.labels(batch)
    return reference.ensemble(teachers, labels, view.valid, options, batch.prior, return_trace)


def _loss(view, batch, target, options, with_gradient, dtype) -> tuple[Tensor, Tensor]:
    student, labels = view.pad(batch.student_logits).to(dtype), view.labels(batch)
    with torch.no_grad(), torch.autocast(_device(batch), enabled=False):
        per_query = reference.pair_loss(student, target, labels, view.valid, options)
        loss = reference.reduce(per_query, options.reduction)
        if not with_gradient:
            return loss, student.new_empty(0)
        gradient = reference.pair_loss_gradient(student, target, labels, view.valid, options)
        if options.reduction == "mean":
            gradient = gradient / per_query.has_pairs.sum().clamp(min=1)
    return loss, view.unpad(gradient, 0.0).to(batch.student_logits.dtype)


def _device(batch: RankingBatch) -> str:
    return (batch.teacher_logits if batch.student_logits is None else batch.student_logits).device.type
