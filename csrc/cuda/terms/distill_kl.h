// D as τ² KL(softmax(s/τ) ‖ softmax(z/τ)) over the documents with a target, one of weight c as if it were there c times.
//
// With p and q the two distributions: Σ p τ² ((s − z)/τ − log Z_s + log Z_z), slope_i = τ (q_i − p_i). Two sums over the list
// first, then a pass over the documents: 2 exponentials and some 10 float instructions each time, nothing over pairs. Short
// lists add them up in one block, long ones in a launch of their own. Reading the list limits it.
#pragma once

#include "../terms.h"

namespace pile::gpu {

template <>
struct Loss<DistillKl> : DistillTerm {
  static float unit(const DistillKl& term) { return float(1 / term.temperature); }
  PILE_DEVICE static double size(const DistillKl&, const LossFacts& of) { return of.targets > 1 ? 1 : 0; }

  // A document's c e^z and c e^s, from the highest.
  template <class List>
  struct Parts {
    static constexpr int kSums = 2;
    static constexpr bool kByLabel = false;
    const List& list;
    PILE_DEVICE float operator()(int which, int k) const {
      const float s = list.scaled_target(k);
      return is_number(s) ? list.weight_of(k) * expf(which ? s : list.scaled_student(k)) : 0.0f;
    }
  };
  template <class List>
  PILE_DEVICE static Parts<List> parts(const DistillKl&, const List& list) {
    return {list};
  }

  template <class List>
  PILE_DEVICE static void add(const DistillKl& term, const List& list, float scale) {
    const Parts<List> of{list};
    const double of_student = list.sum(of, 0), of_target = list.sum(of, 1);
    const float per_student = float(1 / of_student), per_target = float(1 / of_target);
    const float apart = float(log(of_student / of_target)), unit = float(term.temperature);
    list.each([&](int k) {
      const float s = list.scaled_target(k);
      if (!is_number(s)) return;
      const float p = of(1, k) * per_target, q = of(0, k) * per_student;
      list.add(k, scale * unit * (q - p), scale * (unit * unit) * p * ((s - list.scaled_student(k)) + apart));
    });
  }

  static int64_t words(const LongState& state) { return 2 * 2 * state.pieces; }
  template <class Run>
  static void launch(const Run& run, const DistillKl& term) {
    run.pieces(sum_pieces<LongState, DistillKl>, PieceMemory::kBytes, term);
  }
};

}  // namespace pile::gpu
