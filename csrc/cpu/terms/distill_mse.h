// D as the mean over pairs of c_i c_j ((z_i − z_j) − (s_i − s_j))²: Σ_{i<j} is C Σ c_i (d_i − mean d)², d = z − s, C = Σ c_i.
#pragma once

#include "../term.h"

namespace pile::PILE_ISA {

template <class T>
class Loss<T, DistillMse> : public DistillTerm {
 public:
  static constexpr bool kCurvature = true;

  Found run(const Member& m, const DistillMse&, const LossOptions&, const DistillList<T>& list, T* slope) {
    const int n = list.n;
    const T *z = list.z, *s = list.s;
    const auto weight = [&](int k) { return first_lanes<double>(n - k, list.c ? as_double(list.c + k) : splat<double>(1)); };
    if (m.leads()) sums_ = m.arena->take<double>(3 * pieces(n));
    m.sync();
    each_piece(m, n, [&](int p, int begin, int end) {
      Vec<double> sums = {}, weights = {};
      for (int k = begin; k < end; k += kLanes<double>) {
        sums += weight(k) * first_lanes<double>(n - k, as_double(z + k) - as_double(s + k));
        weights += weight(k);
      }
      sums_[3 * p] = sum<double>(sums);
      sums_[3 * p + 1] = sum<double>(weights);
    });
    m.sync();
    const double all = total(n, 1), mean = total(n, 0) / all;
    each_piece(m, n, [&](int p, int begin, int end) {
      Vec<double> squares = {};
      for (int k = begin; k < end; k += kLanes<double>) {
        const Vec<double> d = first_lanes<double>(n - k, as_double(z + k) - as_double(s + k) - mean), c = weight(k);
        squares += c * d * d;
        store_narrow(slope + k, 2.0 * all * c * d);
        if (list.curvature) store_narrow(list.curvature + k, 2.0 * c * (all - c));
      }
      sums_[3 * p + 2] = sum<double>(squares);
    });
    m.sync();
    return {all * total(n, 2), double(n) * (n - 1) / 2};
  }

 private:
  double total(int n, int which) const {
    double total = 0;
    for (int p = 0; p < pieces(n); ++p) total += sums_[3 * p + which];
    return total;
  }

  double* sums_ = nullptr;  // by piece: of c d, of c, of squares
};

}  // namespace pile::PILE_ISA
