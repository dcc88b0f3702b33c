"""The kernel: ensemble, student's loss and gradient of a query in one launch, or phase by phase in several.

PHASE == "all": one program owns one query and runs every phase, a barrier of its own between them; nothing else is launched.
Any other PHASE: one program owns one block of BR documents (or, for the phases that reduce, one query) and runs that phase
alone; the end of the launch is the barrier. Both run the same code on the same blocks in the same order (compiled
apart: they may differ in a rounding), and the host picks by the shape of the batch alone (pile_fast/backends/triton.py).

Floor of one query of n documents and M teachers, T iterations, distillation loss, float32 (inputs 4 n (M + 2) bytes read
once, gradient 4 n written once, scratch 4 n (10 + M) in L1/L2):

    ensemble   T n² / 2 reciprocals, 5 T n² float instructions, T n M exponentials
    once       2 n² compares for ranks and counts, 2 n² adds
    loss       n² reciprocals, about 14 n² float instructions

The pairs limit it from about 32 documents on, below that the latency of T dependent iterations; never the bytes.
"""

import triton
import triton.language as tl
from pile_fast.kernels.ensemble import (
    FIELDS,
    PAIRS,
    ROW,
    SCALARS,
    calibrate_rows,
    count_rows,
    iterate_rows,
    of_teachers,
    output_rows,
    rank_rows,
    reweight_query,
    sum_field,
    teacher_statistics,
    tilt_rows,
    trace_rows,
)
from pile_fast.kernels.loss import gradient_rows, load_rows, pair_rows, sum_query, total_query


@triton.jit(
    do_not_specialize=[
        "student_q", "student_d", "teachers_q", "teachers_d", "teachers_m", "target_q", "target_d", "labels_q", "labels_d",
        "mask_q", "mask_d", "prior_q", "prior_m", "trace_q", "Q", "N", "S", "M", "iterations", "iteration",
    ]
)  # fmt: skip
def pile_kernel(
    student, student_q, student_d,
    teachers, teachers_q, teachers_d, teachers_m,
    target, target_q, target_d,
    labels, labels_q, labels_d,
    mask, mask_q, mask_d,
    cu_seqlens, block_ends, owner,
    prior, prior_q, prior_m,
    logits, weights, trace, trace_q, losses, has_pairs, gradient,
    scratch,
    Q, N, S, M, iterations, iteration,
    step, inv_temperature, offset, alpha, inv_tau,
    PHASE: tl.constexpr, ENSEMBLE: tl.constexpr, LOSS: tl.constexpr,
    BY_DOCUMENT: tl.constexpr, NORMALIZE: tl.constexpr, WEIGHT: tl.constexpr, MARGIN: tl.constexpr, TRACE: tl.constexpr,
    USE_D: tl.constexpr, MSE: tl.constexpr, USE_R: tl.constexpr, WITH_GRADIENT: tl.constexpr,
    MASKED: tl.constexpr, PACKED: tl.constexpr,
    MP: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr, APPROX: tl.constexpr,
):  # fmt: skip
    """See the module. `S` documents in all, `N` slots (padded: of a query, packed: S); strides in elements, `_q` of a query,
    `_d` of a document. `block_ends`: packed and not "all", the running number of blocks at the end
    of each query, and each block's query."""
    WEIGHTED: tl.constexpr = WEIGHT != "none"
    EVERY: tl.constexpr = PHASE == "all"
    OF_QUERY: tl.constexpr = PHASE == "statistics" or PHASE == "totals" or PHASE == "reweight" or PHASE == "trace_sum" or (
        PHASE == "loss_sums") or PHASE == "loss_total" or PHASE == "weights"  # fmt: skip
    S = S.to(tl.int64)

    # Which query, which of its documents.
    program = tl.program_id(0)
    block = 0
    if EVERY or OF_QUERY:
        q = program
    elif PACKED:
        q = tl.load(owner + program)  # Q: a program too many
        block = program - tl.load(block_ends + q - 1, mask=q > 0, other=0).to(tl.int32)
    else:
        q = program // tl.cdiv(N, BR)
        block = program % tl.cdiv(N, BR)
    if PACKED:
        exists = q < Q
        first = tl.load(cu_seqlens + q, mask=exists, other=0).to(tl.int64)
        last = tl.load(cu_seqlens + q + 1, mask=exists, other=0).to(tl.int64)
        first = tl.minimum(tl.maximum(first, 0), S)
        n = (tl.minimum(tl.maximum(last, first), S) - first).to(tl.int32)
        q = tl.minimum(q, Q - 1).to(tl.int64)
        slot = first
    else:
        n = N
        q = q.to(tl.int64)
        first = q * N
        slot = q * 0
    begin = 0
    end = n
    if not (EVERY or OF_QUERY):
        begin = block * BR
        end = tl.minimum(begin + BR, n)

    fields = scratch + first
    table = scratch + FIELDS * S + first * M
    per_query = scratch + (FIELDS + M) * S + q * (5 * M + SCALARS)
    scalars = per_query + 5 * M
    if labels is not None:
        labels += q * labels_q + slot * labels_d
    if MASKED:
        mask += q * mask_q + slot * mask_d

    if (ENSEMBLE or USE_R) and (EVERY or PHASE == "ranks"):
        for row in range(begin, end, BR):
            rank_rows(labels, labels_d, mask, mask_d, n, row + tl.arange(0, BR), fields, S, BR, BC, MASKED, WEIGHT)
        barrier(EVERY)

    if ENSEMBLE:
        teachers += q * teachers_q + slot * teachers_d
        if prior is not None:
            prior += q * prior_q
        if EVERY or PHASE == "statistics":
            teacher_statistics(
                teachers, teachers_d, teachers_m, mask, mask_d, prior, prior_m, n, M, per_query, inv_temperature, offset,
                BR, MP, MASKED, NORMALIZE, TRACE,
            )  # fmt: skip
            barrier(EVERY)
        if EVERY or PHASE == "calibrate":
            for row in range(begin, end, BR):
                calibrate_rows(
                    teachers, teachers_d, teachers_m, mask, mask_d, n, M, row + tl.arange(0, BR), fields, table, S, per_query,
                    inv_temperature, MP, MASKED,
                )  # fmt: skip
            barrier(EVERY)
        if EVERY or PHASE == "counts":
            for row in range(begin, end, BR):
                count_rows(row + tl.arange(0, BR), n, fields, S, BR, BC, WEIGHTED)
            barrier(EVERY)
        if (EVERY and (TRACE or not BY_DOCUMENT)) or PHASE == "totals":
            tl.store(scalars + PAIRS, sum_field(fields, ROW, S, n, BR))
            barrier(EVERY)

        # A launch of its own for each iteration's phase passes iterations = 1 and which one it is.
        for i in range(0, iterations):
            read = (iteration + i) % 2 if BY_DOCUMENT else 0
            if TRACE and (EVERY or PHASE == "trace_rows"):
                for row in range(begin, end, BR):
                    trace_rows(row + tl.arange(0, BR), n, fields, S, read, offset, BR, BC, WEIGHTED, APPROX)
                barrier(EVERY)
            if TRACE and (EVERY or PHASE == "trace_sum"):
                store_trace(trace + q * trace_q + iteration + i, fields, S, n, scalars, BR)
                barrier(EVERY)
            if EVERY or PHASE == "iterate":
                for row in range(begin, end, BR):
                    iterate_rows(
                        row + tl.arange(0, BR), n, M, fields, table, S, read, per_query, inv_temperature, offset, step,
                        BR, BC, MP, BY_DOCUMENT, WEIGHTED, MARGIN, APPROX,
                    )  # fmt: skip
                barrier(EVERY)
            if not BY_DOCUMENT and (EVERY or PHASE == "reweight"):
                reweight_query(n, M, fields, table, S, per_query, step, BR, MP)
                barrier(EVERY)
            if not BY_DOCUMENT and (EVERY or PHASE == "tilt"):
                for row in range(begin, end, BR):
                    tilt_rows(row + tl.arange(0, BR), n, M, fields, table, S, per_query, inv_temperature, MP)
                barrier(EVERY)

        if TRACE and EVERY:
            read = iterations % 2 if BY_DOCUMENT else 0
            for row in range(begin, end, BR):
                trace_rows(row + tl.arange(0, BR), n, fields, S, read, offset, BR, BC, WEIGHTED, APPROX)
            barrier(EVERY)
            store_trace(trace + q * trace_q + iterations, fields, S, n, scalars, BR)
        if EVERY or PHASE == "output":
            if weights is not None and BY_DOCUMENT:
                weights += first * M
            for row in range(begin, end, BR):
                output_rows(
                    row + tl.arange(0, BR), n, M, fields, table, S, per_query, logits + first, weights, BR, MP, BY_DOCUMENT
                )
            barrier(EVERY)
        if weights is not None and not BY_DOCUMENT and (EVERY or PHASE == "weights"):
            m = tl.arange(0, MP)
            tl.store(weights + q * M + m, of_teachers(per_query, 4, M, MP, 0.0), mask=m < M)

    if LOSS:
        student += q * student_q + slot * student_d
        if USE_D:
            target += q * target_q + slot * target_d
        if EVERY or PHASE == "load":
            for row in range(begin, end, BR):
                load_rows(
                    student, student_d, target, target_d, mask, mask_d, n, row + tl.arange(0, BR), fields, S, inv_tau,
                    MASKED, USE_D,
                )  # fmt: skip
            barrier(EVERY)
        if EVERY or PHASE == "loss_sums":
            sum_query(n, fields, S, scalars, BR, USE_D)
            barrier(EVERY)
        if EVERY or PHASE == "pairs":
            for row in range(begin, end, BR):
                pair_rows(row + tl.arange(0, BR), n, fields, S, scalars, BR, BC, USE_D, MSE, USE_R, WEIGHTED, APPROX)
            barrier(EVERY)
        if EVERY or PHASE == "loss_total":
            total_query(n, fields, S, scalars, alpha, inv_tau, losses + q, has_pairs + q, BR, USE_D, MSE, USE_R)
            barrier(EVERY)
        if WITH_GRADIENT and (EVERY or PHASE == "gradient"):
            for row in range(begin, end, BR):
                gradient_rows(
                    row + tl.arange(0, BR), n, mask, mask_d, fields, S, scalars, gradient + first, MASKED, USE_D, USE_R
                )


@triton.jit
def barrier(EVERY: tl.constexpr):
    if EVERY:
        tl.debug_barrier()


@triton.jit
def store_trace(to, fields, S, n, scalars, BR: tl.constexpr):
    pairs = tl.load(scalars + PAIRS)
    total = sum_field(fields, ROW + 1, S, n, BR)
    tl.store(to, tl.where(pairs > 0.0, total / tl.where(pairs > 0.0, pairs, 1.0), 0.0))
