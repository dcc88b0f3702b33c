"""Divergence of the student's distribution over the list from the target's, in linear time.

With z and s from their highest, in units of τ, A = Σ c_i e^{s_i} and B = Σ c_i e^{z_i}, a document holds p_i = c_i e^{s_i} / A
of the target's distribution and q_i = c_i e^{z_i} / B of the student's, and with v_i = log(q_i / p_i) = z_i − s_i + log(A / B)

    KL      = Σ p_i (−v_i) = Σ p_i (e^{v_i} − 1 − v_i),    as Σ (q_i − p_i) = 0
    slope_i = q_i − p_i    = p_i (e^{v_i} − 1)

No term is negative and none cancels: where student and target nearly agree, as they do at high temperatures, both are taken
from series in v, and A / B from Σ c_i (e^{s_i} − e^{z_i}).

A program owns the rows of its chunk. Per document two passes of about 40 instructions and four exponentials, 8 bytes read in
each; three sums per list. Bound by the launch, and in long lists by bytes.
"""

import triton
import triton.language as tl
from pile_fast.kernels.layout import DISTILL, TARGETS, scalar
from pile_fast.kernels.loss import list_sum, load_c, load_scaled

FROM_TOP = True
SMALLEST = tl.constexpr(2.0**-54)  # nearer to each other, p and q are equal in float64 too


@triton.jit
def less_two_terms(v):
    """e^v − 1 − v for |v| <= 1: its series, to 1e-8 of it."""
    tail = 1.0 + v / 10.0 * (1.0 + v / 11.0)
    tail = 1.0 + v / 7.0 * (1.0 + v / 8.0 * (1.0 + v / 9.0 * tail))
    return v * v / 2.0 * (1.0 + v / 3.0 * (1.0 + v / 4.0 * (1.0 + v / 5.0 * (1.0 + v / 6.0 * tail))))


@triton.jit
def log_of_one_plus(x):
    """log(1 + x) for |x| <= 1/4: the series of 2 artanh(x / (2 + x)), to 1e-8 of it."""
    w = x / (2.0 + x)
    w2 = w * w
    return 2.0 * w * (1.0 + w2 * (1.0 / 3.0 + w2 * (1.0 / 5.0 + w2 * (1.0 / 7.0))))


@triton.jit
def sums(k, z, s, c, gain, numbers):
    """A, B and A − B."""
    used = s == s
    z = tl.where(used, z, 0.0)
    s = tl.where(used, s, 0.0)
    c = tl.where(used, c, 0.0)
    d = s - z
    near = tl.abs(d) < 1.0
    of_s = c * tl.exp(s)
    of_z = c * tl.exp(z)
    v = tl.where(near, d, 0.0)
    return of_s, of_z, tl.where(near, of_z * (v + less_two_terms(v)), of_s - of_z)


@triton.jit
def enter(k, lists, how: tl.constexpr):
    """A / B, its logarithm, and the number of documents: one alone has nothing to be told apart from."""
    a = list_sum(k, lists, 3 * DISTILL, how)
    b = list_sum(k, lists, 3 * DISTILL + 1, how)
    there = tl.load(scalar(k, TARGETS)) > 1.0
    a = tl.where(there, a, 1.0)
    b = tl.where(there, b, 1.0)
    x = -list_sum(k, lists, 3 * DISTILL + 2, how) / a  # B / A − 1
    near = there & (tl.abs(x) < 0.25)
    ratio = tl.where(near, -log_of_one_plus(tl.where(near, x, 0.0)), tl.log(a) - tl.log(b))
    return a / b, ratio, tl.load(scalar(k, TARGETS))


@triton.jit
def rows(k, lists, rows, state, pulls, losses, numbers, how: tl.constexpr):
    """τ² A p_i (e^{v_i} − 1 − v_i), its slope, and A p_i."""
    z, s = load_scaled(k, rows)
    used = (s == s) & (state[2] + tl.zeros((how.BR,), tl.float32) > 1.0)
    c = load_c(k, rows, how)
    p = tl.where(used, c * tl.exp(tl.where(used, s, 0.0)), 0.0)
    q = tl.where(used, c * tl.exp(tl.where(used, z, 0.0)) * state[0], 0.0)
    v = tl.where(used, z - s + state[1], 0.0)
    near = tl.abs(v) < 1.0
    small = tl.where(near & (tl.abs(v) > SMALLEST), v, 0.0)
    beyond = less_two_terms(small)
    gap = tl.where(near, p * (small + beyond), q - p)
    loss = tl.where(near, p * beyond, gap - p * v)
    scale = numbers[0] * numbers[0]
    return scale * loss, scale * gap, p
