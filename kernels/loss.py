"""The student's loss and its gradient, phase by phase: load, prepare, scale, a pass for each term, total, gradient.

    loss_q = alpha · (Σ losses of D / Σ weights of D) + (1 − alpha) · (Σ losses of R / Σ weights of R)

A term, D of the distillation or R of the labels, gives each document its loss, slope and weight: kernels/terms. As in
kernels/ensemble.py, a phase runs over a chunk, which may be all of a query.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl
from pile_fast.kernels.chunks import chunks_before, slots_of, sum_partials
from pile_fast.kernels.fields import store_grid
from pile_fast.kernels.layout import (
    DISTILL, FACTOR, LABEL, LABEL_GRID, LOSS_WIDE, POISON, RANK, S_GRID, S_MIDDLE, S_PIVOT, S_SCALED, SLOPE, SUM, SUMS,
    TARGETS, Z_GRID, Z_MIDDLE, Z_PIVOT, Z_SCALED, Z, elements, field, scalar,
)  # fmt: skip
from pile_fast.kernels.pairs import NARROW


class Ranges(NamedTuple):
    """Whether any student logit is not finite (> 0), how many documents have a target; the ranges of their logits, of their
    targets, and of all logits. In the order of the partial sums."""

    broken: Any
    used: Any
    z_low: Any
    z_high: Any
    s_low: Any
    s_high: Any
    low: Any
    high: Any


@triton.jit
def load_logits(k, student, target, mask, order, how: tl.constexpr):
    """A chunk's logits, 0 where there is no document, and targets, NaN = none, as infinite ones are; as they are, to Z and
    S_SCALED."""
    BR: tl.constexpr = how.BR
    inf = float("inf")
    broken = tl.zeros((BR,), tl.float32)
    used = broken
    low = tl.full((BR,), inf, tl.float32)
    high = -low
    z_low = low
    z_high = high
    s_low = low
    s_high = high
    for row in range(k.begin, k.padded, BR):
        rows = row + tl.arange(0, BR)
        slots, valid = slots_of(k, order, mask, rows)
        z = tl.load(elements(student, k, slots), mask=valid, other=0.0).to(tl.float32)
        tl.store(field(k, Z) + rows, z, mask=rows < k.padded)
        broken += tl.where(tl.abs(z) < inf, 0.0, 1.0)
        low = tl.minimum(low, tl.where(valid, z, inf))
        high = tl.maximum(high, tl.where(valid, z, -inf))
        if target.pointer is not None:
            s = tl.load(elements(target, k, slots), mask=valid, other=float("nan")).to(tl.float32)
            takes = tl.abs(s) < inf
            tl.store(field(k, S_SCALED) + rows, tl.where(takes, s, float("nan")), mask=rows < k.padded)
            used += tl.where(takes, 1.0, 0.0)
            z_low = tl.minimum(z_low, tl.where(takes, z, inf))
            z_high = tl.maximum(z_high, tl.where(takes, z, -inf))
            s_low = tl.minimum(s_low, tl.where(takes, s, inf))
            s_high = tl.maximum(s_high, tl.where(takes, s, -inf))
    return Ranges(
        tl.sum(broken, 0), tl.sum(used, 0), tl.min(z_low, 0), tl.max(z_high, 0), tl.min(s_low, 0), tl.max(s_high, 0),
        tl.min(low, 0), tl.max(high, 0),
    )  # fmt: skip


@triton.jit
def prepare(k, ranges, inv_tau, linear, USE_D: tl.constexpr):
    """What a query's phases need to know of its logits. `linear`: whether grids are wanted, None = never."""
    inf = float("inf")
    broken = ranges.broken > 0.0
    tl.store(scalar(k, POISON), tl.where(broken, float("nan"), 0.0))
    low = tl.where(ranges.low <= ranges.high, ranges.low, 0.0)
    high = tl.where(ranges.low <= ranges.high, ranges.high, 0.0)
    # The sums of a broken query are not used; one cell keeps them cheap.
    if linear is not None:
        store_grid(scalar(k, LABEL_GRID), tl.where(broken, 0.0, low), tl.where(broken, 0.0, high), linear)
    if USE_D:
        any_target = ranges.used > 0.0
        z_pivot = tl.where(any_target & (ranges.z_low < inf), ranges.z_low, 0.0)
        s_pivot = tl.where(any_target, ranges.s_low, 0.0)
        tl.store(scalar(k, Z_PIVOT), z_pivot)
        tl.store(scalar(k, S_PIVOT), s_pivot)
        # From here on in units of τ, from the pivots.
        z_high = tl.where(any_target, ranges.z_high - z_pivot, 0.0) * inv_tau
        s_high = tl.where(any_target, ranges.s_high - s_pivot, 0.0) * inv_tau
        # Direct sums take exponentials of all z, used or not: the wide range.
        narrow = ((high - low) * inv_tau <= NARROW) & (s_high <= NARROW)
        tl.store(scalar(k, LOSS_WIDE), tl.where(narrow, 0.0, 1.0))
        tl.store(scalar(k, Z_MIDDLE), z_high / 2.0)
        tl.store(scalar(k, S_MIDDLE), s_high / 2.0)
        tl.store(scalar(k, TARGETS), ranges.used)
        if linear is not None:
            store_grid(scalar(k, Z_GRID), 0.0, tl.where(broken, 0.0, z_high), linear)
            store_grid(scalar(k, S_GRID), 0.0, tl.where(broken, 0.0, s_high), linear)


@triton.jit
def scale(k, sums, numbers, D: tl.constexpr, R: tl.constexpr, how: tl.constexpr):
    """z / τ and s / τ of a chunk, from the query's lowest: divided is only what has been subtracted. To `sums`, two for each
    kind, what the terms sum over a list."""
    BR: tl.constexpr = how.BR
    d_first = tl.zeros((BR,), tl.float64)
    d_second = d_first
    r_first = d_first
    r_second = d_first
    for row in range(k.begin, k.padded, BR):
        rows = row + tl.arange(0, BR)
        inside = rows < k.padded
        z = tl.load(field(k, Z) + rows, mask=inside, other=0.0)
        if R is not None:
            if R.sums is not None:
                rank = tl.load(field(k, RANK) + rows, mask=inside, other=float("nan"))
                first, second = R.sums(k, z, rank, numbers.label)
                r_first += first.to(tl.float64)
                r_second += second.to(tl.float64)
        if D is not None:
            s = tl.load(field(k, S_SCALED) + rows, mask=inside, other=float("nan"))
            z = (z - tl.load(scalar(k, Z_PIVOT))) * numbers.inv_tau
            s = (s - tl.load(scalar(k, S_PIVOT))) * numbers.inv_tau
            tl.store(field(k, Z_SCALED) + rows, z, mask=inside)
            tl.store(field(k, S_SCALED) + rows, s, mask=inside)
            if D.sums is not None:
                first, second = D.sums(k, z, s, numbers.distill)
                d_first += first.to(tl.float64)
                d_second += second.to(tl.float64)
    if D is not None:
        if D.sums is not None:
            tl.store(sums + 2 * DISTILL, tl.sum(d_first, 0).to(tl.float32))
            tl.store(sums + 2 * DISTILL + 1, tl.sum(d_second, 0).to(tl.float32))
    if R is not None:
        if R.sums is not None:
            tl.store(sums + 2 * LABEL, tl.sum(r_first, 0).to(tl.float32))
            tl.store(sums + 2 * LABEL + 1, tl.sum(r_second, 0).to(tl.float32))


@triton.jit
def list_sum(k, lists, AT: tl.constexpr, how: tl.constexpr):
    """A sum over the query that a term's `sums` asked for, AT = 2 · kind, or one more for the second."""
    if how.ALONE:
        total = tl.load(scalar(k, SUM + AT))
    else:
        c_first = chunks_before(lists, k.first)
        total = sum_partials(k, SUMS + AT, c_first, chunks_before(lists, k.first + k.n)).to(tl.float32)
    return total


@triton.jit
def load_scaled(k, rows):
    """The rows' z / τ and s / τ; NaN: no target."""
    z = tl.load(field(k, Z_SCALED) + rows, mask=rows < k.end, other=0.0)
    return z, tl.load(field(k, S_SCALED) + rows, mask=rows < k.end, other=float("nan"))


@triton.jit
def half_of_others(k, s):
    """The rows' shares of the number of pairs of documents with a target."""
    return tl.where(s == s, (tl.load(scalar(k, TARGETS)) - 1.0) / 2.0, 0.0)


@triton.jit
def pass_of_term(k, lists, pulls, losses, numbers, TERM: tl.constexpr, KIND: tl.constexpr, how: tl.constexpr):
    """The slopes of a chunk's documents under a term, and the sums of their losses and weights."""
    state = TERM.enter(k, lists, how)
    loss_sum = tl.zeros((), tl.float64)
    weight_sum = loss_sum
    for row in range(k.begin, k.end, how.BR):
        rows = row + tl.arange(0, how.BR)
        loss, slope, weight = TERM.rows(k, lists, rows, state, pulls, losses, numbers, how)
        tl.store(field(k, SLOPE + KIND) + rows, slope, mask=rows < k.end)
        loss_sum += tl.sum(loss.to(tl.float64), 0)
        weight_sum += tl.sum(weight.to(tl.float64), 0)
    return loss_sum.to(tl.float32), weight_sum.to(tl.float32)


@triton.jit
def store_total(k, d_loss, d_weight, r_loss, r_weight, numbers, losses, has_pairs):
    """A query's loss and the factors of its slopes, from the terms' sums; a weight is 0 where there is no pair, or no term."""
    d_factor = tl.where(d_weight > 0.0, numbers.alpha / tl.where(d_weight > 0.0, d_weight, 1.0), 0.0)
    r_factor = tl.where(r_weight > 0.0, (1.0 - numbers.alpha) / tl.where(r_weight > 0.0, r_weight, 1.0), 0.0)
    tl.store(scalar(k, FACTOR + DISTILL), d_factor * numbers.inv_tau)
    tl.store(scalar(k, FACTOR + LABEL), r_factor)
    tl.store(losses + k.q, tl.load(scalar(k, POISON)) + d_factor * d_loss + r_factor * r_loss)
    tl.store(has_pairs + k.q, tl.where((d_weight > 0.0) | (r_weight > 0.0), 1, 0))


@triton.jit
def gradient_of(k, gradient, mask, order, USE_D: tl.constexpr, USE_R: tl.constexpr, how: tl.constexpr):
    """The gradient of a chunk's logits, in the tensors' order."""
    for row in range(k.begin, k.end, how.BR):
        rows = row + tl.arange(0, how.BR)
        inside = rows < k.end
        slots, valid = slots_of(k, order, mask, rows)
        value = tl.load(scalar(k, POISON)) + rows * 0.0
        if USE_D:
            slope = tl.load(field(k, SLOPE + DISTILL) + rows, mask=inside, other=0.0)
            value += tl.load(scalar(k, FACTOR + DISTILL)) * slope
        if USE_R:
            value += tl.load(scalar(k, FACTOR + LABEL)) * tl.load(field(k, SLOPE + LABEL) + rows, mask=inside, other=0.0)
        value = tl.where(valid, value, 0.0).to(gradient.dtype.element_ty)
        tl.store(gradient + k.first + slots, value, mask=inside)


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
