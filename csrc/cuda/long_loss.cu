// Long lists: the student's loss and gradient. Four launches, and those of the terms in use (terms/): two for the logistic
// distillation, 6 or 7 and a sort for label pairs, besides the fields' table; one for "kl", 5 and a sort for the terms that take
// labels as gains.
//
// add_pieces is the phase that counts: for the two logistic terms through fields 20 bytes per document read, 4 written, 60
// operations; T iterations of the ensemble cost more.
#include "launch.h"
#include "terms.h"

namespace pile::gpu {
namespace {

// Student and target by position.
__global__ void __launch_bounds__(kPieceThreads, 2) load_pieces(const LongState state) {
  PILE_SHARED_MEMORY(memory);
  double* const values = reinterpret_cast<double*>(memory);
  const BlockTeam team(values + kPiece);
  const Piece piece(state);
  const Call& call = state.call;
  const View &student = call.batch.student, &target = call.batch.target;
  const bool here = query_weight(call, piece.query) != 0;
  LossPart part;
  for (int k = piece.begin + team.rank; k < piece.end; k += kPieceThreads) {
    const int slot = piece.slot(k);
    const bool valid = here && counts_in_loss(call, piece.query, slot);
    const float z = valid ? load_logit(student, at(student, piece.query, slot)) : 0.0f;
    const float s = valid && call.distills() ? load_score(target, at(target, piece.query, slot)) : not_a_number();
    const bool used = is_number(s);
    piece.at(state.u[0])[k] = z;
    piece.at(state.u[1])[k] = s;
    const float c = valid ? document_weight(call, piece.query, slot) : 0.0f;
    if (state.weight) piece.at(state.weight)[k] = c;
    part.broken += fabsf(z) < kInfinity && is_number(c) ? 0 : 1;
    if (valid && (!state.keys || piece.keys()[k] < kUnlabelled)) part.labels.join(z);
    if (!used) continue;
    part.targets += 1;
    part.student.join(z);
    part.target.join(s);
  }
  part.broken = team.sum(part.broken);
  part.targets = team.sum(part.targets);
  part.labels = joined(team, part.labels);
  part.student = joined(team, part.student);
  part.target = joined(team, part.target);
  const float *z = piece.at(state.u[0]), *s = piece.at(state.u[1]), *c = state.weight ? piece.at(state.weight) : nullptr;
  const auto sum = [&](auto value) {
    team.sync();
    for (int k = piece.begin + team.rank; k < piece.end; k += kPieceThreads)
      values[k - piece.begin] = is_number(s[k]) ? value(k) : 0.0;
    team.sync();
    return ordered_sum(team, piece.end - piece.begin, [&](int k) { return values[k]; });
  };
  part.difference = sum([&](int k) { return (c ? c[k] : 1.0) * (double(z[k]) - double(s[k])); });
  part.target_weight = c ? sum([&](int k) { return double(c[k]); }) : part.targets;
  part.target_squares = c ? sum([&](int k) { return double(c[k]) * c[k]; }) : part.targets;
  if (team.rank == 0) state.loss_parts[piece.index] = part;
}

__global__ void __launch_bounds__(32, 1) join_pieces(const LongState state) {
  if (threadIdx.x > 0) return;
  const LongQuery q(state, blockIdx.x);
  LossPart all;
  const LossPart* of = state.loss_parts + q.first_piece();
  for (int p = 0; p < q.piece_count(); ++p) {
    all.broken += of[p].broken;
    all.targets += of[p].targets;
    all.target_weight += of[p].target_weight;
    all.target_squares += of[p].target_squares;
    all.difference += of[p].difference;
    all.labels.join(of[p].labels);
    all.student.join(of[p].student);
    all.target.join(of[p].target);
  }
  QueryState own = {};
  own.counts = {0, q.query.n, q.query.n};
  if (state.keys) own.counts = Counts::of(q.keys(), q.query.n);
  own.weight = query_weight(state.call, q.query);
  if (own.weight == 0) own.counts = {};
  own.broken = all.broken > 0 || !is_number(own.weight);
  if (state.keys) own.broken = own.broken || has_negative_gain(state.call.label_gain, q.keys(), own.counts.labelled);
  own.targets = all.targets;
  own.target_weight = all.target_weight;
  own.target_squares = all.target_squares;
  own.settle(all.student, all.target, state.call.distill_unit);
  own.mean_difference =
      all.target_weight > 0 ? all.difference / all.target_weight - double(own.student_pivot) + double(own.target_pivot) : 0.0;
  own.range = all.labels;
  if (state.label_fields && !own.broken) own.grid = Grid::over(all.labels.low, all.labels.high);
  q.own = own;
}

__global__ void __launch_bounds__(kPieceThreads, 2) add_pieces(const LongState state) {
  PILE_SHARED_MEMORY(base);
  const PieceMemory memory(base);
  const BlockTeam team(memory.sums);
  const Piece piece(state);
  const LossPiece list(piece, memory, team);
  for (int k = team.rank; k < kPiece; k += kPieceThreads) memory.pull[k] = memory.loss[k] = 0;
  team.sync();
  if (!piece.own.broken)
    for_terms(state.call, piece.own, [&](auto of, auto term, float scale) {
      of.add(term, list, scale);
      team.sync();
    });
  const double loss = ordered_sum(team, piece.end - piece.begin, [&](int k) { return memory.loss[k]; });
  if (team.rank == 0) state.piece_sum[piece.index] = loss;
  if (!state.call.out.gradient) return;
  const bool here = piece.own.weight != 0;
  for (int k = piece.begin + team.rank; k < piece.end; k += kPieceThreads) {
    const int slot = piece.slot(k);
    const float gradient = piece.own.broken ? not_a_number() : memory.pull[k - piece.begin];
    store_gradient(state.call, piece.base + slot, here && counts_in_loss(state.call, piece.query, slot) ? gradient : 0.0f);
  }
}

__global__ void __launch_bounds__(32, 1) total_queries(const LongState state) {
  const LongQuery q(state, blockIdx.x);
  double loss = q.sum_pieces(WarpTeam(), q.piece_count());
  bool counts = false;
  for_terms(state.call, q.own, [&](auto of, auto, float scale) {
    loss += scale * of.rest(q);
    counts = true;
  });
  if (threadIdx.x > 0) return;
  state.call.losses[q.query.index] = q.own.broken ? not_a_number() : float(loss);
  state.call.has_pairs[q.query.index] = counts;
}

}  // namespace

void run_long_loss(const Call& call, const int64_t* keys, const int64_t* order, cudaStream_t stream) {
  LongRun run = {LongState(call), stream};
  run.state.keys = keys;
  run.state.order = order;
  run.pieces(load_pieces, kPiece * sizeof(double) + BlockTeam::kBytes);
  run.queries(join_pieces, 32, 0);
  run.tabulate();
  const auto launch_term = [&](auto of, auto term) { of.launch(run, term); };
  if (call.ranks()) with_loss(call.loss.label_loss, launch_term);
  if (call.distills()) with_loss(call.loss.distillation, launch_term);
  run.pieces(add_pieces, PieceMemory::kBytes);
  run.queries(total_queries, 32, 0);
  check(cudaGetLastError(), "the launches of a long loss");
}

}  // namespace pile::gpu
