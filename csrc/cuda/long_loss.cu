// Long lists: the student's loss and gradient, 9 launches for the distillation, 6 more and a sort for the label pairs.
//
// Label pairs (R) meet like the ensemble's: through fields between label blocks, directly inside mixed ones. For the distillation (D)
// all documents meet all through two fields, the student's and the target's:
//
//   Σ_{i<j} BCE = Σ_{i<j} log 2cosh(dz/2) − (σ(ds) − 1/2) dz,  the second sum −Σ_i z_i Σ_j κ(s_j − s_i);  slope_i = field_s − field_z.
//
// Where a range is too wide for a grid, or direct sums are asked for, every piece walks through all columns. pair_pieces, the phase that
// counts: 20 bytes per document read, 4 written, 60 operations through fields; T iterations of the ensemble cost more.
#include "long_lists.h"
#include "launch.h"

namespace pile {
namespace gpu {
namespace {

// Student and target by position.
__global__ void __launch_bounds__(kPieceThreads, 2) load_pieces(const Call call, const LongState state) {
  PILE_SHARED_MEMORY(memory);
  BlockTeam team;
  team.partial = reinterpret_cast<double*>(memory);
  double* const differences = team.partial + 32;
  const Piece piece(call, state);
  const LongQuery q(state, piece.query);
  const View &student = call.batch.student, &target = call.batch.target;
  LossPart part = {};
  part.labels = part.z = part.s = Range();
  for (int k = piece.begin + team.rank; k < piece.end; k += kPieceThreads) {
    const int slot = q.slot(k);
    const bool valid = holds_document(call, piece.query, slot);
    const float z = valid ? load_logit(student, at(student, piece.query, slot)) : 0.0f;
    const float s = valid && call.distills() ? load_score(target, at(target, piece.query, slot)) : not_a_number();
    const bool used = is_number(s);
    q.at(state.u[0])[k] = z;
    q.at(state.u[1])[k] = s;
    differences[k - piece.begin] = used ? double(z) - double(s) : 0.0;
    part.broken += fabsf(z) < kInfinity ? 0 : 1;
    if (valid) part.labels.join(z, z);
    if (!used) continue;
    part.targets += 1;
    part.z.join(z, z);
    part.s.join(s, s);
  }
  part.broken = team.sum(part.broken);
  part.targets = team.sum(part.targets);
  auto join = [&](Range& range) { range = {lowest(team, range.low), -lowest(team, -range.high)}; };
  join(part.labels);
  join(part.z);
  join(part.s);
  team.sync();
  part.difference = ordered_sum(team, piece.end - piece.begin, [&](int k) { return differences[k]; });
  if (team.rank == 0) state.loss_parts[piece.index] = part;
}

__global__ void __launch_bounds__(32, 1) join_pieces(const Call call, const LongState state) {
  if (threadIdx.x > 0) return;
  const Query query = locate(call, blockIdx.x);
  const LongQuery q(state, query);
  QueryState& own = q.own;
  LossPart all = {};
  all.labels = all.z = all.s = Range();
  const LossPart* of = state.loss_parts + state.first_piece(query.index, query.output);
  for (int p = 0; p < int(parts(query.n, kPiece)); ++p) {
    all.broken += of[p].broken;
    all.targets += of[p].targets;
    all.difference += of[p].difference;
    all.labels.join(of[p].labels.low, of[p].labels.high);
    all.z.join(of[p].z.low, of[p].z.high);
    all.s.join(of[p].s.low, of[p].s.high);
  }
  own.counts = {0, query.n, query.n};
  if (state.keys) own.counts = Counts::of(q.keys(), query.n);
  own.broken = all.broken > 0;
  own.targets = all.targets;
  own.z_pivot = all.targets > 0 ? all.z.low : 0.0f;
  own.s_pivot = all.targets > 0 ? all.s.low : 0.0f;
  own.mean_difference = all.targets > 0 ? all.difference / all.targets - double(own.z_pivot) + double(own.s_pivot) : 0.0;
  own.range = all.labels;
  // From the pivots, in units of τ, as scale_pieces leaves the logits.
  if (all.targets > 0) all.z = {0, (all.z.high - all.z.low) * call.per_tau};
  if (all.targets > 0) all.s = {0, (all.s.high - all.s.low) * call.per_tau};
  own.z_range = all.z;
  own.s_range = all.s;
  own.pairs = own.distill_loss = 0;
  own.blocks = 0;
  own.grid = own.z_grid = own.s_grid = Grid();
  if (state.pairwise == PairSum::direct || own.broken) return;
  own.grid = Grid::over(all.labels.low, all.labels.high);
  if (call.mse) return;
  own.z_grid = Grid::over(all.z.low, all.z.high);
  own.s_grid = Grid::over(all.s.low, all.s.high);
}

// Student and target of the distillation, from the pivots and in units of τ: divided is only what has been subtracted.
__global__ void __launch_bounds__(kPieceThreads, 2) scale_pieces(const Call call, const LongState state) {
  const Piece piece(call, state);
  const LongQuery q(state, piece.query);
  for (int k = piece.begin + int(threadIdx.x); k < piece.end; k += kPieceThreads) {
    const float s = q.at(state.u[1])[k];
    const bool used = is_number(s);
    q.at(state.z)[k] = used ? (q.at(state.u[0])[k] - q.own.z_pivot) * call.per_tau : DistillColumns::kNeutral;
    q.at(state.u[1])[k] = used ? (s - q.own.s_pivot) * call.per_tau : DistillColumns::kNeutral;
  }
}

// A document that takes no part in the distillation is NaN to deposit().
PILE_DEVICE float used_or_nan(float scaled) { return scaled == DistillColumns::kNeutral ? not_a_number() : scaled; }

__global__ void __launch_bounds__(kPieceThreads, 2) deposit_pieces(const Call call, const LongState state) {
  PILE_SHARED_MEMORY(base);
  const PieceMemory memory(base);
  const Piece piece(call, state);
  const LongQuery q(state, piece.query);
  if (q.meets_through_fields())
    for_blocks(q, piece.begin, piece.end, [&](int b, int lo, int hi, int, int) {
      deposit<kOwn>(q.own.grid, q.at(state.u[0]) + lo, state.weighted ? q.at(state.gain) + lo : nullptr, hi - lo,
                    memory.partial, q.moments(piece.number, b));
    });
  if (!q.own.distills_through_fields() || piece.begin >= piece.end) return;
  for (int which = 0; which < 2; ++which) {
    const float* of = q.at(which ? state.u[1] : state.z);
    for (int k = piece.begin + int(threadIdx.x); k < piece.end; k += kPieceThreads)
      memory.fresh[k - piece.begin] = used_or_nan(of[k]);
    __syncthreads();
    deposit<kOwn>(which ? q.own.s_grid : q.own.z_grid, memory.fresh, nullptr, piece.end - piece.begin, memory.partial,
                  state.distill_moments + (which * state.pieces + piece.index) * LongState::kKind);
  }
}

// The field of all documents on themselves, of the student (even blocks) or the target (odd); and Σ ψ of the student's pairs.
__global__ void __launch_bounds__(kSolveThreads, 1) solve_distillation(const Call call, const LongState state) {
  PILE_SHARED_MEMORY(memory);
  const int64_t index = blockIdx.x / 2;
  const bool target = blockIdx.x % 2;
  const Query query = locate(call, index);
  const LongQuery q(state, query);
  if (!q.own.distills_through_fields()) return;
  BlockTeam team;
  float* const all = reinterpret_cast<float*>(memory);
  float* const partial = all + LongState::kKind;
  team.partial = reinterpret_cast<double*>(partial + kSolveThreads);
  const int cells = target ? q.own.s_grid.cells : q.own.z_grid.cells, words = cells * kPowers;
  const float* slots =
      state.distill_moments + ((target ? state.pieces : 0) + state.first_piece(index, query.output)) * LongState::kKind;
  sum_moments(slots, LongState::kKind, 0, int(parts(query.n, kPiece)), words, partial, all);
  float* field = state.distill_fields + (2 * index + target) * LongState::kKind;
  for (int e = team.rank; e < words; e += team.size)
    field[e] = apply_kappa(state.tables, 0, all, cells, e / kPowers, e % kPowers);
  if (target) return;
  const float* of_psi = state.tables + 2 * kTableWords;
  const double sum = ordered_sum(team, cells, [&](int c) { return apply_psi<false>(of_psi, 0, all, all, cells, c); });
  if (team.rank == 0) q.own.distill_loss = (sum - q.own.targets * 0.69314718055994530942) / 2;
}

// A document's slopes and losses, gathered in memory.pull and memory.loss, scaled.
struct PairSums {
  const Call& call;
  const LongState& state;
  const Piece& piece;
  const LongQuery& q;
  const PieceMemory& memory;
  int rank;

  PILE_DEVICE void add(int k, float slope, float loss) const {
    memory.pull[k - piece.begin] += slope;
    memory.loss[k - piece.begin] += loss;
  }
  // visit(k) by four lanes for the positions [lo, hi).
  template <class Visit>
  PILE_DEVICE void rows(int lo, int hi, Visit visit) const {
    for (int k = lo + rank / kLanes; k < hi; k += kPieceThreads / kLanes) visit(k);
  }

  template <bool kWeighted>
  PILE_DEVICE void label_pairs(float scale) const {
    const Lanes lanes(kLanes);
    const float *z = q.at(state.u[0]), *gains = q.at(state.gain);
    for_blocks(q, piece.begin, piece.end, [&](int b, int lo, int hi, int begin, int end) {
      if (is_mixed(q, begin, end))
        for_tiles(
            begin, end,
            [&](int j, int to) {
              memory.tile[to] = z[j];
              if (kWeighted) memory.tile_gain[to] = gains[j];
            },
            [&](int from, int to) {
              rows(lo, hi, [&](int k) {
                float slope = 0, above = 0, loss = 0;
                const float gain = kWeighted ? gains[k] : 0.0f;
                label_losses<true, kWeighted>(memory.tile - from, memory.tile_gain - from, z[k], gain, 1, 0,
                                              larger(q.at(state.last)[k], from), to, lanes, slope, loss);
                label_losses<false, kWeighted>(memory.tile - from, memory.tile_gain - from, z[k], gain, 1, 0,
                                               larger(begin, from), smaller(q.at(state.first)[k], to), lanes, above, loss);
                slope = lanes.sum(slope - above);
                loss = lanes.sum(loss);
                if (lanes.rank == 0) add(k, -scale * slope, scale * loss);
              });
            });
      if (!q.meets_through_fields()) return;
      const int row = q.own.grid.cells * kPowers;
      for (int e = rank; e < state.kinds() * row; e += kPieceThreads) memory.field[e] = q.field(b)[e];
      __syncthreads();
      for (int k = lo + rank; k < hi; k += kPieceThreads) {
        float x;
        const int cell = q.own.grid.locate(z[k], x);
        const float value = horner(memory.field, cell, x);
        add(k, -scale * (kWeighted ? gains[k] * value - horner(memory.field + row, cell, x) : value), 0);
      }
      __syncthreads();
    });
  }

  PILE_DEVICE void distill_through_fields(float scale) const {
    const int z_words = q.own.z_grid.cells * kPowers, s_words = q.own.s_grid.cells * kPowers;
    const float* fields = state.distill_fields + 2 * piece.query.index * LongState::kKind;
    for (int e = rank; e < z_words; e += kPieceThreads) memory.field[e] = fields[e];
    for (int e = rank; e < s_words; e += kPieceThreads) memory.field[LongState::kKind + e] = fields[LongState::kKind + e];
    __syncthreads();
    for (int k = piece.begin + rank; k < piece.end; k += kPieceThreads) {
      const float z = q.at(state.z)[k], s = q.at(state.u[1])[k];
      if (s == DistillColumns::kNeutral) continue;
      float x;
      const int z_cell = q.own.z_grid.locate(z, x);
      const float of_z = horner(memory.field, z_cell, x);
      const int s_cell = q.own.s_grid.locate(s, x);
      const float of_s = horner(memory.field + LongState::kKind, s_cell, x);
      // z about its middle: the cross terms are then no larger than they must be.
      add(k, scale * call.per_tau * (of_s - of_z), scale * (z - q.own.z_range.middle()) * of_s);
    }
    __syncthreads();
  }

  template <bool kWide>
  PILE_DEVICE void distill_directly(float scale) const {
    const Lanes lanes(kLanes);
    const float *z = q.at(state.z), *s = q.at(state.u[1]);
    const float z_middle = q.own.z_range.middle(), s_middle = q.own.s_range.middle();
    const int n = piece.query.n;
    for_tiles(
        0, parts(n, 4) * 4,
        [&](int j, int to) {
          const float own_z = j < n ? z[j] : DistillColumns::kNeutral, own_s = j < n ? s[j] : DistillColumns::kNeutral;
          const bool used = own_s != DistillColumns::kNeutral;
          memory.tile[to] = own_z;
          memory.tile_gain[to] = own_s;
          memory.row_u[to] = used && !kWide ? expf(own_z - z_middle) : 0.0f;
          memory.tile_more[to] = used && !kWide ? expf(own_s - s_middle) : 0.0f;
        },
        [&](int from, int to) {
          const DistillColumns columns = {memory.tile - from, memory.tile_gain - from, memory.row_u - from,
                                          memory.tile_more - from};
          rows(piece.begin, piece.end, [&](int k) {
            if (s[k] == DistillColumns::kNeutral) return;
            const DistillRow row = {k, z[k], s[k], expf(z[k] - z_middle), expf(s[k] - s_middle)};
            float slope = 0, loss = 0;
            kWide ? distill_wide(columns, row, from, to, lanes, slope, loss)
                  : distill_narrow(columns, row, from, to, lanes, slope, loss);
            slope = lanes.sum(slope);
            loss = lanes.sum(loss);
            if (lanes.rank == 0) add(k, scale * call.per_tau * slope, scale * loss);
          });
        });
  }

  PILE_DEVICE void square(float scale) const {
    for (int k = piece.begin + rank; k < piece.end; k += kPieceThreads) {
      const float z = q.at(state.z)[k], s = q.at(state.u[1])[k];
      if (s == DistillColumns::kNeutral) continue;
      const double d = double(z) - double(s) - q.own.mean_difference;
      add(k, scale * float(2 * q.own.targets * d), scale * float(q.own.targets * d * d));
    }
    __syncthreads();
  }
};

PILE_DEVICE float label_scale(const Call& call, const QueryState& own) {
  return own.pairs > 0 ? float((1 - call.loss.alpha) / own.pairs) : 0.0f;
}
PILE_DEVICE float distill_scale(const Call& call, const QueryState& own) {
  const double pairs = own.targets * (own.targets - 1) / 2;
  return pairs > 0 ? float(call.loss.alpha / pairs) : 0.0f;
}

__global__ void __launch_bounds__(kPieceThreads, 2) pair_pieces(const Call call, const LongState state) {
  PILE_SHARED_MEMORY(base);
  const PieceMemory memory(base);
  BlockTeam team;
  team.partial = memory.sums;
  const Piece piece(call, state);
  const LongQuery q(state, piece.query);
  for (int k = team.rank; k < kPiece; k += kPieceThreads) memory.pull[k] = memory.loss[k] = 0;
  team.sync();
  const PairSums sums = {call, state, piece, q, memory, team.rank};
  const float of_labels = label_scale(call, q.own), of_targets = distill_scale(call, q.own);
  if (!q.own.broken) {
    if (of_labels > 0) state.weighted ? sums.label_pairs<true>(of_labels) : sums.label_pairs<false>(of_labels);
    if (of_targets > 0) {
      if (call.mse)
        sums.square(of_targets);
      else if (q.own.distills_through_fields())
        sums.distill_through_fields(of_targets);
      else if (q.own.z_range.wide(0) || q.own.s_range.wide(0))
        sums.distill_directly<true>(of_targets);
      else
        sums.distill_directly<false>(of_targets);
    }
  }
  team.sync();
  const double loss = ordered_sum(team, piece.end - piece.begin, [&](int k) { return memory.loss[k]; });
  if (team.rank == 0) state.piece_sum[piece.index] = loss;
  if (!call.out.gradient) return;
  for (int k = piece.begin + team.rank; k < piece.end; k += kPieceThreads) {
    const int slot = q.slot(k);
    const float gradient = q.own.broken ? not_a_number() : memory.pull[k - piece.begin];
    store_gradient(call, q.first + slot, holds_document(call, piece.query, slot) ? gradient : 0.0f);
  }
}

__global__ void __launch_bounds__(32, 1) total_queries(const Call call, const LongState state) {
  const Query query = locate(call, blockIdx.x);
  const LongQuery q(state, query);
  const WarpTeam team;
  const double* pieces = state.piece_sum + state.first_piece(query.index, query.output);
  const double* blocks = state.block_sum + state.first_block(query.index, query.output);
  double loss = ordered_sum(team, int(parts(query.n, kPiece)), [&](int p) { return pieces[p]; });
  if (call.ranks() && q.meets_through_fields())
    loss += label_scale(call, q.own) * ordered_sum(team, q.own.blocks, [&](int b) { return blocks[b]; });
  if (q.own.distills_through_fields()) loss += distill_scale(call, q.own) * q.own.distill_loss;
  if (team.rank > 0) return;
  call.losses[query.index] = q.own.broken ? not_a_number() : float(loss);
  call.has_pairs[query.index] = distill_scale(call, q.own) > 0 || q.own.pairs > 0;
}

LongState state_of(const Call& call, void* scratch) {
  return LongState(call, static_cast<char*>(scratch), call.ranks() && call.loss.pair_weight != PairWeight::none,
                   call.loss.pairwise, 0);
}

}  // namespace

int64_t long_loss_bytes(const Call& call) { return state_of(call, nullptr).bytes; }

void run_long_loss(const Call& call, void* scratch, const int64_t* keys, const int64_t* order, cudaStream_t stream) {
  LongState state = state_of(call, scratch);
  state.keys = keys;
  state.order = order;
  const unsigned pieces = unsigned(state.pieces), queries = unsigned(call.batch.queries);
  constexpr size_t kShared = PieceMemory::kWords * sizeof(float);
  PILE_LAUNCH(load_pieces, pieces, kPieceThreads, (32 + kPiece) * sizeof(double), stream, call, state);
  PILE_LAUNCH(join_pieces, queries, 32, 0, stream, call, state);
  if (call.distills()) PILE_LAUNCH(scale_pieces, pieces, kPieceThreads, 0, stream, call, state);
  prepare_fields(state, stream);
  if (call.ranks()) launch_order(call, state, call.loss.pair_weight, stream);
  if (state.pairwise != PairSum::direct) {
    PILE_LAUNCH(deposit_pieces, pieces, kPieceThreads, kShared, stream, call, state);
    if (call.ranks()) launch_solve(call, state, true, stream);
    if (call.distills()) {
      constexpr size_t kSolve = (LongState::kKind + kSolveThreads) * sizeof(float) + 32 * sizeof(double);
      PILE_LAUNCH(solve_distillation, 2 * queries, kSolveThreads, kSolve, stream, call, state);
    }
  }
  PILE_LAUNCH(pair_pieces, pieces, kPieceThreads, kShared, stream, call, state);
  PILE_LAUNCH(total_queries, queries, 32, 0, stream, call, state);
  check(cudaGetLastError(), "the launches of a long loss");
}

}  // namespace gpu
}  // namespace pile
