"""The ensemble of lists longer than one program takes alone: each kernel is a phase, each program one chunk of documents
(kernels/chunks.py) or, for the sums over chunks, one query; the end of a launch is the barrier.

    statistics → query_statistics → calibrate → counts → totals
    T times: (deposit → super → collect → apply, kernels/fields.py) → iterate [→ reweight → tilt, by query]
    output

All documents lie by rising label, their teachers calibrated and copied into that order once. What a document hears from its
own block comes from direct sums (kernels/pairs.py), from all others out of its block's field. Chunks of unlabelled documents
only calibrate and put out.

Floor of an iteration, per document: 4 M + 44 bytes, M exponentials, half a reciprocal for each document of its block where that
has several labels, and the fields' cost (kernels/fields.py). Long enough lists are bound by bytes, shorter ones by the latency
of the launches.
"""

import triton
import triton.language as tl
from pile_fast.kernels.chunks import (
    GAIN,
    RANK,
    block_rows,
    chunk_rows,
    load_slots,
    query_chunks,
    sum_partials,
)
from pile_fast.kernels.ensemble import (
    ABOVE,
    COMMON,
    EXPONENT,
    GRID,
    MIDDLE,
    PAIRS,
    PER_PAIR,
    ROW,
    SCALARS,
    SCORED_RANK,
    WIDE,
    U,
    calibrate_and_start,
    calibrated,
    direction_by_share,
    lift,
    load_order,
    load_teachers,
    of_teachers,
    prior_energy,
    step_exponents,
    store_energy,
    store_statistics,
    teacher_pulls,
    tilt,
)
from pile_fast.kernels.fields import ROW as FIELD
from pile_fast.kernels.fields import evaluate, load_grid
from pile_fast.kernels.pairs import label_losses, label_pull, pair_counts

E = ROW  # e^{c − u}, two of them as of U


@triton.jit(do_not_specialize=["teachers_q", "teachers_d", "teachers_m", "mask_q", "mask_d", "prior_q", "prior_m", "width",
                               "Q", "N", "S", "M"])  # fmt: skip
def statistics_kernel(
    teachers, teachers_q, teachers_d, teachers_m, mask, mask_q, mask_d, prior, prior_q, prior_m, order, partials, width,
    chunk_begin, owner, cu_seqlens, Q, N, S, M,
    MASKED: tl.constexpr, PACKED: tl.constexpr, MP: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """partials[chunk]: each teacher's number of scores, their mean (a pivot), sum about it and the sum of squares, lifted, and
    extremes."""
    c = tl.program_id(0)
    S = S.to(tl.int64)
    at = tl.load(chunk_begin + c)
    if at >= S:
        return
    q, first, n, begin, end = chunk_rows(c, at, chunk_begin, owner, cu_seqlens, Q, N, S, PACKED)
    teachers += q * teachers_q
    if MASKED:
        mask += q * mask_q
    if prior is not None:
        prior += q * prior_q
    inf = float("inf")
    energy = prior_energy(prior, prior_m, M, MP)
    total = tl.zeros((MP,), tl.float32)
    count = total
    low = tl.full((MP,), inf, tl.float32)
    high = -low
    for row in range(begin, end, BR):
        rows = row + tl.arange(0, BR)
        slots, valid = load_slots(order, rows, rows < end, first, mask, mask_d, MASKED, PACKED)
        t = load_teachers(teachers, slots, valid, teachers_d, teachers_m, M, energy, MP)
        present = t == t
        total += tl.sum(tl.where(present, t, 0.0), 0)
        count += tl.sum(tl.where(present, 1.0, 0.0), 0)
        low = tl.minimum(low, tl.min(tl.where(present, t, inf), 0))
        high = tl.maximum(high, tl.max(tl.where(present, t, -inf), 0))
    pivot = total / tl.maximum(count, 1.0)
    off = tl.zeros((MP,), tl.float32)
    square = off
    for row in range(begin, end, BR):
        rows = row + tl.arange(0, BR)
        slots, valid = load_slots(order, rows, rows < end, first, mask, mask_d, MASKED, PACKED)
        t = load_teachers(teachers, slots, valid, teachers_d, teachers_m, M, energy, MP)
        d = tl.where(t == t, t - pivot[None, :], 0.0)
        off += tl.sum(d, 0)
        d *= lift(low, high)[None, :]
        square += tl.sum(d * d, 0)
    m = tl.arange(0, MP)
    to = partials + c.to(tl.int64) * width + m
    tl.store(to, count, mask=m < M)
    tl.store(to + M, pivot, mask=m < M)
    tl.store(to + 2 * M, off, mask=m < M)
    tl.store(to + 3 * M, square, mask=m < M)
    tl.store(to + 4 * M, low, mask=m < M)
    tl.store(to + 5 * M, high, mask=m < M)


@triton.jit
def load_partials(partials, width, c, c_last, k: tl.constexpr, M, other, MP: tl.constexpr):
    m = tl.arange(0, MP)
    inside = (c < c_last)[:, None] & (m < M)[None, :]
    return tl.load(partials + c.to(tl.int64)[:, None] * width + k * M + m[None, :], mask=inside, other=other)


@triton.jit(do_not_specialize=["prior_q", "prior_m", "width", "N", "S", "M"])
def query_statistics_kernel(
    partials, width, prior, prior_q, prior_m, per_query, counts, cu_seqlens, N, S, M, inv_temperature, offset,
    PACKED: tl.constexpr, NORMALIZE: tl.constexpr, WINDOW: tl.constexpr, MP: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Mean, scale and starting energy of a query's teachers, and the grid over the range its ensemble lies in."""
    q = tl.program_id(0).to(tl.int64)
    S = S.to(tl.int64)
    c_first, c_last, n = query_chunks(q, counts, cu_seqlens, N, S, PACKED)
    per_query += q * (5 * M + SCALARS)
    if prior is not None:
        prior += q * prior_q
    inf = float("inf")
    count = tl.zeros((MP,), tl.float64)
    total = count
    low = tl.full((MP,), inf, tl.float32)
    high = -low
    for begin in range(c_first, c_last, TILE):
        c = begin + tl.arange(0, TILE)
        number = load_partials(partials, width, c, c_last, 0, M, 0.0, MP).to(tl.float64)
        pivot = load_partials(partials, width, c, c_last, 1, M, 0.0, MP).to(tl.float64)
        off = load_partials(partials, width, c, c_last, 2, M, 0.0, MP).to(tl.float64)
        count += tl.sum(number, 0)
        total += tl.sum(number * pivot + off, 0)
        low = tl.minimum(low, tl.min(load_partials(partials, width, c, c_last, 4, M, inf, MP), 0))
        high = tl.maximum(high, tl.max(load_partials(partials, width, c, c_last, 5, M, -inf, MP), 0))
    number = count.to(tl.float32)
    at_least_one = tl.maximum(number, 1.0)
    mean = tl.zeros((MP,), tl.float32)
    correction = mean
    variance = mean
    if NORMALIZE != "none":
        mean = total.to(tl.float32) / at_least_one
        # What rounding the mean lost.
        correction = (total - mean.to(tl.float64) * count).to(tl.float32) / at_least_one
        centre = mean.to(tl.float64) + correction.to(tl.float64)
        squares = tl.zeros((MP,), tl.float64)
        up = lift(low, high).to(tl.float64)[None, :]
        for begin in range(c_first, c_last, TILE):
            c = begin + tl.arange(0, TILE)
            some = load_partials(partials, width, c, c_last, 0, M, 0.0, MP).to(tl.float64)
            pivot = load_partials(partials, width, c, c_last, 1, M, 0.0, MP).to(tl.float64)
            off = load_partials(partials, width, c, c_last, 2, M, 0.0, MP).to(tl.float64)
            square = load_partials(partials, width, c, c_last, 3, M, 0.0, MP).to(tl.float64)
            # Each chunk lifted its squares by its own range; back by powers of two, and on by the query's.
            chunk_low = load_partials(partials, width, c, c_last, 4, M, 0.0, MP)
            chunk_high = load_partials(partials, width, c, c_last, 5, M, 0.0, MP)
            back = tl.where(some > 0.0, 1.0 / lift(chunk_low, chunk_high), 1.0).to(tl.float64) * up
            d = (pivot - centre[None, :]) * up
            squares += tl.sum(square * back * back + d * (2.0 * off * up + some * d), 0)
        variance = squares.to(tl.float32) / at_least_one
    energy = prior_energy(prior, prior_m, M, MP)
    store_statistics(
        number,
        mean,
        correction,
        variance,
        low,
        high,
        energy,
        M,
        per_query,
        inv_temperature,
        offset,
        n >= WINDOW,
        MP,
        NORMALIZE,
        False,
    )


@triton.jit
def store_logits(s, scored, rows, inside, fields, S, to, per_query, M, inv_temperature):
    middle = tl.load(per_query + 5 * M + MIDDLE)
    u = tl.where(scored, s * inv_temperature, middle)  # see store_u
    tl.store(fields + (U + to) * S + rows, u, mask=inside)
    tl.store(fields + (E + to) * S + rows, tl.exp(middle - u), mask=inside)


@triton.jit(do_not_specialize=["teachers_q", "teachers_d", "teachers_m", "mask_q", "mask_d", "width", "Q", "N", "S", "M"])
def calibrate_kernel(
    teachers, teachers_q, teachers_d, teachers_m, mask, mask_q, mask_d, order, fields, table, per_query, partials, width,
    chunk_begin, owner, cu_seqlens, Q, N, S, M, inv_temperature,
    WEIGHTED: tl.constexpr, MASKED: tl.constexpr, PACKED: tl.constexpr, MP: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """Calibrated teachers by position, the mean ensemble, and partials[chunk]: how many documents pairs count, their gains."""
    c = tl.program_id(0)
    S = S.to(tl.int64)
    at = tl.load(chunk_begin + c)
    if at >= S:
        return
    q, first, n, begin, end = chunk_rows(c, at, chunk_begin, owner, cu_seqlens, Q, N, S, PACKED)
    teachers += q * teachers_q
    if MASKED:
        mask += q * mask_q
    fields += first
    table += first * M
    per_query += q * (5 * M + SCALARS)
    count = tl.zeros((BR,), tl.float32)
    gains = count
    for row in range(begin, end, BR):
        rows = row + tl.arange(0, BR)
        inside = rows < end
        slots, valid = load_slots(order, rows, inside, first, mask, mask_d, MASKED, PACKED)
        s, scored, rank = calibrate_and_start(
            teachers, slots, valid, teachers_d, teachers_m, M, rows, inside, fields, table, S, per_query, MP
        )
        # Both copies: documents that no iteration moves are read from either.
        store_logits(s, scored, rows, inside, fields, S, 0, per_query, M, inv_temperature)
        store_logits(s, scored, rows, inside, fields, S, 1, per_query, M, inv_temperature)
        count += tl.where(rank == rank, 1.0, 0.0)
        if WEIGHTED:
            gains += tl.where(rank == rank, tl.load(fields + GAIN * S + rows, mask=inside, other=0.0), 0.0)
    tl.store(partials + c.to(tl.int64) * width, tl.sum(count, 0))
    tl.store(partials + c.to(tl.int64) * width + 1, tl.sum(gains, 0))


@triton.jit
def is_direct(per_query, M, DIRECT: tl.constexpr):
    """Whether all pairs of a query are summed directly: by choice, or for want of a grid."""
    return DIRECT | (tl.load(per_query + 5 * M + GRID + 1) == 0.0)


@triton.jit
def several_labels(fields, S, begin, end):
    """Whether rows [begin, end), by rising label, differ in label, or some have none."""
    return (tl.load(fields + RANK * S + begin) == tl.load(fields + RANK * S + end - 1)) == 0


@triton.jit
def unlabelled(fields, S, row):
    rank = tl.load(fields + RANK * S + row)
    return rank != rank


@triton.jit(do_not_specialize=["width", "Q", "N", "S", "M"])
def counts_kernel(
    fields, per_query, partials, width, chunk_begin, chunk_block, block_chunk, counts, owner, cu_seqlens, Q, N, S, M,
    DIRECT: tl.constexpr, WEIGHTED: tl.constexpr, PACKED: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """1 / k_i; Σ ω over the documents above that are met directly; partials[chunk][2]: Σ ω over the pairs."""
    c = tl.program_id(0)
    S = S.to(tl.int64)
    at = tl.load(chunk_begin + c)
    if at >= S:
        return
    q, first, n, begin, end = chunk_rows(c, at, chunk_begin, owner, cu_seqlens, Q, N, S, PACKED)
    per_query += q * (5 * M + SCALARS)
    b_begin, b_end, c_begin, c_end, c_first, c_last = block_rows(
        c, first, n, is_direct(per_query, M, DIRECT), chunk_begin, chunk_block, block_chunk, counts
    )
    fields += first
    number_below = sum_partials(partials, width, 0, c_first, c_begin, TILE)
    number_above = sum_partials(partials, width, 0, c_end, c_last, TILE)
    gains_below = sum_partials(partials, width, 1, c_first, c_begin, TILE)
    gains_above = sum_partials(partials, width, 1, c_end, c_last, TILE)
    mixed = several_labels(fields, S, b_begin, b_end)
    ranks = fields + SCORED_RANK * S
    gains = fields + GAIN * S
    total = tl.zeros((BR,), tl.float64)
    for row in range(begin, end, BR):
        rows = row + tl.arange(0, BR)
        inside = rows < end
        rank, gain = load_order(rows, end, ranks, gains, WEIGHTED)
        above = tl.zeros((BR,), tl.float32)
        below = above
        if mixed:
            above, below = pair_counts(ranks + b_begin, rank, gains + b_begin, gain, b_end - b_begin, BR, BC, WEIGHTED, True)
        tl.store(fields + ABOVE * S + rows, above, mask=inside)
        if WEIGHTED:
            wide_gain = gain.to(tl.float64)
            above += (gains_above - wide_gain * number_above).to(tl.float32)
            below += (wide_gain * number_below - gains_below).to(tl.float32)
        else:
            above += number_above.to(tl.float32)
            below += number_below.to(tl.float32)
        counted = rank == rank
        k = tl.where(counted, above + below, 0.0)
        tl.store(fields + PER_PAIR * S + rows, tl.where(k > 0.0, 1.0 / tl.where(k > 0.0, k, 1.0), 0.0), mask=inside)
        total += tl.where(counted, below, 0.0).to(tl.float64)
    tl.store(partials + c.to(tl.int64) * width + 2, tl.sum(total, 0).to(tl.float32))


@triton.jit(do_not_specialize=["width", "N", "S", "M"])
def totals_kernel(
    per_query, partials, width, counts, cu_seqlens, N, S, M, PACKED: tl.constexpr, TILE: tl.constexpr
):  # fmt: skip
    q = tl.program_id(0).to(tl.int64)
    c_first, c_last, _ = query_chunks(q, counts, cu_seqlens, N, S.to(tl.int64), PACKED)
    total = sum_partials(partials, width, 2, c_first, c_last, TILE)
    tl.store(per_query + q * (5 * M + SCALARS) + 5 * M + PAIRS, total.to(tl.float32))


@triton.jit(do_not_specialize=["width", "read", "Q", "N", "S", "M"])
def iterate_kernel(
    fields, table, pulls, per_query, partials, width, chunk_begin, chunk_block, block_chunk, counts, owner, cu_seqlens,
    read, Q, N, S, M, inv_temperature, offset, step,
    DIRECT: tl.constexpr, BY_DOCUMENT: tl.constexpr, WEIGHTED: tl.constexpr, MARGIN: tl.constexpr, PACKED: tl.constexpr,
    MP: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr, APPROX: tl.constexpr,
):  # fmt: skip
    """λ of a chunk; by document also the new exponents and logits, by query partials[chunk]: each teacher's pull."""
    c = tl.program_id(0)
    S = S.to(tl.int64)
    at = tl.load(chunk_begin + c)
    if at >= S:
        return
    q, first, n, begin, end = chunk_rows(c, at, chunk_begin, owner, cu_seqlens, Q, N, S, PACKED)
    per_query += q * (5 * M + SCALARS)
    fields += first
    table += first * M
    m = tl.arange(0, MP)
    if unlabelled(fields, S, begin):
        if not BY_DOCUMENT:
            tl.store(partials + c.to(tl.int64) * width + m, tl.zeros((MP,), tl.float32), mask=m < M)
        return
    b_begin, b_end, c_begin, c_end, c_first, c_last = block_rows(
        c, first, n, is_direct(per_query, M, DIRECT), chunk_begin, chunk_block, block_chunk, counts
    )
    mixed = several_labels(fields, S, b_begin, b_end)
    others = (c_first < c_begin) | (c_end < c_last)
    wide = tl.load(per_query + 5 * M + WIDE) != 0.0
    column = fields + tl.where(wide, U + read, E + read) * S
    ranks = fields + SCORED_RANK * S
    gains = fields + GAIN * S
    total = tl.zeros((MP,), tl.float32)
    for row in range(begin, end, BR):
        rows = row + tl.arange(0, BR)
        inside = rows < end
        rank, gain = load_order(rows, end, ranks, gains, WEIGHTED)
        direction = tl.zeros((BR,), tl.float32)
        if mixed:
            u = tl.load(column + rows, mask=inside, other=1.0)
            pull = label_pull(
                column + b_begin, u, ranks + b_begin, rank, gains + b_begin, gain, b_end - b_begin, wide, offset,
                BR, BC, WEIGHTED, MARGIN, APPROX, True,
            )  # fmt: skip
            direction = pull - tl.load(fields + ABOVE * S + rows, mask=inside, other=0.0)
        if not DIRECT:
            if others:
                field = pulls + tl.load(chunk_block + c).to(tl.int64) * (2 if WEIGHTED else 1) * FIELD
                u = tl.load(fields + (U + read) * S + rows, mask=inside, other=0.0)
                direction += label_field(field, u, rank, gain, per_query + 5 * M + GRID, WEIGHTED)
        t = calibrated(table, rows, end, M, MP)
        if BY_DOCUMENT:
            s, scored = step_exponents(t, direction, rows, inside, fields, S, per_query, M, step, MP)
            store_logits(s, scored, rows, inside, fields, S, 1 - read, per_query, M, inv_temperature)
        else:
            direction = direction_by_share(t, direction, per_query, M, MP)
            total += teacher_pulls(t, direction, rows, of_teachers(per_query, 3, M, MP, -float("inf")))
    if not BY_DOCUMENT:
        tl.store(partials + c.to(tl.int64) * width + m, total, mask=m < M)


@triton.jit
def label_field(field, u, rank, gain, grid, WEIGHTED: tl.constexpr):
    """A field of label pairs at logits u: gain_i · counts − gains, or counts alone."""
    origin, cells = load_grid(grid)
    value = evaluate(field, u, origin, cells, rank == rank)
    if WEIGHTED:
        value = gain * value - evaluate(field + FIELD, u, origin, cells, rank == rank)
    return value


@triton.jit(do_not_specialize=["width", "N", "S", "M"])
def reweight_kernel(
    per_query, partials, width, counts, cu_seqlens, N, S, M, step,
    PACKED: tl.constexpr, MP: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """The teachers' new energies and weights, by query."""
    q = tl.program_id(0).to(tl.int64)
    c_first, c_last, _ = query_chunks(q, counts, cu_seqlens, N, S.to(tl.int64), PACKED)
    per_query += q * (5 * M + SCALARS)
    pull = tl.zeros((MP,), tl.float64)
    for begin in range(c_first, c_last, TILE):
        c = begin + tl.arange(0, TILE)
        pull += tl.sum(load_partials(partials, width, c, c_last, 0, M, 0.0, MP).to(tl.float64), 0)
    store_energy(pull, per_query, M, step, MP)


@triton.jit(do_not_specialize=["Q", "N", "S", "M"])
def tilt_kernel(
    fields, table, per_query, chunk_begin, owner, cu_seqlens, Q, N, S, M, inv_temperature,
    PACKED: tl.constexpr, MP: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """The ensemble's logits in the teachers' new weights, by query."""
    c = tl.program_id(0)
    S = S.to(tl.int64)
    at = tl.load(chunk_begin + c)
    if at >= S:
        return
    q, first, n, begin, end = chunk_rows(c, at, chunk_begin, owner, cu_seqlens, Q, N, S, PACKED)
    per_query += q * (5 * M + SCALARS)
    energy = of_teachers(per_query, 3, M, MP, -float("inf"))
    for row in range(begin, end, BR):
        rows = row + tl.arange(0, BR)
        s, scored, _ = tilt(calibrated(table + first * M, rows, end, M, MP), rows * 0.0, energy)
        store_logits(s, scored, rows, rows < end, fields + first, S, 0, per_query, M, inv_temperature)


@triton.jit(do_not_specialize=["width", "read", "Q", "N", "S", "M"])
def trace_kernel(
    fields, losses, per_query, partials, width, chunk_begin, chunk_block, block_chunk, counts, owner, cu_seqlens,
    read, Q, N, S, M, offset,
    DIRECT: tl.constexpr, WEIGHTED: tl.constexpr, PACKED: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
    APPROX: tl.constexpr,
):  # fmt: skip
    """partials[chunk][0]: label losses of the pairs in which its documents are the higher ones."""
    c = tl.program_id(0)
    S = S.to(tl.int64)
    at = tl.load(chunk_begin + c)
    if at >= S:
        return
    q, first, n, begin, end = chunk_rows(c, at, chunk_begin, owner, cu_seqlens, Q, N, S, PACKED)
    per_query += q * (5 * M + SCALARS)
    fields += first
    if unlabelled(fields, S, begin):
        tl.store(partials + c.to(tl.int64) * width, 0.0)
        return
    b_begin, b_end, c_begin, c_end, c_first, c_last = block_rows(
        c, first, n, is_direct(per_query, M, DIRECT), chunk_begin, chunk_block, block_chunk, counts
    )
    mixed = several_labels(fields, S, b_begin, b_end)
    u = fields + (U + read) * S
    ranks = fields + SCORED_RANK * S
    gains = fields + GAIN * S
    total = tl.zeros((BR,), tl.float64)
    for row in range(begin, end, BR):
        rows = row + tl.arange(0, BR)
        rank, gain = load_order(rows, end, ranks, gains, WEIGHTED)
        u_row = tl.load(u + rows, mask=rows < end, other=0.0)
        if mixed:
            loss, _ = label_losses(
                u + b_begin, u_row, ranks + b_begin, rank, gains + b_begin, gain, b_end - b_begin, offset,
                BR, BC, WEIGHTED, APPROX, True,
            )  # fmt: skip
            total += loss.to(tl.float64)
        if not DIRECT:
            if c_first < c_begin:
                field = losses + tl.load(chunk_block + c).to(tl.int64) * (2 if WEIGHTED else 1) * FIELD
                total += label_field(field, u_row, rank, gain, per_query + 5 * M + GRID, WEIGHTED).to(tl.float64)
    tl.store(partials + c.to(tl.int64) * width, tl.sum(total, 0).to(tl.float32))


@triton.jit(do_not_specialize=["width", "N", "S", "M", "trace_q", "iteration"])
def trace_sum_kernel(
    trace, trace_q, iteration, per_query, partials, width, counts, cu_seqlens, N, S, M,
    PACKED: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    q = tl.program_id(0).to(tl.int64)
    c_first, c_last, _ = query_chunks(q, counts, cu_seqlens, N, S.to(tl.int64), PACKED)
    total = sum_partials(partials, width, 0, c_first, c_last, TILE).to(tl.float32)
    pairs = tl.load(per_query + q * (5 * M + SCALARS) + 5 * M + PAIRS)
    tl.store(trace + q * trace_q + iteration, tl.where(pairs > 0.0, total / tl.where(pairs > 0.0, pairs, 1.0), 0.0))


@triton.jit(do_not_specialize=["Q", "N", "S", "M"])
def output_kernel(
    fields, table, per_query, order, logits, weights, chunk_begin, owner, cu_seqlens, Q, N, S, M,
    BY_DOCUMENT: tl.constexpr, DIFFERENCES: tl.constexpr, PACKED: tl.constexpr, MP: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """Logits (DIFFERENCES: they are all that is wanted), and by document weights, back in the tensors' order."""
    c = tl.program_id(0)
    S = S.to(tl.int64)
    at = tl.load(chunk_begin + c)
    if at >= S:
        return
    q, first, n, begin, end = chunk_rows(c, at, chunk_begin, owner, cu_seqlens, Q, N, S, PACKED)
    per_query += q * (5 * M + SCALARS)
    energy = of_teachers(per_query, 3, M, MP, -float("inf"))
    m = tl.arange(0, MP)
    common = 0.0
    if not DIFFERENCES:
        common = tl.load(per_query + 5 * M + COMMON)
    for row in range(begin, end, BR):
        rows = row + tl.arange(0, BR)
        inside = rows < end
        slots, _ = load_slots(order, rows, inside, first, None, 0, False, PACKED)
        if not PACKED:
            slots += first
        exponent = tl.load(fields + first + EXPONENT * S + rows, mask=inside, other=0.0)
        s, scored, w = tilt(calibrated(table + first * M, rows, end, M, MP), exponent, energy)
        tl.store(logits + slots, tl.where(scored, s + common, float("nan")), mask=inside)
        if BY_DOCUMENT and weights is not None:
            tl.store(weights + slots[:, None] * M + m[None, :], w, mask=inside[:, None] & (m < M)[None, :])


@triton.jit(do_not_specialize=["M"])
def weights_kernel(weights, per_query, M, MP: tl.constexpr):
    """The teachers' weights, by query."""
    q = tl.program_id(0).to(tl.int64)
    m = tl.arange(0, MP)
    tl.store(weights + q * M + m, of_teachers(per_query + q * (5 * M + SCALARS), 4, M, MP, 0.0), mask=m < M)
