"""Direct pair sums: what every document of a block of rows hears from all documents of its query.

A tile is BC columns by BR rows; the rows run along the threads, a few per thread and all columns in each, so that a thread
keeps its rows' numbers and sums in registers, columns are broadcast (one load serves a thread's rows), and no sum crosses
threads. Each row visits the whole query (the full square): an unordered pair is evaluated twice, but no program ever adds
into another one's sums, which keeps the result bitwise reproducible without atomics and lets the rows of a long query run
anywhere.

λ needs no case distinction per pair. With d = u_i − u_j and σ(−x) = 1 − σ(x),

    λ_i = Σ_{y_j ≠ y_i} ω_ij r_ij − Σ_{y_j > y_i} ω_ij,    r_ij = 1 / (1 + e^{d ∓ offset})    (− for j below i, + for j above)

the second sum a constant of the query. e^d = E_i F_j, F_j = e^{c − u_j} stored per document, and two pairs share one
reciprocal, 1/a + 1/b = (a + b) / (a b). Per pair: 5 multiply-adds, compares and selects, half a reciprocal. Where a query's
logits span more than NARROW (wide), an exponential and a reciprocal per pair.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl
from pile_fast.kernels.layout import GAIN, elements, field

# E F products of two pairs are multiplied: e^40 · e^40 is still a float32.
NARROW = tl.constexpr(40.0)


class Columns(NamedTuple):
    """The documents that rows meet: pointers to their ranks and gains, and how many they are."""

    ranks: Any
    gains: Any
    n: Any


@triton.jit
def columns_of(k, near, RANKS: tl.constexpr):
    """The columns that a chunk meets directly, by the ranks RANK or SCORED_RANK."""
    return Columns(field(k, RANKS) + near.begin, field(k, GAIN) + near.begin, near.end - near.begin)


@triton.jit
def load_order(k, rows, RANKS: tl.constexpr, how: tl.constexpr):
    """The rows' ranks and gains; gains are the ranks again, and unused, where no pair is weighted."""
    rank = tl.load(field(k, RANKS) + rows, mask=rows < k.end, other=float("nan"))
    gain = rank
    if how.WEIGHTED:
        gain = tl.load(field(k, GAIN) + rows, mask=rows < k.end, other=0.0)
    return rank, gain


@triton.jit
def reciprocal(x, APPROX: tl.constexpr):
    """1 / x for x >= 1; APPROX: one instruction, to 1 ulp, where the division of two floats takes eight."""
    if APPROX:
        y = tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
    else:
        y = 1.0 / x
    return y


@triton.jit
def column(j, n, pointer, other, TAIL: tl.constexpr):
    """(BC, 1) values of the documents j; with TAIL the last tile may reach past the end, n, and finds `other` there."""
    if TAIL:
        value = tl.load(pointer + j, mask=j < n, other=other)
    else:
        value = tl.load(pointer + j)
    return value[:, None]


@triton.jit
def label_pull(columns, u, u_row, rank_row, gain_row, wide, offset, MARGIN: tl.constexpr, how: tl.constexpr):
    """Σ_{y_j ≠ y_i} ω_ij r_ij for the rows. `u` holds F_j, or u_j where `wide`; a NaN rank takes part in no pair."""
    BR: tl.constexpr = how.BR
    BC: tl.constexpr = how.BC
    TAIL: tl.constexpr = not how.ALONE
    n = columns.n
    total = tl.zeros((BR,), tl.float32)
    rank_row = rank_row[None, :]
    gain_row = gain_row[None, :]
    if wide:
        for begin in range(0, n, BC):
            j = begin + tl.arange(0, BC)
            rank = column(j, n, columns.ranks, float("nan"), TAIL)
            x = u_row[None, :] - column(j, n, u, 0.0, TAIL)
            if MARGIN:
                x += tl.where(rank_row > rank, -offset, offset)
            value = reciprocal(1.0 + tl.exp(tl.minimum(x, 80.0)), how.APPROX)
            if how.WEIGHTED:
                value *= tl.abs(gain_row - column(j, n, columns.gains, 0.0, TAIL))
            total += tl.sum(tl.where((rank_row > rank) | (rank_row < rank), value, 0.0), 0)
    else:
        e = (1.0 / u_row)[None, :]
        e_below = e * tl.exp(-offset)
        e_above = e * tl.exp(offset)
        whole = n
        if TAIL:  # a tile with bounds of its own: in the others they would cost a third of the instructions
            whole = n // (2 * BC) * (2 * BC)
        for begin in range(0, whole, 2 * BC):
            total += pull_of_tile(columns, u, rank_row, gain_row, begin, e, e_below, e_above, MARGIN, False, how)
        if TAIL:
            if whole < n:
                total += pull_of_tile(columns, u, rank_row, gain_row, whole, e, e_below, e_above, MARGIN, True, how)
    return total


@triton.jit
def pull_of_tile(
    columns, u, rank_row, gain_row, begin, e, e_below, e_above, MARGIN: tl.constexpr, TAIL: tl.constexpr, how: tl.constexpr
):  # fmt: skip
    """What the rows hear from 2 BC columns; two of them share a reciprocal."""
    nan = float("nan")
    n = columns.n
    j = begin + tl.arange(0, how.BC)
    k = j + how.BC
    rank_j = column(j, n, columns.ranks, nan, TAIL)
    rank_k = column(k, n, columns.ranks, nan, TAIL)
    if MARGIN:
        a = 1.0 + tl.where(rank_row > rank_j, e_below, e_above) * column(j, n, u, 1.0, TAIL)
        b = 1.0 + tl.where(rank_row > rank_k, e_below, e_above) * column(k, n, u, 1.0, TAIL)
    else:
        a = 1.0 + e * column(j, n, u, 1.0, TAIL)
        b = 1.0 + e * column(k, n, u, 1.0, TAIL)
    if how.WEIGHTED:
        for_j = b * tl.abs(gain_row - column(j, n, columns.gains, 0.0, TAIL))
        for_k = a * tl.abs(gain_row - column(k, n, columns.gains, 0.0, TAIL))
    else:
        for_j = b
        for_k = a
    for_j = tl.where((rank_row > rank_j) | (rank_row < rank_j), for_j, 0.0)
    for_k = tl.where((rank_row > rank_k) | (rank_row < rank_k), for_k, 0.0)
    return tl.sum((for_j + for_k) * reciprocal(a * b, how.APPROX), 0)


@triton.jit
def load_labels(labels, mask, k, rows):
    """Labels as float32, or float64 where float32 does not hold them all; NaN where there is no document or no finite label."""
    kind: tl.constexpr = labels.pointer.dtype.element_ty
    wide: tl.constexpr = kind == tl.float64 or kind == tl.int64 or kind == tl.int32
    dtype: tl.constexpr = tl.float64 if wide else tl.float32
    inside = load_valid(mask, k, rows)
    label = tl.load(elements(labels, k, rows), mask=inside, other=0).to(dtype)
    return tl.where(inside & (tl.abs(label) < float("inf")), label, float("nan"))


@triton.jit
def load_valid(mask, k, rows):
    """Whether a document lies at the query's slots `rows`."""
    inside = rows < k.n
    if mask.pointer is not None:
        inside = inside & (tl.load(elements(mask, k, rows), mask=inside, other=0) != 0)
    return inside


@triton.jit
def pair_counts(columns, rank_row, gain_row, how: tl.constexpr):
    """Σ ω over the documents above, and below, each row."""
    BR: tl.constexpr = how.BR
    TAIL: tl.constexpr = not how.ALONE
    above = tl.zeros((BR,), tl.float32)
    below = tl.zeros((BR,), tl.float32)
    for begin in range(0, columns.n, how.BC):
        j = begin + tl.arange(0, how.BC)
        rank = column(j, columns.n, columns.ranks, float("nan"), TAIL)
        if how.WEIGHTED:
            weight = tl.abs(gain_row[None, :] - column(j, columns.n, columns.gains, 0.0, TAIL))
        else:
            weight = 1.0
        above += tl.sum(tl.where(rank > rank_row[None, :], weight, 0.0), 0)
        below += tl.sum(tl.where(rank < rank_row[None, :], weight, 0.0), 0)
    return above, below


@triton.jit
def label_losses(columns, u, u_row, rank_row, gain_row, offset, counts, c_row, how: tl.constexpr):
    """Σ_below ω softplus(offset − (u_i − u_j)), and Σ_below ω p − Σ_above ω p, the direction that lowers it. A pair counts what
    its higher document does: `counts` points to what the columns count, `c_row` has the rows'; None = 1.

    Relative accuracy of every pair, however well ordered: with t = e^{−|x|}, p is t / (1 + t) or 1 / (1 + t).
    """
    BR: tl.constexpr = how.BR
    TAIL: tl.constexpr = not how.ALONE
    n = columns.n
    loss = tl.zeros((BR,), tl.float32)
    slope = tl.zeros((BR,), tl.float32)
    for begin in range(0, n, how.BC):
        j = begin + tl.arange(0, how.BC)
        rank = column(j, n, columns.ranks, float("nan"), TAIL)
        below = rank < rank_row[None, :]
        above = rank > rank_row[None, :]
        d = u_row[None, :] - column(j, n, u, 0.0, TAIL)
        x = tl.where(below, d, -d) - offset  # how far the pair is ordered right
        t = tl.exp(-tl.abs(x))
        q = reciprocal(1.0 + t, how.APPROX)
        p = tl.where(x > 0.0, t * q, q)
        value = tl.maximum(-x, 0.0) + tl.log(1.0 + t)
        if how.WEIGHTED:
            weight = tl.abs(gain_row[None, :] - column(j, n, columns.gains, 0.0, TAIL))
            p *= weight
            value *= weight
        if counts is not None:
            p *= tl.where(below, c_row[None, :], column(j, n, counts, 0.0, TAIL))
            value *= c_row[None, :]
        loss += tl.sum(tl.where(below, value, 0.0), 0)
        slope += tl.sum(tl.where(below, p, 0.0) - tl.where(above, p, 0.0), 0)
    return loss, slope
