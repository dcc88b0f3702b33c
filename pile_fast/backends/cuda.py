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
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pile_fast.backends import native
from pile_fast.backends.protocol import missing_term
from pile_fast.batch import RankingBatch
from pile_fast.options import EnsembleOptions, LossOptions

_EMULATION = os.environ.get("PILE_FAST_CUDA_EMULATION")
DEVICES: tuple[str, ...] = ("cuda", "cpu") if _EMULATION else ("cuda",)
_BUILT = bool(_EMULATION) or importlib.util.find_spec("pile_fast._cuda") is not None  # without loading it


@functools.cache
def _module() -> Any:
    """The extension; ImportError where it does not load."""
    if not _EMULATION:
        return importlib.import_module("pile_fast._cuda")
    spec = importlib.util.spec_from_file_location("pile_fast._cuda", _EMULATION)
    assert spec is not None and spec.loader is not None
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
    if torch.compiler.is_compiling():  # a tracer cannot look into an import
        return ""
    return missing_term(_module().TERMS, loss)


def ensemble(
    batch: RankingBatch, options: EnsembleOptions, return_weights: bool, return_trace: bool
) -> tuple[Tensor, Tensor, Tensor]:
    teachers = batch.teacher_logits
    queries, by_document = batch.num_queries, options.granularity == "document"
    # Sizes as arguments, not as a tuple: that takes PyTorch half a microsecond longer.
    logits = teachers.new_empty(*teachers.shape[:-1], dtype=torch.float32)
    of_weights = teachers.shape if by_document else (queries, batch.num_teachers)
    weights = teachers.new_empty(*(of_weights if return_weights else (0,)), dtype=torch.float32)
    trace = teachers.new_empty(queries, options.iterations + 1 if return_trace else 0, dtype=torch.float32)
    if queries == 0:
        return logits.fill_(torch.nan), weights.zero_(), trace
    call = _Call(batch, options, None, teachers)
    to = _Addresses(
        logits.data_ptr(), weights.data_ptr() if return_weights else 0, trace.data_ptr() if return_trace else 0
    )  # fmt: skip
    if plan := call.short_plan(options.pairwise, options.iterations):
        call.run_short(plan, to)
    else:
        if batch.packed:  # documents of no query
            logits.fill_(torch.nan)
            if by_document:
                weights.zero_()
        call.run_long(to, by_label=options.iterations > 0 or return_trace)
    return logits, weights, trace


def pulls(batch: RankingBatch, options: EnsembleOptions) -> tuple[Tensor, Tensor]:
    like, queries = batch.teacher_logits, batch.num_queries
    found = like.new_empty(queries, batch.num_teachers, dtype=torch.float32)
    losses = like.new_empty(queries, dtype=torch.float32)
    if queries == 0:
        return found, losses
    options = _at_given_weights(options)
    call = _Call(batch, options, None, like)
    to = _Addresses(trace=losses.data_ptr(), pulls=found.data_ptr())
    if plan := call.short_plan(options.pairwise, 1):
        call.run_short(plan, to)
    else:
        call.run_long(to, by_label=True)
    return found, losses


@functools.lru_cache(maxsize=64)
def _at_given_weights(options: EnsembleOptions) -> EnsembleOptions:
    return options._replace(granularity="shared", iterations=0)


def pair_loss(batch: RankingBatch, options: LossOptions, with_gradient: bool) -> tuple[Tensor, Tensor]:
    return _loss(batch, None, options, with_gradient, None)


def pile_loss(
    batch: RankingBatch, of_ensemble: EnsembleOptions, of_loss: LossOptions, with_gradient: bool, with_pulls: bool
) -> tuple[Tensor, Tensor, Tensor]:
    sizes = (batch.num_queries, batch.num_teachers) if with_pulls else (0,)
    pulls = batch.teacher_logits.new_empty(*sizes, dtype=torch.float32)
    needed = of_loss.alpha > 0 or with_pulls
    found = _loss(batch, of_ensemble if needed else None, of_loss, with_gradient, pulls if with_pulls else None)
    return *found, pulls


def _loss(
    batch: RankingBatch, of_ensemble: EnsembleOptions | None, of_loss: LossOptions, with_gradient: bool, pulls: Tensor | None
) -> tuple[Tensor, Tensor]:
    student, queries, each = batch.student_logits, batch.num_queries, of_loss.reduction == "none"
    gradient = torch.empty_like(student, memory_format=torch.contiguous_format) if with_gradient else student.new_empty(0)
    if queries == 0:
        return student.new_zeros(queries if each else (), dtype=torch.float32), gradient.zero_()
    per_query = student.new_empty(2, queries, dtype=torch.float32)
    loss = per_query[0] if each else student.new_empty((), dtype=torch.float32)
    # The mean's gradient waits in float32 for the number of queries that count.
    scale = with_gradient and of_loss.reduction == "mean"
    unscaled = torch.empty_like(gradient, dtype=torch.float32) if scale and student.element_size() < 4 else gradient
    call = _Call(batch, of_ensemble, of_loss, student)
    to_pulls = 0 if pulls is None else pulls.data_ptr()
    to = _Addresses(
        loss=loss.data_ptr(), gradient=unscaled.data_ptr() if with_gradient else 0, pulls=to_pulls,
        scaled=gradient.data_ptr() if scale else 0, per_query=per_query.data_ptr(),
    )  # fmt: skip
    sweeps = 0 if of_ensemble is None else of_ensemble.iterations + (pulls is not None)
    if plan := call.short_plan(of_loss.pairwise, sweeps):
        call.run_short(plan, to)
        return loss, gradient
    if of_ensemble is not None:
        target = student.new_full(student.shape if of_loss.alpha > 0 else (0,), torch.nan, dtype=torch.float32)
        of_target = _Addresses(target.data_ptr(), pulls=to_pulls)
        _Call(batch, of_ensemble, None, student).run_long(of_target, by_label=sweeps > 0)
        call = _Call(batch, None, of_loss, student, target if of_loss.alpha > 0 else None)
    if batch.packed:  # documents of no query
        unscaled.zero_()
    call.run_long(to, by_label=of_loss.alpha < 1)
    return loss, gradient


class _Addresses(NamedTuple):
    """Where a call writes, 0 where nothing is asked for; the extension reads them by position.

    Attributes:
        gradient: in the student's dtype, or in float32 if `scaled` is given: then the mean's goes there.
        per_query: the losses of the queries and, behind them, whether each counts.
    """

    logits: int = 0
    weights: int = 0
    trace: int = 0
    loss: int = 0
    gradient: int = 0
    pulls: int = 0
    scaled: int = 0
    per_query: int = 0
    scratch: int = 0


class _Call:
    """A call on the device and the current stream of the tensor `like`; `target` takes the place of the batch's."""

    __slots__ = ("batch", "like", "teachers", "call", "index", "place")

    def __init__(
        self, batch: RankingBatch, ensemble: EnsembleOptions | None, loss: LossOptions | None, like: Tensor,
        target: Tensor | None = None,
    ) -> None:  # fmt: skip
        module, views = _module(), native.views(batch)
        if target is not None:
            views = (*views[:2], (target.data_ptr(), native.DTYPES[target.dtype], target.stride()), *views[3:])
        of_ensemble = None if ensemble is None else native.struct(module, ensemble)
        of_loss = None if loss is None else native.struct(module, loss)
        self.batch, self.like, self.teachers = batch, like, 0 if ensemble is None else batch.num_teachers
        self.call = module.Call(native.sizes(batch), views, of_ensemble, of_loss)
        self.index = index = like.device.index if like.is_cuda else 0
        self.place = index, torch.cuda.current_stream(index).cuda_stream if like.is_cuda else 0

    def short_plan(self, pairwise: str, sweeps: int) -> Any:
        batch = self.batch
        return _short_plan(batch.num_queries, batch.slots, batch.packed, self.teachers, sweeps, pairwise, self.index)

    def run_short(self, plan: Any, to: _Addresses) -> None:
        """Everything in one launch, and the reduction."""
        if plan.scratch_bytes:
            scratch = self.like.new_empty(plan.scratch_bytes, dtype=torch.uint8)
            to = to._replace(scratch=scratch.data_ptr())
        _module().run_short(self.call, to, plan, _device(self.index), self.place)

    def run_long(self, to: _Addresses, by_label: bool) -> None:
        """An ensemble, or a loss against a target: where it goes by labels keys and PyTorch's sort, then phase by phase."""
        module, batch, first, second = _module(), self.batch, 0, 0
        if by_label:
            keys = self.like.new_empty(batch.slots if batch.packed else batch.num_queries * batch.slots, dtype=torch.int64)
            module.long_keys(self.call, keys.data_ptr(), self.place)
            keys, order = _sorted(batch, keys)
            first, second = keys.data_ptr(), order.data_ptr()
        scratch = self.like.new_empty(module.long_bytes(self.call, to), dtype=torch.uint8)
        module.run_long(self.call, to._replace(scratch=scratch.data_ptr()), first, second, _device(self.index), self.place)


def _sorted(batch: RankingBatch, keys: Tensor) -> tuple[Tensor, Tensor]:
    """Each query's keys in rising order, and which documents they are of."""
    if batch.cu_seqlens is None:
        keys, order = keys.view(batch.num_queries, batch.slots).sort(dim=1, stable=True)
        return keys, order
    documents = torch.arange(keys.shape[0], device=keys.device, dtype=batch.cu_seqlens.dtype)
    query = torch.searchsorted(batch.cu_seqlens[1:].contiguous(), documents, right=True, out_int32=True)
    order = keys.argsort(stable=True)
    order = order[query[order].argsort(stable=True)]
    return keys[order], order


@functools.cache
def _device(index: int) -> Any:
    return _module().device(index)


@functools.lru_cache(maxsize=1024)
def _short_plan(queries: int, slots: int, packed: bool, teachers: int, sweeps: int, pairwise: str, index: int) -> Any:
    """How the launch for short lists takes a batch; None if it is for the long ones'. `sweeps`: over the ensemble's pairs."""
    if pairwise == "chebyshev":
        return None
    plan = _module().plan_short(queries, slots, packed, teachers, sweeps, pairwise == "direct", _device(index))
    return plan if plan.capacity else None
