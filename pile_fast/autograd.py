"""The registered ops and their autograd: the only module that knows either.

Three ops, `pile_fast::ensemble`, `pile_fast::pair_loss` and `pile_fast::pile_loss`, take flat arguments (tensors, then the
fields of the option sets, then the backend's name) and have fakes, so that `torch.compile(fullgraph=True)` sees one node.
Eager calls skip the dispatcher and go to the backend directly; docs/performance.md has what that saves per call.

The student's gradient is computed with the loss, when the student requires grad and only then; backward multiplies it by
the upstream gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pile_fast import backends
from pile_fast.batch import RankingBatch, compute_dtype
from pile_fast.options import EnsembleOptions, LossOptions

_ENSEMBLE_OPTIONS = (
    "int iterations, float step_size, str granularity, str normalize, float temperature, float margin, "
    "str pair_weight, str pairwise"
)
_LOSS_OPTIONS = (
    "float alpha, str distillation, float distillation_temperature, str loss_pair_weight, str reduction, str loss_pairwise"
)

_library = torch.library.Library("pile_fast", "DEF")
_library.define(
    "ensemble(Tensor teacher_logits, Tensor labels, Tensor? mask, Tensor? cu_seqlens, Tensor? prior, "
    f"{_ENSEMBLE_OPTIONS}, bool return_weights, bool return_trace, str backend) -> (Tensor, Tensor, Tensor)"
)
_library.define(
    "pair_loss(Tensor student_logits, Tensor? target_logits, Tensor? labels, Tensor? mask, Tensor? cu_seqlens, "
    f"{_LOSS_OPTIONS}, bool with_gradient, str backend) -> (Tensor, Tensor)"
)
_library.define(
    "pile_loss(Tensor student_logits, Tensor teacher_logits, Tensor labels, Tensor? mask, Tensor? cu_seqlens, Tensor? prior, "
    f"{_ENSEMBLE_OPTIONS}, {_LOSS_OPTIONS}, bool with_gradient, str backend) -> (Tensor, Tensor)"
)

_NUM_ENSEMBLE_OPTIONS = len(EnsembleOptions._fields)
_NUM_LOSS_OPTIONS = len(LossOptions._fields)


def _run_ensemble(teacher_logits, labels, mask, cu_seqlens, prior, *options):
    *options, return_weights, return_trace, backend = options
    batch = RankingBatch(teacher_logits=teacher_logits, labels=labels, mask=mask, cu_seqlens=cu_seqlens, prior=prior)
    return backends.load(backend).ensemble(batch, EnsembleOptions(*options), return_weights, return_trace)


def _run_pair_loss(student_logits, target_logits, labels, mask, cu_seqlens, *options):
    *options, with_gradient, backend = options
    batch = RankingBatch(
        student_logits=student_logits.detach(), target_logits=target_logits, labels=labels, mask=mask, cu_seqlens=cu_seqlens
    )
    return backends.load(backend).pair_loss(batch, LossOptions(*options), with_gradient)


def _run_pile_loss(student_logits, teacher_logits, labels, mask, cu_seqlens, prior, *options):
    *options, with_gradient, backend = options
    batch = RankingBatch(
        student_logits=student_logits.detach(), teacher_logits=teacher_logits, labels=labels, mask=mask,
        cu_seqlens=cu_seqlens, prior=prior,
    )  # fmt: skip
    ensemble_options = EnsembleOptions(*options[:_NUM_ENSEMBLE_OPTIONS])
    return backends.load(backend).pile_loss(
        batch, ensemble_options, LossOptions(*options[_NUM_ENSEMBLE_OPTIONS:]), with_gradient
    )


def _fake_ensemble(teacher_logits, labels, mask, cu_seqlens, prior, *options):
    options, (return_weights, return_trace, _) = EnsembleOptions(*options[:-3]), options[-3:]
    dtype = compute_dtype(teacher_logits)
    num_queries = teacher_logits.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    if not return_weights:
        weights = (0,)
    elif options.granularity == "document":
        weights = teacher_logits.shape
    else:
        weights = (num_queries, teacher_logits.shape[-1])
    trace = (num_queries, options.iterations + 1 if return_trace else 0)
    return (
        teacher_logits.new_empty(teacher_logits.shape[:-1], dtype=dtype),
        teacher_logits.new_empty(weights, dtype=dtype),
        teacher_logits.new_empty(trace, dtype=dtype),
    )


def _fake_loss(student_logits, other_logits, labels, mask, cu_seqlens, *rest):
    options, (with_gradient, _) = LossOptions(*rest[-2 - _NUM_LOSS_OPTIONS : -2]), rest[-2:]
    num_queries = student_logits.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    loss = student_logits.new_empty(
        (num_queries,) if options.reduction == "none" else (), dtype=compute_dtype(student_logits, other_logits)
    )
    return loss, student_logits.new_empty(student_logits.shape if with_gradient else (0,))


for _name, _run, _fake in (
    ("ensemble", _run_ensemble, _fake_ensemble),
    ("pair_loss", _run_pair_loss, _fake_loss),
    ("pile_loss", _run_pile_loss, _fake_loss),
):
    _library.impl(_name, _run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"pile_fast::{_name}", _fake, lib=_library)


# Calls on tensors that hold values go to the backend directly, past the dispatcher; what stands in for others (in tracers, fake
# modes, subclasses) must go through the op, which knows what to do with each of them.


def ensemble(
    batch: RankingBatch, options: EnsembleOptions, return_weights: bool, return_trace: bool, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """(logits, weights, trace) of the ensemble; outputs not asked for are empty."""
    if not batch.concrete:
        return torch.ops.pile_fast.ensemble(
            batch.teacher_logits, batch.labels, batch.mask, batch.cu_seqlens, batch.prior, *options,
            return_weights, return_trace, backend,
        )  # fmt: skip
    return backends.load(backend).ensemble(batch, options, return_weights, return_trace)


def _pair_loss(batch, options, with_gradient, backend):
    if not batch.concrete:
        return torch.ops.pile_fast.pair_loss(
            batch.student_logits, batch.target_logits, batch.labels, batch.mask, batch.cu_seqlens, *options,
            with_gradient, backend,
        )  # fmt: skip
    return backends.load(backend).pair_loss(batch, options, with_gradient)


def _pile_loss(batch, options, with_gradient, backend):
    ensemble_options, options = options
    if not batch.concrete:
        return torch.ops.pile_fast.pile_loss(
            batch.student_logits, batch.teacher_logits, batch.labels, batch.mask, batch.cu_seqlens, batch.prior,
            *ensemble_options, *options, with_gradient, backend,
        )  # fmt: skip
    return backends.load(backend).pile_loss(batch, ensemble_options, options, with_gradient)


class _Loss(torch.autograd.Function):
    """A loss whose gradient was computed with it. `run(batch, options, with_gradient, backend)` gives both."""

    @staticmethod
    def forward(ctx, student_logits, run, batch, options, backend):
        loss, gradient = run(batch, options, True, backend)
        ctx.save_for_backward(gradient, student_logits, batch.cu_seqlens)
        return loss

    @staticmethod
    def backward(ctx, upstream):
        gradient, student_logits, cu_seqlens = ctx.saved_tensors
        if upstream.dim() == 1:  # one loss per query
            upstream = upstream.unsqueeze(1) if cu_seqlens is None else _per_document(upstream, cu_seqlens, gradient)
        gradient = gradient * upstream
        if gradient.dtype is not student_logits.dtype:  # a half gradient times one float32 per query
            gradient = gradient.to(student_logits.dtype)
        if torch.is_grad_enabled():  # create_graph=True
            gradient = _OnceDifferentiable.apply(gradient, student_logits)
        return gradient, None, None, None, None


class _OnceDifferentiable(torch.autograd.Function):
    """An identity whose backward raises. `once_differentiable` would treat the gradient as a constant, without a word,
    whenever the upstream gradient is one."""

    @staticmethod
    def forward(ctx, gradient, student_logits):
        return gradient.clone()

    @staticmethod
    def backward(ctx, upstream):
        raise RuntimeError(
            "pile_fast losses are differentiable once: their gradient is computed by a kernel, not recorded. "
            "For second derivatives differentiate pile_fast.reference.pair_loss."
        )


def _per_document(per_query: Tensor, cu_seqlens: Tensor, like: Tensor) -> Tensor:
    """(Q,) → (D,): each document its query's value; documents of no query get the last one's."""
    if per_query.shape[0] == 0:
        return like.new_zeros(())
    documents = torch.arange(like.shape[0], device=like.device, dtype=cu_seqlens.dtype)
    return per_query[torch.searchsorted(cu_seqlens[1:-1], documents, right=True)]


def pair_loss(batch: RankingBatch, options: LossOptions, backend: str) -> Tensor:
    """The student's loss against `batch.target_logits` and `batch.labels`."""
    if batch.student_logits.requires_grad and torch.is_grad_enabled():
        return _Loss.apply(batch.student_logits, _pair_loss, batch, options, backend)
    return _pair_loss(batch, options, False, backend)[0]


def pile_loss(batch: RankingBatch, ensemble_options: EnsembleOptions, options: LossOptions, backend: str) -> Tensor:
    """The student's loss against the PILE ensemble of `batch.teacher_logits`."""
    if batch.student_logits.requires_grad and torch.is_grad_enabled():
        return _Loss.apply(batch.student_logits, _pile_loss, batch, (ensemble_options, options), backend)
    return _pile_loss(batch, (ensemble_options, options), False, backend)[0]
