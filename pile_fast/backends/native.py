"""What the backends of an extension module share: tensors as addresses and strides, options as the module's structs.

The order of everything here is that of csrc/bindings/arguments.h and csrc/include/pile/options.h.
"""

from __future__ import annotations

import functools

import torch

from pile_fast.batch import RankingBatch
from pile_fast.options import EnsembleOptions, LossOptions

GRANULARITIES, NORMALIZATIONS, PAIR_SUMS = ("document", "query"), ("zscore", "center", "none"), ("auto", "direct", "chebyshev")
REDUCTIONS = ("mean", "sum", "none")

DTYPES = {
    dtype: code
    for code, dtype in enumerate(
        (
            torch.float32, torch.float64, torch.bfloat16, torch.float16,
            torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool,
        )
    )
}  # fmt: skip
_PAIR_WEIGHTS = ("none", "label_gap", "gain_gap")


def sizes(batch: RankingBatch) -> tuple[int, int, int]:
    return batch.num_queries, batch.slots, batch.num_teachers


def views(batch: RankingBatch) -> tuple:
    """(address, dtype, strides) of each input; the extension tells the layouts apart by the number of strides."""
    student, teachers, target, labels = batch.student_logits, batch.teacher_logits, batch.target_logits, batch.labels
    mask, cu_seqlens, prior = batch.mask, batch.cu_seqlens, batch.prior
    return (
        None if student is None else (student.data_ptr(), DTYPES[student.dtype], student.stride()),
        None if teachers is None else (teachers.data_ptr(), DTYPES[teachers.dtype], teachers.stride()),
        None if target is None else (target.data_ptr(), DTYPES[target.dtype], target.stride()),
        None if labels is None else (labels.data_ptr(), DTYPES[labels.dtype], labels.stride()),
        None if mask is None else (mask.data_ptr(), DTYPES[mask.dtype], mask.stride()),
        None if cu_seqlens is None else (cu_seqlens.data_ptr(), DTYPES[cu_seqlens.dtype], cu_seqlens.stride()),
        None if prior is None else (prior.data_ptr(), DTYPES[prior.dtype], prior.stride()),
    )


@functools.lru_cache(maxsize=256)
def ensemble_options(module, options: EnsembleOptions):
    """The options as `module`'s struct."""
    return module.EnsembleOptions(
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
def loss_options(module, options: LossOptions):
    """The options as `module`'s struct."""
    return module.LossOptions(
        options.alpha,
        ("logistic", "mse").index(options.distillation.name),
        getattr(options.distillation, "temperature", 1.0),
        _PAIR_WEIGHTS.index(options.pair_weight),
        REDUCTIONS.index(options.reduction),
        PAIR_SUMS.index(options.pairwise),
    )
