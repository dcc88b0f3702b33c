// Second derivatives of pair losses, each by one logit alone: Σ_j ω_ij σ'(u_i − u_j), directly. Boosted trees ask for them, so
// they are a pass of their own over the pairs.
#pragma once

#include "pair_sums.h"

namespace pile::PILE_ISA {

// e^{−|x|} of a pair's difference x, in logits u.
template <class T, bool kWide>
struct SigmoidPairs {
  static constexpr int kRows = 2;
  const T* u;
  Exponentials<T> near;
  double total = 0;

  struct Row {
    Vec<T> u, up, down;
  };
  PILE_INLINE int first(int i) const { return i + 1; }
  PILE_INLINE Row row(int i) const {
    Row r = {};
    r.u = splat<T>(u[i]);
    if (!kWide) {
      r.up = splat<T>(near.up[i]);
      r.down = splat<T>(near.down[i]);
    }
    return r;
  }
  PILE_INLINE Vec<T> small(const Row& r, int j, Vec<T>& x) const {
    x = r.u - load(u + j);
    return kWide ? vexp<T>(-vabs<T>(x)) : vmin(r.up * load(near.down + j), r.down * load(near.up + j));
  }
  PILE_INLINE void flush() {}
};

// What a pair's σ' is weighed by: of Row i and column j. first(i): the row's first column.
template <class T>
struct WeightOfBoth {  // c_i c_j, or 1
  const T* c;
  PILE_INLINE int first(int i) const { return i + 1; }
  PILE_INLINE Vec<T> operator()(int i, int j) const { return c ? c[i] * load(c + j) : splat<T>(1); }
};
template <class T>
struct SumOfBoth {  // a_i + a_j
  const T* a;
  PILE_INLINE int first(int i) const { return i + 1; }
  PILE_INLINE Vec<T> operator()(int i, int j) const { return a[i] + load(a + j); }
};
template <class T>
struct WeightOfPreferred {  // c_i (g_i − g_j) |d_i − d_j|, without what is nullptr
  const int* below;
  const T *gain, *discount, *c;
  PILE_INLINE int first(int i) const { return below[i]; }
  PILE_INLINE Vec<T> operator()(int i, int j) const {
    Vec<T> weight = splat<T>(c ? c[i] : T(1));
    if (gain) weight *= gain[i] - load(gain + j);
    if (discount) weight *= vabs<T>(discount[i] - load(discount + j));
    return weight;
  }
};

template <class T, bool kWide, class Weight>
struct CurvaturePairs : SigmoidPairs<T, kWide> {
  Weight weight;
  struct Row : SigmoidPairs<T, kWide>::Row {
    int i;
  };
  PILE_INLINE int first(int i) const { return weight.first(i); }
  PILE_INLINE Row row(int i) const { return {SigmoidPairs<T, kWide>::row(i), i}; }
  template <bool kMasked>
  PILE_INLINE Vec<T> pair(const Row& r, int j, Ints<T> mask) const {
    Vec<T> x;
    const Vec<T> t = this->small(r, j, x), q = reciprocal<T>(T(1) + t), value = weight(r.i, j) * (t * q * q);
    return kMasked ? (mask ? value : Vec<T>{}) : value;
  }
};

// run(the pairs of that weight).
template <class T, class Weight, class Run>
void with_curvature(const T* u, const Exponentials<T>& near, Weight weight, Run run) {
  if (near.wide)
    run(CurvaturePairs<T, true, Weight>{{u, near}, weight});
  else
    run(CurvaturePairs<T, false, Weight>{{u, near}, weight});
}

// The sums over all pairs of [0, n) to `curvature`, by the whole team. `out` is scratch.
template <class T, class Weight>
void all_curvature(const Member& m, const T* u, const Exponentials<T>& near, Weight weight, int n, PairOutput<T> out,
                   T* curvature) {
  m.sync();
  each_vector<T>(m, n, [&](int k) { out.clear(k); });
  m.sync();
  with_curvature(u, near, weight, [&](auto pairs) { all_pairs<T>(m, pairs, n, out, nullptr); });
  each_vector<T>(m, n, [&](int k) { store(curvature + k, out.sum(k)); });
}

}  // namespace pile::PILE_ISA
