// Long lists, what the ensemble and the loss share: scratch, keys to sort by, label blocks, pair weights, the fields' linear
// algebra.
//
// solve_label_blocks is the one phase here that runs per iteration: a block per label block reads the moments of every overlap
// below and above it (kinds · cells · 32 bytes for every 1,024 documents, from L2) and multiplies them with 8 x 8 matrices:
// cells · 29 · 64 multiply-adds at most. Latency limits it: two or three sums of a few dozen dependent loads.
#include "launch.h"
#include "terms.h"

namespace pile::gpu {
namespace {

__global__ void __launch_bounds__(kPieceThreads, 2) write_keys(const LongState state, int64_t* keys) {
  const Piece piece(state);
  const Call& call = state.call;
  for (int i = piece.begin + int(threadIdx.x); i < piece.end; i += kPieceThreads) {
    int64_t key = slot_key(call, piece.query, i, true, !call.has_ensemble);
    if (call.has_ensemble && key != kAbsent) {
      const View& view = call.batch.teacher;
      bool any = false;
      for (int m = 0; m < call.teachers() && !any; ++m)
        any = is_number(load_score(view, at(view, piece.query, i) + m * view.teacher)) &&
              prior_weight(call, piece.query.index, m) > 0;
      if (!any) key = kUnscored;
    }
    piece.at(keys)[i] = key;
  }
}

// Label bounds and gains; gains also summed over the piece.
__global__ void __launch_bounds__(kPieceThreads, 2) bound_labels(const LongState state, LabelGain gain) {
  PILE_SHARED_MEMORY(memory);
  const Piece piece(state);
  const int labelled = piece.own.counts.labelled, end = piece.labelled_end();
  if (piece.begin >= end) return;
  const int64_t* keys = piece.keys();
  const Gains gain_of(gain, keys, labelled);
  float* const gains = piece.at(state.gain);
  for (int k = piece.begin + int(threadIdx.x); k < end; k += kPieceThreads) {
    const int64_t key = keys[k];
    piece.at(state.first)[k] = lower_bound(keys, 0, k, key);
    piece.at(state.last)[k] = lower_bound(keys, k + 1, labelled, key + 1);
    if (state.weighted) gains[k] = float(gain_of(key));
  }
  if (!state.weighted) return;
  const BlockTeam team(memory);
  team.sync();
  const double sum = ordered_sum(team, end - piece.begin, [&](int k) { return gains[piece.begin + k]; });
  if (team.rank == 0) state.piece_sum[piece.index] = sum;
}

// A query's label blocks, and running sums of the pieces' gains.
__global__ void __launch_bounds__(kQueryThreads, 1) cut_label_blocks(const LongState state) {
  PILE_SHARED_MEMORY(memory);
  const LongQuery q(state, blockIdx.x);
  const int labelled = q.own.counts.labelled, rank = int(threadIdx.x);
  const int *first = q.at(state.first), *last = q.at(state.last);
  int* const starts = reinterpret_cast<int*>(memory);  // two for each window, -1: none
  const int size = larger(kLeastLabelBlock, int(parts(labelled, kWindows)));
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
    int* const to = q.label_starts();
    int count = 0;
    if (q.own.grid.cells > 0)
      for (int k = 0; k < kMostLabelBlocks; ++k)
        if (starts[k] >= 0) to[count++] = starts[k];
    if (count == 0 && labelled > 0) to[count++] = 0;
    to[count] = labelled;
    q.own.label_blocks = count;
  }
  if (!state.weighted) return;
  const int64_t piece = q.first_piece();
  double* const to = state.piece_prefix + piece + q.query.index;
  if (rank == 0) to[0] = 0;
  running_sum(BlockTeam(), state.piece_sum + piece, to, q.labelled_pieces());
}

__global__ void __launch_bounds__(32, 1) sum_gains(const LongState state) {
  const Piece piece(state);
  const int count = piece.labelled_end() - piece.begin;
  if (count <= 0) return;
  const double before = state.piece_prefix[piece.index + piece.query.index];
  if (threadIdx.x == 0 && piece.number == 0) piece.prefix()[0] = 0;
  running_sum(BlockTeam(), piece.at(state.gain) + piece.begin, piece.prefix() + piece.begin, count, before);
}

// 1 / k_i, Σ ω above within the label block, and the piece's Σ ω above.
__global__ void __launch_bounds__(kPieceThreads, 2) weigh_labels(const LongState state) {
  PILE_SHARED_MEMORY(memory);
  double* const up_of = reinterpret_cast<double*>(memory);
  const BlockTeam team(up_of + kPiece);
  const Piece piece(state);
  const int end = piece.labelled_end();
  const double* prefix = piece.prefix();
  for (int k = piece.begin + team.rank; k < end; k += kPieceThreads) {
    const int first = piece.at(state.first)[k], begin = piece.label_starts()[piece.label_block_of(k)];
    const double gain = prefix ? piece.at(state.gain)[k] : 0.0f;
    const OwnPairs own(first, piece.at(state.last)[k], piece.own.counts.labelled, prefix, gain);
    double within = first - begin;
    if (prefix) within = prefix[first] - prefix[begin] - within * gain;
    piece.at(state.above)[k] = float(within);
    piece.at(state.per_pair)[k] = own.share();
    up_of[k - piece.begin] = own.above;
  }
  team.sync();
  const double sum = ordered_sum(team, larger(end - piece.begin, 0), [&](int k) { return up_of[k]; });
  if (team.rank == 0) state.piece_sum[piece.index] = sum;
}

__global__ void __launch_bounds__(32, 1) total_pairs(const LongState state) {
  const LongQuery q(state, blockIdx.x);
  const double pairs = q.sum_pieces(WarpTeam(), q.labelled_pieces());
  if (threadIdx.x == 0) q.own.pairs = pairs;
}

// Tables of κ at ±offset and ψ at +offset: made by the first launch of a call, so there is nothing to cache.
__global__ void __launch_bounds__(kPieceThreads, 2) tabulate(const LongState state) {
  PILE_SHARED_MEMORY(memory);
  auto& cell = *reinterpret_cast<CellNodes<double, kPowers>*>(memory);
  if (threadIdx.x < kPowers) cell.set(int(threadIdx.x));
  __syncthreads();
  const int word = int(blockIdx.x) * kPieceThreads + int(threadIdx.x), which = word / kTableWords;
  if (which >= 3) return;
  const int entry = word % kTableWords / (kPowers * kPowers), source = word / kPowers % kPowers, target = word % kPowers;
  const double offset = state.table(which).offset, shift = offset + kCell * (Reach::first(offset) + entry);
  double total = 0;
  for (int t = 0; t < kPowers; ++t) {
    double half = 0;
    for (int s = 0; s < kPowers; ++s) {
      const double v = shift + cell.node[s] - cell.node[t];
      half += cell.lagrange[source][s] * (which == 2 ? psi(v) : kappa(v));
    }
    total += cell.lagrange[target][t] * half;
  }
  state.tables[word] = float(total);
}

__global__ void __launch_bounds__(kSolveThreads, 1) solve_label_blocks(const LongState state, bool losses) {
  PILE_SHARED_MEMORY(memory);
  const LabelBlock q(state);
  if (q.number >= q.own.label_blocks || !q.meets_through_fields()) return;
  float* const low = reinterpret_cast<float*>(memory);
  float *const high = low + 2 * LongState::kKind, *const partial = high + 2 * LongState::kKind;
  const BlockTeam team(partial + kSolveThreads);
  const int cells = q.own.grid.cells, row = cells * kPowers, words = state.kinds() * row, b = q.number;
  const int* begin = q.label_starts();
  // Numbers that no piece and label block share hold zeros.
  const int sides = state.sides();
  const MomentRows lower = {q.moments(0, 0), sides * state.side_words(), words, partial};
  const MomentRows higher = {lower.rows + (sides - 1) * state.side_words(), lower.stride, words, partial};
  const int own = begin[b] / kPiece + b, next = (begin[b + 1] - 1) / kPiece + b + 1,
            last = (begin[q.own.label_blocks] - 1) / kPiece + q.own.label_blocks;
  lower.sum(next, last, low);
  const CellTable plus = state.table(0), minus = state.table(1), psi = state.table(2);
  if (losses) {
    higher.sum(own, next, high);  // the label block's own, for now
    const double loss = ordered_sum(team, cells, [&](int c) {
      if (!state.weighted) return psi.apply_psi<true>(high, low, cells, c);
      return psi.apply_psi<true>(high + row, low, cells, c) - psi.apply_psi<true>(high, low + row, cells, c);
    });
    if (team.rank == 0) state.label_sum[q.index] = loss;
    team.sync();
  }
  higher.sum(0, own, high);
  // Σ_below ω σ(offset − (u − u_j)) − Σ_above ω σ(offset − (u_j − u)) by σ = 1/2 + κ and κ odd.
  // Counts: Σ_below κ(offset + u_j − u) + Σ_above κ(u_j − u − offset); where gains give ω its sign, minus.
  const float sign = state.weighted ? -1.0f : 1.0f;
  for (int e = team.rank; e < sides * words; e += team.size) {
    const int side = e / words, own_e = e % words, kind = own_e / row, c = own_e % row / kPowers, power = e % kPowers;
    const bool of_lower = side == 0, of_higher = side == sides - 1;
    const float *below = low + kind * row, *above = high + kind * row;
    float value = of_lower ? plus.apply_kappa(below, cells, c, power) : 0.0f;
    if (of_higher) value += sign * minus.apply_kappa(above, cells, c, power);
    if (power == 0) {
      float half = 0;
      for (int s = 0; s < cells; ++s)
        half += (of_lower ? below[s * kPowers] : 0.0f) - (of_higher ? sign * above[s * kPowers] : 0.0f);
      value += half / 2;
    }
    q.field(b, side)[own_e] = value;
  }
}

}  // namespace

LongState::LongState(const Call& call) : call(call), documents(call.documents()), packed(call.batch.packed()) {
  const bool ensemble = call.has_ensemble, pairs = call.by_pairs() || call.ranks();
  weighted = (ensemble ? gain_of(call.ensemble.pair_weight) : call.label_gain) != LabelGain::none && pairs;
  pairwise = ensemble ? call.ensemble.pairwise : call.loss.pairwise;
  label_fields = pairs && pairwise != PairSum::direct;
  if (!ensemble && pairs) with_loss(call.loss.label_loss, [&](auto of, auto) { label_fields = label_fields && of.kFields; });
  offset = ensemble ? call.offset : 0.0f;
  const int64_t queries = call.batch.queries;
  list_pieces = larger<int64_t>(parts(call.batch.slots, kPiece), 1);
  list_label_blocks = smaller<int64_t>(kMostLabelBlocks, 2 * larger<int64_t>(parts(call.batch.slots, kLeastLabelBlock), 1));
  pieces = packed ? documents / kPiece + queries : queries * list_pieces;
  label_blocks = packed ? 2 * (documents / kLeastLabelBlock + queries) : queries * list_label_blocks;
  overlaps = pieces + label_blocks;
  char* at = static_cast<char*>(call.scratch);
  const auto take_one = [&](auto*& pointer, int64_t count) {
    pointer = reinterpret_cast<std::remove_reference_t<decltype(pointer)>>(at);
    at += parts(count * int64_t(sizeof *pointer), 16) * 16;
  };
  const auto take = [&](int64_t count, auto*&... pointers) { (take_one(pointers, count), ...); };
  take(queries, query);
  take(3 * kTableWords, tables);
  take(pieces, piece_sum);
  take(documents, u[0], u[1]);
  weight = nullptr;
  if (!ensemble && call.batch.weights.data) take(documents, weight);
  take(pairs ? documents : 0, gain, per_pair, above, first, last);
  take(pairs ? label_blocks + queries : 0, label_starts);
  take(pairs ? label_blocks : 0, label_sum);
  take(weighted ? documents + queries : 0, prefix);
  take(weighted ? pieces + queries : 0, piece_prefix);
  take(label_fields ? overlaps * sides() * side_words() : 0, moments);
  take(label_fields ? label_blocks * sides() * side_words() : 0, fields);
  take(ensemble ? documents : 0, exponent, low, high, logit);
  take(documents * call.teachers(), teachers);
  take(queries * call.teachers(), mean, scale);
  take(2 * queries * call.teachers(), energy);
  take(pieces * call.teachers(), measured);
  take(pieces * call.teachers(), piece_pull);
  take(call.has_loss ? pieces : 0, loss_parts);
  const auto take_own = [&](float*& own, const auto& kind, bool used) {
    int64_t words = 0;
    if (used) with_loss(kind, [&](auto of, auto) { words = of.words(*this); });
    take(words, own);
  };
  take_own(of_distillation, call.loss.distillation, call.distills());
  take_own(of_label_loss, call.loss.label_loss, call.ranks());
  bytes = at - static_cast<char*>(call.scratch);
}

void LongRun::tabulate() const {
  if (state.pairwise == PairSum::direct) return;
  launch(gpu::tabulate, parts(3 * kTableWords, kPieceThreads), kPieceThreads, sizeof(CellNodes<double, kPowers>), stream,
         state);
}

void LongRun::bound(LabelGain gain) const {
  if (state.label_fields)
    check(
        cudaMemsetAsync(state.moments, 0, size_t(state.overlaps * state.sides() * state.side_words()) * sizeof(float), stream),
        "cudaMemsetAsync");
  pieces(bound_labels, BlockTeam::kBytes, gain);
  queries(cut_label_blocks, kQueryThreads, kMostLabelBlocks * sizeof(int));
}

void LongRun::weigh() const {
  if (state.weighted) launch(sum_gains, state.pieces, 32, 0, stream, state);
  pieces(weigh_labels, kPiece * sizeof(double) + BlockTeam::kBytes);
  total();
}

void LongRun::total() const { queries(total_pairs, 32, 0); }

void LongRun::solve(bool losses) const {
  if (!state.label_fields) return;
  constexpr size_t kBytes = (4 * LongState::kKind + kSolveThreads) * sizeof(float) + BlockTeam::kBytes;
  launch(solve_label_blocks, state.label_blocks, kSolveThreads, kBytes, stream, state, losses);
}

void long_keys(const Call& call, int64_t* keys, cudaStream_t stream) {
  if (!keys) return;  // no document
  LongState state(call);
  // There is no scratch yet. Kernels name a query's state; this one does not read it.
  state.query = reinterpret_cast<QueryState*>(keys);
  LongRun{state, stream}.pieces(write_keys, 0, keys);
  check(cudaGetLastError(), "the launch of the keys");
}

int64_t long_bytes(const Call& call) { return LongState(call).bytes; }

}  // namespace pile::gpu
