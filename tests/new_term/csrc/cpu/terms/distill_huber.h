// D as Σ_{i<j} c_i c_j huber((z_i − z_j) − (s_i − s_j)), by one member, pair by pair.
#pragma once

#include "../term.h"

namespace pile::PILE_ISA {

template <class T>
class Loss<T, DistillHuber> : public DistillTerm {
 public:
  static constexpr bool kCurvature = true;

  Found run(const Member& m, const DistillHuber& term, const LossOptions&, const DistillList<T>& list, T* slope) {
    if (m.leads()) sum_ = sum(term.delta, list, slope);
    m.sync();
    const double sum = sum_;
    m.sync();
    return {sum, double(list.n) * (list.n - 1) / 2};
  }

 private:
  static double sum(double delta, const DistillList<T>& list, T* slope) {
    double total = 0;
    for (int i = 0; i < list.n; ++i) {
      double pull = 0, bend = 0;
      for (int j = 0; j < list.n; ++j) {
        const double d = (double(list.z[i]) - list.z[j]) - (double(list.s[i]) - list.s[j]), size = d < 0 ? -d : d;
        const bool inside = size <= delta;
        const double weight = list.c ? double(list.c[i]) * double(list.c[j]) : 1.0;
        total += weight * (inside ? d * d / 4 : delta * (size - delta / 2) / 2);
        pull += weight * (inside ? d : d < 0 ? -delta : delta);
        bend += i != j && inside ? weight : 0.0;
      }
      slope[i] = T(pull);
      if (list.curvature) list.curvature[i] = T(bend);
    }
    return total;
  }

  double sum_ = 0;
};

}  // namespace pile::PILE_ISA
