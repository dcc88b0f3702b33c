"""The "cuda" backend: the CUDA C++ kernels of csrc/cuda behind the backend interface. CUDA tensors.

Tensors cross the border as device addresses and strides, the current stream as a number. PyTorch's allocator gives every
buffer, on that stream; no value of a device tensor is read, nothing waits.

The extension is loaded when it is first asked for. For tests, PILE_FAST_CUDA_EMULATION names a build of the same sources that
runs on the CPU (tests/cuda_emulation): the backend, asked for by name, then serves CPU tensors.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os

import torch
from torch import Tensor

from pile_fast.backends import native
from pile_fast.batch import RankingBatch
from pile_fast.options import EnsembleOptions, LossOptions

_EMULATION = os.environ.get("PILE_FAST_CUDA_EMULATION")
DEVICES = ("cuda", "cpu") if _EMULATION else ("cuda",)
_BUILT = bool(_EMULATION) or importlib.util.find_spec("pile_fast._cuda") is not None  # without loading it


@functools.cache
def _module():
    """The extension; ImportError where it does not load."""
    if not _EMULATION:
        return importlib.import_module("pile_fast._cuda")
    spec = importlib.util.spec_from_file_location("pile_fast._cuda", _EMULATION)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def unavailable() -> str:
    if not _BUILT:
        return (
            "the extension pile_fast._cuda was not built: nvcc was not found, or it failed, when pile_fast was installed; "
            "install the CUDA toolkit, or name its nvcc in PILE_FAST_NVCC, then reinstall pile_fast with pip's "
            "--force-reinstall --no-cache-dir"
        )
    driver = ""
    if not torch.compiler.is_compiling():  # a tracer cannot look into an import
        try:
            driver = _module().unavailable()
        except ImportError as error:
            return f"the extension pile_fast._cuda did not load ({error}); reinstall pile_fast on this machine"
    if _EMULATION:
        return ""
    if torch.version.hip is not None:
        return "this PyTorch is built for ROCm; use backend='triton'"
    if not torch.cuda.is_available():
        return f"PyTorch sees no CUDA GPU{driver and f' (CUDA: {driver})'}; on a CPU use backend='auto'"
    return ""


def refusal(batch: RankingBatch, ensemble: EnsembleOptions | None, loss: LossOptions | None) -> str:
    if batch.dtype is torch.float64:
        return "computes in float32, got float64 logits; use backend='auto' or 'torch', or cast them"
    return ""


def ensemble(
    batch: RankingBatch, options: EnsembleOptions, return_weights: bool, return_trace: bool
) -> tuple[Tensor, Tensor, Tensor]:
    teachers = batch.teacher_logits
    logits = teachers.new_empty(teachers.shape[:-1], dtype=torch.float32)
    if not return_weights:
        weights = teachers.new_empty(0, dtype=torch.float32)
    elif options.granularity == "document":
        weights = teachers.new_empty(teachers.shape, dtype=torch.float32)
    else:
        weights = teachers.new_empty((batch.num_queries, teachers.shape[-1]), dtype=torch.float32)
    trace = teachers.new_empty((batch.num_queries, options.iterations + 1 if return_trace else 0), dtype=torch.float32)
    if batch.num_queries == 0:
        return logits.fill_(torch.nan), weights.zero_(), trace
    outputs = (
        logits.data_ptr(), weights.data_ptr() if return_weights else 0, trace.data_ptr() if return_trace else 0, 0, 0,
    )  # fmt: skip
    place = _Place(teachers)
    plan = _plan(batch, batch.num_teachers, options.pairwise, place)
    if plan is not None:
        _run(batch, options, None, outputs, (0, 0), (0, 0, 0), plan, place)
        return logits, weights, trace
    if batch.packed:  # documents of no query
        logits.fill_(torch.nan)
        if options.granularity == "document":
            weights.zero_()
    _run_long(batch, options, None, native.views(batch), outputs, (0, 0), (0, 0, 0), place)
    return logits, weights, trace


def pair_loss(batch: RankingBatch, options: LossOptions, with_gradient: bool) -> tuple[Tensor, Tensor]:
    return _loss(batch, None, options, with_gradient)


def pile_loss(
    batch: RankingBatch, ensemble_options: EnsembleOptions, loss_options: LossOptions, with_gradient: bool
) -> tuple[Tensor, Tensor]:
    return _loss(batch, ensemble_options if loss_options.alpha > 0 else None, loss_options, with_gradient)


def _loss(batch, ensemble_options, options, with_gradient) -> tuple[Tensor, Tensor]:
    student = batch.student_logits
    queries, each, mean = batch.num_queries, options.reduction == "none", options.reduction == "mean"
    gradient = student.new_empty(student.shape if with_gradient else 0)
    if queries == 0:
        return student.new_zeros(queries if each else (), dtype=torch.float32), gradient.zero_()
    # Per query its loss and whether it has pairs.
    found = student.new_empty((2, queries), dtype=torch.float32)
    total = found[0] if each else student.new_empty((), dtype=torch.float32)
    # The mean's gradient waits in float32 for the number of queries that count.
    scale = mean and with_gradient
    unscaled = gradient if not scale or student.dtype is torch.float32 else torch.empty_like(gradient, dtype=torch.float32)
    outputs = (0, 0, 0, total.data_ptr(), unscaled.data_ptr() if with_gradient else 0)
    per_query = (found.data_ptr(), found.data_ptr() + 4 * queries)
    scaling = (native.DTYPES[unscaled.dtype], gradient.data_ptr() if scale else 0, native.DTYPES[gradient.dtype])
    place = _Place(student)
    teachers = 0 if ensemble_options is None else batch.num_teachers
    plan = _plan(batch, teachers, options.pairwise, place)
    if plan is not None:
        _run(batch, ensemble_options, options, outputs, per_query, scaling, plan, place)
        return total, gradient
    if batch.packed:  # documents of no query
        unscaled.zero_()
    views = native.views(batch)
    if ensemble_options is not None:
        target = student.new_full(student.shape, torch.nan, dtype=torch.float32)
        _run_long(batch, ensemble_options, None, views, (target.data_ptr(), 0, 0, 0, 0), (0, 0), (0, 0, 0), place)
        views = (*views[:2], (target.data_ptr(), native.DTYPES[target.dtype], target.stride()), *views[3:])
    _run_long(batch, None, options, views, outputs, per_query, scaling, place)
    return total, gradient


class _Place:
    """A tensor's device as the extension wants it: the index, the current stream, and what plans depend on."""

    __slots__ = ("like", "index", "where")

    def __init__(self, tensor: Tensor):
        self.like = tensor
        self.index = tensor.device.index if tensor.is_cuda else 0
        self.where = (self.index, torch.cuda.current_stream(self.index).cuda_stream if tensor.is_cuda else 0)


def _plan(batch: RankingBatch, teachers: int, pairwise: str, place: _Place):
    """How the short kernels take the batch; None if it is for the long ones."""
    if pairwise == "chebyshev":
        return None
    plan = _plan_short(batch.num_queries, batch.slots, batch.packed, teachers, pairwise == "direct", place.index)
    return plan if plan.capacity else None


def _run(batch: RankingBatch, ensemble_options, loss_options, outputs, per_query, scaling, plan, place: _Place) -> None:
    module = _module()
    scratch = place.like.new_empty(plan.scratch_words, dtype=torch.float32) if plan.scratch_words else None
    module.run(
        native.sizes(batch),
        native.views(batch),
        None if ensemble_options is None else native.struct(module, ensemble_options),
        None if loss_options is None else native.struct(module, loss_options),
        outputs,
        (*per_query, 0 if scratch is None else scratch.data_ptr(), *scaling),
        plan,
        _device(place.index),
        place.where,
    )


def _run_long(batch: RankingBatch, ensemble_options, loss_options, views, outputs, per_query, scaling, place: _Place) -> None:
    """An ensemble, or a loss against the target among the views."""
    module = _module()
    sizes = native.sizes(batch)
    ensemble = None if ensemble_options is None else native.struct(module, ensemble_options)
    loss = None if loss_options is None else native.struct(module, loss_options)
    keys = order = None
    if ensemble is not None or loss_options.alpha < 1:
        documents = batch.slots if batch.packed else batch.num_queries * batch.slots
        keys = place.like.new_empty(documents, dtype=torch.int64)
        module.long_keys(sizes, views, ensemble, keys.data_ptr(), place.where)
        keys, order = _sorted(batch, keys)
    scratch = place.like.new_empty(module.long_bytes(sizes, views, ensemble, loss), dtype=torch.uint8)
    module.run_long(
        sizes, views, ensemble, loss, outputs, (*per_query, scratch.data_ptr(), *scaling),
        (0, 0) if keys is None else (keys.data_ptr(), order.data_ptr()), _device(place.index), place.where,
    )  # fmt: skip


def _sorted(batch: RankingBatch, keys: Tensor) -> tuple[Tensor, Tensor]:
    """Each query's keys in rising order, and which documents they are of."""
    if not batch.packed:
        keys, order = keys.view(batch.num_queries, batch.slots).sort(dim=1, stable=True)
        return keys, order
    documents = torch.arange(keys.shape[0], device=keys.device, dtype=batch.cu_seqlens.dtype)
    query = torch.searchsorted(batch.cu_seqlens[1:].contiguous(), documents, right=True, out_int32=True)
    order = keys.argsort(stable=True)
    order = order[query[order].argsort(stable=True)]
    return keys[order], order


@functools.cache
def _device(index: int):
    return _module().device(index)


@functools.lru_cache(maxsize=1024)
def _plan_short(queries: int, slots: int, packed: bool, teachers: int, direct: bool, index: int):
    return _module().plan_short(queries, slots, packed, teachers, direct, _device(index))
