// R as −Σ_i π_i log softmax(z/τ)_i over the labelled documents, π_i = c_i g_i / Σ g their shares of the gain.
//
// slope_i = (q_i Σ π − π_i) / τ, q the student's distribution. Two sums over the list first, then a pass over the documents: an
// exponential and some 10 float instructions each time, nothing over pairs. The order by falling label, which gives the highest
// label and the lowest, costs more than the loss.
#pragma once

#include "../terms.h"

namespace pile::gpu {

template <>
struct Loss<LabelSoftmax> : GainTerm {
  template <class List>
  PILE_DEVICE static float part(const LabelSoftmax&, const List& list, int k) {
    return list.gain[k];
  }

  // A document's e^{z/τ}, from the highest, and c g.
  template <class List>
  struct Parts {
    static constexpr int kSums = 2;
    static constexpr bool kByLabel = true;
    const List& list;
    float highest, unit;
    PILE_DEVICE float energy(int k) const { return (list.student[k] - highest) * unit; }
    PILE_DEVICE float operator()(int which, int k) const {
      if (k >= list.labelled) return 0;
      return which ? list.weight_of(k) * list.gain[k] : expf(energy(k));
    }
  };
  template <class List>
  PILE_DEVICE static Parts<List> parts(const LabelSoftmax& term, const List& list) {
    return {list, list.label_range().high, float(1 / term.temperature)};
  }

  template <class List>
  PILE_DEVICE static void add(const LabelSoftmax& term, const List& list, float scale) {
    const Parts<List> of = parts(term, list);
    const double sum = list.sum(of, 0), gain = list.sum(of, 1);
    const float log_sum = float(log(sum)), share = float(gain / sum);
    list.each([&](int k) {
      if (k >= list.labelled) return;
      const float own = of(1, k);
      list.add(k, scale * of.unit * (share * of(0, k) - own), scale * own * (log_sum - of.energy(k)));
    });
  }

  static int64_t words(const LongState& state) { return 2 * 2 * state.pieces; }
  template <class Run>
  static void launch(const Run& run, const LabelSoftmax& term) {
    GainTerm::launch(run, term);
    run.pieces(sum_pieces<LongState, LabelSoftmax>, PieceMemory::kBytes, term);
  }
};

}  // namespace pile::gpu
