"""The student's loss and its gradient, phase by phase: load, sum over the query, pairs, total, gradient.

Per query alpha · D + (1 − alpha) · R, see kernels/pairs.py for the pair sums. D needs a reciprocal per pair and two
exponentials per column of a tile; R an exponential, a reciprocal and a logarithm. D with "mse" is O(n).
"""

import triton
import triton.language as tl
from pile_fast.kernels.chunks import GAIN, RANK
from pile_fast.kernels.ensemble import load_order, sum_field
from pile_fast.kernels.pairs import NARROW, distillation_losses, label_losses, load_valid, pair_counts

# Fields of the scratch buffer; they take the place of the ensemble's, which is done with.
BELOW = tl.constexpr(1)  # Σ_{y_j < y_i} ω
Z = tl.constexpr(3)
Z_SCALED = tl.constexpr(4)  # z / τ and s / τ, from the query's lowest: divided is only what has been subtracted
S_SCALED = tl.constexpr(5)  # NaN where the document has no target
D_SLOPE = tl.constexpr(6)
R_SLOPE = tl.constexpr(7)
D_LOSS = tl.constexpr(8)
R_LOSS = tl.constexpr(9)

# Scalars of a query.
LOSS_WIDE = tl.constexpr(3)
Z_MIDDLE = tl.constexpr(4)
S_MIDDLE = tl.constexpr(5)
TARGETS = tl.constexpr(6)
POISON = tl.constexpr(7)
D_FACTOR = tl.constexpr(8)
R_FACTOR = tl.constexpr(9)
MEAN_DIFFERENCE = tl.constexpr(10)
Z_PIVOT = tl.constexpr(18)  # the query's lowest logit, and its lowest target
S_PIVOT = tl.constexpr(19)


@triton.jit
def load_logits(student, student_stride, target, target_stride, slots, valid, other, USE_D: tl.constexpr):
    """Student logits at `slots`, `other` where there is no document, and targets, NaN = none, as infinite ones are."""
    z = tl.load(student + slots.to(tl.int64) * student_stride, mask=valid, other=other).to(tl.float32)
    s = z
    if USE_D:
        s = tl.load(target + slots.to(tl.int64) * target_stride, mask=valid, other=float("nan")).to(tl.float32)
        s = tl.where(tl.abs(s) < float("inf"), s, float("nan"))
    return z, s


@triton.jit
def find_pivots(
    student, student_stride, target, target_stride, mask, mask_stride, n, scalars,
    BR: tl.constexpr, MASKED: tl.constexpr, OWN_TARGET: tl.constexpr,
):  # fmt: skip
    """The query's lowest logit and its lowest target; not OWN_TARGET: an ensemble's, which has no offset left."""
    inf = float("inf")
    z_low = tl.full((BR,), inf, tl.float32)
    s_low = tl.full((BR,), inf if OWN_TARGET else 0.0, tl.float32)
    for begin in range(0, n, BR):
        rows = begin + tl.arange(0, BR)
        valid = load_valid(mask, rows, mask_stride, n, MASKED)
        z, s = load_logits(student, student_stride, target, target_stride, rows, valid, inf, OWN_TARGET)
        z_low = tl.minimum(z_low, tl.where(tl.abs(z) < inf, z, inf))
        if OWN_TARGET:
            s_low = tl.minimum(s_low, tl.where(s == s, s, inf))
    store_pivots(tl.min(z_low, 0), tl.min(s_low, 0), scalars)


@triton.jit
def store_pivots(z_low, s_low, scalars):
    tl.store(scalars + Z_PIVOT, tl.where(z_low < float("inf"), z_low, 0.0))
    tl.store(scalars + S_PIVOT, tl.where(s_low < float("inf"), s_low, 0.0))


@triton.jit
def scale_rows(z, s, rows, inside, fields, S, scalars, inv_tau):
    """z / τ and s / τ to the fields' `rows`, from the query's pivots."""
    z = (z - tl.load(scalars + Z_PIVOT)) * inv_tau
    s = (s - tl.load(scalars + S_PIVOT)) * inv_tau
    tl.store(fields + Z_SCALED * S + rows, z, mask=inside)
    tl.store(fields + S_SCALED * S + rows, s, mask=inside)
    return z, s


@triton.jit
def sum_query(n, fields, S, scalars, BR: tl.constexpr, USE_D: tl.constexpr):
    """Whether all student logits are finite; how many documents have a target, and the logits' ranges over them."""
    inf = float("inf")
    broken = tl.zeros((BR,), tl.int32)
    count = tl.zeros((BR,), tl.float32)
    z_low = tl.full((BR,), inf, tl.float32)
    s_low = z_low
    z_high = -z_low
    s_high = z_high
    difference = tl.zeros((BR,), tl.float64)
    for begin in range(0, n, BR):
        i = begin + tl.arange(0, BR)
        z = tl.load(fields + Z * S + i, mask=i < n, other=0.0)
        broken += tl.where(tl.abs(z) < inf, 0, 1)
        if USE_D:
            z = tl.load(fields + Z_SCALED * S + i, mask=i < n, other=0.0)
            s = tl.load(fields + S_SCALED * S + i, mask=i < n, other=float("nan"))
            used = s == s
            count += tl.where(used, 1.0, 0.0)
            difference += tl.where(used, z - s, 0.0).to(tl.float64)
            # Of all rows, used or not: their exponentials are taken.
            z_low = tl.minimum(z_low, tl.where(i < n, z, inf))
            z_high = tl.maximum(z_high, tl.where(i < n, z, -inf))
            s_low = tl.minimum(s_low, tl.where(used, s, inf))
            s_high = tl.maximum(s_high, tl.where(used, s, -inf))
    tl.store(scalars + POISON, tl.where(tl.sum(broken, 0) > 0, float("nan"), 0.0))
    if USE_D:
        count = tl.sum(count, 0)
        z_bottom = tl.min(z_low, 0)
        s_bottom = tl.min(s_low, 0)
        z_top = tl.max(z_high, 0)
        s_top = tl.max(s_high, 0)
        narrow = (z_top - z_bottom <= NARROW) & (s_top - s_bottom <= NARROW)
        tl.store(scalars + LOSS_WIDE, tl.where(narrow, 0.0, 1.0))
        tl.store(scalars + Z_MIDDLE, (z_bottom + z_top) / 2.0)
        tl.store(scalars + S_MIDDLE, (s_bottom + s_top) / 2.0)
        tl.store(scalars + TARGETS, count)
        mean = tl.sum(difference, 0).to(tl.float32) / tl.maximum(count, 1.0)
        tl.store(scalars + MEAN_DIFFERENCE, mean)


@triton.jit
def pair_rows(
    rows, n, padded, fields, S, scalars,
    BR: tl.constexpr, BC: tl.constexpr, USE_D: tl.constexpr, MSE: tl.constexpr, USE_R: tl.constexpr,
    WEIGHTED: tl.constexpr, APPROX: tl.constexpr,
):  # fmt: skip
    inside = rows < n
    if USE_D:
        z = tl.load(fields + Z_SCALED * S + rows, mask=inside, other=0.0)
        s = tl.load(fields + S_SCALED * S + rows, mask=inside, other=float("nan"))
        if MSE:
            # Σ_{i<j} (d_i − d_j)² = n Σ (d_i − mean)²
            d = tl.where(s == s, z - s - tl.load(scalars + MEAN_DIFFERENCE), 0.0)
            count = tl.load(scalars + TARGETS)
            loss = count * d * d
            slope = 2.0 * count * d
        else:
            loss, slope = distillation_losses(
                fields + Z_SCALED * S, z, fields + S_SCALED * S, s, rows, padded, tl.load(scalars + LOSS_WIDE) != 0.0,
                tl.load(scalars + Z_MIDDLE), tl.load(scalars + S_MIDDLE), BR, BC, APPROX, False,
            )  # fmt: skip
        tl.store(fields + D_LOSS * S + rows, loss, mask=inside)
        tl.store(fields + D_SLOPE * S + rows, slope, mask=inside)
    if USE_R:
        ranks = fields + RANK * S
        gains = fields + GAIN * S
        rank, gain = load_order(rows, n, ranks, gains, WEIGHTED)
        z = tl.load(fields + Z * S + rows, mask=inside, other=0.0)
        loss, slope = label_losses(fields + Z * S, z, ranks, rank, gains, gain, padded, 0.0, BR, BC, WEIGHTED, APPROX, False)
        _, below = pair_counts(ranks, rank, gains, gain, padded, BR, BC, WEIGHTED, False)
        tl.store(fields + R_LOSS * S + rows, loss, mask=inside)
        tl.store(fields + R_SLOPE * S + rows, -slope, mask=inside)
        tl.store(fields + BELOW * S + rows, below, mask=inside)


@triton.jit
def total_query(
    n, fields, S, scalars, alpha, inv_tau, loss, has_pairs,
    BR: tl.constexpr, USE_D: tl.constexpr, USE_R: tl.constexpr,
):  # fmt: skip
    d_loss = sum_field(fields, D_LOSS, S, n, BR) if USE_D else 0.0
    r_loss = sum_field(fields, R_LOSS, S, n, BR) if USE_R else 0.0
    r_weight = sum_field(fields, BELOW, S, n, BR) if USE_R else 0.0
    store_total(d_loss, r_loss, r_weight, scalars, alpha, inv_tau, loss, has_pairs, USE_D, USE_R)


@triton.jit
def store_total(
    d_loss, r_loss, r_weight, scalars, alpha, inv_tau, loss, has_pairs, USE_D: tl.constexpr, USE_R: tl.constexpr
):  # fmt: skip
    """A query's loss from the sums over its pairs, and the gradient's factors."""
    total = tl.load(scalars + POISON)
    has = 0
    if USE_D:
        count = tl.load(scalars + TARGETS)
        pairs = count * (count - 1.0) / 2.0
        factor = tl.where(pairs > 0.0, alpha / tl.maximum(pairs, 1.0), 0.0)
        total += factor * d_loss
        # The mse runs on logits as they are, so its inv_tau is 1.
        tl.store(scalars + D_FACTOR, factor * inv_tau)
        has = tl.where(pairs > 0.0, 1, has)
    if USE_R:
        factor = tl.where(r_weight > 0.0, (1.0 - alpha) / tl.where(r_weight > 0.0, r_weight, 1.0), 0.0)
        total += factor * r_loss
        tl.store(scalars + R_FACTOR, factor)
        has = tl.where(r_weight > 0.0, 1, has)
    tl.store(loss, total)
    tl.store(has_pairs, has)


@triton.jit
def gradient_rows(rows, slots, valid, inside, fields, S, scalars, gradient, USE_D: tl.constexpr, USE_R: tl.constexpr):
    value = tl.load(scalars + POISON) + rows * 0.0
    if USE_D:
        value += tl.load(scalars + D_FACTOR) * tl.load(fields + D_SLOPE * S + rows, mask=inside, other=0.0)
    if USE_R:
        value += tl.load(scalars + R_FACTOR) * tl.load(fields + R_SLOPE * S + rows, mask=inside, other=0.0)
    tl.store(gradient + slots, tl.where(valid, value, 0.0).to(gradient.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["Q", "S"])
def reduce_kernel(
    losses, has_pairs, total, gradient, scaled, Q, S, MEAN: tl.constexpr, WITH_GRADIENT: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Loss over all queries, and for the mean the gradient divided by how many have pairs.

    Programs share out the gradient; each counts the queries for itself (4 Q bytes from L2), program 0 sums the losses. Every
    sum has one fixed order.
    """
    program = tl.program_id(0)
    count = tl.zeros((BLOCK,), tl.int32)
    value = tl.zeros((BLOCK,), tl.float64)
    for begin in range(0, Q, BLOCK):
        i = begin + tl.arange(0, BLOCK)
        count += tl.load(has_pairs + i, mask=i < Q, other=0)
        if program == 0:
            value += tl.load(losses + i, mask=i < Q, other=0.0).to(tl.float64)
    divisor = 1.0
    if MEAN:
        divisor = tl.maximum(tl.sum(count, 0), 1).to(tl.float32)
    if program == 0:
        tl.store(total, tl.sum(value, 0).to(tl.float32) / divisor)
    if WITH_GRADIENT:
        for begin in range(program.to(tl.int64) * BLOCK, S, tl.num_programs(0) * BLOCK):
            i = begin + tl.arange(0, BLOCK)
            g = tl.load(gradient + i, mask=i < S, other=0.0)
            tl.store(scaled + i, (g / divisor).to(scaled.dtype.element_ty), mask=i < S)
