// R as 1 − Σ_i c_i g_i / log2(1 + r_i) / max DCG with smooth ranks r_i = 1/2 + Σ_j σ((z_j − z_i)/τ): ApproxNDCG.
//
// Two sums over pairs: the ranks, then λ_i = Σ_j (a_i − a_j) σ'((z_i − z_j)/τ) / τ with a_i the loss's slope by r_i. Directly, or
// by fields. The rank of a top document is a sum of many small numbers, so neither way subtracts: direct sums add σ to either
// side of a pair, fields take tables of degree 16 (2e-13 per pair) whatever the logits' precision.
#pragma once

#include "../curvature.h"
#include "../field_sums.h"
#include "../ranks.h"
#include "../term.h"

namespace pile::PILE_ISA {

// σ(u_j − u_i) to i, σ(u_i − u_j) to j.
template <class T, bool kWide>
struct RankPairs : SigmoidPairs<T, kWide> {
  using typename SigmoidPairs<T, kWide>::Row;
  template <bool kMasked>
  PILE_INLINE TwoSided<T> pair(const Row& r, int j, Ints<T> mask) const {
    Vec<T> x;
    const Vec<T> t = this->small(r, j, x);
    Vec<T> big = reciprocal<T>(T(1) + t), small = t * big;
    if (kMasked) {
      big = mask ? big : Vec<T>{};
      small = mask ? small : Vec<T>{};
    }
    return {x > T(0) ? small : big, x > T(0) ? big : small};
  }
};

// (a_i − a_j) σ'(u_i − u_j).
template <class T, bool kWide>
struct SlopePairs : SigmoidPairs<T, kWide> {
  const T* a;
  struct Row : SigmoidPairs<T, kWide>::Row {
    Vec<T> a;
  };
  PILE_INLINE Row row(int i) const { return {SigmoidPairs<T, kWide>::row(i), splat<T>(a[i])}; }
  template <bool kMasked>
  PILE_INLINE Vec<T> pair(const Row& r, int j, Ints<T> mask) const {
    Vec<T> x;
    const Vec<T> t = this->small(r, j, x), q = reciprocal<T>(T(1) + t);
    const Vec<T> value = (r.a - load(a + j)) * (t * q * q);
    return kMasked ? (mask ? value : Vec<T>{}) : value;
  }
};

template <class T>
constexpr PairCosts kApproxCosts = sizeof(T) == 4 ? PairCosts{0.3, 10, 60} : PairCosts{1.2, 20, 60};

template <class T>
class Loss<T, LabelApproxNdcg> : public LabelTerm {
 public:
  static constexpr bool kCurvature = true;

  static bool applies(const LabelApproxNdcg& term, const LabelList<T>& list) {
    return Gains::of(list.order, term.gain()).some();
  }

  // Slope: Σ_j (a_i − a_j) σ'.
  Found run(const Member& m, const LabelApproxNdcg& term, const LossOptions& options, const LabelList<T>& list, T* slope) {
    const int n = list.order.labelled;
    const double per_unit = 1 / term.temperature;
    if (m.leads()) plan(list, per_unit, options.pairwise, m.size, *m.arena);
    m.sync();
    find_gains(m, term, list);
    each_piece(m, n, [&](int, int begin, int end) {
      for (int k = begin; k < end; ++k) u_[k] = (double(list.z[k]) - middle_) * per_unit;
    });
    m.sync();
    direct_ ? direct_ranks(m, list.z, n) : field_ranks(m, n);
    m.sync();
    each_piece(m, n, [&](int p, int begin, int end) {
      Vec<double> sums = {};
      for (int k = begin; k < end; k += kLanes<double>) {
        const Vec<double> next = load(rank_ + k) + 1.0, log = vlog<double>(next), gain = load(gain_ + k);
        sums += first_lanes<double>(end - k, gain * 0.69314718055994530942 / log);
        store(slope_ + k, gain * 0.69314718055994530942 / (next * log * log));
      }
      totals_[p] = sum<double>(sums);
    });
    m.sync();
    direct_ ? direct_slopes(m, n, slope, list.curvature) : field_slopes(m, n, slope, list.curvature);
    m.sync();
    double loss = 1;
    for (int p = 0; p < pieces(n); ++p) loss -= totals_[p];
    return {loss, 1, term.temperature};
  }

 private:
  static constexpr int P = 16, kLeastFields = 32;

  void plan(const LabelList<T>& list, double per_unit, PairSum how, int members, Arena& arena) {
    const int n = list.order.labelled;
    T low, high;
    find_range(list.z, n, low, high);
    middle_ = double(T(low / 2 + high / 2));
    const double from = (double(low) - middle_) * per_unit, to = (double(high) - middle_) * per_unit;
    const auto grid = Grid<double>::over(from, to, n);
    // A field holds the document itself, too, and where a list has saturated, all the others together are less than that. Longer
    // lists that far apart have more cells than a grid.
    direct_ = n < kLeastFields || direct_is_faster(how, grid, double(n) * n / 2, n, 3, kApproxCosts<T>);
    for (double** array : {&gain_, &discount_, &u_, &rank_, &slope_}) *array = arena.take<double>(n);
    totals_ = arena.take<double>(pieces(n));
    if (list.c) sort_.take(n, members, arena);
    if (direct_) {
      per_unit_ = T(per_unit);
      unit_ = arena.take<T>(n);
      a_ = arena.take<T>(n);
      near_.plan(T(from), T(to), 0, n, arena);
      sums_ = PairOutput<T>::take(n, arena);
      return;
    }
    table_ = field_table<double, P>(0, arena);
    ranks_ = slopes_ = {};
    ranks_.plan(grid, n, nullptr, nullptr, arena);
    slopes_.plan(grid, n, nullptr, slope_, arena);
  }

  // Of the weighted documents, relative to the largest DCG that they allow.
  void find_gains(const Member& m, const LabelApproxNdcg& term, const LabelList<T>& list) {
    const Order& order = list.order;
    const int n = order.labelled;
    const Gains gains = Gains::of(order, term.gain());
    write_discounts(m, Metric::ndcg, 0, n, discount_);
    if (m.leads())
      for (int k = 0; k < n; k = order.below[k])
        for (int i = k; i < order.below[k]; ++i) gain_[i] = gains(order.label[k]) * (list.c ? double(list.c[i]) : 1.0);
    m.sync();
    if (list.c) {
      each_piece(m, n, [&](int, int begin, int end) {
        for (int k = begin; k < end; ++k) sort_.pairs()[k] = {falling_key<uint64_t>(gain_[k]), k};
      });
      m.sync();
      sort_.run(m);
    }
    if (m.leads()) {
      ideal_ = 0;
      for (int k = 0; k < n; ++k) ideal_ += gain_[list.c ? sort_.pairs()[k].item : k] * discount_[k];
    }
    m.sync();
    each_vector<double>(m, n, [&](int k) { store(gain_ + k, load(gain_ + k) / ideal_); });
  }

  void direct_ranks(const Member& m, const T* z, int n) {
    each_piece(m, n, [&](int, int begin, int end) {
      for (int k = begin; k < end; ++k) unit_[k] = near_.wide ? z[k] : T(u_[k]);
    });
    each_vector<T>(m, n, [&](int k) {
      sums_.clear(k);
      near_.set(k, load(unit_ + k));
    });
    m.sync();
    near_.wide ? all_pairs<T>(m, RankPairs<T, true>{{unit_, near_, per_unit_}}, n, sums_, nullptr)
               : all_pairs<T>(m, RankPairs<T, false>{{unit_, near_, per_unit_}}, n, sums_, nullptr);
    each_piece(m, n, [&](int, int begin, int end) {
      for (int k = begin; k < end; ++k) rank_[k] = 1 + double(sums_.rows[k]) + double(sums_.columns[k]);
    });
  }
  void direct_slopes(const Member& m, int n, T* slope, T* curvature) {
    each_piece(m, n, [&](int, int begin, int end) {
      for (int k = begin; k < end; ++k) a_[k] = T(slope_[k]);
    });
    each_vector<T>(m, n, [&](int k) { sums_.clear(k); });
    m.sync();
    near_.wide ? all_pairs<T>(m, SlopePairs<T, true>{{unit_, near_, per_unit_}, a_}, n, sums_, nullptr)
               : all_pairs<T>(m, SlopePairs<T, false>{{unit_, near_, per_unit_}, a_}, n, sums_, nullptr);
    each_vector<T>(m, n, [&](int k) { store(slope + k, sums_.value(k)); });
    if (curvature) all_curvature<T>(m, unit_, near_, SumOfBoth<T>{a_}, n, sums_, curvature, per_unit_);
  }

  // solve(), once the fields have all documents' moments.
  template <class Solve>
  void find_fields(const Member& m, FieldSums<double, P>& fields, Solve solve) const {
    for (int c = m.rank; c < fields.chunks; c += m.size) {
      m.poll();
      fields.deposit(c, u_);
    }
    m.sync();
    if (m.leads()) {
      fields.collect();
      solve();
    }
    m.sync();
  }
  void field_ranks(const Member& m, int n) {
    find_fields(m, ranks_, [&] { ranks_.solve_self(*table_); });
    each_vector<double>(m, n, [&](int k) { store(rank_ + k, (n + 1) / 2.0 + ranks_.evaluate(0, load(u_ + k), k)); });
  }
  void field_slopes(const Member& m, int n, T* slope, T* curvature) {
    find_fields(m, slopes_, [&] { slopes_.solve_slope_of_self(*table_); });
    each_vector<double>(m, n, [&](int k) {
      store_narrow(slope + k, slopes_.evaluate(0, load(u_ + k), k));
      // But the pair of a document and itself.
      if (curvature)
        store_narrow(curvature + k, vmax(slopes_.evaluate(0, load(u_ + k), k, 1) - load(slope_ + k) / 2.0, Vec<double>{}));
    });
  }

  RadixSort<uint64_t> sort_;
  FieldSums<double, P> ranks_, slopes_;
  const FieldTable<double, P>* table_ = nullptr;
  Exponentials<T> near_;
  PairOutput<T> sums_;
  double middle_ = 0, ideal_ = 0;
  double *gain_ = nullptr, *discount_ = nullptr, *u_ = nullptr, *rank_ = nullptr, *slope_ = nullptr, *totals_ = nullptr;
  T *unit_ = nullptr, *a_ = nullptr;  // u, or the logits as they are where they are wide, and a, in the logits' precision
  T per_unit_ = 1;
  bool direct_ = true;
};

}  // namespace pile::PILE_ISA
