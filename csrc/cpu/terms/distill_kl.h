// D as τ² KL(softmax(s/τ) ‖ softmax(z/τ)) over the list, each document as if it were there c times.
//
// Two passes over student and target: their largest logits, then the sums of exponentials, which stay in the slope and in one
// array beside it. 2 exponentials a document; what limits long lists is memory.
#pragma once

#include "../list_sums.h"
#include "../term.h"

namespace pile::PILE_ISA {

template <class T>
class Loss<T, DistillKl> : public DistillTerm {
 public:
  // Slope: q − p.
  Found run(const Member& m, const DistillKl& term, const LossOptions&, const DistillList<T>& list, T* slope) {
    const int n = list.n;
    const T per_unit = T(1 / term.temperature);
    if (m.leads()) {
      student_.take(n, *m.arena);
      target_.take(n, *m.arena);
      sums_.take(3, n, *m.arena);
      e_ = m.arena->take<T>(n);
    }
    m.sync();
    student_.look(m, list.z, n);
    target_.look(m, list.s, n);
    m.sync();
    const T z_top = student_.top(n), s_top = target_.top(n);
    sums_.add(m, n, [&](int k, int lanes, auto& sums) {
      const Vec<T> z = (load(list.z + k) - z_top) * per_unit, s = (load(list.s + k) - s_top) * per_unit;
      Vec<T> of_z = vexp<T>(z), of_s = vexp<T>(s);
      if (list.c) {
        of_z *= load(list.c + k);
        of_s *= load(list.c + k);
      }
      store(slope + k, of_z);
      store(e_ + k, of_s);
      sums[0] += first_lanes<T>(lanes, of_z);
      sums[1] += first_lanes<T>(lanes, of_s);
      sums[2] += first_lanes<T>(lanes, of_s * (s - z));
    });
    m.sync();
    const double of_z = sums_.total(n, 0), of_s = sums_.total(n, 1), apart = sums_.total(n, 2);
    each_vector<T>(m, n, [&](int k) { store(slope + k, load(slope + k) * T(1 / of_z) - load(e_ + k) * T(1 / of_s)); });
    const double loss = apart / of_s - __builtin_log(of_s) + __builtin_log(of_z);
    return {term.temperature * term.temperature * loss, 1, 1 / term.temperature};
  }

 private:
  LargestLogit<T> student_, target_;
  ListSums<T> sums_;
  T* e_ = nullptr;
};

}  // namespace pile::PILE_ISA
