// The student's loss of one query with its gradient: label pairs (R), distillation pairs (D), each by the direct or the
// linear-time sum. All members of a team call the same methods on one shared object; the leader plans, all compute.
#pragma once

#include <new>

#include "field_sums.h"

namespace pile {
namespace PILE_ISA {

// Float logits are summed with degree 8 tables, double ones with degree 16.
template <class T>
constexpr int kPowers = sizeof(T) == 4 ? 8 : 16;

template <class T>
PILE_INLINE void find_range(const T* u, int n, T& low, T& high) {
  constexpr int W = kLanes<T>;
  Vec<T> lows = splat<T>(u[0]), highs = lows;
  int k = 0;
  for (; k + W <= n; k += W) {
    lows = vmin(load(u + k), lows);
    highs = vmax(load(u + k), highs);
  }
  low = lows[0];
  high = highs[0];
  for (int l = 1; l < W; ++l) {
    low = smaller(low, T(lows[l]));
    high = larger(high, T(highs[l]));
  }
  for (; k < n; ++k) {
    low = smaller(low, u[k]);
    high = larger(high, u[k]);
  }
}

// Which sum is faster. Costs in nanoseconds, fitted to the crossovers measured in docs/performance.md: a pair, a document, and what
// one cell does to another. A cost model, not a length: the number of cells and of label groups differs from query to query.
struct PairCosts {
  double pair, document, product;
};
template <class T>
PILE_INLINE bool direct_is_faster(PairSum how, const Grid<T>& grid, double pairs, int n, double blocks, PairCosts cost) {
  if (grid.cells == 0 || how == PairSum::direct) return true;
  if (how == PairSum::chebyshev) return false;
  return pairs * cost.pair < n * cost.document + blocks * grid.cells * grid.cells * cost.product;
}

template <class T>
constexpr PairCosts kLabelCosts = sizeof(T) == 4 ? PairCosts{0.15, 1, 22} : PairCosts{0.53, 35, 40};
template <class T>
constexpr PairCosts kDistillCosts = sizeof(T) == 4 ? PairCosts{0.264, 1, 3} : PairCosts{0.79, 8, 10};

// The label pairs at logits u: λ, and the sum of their losses.
template <class T>
class LabelLoss {
 public:
  using Fields = FieldSums<double, kPowers<T>>;
  using Table = FieldTable<double, kPowers<T>>;

  void plan(const Order& order, const PairWeights<T>& weights, double offset, PairSum how) {
    order_ = &order;
    weights_ = &weights;
    offset_ = offset;
    how_ = how;
  }

  // λ to lambda[0, labelled) (nullptr: not wanted). Returns Σ_P ω softplus(offset − (u_i − u_j)) to every member.
  double run(const Member& m, const T* u, T* lambda) {
    const int n = order_->labelled;
    if (m.leads()) {
      mark_ = m.arena->mark();
      prepare(u, n, *m.arena);
    }
    m.sync();
    for (int p = m.rank; p < pieces(n); p += m.size) {
      const int end = smaller(n, (p + 1) * kPiece);
      for (int k = p * kPiece; exponentials_ && k < end; k += kLanes<T>) {
        sums_.clear(k);
        near_.set(k, load(u + k));
      }
      if (!direct_)
        for (int k = p * kPiece; k < end; ++k) wide_u_[k] = double(u[k]);
    }
    m.sync();
    if (direct_) {
      dispatch(u, [&](auto pairs) { all_pairs<T>(m, pairs, n, sums_, totals_); });
      if (m.leads()) result_ = pair_total(totals_, n);
      for (int p = m.rank; lambda && p < pieces(n); p += m.size) {
        const int end = smaller(n, (p + 1) * kPiece);
        for (int k = p * kPiece; k < end; k += kLanes<T>) store(lambda + k, sums_.value(k));
      }
    } else {
      for (int c = m.rank; c < fields_.chunks; c += m.size) {
        m.poll();
        fields_.deposit(c, wide_u_);
      }
      m.sync();
      if (m.leads()) {
        fields_.collect();
        result_ = fields_.softplus_of_labels(*plus_);
      }
      m.sync();
      for (int b = m.rank; b < fields_.blocks; b += m.size) {
        fields_.solve(b, *plus_, *minus_);
        totals_[b] = 0;
        const auto& block = fields_.block[b];
        if (block.inner) {
          dispatch(u, [&](auto pairs) {
            pair_block<T>(pairs, block.begin, block.end, block.begin, block.end, sums_);
            totals_[b] = pairs.total;
          });
        }
      }
      m.sync();
      if (m.leads())
        for (int b = 0; b < fields_.blocks; ++b) result_ += totals_[b];
      for (int c = m.rank; lambda && c < fields_.chunks; c += m.size) {
        const int b = fields_.chunk_block(c), end = fields_.chunk_end(c);
        const bool inner = fields_.block[b].inner;
        for (int k = fields_.chunk_begin(c); k < end; k += kLanes<double>) {
          const Vec<double> field = fields_.evaluate(b, load(wide_u_ + k), k);
          if (!inner && k + kLanes<double> <= end) {
            store_narrow(lambda + k, field);
            continue;
          }
          for (int l = k; l < smaller(k + kLanes<double>, end); ++l)
            lambda[l] = T(field[l - k]) + (inner ? sums_.rows[l] - sums_.columns[l] : T(0));
        }
      }
    }
    m.sync();
    const double result = result_;
    m.sync();
    if (m.leads()) m.arena->release(mark_);
    return result;
  }

 private:
  void prepare(const T* u, int n, Arena& arena) {
    T low, high;
    find_range(u, n, low, high);
    const auto grid = Grid<double>::over(low, high, n);
    const double groups_at_most = larger(1.0, double(n) / Fields::least_block(grid.cells) * 2);
    direct_ =
        direct_is_faster(how_, grid, double(n) * n / 2, n, smaller(groups_at_most, double(count_groups(n))), kLabelCosts<T>);
    bool inner = false;
    if (direct_) {
      totals_ = arena.take<double>(kPairTotals);
    } else {
      wide_u_ = arena.take<double>(n);
      const double* gain = nullptr;
      if (weights_->gain) {
        double* wide = arena.take<double>(n);
        for (int k = 0; k < n; ++k) wide[k] = double(weights_->gain[k]);
        gain = wide;
      }
      fields_ = Fields();
      fields_.plan(grid, n, order_->below, gain, arena);
      totals_ = arena.take<double>(fields_.blocks);
      plus_ = table(offset_, arena);
      minus_ = offset_ == 0 ? plus_ : table(-offset_, arena);
      for (int b = 0; b < fields_.blocks; ++b) inner |= fields_.block[b].inner;
    }
    exponentials_ = direct_ || inner;
    if (!exponentials_) return;
    near_.plan(low, high, T(offset_), n, arena);
    sums_ = PairOutput<T>::take(n, arena);
  }
  int count_groups(int n) const {
    int groups = 0;
    for (int k = 0; k < n && groups < 64; k = order_->below[k]) ++groups;
    return groups < 64 ? groups : n;
  }
  static const Table* table(double offset, Arena& arena) {
    if (offset == 0) {
      static const Table centred(0);
      return &centred;
    }
    return new (arena.take<Table>(1)) Table(offset);
  }
  template <class F>
  void dispatch(const T* u, F run) const {
    if (weights_->gain)
      near_.wide ? run(pairs<true, true>(u)) : run(pairs<true, false>(u));
    else
      near_.wide ? run(pairs<false, true>(u)) : run(pairs<false, false>(u));
  }
  template <bool kWeighted, bool kWide>
  LabelPairs<T, kWeighted, kWide, true> pairs(const T* u) const {
    return {u, near_, weights_->gain, order_->below};
  }

  const Order* order_ = nullptr;
  const PairWeights<T>* weights_ = nullptr;
  double offset_ = 0;
  PairSum how_ = PairSum::auto_;
  bool direct_ = true, exponentials_ = true;
  Exponentials<T> near_;
  Fields fields_;
  const Table *plus_ = nullptr, *minus_ = nullptr;
  double *wide_u_ = nullptr, *totals_ = nullptr;
  PairOutput<T> sums_;
  double result_ = 0;
  Arena::Mark mark_ = {};
};

// The distillation pairs of logits z against targets s, in units of the temperature: `per_unit` is its inverse. Divided is only what
// has been subtracted: large logits lose their differences when they are divided first.
template <class T>
class DistillLoss {
 public:
  using Fields = FieldSums<double, kPowers<T>>;
  using Table = FieldTable<double, kPowers<T>>;

  // Σ_j σ((z_i − z_j)/τ) − σ((s_i − s_j)/τ) to slope[0, n). Returns the sum of the pairs' cross entropies to every member.
  double run(const Member& m, const T* z, const T* s, int n, double per_unit, PairSum how, T* slope) {
    if (m.leads()) {
      mark_ = m.arena->mark();
      prepare(z, s, n, per_unit, how, *m.arena);
    }
    m.sync();
    for (int p = m.rank; p < pieces(n); p += m.size) {
      const int end = smaller(n, (p + 1) * kPiece);
      if (direct_) {
        for (int k = p * kPiece; k < end; k += kLanes<T>) {
          sums_.clear(k);
          if (wide()) continue;
          const Vec<T> unit_z = (load(z + k) - T(middle_z_)) * T(per_unit), unit_s = (load(s + k) - T(middle_s_)) * T(per_unit);
          store(unit_z_ + k, unit_z);
          store(unit_s_ + k, unit_s);
          near_z_.set(k, unit_z);
          near_s_.set(k, unit_s);
        }
      } else {
        for (int k = p * kPiece; k < end; ++k) {
          wide_z_[k] = (double(z[k]) - middle_z_) * per_unit;
          wide_s_[k] = (double(s[k]) - middle_s_) * per_unit;
        }
      }
    }
    m.sync();
    if (direct_) {
      if (wide())
        all_pairs<T>(m, DistillPairs<T, true>{z, nullptr, nullptr, s, nullptr, nullptr, T(per_unit)}, n, sums_, totals_);
      else
        all_pairs<T>(m, DistillPairs<T, false>{unit_z_, near_z_.up, near_z_.down, unit_s_, near_s_.up, near_s_.down, 1}, n,
                     sums_, totals_);
      if (m.leads()) result_ = pair_total(totals_, n);
      for (int p = m.rank; p < pieces(n); p += m.size) {
        const int end = smaller(n, (p + 1) * kPiece);
        for (int k = p * kPiece; k < end; k += kLanes<T>) store(slope + k, sums_.value(k));
      }
    } else {
      static const Table table(0);
      for (int c = m.rank; c < of_z_.chunks; c += m.size) {
        m.poll();
        of_z_.deposit(c, wide_z_);
      }
      for (int c = m.rank; c < of_s_.chunks; c += m.size) {
        m.poll();
        of_s_.deposit(c, wide_s_);
      }
      m.sync();
      if (m.rank == 0) {
        of_z_.collect();
        of_z_.solve_self(table);
      }
      if (m.rank == m.size - 1) {
        of_s_.collect();
        of_s_.solve_self(table);
      }
      m.sync();
      // log 2cosh(dz/2) − (σ(ds) − 1/2) dz per pair; the second term sums to −Σ_i z_i Σ_j κ(s_j − s_i), z about its middle.
      for (int c = m.rank; c < pieces(n); c += m.size) {
        const int end = smaller(n, (c + 1) * kPiece);
        double cross = 0;
        for (int k = c * kPiece; k < end; k += kLanes<double>) {
          const Vec<double> of_z = of_z_.evaluate(0, load(wide_z_ + k), k), of_s = of_s_.evaluate(0, load(wide_s_ + k), k);
          for (int l = 0; l < smaller(kLanes<double>, end - k); ++l) {
            slope[k + l] = T(of_s[l] - of_z[l]);
            cross += wide_z_[k + l] * of_s[l];
          }
        }
        totals_[c] = cross;
      }
      m.sync();
      if (m.leads()) {
        result_ = of_z_.psi_of_self(table);
        for (int c = 0; c < pieces(n); ++c) result_ += totals_[c];
      }
    }
    m.sync();
    const double result = result_;
    m.sync();
    if (m.leads()) m.arena->release(mark_);
    return result;
  }

 private:
  // The logits about their middles, in units of the temperature.
  void prepare(const T* z, const T* s, int n, double per_unit, PairSum how, Arena& arena) {
    T low_z, high_z, low_s, high_s;
    find_range(z, n, low_z, high_z);
    find_range(s, n, low_s, high_s);
    middle_z_ = double(T(low_z / 2 + high_z / 2));
    middle_s_ = double(T(low_s / 2 + high_s / 2));
    const auto in_units = [&](T logit, double middle) { return T((double(logit) - middle) * per_unit); };
    low_z = in_units(low_z, middle_z_);
    high_z = in_units(high_z, middle_z_);
    low_s = in_units(low_s, middle_s_);
    high_s = in_units(high_s, middle_s_);
    const auto grid_z = Grid<double>::over(low_z, high_z, n), grid_s = Grid<double>::over(low_s, high_s, n);
    const auto& larger_grid = grid_z.cells == 0 || grid_z.cells > grid_s.cells ? grid_z : grid_s;
    direct_ = grid_s.cells == 0 || direct_is_faster(how, larger_grid, double(n) * n / 2, n, 2, kDistillCosts<T>);
    if (direct_) {
      near_z_.plan(low_z, high_z, 0, n, arena);
      near_s_.plan(low_s, high_s, 0, n, arena);
      if (!wide()) {
        unit_z_ = arena.take<T>(n);
        unit_s_ = arena.take<T>(n);
      }
      sums_ = PairOutput<T>::take(n, arena);
      totals_ = arena.take<double>(kPairTotals);
      return;
    }
    wide_z_ = arena.take<double>(n);
    wide_s_ = arena.take<double>(n);
    totals_ = arena.take<double>(pieces(n));
    of_z_ = Fields();
    of_s_ = Fields();
    of_z_.plan(grid_z, n, nullptr, nullptr, arena);
    of_s_.plan(grid_s, n, nullptr, nullptr, arena);
  }

  bool wide() const { return near_z_.wide || near_s_.wide; }

  bool direct_ = true;
  Exponentials<T> near_z_, near_s_;
  T *unit_z_ = nullptr, *unit_s_ = nullptr;  // about their middles, in units of the temperature
  Fields of_z_, of_s_;
  double *wide_z_ = nullptr, *wide_s_ = nullptr, *totals_ = nullptr;
  PairOutput<T> sums_;
  double middle_z_ = 0, middle_s_ = 0, result_ = 0;
  Arena::Mark mark_ = {};
};

// Σ_{i<j} ((z_i − z_j) − (s_i − s_j))² = n Σ (d_i − mean)², d = z − s. Slope: its derivative.
// `partial`: room for two numbers per piece.
template <class T>
double square_loss(const Member& m, const T* z, const T* s, int n, double* partial, T* slope) {
  constexpr int W = kLanes<double>;
  for (int p = m.rank; p < pieces(n); p += m.size) {
    Vec<double> sums = {};
    for (int k = p * kPiece; k < smaller(n, (p + 1) * kPiece); k += W)
      sums += first_lanes<double>(n - k, as_double(z + k) - as_double(s + k));
    partial[2 * p] = sum<double>(sums);
  }
  m.sync();
  double mean = 0;
  for (int p = 0; p < pieces(n); ++p) mean += partial[2 * p];
  mean /= n;
  for (int p = m.rank; p < pieces(n); p += m.size) {
    Vec<double> squares = {};
    for (int k = p * kPiece; k < smaller(n, (p + 1) * kPiece); k += W) {
      const Vec<double> d = first_lanes<double>(n - k, as_double(z + k) - as_double(s + k) - mean);
      squares += d * d;
      store_narrow(slope + k, 2.0 * n * d);
    }
    partial[2 * p + 1] = sum<double>(squares);
  }
  m.sync();
  double result = 0;
  for (int p = 0; p < pieces(n); ++p) result += partial[2 * p + 1];
  return n * result;
}

}  // namespace PILE_ISA
}  // namespace pile
