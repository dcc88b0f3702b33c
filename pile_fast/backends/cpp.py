"""The "cpp" backend: the C++ SIMD kernels of csrc/cpu behind the backend interface. CPU tensors.

Tensors cross the border as addresses and strides; nothing is copied on the way in, whatever the dtype or stride.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from pile_fast.batch import RankingBatch, check_cu_seqlens
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


def refusal(batch: RankingBatch) -> str:
    return ""


def ensemble(
    batch: RankingBatch, options: EnsembleOptions, return_weights: bool, return_trace: bool
) -> tuple[Tensor, Tensor, Tensor]:
    teachers = batch.teacher_logits
    dtype = batch.dtype
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
    _run(batch, _ensemble_options(options), None, outputs)
    return logits, weights, trace


def pair_loss(batch: RankingBatch, options: LossOptions, with_gradient: bool) -> tuple[Tensor, Tensor]:
    return _loss(batch, None, options, with_gradient)


def pile_loss(
    batch: RankingBatch, ensemble_options: EnsembleOptions, loss_options: LossOptions, with_gradient: bool
) -> tuple[Tensor, Tensor]:
    native = _ensemble_options(ensemble_options) if loss_options.alpha > 0 else None
    return _loss(batch, native, loss_options, with_gradient)


def _loss(batch, native_ensemble, options, with_gradient) -> tuple[Tensor, Tensor]:
    student = batch.student_logits
    loss = student.new_empty((batch.num_queries,) if options.reduction == "none" else (), dtype=batch.dtype)
    if with_gradient:
        gradient = torch.empty_like(student, memory_format=torch.contiguous_format)
        outputs = (0, 0, 0, loss.data_ptr(), gradient.data_ptr())
    else:
        gradient = student.new_empty(0)
        outputs = (0, 0, 0, loss.data_ptr(), 0)
    _run(batch, native_ensemble, _loss_options(options), outputs)
    return loss, gradient


def _run(batch, native_ensemble, native_loss, outputs) -> None:
    student, teachers, target, labels = batch.student_logits, batch.teacher_logits, batch.target_logits, batch.labels
    mask, cu_seqlens, prior = batch.mask, batch.cu_seqlens, batch.prior
    # (address, dtype, strides) each; the extension tells the layouts apart by the number of strides.
    views = (
        None if student is None else (student.data_ptr(), _DTYPES[student.dtype], student.stride()),
        None if teachers is None else (teachers.data_ptr(), _DTYPES[teachers.dtype], teachers.stride()),
        None if target is None else (target.data_ptr(), _DTYPES[target.dtype], target.stride()),
        None if labels is None else (labels.data_ptr(), _DTYPES[labels.dtype], labels.stride()),
        None if mask is None else (mask.data_ptr(), _DTYPES[mask.dtype], mask.stride()),
        None if cu_seqlens is None else (cu_seqlens.data_ptr(), _DTYPES[cu_seqlens.dtype], cu_seqlens.stride()),
        None if prior is None else (prior.data_ptr(), _DTYPES[prior.dtype], prior.stride()),
    )
    sizes = (batch.num_queries, batch.slots, batch.num_teachers)
    if not _cpu.run(sizes, views, native_ensemble, native_loss, outputs, batch.dtype is torch.float64, torch.get_num_threads()):
        check_cu_seqlens(cu_seqlens, batch.slots)
        raise ValueError(f"expected at most 2^31 - 1 documents per query, got {batch.slots}")


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
