"""ApproxNDCG: 1 − Σ g_i / log2(1 + r_i) / ideal, with ranks r_i = 1/2 + Σ_j σ((z_j − z_i) / τ) that are smooth in the logits.

With c_i g_i for g_i where documents have weights, `ideal` the ideal list's Σ g · discount, and a_i the loss's slope by r_i,

    ideal · loss    = Σ g_i (discount of i in the ideal list − 1 / log2(1 + r_i))
    ideal · slope_i = Σ_j (a_j − a_i) σ'((z_j − z_i) / τ) / τ,    a_i = g_i log 2 / ((1 + r_i) log(1 + r_i)²)

The first pass sums ranks, the second slopes; it also counts each document's rank in the ideal list, ties by position.

A program owns the rows of its chunk and meets all documents of its query, tile by tile as in kernels/pairs.py: O(n²) pairs,
nothing of that size in memory. Per pair an exponential and a reciprocal in both passes, about 8 and 14 instructions. Per
document 20 bytes written and read. Bound by the pairs from about 32 documents on.
"""

import triton
import triton.language as tl
from pile_fast.kernels.layout import GAIN, OWN, C, Z, field
from pile_fast.kernels.loss import load_c
from pile_fast.kernels.pairs import column, reciprocal

OF_RANKS = OWN  # a_i; NaN = no label
OF_DCG = tl.constexpr(OWN.value + 1)  # g_i / log2(1 + r_i)


@triton.jit
def gain(numbers):
    """2^y − 1 or y."""
    return numbers[1]


@triton.jit
def load_row(k, rows, how: tl.constexpr):
    """The rows' logits, gains and whether they have one, 0 where not."""
    gain = tl.load(field(k, GAIN) + rows, mask=rows < k.end, other=float("nan"))
    used = gain == gain
    z = tl.load(field(k, Z) + rows, mask=used, other=0.0)
    return z, tl.where(used, gain * load_c(k, rows, how), 0.0), used


@triton.jit
def survey(k, lists, rows, numbers, how: tl.constexpr):
    """A document's smooth rank, as the slope by it and the gain at it."""
    TAIL: tl.constexpr = not how.ALONE
    n = k.padded if how.ALONE else k.n
    z, g, used = load_row(k, rows, how)
    scale = 1.0 / numbers[0]
    rank = tl.full((how.BR,), 0.5, tl.float32)
    for begin in range(0, n, how.BC):
        j = begin + tl.arange(0, how.BC)
        z_j = column(j, n, field(k, Z), 0.0, TAIL)
        g_j = column(j, n, field(k, GAIN), float("nan"), TAIL)
        sigma = reciprocal(1.0 + tl.exp(tl.minimum((z[None, :] - z_j) * scale, 80.0)), how.APPROX)
        rank += tl.sum(tl.where(g_j == g_j, sigma, 0.0), 0)
    log = tl.log(1.0 + rank)
    a = g * 0.6931471805599453 / ((1.0 + rank) * log * log)
    tl.store(field(k, OF_RANKS) + rows, tl.where(used, a, float("nan")), mask=rows < k.padded)
    tl.store(field(k, OF_DCG) + rows, g * 0.6931471805599453 / log, mask=rows < k.padded)


@triton.jit
def enter(k, lists, how: tl.constexpr):
    """Rows share nothing."""
    return None


@triton.jit
def rows(k, lists, rows, state, pulls, losses, numbers, how: tl.constexpr):
    """What a document's gain loses to the ideal list, slopes over all pairs, and its part of the ideal list's gain."""
    TAIL: tl.constexpr = not how.ALONE
    n = k.padded if how.ALONE else k.n
    z, g, used = load_row(k, rows, how)
    a = tl.load(field(k, OF_RANKS) + rows, mask=used, other=0.0)
    scale = 1.0 / numbers[0]
    slope = tl.zeros((how.BR,), tl.float32)
    better = slope
    for begin in range(0, n, how.BC):
        j = begin + tl.arange(0, how.BC)
        z_j = column(j, n, field(k, Z), 0.0, TAIL)
        a_j = column(j, n, field(k, OF_RANKS), float("nan"), TAIL)
        g_j = column(j, n, field(k, GAIN), float("nan"), TAIL)
        if how.HAS_C:
            g_j *= column(j, n, field(k, C), 0.0, TAIL)
        first = (g_j > g[None, :]) | ((g_j == g[None, :]) & (j[:, None] < rows[None, :]))
        better += tl.sum(tl.where(first, 1.0, 0.0), 0)
        t = tl.exp(tl.abs(z[None, :] - z_j) * -scale)
        q = reciprocal(1.0 + t, how.APPROX)
        slope += tl.sum(tl.where(a_j == a_j, t * q * q * (a_j - a[None, :]), 0.0), 0)
    dcg = tl.load(field(k, OF_DCG) + rows, mask=used, other=0.0)
    ideal = tl.where(used, g / tl.log2(2.0 + better), 0.0)
    return ideal - dcg, tl.where(used, slope * scale, 0.0), ideal
