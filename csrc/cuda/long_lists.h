// Long lists: a query is worked on by many blocks, phase by phase, a launch each; the end of a launch is the barrier.
//
// Positions (the order of falling labels, found by PyTorch's sort of our keys) are worked on in pieces of kPiece, a block each.
// For the pair sums a query's labelled positions are cut into label blocks: a label group of S = max(128, n/64) documents or
// more is one, runs of smaller groups are cut at the first group start in each window of S positions. Documents of different
// label blocks meet through fields (fields.h), those of one that holds several labels directly (pairs.h), tile by tile of
// columns in shared memory. Direct sums throughout are the case of a single label block. All counts are bounded from the shapes
// alone; what is too many leaves at once.
#pragma once

#include "fields.h"
#include "teachers.h"
#include "pairs.h"

namespace pile::gpu {

constexpr int kPiece = 1024, kPieceThreads = 256, kOwn = kPiece / kPieceThreads;
constexpr int kLeastLabelBlock = 128, kWindows = 64, kMostLabelBlocks = 2 * kWindows;
constexpr int kQueryThreads = 128, kSolveThreads = 512;

PILE_SHARED int64_t parts(int64_t n, int64_t size) { return (n + size - 1) / size; }

// What is known of a query before the terms of its loss add up.
struct LossFacts {
  double pairs = 0;  // Σ ω over P; of a term that takes gains, what it divides by instead
  double targets = 0, target_weight = 0, target_squares = 0;  // documents with a target, Σ c and Σ c² of their weights
  Range student, target;                                      // of the distillation: from the pivots, in its unit
  float student_pivot = 0, target_pivot = 0;                  // the highest
  float weight = 1;                                           // the query's
  bool broken = false;                                        // some student logit or weight is no number, or a gain negative

  // From the ranges of plain logits that have a target. Divided is only what has been subtracted: large logits would lose their
  // differences.
  PILE_DEVICE void settle(const Range& of_student, const Range& of_target, float unit) {
    if (!(targets > 0)) return;
    student_pivot = of_student.high;
    target_pivot = of_target.high;
    student = {(of_student.low - student_pivot) * unit, 0};
    target = {(of_target.low - target_pivot) * unit, 0};
  }
};

// What the phases know of a query.
struct QueryState : LossFacts {
  Counts counts;
  Grid grid;    // of the label pairs
  Range range;  // of their logits
  bool wide, plain;
  int label_blocks;
  double mean_difference,
      distill_rest;  // of student and target, unscaled; what the distillation's loss has beyond its pieces' sums
  float common;      // what came off all teachers alike and goes back onto the logits
};

// What a piece's documents tell the loss.
struct LossPart {
  double broken = 0, targets = 0, target_weight = 0, target_squares = 0, difference = 0;
  Range labels, student, target;
};

// The last index below `count` that has not passed, or 0; those that have not come first.
template <class NotPassed>
PILE_DEVICE int64_t owner(int64_t count, NotPassed not_passed) {
  int64_t low = 0;
  while (count - low > 1) {
    const int64_t middle = (low + count) / 2;
    (not_passed(middle) ? low : count) = middle;
  }
  return low;
}

// Everything in the scratch buffer: by position over the whole batch, by query, by piece, by label block. Where piece p and
// label block b of one query overlap, the overlap is number p + b: along the positions either grows.
struct LongState {
  Call call;
  int64_t documents, pieces, label_blocks, overlaps;  // numbers in all, as bounds
  int64_t list_pieces, list_label_blocks;             // of one padded list
  bool packed, weighted;
  PairSum pairwise;
  bool label_fields;  // label pairs meet through fields
  float offset;

  const int64_t *keys = nullptr, *order = nullptr;  // sorted; nullptr: positions are slots
  float* u[2];                                      // the ensemble's logits, read and written in turns; or student and target
  float* weight;                                    // of documents in the loss; nullptr: 1 each
  float *gain, *per_pair, *above, *exponent, *low, *high, *logit, *teachers;
  int *first, *last;
  double* prefix;  // documents + queries
  QueryState* query;
  double *mean, *scale;  // by query and teacher
  float* energy;         // by query; see Teachers
  Moments* measured;     // by piece and teacher
  double *piece_sum, *piece_prefix, *piece_pull, *label_sum;
  int* label_starts;                 // per query one more than label blocks
  float *moments, *fields, *tables;  // kinds of kMostCells x kPowers by overlap, and by label block; κ(+), κ(−), ψ(+)
  LossPart* loss_parts;
  float *of_distillation, *of_label_loss;  // the terms' own
  int64_t bytes;

  static constexpr int kKind = kMostCells * kPowers;
  PILE_SHARED int kinds() const { return weighted ? 2 : 1; }
  // A label pair counts as its higher document does: where documents have weights they have other moments as that than as the
  // lower one, and a field of either.
  PILE_SHARED int sides() const { return weight ? 2 : 1; }
  PILE_SHARED int64_t side_words() const { return int64_t(kinds()) * kKind; }

  // Where a query's own begin. For packed lists bounds that grow with the documents before: no table, no scan.
  PILE_SHARED int64_t first_piece(int64_t q, int64_t first) const { return packed ? first / kPiece + q : q * list_pieces; }
  PILE_SHARED int64_t first_label_block(int64_t q, int64_t first) const {
    return packed ? 2 * (first / kLeastLabelBlock + q) : q * list_label_blocks;
  }
  // The query whose pieces, or label blocks, include number `index`.
  PILE_DEVICE int64_t query_of_piece(int64_t index) const {
    if (!packed) return index / list_pieces;
    return owner(call.batch.queries, [&](int64_t q) { return first_piece(q, locate(call, q).output) <= index; });
  }
  PILE_DEVICE int64_t query_of_label_block(int64_t index) const {
    if (!packed) return index / list_label_blocks;
    return owner(call.batch.queries, [&](int64_t q) { return first_label_block(q, locate(call, q).output) <= index; });
  }
  PILE_DEVICE CellTable table(int which) const { return {tables + which * kTableWords, which == 1 ? -offset : offset}; }

  // On the host.
  explicit LongState(const Call& call);
};

// One query's part of everything.
struct LongQuery {
  const LongState& state;
  const Call& call;
  Query query;
  QueryState& own;
  int64_t base;

  PILE_DEVICE LongQuery(const LongState& state, int64_t q)
      : state(state), call(state.call), query(locate(call, q)), own(state.query[q]), base(query.output) {}

  PILE_DEVICE const int64_t* keys() const { return at(state.keys); }
  PILE_DEVICE int slot(int k) const {
    if (!state.order) return k;
    // Clamped: offsets that lead nowhere must not lead out of the tensors.
    return int(smaller(larger(state.order[base + k] - (state.packed ? base : 0), int64_t(0)), int64_t(query.n - 1)));
  }
  template <class T>
  PILE_DEVICE T* at(T* array) const {
    return array + base;
  }
  PILE_DEVICE double* prefix() const { return state.weighted ? state.prefix + base + query.index : nullptr; }
  PILE_DEVICE int64_t first_piece() const { return state.first_piece(query.index, base); }
  PILE_DEVICE int piece_count() const { return int(parts(query.n, kPiece)); }
  PILE_DEVICE int labelled_pieces() const { return int(parts(own.counts.labelled, kPiece)); }
  // Σ over the pieces [0, count) of what each has put into piece_sum.
  template <class Team>
  PILE_DEVICE double sum_pieces(const Team& team, int count) const {
    const double* sums = state.piece_sum + first_piece();
    return ordered_sum(team, count, [&](int p) { return sums[p]; });
  }

  PILE_DEVICE int64_t first_label_block() const { return state.first_label_block(query.index, base); }
  PILE_DEVICE int* label_starts() const { return state.label_starts + first_label_block() + query.index; }
  PILE_DEVICE float* moments(int piece, int label_block) const {
    return state.moments + (first_piece() + first_label_block() + piece + label_block) * state.sides() * state.side_words();
  }
  PILE_DEVICE float* field(int label_block, int side) const {
    return state.fields + ((first_label_block() + label_block) * state.sides() + side) * state.side_words();
  }
  PILE_DEVICE bool meets_through_fields() const { return own.label_blocks > 1; }
  // Losses of pairs between label blocks, by one warp.
  PILE_DEVICE double label_block_loss() const {
    if (!meets_through_fields()) return 0;
    const double* sums = state.label_sum + first_label_block();
    return ordered_sum(WarpTeam(), own.label_blocks, [&](int b) { return sums[b]; });
  }
  // Label block of a position.
  PILE_DEVICE int label_block_of(int k) const {
    const int* begin = label_starts();
    return int(owner(own.label_blocks, [&](int64_t b) { return begin[b] <= k; }));
  }

  PILE_DEVICE int64_t by_teacher() const { return query.index * call.teachers(); }
  PILE_DEVICE float* energy() const { return state.energy + 2 * by_teacher(); }
  PILE_DEVICE Teachers teachers() const {
    return {at(state.teachers), energy(),        at(state.low),      at(state.high),
            state.documents,    call.teachers(), call.by_document(), own.plain};
  }
};

// A block's piece of a query: positions (or slots) [begin, end), empty where there are fewer pieces than the bound.
struct Piece : LongQuery {
  int64_t index;
  int number, begin, end;

  PILE_DEVICE explicit Piece(const LongState& state)
      : LongQuery(state, state.query_of_piece(blockIdx.x)),
        index(blockIdx.x),
        number(int(smaller<int64_t>(index - first_piece(), piece_count()))),
        begin(smaller(number * kPiece, query.n)),
        end(smaller(begin + kPiece, query.n)) {}

  PILE_DEVICE int labelled_end() const { return smaller(end, own.counts.labelled); }
};

// A block's label block of a query; there may be fewer than the bound.
struct LabelBlock : LongQuery {
  int64_t index;
  int number;

  PILE_DEVICE explicit LabelBlock(const LongState& state)
      : LongQuery(state, state.query_of_label_block(blockIdx.x)),
        index(blockIdx.x),
        number(int(smaller<int64_t>(index - first_label_block(), kMostLabelBlocks))) {}
};

// Columns of student and target, and what a term makes of each.
struct Tile {
  float *student, *target, *student_more, *target_more;
  PILE_DEVICE Tile from(int j) const { return {student - j, target - j, student_more - j, target_more - j}; }
};

// Shared memory of a block that works on a piece.
struct PieceMemory {
  Tile tile;
  float *pull, *loss, *field, *partial;  // by document; by document; of a label block; what deposit() works in
  double* sums;
  static constexpr int kBytes = (6 * kPiece + 2 * LongState::kKind + deposit_words(kPieceThreads)) * 4 + BlockTeam::kBytes;

  PILE_DEVICE explicit PieceMemory(unsigned char* base) {
    float* const at = reinterpret_cast<float*>(base);
    tile = {at, at + kPiece, at + 2 * kPiece, at + 3 * kPiece};
    pull = at + 4 * kPiece;
    loss = pull + kPiece;
    field = loss + kPiece;
    partial = field + 2 * LongState::kKind;
    sums = reinterpret_cast<double*>(partial + deposit_words(kPieceThreads));
  }
};

// A label block that overlaps a piece: [begin, end), of which [lo, hi) lies in the piece. mixed: it holds several labels.
struct Overlap {
  int number, lo, hi, begin, end;
  bool mixed;
};

template <class Visit>
PILE_DEVICE void for_label_blocks(const Piece& piece, Visit visit) {
  const int end = piece.labelled_end();
  if (piece.begin >= end) return;
  const int* starts = piece.label_starts();
  for (int b = piece.label_block_of(piece.begin); b < piece.own.label_blocks && starts[b] < end; ++b) {
    const int from = starts[b], to = starts[b + 1];
    visit(Overlap{b, larger(piece.begin, from), smaller(end, to), from, to, piece.at(piece.state.last)[from] < to});
  }
}

// Tiles of columns [begin, end) in shared memory: load(j, place in the tile), then use(from, to); the whole block calls.
template <class Load, class Use>
PILE_DEVICE void for_tiles(int begin, int end, Load load, Use use) {
  for (int from = begin & ~3; from < end; from += kPiece) {
    const int to = smaller(from + kPiece, end);
    for (int j = larger(from, begin) + int(threadIdx.x); j < to; j += int(blockDim.x)) load(j, j - from);
    __syncthreads();
    use(from, to);
    __syncthreads();
  }
}

// Columns [from, to) of the label block that begins at `begin`, and the list's rows [lo, hi) of it.
struct LabelTile {
  LossColumns columns;
  int lo, hi, begin, from, to;
};

// use(tile) for every tile of every mixed label block, of logits u, and `more` of the columns unless it is nullptr.
template <class Use>
PILE_DEVICE void for_label_tiles(const Piece& piece, const PieceMemory& memory, const float* u, const float* more, Use use) {
  const float* gains = piece.at(piece.state.gain);
  for_label_blocks(piece, [&](const Overlap& of) {
    if (!of.mixed) return;
    for_tiles(
        of.begin, of.end,
        [&](int j, int to) {
          memory.tile.student[to] = u[j];
          if (piece.state.weighted) memory.tile.target[to] = gains[j];
          if (piece.state.weight) memory.tile.student_more[to] = piece.at(piece.state.weight)[j];
          if (more) memory.tile.target_more[to] = more[j];
        },
        [&](int from, int to) {
          const Tile tile = memory.tile.from(from);
          LossColumns columns = {tile.student, tile.target, piece.state.weighted, 1, piece.state.offset};
          if (piece.state.weight) columns.weights = tile.student_more;
          columns.more = tile.target_more;
          use(LabelTile{columns, of.lo, of.hi, of.begin, from, to});
        });
  });
}

// visit(k, value) by a thread for each of the piece's documents that meet others through fields, at logits u; once for those
// below and once for those above where documents have weights.
template <class Visit>
PILE_DEVICE void for_label_fields(const Piece& piece, const PieceMemory& memory, const float* u, Visit visit) {
  if (!piece.meets_through_fields()) return;
  const Grid& grid = piece.own.grid;
  const float* gains = piece.at(piece.state.gain);
  const int row = grid.cells * kPowers, rank = int(threadIdx.x);
  const float* weights = piece.state.weight ? piece.at(piece.state.weight) : nullptr;
  for_label_blocks(piece, [&](const Overlap& of) {
#pragma unroll 1
    for (int side = 0; side < piece.state.sides(); ++side) {
      for (int e = rank; e < piece.state.kinds() * row; e += kPieceThreads) memory.field[e] = piece.field(of.number, side)[e];
      __syncthreads();
      for (int k = of.lo + rank; k < of.hi; k += kPieceThreads) {
        float value = grid.value(memory.field, u[k]);
        if (piece.state.weighted) value = gains[k] * value - grid.value(memory.field + row, u[k]);
        visit(k, weights && side == 0 ? weights[k] * value : value);
      }
      __syncthreads();
    }
  });
}

// The piece's moments at logits u, label block by label block; with weights those of the second side.
PILE_DEVICE void deposit_piece(const Piece& piece, const PieceMemory& memory, const float* u, const float* weights = nullptr) {
  for_label_blocks(piece, [&](const Overlap& of) {
    const float* gains = piece.state.weighted ? piece.at(piece.state.gain) + of.lo : nullptr;
    deposit<kOwn>(
        piece.own.grid, of.hi - of.lo, [&](int i) { return u[of.lo + i]; }, gains, memory.partial,
        piece.moments(piece.number, of.number) + (weights ? piece.state.side_words() : 0), weights ? weights + of.lo : nullptr);
  });
}

// A call's launches: every kernel gets `state` and more. Host code.
struct LongRun {
  LongState state;
  cudaStream_t stream;

  template <class... Parameters, class... More>
  void pieces(void (*kernel)(const LongState, Parameters...), size_t shared, More... more) const {
    launch(kernel, state.pieces, kPieceThreads, shared, stream, state, more...);
  }
  template <class... Parameters, class... More>
  void queries(void (*kernel)(const LongState, Parameters...), int threads, size_t shared, More... more) const {
    launch(kernel, state.call.batch.queries, threads, shared, stream, state, more...);
  }
  // The phases that ensemble and loss share, in long_pairs.cu.
  void tabulate() const;             // unless direct: the tables of the fields
  void bound(LabelGain gain) const;  // label blocks, gains; and moments of 0 to deposit in
  void weigh() const;                // weights of pairs, and their sum
  void total() const;                // a query's `pairs`, of its pieces' sums
  void solve(bool losses) const;     // unless direct: the label blocks' fields
};

}  // namespace pile::gpu
