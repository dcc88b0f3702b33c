"""The ensemble's phases: calibrate the teachers, then exponentiated-gradient steps on their weights. Weights that all queries
share take no step here: their ensemble is one pass over the teachers, and what a query pulls on them one sweep over its pairs.

A phase runs over a chunk of a query's documents, a block of BR rows at a time. kernels/pile.py strings the phases together for
a query of one program, whose chunk is all of it; kernels/long_ensemble.py has a launch for each. The state between phases lies
in scratch memory (kernels/layout.py), which a short query's program finds in its L1.

The state is one exponent per document (or per teacher), never a weight per document and teacher: the ensemble logit is the
tilted mean s_i = Σ_m e^{a_i t_im} t_im / Σ_m e^{a_i t_im}, taken relative to the highest (a_i >= 0) or lowest teacher, so
that every exponent is <= 0 and differences of close teachers are exact.
"""

import triton
import triton.language as tl
from pile_fast.kernels.chunks import gains_of, has_others, near_rows, slots_of, sum_partials
from pile_fast.kernels.fields import label_field, store_grid
from pile_fast.kernels.layout import (
    ABOVE, COMMON, CORRECTION, ENERGY, EXPONENT, GAIN, GAINS, MEAN, MIDDLE, NUMBER, PAIRS, PER_PAIR, RANK, ROOT_SCALE,
    SCORED_RANK, TEACHER_WEIGHT, U_GRID, WIDE, E, U, elements, field, load_row, plain, scalar, teacher_row,
)  # fmt: skip
from pile_fast.kernels.pairs import NARROW, columns_of, label_losses, label_pull, load_labels, load_order, pair_counts

MIN_SHARE = tl.constexpr(2.0**-10)  # see pile_fast/reference.py
SMALLEST = tl.constexpr(2.0**-120)  # of a weight, to the largest: what a softmax of float32 still tells from 0


@triton.jit
def load_teachers(teachers, k, slots, valid, energy, NORMALIZE: tl.constexpr, MP: tl.constexpr):
    """(BR, MP) float32, NaN = not present, as infinite scores are; of probabilities their logits. `energy`: where some teachers
    do not take part."""
    m = tl.arange(0, MP)
    inside = valid[:, None] & (m < k.M)[None, :]
    at = elements(teachers, k, slots)[:, None] + m.to(tl.int64)[None, :] * plain(teachers.teacher)
    t = tl.load(at, mask=inside, other=float("nan")).to(tl.float32)
    if energy is not None:
        t += tl.where(energy > -float("inf"), 0.0, float("nan"))[None, :]
    t = t + (t - t)  # NaN where t is infinite, in two instructions and no mask: registers are short here
    if NORMALIZE == "logit":
        # In float64, where 1 − p is exact: around 1/2 all digits would be lost.
        p = tl.minimum(tl.maximum(t.to(tl.float64), 2.0**-23), 1.0 - 2.0**-23)
        t = tl.where(t == t, tl.log(p / (1.0 - p)).to(tl.float32), t)
    return t


@triton.jit
def softmax_or_zero(energy):
    """The teachers' weights; all 0 where none takes part."""
    top = tl.max(energy, 0)
    e = tl.where(energy > -float("inf"), tl.exp(energy - top), 0.0)
    return e / tl.maximum(tl.sum(e, 0), 1e-30)


@triton.jit
def prior_energy(prior, k, MP: tl.constexpr):
    """The teachers' starting energies, −inf = not there."""
    inf = float("inf")
    m = tl.arange(0, MP)
    energy = tl.where(m < k.M, 0.0, -inf)
    if prior.pointer is not None:
        at = prior.pointer + k.q * plain(prior.query) + m.to(tl.int64) * plain(prior.teacher)
        p = tl.load(at, mask=m < k.M, other=0.0)
        there = (p > 0.0) & (p < inf)
        p = tl.where(there, tl.minimum(p, 1e38), 0.0).to(tl.float32)
        # However small a weight, its teacher is there.
        energy = tl.where(there, tl.log(tl.maximum(p / tl.maximum(tl.max(p, 0), 1e-37), SMALLEST)), -inf)
    return energy


@triton.jit
def lift(low, high):
    """A power of two that brings each teacher's range to where squares neither vanish nor overflow in float32."""
    size = high - low
    return tl.where(size < 9e-16, 1.2676506002282294e30, tl.where(size > 1e15, 7.888609052210118e-31, 1.0))  # 2^100, 2^-100


@triton.jit
def statistics(k, teachers, mask, order, prior, NORMALIZE: tl.constexpr, how: tl.constexpr):
    """Each teacher's number of scores in a chunk; where they calibrate it their mean, what rounding the mean lost and the
    squares about it, summed and lifted, else 0; the lowest and highest score."""
    BR: tl.constexpr = how.BR
    MP: tl.constexpr = how.MP
    inf = float("inf")
    veto = None
    if prior.pointer is not None:
        veto = prior_energy(prior, k, MP)
    total = tl.zeros((MP,), tl.float64)
    count = tl.zeros((MP,), tl.float32)
    low = tl.full((MP,), inf, tl.float32)
    high = tl.full((MP,), -inf, tl.float32)
    for row in range(k.begin, k.end, BR):
        slots, valid = slots_of(k, order, mask, row + tl.arange(0, BR))
        t = load_teachers(teachers, k, slots, valid, veto, NORMALIZE, MP)
        present = t == t
        total += tl.sum(tl.where(present, t, 0.0), 0).to(tl.float64)
        count += tl.sum(tl.where(present, 1.0, 0.0), 0)
        low = tl.minimum(low, tl.min(tl.where(present, t, inf), 0))
        high = tl.maximum(high, tl.max(tl.where(present, t, -inf), 0))
    mean = tl.zeros((MP,), tl.float32)
    off = tl.zeros((MP,), tl.float32)  # small beside the deviation, and so is its rounding
    square = tl.zeros((MP,), tl.float64)
    if NORMALIZE != "none" and NORMALIZE != "minmax":
        mean = total.to(tl.float32) / tl.maximum(count, 1.0)
        # t − mean is nearly exact, so what rounding the mean lost comes out of a second pass. It is lifted: two exact products.
        up = lift(low, high)
        lifted_mean = mean * up
        for row in range(k.begin, k.end, BR):
            slots, valid = slots_of(k, order, mask, row + tl.arange(0, BR))
            t = load_teachers(teachers, k, slots, valid, veto, NORMALIZE, MP)
            d = tl.where(t == t, t * up[None, :] - lifted_mean[None, :], 0.0)
            off += tl.sum(d, 0)
            square += tl.sum(d * d, 0).to(tl.float64)
    return count, mean, off, square.to(tl.float32), low, high


@triton.jit
def store_statistics(
    k, count, mean, correction, variance, low, high, energy, steps, linear,
    NORMALIZE: tl.constexpr, TRACE: tl.constexpr, MP: tl.constexpr,
):  # fmt: skip
    """Mean and scale of each teacher, its starting energy, and the range the ensemble's logits lie in. `variance` is that of
    the lifted logits; `linear`: whether a grid is wanted, None = never."""
    inf = float("inf")
    m = tl.arange(0, MP)
    present = count > 0.0
    root_scale = tl.full((MP,), 1.0, tl.float32)
    common = 0.0
    # By its extremes: the rounding of a constant's mean must not be blown up to unit scale.
    varies = high > low
    if NORMALIZE == "zscore" or NORMALIZE == "logit":
        deviation = tl.sqrt(tl.maximum(variance, 1e-37))
        root_scale = tl.where(varies, tl.sqrt(lift(low, high)) / tl.sqrt(deviation), 0.0)
    if NORMALIZE == "minmax":
        up = lift(low, high)
        root_scale = tl.where(varies, tl.sqrt(up) / tl.sqrt(tl.where(varies, high * up - low * up, 1.0)), 0.0)
        mean = tl.where(present, low, 0.0)
    if NORMALIZE == "none":
        # The middle of all logits, where it is large beside their range: ensembles and pairs are differences, which have more
        # digits without it, and off and on again it rounds nothing.
        least = tl.min(tl.where(present, low, inf), 0)
        most = tl.max(tl.where(present, high, -inf), 0)
        middle = least / 2.0 + most / 2.0
        common = tl.where(tl.abs(middle) > 2.0 * (most - least), middle, 0.0)
        mean = mean * 0.0 + common
    energy = tl.where(present, energy, -inf)
    bottom = tl.min(tl.where(present, (low - mean - correction) * root_scale * root_scale, inf), 0)
    top = tl.max(tl.where(present, (high - mean - correction) * root_scale * root_scale, -inf), 0)
    anything = top >= bottom
    bottom = tl.where(anything, bottom, 0.0) * steps.inv_temperature
    top = tl.where(anything, top, 0.0) * steps.inv_temperature
    wide = tl.where(top - bottom + tl.abs(steps.offset) <= NARROW, 0.0, 1.0)
    if TRACE:  # its losses want u itself
        wide = 1.0
    tl.store(teacher_row(k, MEAN) + m, mean, mask=m < k.M)
    tl.store(teacher_row(k, CORRECTION) + m, correction, mask=m < k.M)
    tl.store(teacher_row(k, ROOT_SCALE) + m, root_scale, mask=m < k.M)
    store_energy(k, energy, MP)
    tl.store(scalar(k, MIDDLE), (bottom + top) / 2.0)
    tl.store(scalar(k, WIDE), wide)
    tl.store(scalar(k, COMMON), common)
    if linear is not None:
        store_grid(scalar(k, U_GRID), bottom, top, linear)


@triton.jit
def store_energy(k, energy, MP: tl.constexpr):
    """The teachers' energies, and their weights."""
    m = tl.arange(0, MP)
    tl.store(teacher_row(k, ENERGY) + m, energy, mask=m < k.M)
    tl.store(teacher_row(k, TEACHER_WEIGHT) + m, softmax_or_zero(energy), mask=m < k.M)


@triton.jit
def rank_labels(k, labels, mask, PAIR_WEIGHT: tl.constexpr, how: tl.constexpr):
    """RANK and GAIN of a query's documents as they lie: the labels' order in float32, whatever their dtype."""
    BR: tl.constexpr = how.BR
    for row in range(0, k.padded, BR):
        rows = row + tl.arange(0, BR)
        label = load_labels(labels, mask, k, rows)
        rank = tl.zeros((BR,), tl.float32)
        for begin in range(0, k.n, how.BC):
            other = load_labels(labels, mask, k, begin + tl.arange(0, how.BC))
            rank += tl.sum(tl.where(other[:, None] < label[None, :], 1.0, 0.0), 0)
        tl.store(field(k, RANK) + rows, tl.where(label == label, rank, float("nan")), mask=rows < k.padded)
        if PAIR_WEIGHT != "none":
            inf = float("inf")
            lowest = tl.full((BR,), inf, label.dtype)
            highest = -lowest
            for begin in range(0, k.n, BR):
                other = load_labels(labels, mask, k, begin + tl.arange(0, BR))
                lowest = tl.minimum(lowest, tl.where(other == other, other, inf))
                highest = tl.maximum(highest, tl.where(other == other, other, -inf))
            gain = gains_of(label, tl.min(lowest, 0), tl.max(highest, 0), PAIR_WEIGHT)
            tl.store(field(k, GAIN) + rows, gain, mask=rows < k.padded)


@triton.jit
def calibrated(k, rows, MP: tl.constexpr):
    """(BR, MP) the rows' calibrated teachers."""
    m = tl.arange(0, MP)
    inside = (rows < k.end)[:, None] & (m < k.M)[None, :]
    return tl.load(k.table + rows.to(tl.int64)[:, None] * k.M + m[None, :], mask=inside, other=float("nan"))


@triton.jit
def tilt(t, slope, energy):
    """The ensemble logits of the rows, whether any teacher scored them, and the teachers' weights. `slope`: None where the
    energies are still those of `prior_energy`, which saves the exponentials."""
    inf = float("inf")
    present = t == t
    low = tl.min(tl.where(present, t, inf), 1)
    high = tl.max(tl.where(present, t, -inf), 1)
    scored = high >= low
    if slope is None:
        reference = tl.where(scored, high, 0.0)
        d = tl.where(present, t - reference[:, None], 0.0)
        top = tl.where(scored, tl.max(tl.where(present, energy[None, :], -inf), 1), 0.0)
        e = tl.where(present, tl.exp(energy)[None, :] * tl.exp(-top)[:, None], 0.0)
    else:
        reference = tl.where(scored, tl.where(slope >= 0.0, high, low), 0.0)
        d = tl.where(present, t - reference[:, None], 0.0)
        exponent = tl.where(present, slope[:, None] * d + energy[None, :], -inf)
        top = tl.where(scored, tl.max(exponent, 1), 0.0)
        e = tl.where(present, tl.exp(exponent - top[:, None]), 0.0)
    mass = tl.where(scored, tl.sum(e, 1), 1.0)
    s = reference + tl.sum(e * d, 1) / mass
    # Rounding must not leave the teachers' range.
    s = tl.where(scored, tl.minimum(tl.maximum(s, low), high), 0.0)
    return s, scored, e / mass[:, None]


@triton.jit
def store_u(k, rows, s, scored, to, steps, how: tl.constexpr):
    """The rows' logits in units of the temperature, for the pairs: by themselves and as e^{c − u}, or for a list alone the one
    that its pairs take."""
    middle = tl.load(scalar(k, MIDDLE))
    # Two pairs share a reciprocal: a document out of all pairs must not be out of range.
    u = tl.where(scored, s * steps.inv_temperature, middle)
    if how.ALONE:
        if tl.load(scalar(k, WIDE)) == 0.0:
            u = tl.exp(middle - u)
    else:
        tl.store(field(k, E + to) + rows, tl.exp(middle - u), mask=rows < k.padded)
    tl.store(field(k, U + to) + rows, u, mask=rows < k.padded)


@triton.jit
def scaled(k, teachers, slots, valid, energy, NORMALIZE: tl.constexpr, MP: tl.constexpr):
    """(BR, MP) calibrated teachers, from the inputs."""
    t = load_teachers(teachers, k, slots, valid, energy, NORMALIZE, MP)
    t = t - load_row(k, MEAN, 0.0, MP)[None, :]
    root_scale = load_row(k, ROOT_SCALE, 0.0, MP)[None, :]
    return (t - load_row(k, CORRECTION, 0.0, MP)[None, :]) * root_scale * root_scale


@triton.jit
def calibrate(k, teachers, mask, order, steps, ENSEMBLE: tl.constexpr, how: tl.constexpr):
    """The calibrated teachers, the mean ensemble and SCORED_RANK of a chunk; of a long list also how many of its documents
    pairs count, and their gains."""
    BR: tl.constexpr = how.BR
    MP: tl.constexpr = how.MP
    m = tl.arange(0, MP)
    energy = load_row(k, ENERGY, -float("inf"), MP)
    number = tl.zeros((BR,), tl.float32)
    gains = number
    for row in range(k.begin, k.padded, BR):
        rows = row + tl.arange(0, BR)
        inside = rows < k.padded
        slots, valid = slots_of(k, order, mask, rows)
        t = scaled(k, teachers, slots, valid, energy, ENSEMBLE.NORMALIZE, MP)
        at = rows.to(tl.int64)[:, None] * k.M + m[None, :]
        tl.store(k.table + at, t, mask=inside[:, None] & (m < k.M)[None, :])
        s, scored, _ = tilt(t, None if ENSEMBLE.FIXED else rows * 0.0, energy)
        rank = tl.load(field(k, RANK) + rows, mask=inside, other=float("nan"))
        rank = tl.where(scored, rank, float("nan"))
        tl.store(field(k, SCORED_RANK) + rows, rank, mask=inside)
        if not ENSEMBLE.FIXED:
            tl.store(field(k, EXPONENT) + rows, rows * 0.0, mask=inside)
        store_u(k, rows, s, scored, 0, steps, how)
        if not how.ALONE:
            # The other copy, too: documents that no iteration moves are read from either.
            store_u(k, rows, s, scored, 1, steps, how)
            number += tl.where(rank == rank, 1.0, 0.0)
            if how.WEIGHTED:
                gains += tl.where(rank == rank, tl.load(field(k, GAIN) + rows, mask=inside, other=0.0), 0.0)
    return tl.sum(number, 0), tl.sum(gains, 0)


@triton.jit
def count_pairs(k, lists, how: tl.constexpr):
    """1 / k_i, and Σ ω over the documents above that are met directly; the sum of ω over the pairs whose higher document is the
    chunk's."""
    BR: tl.constexpr = how.BR
    near = near_rows(k, lists, U_GRID, how)
    columns = columns_of(k, near, SCORED_RANK)
    if not how.ALONE:
        number_below = sum_partials(k, NUMBER, near.c_first, near.c_begin)
        number_above = sum_partials(k, NUMBER, near.c_end, near.c_last)
        gains_below = sum_partials(k, GAINS, near.c_first, near.c_begin)
        gains_above = sum_partials(k, GAINS, near.c_end, near.c_last)
    total = tl.zeros((BR,), tl.float64)
    for row in range(k.begin, k.end, BR):
        rows = row + tl.arange(0, BR)
        inside = rows < k.end
        rank, gain = load_order(k, rows, SCORED_RANK, how)
        above = tl.zeros((BR,), tl.float32)
        below = above
        if near.mixed:
            above, below = pair_counts(columns, rank, gain, how)
        tl.store(field(k, ABOVE) + rows, above, mask=inside)
        if not how.ALONE:
            if how.WEIGHTED:
                wide_gain = gain.to(tl.float64)
                above += (gains_above - wide_gain * number_above).to(tl.float32)
                below += (wide_gain * number_below - gains_below).to(tl.float32)
            else:
                above += number_above.to(tl.float32)
                below += number_below.to(tl.float32)
        pairs = tl.where(rank == rank, above + below, 0.0)
        tl.store(field(k, PER_PAIR) + rows, tl.where(pairs > 0.0, 1.0 / tl.where(pairs > 0.0, pairs, 1.0), 0.0), mask=inside)
        total += tl.where(rank == rank, below, 0.0).to(tl.float64)
    return tl.sum(total, 0).to(tl.float32)


@triton.jit
def iterate(k, lists, pulls, losses, read, steps, ENSEMBLE: tl.constexpr, LOSS: tl.constexpr, how: tl.constexpr):
    """An iteration for a chunk, from λ on: by document its exponents and logits, else its pull on each teacher, the sum. With
    LOSS, in the same sweep, what `trace_loss` gives; for U alone, as that."""
    BR: tl.constexpr = how.BR
    MP: tl.constexpr = how.MP
    near = near_rows(k, lists, U_GRID, how)
    columns = columns_of(k, near, SCORED_RANK)
    wide = tl.load(scalar(k, WIDE)) != 0.0
    u = field(k, U + read)
    if not (how.ALONE or LOSS):
        u = field(k, tl.where(wide, U + read, E + read))
    total = tl.zeros((MP,), tl.float64)
    loss = tl.zeros((BR,), tl.float64)
    for row in range(k.begin, k.padded, BR):
        rows = row + tl.arange(0, BR)
        inside = rows < k.end
        rank, gain = load_order(k, rows, SCORED_RANK, how)
        direction = tl.zeros((BR,), tl.float32)
        if near.mixed:
            u_row = tl.load(u + rows, mask=inside, other=1.0)
            if LOSS:
                value, direction = label_losses(columns, u + near.begin, u_row, rank, gain, steps.offset, None, None, how)
                loss += value.to(tl.float64)
            else:
                direction = label_pull(
                    columns, u + near.begin, u_row, rank, gain, wide, steps.offset, ENSEMBLE.MARGIN, how
                ) - tl.load(field(k, ABOVE) + rows, mask=inside, other=0.0)  # fmt: skip
        if not how.DIRECT:
            if has_others(near):
                u_row = tl.load(field(k, U + read) + rows, mask=inside, other=0.0)
                direction += label_field(pulls, k, lists, U_GRID, u_row, rank, gain, how)
                if LOSS:
                    loss += label_field(losses, k, lists, U_GRID, u_row, rank, gain, how).to(tl.float64)
        t = calibrated(k, rows, MP)
        energy = load_row(k, ENERGY, -float("inf"), MP)
        if ENSEMBLE.BY_DOCUMENT:
            exponent = tl.load(field(k, EXPONENT) + rows, mask=inside, other=0.0)
            exponent += steps.step * direction * tl.load(field(k, PER_PAIR) + rows, mask=inside, other=0.0)
            tl.store(field(k, EXPONENT) + rows, exponent, mask=inside)
            s, scored, _ = tilt(t, exponent, energy)
            store_u(k, rows, s, scored, 1 - read, steps, how)
        else:
            # λ_i / share_i, by the weight of the teachers that scored a document.
            share = tl.sum(tl.where(t == t, load_row(k, TEACHER_WEIGHT, 0.0, MP)[None, :], 0.0), 1)
            direction = direction / tl.maximum(share, MIN_SHARE)
            s, _, _ = tilt(t, None if ENSEMBLE.FIXED else rows * 0.0, energy)
            total += tl.sum(tl.where(t == t, direction[:, None] * (t - s[:, None]), 0.0), 0).to(tl.float64)
    return total, tl.sum(loss, 0).to(tl.float32)


@triton.jit
def reweight(k, pull, steps, MP: tl.constexpr):
    """By query: a step of the teachers' energies along their pulls."""
    pairs = tl.load(scalar(k, PAIRS))
    step = steps.step * pull.to(tl.float32) / tl.where(pairs > 0.0, pairs, 1.0)
    store_energy(k, load_row(k, ENERGY, -float("inf"), MP) + step, MP)


@triton.jit
def store_pulls(k, pulls, pull, MP: tl.constexpr):
    """How fast a query's label loss, the mean over its pairs, falls with each teacher's weight; NaN where it has no pair, or
    the teacher takes no part."""
    pairs = tl.load(scalar(k, PAIRS))
    mean = pull.to(tl.float32) / tl.where(pairs > 0.0, pairs, float("nan"))
    there = load_row(k, ENERGY, -float("inf"), MP) > -float("inf")
    m = tl.arange(0, MP)
    tl.store(pulls + k.q * k.M + m, tl.where(there, mean, float("nan")), mask=m < k.M)


@triton.jit
def retilt(k, steps, how: tl.constexpr):
    """By query: a chunk's logits in the teachers' new weights."""
    BR: tl.constexpr = how.BR
    energy = load_row(k, ENERGY, -float("inf"), how.MP)
    for row in range(k.begin, k.padded, BR):
        rows = row + tl.arange(0, BR)
        s, scored, _ = tilt(calibrated(k, rows, how.MP), rows * 0.0, energy)
        store_u(k, rows, s, scored, 0, steps, how)


@triton.jit
def trace_loss(k, lists, losses, read, steps, how: tl.constexpr):
    """The ensemble's label loss, summed over the pairs in which a chunk's documents are the higher ones."""
    BR: tl.constexpr = how.BR
    near = near_rows(k, lists, U_GRID, how)
    columns = columns_of(k, near, SCORED_RANK)
    u = field(k, U + read)
    total = tl.zeros((BR,), tl.float64)
    for row in range(k.begin, k.end, BR):
        rows = row + tl.arange(0, BR)
        rank, gain = load_order(k, rows, SCORED_RANK, how)
        u_row = tl.load(u + rows, mask=rows < k.end, other=0.0)
        if near.mixed:
            loss, _ = label_losses(columns, u + near.begin, u_row, rank, gain, steps.offset, None, None, how)
            total += loss.to(tl.float64)
        if not how.DIRECT:
            if near.c_first < near.c_begin:
                total += label_field(losses, k, lists, U_GRID, u_row, rank, gain, how).to(tl.float64)
    return tl.sum(total, 0).to(tl.float32)


@triton.jit
def store_trace(k, trace, iteration, total):
    """The label loss of an iteration, the mean over the pairs."""
    pairs = tl.load(scalar(k, PAIRS))
    loss = tl.where(pairs > 0.0, total / tl.where(pairs > 0.0, pairs, 1.0), 0.0)
    tl.store(trace.pointer + k.q * plain(trace.query) + iteration, loss)


@triton.jit
def put_out(
    k, teachers, mask, order, logits, weights, ENSEMBLE: tl.constexpr, DIFFERENCES: tl.constexpr, how: tl.constexpr
):  # fmt: skip
    """A chunk's logits, and by document weights, in the tensors' order. DIFFERENCES: they are all that is wanted, so what is
    common stays off. Without PAIRS nothing was calibrated before."""
    BR: tl.constexpr = how.BR
    MP: tl.constexpr = how.MP
    m = tl.arange(0, MP)
    energy = load_row(k, ENERGY, -float("inf"), MP)
    for row in range(k.begin, k.end, BR):
        rows = row + tl.arange(0, BR)
        inside = rows < k.end
        if ENSEMBLE.PAIRS:
            slots = rows
            if order is not None:
                slots = tl.load(order + k.first + rows, mask=inside, other=0) - k.slot
            t = calibrated(k, rows, MP)
        else:
            slots, valid = slots_of(k, order, mask, rows)
            t = scaled(k, teachers, slots, valid, energy, ENSEMBLE.NORMALIZE, MP)
        exponent = None
        if not ENSEMBLE.FIXED:
            exponent = tl.load(field(k, EXPONENT) + rows, mask=inside, other=0.0)
        s, scored, w = tilt(t, exponent, energy)
        if not DIFFERENCES:
            s += tl.load(scalar(k, COMMON))
        tl.store(logits + k.first + slots, tl.where(scored, s, float("nan")), mask=inside)
        if ENSEMBLE.BY_DOCUMENT and weights is not None:
            at = (k.first + slots)[:, None] * k.M + m[None, :]
            tl.store(weights + at, w, mask=inside[:, None] & (m < k.M)[None, :])


@triton.jit
def put_out_weights(k, weights, MP: tl.constexpr):
    """By query: the teachers' weights."""
    m = tl.arange(0, MP)
    tl.store(weights + k.q * k.M + m, load_row(k, TEACHER_WEIGHT, 0.0, MP), mask=m < k.M)
