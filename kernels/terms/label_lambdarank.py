"""LambdaRank: Σ (g_i − g_j) |d_i − d_j| c_i softplus(−(z_i − z_j)) over the pairs of labelled documents, g_i > g_j, divided by
the ideal list's Σ g · discount.

The first pass finds each document's rank by counting: a documents above it, m with its own logit, itself included. Over all
orders of those m, which share the ranks a + 1 to a + m, with D their discounts in turn, D_0 to D_{m−1},

    d_i            = Σ D_p / m
    |d_i − d_j|    = Σ D_p (m − 1 − 2 p) / (m (m − 1) / 2)    inside such a block, the mean over its pairs of ranks

sums over all ranks from the lowest a to the highest a + m of the rows at hand, and only where some m > 1. The second pass sums
over pairs, and counts each document's rank in the ideal list, ties by position.

A program owns the rows of its chunk and meets all documents of its query, tile by tile as in kernels/pairs.py: O(n²) pairs,
nothing of that size in memory. Per pair two compares and adds in the first pass (ties: as many for every rank of the range), in
the second an exponential, a logarithm and a reciprocal, about 25 instructions. Per document 20 bytes written and read. Bound by
the pairs from about 32 documents on.
"""

import triton
import triton.language as tl
from pile_fast.kernels.layout import GAIN, LABEL_HIGH, LABEL_LOW, OWN, C, Z, field, load_double, scalar
from pile_fast.kernels.loss import gains_of_labels, load_c
from pile_fast.kernels.pairs import column, reciprocal

OF_RANKS = OWN  # d_i
OF_TIES = tl.constexpr(OWN.value + 1)  # |d_i − d_j| to the documents of the same logit


@triton.jit
def gain(numbers):
    """2^y − 1 or y, and for the reciprocal rank 1 where y > 0."""
    return tl.where(numbers[1] == 1.0, 2.0, numbers[2])


@triton.jit
def discount(rank, numbers):
    """At ranks from 1 on."""
    last = tl.where(numbers[0] == 0.0, float("inf"), numbers[0])
    return tl.where(rank <= last, 1.0 / tl.where(numbers[1] == 1.0, rank, tl.log2(1.0 + rank)), 0.0)


@triton.jit
def survey(k, lists, rows, numbers, how: tl.constexpr):
    """The discounts at a document's ranks."""
    BR: tl.constexpr = how.BR
    TAIL: tl.constexpr = not how.ALONE
    n = k.padded if how.ALONE else k.n
    gain = tl.load(field(k, GAIN) + rows, mask=rows < k.end, other=float("nan"))
    z = tl.load(field(k, Z) + rows, mask=rows < k.end, other=0.0)
    used = gain == gain
    above = tl.zeros((BR,), tl.float32)
    level = above
    for begin in range(0, n, how.BC):
        j = begin + tl.arange(0, how.BC)
        z_j = column(j, n, field(k, Z), 0.0, TAIL)
        g_j = column(j, n, field(k, GAIN), float("nan"), TAIL)
        there = g_j == g_j
        above += tl.sum(tl.where(there & (z_j > z[None, :]), 1.0, 0.0), 0)
        level += tl.sum(tl.where(there & (z_j == z[None, :]), 1.0, 0.0), 0)
    level = tl.maximum(level, 1.0)
    own = discount(above + 1.0, numbers)
    within = own * 0.0
    if tl.max(tl.where(used, level, 1.0), 0) > 1.0:
        first = tl.min(tl.where(used, above, n), 0).to(tl.int32)
        last = tl.max(tl.where(used, above + level, 0.0), 0).to(tl.int32)
        total = tl.zeros((BR,), tl.float64)
        apart = total
        for begin in range(first, last, how.BC):
            at = (begin + tl.arange(0, how.BC)).to(tl.float32)[:, None]
            d = discount(at + 1.0, numbers)
            p = at - above[None, :]
            inside = (p >= 0.0) & (p < level[None, :])
            total += tl.sum(tl.where(inside, d, 0.0), 0).to(tl.float64)
            apart += tl.sum(tl.where(inside, d * (level[None, :] - 1.0 - 2.0 * p), 0.0), 0).to(tl.float64)
        tied = level > 1.0
        own = tl.where(tied, (total / level).to(tl.float32), own)
        within = tl.where(tied, (apart / (level * tl.maximum(level - 1.0, 1.0) / 2.0)).to(tl.float32), 0.0)
    tl.store(field(k, OF_RANKS) + rows, own, mask=rows < k.end)
    tl.store(field(k, OF_TIES) + rows, within, mask=rows < k.end)


@triton.jit
def enter(k, lists, how: tl.constexpr):
    """The extremes of the labels."""
    return load_double(scalar(k, LABEL_LOW), True), load_double(scalar(k, LABEL_HIGH), True)


@triton.jit
def rows(k, lists, rows, state, pulls, losses, numbers, how: tl.constexpr):
    """Losses of the pairs in which a document has the higher gain, slopes over all, and its part of the ideal list's gain."""
    BR: tl.constexpr = how.BR
    TAIL: tl.constexpr = not how.ALONE
    n = k.padded if how.ALONE else k.n
    nan = float("nan")
    inside = rows < k.end
    gain_row = tl.load(field(k, GAIN) + rows, mask=inside, other=nan)
    z = tl.load(field(k, Z) + rows, mask=inside, other=0.0)
    own = tl.load(field(k, OF_RANKS) + rows, mask=inside, other=0.0)
    within = tl.load(field(k, OF_TIES) + rows, mask=inside, other=0.0)
    c = load_c(k, rows, how)
    loss = tl.zeros((BR,), tl.float32)
    slope = loss
    better = loss
    for begin in range(0, n, how.BC):
        j = begin + tl.arange(0, how.BC)
        g_j = column(j, n, field(k, GAIN), nan, TAIL)
        z_j = column(j, n, field(k, Z), 0.0, TAIL)
        d_j = column(j, n, field(k, OF_RANKS), 0.0, TAIL)
        gap = gain_row[None, :] - g_j
        below = gap > 0.0
        above = gap < 0.0
        better += tl.sum(tl.where(above | ((gap == 0.0) & (j[:, None] < rows[None, :])), 1.0, 0.0), 0)
        d = z[None, :] - z_j
        omega = tl.abs(gap) * tl.where(d == 0.0, within[None, :], tl.abs(own[None, :] - d_j))
        if how.HAS_C:
            omega *= tl.where(below, c[None, :], column(j, n, field(k, C), 0.0, TAIL))
        x = tl.where(below, d, -d)  # how far the pair is ordered right
        t = tl.exp(-tl.abs(x))
        q = reciprocal(1.0 + t, how.APPROX)
        p = omega * tl.where(x > 0.0, t * q, q)
        loss += tl.sum(tl.where(below, omega * (tl.maximum(-x, 0.0) + tl.log(1.0 + t)), 0.0), 0)
        slope += tl.sum(tl.where(below, p, 0.0) - tl.where(above, p, 0.0), 0)
    kind = gain(numbers)
    low = state[0]
    high = state[1]
    counts = (low < 0.0) | (gains_of_labels(low, low, high, kind) < gains_of_labels(high, low, high, kind))
    ideal = tl.where(gain_row == gain_row, gain_row * discount(better + 1.0, numbers), 0.0)
    return loss, -slope, tl.where(counts, ideal, 0.0)
