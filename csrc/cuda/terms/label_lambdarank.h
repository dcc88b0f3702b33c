// R as LambdaRank: Σ_P c_i (g_i − g_j) |d_i − d_j| softplus(−(z_i − z_j)) / max DCG, d the discounts at the student's ranks.
//
// Directly, two passes over all pairs, on short lists and on long ones: a document's rank is how many have higher logits, and
// those of the same logit share their ranks' discounts as the mean over all their orders does. The first pass counts (2
// comparisons and 2 additions a pair), the second is RankNet's with another pair weight: 12 float instructions, an exponential
// and a quarter of a reciprocal. Arithmetic limits it. Nothing but two floats a document is kept; documents of m equal logits
// take m logarithms each.
#pragma once

#include "../ranks.h"

namespace pile::gpu {

template <>
struct Loss<LabelLambdaRank> : RankTerm {
  static LabelGain gain(const LabelLambdaRank& term, PairWeight weight) {
    return term.metric() == Metric::mrr ? LabelGain::any : RankTerm::gain(term, weight);
  }

  PILE_DEVICE static float discount(const LabelLambdaRank& term, int rank) {
    return term.cutoff > 0 && rank > term.cutoff ? 0.0f : discount_at(term.metric(), float(rank));
  }
  // Of the best order, that of the positions; 0 where no two gains differ.
  template <class List>
  PILE_DEVICE static float part(const LabelLambdaRank& term, const List& list, int k) {
    return list.gain[0] > list.gain[list.labelled - 1] ? list.gain[k] * discount(term, k + 1) : 0.0f;
  }

  // Own fields: d, and the mean of |d_p − d_q| over the ranks p, q of the documents of the same logit.
  template <class List>
  PILE_DEVICE static void rank(const LabelLambdaRank& term, const List& list) {
    RankTerm::sum_columns(list, [](float column, float row, float& above, float& equal) {
      above += column > row ? 1.0f : 0.0f;
      equal += column == row ? 1.0f : 0.0f;
    });
    float *const own = list.own_field(0), *const within = list.own_field(1);
    list.rows(list.begin, smaller(list.end, list.labelled), [&](int k) {
      // m of them at the ranks above + 1, …, above + m.
      const int above = int(own[k]), m = int(within[k]);
      const int last = term.cutoff > 0 ? int(smaller(double(m), term.cutoff - above)) : m;  // none beyond has a discount
      double sum = 0, apart = 0;
      for (int r = list.lanes.rank; r < last; r += kLanes) {
        const float d = discount_at(term.metric(), float(above + 1 + r));
        sum += d;
        apart += d * double(m - 1 - 2 * r);
      }
      sum = list.lanes.sum(sum);
      apart = list.lanes.sum(apart);
      if (list.lanes.rank > 0) return;
      own[k] = float(sum / m);
      within[k] = m > 1 ? float(2 * apart / (double(m) * (m - 1))) : 0.0f;
    });
    list.team.sync();
  }

  template <class List>
  PILE_DEVICE static void add(const LabelLambdaRank& term, const List& list, float scale) {
    if constexpr (List::kWhole) rank(term, list);
    const float *own = list.own_field(0), *within = list.own_field(1);
    list.label_tiles(own, [&](const LabelTile& tile) {
      const LossColumns& of = tile.columns;
      list.rows(tile.lo, tile.hi, [&](int k) {
        const float z = list.student[k], gain = list.gain[k], d = own[k], tied = within[k];
        add_label_row(list, tile, k, scale,
                      [&](int j) { return fabsf(gain - of.gains[j]) * (of.u[j] == z ? tied : fabsf(d - of.more[j])); });
      });
    });
  }
};

}  // namespace pile::gpu
