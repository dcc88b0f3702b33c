// The terms of the student's loss on the device. A term is a specialisation of Loss in a file of its own, terms/NAME.h, and is
// the same code for short lists and for long ones: what it sees is a TermList.
#pragma once

#include "long_lists.h"

namespace pile::gpu {

// A whole query in shared memory (kWhole: LossQuery in loss.h), or a piece of a long list (LossPiece), by position. Each adds
//   tiles(load, use), label_tiles(use)  visits all columns of the query; those of its label blocks with several labels
//   mean_difference()                   of student and target
template <class Team, bool kWhole_>
struct TermList {
  static constexpr bool kWhole = kWhole_;
  const Call& call;
  const Team& team;
  const Lanes lanes{kLanes};
  LossFacts facts;
  int begin, end, columns;  // the list's own positions; all of the query's
  const float *student, *target, *gain;
  const int *first, *last;  // where the label of a labelled position begins and ends
  int* slot;                // of short lists, whose target lies by slot
  float *slope, *loss;
  Tile tile;  // room for columns

  PILE_DEVICE float scaled_student(int k) const { return (student[k] - facts.student_pivot) * call.distill_unit; }
  // NaN: there is none.
  PILE_DEVICE float scaled_target(int k) const {
    return (target[kWhole ? slot[k] : k] - facts.target_pivot) * call.distill_unit;
  }
  // visit(k), by a thread each.
  template <class Visit>
  PILE_DEVICE void each(Visit visit) const {
#pragma unroll 1  // unrolled, CUDA 13.0's compiler crashes for sm_100
    for (int k = begin + team.rank; k < end; k += team.size) visit(k);
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
    student = piece.at(state.u[0]);
    target = piece.at(state.u[1]);
    gain = piece.at(state.gain);
    first = piece.at(state.first);
    last = piece.at(state.last);
    slope = memory.pull - begin;
    loss = memory.loss - begin;
    tile = memory.tile;
  }
  PILE_DEVICE double mean_difference() const { return piece.own.mean_difference; }
  template <class Load, class Use>
  PILE_DEVICE void tiles(Load load, Use use) const {
    for_tiles(0, int(parts(columns, 4)) * 4, load, use);
  }
  template <class Use>
  PILE_DEVICE void label_tiles(Use use) const {
    for_label_tiles(piece, memory, student, use);
  }
};

template <class Term>
struct Loss {
  static constexpr bool kHere = false;  // there is no file
};

// What a term has unless its file says otherwise.
struct DistillTerm {
  static constexpr bool kHere = true;
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
  template <class Run>
  static void launch(const Run&) {}
  PILE_DEVICE static double rest(const LongQuery&) { return 0; }
};
struct LabelTerm : DistillTerm {
  template <class Term>
  PILE_DEVICE static double size(const Term&, const LossFacts& of) {
    return of.pairs;
  }
};

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
      if (size > 0) use(of, term, float(share / size));
    });
  };
  visit(call.loss.distillation, call.loss.alpha);
  visit(call.loss.label_loss, 1 - call.loss.alpha);
}

}  // namespace pile::gpu
