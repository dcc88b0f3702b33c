// R as −Σ_i c_i π_i log softmax(z/τ)_i over the labelled documents, π_i the share of i in the query's gain. One exponential a
// document; what limits long lists is memory. The largest logit has its place beside the sums, see distill_kl.h.
#pragma once

#include "../gains.h"
#include "../list_sums.h"
#include "../term.h"

namespace pile::PILE_ISA {

template <class T>
class Loss<T, LabelSoftmax> : public LabelTerm {
 public:
  static constexpr bool kCurvature = true;

  static bool applies(const LabelSoftmax& term, const LabelList<T>& list) { return Gains::of(list.order, term.gain()).some(); }

  // Slope: c_i π_i − (Σ_j c_j π_j) q_i.
  Found run(const Member& m, const LabelSoftmax& term, const LossOptions&, const LabelList<T>& list, T* slope) {
    const int n = list.order.labelled;
    const T per_unit = T(1 / term.temperature);
    if (m.leads()) {
      student_.take(n, *m.arena);
      sums_.take(3, n, *m.arena);
      share_ = m.arena->take<T>(n);
      const Gains gains = Gains::of(list.order, term.gain());
      double all = 0;
      const auto each_label = [&](auto visit) {
        for (int k = 0; k < n; k = list.order.below[k]) visit(k, list.order.below[k], gains(list.order.label[k]));
      };
      each_label([&](int begin, int end, double gain) { all += gain * (end - begin); });
      each_label([&](int begin, int end, double gain) {
        for (int k = begin; k < end; ++k) share_[k] = T(gain / all);
      });
    }
    m.sync();
    student_.look(m, list.z, n);
    m.sync();
    if (m.leads()) student_.find(list.z, n);
    m.sync();
    const int top = student_.position;
    sums_.add(m, n, [&](int k, int lanes, auto& sums) {
      const Vec<T> z = (load(list.z + k) - student_.value) * per_unit, e = vexp<T>(z);
      if (list.c) store(share_ + k, load(share_ + k) * load(list.c + k));
      const Vec<T> share = load(share_ + k);
      store(slope + k, e);
      sums[0] += first_lanes<T>(lanes, without<T>(top - k, e));
      sums[1] += first_lanes<T>(lanes, share);
      sums[2] += first_lanes<T>(lanes, share * z);
    });
    m.sync();
    const double rest = sums_.total(n, 0), all = 1 + rest, weight = sums_.total(n, 1);
    each_vector<T>(m, n, [&](int k) {
      const Vec<T> q = load(slope + k) * T(1 / all);
      store(slope + k, load(share_ + k) - q * T(weight));
      if (list.curvature) store(list.curvature + k, T(weight) * q * (T(1) - q));
    });
    m.sync();
    if (m.leads()) {
      slope[top] = T((double(share_[top]) * rest - (weight - double(share_[top]))) / all);
      if (list.curvature) list.curvature[top] = T(weight * rest / (all * all));
    }
    return {weight * __builtin_log1p(rest) - sums_.total(n, 2), 1, term.temperature};
  }

 private:
  LargestLogit<T> student_;
  ListSums<T> sums_;
  T* share_ = nullptr;
};

}  // namespace pile::PILE_ISA
