"""The "cpp" backend: the C++ SIMD kernels of csrc/cpu behind the backend interface. CPU tensors.

Tensors cross the border as addresses and strides; nothing is copied on the way in, whatever the dtype or stride.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from pile_fast.batch import RankingBatch, check_cu_seqlens, compute_dtype
from pile_fast.options import (
    DISTILLATIONS,
    GRANULARITIES,
    NORMALIZATIONS,
    PAIR_SUMS,
    REDUCTIONS,
    EnsembleOptions,
    LossOptions,
)

try:
    from pile_fast import _cpu

    _unavailable = ""
except ImportError as error:
    _cpu = None
    _unavailable = (
        f"the extension pile_fast._cpu did not load ({error}); it is built when pile_fast is installed where a C++17 "
        "compiler is found: install g++ or clang++ and reinstall pile_fast"
    )

DEVICES = ("cpu",)

# In the order of the enums of csrc/include/pile/options.h.
_DTYPES = {
    dtype: code
    for code, dtype in enumerate(
        (
            torch.float32, torch.float64, torch.bfloat16, torch.float16,
            torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool,
        )
    )
}  # fmt: skip
_PAIR_WEIGHTS = ("none", "label_gap", "gain_gap")


def unavailable() -> str:
    return _unavailable


def ensemble(
    batch: RankingBatch, options: EnsembleOptions, return_weights: bool, return_trace: bool
) -> tuple[Tensor, Tensor, Tensor]:
    teachers = batch.teacher_logits
    dtype = compute_dtype(teachers)
    logits = torch.empty(teachers.shape[:-1], dtype=dtype)
    if not return_weights:
        weights = torch.empty(0, dtype=dtype)
    elif options.granularity == "document":
        weights = torch.empty(teachers.shape, dtype=dtype)
    else:
        weights = torch.empty(batch.num_queries, teachers.shape[-1], dtype=dtype)
    trace = torch.empty(batch.num_queries, options.iterations + 1 if return_trace else 0, dtype=dtype)
    outputs = (
        logits.data_ptr(),
        weights.data_ptr() if return_weights else 0,
        trace.data_ptr() if return_trace else 0,
        0,
        0,
    )
    _run(batch, _ensemble_options(options), None, outputs, dtype)
    return logits, weights, trace


def pair_loss(batch: RankingBatch, options: LossOptions, with_gradient: bool) -> tuple[Tensor, Tensor]:
    dtype = compute_dtype(batch.student_logits, batch.target_logits)
    return _loss(batch, None, options, with_gradient, dtype)


def pile_loss(
    batch: RankingBatch, ensemble_options: EnsembleOptions, loss_options: LossOptions, with_gradient: bool
) -> tuple[Tensor, Tensor]:
    dtype = compute_dtype(batch.student_logits, batch.teacher_logits)
    native = _ensemble_options(ensemble_options) if loss_options.alpha > 0 else None
    return _loss(batch, native, loss_options, with_gradient, dtype)


def _loss(batch, native_ensemble, options, with_gradient, dtype) -> tuple[Tensor, Tensor]:
    student = batch.student_logits
    loss = torch.empty((batch.num_queries,) if options.reduction == "none" else (), dtype=dtype)
    gradient = torch.empty(student.shape if with_gradient else 0, dtype=student.dtype)
    outputs = (0, 0, 0, loss.data_ptr(), gradient.data_ptr() if with_gradient else 0)
    _run(batch, native_ensemble, _loss_options(options), outputs, dtype)
    return loss, gradient


def _run(batch, native_ensemble, native_loss, outputs, dtype) -> None:
    student, teachers, target = batch.student_logits, batch.teacher_logits, batch.target_logits
    slots = (student if student is not None else teachers).shape[0 if batch.packed else 1]
    if slots >= 2**31 and not batch.packed:
        raise ValueError(f"a query may have at most 2^31 - 1 documents, got {slots}")
    views = (
        _view(student, batch.packed),
        _view(teachers, batch.packed),
        _view(target, batch.packed),
        _view(batch.labels, batch.packed),
        _view(batch.mask, batch.packed),
        _view(batch.cu_seqlens, True),
        None if batch.prior is None else _prior_view(batch.prior),
    )
    sizes = (batch.num_queries, slots, 0 if teachers is None else teachers.shape[-1])
    if not _cpu.run(sizes, views, native_ensemble, native_loss, outputs, dtype is torch.float64, torch.get_num_threads()):
        check_cu_seqlens(batch.cu_seqlens, slots)


def _view(tensor: Tensor | None, packed: bool):
    """(address, dtype, stride per query, per document, per teacher)."""
    if tensor is None:
        return None
    stride = tensor.stride()
    if packed:
        stride = (0, *stride)
    return (tensor.data_ptr(), _DTYPES[tensor.dtype], *(stride if len(stride) == 3 else (*stride, 0)))


def _prior_view(prior: Tensor):
    stride = prior.stride()
    return (prior.data_ptr(), _DTYPES[prior.dtype], stride[0] if len(stride) == 2 else 0, 0, stride[-1])


@functools.lru_cache(maxsize=256)
def _ensemble_options(options: EnsembleOptions):
    return _cpu.EnsembleOptions(
        options.iterations,
        options.step_size,
        GRANULARITIES.index(options.granularity),
        NORMALIZATIONS.index(options.normalize),
        options.temperature,
        options.margin,
        _PAIR_WEIGHTS.index(options.pair_weight),
        PAIR_SUMS.index(options.pairwise),
    )


@functools.lru_cache(maxsize=256)
def _loss_options(options: LossOptions):
    return _cpu.LossOptions(
        options.alpha,
        DISTILLATIONS.index(options.distillation),
        options.distillation_temperature,
        _PAIR_WEIGHTS.index(options.pair_weight),
        REDUCTIONS.index(options.reduction),
        PAIR_SUMS.index(options.pairwise),
    )
