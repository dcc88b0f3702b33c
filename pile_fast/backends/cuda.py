"""The "cuda" backend: the CUDA C++ kernels of csrc/cuda behind the backend interface. CUDA tensors.

Tensors cross the border as device addresses and strides, the current stream as a number. PyTorch's allocator gives every buffer,
on that stream; no value of a device tensor is read, nothing waits.

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
            "the extension pile_fast._cuda was not built; it is where pile_fast is installed with nvcc at hand: install the CUDA "
            "toolkit, or name its nvcc in PILE_FAST_NVCC, and reinstall pile_fast"
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


def refusal(batch: RankingBatch) -> str:
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
    _run(batch, options, None, outputs, (0, 0), (0, 0, 0))
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
    address = gradient.data_ptr() if with_gradient else 0
    _run(
        batch, ensemble_options, options,
        (0, 0, 0, total.data_ptr(), unscaled.data_ptr() if with_gradient else 0),
        (found.data_ptr(), found.data_ptr() + 4 * queries),
        (native.DTYPES[unscaled.dtype], address if scale else 0, native.DTYPES[gradient.dtype]),
    )  # fmt: skip
    return total, gradient


def _run(batch: RankingBatch, ensemble_options, loss_options, outputs, found, gradient) -> None:
    module = _module()
    some = batch.teacher_logits if batch.student_logits is None else batch.student_logits
    index, stream = (some.device.index, torch.cuda.current_stream(some.device).cuda_stream) if some.is_cuda else (0, 0)
    device = _device(index)
    teachers = batch.num_teachers if ensemble_options is not None else 0
    plan = _plan_short(batch.num_queries, batch.slots, batch.packed, teachers, index)
    scratch = some.new_empty(plan.scratch_words, dtype=torch.float32) if plan.scratch_words else None
    module.run(
        native.sizes(batch),
        native.views(batch),
        None if ensemble_options is None else native.ensemble_options(module, ensemble_options),
        None if loss_options is None else native.loss_options(module, loss_options),
        outputs,
        (*found, 0 if scratch is None else scratch.data_ptr(), *gradient),
        plan,
        device,
        (index, stream),
    )


@functools.cache
def _device(index: int):
    return _module().device(index)


@functools.lru_cache(maxsize=1024)
def _plan_short(queries: int, slots: int, packed: bool, teachers: int, index: int):
    return _module().plan_short(queries, slots, packed, teachers, _device(index))
