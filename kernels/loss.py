"""The student's loss and its gradient, phase by phase: load, prepare, scale, a pass for each term, total, gradient.

    loss_q = c_q · (alpha · (Σ losses of D / Σ weights of D) + (1 − alpha) · (Σ losses of R / Σ weights of R))

A term, D of the distillation or R of the labels, gives each document its loss, slope and weight: kernels/terms. Some need a
first pass over all documents, a survey. As in kernels/ensemble.py, a phase runs over a chunk, which may be all of a query.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl
from pile_fast.kernels.chunks import chunks_before, slots_of, sum_partials
from pile_fast.kernels.fields import store_grid
from pile_fast.kernels.layout import (
    DISTILL, FACTOR, GAIN, LABEL, LABEL_GRID, LABEL_HIGH, LABEL_LOW, LOSS_WIDE, POISON, RANK, S_GRID, S_MIDDLE, S_PIVOT,
    S_SCALED, SLOPE, SUM, SUMS, TARGETS, TOP, Z_GRID, Z_MIDDLE, Z_PIVOT, Z_SCALED, C, Z, elements, field, load_double, plain,
    scalar, store_double,
)  # fmt: skip
from pile_fast.kernels.pairs import NARROW


class Ranges(NamedTuple):
    """Whether any student logit is not finite, or a weight or label not allowed (> 0), how many documents have a target; the
    ranges of their logits, of their targets, and of all logits, in the order of the partial sums. Where labels are gains, also
    the highest logit of a labelled document, and the labels' extremes, in float64. Else, in a chunk of a long list, how many
    documents are labelled, and their gains."""

    broken: Any
    used: Any
    z_low: Any
    z_high: Any
    s_low: Any
    s_high: Any
    low: Any
    high: Any
    top: Any
    label_low: Any
    label_high: Any
    number: Any
    gains: Any


@triton.jit
def query_weight(k, inputs):
    """What the query counts, as it was given."""
    return tl.load(inputs.query_weights.pointer + k.q * plain(inputs.query_weights.query))


@triton.jit
def load_logits(k, inputs, order, R: tl.constexpr, how: tl.constexpr):
    """A chunk's logits, 0 where there is no document, and targets, NaN = none, as infinite ones are; as they are, to Z and
    S_SCALED.

    A document of weight 0, or of a query of weight 0, is as good as none from here on: the ensemble has seen it, so its RANK
    becomes NaN now.
    """
    HIDES: tl.constexpr = how.HAS_C or inputs.query_weights.pointer is not None
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
    top = high
    label_low = None
    label_high = None
    number = broken
    gains = broken
    if how.GAINS:
        label_low = low.to(tl.float64)
        label_high = high.to(tl.float64)
    for row in range(k.begin, k.padded, BR):
        rows = row + tl.arange(0, BR)
        slots, valid = slots_of(k, order, inputs.mask, rows)
        if inputs.query_weights.pointer is not None:
            weight = query_weight(k, inputs)
            weight += tl.zeros((BR,), weight.dtype)
            valid = valid & (weight != 0.0)
            broken += tl.where(valid & (((weight >= 0.0) & (weight < inf)) == 0), 1.0, 0.0)
        if how.HAS_C:
            weight = tl.load(elements(inputs.weights, k, slots), mask=valid, other=0.0)
            valid = valid & (weight != 0.0)
            c = weight.to(tl.float32)
            right = (c > 0.0) & (c < inf)
            broken += tl.where(valid & (right == 0), 1.0, 0.0)
            tl.store(field(k, C) + rows, tl.where(valid, tl.where(right, c, 1.0), 0.0), mask=rows < k.padded)
        z = tl.load(elements(inputs.student, k, slots), mask=valid, other=0.0).to(tl.float32)
        tl.store(field(k, Z) + rows, z, mask=rows < k.padded)
        broken += tl.where(tl.abs(z) < inf, 0.0, 1.0)
        low = tl.minimum(low, tl.where(valid, z, inf))
        high = tl.maximum(high, tl.where(valid, z, -inf))
        if R is not None:
            if HIDES or how.GAINS or not how.ALONE:
                rank = tl.load(field(k, RANK) + rows, mask=rows < k.padded, other=float("nan"))
                labelled = valid & (rank == rank)
                if HIDES:
                    tl.store(field(k, RANK) + rows, tl.where(labelled, rank, float("nan")), mask=rows < k.padded)
                number += tl.where(labelled, 1.0, 0.0)
                if how.WEIGHTED and not how.GAINS and not how.ALONE:
                    gains += tl.load(field(k, GAIN) + rows, mask=labelled, other=0.0)
                if how.GAINS:
                    label = tl.load(elements(inputs.labels, k, rows), mask=labelled, other=0).to(tl.float64)
                    broken += tl.where(labelled & (label < 0.0), 1.0, 0.0)
                    label_low = tl.minimum(label_low, tl.where(labelled, label, inf))
                    label_high = tl.maximum(label_high, tl.where(labelled, label, -inf))
                    top = tl.maximum(top, tl.where(labelled, z, -inf))
        if inputs.target.pointer is not None:
            s = tl.load(elements(inputs.target, k, slots), mask=valid, other=float("nan")).to(tl.float32)
            takes = tl.abs(s) < inf
            tl.store(field(k, S_SCALED) + rows, tl.where(takes, s, float("nan")), mask=rows < k.padded)
            used += tl.where(takes, 1.0, 0.0)
            z_low = tl.minimum(z_low, tl.where(takes, z, inf))
            z_high = tl.maximum(z_high, tl.where(takes, z, -inf))
            s_low = tl.minimum(s_low, tl.where(takes, s, inf))
            s_high = tl.maximum(s_high, tl.where(takes, s, -inf))
    if how.GAINS:
        top = tl.max(top, 0)
        label_low = tl.min(label_low, 0)
        label_high = tl.max(label_high, 0)
    if not how.ALONE:
        number = tl.sum(number, 0)
        gains = tl.sum(gains, 0)
    return Ranges(
        tl.sum(broken, 0), tl.sum(used, 0), tl.min(z_low, 0), tl.max(z_high, 0), tl.min(s_low, 0), tl.max(s_high, 0),
        tl.min(low, 0), tl.max(high, 0), top, label_low, label_high, number, gains,
    )  # fmt: skip


@triton.jit
def prepare(k, ranges, inv_tau, linear, D: tl.constexpr, how: tl.constexpr):
    """What a query's phases need to know of its logits. `linear`: whether grids are wanted, None = never."""
    inf = float("inf")
    broken = ranges.broken > 0.0
    tl.store(scalar(k, POISON), tl.where(broken, float("nan"), 0.0))
    low = tl.where(ranges.low <= ranges.high, ranges.low, 0.0)
    high = tl.where(ranges.low <= ranges.high, ranges.high, 0.0)
    # The sums of a broken query are not used; one cell keeps them cheap.
    if linear is not None:
        store_grid(scalar(k, LABEL_GRID), tl.where(broken, 0.0, low), tl.where(broken, 0.0, high), linear)
    if how.GAINS:
        tl.store(scalar(k, TOP), tl.where(ranges.top > -inf, ranges.top, 0.0))
        store_double(scalar(k, LABEL_LOW), ranges.label_low)
        store_double(scalar(k, LABEL_HIGH), ranges.label_high)
    if D is not None:
        any_target = ranges.used > 0.0
        z_pivot = tl.where(any_target & (ranges.z_low < inf), ranges.z_low, 0.0)
        s_pivot = tl.where(any_target, ranges.s_low, 0.0)
        if D.from_top:
            tl.store(scalar(k, Z_PIVOT), tl.where(any_target & (ranges.z_high > -inf), ranges.z_high, 0.0))
            tl.store(scalar(k, S_PIVOT), tl.where(any_target, ranges.s_high, 0.0))
        else:
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
def gains_of_labels(label, low, high, kind):
    """Gains of labels between `low` and `high`, all float64. Kind 0: (2^y − 1) / 2^high, 1: y / high, 2: 1 for those above 0.

    A negative label cannot be meant; its query is broken, and counts.
    """
    power = tl.exp2(label - high) - tl.exp2(-high)
    gain = tl.where(kind == 1.0, label / tl.where(high > 0.0, high, 1.0), tl.where(label > 0.0, 1.0, 0.0))
    return tl.where(low < 0.0, 1.0, tl.where(kind == 0.0, power, gain))


@triton.jit
def load_c(k, rows, how: tl.constexpr):
    """What the rows' documents count; 1 where documents have no weights."""
    BR: tl.constexpr = how.BR
    c = tl.full((BR,), 1.0, tl.float32)
    if how.HAS_C:
        c = tl.load(field(k, C) + rows, mask=rows < k.padded, other=0.0)
    return c


@triton.jit
def scale(k, sums, inputs, numbers, D: tl.constexpr, R: tl.constexpr, how: tl.constexpr):
    """z / τ and s / τ of a chunk, from the query's lowest or highest: divided is only what has been subtracted. Gains of
    labels. To `sums`, three for each kind, what the terms sum over a list."""
    BR: tl.constexpr = how.BR
    d_first = tl.zeros((BR,), tl.float64)
    d_second = d_first
    d_third = d_first
    r_first = d_first
    r_second = d_first
    r_third = d_first
    for row in range(k.begin, k.padded, BR):
        rows = row + tl.arange(0, BR)
        inside = rows < k.padded
        z = tl.load(field(k, Z) + rows, mask=inside, other=0.0)
        c = load_c(k, rows, how)
        if R is not None:
            rank = tl.load(field(k, RANK) + rows, mask=inside, other=float("nan"))
            gain = None
            if how.GAINS:
                label = tl.load(elements(inputs.labels, k, rows), mask=rank == rank, other=0).to(tl.float64)
                low = load_double(scalar(k, LABEL_LOW), True)
                high = load_double(scalar(k, LABEL_HIGH), True)
                gain = gains_of_labels(label, low, high, R.gain(numbers.label)).to(tl.float32)
                gain = tl.where(rank == rank, gain, float("nan"))
                tl.store(field(k, GAIN) + rows, gain, mask=inside)
            if R.sums is not None:
                first, second, third = R.sums(k, z, rank, c, gain, numbers.label)
                r_first += first.to(tl.float64)
                r_second += second.to(tl.float64)
                r_third += third.to(tl.float64)
        if D is not None:
            s = tl.load(field(k, S_SCALED) + rows, mask=inside, other=float("nan"))
            z = (z - tl.load(scalar(k, Z_PIVOT))) * numbers.inv_tau
            s = (s - tl.load(scalar(k, S_PIVOT))) * numbers.inv_tau
            tl.store(field(k, Z_SCALED) + rows, z, mask=inside)
            tl.store(field(k, S_SCALED) + rows, s, mask=inside)
            if D.sums is not None:
                first, second, third = D.sums(k, z, s, c, None, numbers.distill)
                d_first += first.to(tl.float64)
                d_second += second.to(tl.float64)
                d_third += third.to(tl.float64)
    if D is not None:
        if D.sums is not None:
            store_sums(sums + 3 * DISTILL, d_first, d_second, d_third)
    if R is not None:
        if R.sums is not None:
            store_sums(sums + 3 * LABEL, r_first, r_second, r_third)


@triton.jit
def store_sums(to, first, second, third):
    """The sums over rows of what a term's `sums` gave."""
    tl.store(to, tl.sum(first, 0).to(tl.float32))
    tl.store(to + 1, tl.sum(second, 0).to(tl.float32))
    tl.store(to + 2, tl.sum(third, 0).to(tl.float32))


@triton.jit
def list_sum(k, lists, AT: tl.constexpr, how: tl.constexpr):
    """A sum over the query that a term's `sums` asked for, AT = 3 · kind, one more for the second, two for the third."""
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
def survey_of_term(k, lists, numbers, TERM: tl.constexpr, how: tl.constexpr):
    """What a chunk's documents have to know of all others before a term's pass."""
    for row in range(k.begin, k.padded, how.BR):
        TERM.survey(k, lists, row + tl.arange(0, how.BR), numbers, how)


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
def store_total(k, d_loss, d_weight, r_loss, r_weight, inputs, numbers, losses, has_pairs):
    """A query's loss and the factors of its slopes, from the terms' sums; a weight is 0 where there is no pair, or no term."""
    d_factor = tl.where(d_weight > 0.0, numbers.alpha / tl.where(d_weight > 0.0, d_weight, 1.0), 0.0)
    r_factor = tl.where(r_weight > 0.0, (1.0 - numbers.alpha) / tl.where(r_weight > 0.0, r_weight, 1.0), 0.0)
    if inputs.query_weights.pointer is not None:
        factor = query_weight(k, inputs).to(tl.float32)
        d_factor *= factor
        r_factor *= factor
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
        if how.HAS_C:
            valid = valid & (load_c(k, rows, how) != 0.0)
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
