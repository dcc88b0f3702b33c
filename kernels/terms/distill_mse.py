"""Mean squared differences, in linear time: Σ_{i<j} (d_i − d_j)² = n Σ (d_i − mean)², d = z − s."""

import triton
import triton.language as tl
from pile_fast.kernels.layout import DISTILL, TARGETS, scalar
from pile_fast.kernels.loss import half_of_others, list_sum, load_scaled


@triton.jit
def sums(k, z, s, numbers):
    """Σ d; there is no second sum."""
    d = tl.where(s == s, z - s, 0.0)
    return d, d * 0.0


@triton.jit
def enter(k, lists, how: tl.constexpr):
    """The number of documents with a target, and the mean of d."""
    count = tl.load(scalar(k, TARGETS))
    return count, list_sum(k, lists, 2 * DISTILL, how) / tl.maximum(count, 1.0)


@triton.jit
def rows(k, lists, rows, state, pulls, losses, numbers, how: tl.constexpr):
    """n d², its slope, and half of the document's pairs."""
    z, s = load_scaled(k, rows)
    d = tl.where(s == s, z - s - state[1], 0.0)
    return state[0] * d * d, 2.0 * state[0] * d, half_of_others(k, s)
