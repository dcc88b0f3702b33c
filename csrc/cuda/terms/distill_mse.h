// D as Σ_{i<j} c_i c_j ((z_i − z_j) − (s_i − s_j))² = Σ c · Σ c_i (d_i − mean d)², d = z − s and its mean weighted by c: a pass
// over the documents, nothing over pairs.
#pragma once

#include "../terms.h"

namespace pile::gpu {

template <>
struct Loss<DistillMse> : DistillTerm {
  template <class List>
  PILE_DEVICE static void add(DistillMse, const List& list, float scale) {
    const double all = list.facts.target_weight, mean = list.mean_difference();
    list.each([&](int k) {
      const float s = list.scaled_target(k);
      if (!is_number(s)) return;
      const double d = double(list.scaled_student(k)) - double(s) - mean;
      const double weight = all * list.weight_of(k);
      list.add(k, scale * float(2 * weight * d), scale * float(weight * d * d));
    });
  }
};

}  // namespace pile::gpu
