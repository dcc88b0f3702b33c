"""Cross entropy of the student's and the target's pairwise probabilities, over all pairs of documents with a target.

Direct sums take a reciprocal per pair and two exponentials per column of a tile. In linear time, with κ = σ − 1/2 and
ψ(v) = softplus(v) − v/2, even,

    Σ_{i<j} BCE = Σ_i [ (Σ_j ψ(z_j − z_i) − log 2) / 2 + z_i Σ_j κ(s_j − s_i) ]
    slope_i     = Σ_j κ(s_j − s_i) − κ(z_j − z_i)

so two fields give the slopes and a third the loss. A query whose logits span more cells than a grid has is summed directly.

Where documents have weights a pair counts c_i c_j: fields are of weighted moments, and direct sums take a logarithm per pair.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import triton
import triton.language as tl
from pile_fast.kernels.chunks import chunks_before, query_chunks
from pile_fast.kernels.fields import CELL, LOSS, TARGET_CELLS, UP, act, evaluate, grid_of, load_grid
from pile_fast.kernels.layout import (
    FIELD, LOSS_WIDE, MAX_CELLS, S_GRID, S_MIDDLE, S_SCALED, Z_GRID, Z_MIDDLE, Z_SCALED, C, P, field, scalar,
)  # fmt: skip
from pile_fast.kernels.loss import half_of_others, load_c, load_scaled
from pile_fast.kernels.pairs import column, reciprocal
from torch import Tensor

if TYPE_CHECKING:
    from pile_fast.backends.triton_long import LongLists


def fields(lists: LongLists) -> tuple[Tensor, Tensor]:
    """A query's documents on each other: pulls of student and target, and the student's losses."""
    lists.room(2, 1)
    pulls, losses = lists.floats(lists.blocks, 2, FIELD.value), lists.floats(lists.blocks, FIELD.value)
    lists.sum_moments(Z_SCALED.value, S_SCALED.value, Z_GRID.value, of_self=True, has_c=lists.batch.weights is not None)
    lists.launch(apply_kernel, (lists.queries, 2), lists.moments, lists.matrices(0.0), pulls, losses, Z_GRID.value, num_warps=4)
    return pulls, losses


@triton.jit(do_not_specialize=["grid"])
def apply_kernel(state, lists, moments, tables, pulls, losses, grid):
    """Fields of a query's documents on each other, at the query's first block: pulls[student, target], Σ_j κ(u_j − u), one of
    them a program, and losses, Σ_j ψ(u_j − u), at z."""
    q = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1)
    c_first, c_last, _ = query_chunks(q, lists)
    _, cells = load_grid(grid_of(state, q, grid + 2 * k))
    cells = cells.to(tl.int32)
    if (c_first == c_last) | (cells == 0):
        return
    block = tl.load(lists.chunk_block + c_first).to(tl.int64)
    p = tl.arange(0, P)[None, :]
    s = tl.arange(0, MAX_CELLS)
    source = moments.sides + (block * 2 + k) * FIELD
    weight = tl.load(source + s * P, mask=s < cells, other=0.0)
    place = tl.load(source + s * P + 1, mask=s < cells, other=0.0)
    half = tl.sum(weight, 0) / 2.0
    for begin in range(0, cells, TARGET_CELLS):
        c = begin + tl.arange(0, TARGET_CELLS)
        at = c[:, None] * P + p
        inside = (c < cells)[:, None]
        f = act(tables, source, c, cells, 0.0, UP)
        tl.store(pulls + (block * 2 + k) * FIELD + at, f - tl.where(p == 0, half, 0.0), mask=inside)
        if k == 0:
            away = CELL * (s[None, :] - c[:, None]).to(tl.float32)
            value = tl.sum(weight[None, :] * away + place[None, :], 1) / 2.0
            f = act(tables, source, c, cells, 0.0, LOSS)
            f -= tl.where(p == 0, value[:, None], tl.where(p == 1, -half, 0.0))
            tl.store(losses + block * FIELD + at, f, mask=inside)


class State(NamedTuple):
    """Whether a query's pairs are summed directly, whether its logits span more than NARROW, and their middles."""

    direct: Any
    wide: Any
    z_middle: Any
    s_middle: Any


@triton.jit
def enter(k, lists, how: tl.constexpr):
    """The query's numbers."""
    direct = tl.full((), 1, tl.int1)
    if not how.DIRECT:
        direct = (tl.load(scalar(k, Z_GRID) + 1) == 0.0) | (tl.load(scalar(k, S_GRID) + 1) == 0.0)
    wide = tl.load(scalar(k, LOSS_WIDE)) != 0.0
    return State(direct, wide, tl.load(scalar(k, Z_MIDDLE)), tl.load(scalar(k, S_MIDDLE)))


@triton.jit
def rows(k, lists, rows, state, pulls, losses, numbers, how: tl.constexpr):
    """Losses of the pairs in which a document is the student's higher one, slopes over all, and half of its pairs."""
    BR: tl.constexpr = how.BR
    z, s = load_scaled(k, rows)
    loss = tl.zeros((BR,), tl.float32)
    slope = loss
    if state.direct:
        loss, slope = direct_sums(k, rows, z, s, state, how)
    if not how.DIRECT:
        if state.direct == 0:
            z_origin, z_cells = load_grid(scalar(k, Z_GRID))
            s_origin, s_cells = load_grid(scalar(k, S_GRID))
            block = tl.load(lists.chunk_block + chunks_before(lists, k.first)).to(tl.int64)
            takes = s == s
            of_z = evaluate(pulls + block * 2 * FIELD, z, z_origin, z_cells, takes)
            of_s = evaluate(pulls + (block * 2 + 1) * FIELD, tl.where(takes, s, 0.0), s_origin, s_cells, takes)
            itself = evaluate(losses + block * FIELD, z, z_origin, z_cells, takes)
            c = load_c(k, rows, how)
            slope = c * (of_s - of_z)
            loss = tl.where(takes, c * (0.5 * (itself - c * 0.6931471805599453) + (z - state.z_middle) * of_s), 0.0)
    return loss, slope, half_of_others(k, s)


@triton.jit
def multiply(a, b):
    """For a product over columns."""
    return a * b


@triton.jit
def direct_sums(k, rows, z_row, s_row, state, how: tl.constexpr):
    """Σ_j BCE over the pairs in which i is the student's higher document, and Σ_j σ(z_i − z_j) − σ(s_i − s_j).

    With e = e^{−dz} and f = e^{−ds} both sigmoids share a reciprocal: σ(dz) − σ(ds) = (f − e) / ((1 + e)(1 + f)). The cross
    entropy log(1 + e) + dz (1 − σ(ds)) is taken from the side where dz >= 0, so nothing cancels and 1 + e <= 2: one logarithm
    serves the product of 64 pairs.
    """
    BR: tl.constexpr = how.BR
    TAIL: tl.constexpr = not how.ALONE
    n = k.padded if how.ALONE else k.n
    z_columns = field(k, Z_SCALED)
    s_columns = field(k, S_SCALED)
    wide = state.wide
    loss = tl.zeros((BR,), tl.float32)
    slope = tl.zeros((BR,), tl.float32)
    z_row = z_row[None, :]
    s_row = s_row[None, :]
    row_used = s_row == s_row
    e_row = tl.exp(tl.where(wide, 0.0, state.z_middle - z_row))
    f_row = tl.exp(tl.where(wide, 0.0, state.s_middle - s_row))
    for stretch in range(0, n, 64):
        product = tl.full((BR,), 1.0, tl.float32)
        for begin in range(stretch, tl.minimum(stretch + 64, n), how.BC):
            j = begin + tl.arange(0, how.BC)
            z_j = column(j, n, z_columns, 0.0, TAIL)
            s_j = column(j, n, s_columns, float("nan"), TAIL)
            dz = z_row - z_j
            if wide:
                e = tl.exp(tl.minimum(-dz, 43.0))
                f = tl.exp(tl.minimum(s_j - s_row, 43.0))
            else:
                e = e_row * tl.exp(z_j - state.z_middle)
                f = f_row * tl.exp(s_j - state.s_middle)
            used = row_used & (s_j == s_j)
            r = reciprocal((1.0 + e) * (1.0 + f), how.APPROX)
            gap = (f - e) * r
            if how.HAS_C:
                c = column(j, n, field(k, C), 0.0, TAIL)
                gap *= c
            slope += tl.sum(tl.where(used, gap, 0.0), 0)
            leads = used & ((dz > 0.0) | ((dz == 0.0) & (rows[None, :] < j[:, None])))
            value = dz * (f * r * (1.0 + e))
            if how.HAS_C:
                value = c * (value + tl.log(1.0 + e))
            else:
                product *= tl.reduce(tl.where(leads, 1.0 + e, 1.0), 0, multiply)
            loss += tl.sum(tl.where(leads, value, 0.0), 0)
        if not how.HAS_C:
            loss += tl.log(product)
    if how.HAS_C:
        c_row = load_c(k, rows, how)
        loss *= c_row
        slope *= c_row
    return loss, slope
