// Long lists: a query is worked on by many blocks, phase by phase, a launch each; the end of a launch is the barrier.
//
// Positions (the order of falling labels, found by PyTorch's sort of our keys) are worked on in pieces of kPiece, a block each. For the
// pair sums a query's labelled positions are cut into label blocks: a label group of S = max(128, n/64) documents or more is one, runs of
// smaller groups are cut at the first group start in each window of S positions. Documents of different blocks meet through fields
// (fields.h), those of one block that holds several labels directly (pairs.h), tile by tile of columns in shared memory. Direct sums
// throughout are the case of a single block. All counts are bounded from the shapes alone; what is too many leaves at once.
#pragma once

#include "ensemble.h"
#include "fields.h"

namespace pile {
namespace gpu {

constexpr int kPiece = 1024, kPieceThreads = 256, kOwn = kPiece / kPieceThreads;
constexpr int kLeastBlock = 128, kWindows = 64, kMostBlocks = 2 * kWindows;
constexpr int kQueryThreads = 128, kSolveThreads = 512;

PILE_SHARED int64_t parts(int64_t n, int64_t size) { return (n + size - 1) / size; }

// PyTorch sorts signed integers.
struct SortedKeys {
  const int64_t* keys;
  PILE_DEVICE uint64_t operator[](int k) const { return uint64_t(keys[k]) ^ uint64_t(1) << 63; }
};

// What the phases know of a query.
struct QueryState {
  Counts counts;
  Grid grid, z_grid, s_grid;  // of the label pairs; of the student and the target of the distillation
  Range range, z_range, s_range;
  bool wide, plain, broken;
  int blocks;
  double pairs, targets, mean_difference, distill_loss;
  float common;            // what came off all teachers alike and goes back onto the logits
  float z_pivot, s_pivot;  // what the distillation's logits are counted from

  PILE_DEVICE bool distills_through_fields() const { return z_grid.cells > 0 && s_grid.cells > 0; }
};

// What a piece's documents tell the loss.
struct LossPart {
  double broken, targets, difference;
  Range labels, z, s;
};

// Everything in the scratch buffer: by position over the whole batch, by query, by piece, by label block. A piece p and a label block b
// of one query that overlap have slot p + b: along the positions either grows.
struct LongState {
  int64_t documents, pieces, blocks, slots;  // numbers in all, as bounds
  bool packed;
  int64_t list_pieces, list_blocks;  // of one padded list
  bool weighted;
  PairSum pairwise;
  float offset;

  const int64_t *keys, *order;  // sorted; nullptr: positions are slots
  float *u[2], *gain, *per_pair, *above, *exponent, *low, *high, *logit, *teachers;
  int *first, *last;
  double* prefix;  // documents + queries
  QueryState* query;
  double *mean, *scale;  // by query and teacher, as the next
  float *energy, *weight;
  Moments* measured;  // by piece and teacher
  double *piece_sum, *piece_prefix, *piece_pull, *block_sum;
  int* block_begin;                             // per query one more than blocks
  float *moments, *fields, *tables;             // kinds of kMostCells x kPowers by slot and block; κ(+), κ(−), ψ(+)
  float *z, *distill_moments, *distill_fields;  // of the loss; u[0] is then the plain student, u[1] the target
  LossPart* loss_parts;
  int64_t bytes;

  static constexpr int kKind = kMostCells * kPowers;
  PILE_SHARED int kinds() const { return weighted ? 2 : 1; }

  // Where a query's own begin. For packed lists bounds that grow with the documents before: no table, no scan.
  PILE_SHARED int64_t first_piece(int64_t q, int64_t first) const { return packed ? first / kPiece + q : q * list_pieces; }
  PILE_SHARED int64_t first_block(int64_t q, int64_t first) const {
    return packed ? 2 * (first / kLeastBlock + q) : q * list_blocks;
  }
  PILE_SHARED int64_t first_slot(int64_t q, int64_t first) const { return first_piece(q, first) + first_block(q, first); }

  PILE_SHARED LongState(const Call& call, char* base, bool weighted, PairSum pairwise, float offset)
      : documents(call.documents()),
        packed(call.batch.cu_seqlens.data != nullptr),
        weighted(weighted),
        pairwise(pairwise),
        offset(offset),
        keys(nullptr),
        order(nullptr) {
    const int64_t queries = call.batch.queries, teacher_count = call.teachers();
    list_pieces = larger<int64_t>(parts(call.batch.slots, kPiece), 1);
    list_blocks = smaller<int64_t>(kMostBlocks, 2 * larger<int64_t>(parts(call.batch.slots, kLeastBlock), 1));
    pieces = packed ? documents / kPiece + queries : queries * list_pieces;
    blocks = packed ? 2 * (documents / kLeastBlock + queries) : queries * list_blocks;
    slots = pieces + blocks;
    char* at = base;
    auto take = [&](auto*& pointer, int64_t count) {
      pointer = reinterpret_cast<std::remove_reference_t<decltype(pointer)>>(at);
      at += parts(count * int64_t(sizeof *pointer), 16) * 16;
    };
    take(u[0], documents);
    take(u[1], documents);
    take(gain, documents);
    take(per_pair, documents);
    take(above, documents);
    take(first, documents);
    take(last, documents);
    take(query, queries);
    take(piece_sum, pieces);
    take(block_sum, blocks);
    take(block_begin, blocks + queries);
    take(prefix, weighted ? documents + queries : 0);
    take(piece_prefix, weighted ? pieces + queries : 0);
    take(moments, pairwise == PairSum::direct ? 0 : slots * kinds() * kKind);
    take(fields, pairwise == PairSum::direct ? 0 : blocks * kinds() * kKind);
    take(tables, 3 * kTableWords);
    const int64_t own = call.has_ensemble ? documents : 0;
    take(exponent, own);
    take(low, own);
    take(high, own);
    take(logit, own);
    take(teachers, own * teacher_count);
    take(mean, queries * teacher_count);
    take(scale, queries * teacher_count);
    take(energy, queries * teacher_count);
    take(weight, queries * teacher_count);
    take(measured, pieces * teacher_count);
    take(piece_pull, pieces * teacher_count);
    const int64_t distilled = call.has_loss ? documents : 0;
    take(z, distilled);
    take(loss_parts, call.has_loss ? pieces : 0);
    take(distill_moments, call.has_loss && pairwise != PairSum::direct ? 2 * pieces * kKind : 0);
    take(distill_fields, call.has_loss && pairwise != PairSum::direct ? 2 * queries * kKind : 0);
    bytes = at - base;
  }
};

// The largest q whose base(q) is not beyond `index`.
template <class Base>
PILE_DEVICE int64_t owner(int64_t queries, int64_t index, Base base) {
  int64_t low = 0, high = queries;
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    (base(middle) <= index ? low : high) = middle;
  }
  return low;
}

// A piece of a query: positions (or slots) [begin, end), empty where there are fewer pieces than the bound.
struct Piece {
  Query query;
  int64_t index;
  int number, begin, end;

  PILE_DEVICE Piece(const Call& call, const LongState& state) : index(blockIdx.x) {
    const int64_t q =
        state.packed ? owner(call.batch.queries, index, [&](int64_t k) { return state.first_piece(k, locate(call, k).output); })
                     : index / state.list_pieces;
    query = locate(call, q);
    number = int(smaller<int64_t>(index - state.first_piece(q, query.output), parts(query.n, kPiece)));
    begin = smaller(number * kPiece, query.n);
    end = smaller(begin + kPiece, query.n);
  }
};

// A label block of a query.
struct Block {
  Query query;
  int64_t index;
  int number;
  PILE_DEVICE Block(const Call& call, const LongState& state) : index(blockIdx.x) {
    const int64_t q =
        state.packed ? owner(call.batch.queries, index, [&](int64_t k) { return state.first_block(k, locate(call, k).output); })
                     : index / state.list_blocks;
    query = locate(call, q);
    number = int(smaller<int64_t>(index - state.first_block(q, query.output), kMostBlocks));
  }
};

// The views of one query's arrays.
struct LongQuery {
  const LongState& state;
  const Query& query;
  QueryState& own;
  int64_t first;

  PILE_DEVICE LongQuery(const LongState& state, const Query& query)
      : state(state), query(query), own(state.query[query.index]), first(query.output) {}
  PILE_DEVICE SortedKeys keys() const { return {state.keys + first}; }
  PILE_DEVICE int slot(int k) const {
    if (!state.order) return k;
    // Clamped: offsets that lead nowhere must not lead out of the tensors.
    return int(smaller(larger(state.order[first + k] - (state.packed ? first : 0), int64_t(0)), int64_t(query.n - 1)));
  }
  template <class T>
  PILE_DEVICE T* at(T* array) const {
    return array + first;
  }
  PILE_DEVICE int* block_begin() const { return state.block_begin + state.first_block(query.index, first) + query.index; }
  PILE_DEVICE double* prefix() const { return state.prefix + first + query.index; }
  PILE_DEVICE float* moments(int piece, int block) const {
    return state.moments + (state.first_slot(query.index, first) + piece + block) * state.kinds() * LongState::kKind;
  }
  PILE_DEVICE float* field(int block) const {
    return state.fields + (state.first_block(query.index, first) + block) * state.kinds() * LongState::kKind;
  }
  PILE_DEVICE bool meets_through_fields() const { return own.blocks > 1; }
  // Label block of a position.
  PILE_DEVICE int block_of(int k) const {
    const int* begin = block_begin();
    int low = 0, high = own.blocks;
    while (high - low > 1) {
      const int middle = (low + high) / 2;
      (begin[middle] <= k ? low : high) = middle;
    }
    return low;
  }
  PILE_DEVICE Teachers teachers(const Call& call) const {
    const int count = call.teachers();
    return {at(state.teachers),
            state.energy + query.index * count,
            state.weight + query.index * count,
            at(state.low),
            at(state.high),
            state.documents,
            count,
            call.by_document(),
            own.plain};
  }
};

// Shared memory of a block that works on a piece.
struct PieceMemory {
  float *tile, *tile_gain, *row_u, *tile_more, *pull, *fresh, *loss, *field, *partial;
  double* sums;
  static constexpr int kWords = 7 * kPiece + 2 * LongState::kKind + deposit_words(kPieceThreads) + 64;
  PILE_DEVICE explicit PieceMemory(unsigned char* base) {
    tile = reinterpret_cast<float*>(base);
    tile_gain = tile + kPiece;
    row_u = tile_gain + kPiece;
    tile_more = row_u + kPiece;
    pull = tile_more + kPiece;
    fresh = pull + kPiece;
    loss = fresh + kPiece;
    field = loss + kPiece;
    partial = field + 2 * LongState::kKind;
    sums = reinterpret_cast<double*>(partial + deposit_words(kPieceThreads));
  }
};

// visit(block number, lo, hi, block begin, block end) for every label block that overlaps positions [begin, end).
template <class Visit>
PILE_DEVICE void for_blocks(const LongQuery& q, int begin, int end, Visit visit) {
  end = smaller(end, q.own.counts.labelled);
  if (begin >= end) return;
  const int* starts = q.block_begin();
  for (int b = q.block_of(begin); b < q.own.blocks && starts[b] < end; ++b)
    visit(b, larger(begin, starts[b]), smaller(end, starts[b + 1]), starts[b], starts[b + 1]);
}

// Does a label block hold several labels?
PILE_DEVICE bool is_mixed(const LongQuery& q, int block_begin, int block_end) {
  return q.at(q.state.last)[block_begin] < block_end;
}

// Tiles of columns [begin, end) in shared memory: load(j) into memory.tile, then use(from, to); the whole block calls.
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

// The phases both files launch.
void prepare_fields(const LongState& state, cudaStream_t stream);  // unless direct: the tables, and moments of 0 to deposit in
void launch_order(const Call& call, const LongState& state, PairWeight weight,
                  cudaStream_t stream);  // bounds, label blocks, weights
void launch_solve(const Call& call, const LongState& state, bool losses, cudaStream_t stream);

}  // namespace gpu
}  // namespace pile
