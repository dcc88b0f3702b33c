// R as Σ_P c_i (g_i − g_j) |d_i − d_j| softplus(−(z_i − z_j)) / max DCG: LambdaRank. Ranks and ties by ranks.h; pairs directly
// here, or in linear time by ranked_sums.h.
#pragma once

#include "../curvature.h"
#include "../ranked_sums.h"
#include "../term.h"

namespace pile::PILE_ISA {

// λ of the label pairs weighted by gains and discounts, and the sum of their losses. Pairs of equal logits have equal discounts,
// so they add nothing here.
template <class T, bool kWide, bool kCounted>
struct RankedPairs {
  static constexpr int kRows = 2;
  const T* u;
  Exponentials<T> near;
  const T *gain, *discount;
  const int* below;
  const T* c;
  double total = 0;
  Vec<T> loss = {};

  struct Row {
    Vec<T> u, up, down, gain, discount, c;
  };
  PILE_INLINE int first(int i) const { return below[i]; }
  PILE_INLINE Row row(int i) const {
    Row r;
    r.u = splat<T>(u[i]);
    if (!kWide) {
      r.up = splat<T>(near.up[i]);
      r.down = splat<T>(near.down[i]);
    }
    r.gain = splat<T>(gain[i]);
    r.discount = splat<T>(discount[i]);
    if (kCounted) r.c = splat<T>(c[i]);
    return r;
  }
  template <bool kMasked>
  PILE_INLINE Vec<T> pair(const Row& r, int j, Ints<T> mask) {
    const Vec<T> x = r.u - load(u + j);
    const Vec<T> t = kWide ? vexp<T>(-vabs<T>(x)) : vmin(r.up * load(near.down + j), r.down * load(near.up + j));
    const Vec<T> q = reciprocal<T>(T(1) + t);
    Vec<T> omega = (r.gain - load(gain + j)) * vabs<T>(r.discount - load(discount + j));
    if (kCounted) omega *= r.c;
    if (kMasked) omega = mask ? omega : Vec<T>{};
    loss += omega * (vmax(-x, Vec<T>{}) + vlog1p<T>(t));
    return omega * (x > T(0) ? t * q : q);
  }
  PILE_INLINE void flush() {
    total += double(sum<T>(loss));
    loss = Vec<T>{};
  }
};

template <class T>
class Loss<T, LabelLambdaRank> : public LabelTerm {
 public:
  static constexpr bool kCurvature = true;

  static bool applies(const LabelLambdaRank& term, const LabelList<T>& list) { return gains_of(term, list).differ(); }

  // Slope: λ.
  Found run(const Member& m, const LabelLambdaRank& term, const LossOptions& options, const LabelList<T>& list, T* slope) {
    const Order& order = list.order;
    const int n = order.labelled;
    const Gains gains = gains_of(term, list);
    ranks_.run(m, order, gains, term.metric(), term.cutoff, list.z);
    if (m.leads()) {
      gain_ = m.arena->take<T>(n);
      for (int k = 0; k < n; k = order.below[k]) {
        const T own = T(gains(order.label[k]) / ranks_.ideal);
        for (int i = k; i < order.below[k]; ++i) gain_[i] = own;
      }
      plan(n, options.pairwise, list, *m.arena);
    }
    m.sync();
    direct_ ? run_direct(m, list, slope) : sums_.run(m, n, ranks_, list.c, slope, list.curvature);
    m.sync();
    if (m.leads()) {
      result_ = direct_ ? pair_total(totals_, n) : sums_.result();
      if (ranks_.has_ties()) result_ += ranks_.add_ties(order, gain_, list.c, slope, list.curvature);
    }
    m.sync();
    return {result_, 1};
  }

 private:
  static Gains gains_of(const LabelLambdaRank& term, const LabelList<T>& list) {
    return Gains::of(list.order, term.gain(), term.metric() == Metric::mrr);
  }

  void plan(int n, PairSum how, const LabelList<T>& list, Arena& arena) {
    T low, high;
    find_range(list.z, n, low, high);
    direct_ = !sums_.plan(list.order, gain_, list.c, low, high, how, arena);
    if (!direct_) return;
    near_.plan(low, high, 0, n, arena);
    discount_ = arena.take<T>(n);
    pairs_ = PairOutput<T>::take(n, arena);
    totals_ = arena.take<double>(kPairTotals);
  }

  void run_direct(const Member& m, const LabelList<T>& list, T* slope) {
    const int n = list.order.labelled;
    each_vector<T>(m, n, [&](int k) {
      pairs_.clear(k);
      near_.set(k, load(list.z + k));
    });
    each_piece(m, n, [&](int, int begin, int end) {
      for (int k = begin; k < end; ++k) discount_[ranks_.position(k)] = T(ranks_.discount[k]);
    });
    m.sync();
    list.c ? run_pairs<true>(m, list) : run_pairs<false>(m, list);
    each_vector<T>(m, n, [&](int k) { store(slope + k, pairs_.value(k)); });
    const WeightOfPreferred<T> weight = {list.order.below, gain_, discount_, list.c};
    if (list.curvature) all_curvature<T>(m, list.z, near_, weight, n, pairs_, list.curvature);
  }
  template <bool kCounted>
  void run_pairs(const Member& m, const LabelList<T>& list) {
    const int n = list.order.labelled;
    const auto run = [&](auto pairs) { all_pairs<T>(m, pairs, n, pairs_, totals_); };
    if (near_.wide)
      run(RankedPairs<T, true, kCounted>{list.z, near_, gain_, discount_, list.order.below, list.c});
    else
      run(RankedPairs<T, false, kCounted>{list.z, near_, gain_, discount_, list.order.below, list.c});
  }

  Ranks<T> ranks_;
  RankedSums<T> sums_;
  Exponentials<T> near_;
  PairOutput<T> pairs_;
  T *gain_ = nullptr, *discount_ = nullptr;  // by position
  double *totals_ = nullptr, result_ = 0;
  bool direct_ = true;
};

}  // namespace pile::PILE_ISA
