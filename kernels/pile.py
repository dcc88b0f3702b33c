"""The kernel for lists that one program takes alone: ensemble, student's loss and gradient of a query in one launch, phase by
phase with a barrier between them. Longer lists: kernels/long_ensemble.py and kernels/long_loss.py.

Floor of one query of n documents and M teachers, T iterations, distillation loss, float32 (inputs 4 n (M + 2) bytes read
once, gradient 4 n written once, scratch 4 n (FIELDS + M) in L1/L2):

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
from pile_fast.kernels.loss import (
    Z_PIVOT,
    Z,
    find_pivots,
    gradient_rows,
    load_logits,
    pair_rows,
    scale_rows,
    sum_query,
    total_query,
)
from pile_fast.kernels.pairs import load_valid


@triton.jit(
    do_not_specialize=[
        "student_q", "student_d", "teachers_q", "teachers_d", "teachers_m", "target_q", "target_d", "labels_q", "labels_d",
        "mask_q", "mask_d", "prior_q", "prior_m", "trace_q", "Q", "N", "S", "M", "iterations",
    ]
)  # fmt: skip
def pile_kernel(
    student, student_q, student_d,
    teachers, teachers_q, teachers_d, teachers_m,
    target, target_q, target_d,
    labels, labels_q, labels_d,
    mask, mask_q, mask_d,
    cu_seqlens,
    prior, prior_q, prior_m,
    logits, weights, trace, trace_q, losses, has_pairs, gradient,
    scratch,
    Q, N, S, M, iterations,
    step, inv_temperature, offset, alpha, inv_tau,
    ENSEMBLE: tl.constexpr, LOSS: tl.constexpr,
    BY_DOCUMENT: tl.constexpr, NORMALIZE: tl.constexpr, WEIGHT: tl.constexpr, MARGIN: tl.constexpr, TRACE: tl.constexpr,
    USE_D: tl.constexpr, MSE: tl.constexpr, USE_R: tl.constexpr, WITH_GRADIENT: tl.constexpr,
    MASKED: tl.constexpr, PACKED: tl.constexpr,
    MP: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr, APPROX: tl.constexpr,
):  # fmt: skip
    """See the module. `S` documents in all, `N` slots (padded: of a query, packed: S); strides in elements, `_q` of a query,
    `_d` of a document."""
    WEIGHTED: tl.constexpr = WEIGHT != "none"
    # In the scratch buffer a query begins and ends with a whole tile of columns: its rows past n, up to `padded`, hold
    # documents without label, score or target, so that pair loops ask for no bounds.
    TILE: tl.constexpr = 2 * BC
    S = S.to(tl.int64)
    q = tl.program_id(0).to(tl.int64)
    if PACKED:
        first = tl.load(cu_seqlens + q).to(tl.int64)
        last = tl.load(cu_seqlens + q + 1).to(tl.int64)
        first = tl.minimum(tl.maximum(first, 0), S)
        n = (tl.minimum(tl.maximum(last, first), S) - first).to(tl.int32)
        slot = first
        start = (first + q * TILE) // TILE * TILE
        S = (S + Q * TILE + TILE) // TILE * TILE
    else:
        n = N
        first = q * N
        slot = q * 0
        start = q * (tl.cdiv(N, TILE) * TILE)
        S = Q.to(tl.int64) * (tl.cdiv(N, TILE) * TILE)
    padded = tl.cdiv(n, TILE) * TILE

    fields = scratch + start
    table = scratch + FIELDS * S + start * M
    per_query = scratch + (FIELDS + M) * S + q * (5 * M + SCALARS)
    scalars = per_query + 5 * M
    if labels is not None:
        labels += q * labels_q + slot * labels_d
    if MASKED:
        mask += q * mask_q + slot * mask_d

    if ENSEMBLE or USE_R:
        for row in range(0, padded, BR):
            rank_rows(labels, labels_d, mask, mask_d, n, padded, row + tl.arange(0, BR), fields, S, BR, BC, MASKED, WEIGHT)
        tl.debug_barrier()

    if ENSEMBLE:
        teachers += q * teachers_q + slot * teachers_d
        if prior is not None:
            prior += q * prior_q
        teacher_statistics(
            teachers, teachers_d, teachers_m, mask, mask_d, prior, prior_m, n, M, per_query, inv_temperature, offset,
            BR, MP, MASKED, NORMALIZE, TRACE,
        )  # fmt: skip
        tl.debug_barrier()
        for row in range(0, padded, BR):
            calibrate_rows(
                teachers, teachers_d, teachers_m, mask, mask_d, n, padded, M, row + tl.arange(0, BR), fields, table, S,
                per_query, inv_temperature, MP, MASKED,
            )  # fmt: skip
        tl.debug_barrier()
        for row in range(0, n, BR):
            count_rows(row + tl.arange(0, BR), n, padded, fields, S, BR, BC, WEIGHTED)
        tl.debug_barrier()
        if TRACE or not BY_DOCUMENT:
            tl.store(scalars + PAIRS, sum_field(fields, ROW, S, n, BR))
            tl.debug_barrier()

        for i in range(0, iterations):
            read = i % 2 if BY_DOCUMENT else 0
            if TRACE:
                store_trace(trace + q * trace_q + i, n, padded, fields, S, read, scalars, offset, BR, BC, WEIGHTED, APPROX)
            for row in range(0, padded, BR):
                iterate_rows(
                    row + tl.arange(0, BR), n, padded, M, fields, table, S, read, per_query, inv_temperature, offset, step,
                    BR, BC, MP, BY_DOCUMENT, WEIGHTED, MARGIN, APPROX,
                )  # fmt: skip
            tl.debug_barrier()
            if not BY_DOCUMENT:
                reweight_query(n, M, fields, table, S, per_query, step, BR, MP)
                tl.debug_barrier()
                for row in range(0, padded, BR):
                    tilt_rows(row + tl.arange(0, BR), n, padded, M, fields, table, S, per_query, inv_temperature, MP)
                tl.debug_barrier()

        if TRACE:
            read = iterations % 2 if BY_DOCUMENT else 0
            store_trace(trace + q * trace_q + iterations, n, padded, fields, S, read, scalars, offset, BR, BC, WEIGHTED, APPROX)
        if weights is not None and BY_DOCUMENT:
            weights += first * M
        for row in range(0, n, BR):
            output_rows(
                row + tl.arange(0, BR), n, M, fields, table, S, per_query, logits + first, weights, BR, MP, BY_DOCUMENT, LOSS
            )  # fmt: skip
        tl.debug_barrier()
        if weights is not None and not BY_DOCUMENT:
            m = tl.arange(0, MP)
            tl.store(weights + q * M + m, of_teachers(per_query, 4, M, MP, 0.0), mask=m < M)

    if LOSS:
        student += q * student_q + slot * student_d
        if USE_D:
            target += q * target_q + slot * target_d
            find_pivots(student, student_d, target, target_d, mask, mask_d, n, scalars, BR, MASKED, not ENSEMBLE)
            tl.debug_barrier()
        for row in range(0, padded, BR):
            rows = row + tl.arange(0, BR)
            valid = load_valid(mask, rows, mask_d, n, MASKED)
            z, s = load_logits(student, student_d, target, target_d, rows, valid, 0.0, USE_D)
            tl.store(fields + Z * S + rows, z, mask=rows < padded)
            if USE_D:
                scale_rows(tl.where(valid, z, tl.load(scalars + Z_PIVOT)), s, rows, rows < padded, fields, S, scalars, inv_tau)
        tl.debug_barrier()
        sum_query(n, fields, S, scalars, BR, USE_D)
        tl.debug_barrier()
        for row in range(0, n, BR):
            pair_rows(row + tl.arange(0, BR), n, padded, fields, S, scalars, BR, BC, USE_D, MSE, USE_R, WEIGHTED, APPROX)
        tl.debug_barrier()
        total_query(n, fields, S, scalars, alpha, inv_tau, losses + q, has_pairs + q, BR, USE_D, USE_R)
        tl.debug_barrier()
        if WITH_GRADIENT:
            for row in range(0, n, BR):
                rows = row + tl.arange(0, BR)
                valid = load_valid(mask, rows, mask_d, n, MASKED)
                gradient_rows(rows, rows, valid, rows < n, fields, S, scalars, gradient + first, USE_D, USE_R)


@triton.jit
def store_trace(
    to, n, padded, fields, S, read, scalars, offset,
    BR: tl.constexpr, BC: tl.constexpr, WEIGHTED: tl.constexpr, APPROX: tl.constexpr,
):  # fmt: skip
    for row in range(0, n, BR):
        trace_rows(row + tl.arange(0, BR), n, padded, fields, S, read, offset, BR, BC, WEIGHTED, APPROX)
    tl.debug_barrier()
    pairs = tl.load(scalars + PAIRS)
    total = sum_field(fields, ROW + 1, S, n, BR)
    tl.store(to, tl.where(pairs > 0.0, total / tl.where(pairs > 0.0, pairs, 1.0), 0.0))
    tl.debug_barrier()
