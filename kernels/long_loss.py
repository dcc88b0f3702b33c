"""The student's loss and gradient of lists longer than one program takes alone; see kernels/long_ensemble.py for how.

    load → prepare → scale → a term at a time: its fields (kernels/fields.py) or survey, then its pass over the chunks → total
    → gradient

Floor: per document about 100 bytes and the fields' cost, once; bound by bytes, or by the latency of a dozen launches. Terms
without fields have direct sums, whose pairs bound them.
"""

import triton
import triton.language as tl
from pile_fast.kernels.chunks import open_chunk, open_query, sum_partials
from pile_fast.kernels.layout import (
    BROKEN, DISTILL, GAINS, LABEL, LOSSES, NUMBER, OF_LABEL_HIGH, OF_LABEL_LOW, OF_TOP, RANGE, S_RANGE, SUMS, TILE, USED,
    WEIGHTS, Z_RANGE, load_double, partial, partials_of, store_double,
)  # fmt: skip
from pile_fast.kernels.loss import (
    Ranges, gradient_of, load_logits, pass_of_term, prepare, scale, store_total, survey_of_term,
)  # fmt: skip


@triton.jit
def load_kernel(state, lists, inputs, R: tl.constexpr, how: tl.constexpr):
    """Logits by position as they are; a chunk's ranges, and how many of its documents are labelled, with their gains."""
    k = open_chunk(state, lists)
    if k.n == 0:
        return
    ranges = load_logits(k, inputs, lists.order, R, how)
    to = partial(k, BROKEN)
    for i in tl.static_range(8):
        tl.store(to + i, ranges[i])
    if how.GAINS:
        tl.store(partial(k, OF_TOP), ranges.top)
        store_double(partial(k, OF_LABEL_LOW), ranges.label_low)
        store_double(partial(k, OF_LABEL_HIGH), ranges.label_high)
    elif R is not None:
        tl.store(partial(k, NUMBER), ranges.number)
        tl.store(partial(k, GAINS), ranges.gains)


@triton.jit
def range_of(k, NAME: tl.constexpr):
    """The lowest low and the highest high of a query's chunks."""
    inf = float("inf")
    low = tl.full((TILE,), inf, tl.float32)
    high = -low
    for begin in range(k.c_first, k.c_last, TILE):
        c = begin + tl.arange(0, TILE)
        at = partials_of(k, c) + NAME
        low = tl.minimum(low, tl.load(at, mask=c < k.c_last, other=inf))
        high = tl.maximum(high, tl.load(at + 1, mask=c < k.c_last, other=-inf))
    return tl.min(low, 0), tl.max(high, 0)


@triton.jit
def extremes_of(k):
    """The highest labelled logit of a query's chunks, the lowest and the highest label."""
    inf = float("inf")
    top = tl.full((TILE,), -inf, tl.float32)
    high = top.to(tl.float64)
    low = -high
    for begin in range(k.c_first, k.c_last, TILE):
        c = begin + tl.arange(0, TILE)
        inside = c < k.c_last
        at = partials_of(k, c)
        top = tl.maximum(top, tl.load(at + OF_TOP, mask=inside, other=-inf))
        low = tl.minimum(low, tl.where(inside, load_double(at + OF_LABEL_LOW, inside), inf))
        high = tl.maximum(high, tl.where(inside, load_double(at + OF_LABEL_HIGH, inside), -inf))
    return tl.max(top, 0), tl.min(low, 0), tl.max(high, 0)


@triton.jit
def prepare_kernel(state, lists, inv_tau, D: tl.constexpr, WINDOW: tl.constexpr, how: tl.constexpr):
    """Whether all of a query's student logits are finite, how many documents have a target, the pivots and the grids."""
    k = open_query(state, lists)
    broken = sum_partials(k, BROKEN, k.c_first, k.c_last).to(tl.float32)
    used = sum_partials(k, USED, k.c_first, k.c_last).to(tl.float32)
    z_low, z_high = range_of(k, Z_RANGE)
    s_low, s_high = range_of(k, S_RANGE)
    low, high = range_of(k, RANGE)
    top = None
    label_low = None
    label_high = None
    if how.GAINS:
        top, label_low, label_high = extremes_of(k)
    ranges = Ranges(broken, used, z_low, z_high, s_low, s_high, low, high, top, label_low, label_high, None, None)
    prepare(k, ranges, inv_tau, k.n >= WINDOW, D, how)


@triton.jit
def scale_kernel(state, lists, inputs, numbers, D: tl.constexpr, R: tl.constexpr, how: tl.constexpr):
    """z / τ and s / τ, gains, and the terms' sums."""
    k = open_chunk(state, lists)
    if k.n == 0:
        return
    scale(k, partial(k, SUMS), inputs, numbers, D, R, how)


@triton.jit
def survey_kernel(state, lists, numbers, TERM: tl.constexpr, how: tl.constexpr):
    """What a chunk's documents have to know of all others before a term's pass."""
    k = open_chunk(state, lists)
    if k.n == 0:
        return
    survey_of_term(k, lists, numbers, TERM, how)


@triton.jit
def term_kernel(state, lists, pulls, losses, numbers, TERM: tl.constexpr, KIND: tl.constexpr, how: tl.constexpr):
    """A term's slopes of a chunk's documents, the sums of their losses and weights."""
    k = open_chunk(state, lists)
    if k.n == 0:
        return
    loss, weight = pass_of_term(k, lists, pulls, losses, numbers, TERM, KIND, how)
    tl.store(partial(k, LOSSES + KIND), loss)
    tl.store(partial(k, WEIGHTS + KIND), weight)


@triton.jit
def total_kernel(state, lists, inputs, losses, has_pairs, numbers, USE_D: tl.constexpr, USE_R: tl.constexpr):
    """A query's loss from its chunks' sums, and the gradient's factors."""
    k = open_query(state, lists)
    d_loss = tl.zeros((), tl.float32)
    d_weight = d_loss
    r_loss = d_loss
    r_weight = d_loss
    if USE_D:
        d_loss = sum_partials(k, LOSSES + DISTILL, k.c_first, k.c_last).to(tl.float32)
        d_weight = sum_partials(k, WEIGHTS + DISTILL, k.c_first, k.c_last).to(tl.float32)
    if USE_R:
        r_loss = sum_partials(k, LOSSES + LABEL, k.c_first, k.c_last).to(tl.float32)
        r_weight = sum_partials(k, WEIGHTS + LABEL, k.c_first, k.c_last).to(tl.float32)
    store_total(k, d_loss, d_weight, r_loss, r_weight, inputs, numbers, losses, has_pairs)


@triton.jit
def gradient_kernel(
    state, lists, gradient, mask, USE_D: tl.constexpr, USE_R: tl.constexpr, how: tl.constexpr
):  # fmt: skip
    """The gradient of a chunk's logits."""
    k = open_chunk(state, lists)
    if k.n == 0:
        return
    gradient_of(k, gradient, mask, lists.order, USE_D, USE_R, how)
