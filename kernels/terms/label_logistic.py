"""RankNet: Σ ω c_i softplus(−(z_i − z_j)) over the pairs of labelled documents, i above j: see kernels/pairs.py and, for sums
in linear time, kernels/fields.py."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import triton
import triton.language as tl
from pile_fast.kernels.chunks import has_others, near_rows, sum_partials
from pile_fast.kernels.fields import label_field
from pile_fast.kernels.layout import GAINS, LABEL_GRID, NUMBER, RANK, C, Z, field
from pile_fast.kernels.loss import load_c
from pile_fast.kernels.pairs import columns_of, label_losses, load_order, pair_counts
from torch import Tensor

if TYPE_CHECKING:
    from pile_fast.backends.triton_long import LongLists


def fields(lists: LongLists) -> tuple[Tensor | tuple[Tensor, Tensor], Tensor]:
    """What each block hears from the others: pulls and losses. Where documents have weights, pulls from below and, weighted,
    from above."""
    lists.prepare_fields(0.0, True)
    at = (Z.value, RANK.value, LABEL_GRID.value, 0.0)
    if lists.batch.weights is None:
        return lists.label_fields(*at, True, True)
    below, losses = lists.label_fields(*at, True, True, above=False)
    lists.pulls = torch.empty_like(below)
    above, _ = lists.label_fields(*at, True, False, below=False, has_c=True)
    return (below, above), losses


class State(NamedTuple):
    """Which rows are met directly, and how many documents lie below them, with their gains."""

    near: Any
    number_below: Any
    gains_below: Any


@triton.jit
def enter(k, lists, how: tl.constexpr):
    """The chunk's surroundings."""
    near = near_rows(k, lists, LABEL_GRID, how)
    number_below = tl.zeros((), tl.float64)
    gains_below = number_below
    if not how.ALONE:
        number_below = sum_partials(k, NUMBER, near.c_first, near.c_begin)
        gains_below = sum_partials(k, GAINS, near.c_first, near.c_begin)
    return State(near, number_below, gains_below)


@triton.jit
def rows(k, lists, rows, state, pulls, losses, numbers, how: tl.constexpr):
    """Losses and Σ ω of the pairs in which a document is the higher one; slopes over all of its pairs."""
    BR: tl.constexpr = how.BR
    near = state.near
    columns = columns_of(k, near, RANK)
    rank, gain = load_order(k, rows, RANK, how)
    z = tl.load(field(k, Z) + rows, mask=rows < k.end, other=0.0)
    loss = tl.zeros((BR,), tl.float32)
    slope = loss
    below = loss
    if near.mixed:
        counts = None
        if how.HAS_C:
            counts = field(k, C) + near.begin
        c = load_c(k, rows, how)
        loss, slope = label_losses(columns, field(k, Z) + near.begin, z, rank, gain, 0.0, counts, c, how)
        _, below = pair_counts(columns, rank, gain, how)
    weight = below.to(tl.float64)
    if not how.ALONE:
        more = state.number_below
        if how.WEIGHTED:
            more = gain.to(tl.float64) * state.number_below - state.gains_below
        weight += tl.where(rank == rank, more, 0.0)
    if not how.DIRECT:
        if has_others(near):
            if how.HAS_C:
                c = load_c(k, rows, how)
                loss += c * label_field(losses, k, lists, LABEL_GRID, z, rank, gain, how)
                slope += c * label_field(pulls[0], k, lists, LABEL_GRID, z, rank, gain, how)
                slope += label_field(pulls[1], k, lists, LABEL_GRID, z, rank, gain, how)
            else:
                slope += label_field(pulls, k, lists, LABEL_GRID, z, rank, gain, how)
                loss += label_field(losses, k, lists, LABEL_GRID, z, rank, gain, how)
    return loss, -slope, weight
