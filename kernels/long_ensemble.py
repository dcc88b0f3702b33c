"""The ensemble of lists longer than one program takes alone: each kernel is a phase, each program one chunk of documents
(kernels/chunks.py) or, for the sums over chunks, one query; the end of a launch is the barrier.

    statistics → query_statistics → calibrate → counts → totals
    T times: (deposit → super → collect → apply, kernels/fields.py) → iterate [→ reweight → tilt, by query]
    [pull → pull_sum, by queries' shared weights]
    output

Without label pairs, for the ensemble by given weights alone: statistics → query_statistics → output.

All documents lie by rising label, their teachers calibrated and copied into that order once. What a document hears from its
own block comes from direct sums (kernels/pairs.py), from all others out of its block's field. Chunks of unlabelled documents
only calibrate and put out.

Floor of an iteration, per document: 4 M + 44 bytes, M exponentials, half a reciprocal for each document of its block where that
has several labels, and the fields' cost (kernels/fields.py). Long enough lists are bound by bytes, shorter ones by the latency
of the launches.
"""

import triton
import triton.language as tl
from pile_fast.kernels.chunks import open_chunk, open_query, sum_partials
from pile_fast.kernels.ensemble import (
    calibrate, count_pairs, iterate, lift, prior_energy, put_out, put_out_weights, retilt, reweight, statistics,
    store_pulls, store_statistics, store_trace, trace_loss,
)  # fmt: skip
from pile_fast.kernels.layout import (
    COUNT, GAINS, HIGH, LOW, NUMBER, OFF, PAIR_SUM, PAIRS, PARTIALS, PIVOT, PULL, RANK, SQUARE, TRACE, field, partial,
    partials_of, scalar, teacher_partial,
)  # fmt: skip


@triton.jit
def statistics_kernel(state, lists, teachers, mask, prior, NORMALIZE: tl.constexpr, how: tl.constexpr):
    """Each teacher's statistics in a chunk; the mean is a pivot for those of the query."""
    k = open_chunk(state, lists)
    if k.n == 0:
        return
    count, mean, off, square, low, high = statistics(k, teachers, mask, lists.order, prior, NORMALIZE, how)
    m = tl.arange(0, how.MP)
    tl.store(teacher_partial(k, COUNT) + m, count, mask=m < k.M)
    tl.store(teacher_partial(k, PIVOT) + m, mean, mask=m < k.M)
    tl.store(teacher_partial(k, OFF) + m, off / lift(low, high), mask=m < k.M)
    tl.store(teacher_partial(k, SQUARE) + m, square, mask=m < k.M)
    tl.store(teacher_partial(k, LOW) + m, low, mask=m < k.M)
    tl.store(teacher_partial(k, HIGH) + m, high, mask=m < k.M)


@triton.jit
def load_partials(k, NAME: tl.constexpr, c, other, MP: tl.constexpr):
    """(chunks, MP) a query's partial sums of that name, of its chunks c."""
    m = tl.arange(0, MP)
    inside = (c < k.c_last)[:, None] & (m < k.M)[None, :]
    return tl.load(partials_of(k, c)[:, None] + PARTIALS + NAME * k.M + m[None, :], mask=inside, other=other)


@triton.jit
def query_statistics_kernel(
    state, lists, prior, steps, NORMALIZE: tl.constexpr, WINDOW: tl.constexpr, TILE: tl.constexpr, how: tl.constexpr
):  # fmt: skip
    """Mean, scale and starting energy of a query's teachers, and the grid over the range its ensemble lies in."""
    k = open_query(state, lists)
    MP: tl.constexpr = how.MP
    inf = float("inf")
    count = tl.zeros((MP,), tl.float64)
    total = count
    low = tl.full((MP,), inf, tl.float32)
    high = -low
    for begin in range(k.c_first, k.c_last, TILE):
        c = begin + tl.arange(0, TILE)
        number = load_partials(k, COUNT, c, 0.0, MP).to(tl.float64)
        pivot = load_partials(k, PIVOT, c, 0.0, MP).to(tl.float64)
        off = load_partials(k, OFF, c, 0.0, MP).to(tl.float64)
        count += tl.sum(number, 0)
        total += tl.sum(number * pivot + off, 0)
        low = tl.minimum(low, tl.min(load_partials(k, LOW, c, inf, MP), 0))
        high = tl.maximum(high, tl.max(load_partials(k, HIGH, c, -inf, MP), 0))
    number = count.to(tl.float32)
    at_least_one = tl.maximum(number, 1.0)
    mean = tl.zeros((MP,), tl.float32)
    correction = mean
    variance = mean
    if NORMALIZE != "none" and NORMALIZE != "minmax":
        mean = total.to(tl.float32) / at_least_one
        # What rounding the mean lost.
        correction = (total - mean.to(tl.float64) * count).to(tl.float32) / at_least_one
        centre = mean.to(tl.float64) + correction.to(tl.float64)
        squares = tl.zeros((MP,), tl.float64)
        up = lift(low, high).to(tl.float64)[None, :]
        for begin in range(k.c_first, k.c_last, TILE):
            c = begin + tl.arange(0, TILE)
            some = load_partials(k, COUNT, c, 0.0, MP).to(tl.float64)
            pivot = load_partials(k, PIVOT, c, 0.0, MP).to(tl.float64)
            off = load_partials(k, OFF, c, 0.0, MP).to(tl.float64)
            square = load_partials(k, SQUARE, c, 0.0, MP).to(tl.float64)
            # Each chunk lifted its squares by its own range; back by powers of two, and on by the query's.
            chunk_lift = lift(load_partials(k, LOW, c, 0.0, MP), load_partials(k, HIGH, c, 0.0, MP))
            back = tl.where(some > 0.0, 1.0 / chunk_lift, 1.0).to(tl.float64) * up
            d = (pivot - centre[None, :]) * up
            squares += tl.sum(square * back * back + d * (2.0 * off * up + some * d), 0)
        variance = squares.to(tl.float32) / at_least_one
    energy = prior_energy(prior, k, MP)
    store_statistics(
        k, number, mean, correction, variance, low, high, energy, steps, k.n >= WINDOW, NORMALIZE, False, MP
    )  # fmt: skip


@triton.jit
def calibrate_kernel(state, lists, teachers, mask, steps, ENSEMBLE: tl.constexpr, how: tl.constexpr):
    """Calibrated teachers by position, the mean ensemble, and how many documents pairs count."""
    k = open_chunk(state, lists)
    if k.n == 0:
        return
    number, gains = calibrate(k, teachers, mask, lists.order, steps, ENSEMBLE, how)
    tl.store(partial(k, NUMBER), number)
    tl.store(partial(k, GAINS), gains)


@triton.jit
def counts_kernel(state, lists, how: tl.constexpr):
    """Σ ω over each document's pairs, and over all of a chunk."""
    k = open_chunk(state, lists)
    if k.n == 0:
        return
    tl.store(partial(k, PAIR_SUM), count_pairs(k, lists, how))


@triton.jit
def totals_kernel(state, lists):
    """Σ ω over a query's pairs."""
    k = open_query(state, lists)
    tl.store(scalar(k, PAIRS), sum_partials(k, PAIR_SUM, k.c_first, k.c_last).to(tl.float32))


@triton.jit
def unlabelled(k):
    """Whether no document of a chunk has a label: they lie last."""
    rank = tl.load(field(k, RANK) + k.begin)
    return rank != rank


@triton.jit(do_not_specialize=["read"])
def iterate_kernel(
    state, lists, pulls, losses, read, steps, ENSEMBLE: tl.constexpr, LOSS: tl.constexpr, how: tl.constexpr
):  # fmt: skip
    """λ of a chunk; by document also the new exponents and logits, else each teacher's pull. With LOSS also what trace_kernel
    gives."""
    k = open_chunk(state, lists)
    if k.n == 0:
        return
    MP: tl.constexpr = how.MP
    m = tl.arange(0, MP)
    if unlabelled(k):
        if not ENSEMBLE.BY_DOCUMENT:
            tl.store(teacher_partial(k, PULL) + m, tl.zeros((MP,), tl.float32), mask=m < k.M)
        if LOSS:
            tl.store(partial(k, TRACE), 0.0)
        return
    total, loss = iterate(k, lists, pulls, losses, read, steps, ENSEMBLE, LOSS, how)
    if not ENSEMBLE.BY_DOCUMENT:
        tl.store(teacher_partial(k, PULL) + m, total.to(tl.float32), mask=m < k.M)
    if LOSS:
        tl.store(partial(k, TRACE), loss)


@triton.jit
def sum_pulls(k, TILE: tl.constexpr, MP: tl.constexpr):
    """Σ of the chunks' pulls on each teacher, in float64 and one fixed order."""
    pull = tl.zeros((MP,), tl.float64)
    for begin in range(k.c_first, k.c_last, TILE):
        pull += tl.sum(load_partials(k, PULL, begin + tl.arange(0, TILE), 0.0, MP).to(tl.float64), 0)
    return pull


@triton.jit
def reweight_kernel(state, lists, steps, TILE: tl.constexpr, how: tl.constexpr):
    """The teachers' new energies and weights, by query."""
    k = open_query(state, lists)
    reweight(k, sum_pulls(k, TILE, how.MP), steps, how.MP)


@triton.jit
def pull_sum_kernel(state, lists, pulls, TILE: tl.constexpr, how: tl.constexpr):
    """Each query's pull on the teachers."""
    k = open_query(state, lists)
    store_pulls(k, pulls, sum_pulls(k, TILE, how.MP), how.MP)


@triton.jit
def tilt_kernel(state, lists, steps, how: tl.constexpr):
    """The ensemble's logits in the teachers' new weights, by query."""
    k = open_chunk(state, lists)
    if k.n == 0:
        return
    retilt(k, steps, how)


@triton.jit(do_not_specialize=["read"])
def trace_kernel(state, lists, losses, read, steps, how: tl.constexpr):
    """Label losses of the pairs in which a chunk's documents are the higher ones."""
    k = open_chunk(state, lists)
    if k.n == 0:
        return
    if unlabelled(k):
        tl.store(partial(k, TRACE), 0.0)
        return
    tl.store(partial(k, TRACE), trace_loss(k, lists, losses, read, steps, how))


@triton.jit(do_not_specialize=["iteration"])
def trace_sum_kernel(state, lists, trace, iteration):
    """The label loss of an iteration, by query."""
    k = open_query(state, lists)
    store_trace(k, trace, iteration, sum_partials(k, TRACE, k.c_first, k.c_last).to(tl.float32))


@triton.jit
def output_kernel(
    state, lists, teachers, mask, logits, weights, ENSEMBLE: tl.constexpr, DIFFERENCES: tl.constexpr, how: tl.constexpr
):  # fmt: skip
    """Logits (DIFFERENCES: they are all that is wanted), and by document weights, back in the tensors' order."""
    k = open_chunk(state, lists)
    if k.n == 0:
        return
    put_out(k, teachers, mask, lists.order, logits, weights, ENSEMBLE, DIFFERENCES, how)


@triton.jit
def weights_kernel(state, lists, weights, how: tl.constexpr):
    """The teachers' weights, by query."""
    put_out_weights(open_query(state, lists), weights, how.MP)
