"""Pair sums in linear time: documents act on each other through the cells their logits lie in.

The range of u is cut into cells of width h = 1.5. With u = centre + x in each cell, k(u_j − u_i) for one of the kernels k below
is a polynomial of degree 7 in x_i and in x_j to 8e-8 (interpolated at Chebyshev nodes), an 8 x 8 matrix that depends on how far
the cells are apart. So, over the chunks of kernels/chunks.py,

    deposit  a chunk adds w (1, x, …, x^7) of its documents to its cells' moments, w = 1 and, for weighted pairs, the gain;
    collect  what lies below a block, and above it, is the sum of its query's chunks before, and after;
    apply    moments times matrices: a block's field, a polynomial per cell;
    evaluate a document reads its block's field at its own x.

ω_ij = gain_i − gain_j splits into a field of counts and one of gains; documents' weights c multiply w. A label pair counts its
higher document's c, so there the fields of what lies below and above are made apart. Sums are of one sign and relative
accuracy: Σ_below σ(offset − (u_i − u_j)) and Σ_above σ(offset − (u_j − u_i)) have matrices of their own, so well ordered lists
keep their digits.

Moments without atomics: a program owns a chunk and, cell by cell, sums the powers of the documents in it (a [CHUNK, 8] tile in
registers, times 0 or 1) over its threads. Cells · 8 multiply-adds per document, 10 instructions per document and cell in all; a
one-hot matrix product at full float32 precision (no tensor cores) would take 16 multiply-adds and as many loads from shared
memory. Sums over chunks go through sums of 64 chunks each. All orders are fixed.

Floor per document and pass: deposit 4 to 12 bytes, about 80 instructions for 8 cells; evaluate 12 to 20 bytes, 32 more from L1,
30 instructions. Per block: 64 multiply-adds for each pair of near cells. Ranges of more than MAX_CELLS cells (192 in units of
the temperature) have no grid (0 cells): their queries fall back to direct sums, on the device.
"""

import math
from typing import Any, NamedTuple

import triton
import triton.language as tl
from pile_fast.kernels.chunks import chunks_before, open_chunk, query_chunks, query_of
from pile_fast.kernels.layout import (
    ENTRIES, FIELD, GAIN, MATRICES, MAX_CELLS, SCALARS, SPAN, SUPER, TEACHER_ROWS, C, P, field, plain, scalar,
)  # fmt: skip

CELL = tl.constexpr(1.5)
# The kernels, v = u_j − u_i: what is below a document pulls it up, what is above pushes it down, and the pairs' losses.
UP = tl.constexpr(0)  # σ(offset + v)
DOWN = tl.constexpr(1)  # σ(offset − v)
LOSS = tl.constexpr(2)  # softplus(offset + v)
COLUMNS = tl.constexpr(128)  # floats of a row of moments that a program sums at once
TARGET_CELLS = tl.constexpr(16)  # cells whose field a program makes at once


class Moments(NamedTuple):
    """Of chunks; how many short queries there are up to each, or None; of SUPER chunks each; and what each target meets."""

    chunks: Any
    short: Any
    supers: Any
    sides: Any


def _interpolation() -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Chebyshev nodes of a cell, and the coefficient of x^k in the basis polynomial of node p, at index 8 k + p."""
    half, p = CELL.value / 2, P.value
    angles = [math.pi * (2 * i + 1) / (2 * p) for i in range(p)]
    chebyshev = [[1.0] + [0.0] * (p - 1), [0.0, 1.0] + [0.0] * (p - 2)]
    for d in range(2, p):
        doubled = [0.0] + [2 * c for c in chebyshev[d - 1][:-1]]
        chebyshev.append([a - b for a, b in zip(doubled, chebyshev[d - 2], strict=True)])
    basis = [
        sum((1 if d == 0 else 2) / p * math.cos(d * angle) * chebyshev[d][k] for d in range(p)) / half**k
        for k in range(p)
        for angle in angles
    ]
    return tuple(half * math.cos(angle) for angle in angles), tuple(basis)


NODES, BASIS = map(tl.constexpr, _interpolation())


@triton.jit
def first_entry(offset, KERNEL: tl.constexpr):
    """The table's first entry is for a source cell this many cells above the target's; it is centred on the kernel's bend."""
    centre = tl.minimum(tl.maximum(offset / CELL, -1e6), 1e6)
    return tl.floor((centre if KERNEL == DOWN else -centre) + 0.5).to(tl.int32) - SPAN


@triton.jit
def matrices_kernel(tables, offset):
    """tables[kernel][entry][source power][target power]; one program each matrix."""
    e = tl.program_id(0)
    kernel = tl.program_id(1)
    p = tl.arange(0, P)
    at = p[:, None] * P + p[None, :]
    node = tl.zeros((P,), tl.float64)
    basis = tl.zeros((P, P), tl.float64)
    for i in tl.static_range(P):
        node = tl.where(p == i, tl.full((), NODES[i], tl.float64), node)
    for i in tl.static_range(P * P):
        basis = tl.where(at == i, tl.full((), BASIS[i], tl.float64), basis)
    first = tl.where(kernel == DOWN, first_entry(offset, DOWN), first_entry(offset, UP))
    v = (first + e).to(tl.float64) * CELL + node[:, None] - node[None, :]
    x = tl.where(kernel == DOWN, -v, v) + offset
    t = tl.exp(-tl.abs(x))
    if kernel == LOSS:
        value = tl.where(x > 0.0, x, 0.0) + tl.log(1.0 + t)
    else:
        value = tl.where(x > 0.0, 1.0, t) / (1.0 + t)
    half = tl.sum(basis[:, :, None] * value[None, :, :], 1)
    out = tl.sum(half[:, None, :] * basis[None, :, :], 2)
    tl.store(tables + kernel * MATRICES + e * P * P + at, out.to(tl.float32))


@triton.jit
def store_grid(to, low, high, wanted):
    """Origin and number of cells over a range; 0 cells where there are too many, the range is none, or none are wanted."""
    count = (high - low) / CELL + 1.0
    cells = tl.floor(tl.where(wanted & (count >= 1.0) & (count < MAX_CELLS + 1.0), count, 0.0))
    # Centred: the outer cells share what the last one has to spare.
    tl.store(to, (low + high - cells * CELL) / 2.0)
    tl.store(to + 1, cells)


@triton.jit
def load_grid(grid):
    """Origin and number of cells."""
    return tl.load(grid), tl.load(grid + 1)


@triton.jit
def locate(u, origin, cells):
    """Cell, and u relative to the cell's centre. Clamped: rounding may put a logit a hair outside."""
    u = u - origin
    cell = tl.floor(tl.minimum(tl.maximum(u / CELL, 0.0), cells - 0.5))
    return cell.to(tl.int32), u - (cell + 0.5) * CELL


@triton.jit
def powers(x):
    """(…, P): 1, x, …, x^7, one factor per binary digit of the exponent."""
    k = tl.arange(0, P)[None, :]
    x = x[:, None]
    x2 = x * x
    return tl.where((k & 1) != 0, x, 1.0) * tl.where((k & 2) != 0, x2, 1.0) * tl.where((k & 4) != 0, x2 * x2, 1.0)


@triton.jit
def evaluate(field, u, origin, cells, inside):
    """The field's polynomials at logits u; 0 where not `inside`."""
    cell, x = locate(u, origin, cells)
    at = cell[:, None] * P + tl.arange(0, P)[None, :]
    f = tl.load(field + at, mask=inside[:, None], other=0.0)
    return tl.sum(f * powers(tl.where(inside, x, 0.0)), 1)


@triton.jit
def label_field(fields, k, lists, GRID: tl.constexpr, u, rank, gain, how: tl.constexpr):
    """The field of label pairs of a chunk's block at logits u: gain_i · counts − gains, or counts alone."""
    origin, cells = load_grid(scalar(k, GRID))
    at = fields + tl.load(lists.chunk_block + k.c).to(tl.int64) * (2 if how.WEIGHTED else 1) * FIELD
    value = evaluate(at, u, origin, cells, rank == rank)
    if how.WEIGHTED:
        value = gain * value - evaluate(at + FIELD, u, origin, cells, rank == rank)
    return value


@triton.jit
def moments_of(moments, q, SETS: tl.constexpr):
    """Where the moments of chunk 0 would lie: those of short queries, one chunk each, take no room."""
    chunks = moments.chunks
    if moments.short is not None:
        chunks -= tl.load(moments.short + q) * (SETS * FIELD)
    return chunks


@triton.jit
def grid_of(state, q, grid):
    """Pointer to a grid of a query; `grid` is the scalar's number."""
    M = plain(state.teachers)
    return state.per_query + q * (TEACHER_ROWS * M + SCALARS) + TEACHER_ROWS * M + grid


@triton.jit(do_not_specialize=["value", "part", "grid"])
def deposit_kernel(
    state, lists, moments, value, part, grid,
    VALUES: tl.constexpr, WEIGHTED: tl.constexpr, HAS_C: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Moments of a chunk's documents at the logits of field `value`, of those whose field `part` is not NaN; WEIGHTED: a second
    set, by their gains. VALUES == 2: a set for each of two logits, fields value + v, on grids of their own. HAS_C: each counts
    what field C says."""
    k = open_chunk(state, lists)
    if k.n == 0:
        return
    SETS: tl.constexpr = VALUES + WEIGHTED
    rows = k.begin + tl.arange(0, CHUNK)
    inside = rows < k.end
    takes = tl.load(field(k, part) + rows, mask=inside, other=float("nan"))
    takes = inside & (takes == takes)
    c = 1.0
    if HAS_C:
        c = tl.load(field(k, C) + rows, mask=takes, other=0.0)
    for v in tl.static_range(VALUES):
        origin, cells = load_grid(grid_of(state, k.q, grid + 2 * v))
        u = tl.load(field(k, value + v) + rows, mask=takes, other=0.0)
        cell, x = locate(u, origin, cells)
        power = powers(tl.where(takes, x, 0.0))
        to = moments_of(moments, k.q, SETS) + (k.c.to(tl.int64) * SETS + v) * FIELD + tl.arange(0, P)
        if WEIGHTED:
            gain = tl.load(field(k, GAIN) + rows, mask=takes, other=0.0)
        for i in range(0, cells.to(tl.int32)):
            here = tl.where(takes & (cell == i), c, 0.0)
            tl.store(to + i * P, tl.sum(here[:, None] * power, 0))
            if WEIGHTED:
                tl.store(to + FIELD + i * P, tl.sum((here * gain)[:, None] * power, 0))


@triton.jit
def sum_rows(rows, a, b, width, column, inside, total):
    """total + rows[a:b, column], in float64."""
    for begin in range(a, b, 16):
        i = begin + tl.arange(0, 16)
        at = i.to(tl.int64)[:, None] * width + column[None, :]
        part = tl.load(rows + at, mask=(i < b)[:, None] & inside[None, :], other=0.0)
        total += tl.sum(part, 0).to(tl.float64)
    return total


@triton.jit(do_not_specialize=["grid"])
def super_kernel(state, lists, moments, grid, SELF: tl.constexpr, SETS: tl.constexpr):
    """Sums of SUPER chunks' moments, one set a program; where the query ends earlier, of fewer, which nothing reads."""
    first_chunk = tl.program_id(0) * SUPER
    k = tl.program_id(1)
    S = plain(lists.documents).to(tl.int64)
    at = tl.load(lists.chunk_begin + first_chunk)
    if at >= S:
        return
    q, first, n = query_of(at, at < S, lists)
    _, cells = load_grid(grid_of(state, q, grid + (2 * k if SELF else 0)))
    last = tl.minimum(first_chunk + SUPER, chunks_before(lists, first + n))
    chunks = moments_of(moments, q, SETS) + k * FIELD
    used = cells.to(tl.int32) * P
    for begin in range(0, used, COLUMNS):
        column = begin + tl.arange(0, COLUMNS)
        zero = tl.zeros((COLUMNS,), tl.float64)
        total = sum_rows(chunks, first_chunk, last, SETS * FIELD, column, column < used, zero)
        to = moments.supers + (tl.program_id(0).to(tl.int64) * SETS + k) * FIELD + column
        tl.store(to, total.to(tl.float32), mask=column < used)


@triton.jit
def sum_range(chunks, supers, a, b, width, column, inside, TWO_LEVELS: tl.constexpr):
    """Σ of the moments of chunks [a, b)."""
    total = tl.zeros((COLUMNS,), tl.float64)
    if TWO_LEVELS:
        up = tl.minimum((a + SUPER - 1) // SUPER * SUPER, b)
        down = tl.maximum(b // SUPER * SUPER, up)
        total = sum_rows(chunks, a, up, width, column, inside, total)
        total = sum_rows(supers, up // SUPER, down // SUPER, width, column, inside, total)
        total = sum_rows(chunks, down, b, width, column, inside, total)
    else:
        total = sum_rows(chunks, a, b, width, column, inside, total)
    return total.to(tl.float32)


@triton.jit
def target_chunks(lists, target, SELF: tl.constexpr):
    """Query of a target, the chunks below it, [c_first, c_begin), and above, [c_end, c_last). Targets are blocks, or with SELF
    queries, which meet all of their chunks, as if those were below. No chunks: nothing to do."""
    if SELF:
        q = target.to(tl.int64)
        c_first, c_last, _ = query_chunks(q, lists)
        c_begin = c_last
        c_end = c_last
    else:
        S = plain(lists.documents).to(tl.int64)
        exists = target < (tl.load(lists.counts + S - 1) >> 32)
        c_begin = tl.load(lists.block_chunk + target, mask=exists, other=0)
        c_end = tl.load(lists.block_chunk + target + 1, mask=exists, other=0)
        at = tl.load(lists.chunk_begin + c_begin)
        q, first, n = query_of(at, at < S, lists)
        c_first = tl.where(exists, chunks_before(lists, first), c_begin)
        c_last = tl.where(exists, chunks_before(lists, first + n), c_end)
        c_end = tl.minimum(c_end, c_last)
    return q, c_first, c_begin, c_end, c_last


@triton.jit(do_not_specialize=["grid"])
def collect_kernel(
    state, lists, moments, grid, SELF: tl.constexpr, SETS: tl.constexpr, TWO_LEVELS: tl.constexpr
):  # fmt: skip
    """sides[target][below, above][set]: the moments that a target meets, one set of one side a program. SELF: one side."""
    target = tl.program_id(0)
    k = tl.program_id(1) % SETS
    q, c_first, c_begin, c_end, c_last = target_chunks(lists, target, SELF)
    if (c_first == c_begin) & (c_end == c_last):
        return
    _, cells = load_grid(grid_of(state, q, grid + (2 * k if SELF else 0)))
    used = cells.to(tl.int32) * P
    below = tl.program_id(1) < SETS
    first = tl.where(below, c_first, c_end)
    last = tl.where(below, c_begin, c_last)
    block = target
    if SELF:
        block = tl.load(lists.chunk_block + c_first)
    to = moments.sides + (block.to(tl.int64) * tl.num_programs(1) + tl.program_id(1)) * FIELD
    chunks = moments_of(moments, q, SETS) + k * FIELD
    supers = moments.supers + k * FIELD
    for begin in range(0, used, COLUMNS):
        column = begin + tl.arange(0, COLUMNS)
        total = sum_range(chunks, supers, first, last, SETS * FIELD, column, column < used, TWO_LEVELS)
        tl.store(to + column, total, mask=column < used)


@triton.jit
def act(tables, source, c, cells, offset, KERNEL: tl.constexpr):
    """(TARGET_CELLS, P): the field that source moments make in cells c (consecutive) under a kernel."""
    first = first_entry(offset, KERNEL)
    p = tl.arange(0, P)
    lowest = tl.min(c, 0)
    f = tl.zeros((TARGET_CELLS, P), tl.float32)
    begin = tl.maximum(0, -(lowest + TARGET_CELLS - 1 + first))
    end = tl.minimum(ENTRIES, cells - lowest - first)
    for e in range(begin, end):
        s = c + first + e
        inside = (s >= 0) & (s < cells)
        moments = tl.load(source + s[:, None] * P + p[None, :], mask=inside[:, None], other=0.0)
        matrix = tl.load(tables + KERNEL * MATRICES + e * P * P + p[:, None] * P + p[None, :])
        f += tl.sum(moments[:, :, None] * matrix[None, :, :], 1)
    # Saturated cells: σ is 1 or 0, softplus is its argument or 0.
    s = tl.arange(0, MAX_CELLS)
    weight = tl.load(source + s * P, mask=s < cells, other=0.0)
    if KERNEL == DOWN:
        far = s[None, :] < (c + first)[:, None]
    else:
        far = s[None, :] >= (c + first + ENTRIES)[:, None]
    mass = tl.sum(tl.where(far, weight[None, :], 0.0), 1)
    if KERNEL == LOSS:
        # Σ w (offset + h (s − c) + x_j − x_i), relative to the target cell so that nothing large cancels.
        place = tl.load(source + s * P + 1, mask=s < cells, other=0.0)
        away = offset + CELL * (s[None, :] - c[:, None]).to(tl.float32)
        value = tl.sum(tl.where(far, weight[None, :] * away + place[None, :], 0.0), 1)
        f += tl.where(p[None, :] == 0, value[:, None], tl.where(p[None, :] == 1, -mass[:, None], 0.0))
    else:
        f += tl.where(p[None, :] == 0, mass[:, None], 0.0)
    return f


@triton.jit(do_not_specialize=["grid"])
def apply_labels_kernel(
    state, lists, moments, tables, pulls, losses, grid, offset, SETS: tl.constexpr, BELOW: tl.constexpr, ABOVE: tl.constexpr
):  # fmt: skip
    """Fields of the label pairs, [block][set], one set a program: pulls, Σ_below ω σ(offset − (u − u_j)) − Σ_above
    ω σ(offset − (u_j − u)), or one of its sums, and losses, Σ_below ω softplus(offset − (u − u_j)), whichever are wanted."""
    target = tl.program_id(0)
    k = tl.program_id(1)
    q, c_first, c_begin, c_end, c_last = target_chunks(lists, target, False)
    if (c_first == c_begin) & (c_end == c_last):
        return
    _, cells = load_grid(grid_of(state, q, grid))
    cells = cells.to(tl.int32)
    below = moments.sides + (target.to(tl.int64) * 2 * SETS + k) * FIELD
    for begin in range(0, cells, TARGET_CELLS):
        c = begin + tl.arange(0, TARGET_CELLS)
        to = (target.to(tl.int64) * SETS + k) * FIELD + c[:, None] * P + tl.arange(0, P)[None, :]
        inside = (c < cells)[:, None]
        if pulls is not None:
            f = tl.zeros((TARGET_CELLS, P), tl.float32)
            if BELOW:
                f = act(tables, below, c, cells, offset, UP)
            if ABOVE:
                # Where gains give ω its sign, gain_i counts − gains, both sides add up.
                g = act(tables, below + SETS * FIELD, c, cells, offset, DOWN)
                f = f + g if SETS == 2 else f - g
            tl.store(pulls + to, f, mask=inside)
        if losses is not None:
            tl.store(losses + to, act(tables, below, c, cells, offset, LOSS), mask=inside)
