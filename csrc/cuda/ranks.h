// What terms of the ranks share: discounts, and a pass over the labelled documents that comes before the pairs' own.
#pragma once

#include "terms.h"

namespace pile::gpu {

constexpr float kNoRank = -kInfinity;  // the logit of a column without a label: below all others, and no pair of theirs

// 1 / log2(1 + rank), or 1 / rank; rank >= 1.
PILE_DEVICE float discount_at(Metric metric, float rank) { return 1.0f / (metric == Metric::mrr ? rank : log2f(1.0f + rank)); }

// Of long lists, by piece: Loss<Term>::rank.
template <class State, class Term>
__global__ void __launch_bounds__(kPieceThreads, 2) rank_pieces(const State state, const Term term) {
  PILE_SHARED_MEMORY(base);
  const PieceMemory memory(base);
  const BlockTeam team(memory.sums);
  const Piece piece(state);
  if (piece.begin >= piece.labelled_end() || piece.own.broken) return;
  Loss<Term>::rank(term, LossPiece(piece, memory, team));
}

// A label term with rank(term, list): what its own two fields hold of every labelled document, by looking at all others. A pass
// of its own on long lists.
struct RankTerm : GainTerm {
  static int64_t words(const LongState& state) { return 2 * state.documents; }
  template <class Run, class Term>
  static void launch(const Run& run, const Term& term) {
    GainTerm::launch(run, term);
    run.pieces(rank_pieces<LongState, Term>, PieceMemory::kBytes, term);
  }

 protected:
  // Both own fields := Σ_j of what pass(z_j, z_k, sums) adds to {first, second}, over the labelled columns j.
  template <class List, class Pass>
  PILE_DEVICE static void sum_columns(const List& list, Pass pass) {
    float *const first = list.own_field(0), *const second = list.own_field(1);
    const int end = smaller(list.end, list.labelled);
    list.each([&](int k) {
      if (k < end) first[k] = second[k] = 0;
    });
    list.tiles([&](int j, int to) { list.tile.student[to] = j < list.labelled ? list.student[j] : kNoRank; },
               [&](int from, int to) {
                 const float* columns = list.tile.from(from).student;
                 list.rows(list.begin, end, [&](int k) {
                   const float z = list.student[k];
                   float a = 0, b = 0;
                   for (int j = from + 4 * list.lanes.rank; j < to; j += 4 * kLanes) {
                     const float4 c = four(columns + j);
                     pass(c.x, z, a, b);
                     pass(c.y, z, a, b);
                     pass(c.z, z, a, b);
                     pass(c.w, z, a, b);
                   }
                   a = list.lanes.sum(a);
                   b = list.lanes.sum(b);
                   if (list.lanes.rank > 0) return;
                   first[k] += a;
                   second[k] += b;
                 });
               });
    list.team.sync();
  }
};

}  // namespace pile::gpu
