// D as the mean over pairs of c_i c_j BCE(σ((z_i − z_j)/τ), σ((s_i − s_j)/τ)), pairs directly or by fields.
//
// Divided by the temperature is only what has been subtracted: large logits lose their differences when they are divided first.
#pragma once

#include "../curvature.h"
#include "../field_sums.h"
#include "../term.h"

namespace pile::PILE_ISA {

// Σ_j c_i c_j (σ(z_i − z_j) − σ(s_i − s_j)) over all pairs, logits in units of the temperature, and the sum of their cross entropies
// BCE = log(1 + e^{−|dz|}) + |dz| · (what σ(ds) puts on the side that the sign of dz rules out): no cancellation.
template <class T, bool kWide, bool kWeighted>
struct DistillPairs {
  static constexpr int kRows = 2;
  const T *z, *z_up, *z_down, *s, *s_up, *s_down, *c;
  T per_unit;  // kWide: what the differences of z and of s are multiplied by; else they are in units already
  double total = 0;
  Vec<T> loss = {};

  struct Row {
    Vec<T> z, z_up, z_down, s, s_up, s_down, c;
  };
  PILE_INLINE int first(int i) const { return i + 1; }
  PILE_INLINE Row row(int i) const {
    Row r;
    r.z = splat<T>(z[i]);
    r.s = splat<T>(s[i]);
    if (kWeighted) r.c = splat<T>(c[i]);
    if (!kWide) {
      r.z_up = splat<T>(z_up[i]);
      r.z_down = splat<T>(z_down[i]);
      r.s_up = splat<T>(s_up[i]);
      r.s_down = splat<T>(s_down[i]);
    }
    return r;
  }
  template <bool kMasked>
  PILE_INLINE Vec<T> pair(const Row& r, int j, Ints<T> mask) {
    const Vec<T> z_gap = r.z - load(z + j), s_gap = r.s - load(s + j);
    const Vec<T> dz = kWide ? z_gap * per_unit : z_gap, ds = kWide ? s_gap * per_unit : s_gap;
    const Vec<T> tz = kWide ? vexp<T>(-vabs<T>(dz)) : vmin(r.z_up * load(z_down + j), r.z_down * load(z_up + j));
    const Vec<T> ts = kWide ? vexp<T>(-vabs<T>(ds)) : vmin(r.s_up * load(s_down + j), r.s_down * load(s_up + j));
    const Vec<T> qz = reciprocal<T>(T(1) + tz), qs = reciprocal<T>(T(1) + ts);
    const Vec<T> pz = dz > T(0) ? qz : tz * qz;
    const Vec<T> ps = ds > T(0) ? qs : ts * qs;
    const Vec<T> wrong = (dz > T(0)) == (ds > T(0)) ? ts * qs : qs;
    Vec<T> slope = pz - ps;
    Vec<T> value = vlog1p<T>(tz) + vabs<T>(dz) * wrong;
    if (kWeighted) {
      const Vec<T> both = r.c * load(c + j);
      slope *= both;
      value *= both;
    }
    if (kMasked) slope = mask ? slope : Vec<T>{};
    loss += kMasked ? (mask ? value : Vec<T>{}) : value;
    return slope;
  }
  PILE_INLINE void flush() {
    total += double(sum<T>(loss));
    loss = Vec<T>{};
  }
};

template <class T>
constexpr PairCosts kDistillCosts = sizeof(T) == 4 ? PairCosts{0.264, 1, 3} : PairCosts{0.79, 8, 10};

// Student or target about the middle of its range, in units of the temperature.
template <class T>
struct DistillSide {
  T low, high;
  double middle;
  Grid<double> grid;
  Exponentials<T> near;  // of direct sums
  T* unit = nullptr;
  FieldSums<double, kPowers<T>> fields;
  double* u = nullptr;

  void find(const T* logits, int n, double per_unit) {
    find_range(logits, n, low, high);
    middle = double(T(low / 2 + high / 2));
    low = T((double(low) - middle) * per_unit);
    high = T((double(high) - middle) * per_unit);
    grid = Grid<double>::over(low, high, n);
  }
  void plan_fields(int n, const double* weights, Arena& arena) {
    u = arena.take<double>(n);
    fields = {};
    fields.plan(grid, n, nullptr, nullptr, arena, weights);
  }
  PILE_INLINE void set(int k, const T* logits, T per_unit) {
    const Vec<T> own = (load(logits + k) - T(middle)) * per_unit;
    store(unit + k, own);
    near.set(k, own);
  }
  PILE_INLINE void set(int begin, int end, const T* logits, double per_unit) const {
    const double from = middle;
    for (int k = begin; k < end; ++k) u[k] = (double(logits[k]) - from) * per_unit;
  }
  void deposit(const Member& m) {
    for (int c = m.rank; c < fields.chunks; c += m.size) {
      m.poll();
      fields.deposit(c, u);
    }
  }
  void solve(const FieldTable<double, kPowers<T>>& table) {
    fields.collect();
    fields.solve_self(table);
  }
};

template <class T>
class Loss<T, DistillLogistic> : public DistillTerm {
 public:
  static constexpr bool kCurvature = true;

  // Slope: Σ_j c_i c_j (σ((z_i − z_j)/τ) − σ((s_i − s_j)/τ)).
  Found run(const Member& m, const DistillLogistic& term, const LossOptions& options, const DistillList<T>& list, T* slope) {
    const double per_unit = 1 / term.temperature;
    if (m.leads()) plan(list, per_unit, options.pairwise, *m.arena);
    m.sync();
    if (in_double_.wanted()) {
      LossOptions direct = options;
      direct.pairwise = PairSum::direct;
      return in_double_.run(m, term, direct, list, slope);
    }
    direct_ ? run_direct(m, list, T(per_unit), slope) : run_fields(m, list, per_unit, slope);
    m.sync();
    return {result_, double(list.n) * (list.n - 1) / 2, term.temperature};
  }

 private:
  void plan(const DistillList<T>& list, double per_unit, PairSum how, Arena& arena) {
    const int n = list.n;
    z_.find(list.z, n, per_unit);
    s_.find(list.s, n, per_unit);
    const auto& larger_grid = z_.grid.cells == 0 || z_.grid.cells > s_.grid.cells ? z_.grid : s_.grid;
    direct_ = s_.grid.cells == 0 || direct_is_faster(how, larger_grid, double(n) * n / 2, n, 2, kDistillCosts<T>);
    constexpr double kClose = InDouble<T, DistillLogistic>::kClose;
    const bool close = direct_ && z_.high - z_.low < kClose && s_.high - s_.low < kClose;
    if (in_double_.take(close, list, arena)) return;
    wide_c_ = list.c && !direct_ ? arena.take<double>(n) : nullptr;
    totals_ = arena.take<double>(direct_ ? kPairTotals : pieces(n));
    if (!direct_) {
      z_.plan_fields(n, wide_c_, arena);
      s_.plan_fields(n, wide_c_, arena);
      return;
    }
    z_.near.plan(z_.low, z_.high, 0, n, arena);
    s_.near.plan(s_.low, s_.high, 0, n, arena);
    wide_ = z_.near.wide || s_.near.wide;
    if (!wide_) {
      z_.unit = arena.take<T>(n);
      s_.unit = arena.take<T>(n);
    }
    sums_ = PairOutput<T>::take(n, arena);
  }

  void run_direct(const Member& m, const DistillList<T>& list, T per_unit, T* slope) {
    const int n = list.n;
    each_vector<T>(m, n, [&](int k) {
      sums_.clear(k);
      if (wide_) return;
      z_.set(k, list.z, per_unit);
      s_.set(k, list.s, per_unit);
    });
    m.sync();
    list.c ? run_pairs<true>(m, list, per_unit) : run_pairs<false>(m, list, per_unit);
    if (m.leads()) result_ = pair_total(totals_, n);
    each_vector<T>(m, n, [&](int k) { store(slope + k, sums_.value(k)); });
    if (list.curvature) curve(m, list, per_unit);
  }

  template <bool kWeighted>
  void run_pairs(const Member& m, const DistillList<T>& list, T per_unit) {
    const DistillSide<T>&z = z_, &s = s_;
    if (wide_)
      all_pairs<T>(m, DistillPairs<T, true, kWeighted>{list.z, nullptr, nullptr, list.s, nullptr, nullptr, list.c, per_unit},
                   list.n, sums_, totals_);
    else
      all_pairs<T>(m,
                   DistillPairs<T, false, kWeighted>{z.unit, z.near.up, z.near.down, s.unit, s.near.up, s.near.down, list.c, 1},
                   list.n, sums_, totals_);
  }

  void curve(const Member& m, const DistillList<T>& list, T per_unit) {
    const int n = list.n;
    if (m.leads() && wide_) {  // then the logits are not in units yet
      z_.unit = m.arena->take<T>(n);
      z_.near.wide = true;
    }
    m.sync();
    each_vector<T>(m, wide_ ? n : 0, [&](int k) { z_.set(k, list.z, per_unit); });
    all_curvature<T>(m, z_.unit, z_.near, WeightOfBoth<T>{list.c}, n, sums_, list.curvature);
  }

  void run_fields(const Member& m, const DistillList<T>& list, double per_unit, T* slope) {
    each_piece(m, list.n, [&](int, int begin, int end) {
      z_.set(begin, end, list.z, per_unit);
      s_.set(begin, end, list.s, per_unit);
      for (int k = begin; list.c && k < end; ++k) wide_c_[k] = double(list.c[k]);
    });
    m.sync();
    const auto& table = *field_table<double, kPowers<T>>(0, *m.arena);
    z_.deposit(m);
    s_.deposit(m);
    m.sync();
    if (m.rank == 0) z_.solve(table);
    if (m.rank == m.size - 1) s_.solve(table);
    m.sync();
    // log 2cosh(dz/2) − (σ(ds) − 1/2) dz per pair; the second term sums to −Σ_i z_i Σ_j κ(s_j − s_i), z about its middle.
    for (int p = m.rank; p < pieces(list.n); p += m.size) {
      const int end = smaller(list.n, (p + 1) * kPiece);
      double cross = 0;
      for (int k = p * kPiece; k < end; k += kLanes<double>) {
        const Vec<double> of_z = z_.fields.evaluate(0, load(z_.u + k), k), of_s = s_.fields.evaluate(0, load(s_.u + k), k);
        for (int l = 0; l < smaller(kLanes<double>, end - k); ++l) {
          const double c = list.c ? wide_c_[k + l] : 1.0;
          slope[k + l] = T(c * (of_s[l] - of_z[l]));
          cross += c * z_.u[k + l] * of_s[l];
        }
      }
      totals_[p] = cross;
    }
    m.sync();
    if (list.curvature) {
      if (m.leads()) z_.fields.solve_slope_of_self(table);
      m.sync();
      each_piece(m, list.n, [&](int, int begin, int end) {
        for (int k = begin; k < end; k += kLanes<double>) {
          const Vec<double> c = list.c ? load(wide_c_ + k) : splat<double>(1);
          const Vec<double> others = z_.fields.evaluate(0, load(z_.u + k), k) - c / 4.0;  // but itself
          store_narrow(list.curvature + k, c * vmax(others, Vec<double>{}));
        }
      });
    }
    if (!m.leads()) return;
    result_ = z_.fields.psi_of_self(table, list.n);
    for (int p = 0; p < pieces(list.n); ++p) result_ += totals_[p];
  }

  DistillSide<T> z_, s_;
  bool direct_ = true, wide_ = false;
  double* wide_c_ = nullptr;  // the documents' weights for fields, or nullptr
  InDouble<T, DistillLogistic> in_double_;
  PairOutput<T> sums_;
  double *totals_ = nullptr, result_ = 0;
};

}  // namespace pile::PILE_ISA
