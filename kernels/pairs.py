"""Direct pair sums: what every document of a block of rows hears from all documents of its query.

A tile is BC columns by BR rows; the rows run along the threads, a few per thread and all columns in each, so that a thread
keeps its rows' numbers and sums in registers, columns are broadcast (one load serves a thread's rows), and no sum crosses
threads. Each row visits the whole query (the full square): an unordered pair is evaluated twice, but no program ever adds
into another one's sums, which keeps the result bitwise reproducible without atomics and lets the rows of a long query run
anywhere.

λ needs no case distinction per pair. With d = u_i − u_j and σ(−x) = 1 − σ(x),

    λ_i = Σ_{y_j ≠ y_i} ω_ij r_ij − Σ_{y_j > y_i} ω_ij,    r_ij = 1 / (1 + e^{d ∓ offset})    (− for j below i, + for j above)

the second sum a constant of the query. e^d = E_i F_j, F_j = e^{c − u_j} stored per document, and two pairs share one
reciprocal, 1/a + 1/b = (a + b) / (a b). Per pair: 5 multiply-adds, compares and selects, half a reciprocal. Where a query's
logits span more than NARROW (wide), an exponential and a reciprocal per pair.
"""

import triton
import triton.language as tl

# E F products of two pairs are multiplied: e^40 · e^40 is still a float32.
NARROW = tl.constexpr(40.0)


@triton.jit
def reciprocal(x, APPROX: tl.constexpr):
    # One instruction, to 1 ulp, where the division of two floats takes eight. x >= 1 here.
    if APPROX:
        y = tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
    else:
        y = 1.0 / x
    return y


@triton.jit
def multiply(a, b):
    return a * b


@triton.jit
def column(j, n, pointer, other, TAIL: tl.constexpr):
    """(BC, 1) values of the documents j; with TAIL the last tile may reach past the end, n, and finds `other` there."""
    if TAIL:
        value = tl.load(pointer + j, mask=j < n, other=other)
    else:
        value = tl.load(pointer + j)
    return value[:, None]


@triton.jit
def label_pull(
    u, u_row, ranks, rank_row, gains, gain_row, n, wide, offset,
    BR: tl.constexpr, BC: tl.constexpr, WEIGHTED: tl.constexpr, MARGIN: tl.constexpr, APPROX: tl.constexpr,
    TAIL: tl.constexpr,
):  # fmt: skip
    """Σ_{y_j ≠ y_i} ω_ij r_ij for the rows. `u` holds F_j, or u_j where `wide`; a NaN rank takes part in no pair."""
    nan = float("nan")
    total = tl.zeros((BR,), tl.float32)
    rank_row = rank_row[None, :]
    gain_row = gain_row[None, :]
    if wide:
        for begin in range(0, n, BC):
            j = begin + tl.arange(0, BC)
            rank = column(j, n, ranks, nan, TAIL)
            x = u_row[None, :] - column(j, n, u, 0.0, TAIL)
            if MARGIN:
                x += tl.where(rank_row > rank, -offset, offset)
            value = reciprocal(1.0 + tl.exp(tl.minimum(x, 80.0)), APPROX)
            if WEIGHTED:
                value *= tl.abs(gain_row - column(j, n, gains, 0.0, TAIL))
            total += tl.sum(tl.where((rank_row > rank) | (rank_row < rank), value, 0.0), 0)
    else:
        e = (1.0 / u_row)[None, :]
        e_below = e * tl.exp(-offset)
        e_above = e * tl.exp(offset)
        whole = n
        if TAIL:  # a tile with bounds of its own: in the others they would cost a third of the instructions
            whole = n // (2 * BC) * (2 * BC)
        for begin in range(0, whole, 2 * BC):
            total += pull_of_tile(
                u, ranks, rank_row, gains, gain_row, begin, n, e, e_below, e_above, BC, WEIGHTED, MARGIN, APPROX, False
            )
        if TAIL:
            if whole < n:
                total += pull_of_tile(
                    u, ranks, rank_row, gains, gain_row, whole, n, e, e_below, e_above, BC, WEIGHTED, MARGIN, APPROX, True
                )
    return total


@triton.jit
def pull_of_tile(
    u, ranks, rank_row, gains, gain_row, begin, n, e, e_below, e_above,
    BC: tl.constexpr, WEIGHTED: tl.constexpr, MARGIN: tl.constexpr, APPROX: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """What the rows hear from 2 BC columns; two of them share a reciprocal."""
    nan = float("nan")
    j = begin + tl.arange(0, BC)
    k = j + BC
    rank_j = column(j, n, ranks, nan, TAIL)
    rank_k = column(k, n, ranks, nan, TAIL)
    if MARGIN:
        a = 1.0 + tl.where(rank_row > rank_j, e_below, e_above) * column(j, n, u, 1.0, TAIL)
        b = 1.0 + tl.where(rank_row > rank_k, e_below, e_above) * column(k, n, u, 1.0, TAIL)
    else:
        a = 1.0 + e * column(j, n, u, 1.0, TAIL)
        b = 1.0 + e * column(k, n, u, 1.0, TAIL)
    if WEIGHTED:
        for_j = b * tl.abs(gain_row - column(j, n, gains, 0.0, TAIL))
        for_k = a * tl.abs(gain_row - column(k, n, gains, 0.0, TAIL))
    else:
        for_j = b
        for_k = a
    for_j = tl.where((rank_row > rank_j) | (rank_row < rank_j), for_j, 0.0)
    for_k = tl.where((rank_row > rank_k) | (rank_row < rank_k), for_k, 0.0)
    return tl.sum((for_j + for_k) * reciprocal(a * b, APPROX), 0)


@triton.jit
def label_ranks(labels, stride, mask, mask_stride, n, label_row, BR: tl.constexpr, BC: tl.constexpr, MASKED: tl.constexpr):
    """How many labelled documents of the query have a lower label: the labels' order in float32, whatever their dtype."""
    count = tl.zeros((BR,), tl.float32)
    label_row = label_row[None, :]
    for begin in range(0, n, BC):
        j = begin + tl.arange(0, BC)
        label = load_labels(labels, j, stride, mask, mask_stride, n, MASKED)[:, None]
        count += tl.sum(tl.where(label < label_row, 1.0, 0.0), 0)
    return count


@triton.jit
def load_labels(labels, i, stride, mask, mask_stride, n, MASKED: tl.constexpr):
    """Labels as float32, or float64 where float32 does not hold them all; NaN where there is no document or no finite label."""
    kind: tl.constexpr = labels.dtype.element_ty
    wide: tl.constexpr = kind == tl.float64 or kind == tl.int64 or kind == tl.int32
    dtype: tl.constexpr = tl.float64 if wide else tl.float32
    inside = load_valid(mask, i, mask_stride, n, MASKED)
    label = tl.load(labels + i.to(tl.int64) * stride, mask=inside, other=0).to(dtype)
    return tl.where(inside & (tl.abs(label) < float("inf")), label, float("nan"))


@triton.jit
def load_valid(mask, i, mask_stride, n, MASKED: tl.constexpr):
    inside = i < n
    if MASKED:
        inside = inside & (tl.load(mask + i.to(tl.int64) * mask_stride, mask=inside, other=0) != 0)
    return inside


@triton.jit
def pair_counts(
    ranks, rank_row, gains, gain_row, n, BR: tl.constexpr, BC: tl.constexpr, WEIGHTED: tl.constexpr, TAIL: tl.constexpr
):  # fmt: skip
    """Σ ω over the documents above, and below, each row."""
    above = tl.zeros((BR,), tl.float32)
    below = tl.zeros((BR,), tl.float32)
    for begin in range(0, n, BC):
        j = begin + tl.arange(0, BC)
        rank = column(j, n, ranks, float("nan"), TAIL)
        if WEIGHTED:
            weight = tl.abs(gain_row[None, :] - column(j, n, gains, 0.0, TAIL))
        else:
            weight = 1.0
        above += tl.sum(tl.where(rank > rank_row[None, :], weight, 0.0), 0)
        below += tl.sum(tl.where(rank < rank_row[None, :], weight, 0.0), 0)
    return above, below


@triton.jit
def label_losses(
    u, u_row, ranks, rank_row, gains, gain_row, n, offset,
    BR: tl.constexpr, BC: tl.constexpr, WEIGHTED: tl.constexpr, APPROX: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """Σ_below ω softplus(offset − (u_i − u_j)), and Σ_below ω p − Σ_above ω p, the direction that lowers it.

    Relative accuracy of every pair, however well ordered: with t = e^{−|x|}, p is t / (1 + t) or 1 / (1 + t).
    """
    loss = tl.zeros((BR,), tl.float32)
    slope = tl.zeros((BR,), tl.float32)
    for begin in range(0, n, BC):
        j = begin + tl.arange(0, BC)
        rank = column(j, n, ranks, float("nan"), TAIL)
        below = rank < rank_row[None, :]
        above = rank > rank_row[None, :]
        d = u_row[None, :] - column(j, n, u, 0.0, TAIL)
        x = tl.where(below, d, -d) - offset  # how far the pair is ordered right
        t = tl.exp(-tl.abs(x))
        q = reciprocal(1.0 + t, APPROX)
        p = tl.where(x > 0.0, t * q, q)
        value = tl.maximum(-x, 0.0) + tl.log(1.0 + t)
        if WEIGHTED:
            weight = tl.abs(gain_row[None, :] - column(j, n, gains, 0.0, TAIL))
            p *= weight
            value *= weight
        loss += tl.sum(tl.where(below, value, 0.0), 0)
        slope += tl.sum(tl.where(below, p, 0.0) - tl.where(above, p, 0.0), 0)
    return loss, slope


@triton.jit
def distillation_losses(
    z, z_row, s, s_row, rows, n, wide, z_middle, s_middle,
    BR: tl.constexpr, BC: tl.constexpr, APPROX: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """Σ_j BCE over the pairs in which i is the student's higher document, and Σ_j σ(z_i − z_j) − σ(s_i − s_j).

    With e = e^{−dz} and f = e^{−ds} both sigmoids share a reciprocal: σ(dz) − σ(ds) = (f − e) / ((1 + e)(1 + f)). The cross
    entropy log(1 + e) + dz (1 − σ(ds)) is taken from the side where dz >= 0, so nothing cancels and 1 + e <= 2: one logarithm
    serves the product of 64 pairs. `s` is NaN where a document takes no part.
    """
    loss = tl.zeros((BR,), tl.float32)
    slope = tl.zeros((BR,), tl.float32)
    z_row = z_row[None, :]
    s_row = s_row[None, :]
    row_used = s_row == s_row
    e_row = tl.exp(tl.where(wide, 0.0, z_middle - z_row))
    f_row = tl.exp(tl.where(wide, 0.0, s_middle - s_row))
    for stretch in range(0, n, 64):
        product = tl.full((BR,), 1.0, tl.float32)
        for begin in range(stretch, tl.minimum(stretch + 64, n), BC):
            j = begin + tl.arange(0, BC)
            z_j = column(j, n, z, 0.0, TAIL)
            s_j = column(j, n, s, float("nan"), TAIL)
            dz = z_row - z_j
            if wide:
                e = tl.exp(tl.minimum(-dz, 43.0))
                f = tl.exp(tl.minimum(s_j - s_row, 43.0))
            else:
                e = e_row * tl.exp(z_j - z_middle)
                f = f_row * tl.exp(s_j - s_middle)
            used = row_used & (s_j == s_j)
            r = reciprocal((1.0 + e) * (1.0 + f), APPROX)
            slope += tl.sum(tl.where(used, (f - e) * r, 0.0), 0)
            leads = used & ((dz > 0.0) | ((dz == 0.0) & (rows[None, :] < j[:, None])))
            product *= tl.reduce(tl.where(leads, 1.0 + e, 1.0), 0, multiply)
            loss += tl.sum(tl.where(leads, dz * (f * r * (1.0 + e)), 0.0), 0)
        loss += tl.log(product)
    return loss, slope
