"""The kernel for lists that one program takes alone: ensemble, student's loss and gradient of a query in one launch, phase by
phase with a barrier between them. Longer lists: kernels/long_ensemble.py and kernels/long_loss.py.

Floor of one query of n documents and M teachers, T iterations, distillation loss, float32 (inputs 4 n (M + 2) bytes read
once, gradient 4 n written once, scratch 4 n (FIELDS + M) in L1/L2):

    ensemble   T n² / 2 reciprocals, 5 T n² float instructions, T n M exponentials
    once       2 n² compares for ranks and counts, 2 n² adds
    pulls      as an iteration (with the label loss: as the loss), and M floats written
    loss       n² reciprocals, about 14 n² float instructions

Without iterations, trace and pulls the ensemble has no pairs: n M exponentials, and the teachers read twice or three times.

The pairs limit it from about 32 documents on, below that the latency of T dependent iterations; never the bytes.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl
from pile_fast.kernels.ensemble import (
    calibrate, count_pairs, iterate, lift, prior_energy, put_out, put_out_weights, rank_labels, retilt, reweight,
    statistics, store_pulls, store_statistics, store_trace, trace_loss,
)  # fmt: skip
from pile_fast.kernels.layout import DISTILL, FIELDS, LABEL, PAIRS, SCALARS, SUM, TEACHER_ROWS, Chunk, Strided, scalar
from pile_fast.kernels.loss import (
    gradient_of, load_logits, pass_of_term, prepare, scale, store_total, survey_of_term,
)  # fmt: skip


class Outputs(NamedTuple):
    """What a call writes, where it is wanted, and scratch memory."""

    logits: Any
    weights: Any
    trace: Strided
    pulls: Any
    losses: Any
    has_pairs: Any
    gradient: Any
    scratch: Any


@triton.jit
def open_list(inputs, scratch, Q, N, M, how: tl.constexpr):
    """This program's query, all of it.

    In the scratch memory a query begins and ends with a whole tile of columns: its rows past n, up to `padded`, hold documents
    without label, score or target, so that pair loops ask for no bounds.
    """
    TILE: tl.constexpr = 2 * how.BC
    q = tl.program_id(0).to(tl.int64)
    if inputs.cu_seqlens is not None:
        documents = N.to(tl.int64)
        first = tl.load(inputs.cu_seqlens + q).to(tl.int64)
        last = tl.load(inputs.cu_seqlens + q + 1).to(tl.int64)
        first = tl.minimum(tl.maximum(first, 0), documents)
        n = (tl.minimum(tl.maximum(last, first), documents) - first).to(tl.int32)
        slot = first
        start = (first + q * TILE) // TILE * TILE
        S = (documents + Q * TILE + TILE) // TILE * TILE
    else:
        n = N
        first = q * N
        slot = q * 0
        start = q * (tl.cdiv(N, TILE) * TILE)
        S = Q.to(tl.int64) * (tl.cdiv(N, TILE) * TILE)
    padded = tl.cdiv(n, TILE) * TILE
    fields = scratch + start
    table = scratch + FIELDS * S + start * M
    per_query = scratch + (FIELDS + M) * S + q * (TEACHER_ROWS * M + SCALARS)
    return Chunk(0 * n, q, first, slot, n, 0 * n, n, padded, fields, table, S, per_query, scratch, M)


@triton.jit(do_not_specialize=["Q", "N", "M", "iterations"])
def pile_kernel(
    inputs, outputs, Q, N, M, iterations, steps, numbers,
    ENSEMBLE: tl.constexpr, D: tl.constexpr, R: tl.constexpr, PAIR_WEIGHT: tl.constexpr, how: tl.constexpr,
):  # fmt: skip
    """See the module. Q queries, N slots (padded: of a query, packed: of all), M teachers. ENSEMBLE: options of the ensemble;
    D and R: the loss's terms; None where there is none."""
    k = open_list(inputs, outputs.scratch, Q, N, M, how)
    if inputs.labels.pointer is not None:
        rank_labels(k, inputs.labels, inputs.mask, PAIR_WEIGHT, how)
        tl.debug_barrier()
    if ENSEMBLE is not None:
        ensemble(k, inputs, outputs, iterations, steps, ENSEMBLE, D is not None or R is not None, how)
    if D is not None or R is not None:
        loss(k, inputs, outputs, numbers, D, R, how)


@triton.jit
def ensemble(
    k, inputs, outputs, iterations, steps, ENSEMBLE: tl.constexpr, DIFFERENCES: tl.constexpr, how: tl.constexpr
):  # fmt: skip
    """The ensemble of a query, from its teachers to logits, weights, trace and pulls."""
    TRACE: tl.constexpr = outputs.trace.pointer is not None
    NORMALIZE: tl.constexpr = ENSEMBLE.NORMALIZE
    MP: tl.constexpr = how.MP
    count, mean, off, square, low, high = statistics(
        k, inputs.teachers, inputs.mask, None, inputs.prior, NORMALIZE, how
    )  # fmt: skip
    off = off / tl.maximum(count, 1.0)
    variance = square / tl.maximum(count, 1.0) - off * off
    energy = prior_energy(inputs.prior, k, MP)
    store_statistics(
        k, count, mean, off / lift(low, high), variance, low, high, energy, steps, None, NORMALIZE, TRACE, MP
    )  # fmt: skip
    tl.debug_barrier()
    if ENSEMBLE.PAIRS:
        calibrate(k, inputs.teachers, inputs.mask, None, steps, ENSEMBLE, how)
        tl.debug_barrier()
        pairs = count_pairs(k, None, how)
        if TRACE or not ENSEMBLE.BY_DOCUMENT:
            tl.store(scalar(k, PAIRS), pairs)
        tl.debug_barrier()
        if not ENSEMBLE.FIXED:
            improve(k, outputs, iterations, steps, ENSEMBLE, how)
        if outputs.pulls is not None:
            pull, loss = iterate(k, None, None, None, 0, steps, ENSEMBLE, TRACE, how)
            store_pulls(k, outputs.pulls, pull, MP)
            if TRACE:
                store_trace(k, outputs.trace, iterations, loss)
        elif TRACE:
            read = iterations % 2 if ENSEMBLE.BY_DOCUMENT else 0
            store_trace(k, outputs.trace, iterations, trace_loss(k, None, None, read, steps, how))
    if outputs.logits is not None:
        put_out(
            k, inputs.teachers, inputs.mask, None, outputs.logits, outputs.weights, ENSEMBLE, DIFFERENCES, how
        )  # fmt: skip
        tl.debug_barrier()
    if outputs.weights is not None and not ENSEMBLE.BY_DOCUMENT:
        put_out_weights(k, outputs.weights, MP)


@triton.jit
def improve(k, outputs, iterations, steps, ENSEMBLE: tl.constexpr, how: tl.constexpr):
    """The iterations."""
    TRACE: tl.constexpr = outputs.trace.pointer is not None
    MP: tl.constexpr = how.MP
    for i in range(0, iterations):
        read = i % 2 if ENSEMBLE.BY_DOCUMENT else 0
        if TRACE:
            store_trace(k, outputs.trace, i, trace_loss(k, None, None, read, steps, how))
        pull, _ = iterate(k, None, None, None, read, steps, ENSEMBLE, False, how)
        tl.debug_barrier()
        if not ENSEMBLE.BY_DOCUMENT:
            reweight(k, pull, steps, MP)
            tl.debug_barrier()
            retilt(k, steps, how)
            tl.debug_barrier()


@triton.jit
def loss(k, inputs, outputs, numbers, D: tl.constexpr, R: tl.constexpr, how: tl.constexpr):
    """The student's loss of a query and its gradient."""
    ranges = load_logits(k, inputs, None, R, how)
    prepare(k, ranges, numbers.inv_tau, None, D, how)
    tl.debug_barrier()
    scale(k, scalar(k, SUM), inputs, numbers, D, R, how)
    tl.debug_barrier()
    if D is not None:
        if D.survey is not None:
            survey_of_term(k, None, numbers.distill, D, how)
            tl.debug_barrier()
    if R is not None:
        if R.survey is not None:
            survey_of_term(k, None, numbers.label, R, how)
            tl.debug_barrier()
    d_loss = tl.zeros((), tl.float32)
    d_weight = d_loss
    r_loss = d_loss
    r_weight = d_loss
    if D is not None:
        d_loss, d_weight = pass_of_term(k, None, None, None, numbers.distill, D, DISTILL, how)
    if R is not None:
        r_loss, r_weight = pass_of_term(k, None, None, None, numbers.label, R, LABEL, how)
    store_total(k, d_loss, d_weight, r_loss, r_weight, inputs, numbers, outputs.losses, outputs.has_pairs)
    tl.debug_barrier()
    if outputs.gradient is not None:
        gradient_of(k, outputs.gradient, inputs.mask, None, D is not None, R is not None, how)
