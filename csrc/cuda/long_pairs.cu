// Long lists, what the ensemble and the loss share: keys to sort by, label blocks, pair weights, and the fields' linear algebra.
//
// solve_blocks is the one phase here that runs per iteration: a block per label block reads the moments of every slot below and above
// it (kinds · cells · 32 bytes for every 1,024 documents, from L2) and multiplies them with 8 x 8 matrices: cells · 29 · 64
// multiply-adds at most. Latency limits it: two or three sums of a few dozen dependent loads.
#include "long_lists.h"
#include "launch.h"

namespace pile {
namespace gpu {
namespace {

__global__ void __launch_bounds__(kPieceThreads, 2)
    write_keys(const Call call, const LongState state, int64_t* keys, bool scored) {
  const Piece piece(call, state);
  for (int i = piece.begin + int(threadIdx.x); i < piece.end; i += kPieceThreads) {
    uint64_t key = slot_key(call, piece.query, i, true);
    if (scored && key != kAbsent) {
      const View& view = call.batch.teacher;
      bool any = false;
      for (int m = 0; m < call.teachers() && !any; ++m)
        any = is_number(load_score(view, at(view, piece.query, i) + m * view.teacher)) &&
              prior_weight(call, piece.query.index, m) > 0;
      if (!any) key = kUnscored;
    }
    keys[piece.query.output + i] = int64_t(key ^ uint64_t(1) << 63);
  }
}

// Label bounds and gains; gains also summed over the piece.
__global__ void __launch_bounds__(kPieceThreads, 2) bound_labels(const Call call, const LongState state, PairWeight weight) {
  PILE_SHARED_MEMORY(memory);
  const Piece piece(call, state);
  const LongQuery q(state, piece.query);
  const int labelled = q.own.counts.labelled, end = smaller(piece.end, labelled);
  if (piece.begin >= end) return;
  const SortedKeys keys = q.keys();
  const Gains gain_of(weight, keys, labelled);
  for (int k = piece.begin + int(threadIdx.x); k < end; k += kPieceThreads) {
    const uint64_t key = keys[k];
    q.at(state.first)[k] = lower_bound(keys, 0, k, key);
    q.at(state.last)[k] = lower_bound(keys, k + 1, labelled, key + 1);
    if (state.weighted) q.at(state.gain)[k] = float(gain_of(key));
  }
  if (!state.weighted) return;
  BlockTeam team;
  team.partial = reinterpret_cast<double*>(memory);
  team.sync();
  const float* gains = q.at(state.gain) + piece.begin;
  const double sum = ordered_sum(team, end - piece.begin, [&](int k) { return gains[k]; });
  if (team.rank == 0) state.piece_sum[piece.index] = sum;
}

// A query's label blocks, and running sums of the pieces' gains.
__global__ void __launch_bounds__(kQueryThreads, 1) cut_blocks(const Call call, const LongState state) {
  PILE_SHARED_MEMORY(memory);
  const Query query = locate(call, blockIdx.x);
  const LongQuery q(state, query);
  const int labelled = q.own.counts.labelled, rank = int(threadIdx.x);
  const int *first = q.at(state.first), *last = q.at(state.last);
  int* const starts = reinterpret_cast<int*>(memory);  // two for each window, -1: none
  const int size = larger(kLeastBlock, int(parts(labelled, kWindows)));
  if (rank < kWindows) {
    int one = -1, two = -1;
    const int begin = rank * size, end = smaller(begin + size, labelled);
    if (begin < labelled) {
      // The first group that starts in the window; and a group of `size` or more, which then reaches into the next window.
      one = first[begin] == begin ? begin : last[begin];
      if (one >= end) one = -1;
      if (end < labelled && first[end] >= begin && last[end] - first[end] >= size && first[end] != one && first[end] < end)
        two = first[end];
    }
    starts[2 * rank] = one;
    starts[2 * rank + 1] = two;
  }
  __syncthreads();
  if (rank == 0) {
    int* const to = q.block_begin();
    int count = 0;
    if (q.own.grid.cells > 0)
      for (int k = 0; k < kMostBlocks; ++k)
        if (starts[k] >= 0) to[count++] = starts[k];
    if (count == 0 && labelled > 0) to[count++] = 0;
    to[count] = labelled;
    q.own.blocks = count;
  }
  if (!state.weighted) return;
  const int64_t piece = state.first_piece(query.index, query.output);
  double* const to = state.piece_prefix + piece + query.index;
  if (rank == 0) to[0] = 0;
  running_sum(BlockTeam(), state.piece_sum + piece, to, int(parts(labelled, kPiece)));
}

__global__ void __launch_bounds__(32, 1) sum_gains(const Call call, const LongState state) {
  const Piece piece(call, state);
  const LongQuery q(state, piece.query);
  const int count = smaller(piece.end, q.own.counts.labelled) - piece.begin;
  if (count <= 0) return;
  const double before = state.piece_prefix[piece.index + piece.query.index];
  if (threadIdx.x == 0 && piece.number == 0) q.prefix()[0] = 0;
  running_sum(BlockTeam(), q.at(state.gain) + piece.begin, q.prefix() + piece.begin, count, before);
}

// 1 / k_i, Σ ω above within the label block, and the piece's Σ ω above.
__global__ void __launch_bounds__(kPieceThreads, 2) weigh_labels(const Call call, const LongState state) {
  PILE_SHARED_MEMORY(memory);
  double* const up_of = reinterpret_cast<double*>(memory);
  BlockTeam team;
  team.partial = up_of + kPiece;
  const Piece piece(call, state);
  const LongQuery q(state, piece.query);
  const int labelled = q.own.counts.labelled, end = smaller(piece.end, labelled);
  for (int k = piece.begin + team.rank; k < end; k += kPieceThreads) {
    const int first = q.at(state.first)[k], last = q.at(state.last)[k], begin = q.block_begin()[q.block_of(k)];
    double up = first, down = labelled - last, within = first - begin;
    if (state.weighted) {
      const double* prefix = q.prefix();
      const double own = q.at(state.gain)[k];
      up = prefix[first] - up * own;
      down = down * own - (prefix[labelled] - prefix[last]);
      within = prefix[first] - prefix[begin] - within * own;
    }
    q.at(state.above)[k] = float(within);
    q.at(state.per_pair)[k] = up + down > 0 ? float(1 / (up + down)) : 0.0f;
    up_of[k - piece.begin] = up;
  }
  team.sync();
  const double sum = ordered_sum(team, larger(end - piece.begin, 0), [&](int k) { return up_of[k]; });
  if (team.rank == 0) state.piece_sum[piece.index] = sum;
}

__global__ void __launch_bounds__(32, 1) total_pairs(const Call call, const LongState state) {
  const Query query = locate(call, blockIdx.x);
  const LongQuery q(state, query);
  const double* sums = state.piece_sum + state.first_piece(query.index, query.output);
  const double pairs = ordered_sum(WarpTeam(), int(parts(q.own.counts.labelled, kPiece)), [&](int p) { return sums[p]; });
  if (threadIdx.x == 0) q.own.pairs = pairs;
}

// κ at ±offset and ψ at +offset, tabulated.
__global__ void __launch_bounds__(kPieceThreads, 2) tabulate(const LongState state) {
  PILE_SHARED_MEMORY(memory);
  auto& cell = *reinterpret_cast<CellNodes<double, kPowers>*>(memory);
  if (threadIdx.x < kPowers) cell.set(int(threadIdx.x));
  __syncthreads();
  const int word = int(blockIdx.x) * kPieceThreads + int(threadIdx.x);
  if (word >= 3 * kTableWords) return;
  const int table = word / kTableWords;
  state.tables[word] =
      table_entry(table == 1 ? -double(state.offset) : double(state.offset), table == 2, word % kTableWords, cell);
}

__global__ void __launch_bounds__(kSolveThreads, 1) solve_blocks(const Call call, const LongState state, bool losses) {
  PILE_SHARED_MEMORY(memory);
  const Block block(call, state);
  const LongQuery q(state, block.query);
  if (block.number >= q.own.blocks || !q.meets_through_fields()) return;
  BlockTeam team;
  float* const low = reinterpret_cast<float*>(memory);
  float *const high = low + 2 * LongState::kKind, *const partial = high + 2 * LongState::kKind;
  team.partial = reinterpret_cast<double*>(partial + kSolveThreads);
  const int cells = q.own.grid.cells, row = cells * kPowers, words = state.kinds() * row, b = block.number;
  const int* begin = q.block_begin();
  const int labelled = begin[q.own.blocks];
  const int64_t stride = int64_t(state.kinds()) * LongState::kKind;
  const float* slots = q.moments(0, 0);
  // Slots that no piece and block share hold zeros.
  const int own_slot = begin[b] / kPiece + b, next_slot = (begin[b + 1] - 1) / kPiece + b + 1,
            last_slot = (labelled - 1) / kPiece + q.own.blocks;
  sum_moments(slots, stride, next_slot, last_slot, words, partial, low);
  const float *plus = state.tables, *minus = plus + kTableWords, *of_psi = minus + kTableWords;
  const double offset = state.offset;
  if (losses) {
    sum_moments(slots, stride, own_slot, next_slot, words, partial, high);  // the block's own, for now
    const double loss = ordered_sum(team, cells, [&](int c) {
      if (!state.weighted) return apply_psi<true>(of_psi, offset, high, low, cells, c);
      return apply_psi<true>(of_psi, offset, high + row, low, cells, c) -
             apply_psi<true>(of_psi, offset, high, low + row, cells, c);
    });
    if (team.rank == 0) state.block_sum[block.index] = loss;
    team.sync();
  }
  sum_moments(slots, stride, 0, own_slot, words, partial, high);
  // Σ_below ω σ(offset − (u − u_j)) − Σ_above ω σ(offset − (u_j − u)) by σ = 1/2 + κ and κ odd. Counts: Σ_below κ(offset + u_j − u) +
  // Σ_above κ(u_j − u − offset); where gains give ω its sign, minus.
  const float sign = state.weighted ? -1.0f : 1.0f;
  float* const field = q.field(b);
  for (int e = team.rank; e < words; e += team.size) {
    const int kind = e / row, c = e % row / kPowers, power = e % kPowers;
    const float *below = low + kind * row, *above = high + kind * row;
    float value =
        apply_kappa(plus, offset, below, cells, c, power) + sign * apply_kappa(minus, -offset, above, cells, c, power);
    if (power == 0) {
      float half = 0;
      for (int s = 0; s < cells; ++s) half += below[s * kPowers] - sign * above[s * kPowers];
      value += half / 2;
    }
    field[e] = value;
  }
}

}  // namespace

void launch_keys(const Call& call, int64_t* keys, bool scored, cudaStream_t stream) {
  const LongState state(call, nullptr, false, PairSum::direct, 0);
  PILE_LAUNCH(write_keys, unsigned(state.pieces), kPieceThreads, 0, stream, call, state, keys, scored);
  check(cudaGetLastError(), "write_keys");
}

void prepare_fields(const LongState& state, cudaStream_t stream) {
  if (state.pairwise == PairSum::direct) return;
  PILE_LAUNCH(tabulate, unsigned(parts(3 * kTableWords, kPieceThreads)), kPieceThreads, sizeof(CellNodes<double, kPowers>),
              stream, state);
  check(cudaGetLastError(), "tabulate");
  check(cudaMemsetAsync(state.moments, 0, size_t(state.slots * state.kinds() * LongState::kKind) * sizeof(float), stream),
        "cudaMemsetAsync");
}

void launch_order(const Call& call, const LongState& state, PairWeight weight, cudaStream_t stream) {
  const unsigned pieces = unsigned(state.pieces), queries = unsigned(call.batch.queries);
  constexpr int kSums = 32 * sizeof(double);
  PILE_LAUNCH(bound_labels, pieces, kPieceThreads, kSums, stream, call, state, weight);
  PILE_LAUNCH(cut_blocks, queries, kQueryThreads, kMostBlocks * sizeof(int), stream, call, state);
  if (state.weighted) PILE_LAUNCH(sum_gains, pieces, 32, 0, stream, call, state);
  PILE_LAUNCH(weigh_labels, pieces, kPieceThreads, kPiece * sizeof(double) + kSums, stream, call, state);
  PILE_LAUNCH(total_pairs, queries, 32, 0, stream, call, state);
  check(cudaGetLastError(), "the launches that order long lists");
}

void launch_solve(const Call& call, const LongState& state, bool losses, cudaStream_t stream) {
  if (state.pairwise == PairSum::direct) return;
  constexpr size_t kShared = (4 * LongState::kKind + kSolveThreads) * sizeof(float) + 32 * sizeof(double);
  PILE_LAUNCH(solve_blocks, unsigned(state.blocks), kSolveThreads, kShared, stream, call, state, losses);
  check(cudaGetLastError(), "solve_blocks");
}

}  // namespace gpu
}  // namespace pile
