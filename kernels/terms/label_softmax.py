"""Cross entropy of the student's distribution over the labelled documents and their shares of the gain, in linear time.

With z from the highest, in units of τ, B = Σ e^{z_j}, gains g and W = Σ c_i g_i, all over the labelled documents of a list,

    Σ g · loss  = Σ c_i g_i (log B − z_i)              no term is negative
    Σ g · slope = (W e^{z_i} / B − c_i g_i) / τ

A program owns the rows of its chunk. Per document two passes of about 10 instructions and an exponential, 16 bytes read in the
first (and an exponential in float64, for the gain), 12 in the second; two sums per list. Bound by the launch, and in long lists
by bytes.
"""

import triton
import triton.language as tl
from pile_fast.kernels.layout import GAIN, LABEL, TOP, Z, field, scalar
from pile_fast.kernels.loss import list_sum, load_c


@triton.jit
def gain(numbers):
    """2^y − 1 or y."""
    return numbers[1]


@triton.jit
def scaled(k, z, used, numbers):
    """z / τ from the highest labelled logit."""
    return tl.where(used, (z - tl.load(scalar(k, TOP))) / numbers[0], 0.0)


@triton.jit
def sums(k, z, rank, c, gain, numbers):
    """B and W; there is no third sum."""
    used = gain == gain
    return tl.where(used, tl.exp(scaled(k, z, used, numbers)), 0.0), tl.where(used, c * gain, 0.0), gain * 0.0


@triton.jit
def enter(k, lists, how: tl.constexpr):
    """W / B, and log B; 0 without labels."""
    b = list_sum(k, lists, 3 * LABEL, how)
    b = tl.where(b > 0.0, b, 1.0)
    return list_sum(k, lists, 3 * LABEL + 1, how) / b, tl.log(b)


@triton.jit
def rows(k, lists, rows, state, pulls, losses, numbers, how: tl.constexpr):
    """c g (log B − z), its slope, and the gain."""
    gain = tl.load(field(k, GAIN) + rows, mask=rows < k.end, other=float("nan"))
    used = gain == gain
    z = scaled(k, tl.load(field(k, Z) + rows, mask=used, other=0.0), used, numbers)
    gain = tl.where(used, gain, 0.0)
    share = load_c(k, rows, how) * gain
    slope = tl.where(used, state[0] * tl.exp(z), 0.0) - share
    return share * (state[1] - z), slope / numbers[0], gain
