// R as RankNet: Σ_P ω c_i softplus(−(z_i − z_j)), c_i the weight of the preferred document. Directly where labels meet in a tile; between the label blocks of a long list
// through fields.
#pragma once

#include "../terms.h"

namespace pile::gpu {

// The student's moments, for solve_label_blocks.
template <class State>
__global__ void __launch_bounds__(kPieceThreads, 2) deposit_students(const State state) {
  PILE_SHARED_MEMORY(base);
  const PieceMemory memory(base);
  const Piece piece(state);
  if (!piece.meets_through_fields()) return;
  deposit_piece(piece, memory, piece.at(state.u[0]));
  if (state.weight) deposit_piece(piece, memory, piece.at(state.u[0]), piece.at(state.weight));
}

template <>
struct Loss<LabelLogistic> : LabelTerm {
  static constexpr bool kFields = true;

  template <class List>
  PILE_DEVICE static void add(LabelLogistic, const List& list, float scale) {
    list.label_tiles(nullptr, [&](const LabelTile& tile) {
      const float* gains = tile.columns.gains;
      list.rows(tile.lo, tile.hi, [&](int k) {
        if (!tile.columns.weighted) return add_label_row(list, tile, k, scale, One());
        const float gain = list.gain[k];
        add_label_row(list, tile, k, scale, [&](int j) { return fabsf(gain - gains[j]); });
      });
    });
    if constexpr (!List::kWhole)
      for_label_fields(list.piece, list.memory, list.student, [&](int k, float value) { list.add(k, -scale * value, 0); });
  }

  template <class Run>
  static void launch(const Run& run, const LabelLogistic&) {
    run.bound(run.state.call.label_gain);
    run.weigh();
    if (!run.state.label_fields) return;
    run.pieces(deposit_students<LongState>, PieceMemory::kBytes);
    run.solve(true);
  }
  PILE_DEVICE static double rest(const LongQuery& q) { return q.label_block_loss(); }
};

}  // namespace pile::gpu
