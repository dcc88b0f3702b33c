// D as τ² KL(softmax(s/τ) ‖ softmax(z/τ)) over the list, each document as if it were there c times.
//
// Two passes over student and target: their largest logits, then the sums of exponentials, which stay in the slope and in one
// array beside it. 2 exponentials a document; what limits long lists is memory.
//
// The sums leave out the document of the largest logit, whose exponential is 1: where it has nearly all of the probability, what
// is left for the others must not be lost.
#pragma once

#include "../list_sums.h"
#include "../term.h"

namespace pile::PILE_ISA {

template <class T>
class Loss<T, DistillKl> : public DistillTerm {
 public:
  static constexpr bool kCurvature = true;

  // Slope: q − p.
  Found run(const Member& m, const DistillKl& term, const LossOptions& options, const DistillList<T>& list, T* slope) {
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
    if (m.leads()) {
      student_.find(list.z, n);
      target_.find(list.s, n);
      const double widest = larger(student_.range, target_.range) / term.temperature;
      in_double_.take(widest < InDouble<T, DistillKl>::kClose, list, *m.arena);
    }
    m.sync();
    if (in_double_.wanted()) return in_double_.run(m, term, options, list, slope);
    sums_.add(m, n, [&](int k, int lanes, auto& sums) {
      const Vec<T> z = (load(list.z + k) - student_.value) * per_unit, s = (load(list.s + k) - target_.value) * per_unit;
      Vec<T> of_z = vexp<T>(z), of_s = vexp<T>(s);
      if (list.c) {
        of_z *= load(list.c + k);
        of_s *= load(list.c + k);
      }
      store(slope + k, of_z);
      store(e_ + k, of_s);
      sums[0] += first_lanes<T>(lanes, without<T>(student_.position - k, of_z));
      sums[1] += first_lanes<T>(lanes, without<T>(target_.position - k, of_s));
      sums[2] += first_lanes<T>(lanes, of_s * (s - z));
    });
    m.sync();
    const int top = student_.position;
    const double rest_z = sums_.total(n, 0), rest_s = sums_.total(n, 1), apart = sums_.total(n, 2);
    const double top_z = double(slope[top]), top_s = double(e_[target_.position]), of_z = rest_z + top_z, of_s = rest_s + top_s;
    m.sync();
    each_vector<T>(m, n, [&](int k) {
      const Vec<T> q = load(slope + k) * T(1 / of_z);
      store(slope + k, q - load(e_ + k) * T(1 / of_s));
      if (list.curvature) store(list.curvature + k, q * (T(1) - q) * (per_unit * per_unit));
    });
    m.sync();
    if (m.leads() && top == target_.position) slope[top] = T(rest_s / of_s - rest_z / of_z);
    if (m.leads() && list.curvature) list.curvature[top] = T(top_z / of_z * (rest_z / of_z)) * (per_unit * per_unit);
    const double loss = apart / of_s - __builtin_log(of_s) + __builtin_log(of_z);
    return {term.temperature * term.temperature * loss, 1, 1 / term.temperature};
  }

 private:
  LargestLogit<T> student_, target_;
  ListSums<T> sums_;
  InDouble<T, DistillKl> in_double_;
  T* e_ = nullptr;
};

}  // namespace pile::PILE_ISA
