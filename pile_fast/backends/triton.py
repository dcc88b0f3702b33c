"""The "triton" backend: the kernels of pile_fast.kernels behind the backend interface. CUDA and HIP tensors.

Everything a launch needs is known from shapes and dtypes: no value of a device tensor is read. A short list is one program of
one launch (then a small one for the reduction over queries); where lists are long, or few, every phase is a launch over
chunks of documents (triton_long.py).

With TRITON_INTERPRET=1 set before triton is imported, the kernels run in Triton's interpreter and the backend, asked for by
name, serves CPU tensors: for tests.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import os
import re
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pile_fast.backends.protocol import missing_term
from pile_fast.batch import RankingBatch
from pile_fast.options import EnsembleOptions, LossOptions

if TYPE_CHECKING:
    from pile_fast.kernels.layout import Ensemble

_INTERPRET = os.environ.get("TRITON_INTERPRET", "0") == "1"
_INSTALLED = importlib.util.find_spec("triton") is not None  # without importing it
# The `gpu` extra's bound in pyproject.toml. PyTorch 2.6 and 2.7 bring an older one along.
OLDEST = (3, 4)
DEVICES: tuple[str, ...] = ("cuda", "cpu") if _INTERPRET else ("cuda",)

MAX_TEACHERS = 128
# Up to this many documents per list one program walks through a list alone, if there are lists enough to keep a GPU busy.
LONGEST_ALONE = 1024
ENOUGH_QUERIES = 128
# Packed lists may all be short or one of them long. Up to this many documents in all, even one long list is a program's work of
# a few milliseconds; so lists that are short on average get a program each.
LONGEST_PACKED = 4096
# "auto" sums in linear time from here on, by arithmetic (docs/triton.md): lists of this length, and so many pairs (length
# squared) that an iteration's direct sums take longer than four more launches.
SHORTEST_LINEAR = 512
PAIRS_LINEAR = 2**26
# One program hands its scratch from phase to phase across a barrier. On NVIDIA that orders global memory within the program;
# the code Triton makes for AMD does not wait for stores before it, so there the end of a launch is the barrier.
_BARRIER_ORDERS_MEMORY = torch.version.hip is None


def _version() -> str:
    """The installed Triton's, without importing it; "" where no distribution of the known names has it."""
    for name in ("triton", "pytorch-triton", "pytorch-triton-rocm", "triton-rocm"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(name)
    return ""


_VERSION = _version()
_TOO_OLD = bool(_VERSION) and tuple(map(int, re.findall(r"\d+", _VERSION)[:2])) < OLDEST


def unavailable() -> str:
    if not _INSTALLED:
        return "triton is not installed; pip install 'pile_fast[gpu]' (Linux; CUDA and ROCm builds of PyTorch bring it along)"
    if _TOO_OLD:
        wanted = ".".join(map(str, OLDEST))
        return f"needs triton >= {wanted}, found {_VERSION}; it comes with PyTorch, so install PyTorch >= 2.8"
    if not (_INTERPRET or torch.cuda.is_available()):
        return "PyTorch sees no CUDA or ROCm GPU; on a CPU use backend='auto', or TRITON_INTERPRET=1 to test the kernels"
    return ""


def refusal(batch: RankingBatch, ensemble: EnsembleOptions | None, loss: LossOptions | None) -> str:
    if batch.dtype is torch.float64:
        return "computes in float32, got float64 logits; use backend='auto' or 'torch', or cast them"
    if batch.num_teachers > MAX_TEACHERS:
        return f"takes at most {MAX_TEACHERS} teachers, got {batch.num_teachers}; use backend='auto' or 'torch'"
    from pile_fast.kernels import terms

    return missing_term(terms.FILES, loss)


def ensemble(
    batch: RankingBatch, options: EnsembleOptions, return_weights: bool, return_trace: bool
) -> tuple[Tensor, Tensor, Tensor]:
    teachers = batch.teacher_logits
    # Documents of no query keep what they are filled with; all others are written.
    logits = _documents(batch, teachers, teachers.shape[:-1], torch.float32, torch.nan)
    if not return_weights or options.granularity == "shared":
        weights = None
    elif options.granularity == "document":
        weights = _documents(batch, teachers, teachers.shape, torch.float32, 0.0)
    else:
        weights = teachers.new_empty((batch.num_queries, teachers.shape[-1]), dtype=torch.float32)
    trace = teachers.new_empty((batch.num_queries, options.iterations + 1 if return_trace else 0), dtype=torch.float32)
    _run(batch, options, None, logits=logits, weights=weights, trace=trace if return_trace else None)
    return logits, teachers.new_empty(0, dtype=torch.float32) if weights is None else weights, trace


def pair_loss(batch: RankingBatch, options: LossOptions, with_gradient: bool) -> tuple[Tensor, Tensor]:
    return _loss(batch, None, options, with_gradient, batch.target_logits)


def pile_loss(
    batch: RankingBatch, of_ensemble: EnsembleOptions, of_loss: LossOptions, with_gradient: bool, with_pulls: bool
) -> tuple[Tensor, Tensor, Tensor]:
    student, target, found = batch.student_logits, None, batch.teacher_logits.new_empty(0, dtype=torch.float32)
    if of_loss.alpha > 0:
        target = student.new_empty(student.shape, dtype=torch.float32)
    if with_pulls:
        found = _pulls(batch)
    needed = of_loss.alpha > 0 or with_pulls
    loss, gradient = _loss(
        batch, of_ensemble if needed else None, of_loss, with_gradient, target, found if with_pulls else None
    )  # fmt: skip
    return loss, gradient, found


def pulls(batch: RankingBatch, options: EnsembleOptions) -> tuple[Tensor, Tensor]:
    found, losses = _pulls(batch), batch.teacher_logits.new_empty((batch.num_queries, 1), dtype=torch.float32)
    _run(batch, options._replace(granularity="query", iterations=0), None, trace=losses, pulls=found)
    return found, torch.where(found.isnan().all(1), torch.nan, losses[:, 0])


def _pulls(batch: RankingBatch) -> Tensor:
    return batch.teacher_logits.new_empty((batch.num_queries, batch.num_teachers), dtype=torch.float32)


def _documents(batch: RankingBatch, like: Tensor, shape: torch.Size, dtype: torch.dtype, fill: float) -> Tensor:
    """An output. Documents of no query, as packed lists may have, keep `fill`."""
    if batch.packed:
        return like.new_full(shape, fill, dtype=dtype)
    return like.new_empty(shape, dtype=dtype)


def _loss(
    batch: RankingBatch, of_ensemble: EnsembleOptions | None, options: LossOptions, with_gradient: bool, target: Tensor | None,
    pulls: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
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
        batch, of_ensemble, options, target=target, logits=target, pulls=pulls, losses=losses, has_pairs=has_pairs,
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
    pulls: Tensor | None = None,
    losses: Tensor | None = None,
    has_pairs: Tensor | None = None,
    gradient: Tensor | None = None,
) -> None:
    """Launch everything from the inputs to the outputs given, but for the reduction over queries."""
    from pile_fast.backends import triton_long
    from pile_fast.kernels import pile
    from pile_fast.kernels.layout import FIELDS, Ensemble, How, LossNumbers, Steps, query_floats

    some = batch.teacher_logits if batch.student_logits is None else batch.student_logits
    queries, slots = batch.num_queries, batch.slots
    if queries == 0:
        return
    documents = slots if batch.packed else queries * slots
    if documents == 0:
        for output, value in ((weights, 0), (trace, 0), (pulls, torch.nan), (losses, 0), (has_pairs, 0)):
            if output is not None:
                output.fill_(value)
        return
    M = batch.num_teachers if options is not None else 1
    config = _config(slots, M)
    # One pair weight and one pair sum serve both: the functions take one.
    both = options or loss
    assert both is not None
    weight, pairwise = both.pair_weight, both.pairwise
    split = pairwise == "chebyshev" or (pairwise == "auto" and _in_linear_time(batch))
    split = split and slots >= triton_long.WINDOW  # else there is nothing but direct sums
    steps = constants = numbers = d = r = None
    if options is not None:
        steps = Steps(1 / options.temperature, options.margin / options.temperature, float(options.step_size))
        fixed = options.iterations == 0
        pairs = not fixed or trace is not None or pulls is not None
        constants = Ensemble(options.granularity == "document", options.normalize, options.margin != 0, fixed, pairs)
    if loss is not None:
        d, r = triton_long.used_terms(loss)
        inv_tau = 1 / getattr(loss.distillation, "temperature", 1.0)
        numbers = LossNumbers(float(loss.alpha), inv_tau, tuple(loss.distillation.numbers), tuple(loss.label_loss.numbers))
    # Nor where no sum over pairs has fields.
    split = split and ((constants is not None and constants.PAIRS) or any(map(triton_long.has_fields, (d, r))))
    alone = not split and _alone(batch, config["BR"])
    approx = not _INTERPRET and torch.version.hip is None
    how = How(config["BR"], config["BC"], config["MP"], alone, not split, weight != "none", approx, False, False)
    labelled = r is not None or (constants is not None and constants.PAIRS)
    with _on(some):
        if not alone:
            lists = triton_long.LongLists(batch, how, config["num_warps"], weight, labelled, 0 if options is None else M)
            if steps is not None and constants is not None and options is not None:
                lists.ensemble(options, steps, constants, logits, weights, trace, pulls, differences=loss is not None)
            if numbers is not None:
                lists.loss(d, r, numbers, target, losses, has_pairs, gradient)
            return

        # Lists begin and end with a whole tile of columns.
        tile = 2 * config["BC"]
        rows = documents + (queries + 1) * tile if batch.packed else queries * -(-slots // tile) * tile
        scratch = some.new_empty(rows * (FIELDS.value + M) + queries * query_floats(M), dtype=torch.float32)
        labels = batch.labels if labelled else None
        if labels is not None and labels.dtype is torch.bool:
            labels = labels.view(torch.uint8)
        inputs = triton_long.inputs_of(batch, target=target if d else None, labels=labels, teachers=options is not None)
        how = triton_long.how_of_loss(how, batch, r) if numbers is not None else how
        outputs = pile.Outputs(logits, weights, triton_long.strided(trace), pulls, losses, has_pairs, gradient, scratch)
        pile.pile_kernel[(queries,)](
            inputs, outputs, queries, slots, M, 0 if options is None else options.iterations, steps, numbers,
            ENSEMBLE=constants, D=d, R=r, PAIR_WEIGHT=weight, how=how,
            num_warps=config["num_warps"], enable_fp_fusion=True,
            **_registers(config["MP"], constants, pulls is not None, how.HAS_C),
        )  # fmt: skip


def _longest(batch: RankingBatch) -> tuple[int, int]:
    """The longest list there may be, and how many of them: of packed lists only the sum of the lengths is known."""
    return batch.slots, 1 if batch.packed else batch.num_queries


def _in_linear_time(batch: RankingBatch) -> bool:
    """Which sum "auto" takes."""
    length, lists = _longest(batch)
    return length >= SHORTEST_LINEAR and lists * length * length >= PAIRS_LINEAR


def _alone(batch: RankingBatch, block: int) -> bool:
    """Whether one program takes a whole list."""
    if not _BARRIER_ORDERS_MEMORY:
        return False
    length, lists = _longest(batch)
    if batch.packed and length <= LONGEST_PACKED and length <= block * batch.num_queries:
        return True
    return length <= block or (length <= LONGEST_ALONE and lists >= ENOUGH_QUERIES)


def _config(slots: int, teachers: int) -> dict[str, int]:
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
    return {"MP": MP, "BR": BR, "BC": 4, "num_warps": num_warps}


def _registers(room: int, ensemble: Ensemble | None, pulls: bool, weights: bool) -> dict[str, int]:
    """How many registers a thread of the one launch may take, with room for so many teachers. Left alone, the assembler takes
    half as many again to spill no less, and fewer programs fit on a GPU (docs/triton.md). `weights`: of documents."""
    if room > (4 if pulls else 8):  # with pulls of 8 teachers it takes 143; a bound of 128 spills
        return {}
    few = room <= 4 and not weights and (ensemble is None or ensemble.BY_DOCUMENT or not ensemble.PAIRS)
    return {"maxnreg": 80 if few else 128}


def _on(tensor: Tensor) -> contextlib.AbstractContextManager[None]:
    """Triton launches on the current device, so make it the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()
