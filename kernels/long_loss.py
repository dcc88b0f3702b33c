"""The student's loss and gradient of lists longer than one program takes alone; see kernels/long_ensemble.py for how.

    load → loss_sums → scale → (deposit → super → collect → apply, for D and for R) → distill, labels → loss_total
    → gradient

D runs over all documents with a target: with κ = σ − 1/2 and ψ(v) = softplus(v) − v/2, even,

    Σ_{i<j} BCE = Σ_i [ (Σ_j ψ(z_j − z_i) − log 2) / 2 + z_i Σ_j κ(s_j − s_i) ]
    slope_i     = Σ_j κ(s_j − s_i) − κ(z_j − z_i)

so two fields give its slopes and a third its loss. R is the ensemble's label sum at z. A query whose logits span more cells
than a grid has is summed directly.

Floor: per document about 100 bytes and the fields' cost (kernels/fields.py), once; bound by bytes, or by the latency of a dozen
launches.
"""

import triton
import triton.language as tl
from pile_fast.kernels.chunks import (
    GAIN,
    RANK,
    block_rows,
    chunk_rows,
    chunks_before,
    load_slots,
    query_chunks,
    sum_partials,
)
from pile_fast.kernels.ensemble import SCALARS, load_order
from pile_fast.kernels.fields import ROW as FIELD
from pile_fast.kernels.fields import evaluate, load_grid, store_grid
from pile_fast.kernels.long_ensemble import label_field, several_labels
from pile_fast.kernels.loss import (
    D_SLOPE,
    LOSS_WIDE,
    POISON,
    R_SLOPE,
    S_MIDDLE,
    S_SCALED,
    TARGETS,
    Z_MIDDLE,
    Z_SCALED,
    Z,
    gradient_rows,
    load_logits,
    scale_rows,
    store_pivots,
    store_total,
)
from pile_fast.kernels.pairs import NARROW, distillation_losses, label_losses, pair_counts

Z_GRID = tl.constexpr(11)  # origin and cells of z / τ, then of s / τ, then of z for the labels
LABEL_GRID = tl.constexpr(15)

# Of a chunk's partial sums.
BROKEN = tl.constexpr(0)
USED = tl.constexpr(1)
DIFFERENCE = tl.constexpr(2)
Z_LOW = tl.constexpr(3)  # of the documents with a target; the highs follow their lows
S_LOW = tl.constexpr(5)
LABEL_LOW = tl.constexpr(7)  # of all
D_LOSS = tl.constexpr(0)
R_LOSS = tl.constexpr(1)
R_WEIGHT = tl.constexpr(2)
NUMBER = tl.constexpr(9)
GAINS = tl.constexpr(10)


@triton.jit(do_not_specialize=["student_q", "student_d", "target_q", "target_d", "mask_q", "mask_d", "width", "Q", "N", "S"])
def load_kernel(
    student, student_q, student_d, target, target_q, target_d, mask, mask_q, mask_d, order, fields, partials, width,
    chunk_begin, owner, cu_seqlens, Q, N, S,
    MASKED: tl.constexpr, PACKED: tl.constexpr, USE_D: tl.constexpr, USE_R: tl.constexpr, WEIGHTED: tl.constexpr,
    BR: tl.constexpr,
):  # fmt: skip
    """Logits by position as they are, and partials[chunk]: ranges and counts."""
    c = tl.program_id(0)
    S = S.to(tl.int64)
    at = tl.load(chunk_begin + c)
    if at >= S:
        return
    q, first, n, begin, end = chunk_rows(c, at, chunk_begin, owner, cu_seqlens, Q, N, S, PACKED)
    student += q * student_q
    if USE_D:
        target += q * target_q
    if MASKED:
        mask += q * mask_q
    fields += first
    inf = float("inf")
    low = tl.full((BR,), inf, tl.float32)
    high = -low
    z_low = low
    z_high = high
    s_low = low
    s_high = high
    broken = tl.zeros((BR,), tl.float32)
    used = broken
    number = broken
    gains = broken
    for row in range(begin, end, BR):
        rows = row + tl.arange(0, BR)
        inside = rows < end
        slots, valid = load_slots(order, rows, inside, first, mask, mask_d, MASKED, PACKED)
        z, s = load_logits(student, student_d, target, target_d, slots, valid, 0.0, USE_D)
        tl.store(fields + Z * S + rows, z, mask=inside)
        broken += tl.where(tl.abs(z) < inf, 0.0, 1.0)
        low = tl.minimum(low, tl.where(valid, z, inf))
        high = tl.maximum(high, tl.where(valid, z, -inf))
        if USE_D:
            takes = s == s
            tl.store(fields + S_SCALED * S + rows, s, mask=inside)
            used += tl.where(takes, 1.0, 0.0)
            z_low = tl.minimum(z_low, tl.where(takes, z, inf))
            z_high = tl.maximum(z_high, tl.where(takes, z, -inf))
            s_low = tl.minimum(s_low, tl.where(takes, s, inf))
            s_high = tl.maximum(s_high, tl.where(takes, s, -inf))
        if USE_R:
            rank, gain = load_order(rows, end, fields + RANK * S, fields + GAIN * S, WEIGHTED)
            number += tl.where(rank == rank, 1.0, 0.0)
            if WEIGHTED:
                gains += tl.where(rank == rank, gain, 0.0)
    to = partials + c.to(tl.int64) * width
    tl.store(to + BROKEN, tl.sum(broken, 0))
    tl.store(to + LABEL_LOW, tl.min(low, 0))
    tl.store(to + LABEL_LOW + 1, tl.max(high, 0))
    if USE_D:
        tl.store(to + USED, tl.sum(used, 0))
        tl.store(to + Z_LOW, tl.min(z_low, 0))
        tl.store(to + Z_LOW + 1, tl.max(z_high, 0))
        tl.store(to + S_LOW, tl.min(s_low, 0))
        tl.store(to + S_LOW + 1, tl.max(s_high, 0))
    if USE_R:
        tl.store(to + NUMBER, tl.sum(number, 0))
        tl.store(to + GAINS, tl.sum(gains, 0))


@triton.jit
def range_of(partials, width, column, c_first, c_last, TILE: tl.constexpr):
    inf = float("inf")
    low = tl.full((TILE,), inf, tl.float32)
    high = -low
    for begin in range(c_first, c_last, TILE):
        c = begin + tl.arange(0, TILE)
        at = partials + c.to(tl.int64) * width + column
        low = tl.minimum(low, tl.load(at, mask=c < c_last, other=inf))
        high = tl.maximum(high, tl.load(at + 1, mask=c < c_last, other=-inf))
    low = tl.min(low, 0)
    high = tl.max(high, 0)
    return tl.where(low <= high, low, 0.0), tl.where(low <= high, high, 0.0)


@triton.jit(do_not_specialize=["width", "N", "S", "M"])
def loss_sums_kernel(
    per_query, partials, width, counts, cu_seqlens, N, S, M, inv_tau,
    USE_D: tl.constexpr, PACKED: tl.constexpr, WINDOW: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Whether all of a query's student logits are finite, how many documents have a target, the pivots and the grids."""
    q = tl.program_id(0).to(tl.int64)
    c_first, c_last, n = query_chunks(q, counts, cu_seqlens, N, S.to(tl.int64), PACKED)
    scalars = per_query + q * (5 * M + SCALARS) + 5 * M
    broken = sum_partials(partials, width, BROKEN, c_first, c_last, TILE) > 0.0
    tl.store(scalars + POISON, tl.where(broken, float("nan"), 0.0))
    low, high = range_of(partials, width, LABEL_LOW, c_first, c_last, TILE)
    # The sums of a broken query are not used; one cell keeps them cheap.
    linear = n >= WINDOW
    store_grid(scalars + LABEL_GRID, tl.where(broken, 0.0, low), tl.where(broken, 0.0, high), linear)
    if USE_D:
        count = sum_partials(partials, width, USED, c_first, c_last, TILE).to(tl.float32)
        z_low, z_high = range_of(partials, width, Z_LOW, c_first, c_last, TILE)
        s_low, s_high = range_of(partials, width, S_LOW, c_first, c_last, TILE)
        store_pivots(z_low, s_low, scalars)
        # From here on in units of τ, from the pivots.
        z_high = (z_high - z_low) * inv_tau
        s_high = (s_high - s_low) * inv_tau
        # Direct sums take exponentials of all z, used or not: the wide range.
        narrow = ((high - low) * inv_tau <= NARROW) & (s_high <= NARROW)
        tl.store(scalars + LOSS_WIDE, tl.where(narrow, 0.0, 1.0))
        tl.store(scalars + Z_MIDDLE, z_high / 2.0)
        tl.store(scalars + S_MIDDLE, s_high / 2.0)
        tl.store(scalars + TARGETS, count)
        store_grid(scalars + Z_GRID, 0.0, tl.where(broken, 0.0, z_high), linear)
        store_grid(scalars + Z_GRID + 2, 0.0, tl.where(broken, 0.0, s_high), linear)


@triton.jit(do_not_specialize=["width", "Q", "N", "S", "M"])
def scale_kernel(
    fields, per_query, partials, width, chunk_begin, owner, cu_seqlens, Q, N, S, M, inv_tau,
    PACKED: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """z / τ and s / τ from the pivots; partials[chunk]: the sum of their differences."""
    c = tl.program_id(0)
    S = S.to(tl.int64)
    at = tl.load(chunk_begin + c)
    if at >= S:
        return
    q, first, n, begin, end = chunk_rows(c, at, chunk_begin, owner, cu_seqlens, Q, N, S, PACKED)
    scalars = per_query + q * (5 * M + SCALARS) + 5 * M
    fields += first
    difference = tl.zeros((BR,), tl.float64)
    for row in range(begin, end, BR):
        rows = row + tl.arange(0, BR)
        inside = rows < end
        z = tl.load(fields + Z * S + rows, mask=inside, other=0.0)
        s = tl.load(fields + S_SCALED * S + rows, mask=inside, other=float("nan"))
        z, s = scale_rows(z, s, rows, inside, fields, S, scalars, inv_tau)
        difference += tl.where(s == s, z - s, 0.0).to(tl.float64)
    tl.store(partials + c.to(tl.int64) * width + DIFFERENCE, tl.sum(difference, 0).to(tl.float32))


@triton.jit(do_not_specialize=["width", "Q", "N", "S", "M"])
def distill_kernel(
    fields, pulls, losses, per_query, partials, width, chunk_begin, chunk_block, counts, owner, cu_seqlens, Q, N, S, M,
    DIRECT: tl.constexpr, MSE: tl.constexpr, PACKED: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr, TILE: tl.constexpr,
    APPROX: tl.constexpr,
):  # fmt: skip
    """D: slopes of a chunk's documents, partials[chunk]: their losses."""
    c = tl.program_id(0)
    S = S.to(tl.int64)
    at = tl.load(chunk_begin + c)
    if at >= S:
        return
    q, first, n, begin, end = chunk_rows(c, at, chunk_begin, owner, cu_seqlens, Q, N, S, PACKED)
    scalars = per_query + q * (5 * M + SCALARS) + 5 * M
    fields += first
    z_field = fields + Z_SCALED * S
    s_field = fields + S_SCALED * S
    z_origin, z_cells = load_grid(scalars + Z_GRID)
    s_origin, s_cells = load_grid(scalars + Z_GRID + 2)
    direct = DIRECT | (z_cells == 0.0) | (s_cells == 0.0)
    mean = 0.0
    if MSE:
        c_first = chunks_before(counts, first)
        c_last = chunks_before(counts, first + n)
        difference = sum_partials(partials, width, DIFFERENCE, c_first, c_last, TILE).to(tl.float32)
        mean = difference / tl.maximum(tl.load(scalars + TARGETS), 1.0)
    z_middle = tl.load(scalars + Z_MIDDLE)
    total = tl.zeros((BR,), tl.float64)
    for row in range(begin, end, BR):
        rows = row + tl.arange(0, BR)
        inside = rows < end
        z = tl.load(z_field + rows, mask=inside, other=0.0)
        s = tl.load(s_field + rows, mask=inside, other=float("nan"))
        takes = s == s
        if MSE:
            # Σ_{i<j} (d_i − d_j)² = n Σ (d_i − mean)²
            d = tl.where(takes, z - s - mean, 0.0)
            count = tl.load(scalars + TARGETS)
            loss = count * d * d
            slope = 2.0 * count * d
        else:
            loss = tl.zeros((BR,), tl.float32)
            slope = loss
            if direct:
                loss, slope = distillation_losses(
                    z_field, z, s_field, s, rows, n, tl.load(scalars + LOSS_WIDE) != 0.0, z_middle,
                    tl.load(scalars + S_MIDDLE), BR, BC, APPROX, True,
                )  # fmt: skip
            if not DIRECT:
                if direct == 0:
                    block = tl.load(chunk_block + chunks_before(counts, first)).to(tl.int64)
                    of_z = evaluate(pulls + block * 2 * FIELD, z, z_origin, z_cells, takes)
                    of_s = evaluate(pulls + (block * 2 + 1) * FIELD, tl.where(takes, s, 0.0), s_origin, s_cells, takes)
                    itself = evaluate(losses + block * FIELD, z, z_origin, z_cells, takes)
                    slope = of_s - of_z
                    loss = tl.where(takes, 0.5 * (itself - 0.6931471805599453) + (z - z_middle) * of_s, 0.0)
        tl.store(fields + D_SLOPE * S + rows, slope, mask=inside)
        total += loss.to(tl.float64)
    tl.store(partials + c.to(tl.int64) * width + D_LOSS, tl.sum(total, 0).to(tl.float32))


@triton.jit(do_not_specialize=["width", "Q", "N", "S", "M"])
def labels_kernel(
    fields, pulls, losses, per_query, partials, width, chunk_begin, chunk_block, block_chunk, counts, owner, cu_seqlens,
    Q, N, S, M,
    DIRECT: tl.constexpr, WEIGHTED: tl.constexpr, PACKED: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
    TILE: tl.constexpr, APPROX: tl.constexpr,
):  # fmt: skip
    """R: slopes of a chunk's documents, partials[chunk]: losses and Σ ω of the pairs in which they are the higher ones."""
    c = tl.program_id(0)
    S = S.to(tl.int64)
    at = tl.load(chunk_begin + c)
    if at >= S:
        return
    q, first, n, begin, end = chunk_rows(c, at, chunk_begin, owner, cu_seqlens, Q, N, S, PACKED)
    grid = per_query + q * (5 * M + SCALARS) + 5 * M + LABEL_GRID
    fields += first
    b_begin, b_end, c_begin, c_end, c_first, c_last = block_rows(
        c, first, n, DIRECT | (tl.load(grid + 1) == 0.0), chunk_begin, chunk_block, block_chunk, counts
    )
    mixed = several_labels(fields, S, b_begin, b_end)
    number_below = sum_partials(partials, width, NUMBER, c_first, c_begin, TILE)
    gains_below = sum_partials(partials, width, GAINS, c_first, c_begin, TILE)
    ranks = fields + RANK * S
    gains = fields + GAIN * S
    z_field = fields + Z * S
    total = tl.zeros((BR,), tl.float64)
    weight = tl.zeros((BR,), tl.float64)
    for row in range(begin, end, BR):
        rows = row + tl.arange(0, BR)
        inside = rows < end
        rank, gain = load_order(rows, end, ranks, gains, WEIGHTED)
        z = tl.load(z_field + rows, mask=inside, other=0.0)
        loss = tl.zeros((BR,), tl.float32)
        slope = loss
        below = loss
        if mixed:
            loss, slope = label_losses(
                z_field + b_begin, z, ranks + b_begin, rank, gains + b_begin, gain, b_end - b_begin, 0.0,
                BR, BC, WEIGHTED, APPROX, True,
            )  # fmt: skip
            _, below = pair_counts(ranks + b_begin, rank, gains + b_begin, gain, b_end - b_begin, BR, BC, WEIGHTED, True)
        more = number_below
        if WEIGHTED:
            more = gain.to(tl.float64) * number_below - gains_below
        weight += below.to(tl.float64) + tl.where(rank == rank, more, 0.0)
        if not DIRECT:
            if (c_first < c_begin) | (c_end < c_last):
                block = tl.load(chunk_block + c).to(tl.int64) * (2 if WEIGHTED else 1) * FIELD
                slope += label_field(pulls + block, z, rank, gain, grid, WEIGHTED)
                loss += label_field(losses + block, z, rank, gain, grid, WEIGHTED)
        tl.store(fields + R_SLOPE * S + rows, -slope, mask=inside)
        total += loss.to(tl.float64)
    tl.store(partials + c.to(tl.int64) * width + R_LOSS, tl.sum(total, 0).to(tl.float32))
    tl.store(partials + c.to(tl.int64) * width + R_WEIGHT, tl.sum(weight, 0).to(tl.float32))


@triton.jit(do_not_specialize=["width", "N", "S", "M"])
def loss_total_kernel(
    losses, has_pairs, per_query, partials, width, counts, cu_seqlens, N, S, M, alpha, inv_tau,
    USE_D: tl.constexpr, USE_R: tl.constexpr, PACKED: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    q = tl.program_id(0).to(tl.int64)
    c_first, c_last, _ = query_chunks(q, counts, cu_seqlens, N, S.to(tl.int64), PACKED)
    d_loss = sum_partials(partials, width, D_LOSS, c_first, c_last, TILE).to(tl.float32) if USE_D else 0.0
    r_loss = sum_partials(partials, width, R_LOSS, c_first, c_last, TILE).to(tl.float32) if USE_R else 0.0
    r_weight = sum_partials(partials, width, R_WEIGHT, c_first, c_last, TILE).to(tl.float32) if USE_R else 0.0
    scalars = per_query + q * (5 * M + SCALARS) + 5 * M
    store_total(d_loss, r_loss, r_weight, scalars, alpha, inv_tau, losses + q, has_pairs + q, USE_D, USE_R)


@triton.jit(do_not_specialize=["mask_q", "mask_d", "Q", "N", "S", "M"])
def gradient_kernel(
    gradient, fields, per_query, mask, mask_q, mask_d, order, chunk_begin, owner, cu_seqlens, Q, N, S, M,
    MASKED: tl.constexpr, PACKED: tl.constexpr, USE_D: tl.constexpr, USE_R: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    c = tl.program_id(0)
    S = S.to(tl.int64)
    at = tl.load(chunk_begin + c)
    if at >= S:
        return
    q, first, n, begin, end = chunk_rows(c, at, chunk_begin, owner, cu_seqlens, Q, N, S, PACKED)
    scalars = per_query + q * (5 * M + SCALARS) + 5 * M
    if MASKED:
        mask += q * mask_q
    for row in range(begin, end, BR):
        rows = row + tl.arange(0, BR)
        inside = rows < end
        slots, valid = load_slots(order, rows, inside, first, mask, mask_d, MASKED, PACKED)
        if not PACKED:
            slots += first
        gradient_rows(rows, slots, valid, inside, fields + first, S, scalars, gradient, USE_D, USE_R)
