"""The "cpp" backend: the C++ SIMD kernels of csrc/cpu behind the backend interface. CPU tensors.

Tensors cross the border as addresses and strides; nothing is copied on the way in, whatever the dtype or stride.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from pile_fast.backends import native
from pile_fast.backends.protocol import missing_term
from pile_fast.batch import RankingBatch, check_cu_seqlens, label_error
from pile_fast.options import EnsembleOptions, LossOptions

_cpu: Any = None
_TERMS: frozenset[str] = frozenset()
try:
    # By its full name: `from pile_fast import _cpu` calls a library that is not there a circular import.
    _cpu = importlib.import_module("pile_fast._cpu")
    _TERMS = frozenset(_cpu.TERMS)
    _unavailable = ""
except ImportError as error:
    if error.name == "pile_fast._cpu" and isinstance(error, ModuleNotFoundError):
        _unavailable = (
            "the compiled library was not built: no C++17 compiler was found, or it failed, when pile_fast was installed; "
            "install g++ or clang++, then reinstall pile_fast with pip's --force-reinstall --no-cache-dir"
        )
    else:
        _unavailable = f"the compiled library did not load ({error}); reinstall pile_fast on this machine"

DEVICES: tuple[str, ...] = ("cpu",)


def threads() -> int:
    """How many threads a call may use: PyTorch's number, or one where its OpenMP runtime cannot be used."""
    return torch.get_num_threads() if _cpu.has_threads() else 1


def unavailable() -> str:
    return _unavailable


def refusal(batch: RankingBatch, ensemble: EnsembleOptions | None, loss: LossOptions | None) -> str:
    return missing_term(_TERMS, loss)


def ensemble(
    batch: RankingBatch, options: EnsembleOptions, return_weights: bool, return_trace: bool
) -> tuple[Tensor, Tensor, Tensor]:
    teachers = batch.teacher_logits
    dtype = batch.dtype
    # Sizes as arguments, not as a tuple: that takes PyTorch half a microsecond longer.
    queries, slots = batch.num_queries, batch.slots
    logits = teachers.new_empty(slots, dtype=dtype) if batch.packed else teachers.new_empty(queries, slots, dtype=dtype)
    if not return_weights:
        weights = teachers.new_empty(0, dtype=dtype)
    elif options.granularity == "document":
        weights = teachers.new_empty(teachers.shape, dtype=dtype)
    else:
        weights = teachers.new_empty(queries, batch.num_teachers, dtype=dtype)
    trace = teachers.new_empty(queries, options.iterations + 1 if return_trace else 0, dtype=dtype)
    outputs = (
        logits.data_ptr(),
        weights.data_ptr() if return_weights else 0,
        trace.data_ptr() if return_trace else 0,
        0,
        0,
        0,
    )
    _run(batch, options, None, outputs)
    return logits, weights, trace


def pair_loss(batch: RankingBatch, options: LossOptions, with_gradient: bool) -> tuple[Tensor, Tensor]:
    return _loss(batch, None, options, with_gradient)


def derivatives(batch: RankingBatch, options: LossOptions) -> tuple[Tensor, Tensor, Tensor]:
    if reason := missing_term(_cpu.CURVED, options):
        raise RuntimeError(f"backend 'cpp' {reason}")
    student = batch.student_logits
    loss = student.new_empty(batch.num_queries, dtype=batch.dtype)
    gradient, hessian = (torch.empty(student.shape, dtype=batch.dtype) for _ in range(2))
    # A gradient has the student's dtype, so that it must be that of the arithmetic here.
    wide = batch.with_student(student.to(batch.dtype))
    _run(
        wide,
        None,
        options._replace(reduction="none"),
        (0, 0, 0, loss.data_ptr(), gradient.data_ptr(), 0),
        0,
        hessian.data_ptr(),
    )
    return loss, gradient, hessian


def pile_loss(
    batch: RankingBatch, of_ensemble: EnsembleOptions, of_loss: LossOptions, with_gradient: bool, with_pulls: bool
) -> tuple[Tensor, Tensor, Tensor]:
    sizes = (batch.num_queries, batch.num_teachers) if with_pulls else (0,)
    pulls = batch.teacher_logits.new_empty(*sizes, dtype=batch.dtype)
    needed = of_loss.alpha > 0 or with_pulls
    loss, gradient = _loss(batch, of_ensemble if needed else None, of_loss, with_gradient, pulls if with_pulls else None)
    return loss, gradient, pulls


def pulls(batch: RankingBatch, options: EnsembleOptions) -> tuple[Tensor, Tensor]:
    like, queries = batch.teacher_logits, batch.num_queries
    found = like.new_empty(queries, batch.num_teachers, dtype=batch.dtype)
    trace = like.new_empty(queries, 1, dtype=batch.dtype)
    _run(batch, options._replace(granularity="query", iterations=0), None, (0, 0, trace.data_ptr(), 0, 0, found.data_ptr()))
    return found, torch.where(found.isnan().all(1), torch.nan, trace[:, 0])


def fit_shared(batch: RankingBatch, options: EnsembleOptions, return_trace: bool) -> tuple[Tensor, Tensor]:
    exponents = batch.teacher_logits.new_empty(batch.num_teachers, dtype=torch.float64)
    trace = batch.teacher_logits.new_empty(options.iterations + 1 if return_trace else 0, dtype=batch.dtype)
    outputs = (0, 0, trace.data_ptr() if return_trace else 0, 0, 0, 0)
    _run(batch, options, None, outputs, exponents.data_ptr())
    return exponents, trace


def _loss(
    batch: RankingBatch, of_ensemble: EnsembleOptions | None, options: LossOptions, with_gradient: bool,
    pulls: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    student, to_pulls = batch.student_logits, 0 if pulls is None else pulls.data_ptr()
    loss = student.new_empty((batch.num_queries,) if options.reduction == "none" else (), dtype=batch.dtype)
    if with_gradient:
        gradient = torch.empty_like(student, memory_format=torch.contiguous_format)
        outputs = (0, 0, 0, loss.data_ptr(), gradient.data_ptr(), to_pulls)
    else:
        gradient = student.new_empty(0)
        outputs = (0, 0, 0, loss.data_ptr(), 0, to_pulls)
    _run(batch, of_ensemble, options, outputs)
    return loss, gradient


def _run(
    batch: RankingBatch, of_ensemble: EnsembleOptions | None, of_loss: LossOptions | None, outputs: tuple[int, ...],
    exponents: int = 0, hessian: int = 0,
) -> None:  # fmt: skip
    failed = _cpu.run(
        native.sizes(batch), native.views(batch),
        None if of_ensemble is None else native.struct(_cpu, of_ensemble),
        None if of_loss is None else native.struct(_cpu, of_loss),
        outputs, exponents, hessian, batch.dtype is torch.float64, torch.get_num_threads(),
    )  # fmt: skip
    if failed == _cpu.DONE:
        return
    if failed >= 0:
        raise label_error(integer=not batch.labels.is_floating_point(), query=failed)
    if batch.cu_seqlens is not None:
        check_cu_seqlens(batch.cu_seqlens, batch.slots)
    raise ValueError(f"expected at most 2^31 - 1 documents per query, got {batch.slots}")
