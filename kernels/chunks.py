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

import triton
import triton.language as tl

# Fields of the scratch buffer, one float per document each, by position; see kernels/ensemble.py for the others.
RANK = tl.constexpr(0)  # how many documents of the query have a lower label, NaN = unlabelled
GAIN = tl.constexpr(2)


@triton.jit
def query_of(position, inside, owner, cu_seqlens, Q, N, S, PACKED: tl.constexpr):
    """Query, first document and length of the query that holds a position; length 0 where none does."""
    if PACKED:
        q = tl.load(owner + position, mask=inside, other=0).to(tl.int64)
        exists = inside & (q < Q)
        first = tl.load(cu_seqlens + q, mask=exists, other=0).to(tl.int64)
        last = tl.load(cu_seqlens + q + 1, mask=exists, other=0).to(tl.int64)
        first = tl.minimum(tl.maximum(first, 0), S)
        n = tl.minimum(tl.maximum(last, first), S) - first
    else:
        q = position // N
        first = q * N
        n = tl.where(inside, N, 0).to(tl.int64)
    return q, first, n


@triton.jit
def same_group(a, b):
    return (a == b) | ((a != a) & (b != b))


@triton.jit
def gains_of(label, lowest, highest, WEIGHT: tl.constexpr):
    """Gains from labels (NaN = unlabelled, 0) and their extremes, up to a factor per query: in [0, 1], whatever the labels."""
    if WEIGHT == "label_gap":
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


@triton.jit(do_not_specialize=["Q", "N", "S", "steps"])
def group_kernel(
    labels, owner, cu_seqlens, fields, marks, Q, N, S, steps,
    LABELLED: tl.constexpr, SPLIT: tl.constexpr, WEIGHT: tl.constexpr, PACKED: tl.constexpr, WINDOW: tl.constexpr,
    CHUNK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Ranks and gains from sorted labels; marks: 1 where a chunk begins, and 2^32 more where a block does. One tile of
    positions each."""
    S = S.to(tl.int64)
    at = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    _, first, n = query_of(at, at < S, owner, cu_seqlens, Q, N, S, PACKED)
    k = at - first
    inside = (k >= 0) & (k < n)
    chunk_begins = k % CHUNK == 0
    block_begins = (k == 0) & SPLIT & (n >= WINDOW)
    if LABELLED:
        nan = float("nan")
        label = tl.load(labels + at, mask=inside, other=nan)
        low = first_after(labels, first, k * 0, k, label, inside, steps)  # the group's first position
        tl.store(fields + RANK * S + at, tl.where(label == label, low.to(tl.float32), nan), mask=inside)
        if WEIGHT != "none":
            labelled = first_after(labels, first, k * 0, n, label * nan, inside, steps)
            lowest = tl.load(labels + first, mask=inside, other=nan)
            highest = tl.load(labels + first + labelled - 1, mask=inside & (labelled > 0), other=nan)
            tl.store(fields + GAIN * S + at, gains_of(label, lowest, highest, WEIGHT), mask=inside)
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


@triton.jit(do_not_specialize=["S"])
def table_kernel(counts, chunk_begin, chunk_block, block_chunk, S, TILE: tl.constexpr):
    """From the running sum of the marks: where each chunk begins, its block, and each block's first chunk."""
    S = S.to(tl.int64)
    at = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    inside = at < S
    count = tl.load(counts + at, mask=inside, other=0)
    before = tl.load(counts + at - 1, mask=inside & (at > 0), other=0)
    block = (count >> 32) - 1
    chunk = (count - ((block + 1) << 32)) - 1
    tl.store(chunk_begin + chunk, at, mask=inside & (count != before))
    tl.store(chunk_block + chunk, block.to(tl.int32), mask=inside & (count != before))
    tl.store(block_chunk + block, chunk.to(tl.int32), mask=inside & ((count >> 32) != (before >> 32)))
    # The last block ends with the last chunk.
    tl.store(block_chunk + block + 1, (chunk + 1).to(tl.int32), mask=at == S - 1)


@triton.jit
def chunks_before(counts, position):
    return tl.load(counts + position - 1, mask=position > 0, other=0).to(tl.int32)


@triton.jit
def chunk_rows(c, at, chunk_begin, owner, cu_seqlens, Q, N, S, PACKED: tl.constexpr):
    """Query of chunk c, which begins at position `at` < S, the query's first position and length, and the chunk's rows
    [begin, end) within the query."""
    q, first, n = query_of(at, at < S, owner, cu_seqlens, Q, N, S, PACKED)
    begin = at - first
    end = tl.minimum(tl.load(chunk_begin + c + 1) - first, n)
    return q, first, n.to(tl.int32), begin.to(tl.int32), end.to(tl.int32)


@triton.jit
def block_rows(c, first, n, direct, chunk_begin, chunk_block, block_chunk, counts):
    """The rows [begin, end) that chunk c's documents meet directly: their block's, or the query's if `direct`; the chunks of
    those rows, [c_begin, c_end); the chunks of the query, [c_first, c_last)."""
    c_first = chunks_before(counts, first)
    c_last = chunks_before(counts, first + n)
    b = tl.load(chunk_block + c)
    c_begin = tl.load(block_chunk + b, mask=direct == 0, other=0)
    # The next block may be another query's, with short queries in between.
    c_end = tl.minimum(tl.load(block_chunk + b + 1, mask=direct == 0, other=0), c_last)
    c_begin = tl.where(direct, c_first, c_begin)
    c_end = tl.where(direct, c_last, c_end)
    begin = tl.load(chunk_begin + c_begin) - first
    end = tl.minimum(tl.load(chunk_begin + c_end) - first, n)
    return begin.to(tl.int32), end.to(tl.int32), c_begin, c_end, c_first, c_last


@triton.jit
def load_slots(order, rows, inside, first, mask, mask_stride, MASKED: tl.constexpr, PACKED: tl.constexpr):
    """Where the documents at positions `rows` lie in their query (packed: in the tensor), and whether they are there."""
    if order is not None:
        slots = tl.load(order + first + rows, mask=inside, other=0)
    elif PACKED:
        slots = first + rows
    else:
        slots = rows.to(tl.int64)
    if MASKED:
        inside = inside & (tl.load(mask + slots * mask_stride, mask=inside, other=0) != 0)
    return slots, inside


@triton.jit
def sum_partials(partials, width, column, c_first, c_last, TILE: tl.constexpr):
    """Σ of a column of the chunks' partial sums, in float64 and one fixed order."""
    total = tl.zeros((TILE,), tl.float64)
    for begin in range(c_first, c_last, TILE):
        c = begin + tl.arange(0, TILE)
        total += tl.load(partials + c.to(tl.int64) * width + column, mask=c < c_last, other=0.0).to(tl.float64)
    return tl.sum(total, 0)


@triton.jit
def query_chunks(q, counts, cu_seqlens, N, S, PACKED: tl.constexpr):
    """The chunks [c_first, c_last) of a query, and its length."""
    if PACKED:
        first = tl.minimum(tl.maximum(tl.load(cu_seqlens + q).to(tl.int64), 0), S)
        last = tl.minimum(tl.maximum(tl.load(cu_seqlens + q + 1).to(tl.int64), first), S)
    else:
        first = q.to(tl.int64) * N
        last = first + N
    return chunks_before(counts, first), chunks_before(counts, last), last - first
