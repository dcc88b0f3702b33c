// R as 1 − Σ_i c_i g_i / log2(1 + r_i) / max DCG, with the smooth ranks r_i = 1/2 + Σ_j σ((z_j − z_i)/τ) of labelled documents.
//
// With a_i = −∂/∂r_i of the sum, slope_i = Σ_j σ'((z_j − z_i)/τ) (a_j − a_i) / τ. Directly, two passes over all pairs, on short
// lists and on long ones: the ranks, then the slopes, an exponential, a reciprocal and 6 to 8 float instructions a pair each.
// Arithmetic limits it. Two floats a document are kept. With weights the best order is not that of the labels: a third pass
// counts how many have more of c g.
#pragma once

#include "../ranks.h"

namespace pile::gpu {

template <>
struct Loss<LabelApproxNdcg> : RankTerm {
  template <class List>
  PILE_DEVICE static float weighted_gain(const List& list, int k) {
    return list.weight_of(k) * list.gain[k];
  }
  // Of the best order.
  template <class List>
  PILE_DEVICE static float part(const LabelApproxNdcg&, const List& list, int k) {
    int above = k;
    const float own = weighted_gain(list, k);
    if (list.weight) {
      above = 0;
      for (int j = 0; j < list.labelled; ++j) {
        const float other = weighted_gain(list, j);
        above += other > own || (other == own && j < k);
      }
    }
    return own * discount_at(Metric::ndcg, float(above + 1));
  }

  // Own fields: a, and c g / log2(1 + r).
  template <class List>
  PILE_DEVICE static void rank(const LabelApproxNdcg& term, const List& list) {
    const float unit = float(1 / term.temperature);
    RankTerm::sum_columns(list, [&](float column, float row, float& ranks, float&) {
      const float x = (column - row) * unit, t = expf(-fabsf(x));
      ranks = fmaf(x > 0 ? 1.0f : t, reciprocal(1.0f + t), ranks);
    });
    float *const slopes = list.own_field(0), *const terms = list.own_field(1);
    list.each([&](int k) {
      if (k >= list.labelled) return;
      const float above = 1.5f + slopes[k], logarithm = logf(above);  // 1 + r
      terms[k] = weighted_gain(list, k) * kLn2 / logarithm;
      slopes[k] = terms[k] / (above * logarithm);
    });
    list.team.sync();
  }

  template <class List>
  PILE_DEVICE static void add(const LabelApproxNdcg& term, const List& list, float scale) {
    if constexpr (List::kWhole) rank(term, list);
    const float unit = float(1 / term.temperature);
    const float *slopes = list.own_field(0), *terms = list.own_field(1);
    list.each([&](int k) {
      if (k < list.labelled) list.add(k, 0, scale * ((k == 0 ? float(list.facts.pairs) : 0.0f) - terms[k]));
    });
    list.tiles(
        [&](int j, int to) {
          const bool used = j < list.labelled;
          list.tile.student[to] = used ? list.student[j] : kNoRank;
          list.tile.student_more[to] = used ? slopes[j] : 0.0f;
        },
        [&](int from, int to) {
          const Tile columns = list.tile.from(from);
          list.rows(list.begin, smaller(list.end, list.labelled), [&](int k) {
            const float row = list.student[k], own = slopes[k];
            SlopeAndLoss sums;
            const auto add = [&](float column, float slope) {
              const float t = expf(-fabsf((column - row) * unit)), r = reciprocal(1.0f + t);
              sums.slope = fmaf(t * r * r, slope - own, sums.slope);
            };
            for (int j = from + 4 * list.lanes.rank; j < to; j += 4 * kLanes) {
              const float4 z = four(columns.student + j), a = four(columns.student_more + j);
              add(z.x, a.x);
              add(z.y, a.y);
              add(z.z, a.z);
              add(z.w, a.w);
            }
            list.add_row(k, scale * unit, sums);
          });
        });
  }
};

}  // namespace pile::gpu
