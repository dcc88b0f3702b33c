"""Lists longer than a program takes alone: documents by rising label, cut into chunks, one program each.

PyTorch sorts the documents of every query by label (unlabelled and absent ones last, NaN). Positions in that order are cut,
on the device and without a look at it from the host, into

    groups   documents of one label;
    blocks   a group of WINDOW documents or more, or a run of smaller groups of fewer than 2 WINDOW in all: a block begins with
             each large group and with the first group that begins in a multiple-of-WINDOW window of the query;
    chunks   pieces of at most 2 WINDOW = CHUNK documents of one block. A run of small groups is one chunk.

So pairs of different blocks are ordered by position alone, and only the pairs inside a run of small groups are left to
compare. A query of n documents has at most 2 n / WINDOW + 2 blocks and n / CHUNK more chunks, which bounds the launches;
programs without a chunk exit at once. A query of fewer than WINDOW documents is one chunk and no block, as all are where all
sums are direct (not SPLIT): it has nothing but direct sums, and takes no room for others.

Per document: a binary search (2 log2 n loads that stay in L2), about 40 bytes, once per call: bound by the sort before it.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl
from pile_fast.kernels.layout import (
    FIELDS, GAIN, RANK, SCALARS, TEACHER_ROWS, TILE, Chunk, Query, elements, field, partials_of, plain, scalar,
)  # fmt: skip


@triton.jit
def query_of(position, inside, lists):
    """Query, first document and length of the query that holds a position; length 0 where none does."""
    if lists.cu_seqlens is not None:
        S = plain(lists.documents).to(tl.int64)
        q = tl.load(lists.owner + position, mask=inside, other=0).to(tl.int64)
        exists = inside & (q < plain(lists.queries))
        first = tl.load(lists.cu_seqlens + q, mask=exists, other=0).to(tl.int64)
        last = tl.load(lists.cu_seqlens + q + 1, mask=exists, other=0).to(tl.int64)
        first = tl.minimum(tl.maximum(first, 0), S)
        n = tl.minimum(tl.maximum(last, first), S) - first
    else:
        N = plain(lists.slots)
        q = position // N
        first = q * N
        n = tl.where(inside, N, 0).to(tl.int64)
    return q, first, n


@triton.jit
def same_group(a, b):
    """Whether two labels are the same, or both missing."""
    return (a == b) | ((a != a) & (b != b))


@triton.jit
def gains_of(label, lowest, highest, PAIR_WEIGHT: tl.constexpr):
    """Gains from labels (NaN = unlabelled, 0) and their extremes, up to a factor per query: in [0, 1], whatever the labels."""
    if PAIR_WEIGHT == "label_gap":
        # Halves: the gap of two labels may be too large for their dtype.
        gap = (highest / 2.0 - lowest / 2.0).to(tl.float32)
        gain = (label / 2.0 - lowest / 2.0).to(tl.float32) / tl.where(gap > 0.0, gap, 1.0)
    else:
        gain = tl.exp2((label - highest).to(tl.float32))
    return tl.where(label == label, gain, 0.0)


@triton.jit
def first_after(labels, first, low, high, label, inside, steps):
    """By bisection, the first position from `low` to `high` whose label is not before `label` (NaN comes last)."""
    for _ in range(0, steps):
        middle = (low + high) // 2
        other = tl.load(labels + first + middle, mask=inside & (low < high), other=float("nan"))
        before = (other < label) | ((other == other) & (label != label))
        low = tl.where(before & (low < high), middle + 1, low)
        high = tl.where(before, high, middle)
    return low


@triton.jit(do_not_specialize=["steps"])
def group_kernel(
    lists, labels, fields, marks, steps,
    SPLIT: tl.constexpr, PAIR_WEIGHT: tl.constexpr, WINDOW: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Ranks and gains from sorted labels; marks: 1 where a chunk begins, and 2^32 more where a block does. One tile of
    positions each."""
    S = plain(lists.documents).to(tl.int64)
    at = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    _, first, n = query_of(at, at < S, lists)
    k = at - first
    inside = (k >= 0) & (k < n)
    chunk_begins = k % CHUNK == 0
    block_begins = (k == 0) & SPLIT & (n >= WINDOW)
    if labels is not None:
        nan = float("nan")
        label = tl.load(labels + at, mask=inside, other=nan)
        low = first_after(labels, first, k * 0, k, label, inside, steps)  # the group's first position
        tl.store(fields + RANK * S + at, tl.where(label == label, low.to(tl.float32), nan), mask=inside)
        if PAIR_WEIGHT != "none":
            labelled = first_after(labels, first, k * 0, n, label * nan, inside, steps)
            lowest = tl.load(labels + first, mask=inside, other=nan)
            highest = tl.load(labels + first + labelled - 1, mask=inside & (labelled > 0), other=nan)
            tl.store(fields + GAIN * S + at, gains_of(label, lowest, highest, PAIR_WEIGHT), mask=inside)
        if SPLIT:
            long = n >= WINDOW
            previous = tl.load(labels + at - 1, mask=inside & (k > 0), other=nan)
            begins = (k == 0) | (same_group(previous, label) == 0)
            window = k - k % WINDOW
            before_window = tl.load(labels + first + window - 1, mask=inside & (window > 0), other=nan)
            first_in_window = (k == window) | ((window > 0) & same_group(before_window, previous))
            reach = low + WINDOW - 1
            at_reach = tl.load(labels + first + reach, mask=inside & (reach < n), other=nan)
            large = (reach < n) & same_group(at_reach, label)
            block_begins = long & begins & (first_in_window | large | (label != label))
            chunk_begins = (k == 0) | block_begins | (large & ((k - low) % CHUNK == 0))
    mark = tl.where(chunk_begins, 1, 0).to(tl.int64) + tl.where(block_begins, 1, 0).to(tl.int64) * 4294967296
    tl.store(marks + at, tl.where(inside, mark, 0), mask=at < S)


@triton.jit
def table_kernel(lists):
    """From the running sum of the marks: where each chunk begins, its block, and each block's first chunk."""
    S = plain(lists.documents).to(tl.int64)
    at = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    inside = at < S
    count = tl.load(lists.counts + at, mask=inside, other=0)
    before = tl.load(lists.counts + at - 1, mask=inside & (at > 0), other=0)
    block = (count >> 32) - 1
    chunk = (count - ((block + 1) << 32)) - 1
    tl.store(lists.chunk_begin + chunk, at, mask=inside & (count != before))
    tl.store(lists.chunk_block + chunk, block.to(tl.int32), mask=inside & (count != before))
    tl.store(lists.block_chunk + block, chunk.to(tl.int32), mask=inside & ((count >> 32) != (before >> 32)))
    # The last block ends with the last chunk.
    tl.store(lists.block_chunk + block + 1, (chunk + 1).to(tl.int32), mask=at == S - 1)


@triton.jit
def chunks_before(lists, position):
    """How many chunks begin before a position."""
    return tl.load(lists.counts + position - 1, mask=position > 0, other=0).to(tl.int32)


@triton.jit
def open_chunk(state, lists):
    """This program's chunk of a long list; n is 0 where there are fewer chunks than programs."""
    c = tl.program_id(0)
    S = plain(lists.documents).to(tl.int64)
    at = tl.load(lists.chunk_begin + c)
    q, first, n = query_of(at, at < S, lists)
    end = tl.minimum(tl.load(lists.chunk_begin + c + 1) - first, n).to(tl.int32)
    slot = first
    if lists.cu_seqlens is None:
        slot = first * 0
    M = plain(state.teachers)
    fields = state.fields + first
    table = state.fields + FIELDS * S + first * M
    per_query = state.per_query + q * (TEACHER_ROWS * M + SCALARS)
    begin = (at - first).to(tl.int32)
    return Chunk(c, q, first, slot, n.to(tl.int32), begin, end, end, fields, table, S, per_query, state.partials, M)


@triton.jit
def open_query(state, lists):
    """This program's query, whose chunks it sums over."""
    q = tl.program_id(0).to(tl.int64)
    c_first, c_last, n = query_chunks(q, lists)
    M = plain(state.teachers)
    return Query(q, n, c_first, c_last, state.per_query + q * (TEACHER_ROWS * M + SCALARS), state.partials, M)


@triton.jit
def query_chunks(q, lists):
    """The chunks [c_first, c_last) of a query, and its length."""
    if lists.cu_seqlens is not None:
        S = plain(lists.documents).to(tl.int64)
        first = tl.minimum(tl.maximum(tl.load(lists.cu_seqlens + q).to(tl.int64), 0), S)
        last = tl.minimum(tl.maximum(tl.load(lists.cu_seqlens + q + 1).to(tl.int64), first), S)
    else:
        first = q * plain(lists.slots)
        last = first + plain(lists.slots)
    return chunks_before(lists, first), chunks_before(lists, last), last - first


class Near(NamedTuple):
    """The rows [begin, end) that a chunk's documents meet directly, and whether these differ in label or some have none; the
    chunks of those rows, [c_begin, c_end), and those of the query, [c_first, c_last)."""

    begin: Any
    end: Any
    mixed: Any
    c_first: Any
    c_begin: Any
    c_end: Any
    c_last: Any


@triton.jit
def near_rows(k, lists, GRID: tl.constexpr, how: tl.constexpr):
    """A chunk's block, or where its query has no grid its whole query, as where all sums are direct."""
    begin = k.n * 0
    end = k.padded
    mixed = tl.full((), 1, tl.int1)
    c_begin = begin
    c_end = begin
    c_first = begin
    c_last = begin
    if not how.ALONE:
        c_first = chunks_before(lists, k.first)
        c_last = chunks_before(lists, k.first + k.n)
        c_begin = c_first
        c_end = c_last
        if not how.DIRECT:
            linear = tl.load(scalar(k, GRID) + 1) != 0.0
            block = lists.block_chunk + tl.load(lists.chunk_block + k.c)
            c_begin = tl.where(linear, tl.load(block, mask=linear, other=0), c_first)
            # The next block may be another query's, with short queries in between.
            c_end = tl.where(linear, tl.minimum(tl.load(block + 1, mask=linear, other=0), c_last), c_last)
        begin = (tl.load(lists.chunk_begin + c_begin) - k.first).to(tl.int32)
        end = tl.minimum(tl.load(lists.chunk_begin + c_end) - k.first, k.n).to(tl.int32)
        ranks = field(k, RANK)
        mixed = (tl.load(ranks + begin) == tl.load(ranks + end - 1)) == 0
        if not how.DIRECT:
            # A block of several chunks is one group, even where documents without label, or of weight 0, are NaN.
            mixed = mixed & ((linear == 0) | (c_end - c_begin <= 1))
    return Near(begin, end, mixed, c_first, c_begin, c_end, c_last)


@triton.jit
def has_others(near):
    """Whether the query has chunks that are met by their fields."""
    return (near.c_first < near.c_begin) | (near.c_end < near.c_last)


@triton.jit
def slots_of(k, order, mask, rows):
    """Where the documents at `rows` lie in the inputs, after the query's first slot, and whether they are there."""
    inside = rows < k.end
    slots = rows
    if order is not None:
        slots = tl.load(order + k.first + rows, mask=inside, other=0) - k.slot
    if mask.pointer is not None:
        inside = inside & (tl.load(elements(mask, k, slots), mask=inside, other=0) != 0)
    return slots, inside


@triton.jit
def sum_partials(k, NAME: tl.constexpr, c_first, c_last):
    """Σ of a partial sum over chunks, in float64 and one fixed order."""
    total = tl.zeros((TILE,), tl.float64)
    for begin in range(c_first, c_last, TILE):
        c = begin + tl.arange(0, TILE)
        total += tl.load(partials_of(k, c) + NAME, mask=c < c_last, other=0.0).to(tl.float64)
    return tl.sum(total, 0)
