// The gains of a query's labels, and the discounts of ranks.
#pragma once

#include <cmath>

#include "order.h"

namespace pile::PILE_ISA {

// A label's gain relative to 2^largest (exp2), or to the largest (linear), so that no label is too large for it.
struct Gains {
  bool any = false;  // 1 for labels above 0
  Gain kind = Gain::exp2;
  double highest = 0, lowest = 0;

  static Gains of(const Order& order, Gain kind, bool any = false) {
    Gains gains = {any, kind};
    if (order.labelled == 0) return gains;
    gains.highest = order.label[0];
    gains.lowest = order.label[order.labelled - 1];
    return gains;
  }
  double operator()(double y) const {
    if (any) return y > 0;
    if (kind == Gain::linear) return highest > 0 ? y / highest : 0;
    return __builtin_exp2(y - highest) - __builtin_exp2(-highest);
  }
  bool some() const { return (*this)(highest) != 0; }
  // Some label pair has two different gains.
  bool differ() const { return (*this)(highest) != (*this)(lowest); }
};

// NDCG's discounts 1/log2(1 + rank) of the first ranks, by rank from 0: logarithms are dear, and most lists are no longer.
struct Discounts {
  static constexpr int kNumber = 4096;
  double value[kNumber];

  Discounts() {
    for (int k = 0; k < kNumber; ++k) value[k] = 1 / std::log2(k + 2.0);
  }
  static const double* get() {
    static const Discounts discounts;
    return discounts.value;
  }
};

// To discount[0, n): those of ranks 1 to n, 0 past the cutoff (0: none). Whole vectors are written.
inline void write_discounts(const Member& m, Metric metric, double cutoff, int n, double* discount) {
  const int last = cutoff > 0 && cutoff < n ? int(cutoff) : n;
  const double* const first = Discounts::get();
  each_vector<double>(m, n, [&](int k) {
    const Vec<double> rank = to_vec<double>(iota<double>()) + double(k + 1);
    const Vec<double> value = metric == Metric::mrr                      ? 1.0 / rank
                              : k + kLanes<double> <= Discounts::kNumber ? load(first + k)
                                                                         : 0.69314718055994530942 / vlog<double>(rank + 1.0);
    store(discount + k, first_lanes<double>(last - k, value));
  });
}

// Σ gain · discount with the documents in the best order, which is that of their positions. One member.
inline double ideal_dcg(const Order& order, const Gains& gains, const double* discount) {
  double total = 0;
  for (int k = 0; k < order.labelled; k = order.below[k]) {
    double sum = 0;
    for (int i = k; i < order.below[k]; ++i) sum += discount[i];
    total += gains(order.label[k]) * sum;
  }
  return total;
}

}  // namespace pile::PILE_ISA
