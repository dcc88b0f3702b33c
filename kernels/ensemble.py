"""The ensemble's phases: calibrate the teachers, then exponentiated-gradient steps on their weights.

A phase is either for a block of BR rows (documents of one query) or for a whole query; kernels/pile.py strings them together
for a query of one program, kernels/long_ensemble.py has those of longer lists. The state between phases lies in a scratch
buffer, FIELDS + M floats per document and 5 M + SCALARS per query, which a short query's program finds in its L1.

The state is one exponent per document (or per teacher), never a weight per document and teacher: the ensemble logit is the
tilted mean s_i = Σ_m e^{a_i t_im} t_im / Σ_m e^{a_i t_im}, taken relative to the highest (a_i >= 0) or lowest teacher, so
that every exponent is <= 0 and differences of close teachers are exact.
"""

import triton
import triton.language as tl
from pile_fast.kernels.chunks import GAIN, RANK, gains_of
from pile_fast.kernels.fields import store_grid
from pile_fast.kernels.pairs import (
    NARROW,
    label_losses,
    label_pull,
    label_ranks,
    load_labels,
    load_valid,
    pair_counts,
)

# Fields of the scratch buffer, one float per document each.
# (0: RANK, of the label within the query, NaN = unlabelled; 2: GAIN. See kernels/chunks.py.)
SCORED_RANK = tl.constexpr(1)  # the same, NaN also where no teacher scored the document
PER_PAIR = tl.constexpr(3)  # 1 / k_i, 0 without pairs
ABOVE = tl.constexpr(4)  # Σ_{y_j > y_i} ω
EXPONENT = tl.constexpr(5)
U = tl.constexpr(6)  # e^{c − u}, or u where wide; u = s / temperature. Two of them: iterations read one and write the other
ROW = tl.constexpr(8)  # two, for sums over a query's rows; long lists keep e^{c − u} here, too, and u itself in U
FIELDS = tl.constexpr(10)  # the calibrated teachers follow, M per document

# Per query: MEAN, its correction, the square root of SCALE (the scale itself may be beyond float32), ENERGY (log weight but for
# a constant) and WEIGHT of each teacher, then scalars.
MIDDLE = tl.constexpr(0)
WIDE = tl.constexpr(1)
PAIRS = tl.constexpr(2)  # Σ_P ω
GRID = tl.constexpr(11)  # of u: origin, cells; kernels/fields.py
COMMON = tl.constexpr(17)  # what came off all teachers alike and goes back onto the logits
SCALARS = tl.constexpr(20)

MIN_SHARE = tl.constexpr(2.0**-10)  # see pile_fast/reference.py


@triton.jit
def load_teachers(teachers, slots, valid, stride_d, stride_m, M, energy, MP: tl.constexpr):
    """(BR, MP) float32, NaN = not present, as infinite scores are. `energy`: where some teachers do not take part."""
    m = tl.arange(0, MP)
    inside = valid[:, None] & (m < M)[None, :]
    at = slots.to(tl.int64)[:, None] * stride_d + m.to(tl.int64)[None, :] * stride_m
    t = tl.load(teachers + at, mask=inside, other=float("nan")).to(tl.float32)
    if energy is not None:
        t += tl.where(energy > -float("inf"), 0.0, float("nan"))[None, :]
    return t + (t - t)  # NaN where t is infinite, in two instructions and no mask: registers are short here


@triton.jit
def softmax_or_zero(energy):
    top = tl.max(energy, 0)
    e = tl.where(energy > -float("inf"), tl.exp(energy - top), 0.0)
    return e / tl.maximum(tl.sum(e, 0), 1e-30)


@triton.jit
def prior_energy(prior, prior_stride, M, MP: tl.constexpr):
    """The teachers' starting energies, −inf = not there."""
    inf = float("inf")
    m = tl.arange(0, MP)
    energy = tl.where(m < M, 0.0, -inf)
    if prior is not None:
        p = tl.load(prior + m.to(tl.int64) * prior_stride, mask=m < M, other=0.0).to(tl.float32)
        p = tl.where((p > 0.0) & (p < inf), p, 0.0)
        energy = tl.where(p > 0.0, tl.log(p / tl.maximum(tl.max(p, 0), 1e-37)), -inf)
    return energy


@triton.jit
def teacher_statistics(
    teachers, stride_d, stride_m, mask, mask_stride, prior, prior_stride, n, M, per_query, inv_temperature, offset,
    BR: tl.constexpr, MP: tl.constexpr, MASKED: tl.constexpr, NORMALIZE: tl.constexpr, TRACE: tl.constexpr,
):  # fmt: skip
    """Mean and scale of each teacher, its starting energy, and the range the ensemble's logits lie in."""
    inf = float("inf")
    energy = prior_energy(prior, prior_stride, M, MP)
    veto = None
    if prior is not None:
        veto = energy
    total = tl.zeros((MP,), tl.float64)
    count = tl.zeros((MP,), tl.float32)
    low = tl.full((MP,), inf, tl.float32)
    high = tl.full((MP,), -inf, tl.float32)
    for begin in range(0, n, BR):
        rows = begin + tl.arange(0, BR)
        valid = load_valid(mask, rows, mask_stride, n, MASKED)
        t = load_teachers(teachers, rows, valid, stride_d, stride_m, M, veto, MP)
        present = t == t
        total += tl.sum(tl.where(present, t, 0.0), 0).to(tl.float64)
        count += tl.sum(tl.where(present, 1.0, 0.0), 0)
        low = tl.minimum(low, tl.min(tl.where(present, t, inf), 0))
        high = tl.maximum(high, tl.max(tl.where(present, t, -inf), 0))
    at_least_one = tl.maximum(count, 1.0)
    mean = tl.zeros((MP,), tl.float32)
    correction = mean
    variance = mean
    if NORMALIZE != "none":
        mean = total.to(tl.float32) / at_least_one
        # t − mean is nearly exact, so what rounding the mean lost comes out of a second pass. It is lifted: two exact products.
        off = tl.zeros((MP,), tl.float32)  # small beside the deviation, and so is its rounding
        square = tl.zeros((MP,), tl.float64)
        up = lift(low, high)
        lifted_mean = mean * up
        for begin in range(0, n, BR):
            rows = begin + tl.arange(0, BR)
            valid = load_valid(mask, rows, mask_stride, n, MASKED)
            t = load_teachers(teachers, rows, valid, stride_d, stride_m, M, veto, MP)
            d = tl.where(t == t, t * up[None, :] - lifted_mean[None, :], 0.0)
            off += tl.sum(d, 0)
            square += tl.sum(d * d, 0).to(tl.float64)
        off = off / at_least_one
        correction = off / up
        variance = square.to(tl.float32) / at_least_one - off * off
    store_statistics(
        count, mean, correction, variance, low, high, energy, M, per_query, inv_temperature, offset, False, MP, NORMALIZE, TRACE
    )


@triton.jit
def lift(low, high):
    """A power of two that brings each teacher's range to where squares neither vanish nor overflow in float32."""
    size = high - low
    return tl.where(size < 9e-16, 1.2676506002282294e30, tl.where(size > 1e15, 7.888609052210118e-31, 1.0))  # 2^100, 2^-100


@triton.jit
def store_statistics(
    count, mean, correction, variance, low, high, energy, M, per_query, inv_temperature, offset, linear,
    MP: tl.constexpr, NORMALIZE: tl.constexpr, TRACE: tl.constexpr,
):  # fmt: skip
    """`variance` is that of the lifted logits."""
    inf = float("inf")
    m = tl.arange(0, MP)
    present = count > 0.0
    root_scale = tl.full((MP,), 1.0, tl.float32)
    common = 0.0
    if NORMALIZE == "zscore":
        # By its extremes: the rounding of a constant's mean must not be blown up to unit scale.
        deviation = tl.sqrt(tl.maximum(variance, 1e-37))
        root_scale = tl.where(high > low, tl.sqrt(lift(low, high)) / tl.sqrt(deviation), 0.0)
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
    bottom = tl.where(anything, bottom, 0.0) * inv_temperature
    top = tl.where(anything, top, 0.0) * inv_temperature
    wide = tl.where(top - bottom + tl.abs(offset) <= NARROW, 0.0, 1.0)
    if TRACE:  # its losses want u itself
        wide = 1.0
    tl.store(per_query + m, mean, mask=m < M)
    tl.store(per_query + M + m, correction, mask=m < M)
    tl.store(per_query + 2 * M + m, root_scale, mask=m < M)
    tl.store(per_query + 3 * M + m, energy, mask=m < M)
    tl.store(per_query + 4 * M + m, softmax_or_zero(energy), mask=m < M)
    tl.store(per_query + 5 * M + MIDDLE, (bottom + top) / 2.0)
    tl.store(per_query + 5 * M + WIDE, wide)
    tl.store(per_query + 5 * M + COMMON, common)
    store_grid(per_query + 5 * M + GRID, bottom, top, linear)


@triton.jit
def of_teachers(per_query, k: tl.constexpr, M, MP: tl.constexpr, other):
    m = tl.arange(0, MP)
    return tl.load(per_query + k * M + m, mask=m < M, other=other)


@triton.jit
def rank_rows(
    labels, stride, mask, mask_stride, n, padded, rows, fields, S,
    BR: tl.constexpr, BC: tl.constexpr, MASKED: tl.constexpr, WEIGHT: tl.constexpr,
):  # fmt: skip
    label = load_labels(labels, rows, stride, mask, mask_stride, n, MASKED)
    rank = label_ranks(labels, stride, mask, mask_stride, n, label, BR, BC, MASKED)
    inside = rows < padded
    tl.store(fields + RANK * S + rows, tl.where(label == label, rank, float("nan")), mask=inside)
    if WEIGHT != "none":
        inf = float("inf")
        lowest = tl.full((BR,), inf, label.dtype)
        highest = -lowest
        for begin in range(0, n, BR):
            other = load_labels(labels, begin + tl.arange(0, BR), stride, mask, mask_stride, n, MASKED)
            lowest = tl.minimum(lowest, tl.where(other == other, other, inf))
            highest = tl.maximum(highest, tl.where(other == other, other, -inf))
        tl.store(fields + GAIN * S + rows, gains_of(label, tl.min(lowest, 0), tl.max(highest, 0), WEIGHT), mask=inside)


@triton.jit
def calibrated(table, rows, n, M, MP: tl.constexpr):
    m = tl.arange(0, MP)
    inside = (rows < n)[:, None] & (m < M)[None, :]
    return tl.load(table + rows.to(tl.int64)[:, None] * M + m[None, :], mask=inside, other=float("nan"))


@triton.jit
def tilt(t, slope, energy):
    """The ensemble logits of the rows, whether any teacher scored them, and the teachers' weights."""
    inf = float("inf")
    present = t == t
    low = tl.min(tl.where(present, t, inf), 1)
    high = tl.max(tl.where(present, t, -inf), 1)
    scored = high >= low
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
def store_u(s, scored, rows, padded, fields, S, to, per_query, M, inv_temperature):
    middle = tl.load(per_query + 5 * M + MIDDLE)
    # Two pairs share a reciprocal: a document out of all pairs must not be out of range.
    u = tl.where(scored, s * inv_temperature, middle)
    if tl.load(per_query + 5 * M + WIDE) == 0.0:
        u = tl.exp(middle - u)
    tl.store(fields + (U + to) * S + rows, u, mask=rows < padded)


@triton.jit
def calibrate_rows(
    teachers, stride_d, stride_m, mask, mask_stride, n, padded, M, rows, fields, table, S, per_query, inv_temperature,
    MP: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    inside = rows < padded
    valid = load_valid(mask, rows, mask_stride, n, MASKED)
    s, scored, _ = calibrate_and_start(
        teachers, rows, valid, stride_d, stride_m, M, rows, inside, fields, table, S, per_query, MP
    )
    store_u(s, scored, rows, padded, fields, S, 0, per_query, M, inv_temperature)


@triton.jit
def calibrate_and_start(
    teachers, slots, valid, stride_d, stride_m, M, rows, inside, fields, table, S, per_query, MP: tl.constexpr
):  # fmt: skip
    """Calibrate the teachers at `slots` into the table's `rows`. The mean ensemble's logits, where they are, SCORED_RANK."""
    m = tl.arange(0, MP)
    energy = of_teachers(per_query, 3, M, MP, -float("inf"))
    t = load_teachers(teachers, slots, valid, stride_d, stride_m, M, energy, MP)
    t = t - of_teachers(per_query, 0, M, MP, 0.0)[None, :]
    root_scale = of_teachers(per_query, 2, M, MP, 0.0)[None, :]
    t = (t - of_teachers(per_query, 1, M, MP, 0.0)[None, :]) * root_scale * root_scale
    at = rows.to(tl.int64)[:, None] * M + m[None, :]
    tl.store(table + at, t, mask=inside[:, None] & (m < M)[None, :])
    slope = rows * 0.0
    s, scored, _ = tilt(t, slope, energy)
    rank = tl.load(fields + RANK * S + rows, mask=inside, other=float("nan"))
    rank = tl.where(scored, rank, float("nan"))
    tl.store(fields + SCORED_RANK * S + rows, rank, mask=inside)
    tl.store(fields + EXPONENT * S + rows, slope, mask=inside)
    return s, scored, rank


@triton.jit
def count_rows(rows, n, padded, fields, S, BR: tl.constexpr, BC: tl.constexpr, WEIGHTED: tl.constexpr):
    inside = rows < n
    ranks = fields + SCORED_RANK * S
    gains = fields + GAIN * S
    rank, gain = load_order(rows, n, ranks, gains, WEIGHTED)
    above, below = pair_counts(ranks, rank, gains, gain, padded, BR, BC, WEIGHTED, False)
    tl.store(fields + ABOVE * S + rows, above, mask=inside)
    tl.store(fields + ROW * S + rows, below, mask=inside)
    k = above + below
    tl.store(fields + PER_PAIR * S + rows, tl.where(k > 0.0, 1.0 / tl.where(k > 0.0, k, 1.0), 0.0), mask=inside)


@triton.jit
def load_order(rows, n, ranks, gains, WEIGHTED: tl.constexpr):
    """The rows' ranks and gains; gains are the ranks again, and unused, where no pair is weighted."""
    rank = tl.load(ranks + rows, mask=rows < n, other=float("nan"))
    gain = rank
    if WEIGHTED:
        gain = tl.load(gains + rows, mask=rows < n, other=0.0)
    return rank, gain


@triton.jit
def sum_field(fields, k: tl.constexpr, S, n, BR: tl.constexpr):
    """Of one query, summed in float64 and in one fixed order. (No float64 divisions anywhere: they are calls.)"""
    total = tl.zeros((BR,), tl.float64)
    for begin in range(0, n, BR):
        i = begin + tl.arange(0, BR)
        total += tl.load(fields + k * S + i, mask=i < n, other=0.0).to(tl.float64)
    return tl.sum(total, 0).to(tl.float32)


@triton.jit
def step_exponents(t, direction, rows, inside, fields, S, per_query, M, step, MP: tl.constexpr):
    """By document: a step of the rows' exponents along λ. Their new logits, and whether any teacher scored them."""
    exponent = tl.load(fields + EXPONENT * S + rows, mask=inside, other=0.0)
    exponent += step * direction * tl.load(fields + PER_PAIR * S + rows, mask=inside, other=0.0)
    tl.store(fields + EXPONENT * S + rows, exponent, mask=inside)
    s, scored, _ = tilt(t, exponent, of_teachers(per_query, 3, M, MP, -float("inf")))
    return s, scored


@triton.jit
def direction_by_share(t, direction, per_query, M, MP: tl.constexpr):
    """By query: λ_i / share_i, by the weight of the teachers that scored a document."""
    share = tl.sum(tl.where(t == t, of_teachers(per_query, 4, M, MP, 0.0)[None, :], 0.0), 1)
    return direction / tl.maximum(share, MIN_SHARE)


@triton.jit
def teacher_pulls(t, direction, rows, energy):
    """By query: what the rows, each with its λ_i / share_i, add to each teacher's energy."""
    s, _, _ = tilt(t, rows * 0.0, energy)
    return tl.sum(tl.where(t == t, direction[:, None] * (t - s[:, None]), 0.0), 0)


@triton.jit
def iterate_rows(
    rows, n, padded, M, fields, table, S, read, per_query, inv_temperature, offset, step,
    BR: tl.constexpr, BC: tl.constexpr, MP: tl.constexpr, BY_DOCUMENT: tl.constexpr, WEIGHTED: tl.constexpr,
    MARGIN: tl.constexpr, APPROX: tl.constexpr,
):  # fmt: skip
    """λ of the rows; by document also their new exponents and logits, by query λ_i / share_i."""
    inside = rows < n
    u = fields + (U + read) * S
    ranks = fields + SCORED_RANK * S
    gains = fields + GAIN * S
    rank, gain = load_order(rows, n, ranks, gains, WEIGHTED)
    u_row = tl.load(u + rows, mask=inside, other=1.0)
    wide = tl.load(per_query + 5 * M + WIDE) != 0.0
    pull = label_pull(u, u_row, ranks, rank, gains, gain, padded, wide, offset, BR, BC, WEIGHTED, MARGIN, APPROX, False)
    direction = pull - tl.load(fields + ABOVE * S + rows, mask=inside, other=0.0)
    t = calibrated(table, rows, n, M, MP)
    if BY_DOCUMENT:
        s, scored = step_exponents(t, direction, rows, inside, fields, S, per_query, M, step, MP)
        store_u(s, scored, rows, padded, fields, S, 1 - read, per_query, M, inv_temperature)
    else:
        tl.store(fields + ROW * S + rows, direction_by_share(t, direction, per_query, M, MP), mask=inside)


@triton.jit
def reweight_query(n, M, fields, table, S, per_query, step, BR: tl.constexpr, MP: tl.constexpr):
    energy = of_teachers(per_query, 3, M, MP, -float("inf"))
    pull = tl.zeros((MP,), tl.float64)
    for begin in range(0, n, BR):
        rows = begin + tl.arange(0, BR)
        t = calibrated(table, rows, n, M, MP)
        direction = tl.load(fields + ROW * S + rows, mask=rows < n, other=0.0)
        pull += teacher_pulls(t, direction, rows, energy).to(tl.float64)
    store_energy(pull, per_query, M, step, MP)


@triton.jit
def store_energy(pull, per_query, M, step, MP: tl.constexpr):
    m = tl.arange(0, MP)
    energy = of_teachers(per_query, 3, M, MP, -float("inf"))
    pairs = tl.load(per_query + 5 * M + PAIRS)
    energy += step * pull.to(tl.float32) / tl.where(pairs > 0.0, pairs, 1.0)
    tl.store(per_query + 3 * M + m, energy, mask=m < M)
    tl.store(per_query + 4 * M + m, softmax_or_zero(energy), mask=m < M)


@triton.jit
def tilt_rows(rows, n, padded, M, fields, table, S, per_query, inv_temperature, MP: tl.constexpr):
    energy = of_teachers(per_query, 3, M, MP, -float("inf"))
    s, scored, _ = tilt(calibrated(table, rows, n, M, MP), rows * 0.0, energy)
    store_u(s, scored, rows, padded, fields, S, 0, per_query, M, inv_temperature)


@triton.jit
def trace_rows(
    rows, n, padded, fields, S, read, offset, BR: tl.constexpr, BC: tl.constexpr, WEIGHTED: tl.constexpr, APPROX: tl.constexpr
):  # fmt: skip
    u = fields + (U + read) * S
    ranks = fields + SCORED_RANK * S
    gains = fields + GAIN * S
    rank, gain = load_order(rows, n, ranks, gains, WEIGHTED)
    u_row = tl.load(u + rows, mask=rows < n, other=0.0)
    loss, _ = label_losses(u, u_row, ranks, rank, gains, gain, padded, offset, BR, BC, WEIGHTED, APPROX, False)
    tl.store(fields + (ROW + 1) * S + rows, loss, mask=rows < n)


@triton.jit
def output_rows(
    rows, n, M, fields, table, S, per_query, logits, weights,
    BR: tl.constexpr, MP: tl.constexpr, BY_DOCUMENT: tl.constexpr, DIFFERENCES: tl.constexpr,
):  # fmt: skip
    """DIFFERENCES: they are all that is wanted, so what is common stays off."""
    inside = rows < n
    m = tl.arange(0, MP)
    exponent = tl.load(fields + EXPONENT * S + rows, mask=inside, other=0.0)
    energy = of_teachers(per_query, 3, M, MP, -float("inf"))
    s, scored, w = tilt(calibrated(table, rows, n, M, MP), exponent, energy)
    if not DIFFERENCES:
        s += tl.load(per_query + 5 * M + COMMON)
    tl.store(logits + rows, tl.where(scored, s, float("nan")), mask=inside)
    if BY_DOCUMENT and weights is not None:
        at = rows.to(tl.int64)[:, None] * M + m[None, :]
        tl.store(weights + at, w, mask=inside[:, None] & (m < M)[None, :])
