// Long lists: the ensemble, 2 T + 12 launches by document, 4 T + 12 by query and PyTorch's sort, however long the lists are.
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
  const Call& call = state.call;
  const View& view = call.batch.teacher;
  const int count = call.teachers();
  measure(
      BlockTeam(), count, piece.begin, piece.end,
      [&](int m, int i) {
        const bool present = holds_document(call, piece.query, i) && prior_weight(call, piece.query.index, m) > 0;
        return present ? load_score(view, at(view, piece.query, i) + m * view.teacher) : not_a_number();
      },
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
  float common = 0;
  if (call.ensemble.normalize == Normalize::none) {
    Range raw;
    for (int e = team.rank; e < pieces * count; e += team.size) raw.join(measured[e].range);
    common = common_offset(joined(team, raw));
  }
  double present = 0;
  Range range;
  for (int m = team.rank; m < count; m += team.size) {
    Moments all;
    for (int p = 0; p < pieces; ++p) all.join(measured[p * count + m]);
    Calibration own(all, call.ensemble.normalize);
    own.mean += common;
    state.mean[q.by_teacher() + m] = own.mean;
    state.scale[q.by_teacher() + m] = own.scale;
    energy[m] = all.count > 0 ? start_energy(call, q.query.index, m) : -kInfinity;
    present += all.count;
    if (all.count > 0) range.join({own(all.range.low), own(all.range.high)});
  }
  present = team.sum(present);
  range = joined(team, range);
  team.sync();
  refresh_weights(team, energy, count);
  if (team.rank > 0) return;
  QueryState own = {};
  own.counts = Counts::of(q.keys(), q.query.n);
  own.common = common;
  own.range = {range.low * call.per_unit, range.high * call.per_unit};
  own.wide = own.range.wide(call.offset);
  if (state.pairwise != PairSum::direct) own.grid = Grid::over(own.range.low, own.range.high);
  own.plain = present == double(own.counts.scored) * count && !(call.by_document() && call.batch.prior.data);
  q.own = own;
}

__global__ void __launch_bounds__(kPieceThreads, 2) gather_pieces(const LongState state) {
  const Piece piece(state);
  const Call& call = state.call;
  const int count = call.teachers(), end = smaller(piece.end, piece.own.counts.scored);
  const View& view = call.batch.teacher;
  const double *mean = state.mean + piece.by_teacher(), *scale = state.scale + piece.by_teacher();
  for (int k = piece.begin + int(threadIdx.x); k < end; k += kPieceThreads) {
    const int64_t from = at(view, piece.query, piece.slot(k));
    for (int m = 0; m < count; ++m) {
      const bool takes_part = prior_weight(call, piece.query.index, m) > 0;
      piece.at(state.teachers)[m * state.documents + k] =
          takes_part ? Calibration(mean[m], scale[m])(load_score(view, from + m * view.teacher)) : not_a_number();
    }
    const Range range = piece.teachers().range(k);
    piece.at(state.low)[k] = range.low;
    piece.at(state.high)[k] = range.high;
    piece.at(state.exponent)[k] = 0;
  }
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

// Of one iteration. `evaluate`: λ at u[read], and by document the new exponents, by query the pulls on the teachers. `tilt`:
// new u to u[write], and its moments.
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

__global__ void __launch_bounds__(kQueryThreads, 1) reweight_queries(const LongState state) {
  const LongQuery q(state, blockIdx.x);
  const BlockTeam team;
  const int count = state.call.teachers(), pieces = q.labelled_pieces();
  const double* pulls = state.piece_pull + q.first_piece() * count;
  float* const energy = q.energy();
  for (int m = team.rank; m < count && q.own.pairs > 0; m += team.size) {
    double pulled = 0;
    for (int p = 0; p < pieces; ++p) pulled += pulls[p * count + m];
    energy[m] += float(state.call.ensemble.step_size * pulled / q.own.pairs);
  }
  team.sync();
  refresh_weights(team, energy, count);
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
  for_label_tiles(piece, memory, u, [&](const LabelTile& tile) {
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
  if (threadIdx.x == 0) *to = q.own.pairs > 0 ? float(loss / q.own.pairs) : 0.0f;
}

__global__ void __launch_bounds__(kPieceThreads, 2) finish_pieces(const LongState state) {
  const Piece piece(state);
  const Call& call = state.call;
  const Teachers teachers = piece.teachers();
  const int count = call.teachers(), rank = int(threadIdx.x);
  float *logits = static_cast<float*>(call.out.logits), *weights = static_cast<float*>(call.out.weights);
  for (int k = piece.begin + rank; k < piece.end; k += kPieceThreads) {
    const int64_t document = piece.base + piece.slot(k);
    const bool scored = k < piece.own.counts.scored;
    const float exponent = scored ? piece.at(state.exponent)[k] : 0.0f;
    logits[document] = scored ? teachers.logit(k, k, exponent) + piece.own.common : not_a_number();
    if (weights && call.by_document()) teachers.weights(k, k, scored, exponent, weights + document * count);
  }
  if (weights && !call.by_document() && piece.number == 0)
    for (int m = rank; m < count; m += kPieceThreads) weights[piece.by_teacher() + m] = teachers.weight(m);
}

}  // namespace

void run_long_ensemble(const Call& call, const int64_t* keys, const int64_t* order, cudaStream_t stream) {
  LongRun run = {LongState(call), stream};
  run.state.keys = keys;
  run.state.order = order;
  const auto advance = [&](int read, int write, bool evaluate, bool tilt) {
    run.pieces(advance_pieces, PieceMemory::kBytes, read, write, evaluate, tilt);
  };
  run.tabulate();
  run.pieces(measure_pieces, 0);
  run.queries(begin_queries, kQueryThreads, BlockTeam::kBytes);
  run.pieces(gather_pieces, 0);
  run.order(call.ensemble.pair_weight);
  advance(0, 0, false, true);
  for (int64_t it = 0;; ++it) {
    const int read = call.by_document() ? int(it & 1) : 0;
    const bool last = it == call.ensemble.iterations;
    if (call.out.trace || !last) run.solve(call.out.trace != nullptr);
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
  run.pieces(finish_pieces, 0);
  check(cudaGetLastError(), "the launches of a long ensemble");
}

}  // namespace pile::gpu
