"""Huber's loss of the differences of pairs, (z_i − z_j) − (s_i − s_j), tile by tile."""

import triton
import triton.language as tl
from pile_fast.kernels.layout import S_SCALED, Z_SCALED, C, field
from pile_fast.kernels.loss import half_of_others, load_c, load_scaled
from pile_fast.kernels.pairs import column


@triton.jit
def enter(k, lists, how: tl.constexpr):
    """Rows share nothing."""
    return None


@triton.jit
def rows(k, lists, rows, state, pulls, losses, numbers, how: tl.constexpr):
    """Half the losses of a document's pairs, their slopes, and half of the pairs."""
    BR: tl.constexpr = how.BR
    TAIL: tl.constexpr = not how.ALONE
    z, s = load_scaled(k, rows)
    delta = numbers[0]
    loss = tl.zeros((BR,), tl.float32)
    slope = loss
    n = k.padded if how.ALONE else k.n
    for begin in range(0, n, how.BC):
        j = begin + tl.arange(0, how.BC)
        z_j = column(j, n, field(k, Z_SCALED), 0.0, TAIL)
        s_j = column(j, n, field(k, S_SCALED), float("nan"), TAIL)
        d = (z[None, :] - z_j) - (s[None, :] - s_j)
        size = tl.abs(d)
        used = d == d
        value = tl.where(size <= delta, d * d / 4, delta * (size - delta / 2) / 2)
        force = tl.minimum(tl.maximum(d, -delta), delta)
        if how.HAS_C:
            c = column(j, n, field(k, C), 0.0, TAIL)
            value *= c
            force *= c
        loss += tl.sum(tl.where(used, value, 0.0), 0)
        slope += tl.sum(tl.where(used, force, 0.0), 0)
    c_row = load_c(k, rows, how)
    return c_row * loss, c_row * slope, half_of_others(k, s)
