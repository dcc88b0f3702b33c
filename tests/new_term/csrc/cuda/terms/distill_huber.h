// D as Σ_{i<j} huber((z_i − z_j) − (s_i − s_j)), tile by tile.
#pragma once

#include "../terms.h"

namespace pile::gpu {

template <>
struct Loss<DistillHuber> : DistillTerm {
  template <class List>
  PILE_DEVICE static void add(const DistillHuber& term, const List& list, float scale) {
    const float delta = float(term.delta);
    const Tile tile = list.tile;
    list.tiles(
        [&](int j, int to) {
          tile.student[to] = j < list.columns ? list.scaled_student(j) : 0.0f;
          tile.target[to] = j < list.columns ? list.scaled_target(j) : not_a_number();
          tile.student_more[to] = j < list.columns ? list.weight_of(j) : 0.0f;
        },
        [&](int from, int to) {
          const Tile columns = tile.from(from);
          list.rows(list.begin, list.end, [&](int k) {
            const float z = list.scaled_student(k), s = list.scaled_target(k);
            if (!is_number(s)) return;
            SlopeAndLoss sums;
            for (int j = from + list.lanes.rank; j < to; j += kLanes) {
              if (!is_number(columns.target[j])) continue;
              const float d = (z - columns.student[j]) - (s - columns.target[j]), size = fabsf(d);
              const float weight = columns.student_more[j];
              sums.slope += weight * fminf(fmaxf(d, -delta), delta);
              sums.loss += weight * (size <= delta ? d * d / 4 : delta * (size - delta / 2) / 2);
            }
            list.add_row(k, scale * list.weight_of(k), sums);
          });
        });
  }
};

}  // namespace pile::gpu
