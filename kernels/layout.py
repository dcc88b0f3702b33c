"""Where everything lies that kernels, their callers and tests share, with a name for each place, and the groups of arguments
that kernels take.

A list that one program takes alone and the chunks of longer lists run the same phases. A phase sees its documents through a
`Chunk`, which a program makes for itself: `chunks.open_chunk` one of a long list, `pile.open_list` all of a short one.

Triton compiles a kernel anew for an integer argument that is 1 or a multiple of 16, also inside a tuple, where
`do_not_specialize` does not reach. So integers in tuples are `unspecialized`, odd and above 1, and `plain` reads them. The
one-launch kernel's loop bounds stay out of tuples: `plain` tells the compiler their range, and it takes more registers for
wider counters.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl


def _count(n: int):
    """The numbers 0 to n - 1, for kernels."""
    return map(tl.constexpr, range(n))


# One float per document each: `field`. The loss takes the place of the ensemble, which is done with by then.
#
#       ensemble                                                     student's loss
#    0  RANK: how many documents of the query have a lower label, NaN = unlabelled; of both
#    1  GAIN: of weighted pairs, ω = the difference of two gains; of both. Of a label term with gains these, NaN = not used
#    2  SCORED_RANK: RANK, NaN also where no teacher scored          Z: the logit
#    3  PER_PAIR: 1 / k_i, 0 without pairs                           Z_SCALED: z / τ from the query's lowest logit
#    4  ABOVE: Σ ω over documents above that are met directly        S_SCALED: target / τ likewise, NaN = no target
#    5  EXPONENT: a_i                                                SLOPE of the distillation term
#    6  U: s / temperature; iterations read one, write the other     SLOPE of the label term
#    7  (the other U)                                                C: what the document counts, if documents have weights
#    8  E: e^{c − u}, two as of U. A list alone has it in U, if not WIDE    OWN: 8 and 9 are a label term's own
#    9  (the other E)
#
# The calibrated teachers follow, one row of M floats per document: `table`.
RANK, GAIN, SCORED_RANK, PER_PAIR, ABOVE, EXPONENT, U, _, E, _ = _count(10)
_, _, Z, Z_SCALED, S_SCALED, SLOPE, _, C, OWN = _count(9)
FIELDS = tl.constexpr(10)

# The kinds of term. What a term has of its own lies at the place's name + kind (the sums, three of them, at SUM + 3 · kind).
DISTILL, LABEL = _count(2)

# Per query, one float for each teacher: `teacher_row`. The square root of the scale, as the scale may be beyond float32;
# ENERGY is the logarithm of the weight but for a constant, −inf = takes no part.
MEAN, CORRECTION, ROOT_SCALE, ENERGY, TEACHER_WEIGHT = _count(5)
TEACHER_ROWS = tl.constexpr(5)
# Then single floats: `scalar`. COMMON came off all teachers alike and goes back onto the logits; grids are an origin and a
# number of cells (kernels/fields.py). Where labels are gains, TOP is the highest logit of a labelled document, LABEL_LOW and
# LABEL_HIGH are the labels' extremes (`store_double`).
(
    MIDDLE, WIDE, PAIRS, COMMON, U_GRID, _,
    POISON, LOSS_WIDE, Z_MIDDLE, S_MIDDLE, TARGETS, Z_PIVOT, S_PIVOT, SUM, _, _, _, _, _, FACTOR, _,
    Z_GRID, _, S_GRID, _, LABEL_GRID, _, TOP, LABEL_LOW, _, LABEL_HIGH, _,
) = _count(32)  # fmt: skip
SCALARS = tl.constexpr(32)

# Per chunk of a long list, its partial sums: `partial`. Ranges are a low and a high: of the logits with a target, of their
# targets, of all logits; TOP and the labels' extremes are as of queries. LOSSES and WEIGHTS are a term's.
(
    NUMBER, GAINS, PAIR_SUM, TRACE,
    BROKEN, USED, Z_RANGE, _, S_RANGE, _, RANGE, _, OF_TOP, OF_LABEL_LOW, _, OF_LABEL_HIGH, _,
    SUMS, _, _, _, _, _, LOSSES, _, WEIGHTS, _,
) = _count(27)  # fmt: skip
PARTIALS = tl.constexpr(27)
# Then one float for each teacher: `teacher_partial`.
COUNT, PIVOT, OFF, SQUARE, LOW, HIGH, PULL = _count(7)
TEACHER_PARTIALS = tl.constexpr(7)

# Sums in linear time (kernels/fields.py).
P = tl.constexpr(8)  # powers
MAX_CELLS = tl.constexpr(128)
FIELD = tl.constexpr(MAX_CELLS.value * P.value)  # floats of a set of moments, or of a field
SPAN = tl.constexpr(14)  # cells further apart than this see each other saturated: 1.5 · (14 − 1) > 18, e^-18 = 1.5e-8
ENTRIES = tl.constexpr(2 * SPAN.value + 1)
MATRICES = tl.constexpr(ENTRIES.value * P.value * P.value)  # floats of one kernel's table
SUPER = tl.constexpr(64)  # chunks whose moments are summed ahead

TILE = tl.constexpr(256)  # positions, or chunks, that one program looks at in one go where nothing else is to be done


def query_floats(teachers: int) -> int:
    """Floats of scratch per query."""
    return TEACHER_ROWS.value * teachers + SCALARS.value


def chunk_floats(teachers: int) -> int:
    """Partial sums per chunk."""
    return PARTIALS.value + TEACHER_PARTIALS.value * teachers


def unspecialized(n: int) -> int:
    """An integer that Triton does not compile for; see the module."""
    return 2 * n + 3


class Strided(NamedTuple):
    """A tensor or None, and how many elements its queries, documents and teachers lie apart (`unspecialized`)."""

    pointer: Any
    query: Any
    document: Any
    teacher: Any


class Inputs(NamedTuple):
    """What a call reads; tensors that it does not take are None. Labels are there where their pairs are summed; those of long
    lists lie by position."""

    student: Strided
    teachers: Strided
    target: Strided
    labels: Strided
    mask: Strided
    prior: Strided
    weights: Strided
    query_weights: Strided
    cu_seqlens: Any


class Lists(NamedTuple):
    """How long lists are cut (kernels/chunks.py); `queries`, `slots` and `documents` are `unspecialized`.

    `order`: which document lies at a position; None: they lie as in the tensors. Packed lists have `owner` and `cu_seqlens`.
    """

    chunk_begin: Any
    chunk_block: Any
    block_chunk: Any
    counts: Any
    order: Any
    owner: Any
    cu_seqlens: Any
    queries: Any
    slots: Any
    documents: Any


class State(NamedTuple):
    """The scratch of long lists: per document, per query and per chunk, for so many teachers (`unspecialized`)."""

    fields: Any
    per_query: Any
    partials: Any
    teachers: Any


class Steps(NamedTuple):
    """The ensemble's numbers; `offset` is the margin in units of the temperature."""

    inv_temperature: float
    offset: float
    step: float


class LossNumbers(NamedTuple):
    """The loss's numbers: alpha, 1 / τ (1 where the distillation has no temperature), and those of the two terms."""

    alpha: float
    inv_tau: float
    distill: tuple[float, ...]
    label: tuple[float, ...]


class How(NamedTuple):
    """What kernels are compiled for: rows and columns of a tile of pairs, room for so many teachers, whether one program takes
    a list alone, whether all pair sums are direct, pairs are weighted, and reciprocals are one instruction; for the loss,
    whether documents have weights, and whether labels are gains."""

    BR: int
    BC: int
    MP: int
    ALONE: bool
    DIRECT: bool
    WEIGHTED: bool
    APPROX: bool
    HAS_C: bool
    GAINS: bool


class Ensemble(NamedTuple):
    """The ensemble's options that kernels are compiled for. FIXED: no iterations, so that weights stay as they begin. PAIRS:
    whether label pairs are summed, for iterations, a trace or pulls."""

    BY_DOCUMENT: bool
    NORMALIZE: str
    MARGIN: bool
    FIXED: bool
    PAIRS: bool


class Chunk(NamedTuple):
    """A program's documents: rows [begin, end) of query q, which has n.

    Fields are kept up to row `padded` (`end` in a long list) and lie S apart. `first` is the query's first document in outputs,
    which have no gaps, `slot` in the inputs, after the query's stride. `fields` points to the query's first document, `table`
    to its calibrated teachers, `per_query` to its numbers, `partials` to those of chunk 0.
    """

    c: Any
    q: Any
    first: Any
    slot: Any
    n: Any
    begin: Any
    end: Any
    padded: Any
    fields: Any
    table: Any
    S: Any
    per_query: Any
    partials: Any
    M: Any


class Query(NamedTuple):
    """A query of a long list: its length, its chunks [c_first, c_last), and the rest as in `Chunk`."""

    q: Any
    n: Any
    c_first: Any
    c_last: Any
    per_query: Any
    partials: Any
    M: Any


@triton.jit
def plain(n):
    """The integer that `unspecialized` hid."""
    return (n - 3) >> 1


@triton.jit
def elements(x, k, slots):
    """Pointers to the documents at `slots` of a Strided tensor."""
    return x.pointer + k.q * plain(x.query) + k.slot * plain(x.document) + slots.to(tl.int64) * plain(x.document)


@triton.jit
def field(k, NAME):
    """Pointer to a field of the query's documents."""
    return k.fields + NAME * k.S


@triton.jit
def teacher_row(k, NAME: tl.constexpr):
    """Pointer to a query's numbers of that name, one for each teacher."""
    return k.per_query + NAME * k.M


@triton.jit
def load_row(k, NAME: tl.constexpr, other, MP: tl.constexpr):
    """(MP,) a query's numbers of that name."""
    m = tl.arange(0, MP)
    return tl.load(teacher_row(k, NAME) + m, mask=m < k.M, other=other)


@triton.jit
def scalar(k, NAME: tl.constexpr):
    """Pointer to a number of the query."""
    return k.per_query + TEACHER_ROWS * k.M + NAME


@triton.jit
def partials_of(k, c):
    """Pointer to the partial sums of a chunk, or of several."""
    return k.partials + c.to(tl.int64) * (PARTIALS + TEACHER_PARTIALS * k.M)


@triton.jit
def partial(k, NAME: tl.constexpr):
    """Pointer to a partial sum of this chunk."""
    return partials_of(k, k.c) + NAME


@triton.jit
def teacher_partial(k, NAME: tl.constexpr):
    """Pointer to this chunk's partial sums of that name, one for each teacher."""
    return partials_of(k, k.c) + PARTIALS + NAME * k.M


@triton.jit
def store_double(to, x):
    """A float64 in the place of two floats."""
    bits = x.to(tl.int64, bitcast=True)
    tl.store(to, (bits >> 32).to(tl.int32).to(tl.float32, bitcast=True))
    tl.store(to + 1, bits.to(tl.int32).to(tl.float32, bitcast=True))


@triton.jit
def load_double(at, inside):
    """The float64 that `store_double` stored; 0 where not `inside`."""
    high = tl.load(at, mask=inside, other=0.0).to(tl.int32, bitcast=True).to(tl.int64)
    low = tl.load(at + 1, mask=inside, other=0.0).to(tl.int32, bitcast=True).to(tl.int64)
    return ((high << 32) | (low & 4294967295)).to(tl.float64, bitcast=True)
