// D as Σ_{i<j} ((z_i − z_j) − (s_i − s_j))² = n Σ (d_i − mean d)², d = z − s: a pass over the documents, nothing over pairs.
#pragma once

#include "../terms.h"

namespace pile::gpu {

template <>
struct Loss<DistillMse> : DistillTerm {
  template <class List>
  PILE_DEVICE static void add(DistillMse, const List& list, float scale) {
    const double n = list.facts.targets, mean = list.mean_difference();
    list.each([&](int k) {
      const float s = list.scaled_target(k);
      if (!is_number(s)) return;
      const double d = double(list.scaled_student(k)) - double(s) - mean;
      list.add(k, scale * float(2 * n * d), scale * float(n * d * d));
    });
  }
};

}  // namespace pile::gpu
