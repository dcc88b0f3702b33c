// The terms of the student's loss on the device. A term is a specialisation of Loss in a file of its own, terms/NAME.h, and is
// the same code for short lists and for long ones: what it sees is a TermList.
#pragma once

#include "long_lists.h"

namespace pile::gpu {

// A whole query in shared memory (kWhole: LossQuery in loss.h), or a piece of a long list (LossPiece), by position. Each adds
//   tiles(load, use)                    visits all columns of the query
//   label_tiles(more, use)              those of its label blocks with several labels, with `more` of each unless it is nullptr
//   own_field(which)                    floats by position that a term has for itself
//   mean_difference()                   of student and target, weighted
//   sum(parts, which)                   Σ parts(which, k) over all of the query's documents; of a ListTerm
//   label_range()                       of the student's logits that have a label
template <class Team, bool kWhole_>
struct TermList {
  static constexpr bool kWhole = kWhole_;
  const Call& call;
  const Team& team;
  const Lanes lanes{kLanes};
  LossFacts facts;
  int begin, end, columns, labelled;  // the list's own positions; all of the query's, and those of them with a label
  const float *student, *target, *gain, *weight;
  const int *first, *last;  // where the label of a labelled position begins and ends
  int* slot;                // of short lists, whose target lies by slot
  float *slope, *loss;
  Tile tile;  // room for columns

  PILE_DEVICE float scaled_student(int k) const { return (student[k] - facts.student_pivot) * call.distill_unit; }
  // NaN: there is none.
  PILE_DEVICE float scaled_target(int k) const {
    return (target[kWhole ? slot[k] : k] - facts.target_pivot) * call.distill_unit;
  }
  // What a document counts, c.
  PILE_DEVICE float weight_of(int k) const { return weight ? weight[k] : 1.0f; }
  // visit(k), by a thread each.
  template <class Visit>
  PILE_DEVICE void each(Visit visit) const {
#pragma unroll 1  // unrolled, CUDA 13.0's compiler crashes for sm_100
    for (int k = begin + team.rank; k < end; k += team.size) visit(k);
  }
  // Σ value(k) over the list's own positions, to every thread, in an order that does not depend on the team.
  template <class Value>
  PILE_DEVICE double sum_own(Value value) const {
    float* const values = tile.student - begin;
    team.sync();
    each([&](int k) { values[k] = value(k); });
    team.sync();
    return ordered_sum(team, end - begin, [&](int i) { return values[begin + i]; });
  }
  // By one thread; scaled.
  PILE_DEVICE void add(int k, float of_slope, float of_loss) const {
    slope[k] += of_slope;
    loss[k] += of_loss;
  }
  // visit(k), by four lanes each, and what they have found.
  template <class Visit>
  PILE_DEVICE void rows(int lo, int hi, Visit visit) const {
    for (int k = lo + team.rank / kLanes; k < hi; k += team.size / kLanes) visit(k);
  }
  PILE_DEVICE void add_row(int k, float scale, const SlopeAndLoss& part) const {
    const float of_slope = lanes.sum(part.slope), of_loss = lanes.sum(part.loss);
    if (lanes.rank == 0) add(k, scale * of_slope, scale * of_loss);
  }
};

struct LossPiece : TermList<BlockTeam, false> {
  const Piece& piece;
  const PieceMemory& memory;

  PILE_DEVICE LossPiece(const Piece& piece, const PieceMemory& memory, const BlockTeam& team)
      : TermList{piece.call, team}, piece(piece), memory(memory) {
    const LongState& state = piece.state;
    facts = piece.own;
    begin = piece.begin;
    end = piece.end;
    columns = piece.query.n;
    labelled = piece.own.counts.labelled;
    student = piece.at(state.u[0]);
    target = piece.at(state.u[1]);
    gain = piece.at(state.gain);
    weight = state.weight ? piece.at(state.weight) : nullptr;
    first = piece.at(state.first);
    last = piece.at(state.last);
    slope = memory.pull - begin;
    loss = memory.loss - begin;
    tile = memory.tile;
  }
  PILE_DEVICE double mean_difference() const { return piece.own.mean_difference; }
  PILE_DEVICE Range label_range() const { return piece.own.range; }
  // What sum_pieces has left.
  template <class Parts>
  PILE_DEVICE double sum(const Parts&, int which) const {
    const double* of = sums_of<Parts>(piece.state) + piece.first_piece() * Parts::kSums + which;
    return ordered_sum(team, piece.piece_count(), [&](int p) { return of[p * Parts::kSums]; });
  }
  template <class Parts>
  static PILE_DEVICE double* sums_of(const LongState& state) {
    return reinterpret_cast<double*>(Parts::kByLabel ? state.of_label_loss : state.of_distillation);
  }
  template <class Load, class Use>
  PILE_DEVICE void tiles(Load load, Use use) const {
    for_tiles(0, int(parts(columns, 4)) * 4, load, use);
  }
  // In the scratch of a label term.
  PILE_DEVICE float* own_field(int which) const { return piece.at(piece.state.of_label_loss) + which * piece.state.documents; }
  template <class Use>
  PILE_DEVICE void label_tiles(const float* more, Use use) const {
    for_label_tiles(piece, memory, student, more, use);
  }
};

template <class Term>
struct Loss {
  static constexpr bool kHere = false;  // there is no file
};

// A tile's share of Σ_P weight(j) c_i softplus(−(z_i − z_j)) of row k, i its preferred document, with the slope. By four lanes.
template <class List, class Weight>
PILE_DEVICE void add_label_row(const List& list, const LabelTile& tile, int k, float scale, Weight weight) {
  const LossColumns& of = tile.columns;
  SlopeAndLoss sums, above;
  const float z = list.student[k];
  add_losses<true>(of, z, larger(list.last[k], tile.from), tile.to, list.lanes, sums, weight);
  const int from = larger(tile.begin, tile.from), to = smaller(list.first[k], tile.to);
  if (!list.weight) {
    add_losses<false>(of, z, from, to, list.lanes, above, weight);
  } else {
    add_losses<false>(of, z, from, to, list.lanes, above, [&](int j) { return weight(j) * of.weights[j]; });
    sums.slope *= list.weight[k];
    sums.loss *= list.weight[k];
  }
  list.add_row(k, scale, {above.slope - sums.slope, sums.loss});
}

// What a term has unless its file says otherwise.
struct DistillTerm {
  static constexpr bool kHere = true;
  static constexpr bool kFields = false;  // of long lists: label pairs meet through fields
  // On the host: what the term multiplies logits by.
  template <class Term>
  static float unit(const Term&) {
    return 1;
  }
  // What its sum is divided by; 0: nothing to learn from this query.
  template <class Term>
  PILE_DEVICE static double size(const Term&, const LossFacts& of) {
    return of.targets * (of.targets - 1) / 2;
  }
  // Of long lists. Scratch of its own, floats at state.of_distillation or state.of_label_loss; on the host, its own launches
  // before the pieces add; what a query's loss has beyond them.
  static int64_t words(const LongState&) { return 0; }
  template <class Run, class Term>
  static void launch(const Run&, const Term&) {}
  PILE_DEVICE static double rest(const LongQuery&) { return 0; }
};
struct LabelTerm : DistillTerm {
  // On the host: the gains that it asks for.
  template <class Term>
  static LabelGain gain(const Term&, PairWeight weight) {
    return gain_of(weight);
  }
  template <class Term>
  PILE_DEVICE static double size(const Term&, const LossFacts& of) {
    return of.pairs;
  }
  // Of short lists, LossFacts::pairs, where Σ ω is known already; of long ones launch() sees to it.
  template <class Term, class List>
  PILE_DEVICE static double total(const Term&, const List& list) {
    return list.facts.pairs;
  }
};

// Of long lists, by piece: what a term that takes gains divides by.
template <class State, class Term>
__global__ void __launch_bounds__(kPieceThreads, 2) total_gains(const State state, const Term term) {
  PILE_SHARED_MEMORY(base);
  const PieceMemory memory(base);
  const BlockTeam team(memory.sums);
  const Piece piece(state);
  if (piece.begin >= piece.labelled_end()) return;
  const double total = Loss<Term>::total(term, LossPiece(piece, memory, team));
  if (team.rank == 0) state.piece_sum[piece.index] = total;
}

// A label term that takes labels as gains. It has part(term, list, k): a labelled position's part of what the term's sum is
// divided by.
struct GainTerm : LabelTerm {
  template <class Term>
  static LabelGain gain(const Term& term, PairWeight) {
    return term.gain() == Gain::exp2 ? LabelGain::exp2 : LabelGain::linear;
  }
  template <class Term, class List>
  PILE_DEVICE static double total(const Term& term, const List& list) {
    return list.sum_own([&](int k) { return k < list.labelled ? Loss<Term>::part(term, list, k) : 0.0f; });
  }
  template <class Run, class Term>
  static void launch(const Run& run, const Term& term) {
    run.bound(run.state.call.label_gain);
    run.pieces(total_gains<LongState, Term>, PieceMemory::kBytes, term);
    run.total();
  }
};

// Of long lists, by piece: the sums that a term by lists needs before it adds.
template <class State, class Term>
__global__ void __launch_bounds__(kPieceThreads, 2) sum_pieces(const State state, const Term term) {
  PILE_SHARED_MEMORY(base);
  const PieceMemory memory(base);
  const BlockTeam team(memory.sums);
  const Piece piece(state);
  const LossPiece list(piece, memory, team);
  const auto parts = Loss<Term>::parts(term, list);
  using Parts = std::decay_t<decltype(parts)>;
  for (int which = 0; which < Parts::kSums; ++which) {
    const double sum = list.sum_own([&](int k) { return parts(which, k); });
    if (team.rank == 0) LossPiece::sums_of<Parts>(state)[piece.index * Parts::kSums + which] = sum;
  }
}

}  // namespace pile::gpu

#define PILE_TERM_FILES
#include "pile/terms.h"

namespace pile::gpu {

// use(Loss<Term>(), term) for the term, on host or device.
template <class Kind, class Use>
PILE_SHARED void with_loss(const Kind& kind, Use use) {
  kind.visit([&](auto term) {
    if constexpr (Loss<decltype(term)>::kHere)
      use(Loss<decltype(term)>(), term);
    else
      Kind::no_such_term();
  });
}

// use(Loss<Term>(), term, scale) for the terms in use that have something to learn from a query.
template <class Use>
PILE_DEVICE void for_terms(const Call& call, const LossFacts& facts, Use use) {
  const auto visit = [&](const auto& kind, double share) {
    if (!(share > 0)) return;
    with_loss(kind, [&](auto of, auto term) {
      const double size = of.size(term, facts);
      if (size > 0) use(of, term, float(facts.weight * share / size));
    });
  };
  visit(call.loss.distillation, call.loss.alpha);
  visit(call.loss.label_loss, 1 - call.loss.alpha);
}

}  // namespace pile::gpu
