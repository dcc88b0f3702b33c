// D as the mean over pairs of ((z_i − z_j) − (s_i − s_j))²: Σ_{i<j} is n Σ (d_i − mean d)², d = z − s.
#pragma once

#include "../term.h"

namespace pile::PILE_ISA {

template <class T>
class Loss<T, DistillMse> : public DistillTerm {
 public:
  Found run(const Member& m, const DistillMse&, const LossOptions&, const DistillList<T>& list, T* slope) {
    const int n = list.n;
    const T *z = list.z, *s = list.s;
    if (m.leads()) sums_ = m.arena->take<double>(2 * pieces(n));
    m.sync();
    each_piece(m, n, [&](int p, int begin, int end) {
      Vec<double> sums = {};
      for (int k = begin; k < end; k += kLanes<double>) sums += first_lanes<double>(n - k, as_double(z + k) - as_double(s + k));
      sums_[2 * p] = sum<double>(sums);
    });
    m.sync();
    const double mean = total(n, 0) / n;
    each_piece(m, n, [&](int p, int begin, int end) {
      Vec<double> squares = {};
      for (int k = begin; k < end; k += kLanes<double>) {
        const Vec<double> d = first_lanes<double>(n - k, as_double(z + k) - as_double(s + k) - mean);
        squares += d * d;
        store_narrow(slope + k, 2.0 * n * d);
      }
      sums_[2 * p + 1] = sum<double>(squares);
    });
    m.sync();
    return {n * total(n, 1), double(n) * (n - 1) / 2};
  }

 private:
  double total(int n, int which) const {
    double total = 0;
    for (int p = 0; p < pieces(n); ++p) total += sums_[2 * p + which];
    return total;
  }

  double* sums_ = nullptr;  // by piece: of d, of squares
};

}  // namespace pile::PILE_ISA
