// Long lists: the ensemble, 2 T + 12 launches by document, 4 T + 12 by query and PyTorch's sort, however long the lists are.
//
// advance_pieces is the phase per iteration (docs/algorithm.md, section 2, by the sums of section 4). A block owns 1,024 positions: it
// reads its label block's field and the documents' u, exponent and teachers, writes exponent and new u, and deposits the new moments.
// Bytes per document and iteration, from L2 or device memory: 4 M + 24. Operations: 20 to evaluate, M exponentials and 5 M to tilt, 10 to
// deposit for every cell its warp has documents in; in label blocks of several labels also the direct sums over the block. With a
// handful of grades the bytes limit it from about a million documents on, below that the launches' latency.
#include "long_lists.h"
#include "launch.h"

namespace pile {
namespace gpu {
namespace {

__global__ void __launch_bounds__(kPieceThreads, 2) measure_pieces(const Call call, const LongState state) {
  const Piece piece(call, state);
  if (piece.begin >= piece.end) return;
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

__global__ void __launch_bounds__(kQueryThreads, 1) begin_queries(const Call call, const LongState state) {
  PILE_SHARED_MEMORY(memory);
  BlockTeam team;
  team.partial = reinterpret_cast<double*>(memory);
  const Query query = locate(call, blockIdx.x);
  const LongQuery q(state, query);
  const int count = call.teachers(), pieces = int(parts(query.n, kPiece));
  const Moments* measured = state.measured + state.first_piece(query.index, query.output) * count;
  float *energy = state.energy + query.index * count, *weight = state.weight + query.index * count;
  float low = kInfinity, high = -kInfinity, common = 0;
  double present = 0;
  if (call.ensemble.normalize == Normalize::none) {
    for (int e = team.rank; e < pieces * count; e += team.size) {
      low = fminf(low, measured[e].low);
      high = fmaxf(high, measured[e].high);
    }
    low = lowest(team, low);
    high = -lowest(team, -high);
    common = high >= low ? common_offset(low, high) : 0.0f;
    low = kInfinity;
    high = -kInfinity;
  }
  for (int m = team.rank; m < count; m += team.size) {
    Moments all;
    for (int p = 0; p < pieces; ++p) all.join(measured[p * count + m]);
    Calibration own(all, call.ensemble.normalize);
    own.mean += common;
    state.mean[query.index * count + m] = own.mean;
    state.scale[query.index * count + m] = own.scale;
    energy[m] = all.count > 0 ? start_energy(call, query.index, m) : -kInfinity;
    present += all.count;
    if (all.count == 0) continue;
    low = fminf(low, own(all.low));
    high = fmaxf(high, own(all.high));
  }
  present = team.sum(present);
  const Range range = {lowest(team, low) * call.per_unit, -lowest(team, -high) * call.per_unit};
  team.sync();
  refresh_weights(team, energy, weight, count);
  if (team.rank > 0) return;
  QueryState& own = q.own;
  own.counts = Counts::of(q.keys(), query.n);
  own.common = common;
  own.range = range;
  own.wide = range.wide(call.offset);
  own.grid = state.pairwise == PairSum::direct ? Grid() : Grid::over(range.low, range.high);
  own.plain = present == double(own.counts.scored) * count && !(call.by_document() && call.batch.prior.data);
}

__global__ void __launch_bounds__(kPieceThreads, 2) gather_pieces(const Call call, const LongState state) {
  const Piece piece(call, state);
  const LongQuery q(state, piece.query);
  const int count = call.teachers(), end = smaller(piece.end, q.own.counts.scored);
  const View& view = call.batch.teacher;
  for (int k = piece.begin + int(threadIdx.x); k < end; k += kPieceThreads) {
    const int64_t from = at(view, piece.query, q.slot(k));
    for (int m = 0; m < count; ++m) {
      const bool takes_part = prior_weight(call, piece.query.index, m) > 0;
      const Calibration own(state.mean[piece.query.index * count + m], state.scale[piece.query.index * count + m]);
      q.at(state.teachers)[m * state.documents + k] =
          takes_part ? own(load_score(view, from + m * view.teacher)) : not_a_number();
    }
    float low, high;
    q.teachers(call).range(k, low, high);
    q.at(state.low)[k] = low;
    q.at(state.high)[k] = high;
    q.at(state.exponent)[k] = 0;
  }
}

// Direct sums inside a mixed label block, for the rows [lo, hi), to memory.pull.
PILE_DEVICE void pull_block(const LongQuery& q, const Piece& piece, const PieceMemory& memory, const float* u, int lo, int hi,
                            int begin, int end) {
  const Lanes lanes(kLanes);
  const float middle = q.own.range.middle();
  const float* gains = q.at(q.state.gain);
  const bool wide = q.own.wide;
  auto power = [&](float at) { return wide ? at : expf(middle - at); };
  for (int k = lo + int(threadIdx.x); k < hi; k += kPieceThreads) memory.row_u[k - piece.begin] = power(u[k]);
  LabelColumns columns = {nullptr,
                          nullptr,
                          memory.row_u - piece.begin,
                          gains,
                          q.at(q.state.first),
                          q.at(q.state.last),
                          begin,
                          end,
                          0,
                          0,
                          0,
                          0,
                          wide,
                          q.state.weighted};
  columns.set_offset(q.state.offset);
  for_tiles(
      begin, end,
      [&](int j, int to) {
        memory.tile[to] = power(u[j]);
        if (columns.weighted) memory.tile_gain[to] = gains[j];
      },
      [&](int from, int to) {
        columns.u = memory.tile - from;
        columns.gains = memory.tile_gain - from;
        columns.from = from;
        columns.to = to;
        for (int row = lo + int(threadIdx.x) / kLanes * 4; row < hi; row += kPieceThreads) {
          float total[4];
          if (columns.plain())
            label_pull<true, 4>(columns, row, hi - 1, lanes, total);
          else
            label_pull<false, 4>(columns, row, hi - 1, lanes, total);
          const float pulled = sum_rows(lanes, total);
          const int k = row + lanes.rank;
          if (k < hi) memory.pull[k - piece.begin] += pulled;
        }
      });
}

// Of one iteration. `evaluate`: λ at u[read], and by document the new exponents, by query the pulls on the teachers. `tilt`: new u to
// u[write], and its moments.
__global__ void __launch_bounds__(kPieceThreads, 2)
    advance_pieces(const Call call, const LongState state, int read, int write, bool evaluate, bool tilt) {
  PILE_SHARED_MEMORY(base);
  const PieceMemory memory(base);
  const Piece piece(call, state);
  const LongQuery q(state, piece.query);
  const Teachers teachers = q.teachers(call);
  const int rank = int(threadIdx.x), count = call.teachers(), end = smaller(piece.end, q.own.counts.labelled);
  const float *u = q.at(state.u[read]), *gains = q.at(state.gain);
  float *exponent = q.at(state.exponent), *logit = q.at(state.logit), *fresh = q.at(state.u[write]);
  if (evaluate) {
    for (int k = rank; k < kPiece; k += kPieceThreads) memory.pull[k] = 0;
    __syncthreads();
    for_blocks(q, piece.begin, piece.end, [&](int b, int lo, int hi, int block_begin, int block_end) {
      const bool mixed = is_mixed(q, block_begin, block_end), fields = q.meets_through_fields();
      if (mixed) pull_block(q, piece, memory, u, lo, hi, block_begin, block_end);
      const int row = q.own.grid.cells * kPowers;
      if (fields)
        for (int e = rank; e < state.kinds() * row; e += kPieceThreads) memory.field[e] = q.field(b)[e];
      __syncthreads();
      for (int k = lo + rank; k < hi; k += kPieceThreads) {
        float lambda = mixed ? memory.pull[k - piece.begin] - q.at(state.above)[k] : 0.0f;
        if (fields) {
          float x;
          const int cell = q.own.grid.locate(u[k], x);
          const float value = horner(memory.field, cell, x);
          lambda += state.weighted ? gains[k] * value - horner(memory.field + row, cell, x) : value;
        }
        if (call.by_document())
          exponent[k] += call.step * (lambda * q.at(state.per_pair)[k]);
        else
          memory.pull[k - piece.begin] = lambda / teachers.held(k);
      }
      __syncthreads();
    });
    if (!call.by_document()) {
      const Lanes lanes(kTeacherLanes);
      for (int m = rank / kTeacherLanes; m < count; m += kPieceThreads / kTeacherLanes) {
        double pulled = 0;
        for (int k = piece.begin + lanes.rank; k < end; k += kTeacherLanes) {
          const float d = teachers.score(m, k) - logit[k];
          pulled += is_number(d) ? memory.pull[k - piece.begin] * d : 0.0f;
        }
        pulled = lanes.sum(pulled);
        if (lanes.rank == 0) state.piece_pull[piece.index * count + m] = pulled;
      }
    }
  }
  if (!tilt) return;
  for (int k = piece.begin + rank; k < end; k += kPieceThreads) {
    const float s = teachers.logit(k, k, exponent[k]);
    logit[k] = s;
    fresh[k] = s * call.per_unit;
  }
  if (!q.meets_through_fields()) return;
  __syncthreads();
  for_blocks(q, piece.begin, piece.end, [&](int b, int lo, int hi, int, int) {
    deposit<kOwn>(q.own.grid, fresh + lo, state.weighted ? gains + lo : nullptr, hi - lo, memory.partial,
                  q.moments(piece.number, b));
  });
}

__global__ void __launch_bounds__(kQueryThreads, 1) reweight_queries(const Call call, const LongState state) {
  const Query query = locate(call, blockIdx.x);
  const LongQuery q(state, query);
  const BlockTeam team;
  const int count = call.teachers(), pieces = int(parts(q.own.counts.labelled, kPiece));
  const double* pulls = state.piece_pull + state.first_piece(query.index, query.output) * count;
  float* energy = state.energy + query.index * count;
  for (int m = team.rank; m < count && q.own.pairs > 0; m += team.size) {
    double pulled = 0;
    for (int p = 0; p < pieces; ++p) pulled += pulls[p * count + m];
    energy[m] += float(call.ensemble.step_size * pulled / q.own.pairs);
  }
  team.sync();
  refresh_weights(team, energy, state.weight + query.index * count, count);
}

// Label losses inside mixed blocks.
__global__ void __launch_bounds__(kPieceThreads, 2) trace_pieces(const Call call, const LongState state, int read) {
  PILE_SHARED_MEMORY(base);
  const PieceMemory memory(base);
  BlockTeam team;
  team.partial = memory.sums;
  const Piece piece(call, state);
  const LongQuery q(state, piece.query);
  const Lanes lanes(kLanes);
  const float *u = q.at(state.u[read]), *gains = q.at(state.gain);
  for (int k = team.rank; k < kPiece; k += kPieceThreads) memory.pull[k] = 0;
  team.sync();
  for_blocks(q, piece.begin, piece.end, [&](int, int lo, int hi, int begin, int end) {
    if (!is_mixed(q, begin, end)) return;
    for_tiles(
        begin, end,
        [&](int j, int to) {
          memory.tile[to] = u[j];
          if (state.weighted) memory.tile_gain[to] = gains[j];
        },
        [&](int from, int to) {
          for (int k = lo + team.rank / kLanes; k < hi; k += kPieceThreads / kLanes) {
            float slope = 0, loss = 0;
            const int below = larger(q.at(state.last)[k], from);
            if (state.weighted)
              label_losses<true, true>(memory.tile - from, memory.tile_gain - from, u[k], gains[k], 1, state.offset, below, to,
                                       lanes, slope, loss);
            else
              label_losses<true, false>(memory.tile - from, nullptr, u[k], 0, 1, state.offset, below, to, lanes, slope, loss);
            loss = lanes.sum(loss);
            if (lanes.rank == 0) memory.pull[k - piece.begin] += loss;
          }
        });
  });
  team.sync();
  const double sum = ordered_sum(team, piece.end - piece.begin, [&](int k) { return memory.pull[k]; });
  if (team.rank == 0) state.piece_sum[piece.index] = sum;
}

__global__ void __launch_bounds__(32, 1) trace_queries(const Call call, const LongState state, int64_t iteration) {
  const Query query = locate(call, blockIdx.x);
  const LongQuery q(state, query);
  const double* pieces = state.piece_sum + state.first_piece(query.index, query.output);
  const double* blocks = state.block_sum + state.first_block(query.index, query.output);
  const WarpTeam team;
  double loss = ordered_sum(team, int(parts(q.own.counts.labelled, kPiece)), [&](int p) { return pieces[p]; });
  if (q.meets_through_fields()) loss += ordered_sum(team, q.own.blocks, [&](int b) { return blocks[b]; });
  float* to = static_cast<float*>(call.out.trace) + query.index * (call.ensemble.iterations + 1) + iteration;
  if (team.rank == 0) *to = q.own.pairs > 0 ? float(loss / q.own.pairs) : 0.0f;
}

__global__ void __launch_bounds__(kPieceThreads, 2) finish_pieces(const Call call, const LongState state) {
  const Piece piece(call, state);
  const LongQuery q(state, piece.query);
  const Teachers teachers = q.teachers(call);
  const int count = call.teachers(), rank = int(threadIdx.x);
  float *logits = static_cast<float*>(call.out.logits), *weights = static_cast<float*>(call.out.weights);
  for (int k = piece.begin + rank; k < piece.end; k += kPieceThreads) {
    const int64_t document = q.first + q.slot(k);
    const bool scored = k < q.own.counts.scored;
    const float exponent = scored ? q.at(state.exponent)[k] : 0.0f;
    logits[document] = scored ? teachers.logit(k, k, exponent) + q.own.common : not_a_number();
    if (!weights || !call.by_document()) continue;
    if (scored)
      teachers.weights(k, k, exponent, weights + document * count);
    else
      for (int m = 0; m < count; ++m) weights[document * count + m] = 0;
  }
  if (weights && !call.by_document() && piece.number == 0)
    for (int m = rank; m < count; m += kPieceThreads) weights[piece.query.index * count + m] = teachers.weight[m];
}

LongState state_of(const Call& call, void* scratch) {
  return LongState(call, static_cast<char*>(scratch), call.ensemble.pair_weight != PairWeight::none, call.ensemble.pairwise,
                   call.offset);
}

}  // namespace

int64_t long_ensemble_bytes(const Call& call) { return state_of(call, nullptr).bytes; }

void run_long_ensemble(const Call& call, void* scratch, const int64_t* keys, const int64_t* order, cudaStream_t stream) {
  LongState state = state_of(call, scratch);
  state.keys = keys;
  state.order = order;
  const unsigned pieces = unsigned(state.pieces), queries = unsigned(call.batch.queries);
  constexpr size_t kShared = PieceMemory::kWords * sizeof(float);
  constexpr int kSums = 32 * sizeof(double);
  prepare_fields(state, stream);
  PILE_LAUNCH(measure_pieces, pieces, kPieceThreads, 0, stream, call, state);
  PILE_LAUNCH(begin_queries, queries, kQueryThreads, kSums, stream, call, state);
  PILE_LAUNCH(gather_pieces, pieces, kPieceThreads, 0, stream, call, state);
  launch_order(call, state, call.ensemble.pair_weight, stream);
  PILE_LAUNCH(advance_pieces, pieces, kPieceThreads, kShared, stream, call, state, 0, 0, false, true);
  const bool by_document = call.by_document();
  for (int64_t it = 0;; ++it) {
    const int read = by_document ? int(it & 1) : 0;
    const bool last = it == call.ensemble.iterations;
    if (call.out.trace || !last) launch_solve(call, state, call.out.trace != nullptr, stream);
    if (call.out.trace) {
      PILE_LAUNCH(trace_pieces, pieces, kPieceThreads, kShared, stream, call, state, read);
      PILE_LAUNCH(trace_queries, queries, 32, 0, stream, call, state, it);
    }
    if (last) break;
    if (by_document) {
      PILE_LAUNCH(advance_pieces, pieces, kPieceThreads, kShared, stream, call, state, read, 1 - read, true, true);
    } else {
      PILE_LAUNCH(advance_pieces, pieces, kPieceThreads, kShared, stream, call, state, 0, 0, true, false);
      PILE_LAUNCH(reweight_queries, queries, kQueryThreads, 0, stream, call, state);
      PILE_LAUNCH(advance_pieces, pieces, kPieceThreads, kShared, stream, call, state, 0, 0, false, true);
    }
  }
  PILE_LAUNCH(finish_pieces, pieces, kPieceThreads, 0, stream, call, state);
  check(cudaGetLastError(), "the launches of a long ensemble");
}

}  // namespace gpu
}  // namespace pile
