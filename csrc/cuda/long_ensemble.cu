// Long lists: the ensemble, 2 T + 12 launches by document, 4 T + 12 by query and PyTorch's sort, however long the lists are. At
// weights that are given it is 3 launches and no sort (T = 0), or 15 and the sort with the queries' pulls on them.
//
// advance_pieces is the phase per iteration (docs/algorithm.md, section 2, by the sums of section 4). A block owns 1,024
// positions: it reads its label block's field and the documents' u, exponent and teachers, writes exponent and new u, and
// deposits the new moments. Bytes per document and iteration, from L2 or device memory: 4 M + 24. Operations: 20 to evaluate, M
// exponentials and 5 M to tilt, 10 to deposit for every cell its warp has documents in; in label blocks of several labels also
// the direct sums over those. With a handful of grades the bytes limit it from about a million documents on, below that the
// launches' latency.
#include "launch.h"
#include "long_lists.h"

namespace pile::gpu {
namespace {

__global__ void __launch_bounds__(kPieceThreads, 2) measure_pieces(const LongState state) {
  const Piece piece(state);
  if (piece.begin >= piece.end) return;
  const int count = state.call.teachers();
  measure(
      BlockTeam(), count, piece.begin, piece.end, [&](int m, int i) { return raw_score(state.call, piece.query, i, m); },
      [&](int m, const Moments& found) { state.measured[piece.index * count + m] = found; });
}

__global__ void __launch_bounds__(kQueryThreads, 1) begin_queries(const LongState state) {
  PILE_SHARED_MEMORY(memory);
  const BlockTeam team(memory);
  const LongQuery q(state, blockIdx.x);
  const Call& call = state.call;
  const int count = call.teachers(), pieces = q.piece_count();
  const Moments* measured = state.measured + q.first_piece() * count;
  float* const energy = q.energy();
  for (int m = team.rank; m < count; m += team.size) energy[m] = start_energy(call, q.query.index, m);
  team.sync();
  const auto takes_part = [&](int m) { return energy[m] > -kInfinity; };
  float common = 0;
  if (call.ensemble.normalize == Normalize::none) {
    Range raw;
    for (int e = team.rank; e < pieces * count; e += team.size)
      if (takes_part(e % count)) raw.join(measured[e].range);
    common = common_offset(joined(team, raw));
  }
  double present = 0;
  Range range;
  for (int m = team.rank; m < count; m += team.size) {
    Moments all;
    for (int p = 0; p < pieces && takes_part(m); ++p) all.join(measured[p * count + m]);
    Calibration own(all, call.ensemble.normalize);
    own.mean += common;
    state.mean[q.by_teacher() + m] = own.mean;
    state.scale[q.by_teacher() + m] = own.scale;
    present += all.count;
    if (all.count > 0)
      range.join({own(all.range.low), own(all.range.high)});
    else
      energy[m] = -kInfinity;
  }
  present = team.sum(present);
  range = joined(team, range);
  team.sync();
  refresh_weights(team, energy, count);
  if (team.rank > 0) return;
  QueryState own = {};
  // Without the order positions are slots, and nobody knows which hold what.
  own.counts = call.by_pairs() ? Counts::of(q.keys(), q.query.n) : Counts{0, q.query.n, q.query.n};
  own.common = common;
  own.range = {range.low * call.per_unit, range.high * call.per_unit};
  own.wide = own.range.wide(call.offset);
  if (state.pairwise != PairSum::direct) own.grid = Grid::over(own.range.low, own.range.high);
  own.plain = call.by_pairs() && present == double(own.counts.scored) * count && !(call.by_document() && call.batch.prior.data);
  q.own = own;
}

// The piece's logits, and its weights. Each thread reads the documents that it has gathered.
PILE_DEVICE void write_piece(const Piece& piece) {
  const LongState& state = piece.state;
  const Call& call = state.call;
  const Teachers teachers = piece.teachers();
  const int count = call.teachers(), rank = int(threadIdx.x);
  float *logits = static_cast<float*>(call.out.logits), *weights = static_cast<float*>(call.out.weights);
  for (int k = piece.begin + rank; k < piece.end; k += kPieceThreads) {
    const int64_t document = piece.base + piece.slot(k);
    const bool scored = k < piece.own.counts.scored && piece.at(state.low)[k] <= piece.at(state.high)[k];
    const float exponent = scored ? piece.at(state.exponent)[k] : 0.0f;
    if (logits) logits[document] = scored ? teachers.logit(k, k, exponent) + piece.own.common : not_a_number();
    if (weights && call.by_document()) teachers.weights(k, k, scored, exponent, weights + document * count);
  }
  if (weights && !call.by_document() && piece.number == 0)
    for (int m = rank; m < count; m += kPieceThreads) weights[piece.by_teacher() + m] = teachers.weight(m);
}

__global__ void __launch_bounds__(kPieceThreads, 2) gather_pieces(const LongState state) {
  const Piece piece(state);
  const Call& call = state.call;
  const int count = call.teachers(), end = smaller(piece.end, piece.own.counts.scored);
  const double *mean = state.mean + piece.by_teacher(), *scale = state.scale + piece.by_teacher();
  const float* const energy = piece.energy();
  for (int k = piece.begin + int(threadIdx.x); k < end; k += kPieceThreads) {
    const int slot = piece.slot(k);
    for (int m = 0; m < count; ++m)
      piece.at(state.teachers)[m * state.documents + k] =
          energy[m] > -kInfinity ? Calibration(mean[m], scale[m])(raw_score(call, piece.query, slot, m)) : not_a_number();
    const Range range = piece.teachers().range(k);
    piece.at(state.low)[k] = range.low;
    piece.at(state.high)[k] = range.high;
    piece.at(state.exponent)[k] = 0;
  }
  if (!call.by_pairs()) write_piece(piece);
}

// Direct sums inside the mixed label blocks, added to memory.pull.
PILE_DEVICE void pull_directly(const Piece& piece, const PieceMemory& memory, const float* u) {
  const LongState& state = piece.state;
  const Lanes lanes(kLanes);
  const float middle = piece.own.range.middle();
  float* const row_u = memory.tile.student_more;
  const float* gains = piece.at(state.gain);
  LabelColumns columns({row_u - piece.begin, gains, piece.at(state.first), piece.at(state.last)}, piece.own.wide,
                       state.weighted, state.offset);
  auto power = [&](float at) { return columns.wide ? at : expf(middle - at); };
  for_label_blocks(piece, [&](const Overlap& of) {
    if (!of.mixed) return;
    for (int k = of.lo + int(threadIdx.x); k < of.hi; k += kPieceThreads) row_u[k - piece.begin] = power(u[k]);
    for_tiles(
        of.begin, of.end,
        [&](int j, int to) {
          memory.tile.student[to] = power(u[j]);
          if (state.weighted) memory.tile.target[to] = gains[j];
        },
        [&](int from, int to) {
          columns.window = {memory.tile.student - from, memory.tile.target - from, of.begin, of.end, from, to};
          for (int row = of.lo + int(threadIdx.x) / kLanes * 4; row < of.hi; row += kPieceThreads) {
            const float pulled = pull_rows<4>(columns, row, of.hi - 1, lanes);
            const int k = row + lanes.rank;
            if (k < of.hi) memory.pull[k - piece.begin] += pulled;
          }
        });
  });
}

// Of one iteration. `evaluate`: λ at u[read], and by document the new exponents, else the pulls on the teachers. `tilt`: new u
// to u[write], and its moments.
__global__ void __launch_bounds__(kPieceThreads, 2)
    advance_pieces(const LongState state, int read, int write, bool evaluate, bool tilt) {
  PILE_SHARED_MEMORY(base);
  const PieceMemory memory(base);
  const Piece piece(state);
  const Call& call = state.call;
  const Teachers teachers = piece.teachers();
  const int rank = int(threadIdx.x), count = call.teachers(), end = piece.labelled_end();
  float *exponent = piece.at(state.exponent), *logit = piece.at(state.logit), *fresh = piece.at(state.u[write]);
  if (evaluate) {
    const float* u = piece.at(state.u[read]);
    for (int k = rank; k < kPiece; k += kPieceThreads) memory.pull[k] = 0;
    __syncthreads();
    pull_directly(piece, memory, u);
    for (int k = piece.begin + rank; k < end; k += kPieceThreads) memory.pull[k - piece.begin] -= piece.at(state.above)[k];
    __syncthreads();
    for_label_fields(piece, memory, u, [&](int k, float value) { memory.pull[k - piece.begin] += value; });
    for (int k = piece.begin + rank; k < end; k += kPieceThreads) {
      float& lambda = memory.pull[k - piece.begin];
      if (call.by_document())
        exponent[k] += call.step * (lambda * piece.at(state.per_pair)[k]);
      else
        lambda /= teachers.held(k);
    }
    __syncthreads();
    if (!call.by_document())
      teachers.pull(
          BlockTeam(), piece.begin, end, [](int k) { return k; }, [&](int k) { return memory.pull[k - piece.begin]; }, logit,
          [&](int m, double pulled) { state.piece_pull[piece.index * count + m] = pulled; });
  }
  if (!tilt) return;
  for (int k = piece.begin + rank; k < end; k += kPieceThreads) {
    const float s = teachers.logit(k, k, exponent[k]);
    logit[k] = s;
    fresh[k] = s * call.per_unit;
  }
  if (!piece.meets_through_fields()) return;
  __syncthreads();
  deposit_piece(piece, memory, fresh);
}

// K times the query's pull on teacher m.
PILE_DEVICE double sum_pulls(const LongQuery& q, int m) {
  const int count = q.call.teachers();
  const double* of = q.state.piece_pull + q.first_piece() * count + m;
  double pulled = 0;
  for (int p = 0; p < q.labelled_pieces(); ++p) pulled += of[p * count];
  return pulled;
}

__global__ void __launch_bounds__(kQueryThreads, 1) reweight_queries(const LongState state) {
  const LongQuery q(state, blockIdx.x);
  const BlockTeam team;
  const int count = state.call.teachers();
  float* const energy = q.energy();
  for (int m = team.rank; m < count && q.own.pairs > 0; m += team.size)
    energy[m] += float(state.call.ensemble.step_size * sum_pulls(q, m) / q.own.pairs);
  team.sync();
  refresh_weights(team, energy, count);
}

__global__ void __launch_bounds__(kQueryThreads, 1) write_pulls(const LongState state) {
  const LongQuery q(state, blockIdx.x);
  float* const to = static_cast<float*>(state.call.out.pulls) + q.by_teacher();
  for (int m = int(threadIdx.x); m < state.call.teachers(); m += kQueryThreads)
    to[m] = pull_of(q.energy()[m], sum_pulls(q, m), q.own.pairs);
}

// Label losses inside mixed label blocks.
__global__ void __launch_bounds__(kPieceThreads, 2) trace_pieces(const LongState state, int read) {
  PILE_SHARED_MEMORY(base);
  const PieceMemory memory(base);
  const BlockTeam team(memory.sums);
  const Piece piece(state);
  const Lanes lanes(kLanes);
  const float *u = piece.at(state.u[read]), *gains = piece.at(state.gain);
  for (int k = team.rank; k < kPiece; k += kPieceThreads) memory.pull[k] = 0;
  team.sync();
  for_label_tiles(piece, memory, u, nullptr, [&](const LabelTile& tile) {
    for (int k = tile.lo + team.rank / kLanes; k < tile.hi; k += kPieceThreads / kLanes) {
      SlopeAndLoss sums;
      add_losses<true>(tile.columns, u[k], state.weighted ? gains[k] : 0.0f, larger(piece.at(state.last)[k], tile.from),
                       tile.to, lanes, sums);
      const float loss = lanes.sum(sums.loss);
      if (lanes.rank == 0) memory.pull[k - piece.begin] += loss;
    }
  });
  team.sync();
  const double sum = ordered_sum(team, piece.end - piece.begin, [&](int k) { return memory.pull[k]; });
  if (team.rank == 0) state.piece_sum[piece.index] = sum;
}

__global__ void __launch_bounds__(32, 1) trace_queries(const LongState state, int64_t iteration) {
  const LongQuery q(state, blockIdx.x);
  const double loss = q.sum_pieces(WarpTeam(), q.labelled_pieces()) + q.label_block_loss();
  float* to = static_cast<float*>(state.call.out.trace) + q.query.index * (state.call.ensemble.iterations + 1) + iteration;
  if (threadIdx.x == 0) *to = label_loss(state.call, loss, q.own.pairs);
}

__global__ void __launch_bounds__(kPieceThreads, 2) finish_pieces(const LongState state) { write_piece(Piece(state)); }

}  // namespace

void run_long_ensemble(const Call& call, const int64_t* keys, const int64_t* order, cudaStream_t stream) {
  LongRun run = {LongState(call), stream};
  run.state.keys = keys;
  run.state.order = order;
  const auto advance = [&](int read, int write, bool evaluate, bool tilt) {
    run.pieces(advance_pieces, PieceMemory::kBytes, read, write, evaluate, tilt);
  };
  run.pieces(measure_pieces, 0);
  run.queries(begin_queries, kQueryThreads, BlockTeam::kBytes);
  run.pieces(gather_pieces, 0);
  if (!call.by_pairs()) return check(cudaGetLastError(), "the launches of a long mean");
  run.tabulate();
  run.bound(gain_of(call.ensemble.pair_weight));
  run.weigh();
  advance(0, 0, false, true);
  for (int64_t it = 0;; ++it) {
    const int read = call.by_document() ? int(it & 1) : 0;
    const bool last = it == call.ensemble.iterations;
    if (call.out.trace || call.out.pulls || !last) run.solve(call.out.trace != nullptr);
    if (call.out.trace) {
      run.pieces(trace_pieces, PieceMemory::kBytes, read);
      run.queries(trace_queries, 32, 0, it);
    }
    if (last) break;
    advance(read, 1 - read, true, call.by_document());
    if (call.by_document()) continue;
    run.queries(reweight_queries, kQueryThreads, 0);
    advance(0, 0, false, true);
  }
  if (call.out.pulls) {
    advance(0, 0, true, false);
    run.queries(write_pulls, kQueryThreads, 0);
  }
  if (call.out.logits || call.out.weights) run.pieces(finish_pieces, 0);
  check(cudaGetLastError(), "the launches of a long ensemble");
}

}  // namespace pile::gpu
