// R as 1 − Σ_i c_i g_i / log2(1 + r_i) / max DCG with smooth ranks r_i = 1/2 + Σ_j σ((z_j − z_i)/τ): ApproxNDCG.
//
// Two sums over pairs: the ranks, then λ_i = Σ_j (a_i − a_j) σ'((z_i − z_j)/τ) / τ with a_i the loss's slope by r_i. Directly, or
// in linear time by scans down and up the sorted list (sigmoid_scan.h). The rank of a top document is a sum of many small numbers,
// so neither way subtracts there.
#pragma once

#include "../curvature.h"
#include "../ranks.h"
#include "../sigmoid_scan.h"
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
class Loss<T, LabelApproxNdcg> : public LabelTerm {
 public:
  static constexpr bool kCurvature = true;

  static bool applies(const LabelApproxNdcg& term, const LabelList<T>& list) {
    return Gains::of(list.order, term.gain()).some();
  }

  // Slope: Σ_j (a_i − a_j) σ'.
  Found run(const Member& m, const LabelApproxNdcg& term, const LossOptions& options, const LabelList<T>& list, T* slope) {
    const int n = list.order.labelled;
    per_unit_ = 1 / term.temperature;
    if (m.leads()) plan(list, options.pairwise, m.size, *m.arena);
    m.sync();
    find_gains(m, term, list);
    direct_ ? run_direct(m, n, list, slope) : run_scan(m, n, list, slope);
    m.sync();
    double loss = 1;
    for (int p = 0; p < (direct_ ? pieces(n) : scan_.chunks); ++p) loss -= totals_[p];
    return {loss, 1, term.temperature};
  }

 private:
  using Key = std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>;
  using Scan = SigmoidScan<sizeof(T) == 4 ? 12 : 20>;

  void plan(const LabelList<T>& list, PairSum how, int members, Arena& arena) {
    const int n = list.order.labelled;
    T low, high;
    find_range(list.z, n, low, high);
    middle_ = double(T(low / 2 + high / 2));
    // In a few documents of equal logits and gains the direct sums cancel to the last bit, and scans do not.
    direct_ = how == PairSum::direct || n < (how == PairSum::auto_ ? kFasterScan : kLeastScan);
    for (double** array : {&gain_, &discount_}) *array = arena.take<double>(n);
    if (list.c) by_gain_.take(n, members, arena);
    if (direct_) {
      rank_ = arena.take<double>(n);
      unit_ = arena.take<T>(n);
      a_ = arena.take<T>(n);
      near_.plan(T((double(low) - middle_) * per_unit_), T((double(high) - middle_) * per_unit_), 0, n, arena);
      sums_ = PairOutput<T>::take(n, arena);
      totals_ = arena.take<double>(pieces(n));
    } else {
      scan_.plan(n, arena);
      by_logit_.take(n, members, arena);
      for (double** array : {&slope_, &self_}) *array = arena.take<double>(scan_.slots);
      totals_ = arena.take<double>(scan_.chunks);
    }
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
        for (int k = begin; k < end; ++k) by_gain_.pairs()[k] = {falling_key<uint64_t>(gain_[k]), k};
      });
      m.sync();
      by_gain_.run(m);
    }
    if (m.leads()) {
      ideal_ = 0;
      for (int k = 0; k < n; ++k) ideal_ += gain_[list.c ? by_gain_.pairs()[k].item : k] * discount_[k];
    }
    m.sync();
    each_vector<double>(m, n, [&](int k) { store(gain_ + k, load(gain_ + k) / ideal_); });
    m.sync();
  }

  // What documents of these ranks and gains have of the measure, and its slopes by the ranks.
  static PILE_INLINE Vec<double> measure(Vec<double> rank, Vec<double> gain, Vec<double>& slope) {
    constexpr int kTerms = sizeof(T) == 4 ? 10 : Simd<double>::kLog1pTerms;  // 2e-11, which is enough for float
    const Vec<double> next = rank + 1.0, discount = 0.69314718055994530942 / vlog<double, kTerms>(next),
                      value = gain * discount;
    slope = value * discount / (next * 0.69314718055994530942);
    return value;
  }

  void run_direct(const Member& m, int n, const LabelList<T>& list, T* slope) {
    each_piece(m, n, [&](int, int begin, int end) {
      for (int k = begin; k < end; ++k) unit_[k] = near_.wide ? list.z[k] : T((double(list.z[k]) - middle_) * per_unit_);
    });
    each_vector<T>(m, n, [&](int k) {
      sums_.clear(k);
      near_.set(k, load(unit_ + k));
    });
    m.sync();
    const T per_unit = T(per_unit_);
    near_.wide ? all_pairs<T>(m, RankPairs<T, true>{{unit_, near_, per_unit}}, n, sums_, nullptr)
               : all_pairs<T>(m, RankPairs<T, false>{{unit_, near_, per_unit}}, n, sums_, nullptr);
    each_piece(m, n, [&](int p, int begin, int end) {
      for (int k = begin; k < end; ++k) rank_[k] = 1 + double(sums_.rows[k]) + double(sums_.columns[k]);
      Vec<double> total = {};
      for (int k = begin; k < end; k += kLanes<double>) {
        Vec<double> a;
        total += first_lanes<double>(end - k, measure(load(rank_ + k), load(gain_ + k), a));
        store_narrow(a_ + k, a);
      }
      totals_[p] = sum<double>(total);
    });
    each_vector<T>(m, n, [&](int k) { sums_.clear(k); });
    m.sync();
    near_.wide ? all_pairs<T>(m, SlopePairs<T, true>{{unit_, near_, per_unit}, a_}, n, sums_, nullptr)
               : all_pairs<T>(m, SlopePairs<T, false>{{unit_, near_, per_unit}, a_}, n, sums_, nullptr);
    each_vector<T>(m, n, [&](int k) { store(slope + k, sums_.value(k)); });
    if (list.curvature) all_curvature<T>(m, unit_, near_, SumOfBoth<T>{a_}, n, sums_, list.curvature, per_unit);
  }

  void run_scan(const Member& m, int n, const LabelList<T>& list, T* slope) {
    each_piece(m, n, [&](int, int begin, int end) {
      for (int k = begin; k < end; ++k) by_logit_.pairs()[k] = {falling_key<Key>(list.z[k]), k};
    });
    m.sync();
    by_logit_.run(m);
    const auto each_chunk = [&](auto visit) {
      for (int c = m.rank; c < scan_.chunks; c += m.size) {
        m.poll();
        visit(c, scan_.chunk(c).begin, scan_.chunk(c).end);
      }
    };
    const auto carry = [&] {
      m.sync();
      if (m.leads()) scan_.carry();
      m.sync();
    };
    const auto* const sorted = by_logit_.pairs();
    each_chunk([&](int c, int begin, int) {
      double ones[Scan::kChunk];
      scan_.each_document(c, [&](int slot, int rank) {
        const auto& own = sorted[smaller(rank, n - 1)];
        scan_.logits()[slot] = (double(of_falling_key<T>(own.key)) - middle_) * per_unit_;
        slope_[slot] = rank < n ? gain_[own.item] : 0;
        ones[slot - begin] = rank < n;
      });
      scan_.set(c);
      scan_.hand_on(c, ones);
    });
    carry();
    each_chunk([&](int c, int begin, int end) {
      double ones[Scan::kChunk], sigma[Scan::kChunk];
      scan_.each_document(c, [&](int slot, int rank) { ones[slot - begin] = rank < n; });
      scan_.template read<true>(c, ones, sigma, self_ + begin);
      Vec<double> total = {};
      for (int k = begin; k < end; k += kLanes<double>) {
        Vec<double> a;
        total += measure(1.0 + scan_.ranks(c, k) + load(sigma + k - begin), load(slope_ + k), a);
        store(slope_ + k, a);
      }
      totals_[c] = sum<double>(total);
      scan_.hand_on(c, slope_ + begin);
    });
    carry();
    each_chunk([&](int c, int begin, int end) {
      double others[Scan::kChunk];
      scan_.template read<false>(c, slope_ + begin, nullptr, others);
      for (int k = begin; k < end; k += kLanes<double>) store(self_ + k, load(slope_ + k) * load(self_ + k));
      scan_.each_document(c, [&](int slot, int rank) {
        if (rank >= n) return;
        slope[sorted[rank].item] = T(self_[slot] - others[slot - begin]);
        if (list.curvature) list.curvature[sorted[rank].item] = T(larger(self_[slot] + others[slot - begin], 0.0));
      });
    });
  }

  static constexpr int kLeastScan = 32, kFasterScan = 128;  // about, on two processors

  RadixSort<uint64_t> by_gain_;
  RadixSort<Key> by_logit_;
  Scan scan_;
  Exponentials<T> near_;
  PairOutput<T> sums_;
  double middle_ = 0, ideal_ = 0, per_unit_ = 1;
  double *gain_ = nullptr, *discount_ = nullptr, *rank_ = nullptr;  // by position
  double* totals_ = nullptr;
  double *slope_ = nullptr, *self_ = nullptr;  // by slot: a, Σ σ'
  T *unit_ = nullptr, *a_ = nullptr;  // u, or the logits as they are where they are wide, and a, in the logits' precision
  bool direct_ = true;
};

}  // namespace pile::PILE_ISA
