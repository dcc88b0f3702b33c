"""Mean squared differences, in linear time: Σ_{i<j} (d_i − d_j)² = n Σ (d_i − mean)², d = z − s.

With documents' weights, Σ_{i<j} c_i c_j (d_i − d_j)² = Σ c · Σ c_i (d_i − mean)², the mean weighted.
"""

import triton
import triton.language as tl
from pile_fast.kernels.layout import DISTILL, TARGETS, scalar
from pile_fast.kernels.loss import half_of_others, list_sum, load_c, load_scaled


@triton.jit
def sums(k, z, s, c, gain, numbers):
    """Σ c d and Σ c; there is no third sum."""
    d = tl.where(s == s, c * (z - s), 0.0)
    return d, tl.where(s == s, c, 0.0), d * 0.0


@triton.jit
def enter(k, lists, how: tl.constexpr):
    """What the documents with a target count, and the mean of d."""
    count = tl.load(scalar(k, TARGETS))
    if how.HAS_C:
        count = list_sum(k, lists, 3 * DISTILL + 1, how)
    return count, list_sum(k, lists, 3 * DISTILL, how) / tl.where(count > 0.0, count, 1.0)


@triton.jit
def rows(k, lists, rows, state, pulls, losses, numbers, how: tl.constexpr):
    """n c d², its slope, and half of the document's pairs."""
    z, s = load_scaled(k, rows)
    d = tl.where(s == s, z - s - state[1], 0.0)
    n_c = state[0] * load_c(k, rows, how)
    return n_c * d * d, 2.0 * n_c * d, half_of_others(k, s)
