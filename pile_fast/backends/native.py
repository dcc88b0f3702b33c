"""What the backends of an extension module share: tensors as addresses and strides, options as the module's structs.

The order of everything here is that of csrc/bindings/arguments.h; options go by name.
"""

from __future__ import annotations

from typing import Any

import torch

from pile_fast.batch import RankingBatch
from pile_fast.options import EnsembleOptions, LossOptions
from pile_fast.terms import Term

DTYPES = {
    dtype: code
    for code, dtype in enumerate(
        (
            torch.float32, torch.float64, torch.bfloat16, torch.float16,
            torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool,
        )
    )
}  # fmt: skip


def sizes(batch: RankingBatch) -> tuple[int, int, int]:
    return batch.num_queries, batch.slots, batch.num_teachers


def views(batch: RankingBatch) -> tuple[tuple[int, int, tuple[int, ...]] | None, ...]:
    """(address, dtype, strides) of each input; the extension tells the layouts apart by the number of strides."""
    student, teachers, target, labels = batch.student_logits, batch.teacher_logits, batch.target_logits, batch.labels
    mask, cu_seqlens, prior = batch.mask, batch.cu_seqlens, batch.prior
    weights, query_weights = batch.weights, batch.query_weights
    return (
        None if student is None else (student.data_ptr(), DTYPES[student.dtype], student.stride()),
        None if teachers is None else (teachers.data_ptr(), DTYPES[teachers.dtype], teachers.stride()),
        None if target is None else (target.data_ptr(), DTYPES[target.dtype], target.stride()),
        None if labels is None else (labels.data_ptr(), DTYPES[labels.dtype], labels.stride()),
        None if mask is None else (mask.data_ptr(), DTYPES[mask.dtype], mask.stride()),
        None if cu_seqlens is None else (cu_seqlens.data_ptr(), DTYPES[cu_seqlens.dtype], cu_seqlens.stride()),
        None if prior is None else (prior.data_ptr(), DTYPES[prior.dtype], prior.stride()),
        None if weights is None else (weights.data_ptr(), DTYPES[weights.dtype], weights.stride()),
        None if query_weights is None else (query_weights.data_ptr(), DTYPES[query_weights.dtype], query_weights.stride()),
    )


# By the options' identity: they are built once, and hashing all of their fields takes longer than the look-up.
_STRUCTS: dict[int, tuple[Any, Any, Any]] = {}


def struct(module: Any, options: EnsembleOptions | LossOptions) -> Any:
    """The options as `module`'s struct of that name, filled by name; a term is its key and its numbers."""
    kept = _STRUCTS.get(id(options))
    if kept is None or kept[0] is not options or kept[1] is not module:
        if len(_STRUCTS) >= 256:
            _STRUCTS.clear()
        kept = _STRUCTS[id(options)] = (options, module, _filled(module, options))
    return kept[2]


def _filled(module: Any, options: EnsembleOptions | LossOptions) -> Any:
    filled = getattr(module, type(options).__name__)()
    for name, value in options._asdict().items():
        if isinstance(value, Term):
            value = (value.key, dict(zip(value.names, value.numbers, strict=True)))
        setattr(filled, name, value)
    return filled
