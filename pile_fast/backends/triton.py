"""The "triton" backend: the kernels of pile_fast.kernels behind the backend interface. CUDA and HIP tensors.

Everything a launch needs is known from shapes and dtypes: no value of a device tensor is read. A short list is one program of
one launch (then a small one for the reduction over queries); where lists are long, or few, every phase is a launch over
blocks of documents.

With TRITON_INTERPRET=1 set before triton is imported, the kernels run in Triton's interpreter and the backend, asked for by
name, serves CPU tensors: for tests.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os

import torch
from torch import Tensor

from pile_fast.batch import RankingBatch
from pile_fast.options import EnsembleOptions, LossOptions

_INTERPRET = os.environ.get("TRITON_INTERPRET", "0") == "1"
_INSTALLED = importlib.util.find_spec("triton") is not None  # without importing it
DEVICES = ("cuda", "cpu") if _INTERPRET else ("cuda",)

MAX_TEACHERS = 128
# Up to this many documents per list one program walks through a list alone, if there are lists enough to keep a GPU busy.
LONGEST_ALONE = 1024
ENOUGH_QUERIES = 128
# One program hands its scratch from phase to phase across a barrier. On NVIDIA that orders global memory within the program;
# the code Triton makes for AMD does not wait for stores before it, so there the end of a launch is the barrier.
_BARRIER_ORDERS_MEMORY = torch.version.hip is None


def unavailable() -> str:
    if not _INSTALLED:
        return "triton is not installed; pip install 'pile_fast[gpu]' (Linux; CUDA and ROCm builds of PyTorch bring it along)"
    if not (_INTERPRET or torch.cuda.is_available()):
        return "PyTorch sees no CUDA or ROCm GPU; on a CPU use backend='auto', or TRITON_INTERPRET=1 to test the kernels"
    return ""


def refusal(batch: RankingBatch) -> str:
    if batch.dtype is torch.float64:
        return "computes in float32, got float64 logits; use backend='auto' or 'torch', or cast them"
    if batch.num_teachers > MAX_TEACHERS:
        return f"takes at most {MAX_TEACHERS} teachers, got {batch.num_teachers}; use backend='auto' or 'torch'"
    return ""


def ensemble(
    batch: RankingBatch, options: EnsembleOptions, return_weights: bool, return_trace: bool
) -> tuple[Tensor, Tensor, Tensor]:
    _check(batch, options.pairwise)
    teachers = batch.teacher_logits
    # Documents of no query keep what they are filled with; all others are written.
    logits = _documents(batch, teachers, teachers.shape[:-1], torch.float32, torch.nan)
    if not return_weights:
        weights = None
    elif options.granularity == "document":
        weights = _documents(batch, teachers, teachers.shape, torch.float32, 0.0)
    else:
        weights = teachers.new_empty((batch.num_queries, teachers.shape[-1]), dtype=torch.float32)
    trace = teachers.new_empty((batch.num_queries, options.iterations + 1 if return_trace else 0), dtype=torch.float32)
    _run(batch, options, None, logits=logits, weights=weights, trace=trace if return_trace else None)
    return logits, teachers.new_empty(0, dtype=torch.float32) if weights is None else weights, trace


def pair_loss(batch: RankingBatch, options: LossOptions, with_gradient: bool) -> tuple[Tensor, Tensor]:
    _check(batch, options.pairwise)
    return _loss(batch, None, options, with_gradient, batch.target_logits)


def pile_loss(
    batch: RankingBatch, ensemble_options: EnsembleOptions, loss_options: LossOptions, with_gradient: bool
) -> tuple[Tensor, Tensor]:
    _check(batch, ensemble_options.pairwise)
    if loss_options.alpha == 0:
        return _loss(batch, None, loss_options, with_gradient, None)
    target = batch.student_logits.new_empty(batch.student_logits.shape, dtype=torch.float32)
    return _loss(batch, ensemble_options, loss_options, with_gradient, target)


def _check(batch: RankingBatch, pairwise: str) -> None:
    if pairwise == "chebyshev":
        raise NotImplementedError("pairwise='chebyshev': backend 'triton' has only 'direct' pair sums; use 'auto' or 'direct'")


def _documents(batch: RankingBatch, like: Tensor, shape, dtype: torch.dtype, fill: float) -> Tensor:
    if batch.packed:
        return like.new_full(shape, fill, dtype=dtype)
    return like.new_empty(shape, dtype=dtype)


def _loss(batch, ensemble_options, options, with_gradient, target) -> tuple[Tensor, Tensor]:
    from pile_fast.kernels.loss import reduce_kernel

    student = batch.student_logits
    queries, documents = batch.num_queries, student.numel()
    mean = options.reduction == "mean"
    losses = student.new_empty((queries,), dtype=torch.float32)
    has_pairs = student.new_empty((queries,), dtype=torch.int32)
    gradient = student.new_empty(0)
    if with_gradient:
        # The mean's gradient waits in float32 for the number of queries that count.
        gradient = _documents(batch, student, student.shape, torch.float32 if mean else student.dtype, 0.0)
    _run(
        batch, ensemble_options, options, target=target, logits=target, losses=losses, has_pairs=has_pairs,
        gradient=gradient if with_gradient else None,
    )  # fmt: skip
    if options.reduction == "none":
        return losses, gradient
    total = student.new_empty((), dtype=torch.float32)
    scale = mean and with_gradient
    scaled = gradient if not scale or student.dtype is torch.float32 else torch.empty_like(gradient, dtype=student.dtype)
    block = 1024
    programs = min(-(-documents // (4 * block)), 512) if scale else 1
    with _on(student):
        reduce_kernel[(max(programs, 1),)](
            losses, has_pairs, total, gradient, scaled, queries, documents,
            MEAN=mean, WITH_GRADIENT=scale, BLOCK=block, num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
    return total, scaled


def _run(
    batch: RankingBatch,
    options: EnsembleOptions | None,
    loss: LossOptions | None,
    *,
    target: Tensor | None = None,
    logits: Tensor | None = None,
    weights: Tensor | None = None,
    trace: Tensor | None = None,
    losses: Tensor | None = None,
    has_pairs: Tensor | None = None,
    gradient: Tensor | None = None,
) -> None:
    """Launch everything from the inputs to the outputs given, but for the reduction over queries."""
    from pile_fast.kernels.ensemble import FIELDS, SCALARS
    from pile_fast.kernels.pile import pile_kernel

    some = batch.teacher_logits if batch.student_logits is None else batch.student_logits
    queries, slots = batch.num_queries, batch.slots
    documents = slots if batch.packed else queries * slots
    if queries == 0:
        return
    M = batch.num_teachers if options is not None else 1
    config = _config(slots, M)
    mean_length = slots / queries if batch.packed else slots
    short = slots <= config["BR"] or (queries >= ENOUGH_QUERIES and mean_length <= LONGEST_ALONE)
    alone = short and _BARRIER_ORDERS_MEMORY
    block_ends = owner = None
    if not batch.packed:
        blocks = queries * -(-slots // config["BR"])
    elif not alone:
        lengths = batch.cu_seqlens[1:] - batch.cu_seqlens[:-1]
        block_ends = ((lengths + (config["BR"] - 1)) // config["BR"]).cumsum(0)
        blocks = documents // config["BR"] + queries  # at least as many as there are
        owner = torch.searchsorted(block_ends, torch.arange(blocks, device=some.device), right=True, out_int32=True)

    scratch_size = documents * (FIELDS.value + M) + queries * (5 * M + SCALARS.value)
    scratch = some.new_empty(scratch_size, dtype=torch.float32)
    use_d, use_r = loss is not None and loss.alpha > 0, loss is not None and loss.alpha < 1
    by_document = options is None or options.granularity == "document"
    mse = use_d and loss.distillation == "mse"
    # One pair weight serves both: the functions take one.
    weight = options.pair_weight if options is not None else loss.pair_weight
    mask = None if batch.mask is None else batch.mask.view(torch.uint8)
    labels = batch.labels
    if labels is not None and labels.dtype is torch.bool:
        labels = labels.view(torch.uint8)
    arguments = (
        *_strided(batch.student_logits), *_strided(batch.teacher_logits if options is not None else None, 3),
        *_strided(target), *_strided(labels), *_strided(mask),
        batch.cu_seqlens, block_ends, owner, *_strided(batch.prior if options is not None else None),
        logits, weights, trace, 0 if trace is None else trace.shape[1], losses, has_pairs, gradient, scratch,
        queries, slots, documents, M,
    )  # fmt: skip
    numbers = (
        float(options.step_size) if options is not None else 0.0,
        1 / options.temperature if options is not None else 1.0,
        options.margin / options.temperature if options is not None else 0.0,
        loss.alpha if loss is not None else 0.0,
        1 / loss.distillation_temperature if use_d and not mse else 1.0,
    )
    constants = dict(
        ENSEMBLE=options is not None, LOSS=loss is not None, BY_DOCUMENT=by_document,
        NORMALIZE=options.normalize if options is not None else "none", WEIGHT=weight,
        MARGIN=options is not None and options.margin != 0, TRACE=trace is not None, USE_D=use_d, MSE=mse, USE_R=use_r,
        WITH_GRADIENT=gradient is not None, MASKED=mask is not None, PACKED=batch.packed,
        APPROX=not _INTERPRET and torch.version.hip is None, **config,
    )  # fmt: skip

    def launch(phase: str, programs: int, iterations: int = 0, iteration: int = 0) -> None:
        if programs:
            pile_kernel[(programs,)](*arguments, iterations, iteration, *numbers, PHASE=phase, **constants)

    with _on(some):
        if alone:
            launch("all", queries, options.iterations if options is not None else 0)
            return
        if options is not None or use_r:
            launch("ranks", blocks)
        if options is not None:
            launch("statistics", queries)
            launch("calibrate", blocks)
            launch("counts", blocks)
            if trace is not None or not by_document:
                launch("totals", queries)
            for iteration in range(options.iterations + 1):
                if trace is not None:
                    launch("trace_rows", blocks, 1, iteration)
                    launch("trace_sum", queries, 1, iteration)
                if iteration == options.iterations:
                    break
                launch("iterate", blocks, 1, iteration)
                if not by_document:
                    launch("reweight", queries, 1, iteration)
                    launch("tilt", blocks, 1, iteration)
            launch("output", blocks)
            if weights is not None and not by_document:
                launch("weights", queries)
        if loss is not None:
            launch("load", blocks)
            launch("loss_sums", queries)
            launch("pairs", blocks)
            launch("loss_total", queries)
            if gradient is not None:
                launch("gradient", blocks)


def _config(slots: int, teachers: int) -> dict:
    """Block sizes by rule: the power of two that holds a list, at most 128 documents and about 2048
    logits. All lengths share a handful of compiled kernels."""
    MP = max(2, 1 << (teachers - 1).bit_length())
    BR = 32
    while BR < min(slots, 128):
        BR *= 2
    while BR > 16 and BR * MP > 2048:
        BR //= 2
    # Two rows per thread, or more threads where the teachers take the registers.
    num_warps = max(1, BR // 64) if MP < 16 else 4
    return {"MP": MP, "BR": BR, "BC": 4, "num_warps": num_warps, "enable_fp_fusion": True}


def _strided(tensor: Tensor | None, rank: int = 2) -> tuple:
    """The tensor with its strides, those of the packed layout without a query's."""
    if tensor is None:
        return (None,) + (0,) * rank
    return (tensor, *(0,) * (rank - tensor.dim()), *tensor.stride())


def _on(tensor: Tensor):
    """Triton launches on the current device, so make it the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()
