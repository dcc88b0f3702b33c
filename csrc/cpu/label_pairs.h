// The label pairs of one query: their weights, the sums over them in either way, and their loss with its gradient.
#pragma once

#include <type_traits>

#include "curvature.h"
#include "field_sums.h"

namespace pile::PILE_ISA {

// The pairs' weights: ω_ij = gain_i − gain_j, or 1 where gain is nullptr.
template <class T>
struct PairWeights {
  const T* gain = nullptr;  // by position, about the middle of the query's gains
  T* inverse = nullptr;     // 1 / k_i, 0 where a document has no pair
  double total = 0;         // K = Σ ω over P
};

template <class T>
PairWeights<T> pair_weights(const Order& order, PairWeight kind, Arena& arena) {
  PairWeights<T> w;
  const int n = order.labelled;
  T* gain = kind == PairWeight::none ? nullptr : arena.take<T>(n);
  w.inverse = arena.take<T>(n);
  // Relative to the largest label, so that none is too large: a common factor of the weights divides out everywhere.
  const double highest = n ? order.label[0] : 0, lowest = n ? order.label[n - 1] : 0, half_range = highest / 2 - lowest / 2;
  auto value = [&](int k) {
    return kind == PairWeight::gain_gap ? __builtin_exp2(order.label[k] - highest)
           : half_range > 0             ? (order.label[k] / 2 - lowest / 2) / half_range
                                        : 0.0;
  };
  const double middle = gain && n ? (value(0) + value(n - 1)) / 2 : 0;
  double all = 0;
  if (gain) {
    for (int k = 0; k < n; k = order.below[k]) {
      const T g = T(value(k) - middle);
      for (int i = k; i < order.below[k]; ++i) gain[i] = g;
      all += double(g) * (order.below[k] - k);
    }
  }
  double above = 0;  // Σ gain before this label
  for (int k = 0; k < n;) {
    const int end = order.below[k];
    double up = k, down = n - end;
    if (gain) {
      const double own = double(gain[k]) * (end - k);
      up = above - k * double(gain[k]);
      down = (n - end) * double(gain[k]) - (all - above - own);
      above += own;
    }
    const double total = up + down;
    for (int i = k; i < end; ++i) w.inverse[i] = total > 0 ? T(1 / total) : T(0);
    w.total += down * (end - k);
    k = end;
  }
  w.gain = gain;
  return w;
}

// How the label pairs are summed at logits in [low, high]: directly, or by fields of type F, with direct sums inside blocks of
// several labels.
template <class T, class F>
struct LabelSums {
  using Fields = FieldSums<F, kPowers<T>>;

  bool direct = true, paired = true;  // paired: some pairs are summed directly
  Fields fields;
  Fields counted;  // the same with the documents' weights, if they have any
  Exponentials<T> near;
  PairOutput<T> sums;

  // `c`: the documents' weights, of which a pair counts the preferred one's, or nullptr; `wide_c`: room for them, to be filled
  // where the sums are not direct.
  void plan(const Order& order, const PairWeights<T>& weights, T low, T high, T offset, PairSum how, PairCosts cost,
            Arena& arena, const T* c = nullptr, F** wide_c = nullptr) {
    const int n = order.labelled;
    gain_ = weights.gain;
    c_ = c;
    below_ = order.below;
    const auto grid = Grid<F>::over(low, high, n);
    int labels = 0;
    for (int k = 0; k < n && labels < 64; k = order.below[k]) ++labels;
    const double blocks_at_most = larger(1.0, double(n) / Fields::least_block(grid.cells) * 2);
    direct = direct_is_faster(how, grid, double(n) * n / 2, n, smaller(blocks_at_most, double(labels < 64 ? labels : n)), cost);
    paired = direct;
    if (!direct) {
      F* gain = gain_ ? arena.take<F>(n) : nullptr;
      for (int k = 0; gain && k < n; ++k) gain[k] = F(gain_[k]);
      fields = Fields();
      fields.plan(grid, n, order.below, gain, arena);
      if (c) {
        *wide_c = arena.take<F>(n);
        counted = Fields();
        counted.plan(grid, n, order.below, gain, arena, *wide_c);
      }
      for (int b = 0; b < fields.blocks; ++b) paired |= fields.block[b].inner;
    }
    if (!paired) return;
    near.plan(low, high, offset, n, arena);
    sums = PairOutput<T>::take(n, arena);
  }

  // run(the pairs at logits u, in their form).
  template <bool kLoss, class Run>
  void with_pairs(const T* u, Run run) const {
    if constexpr (kLoss) {
      if (c_) return run_pairs<kLoss, true>(u, run);
    }
    run_pairs<kLoss, false>(u, run);
  }

 private:
  template <bool kLoss, bool kCounted, class Run>
  void run_pairs(const T* u, Run run) const {
    const auto run_as = [&](auto weighted, auto wide) {
      run(LabelPairs<T, weighted(), wide(), kLoss, kCounted>{u, near, gain_, below_, c_});
    };
    const auto by_width = [&](auto weighted) { near.wide ? run_as(weighted, yes) : run_as(weighted, no); };
    gain_ ? by_width(yes) : by_width(no);
  }
  static constexpr std::true_type yes = {};
  static constexpr std::false_type no = {};
  const T *gain_ = nullptr, *c_ = nullptr;
  const int* below_ = nullptr;
};

template <class T>
constexpr PairCosts kLabelCosts = sizeof(T) == 4 ? PairCosts{0.15, 1, 22} : PairCosts{0.53, 35, 40};

// The label pairs at logits u: λ, and the sum of their losses. All members call run() on one shared object.
template <class T>
class LabelPairLoss {
 public:
  using Table = FieldTable<double, kPowers<T>>;

  void plan(const Order& order, const PairWeights<T>& weights, double offset, PairSum how, const T* c = nullptr) {
    order_ = &order;
    weights_ = &weights;
    c_ = c;
    offset_ = offset;
    how_ = how;
  }

  // λ to lambda[0, labelled) (nullptr: not wanted). Returns Σ_P c_i ω softplus(offset − (u_i − u_j)) to every member. What it
  // takes from the leader's arena is the caller's to give back.
  double run(const Member& m, const T* u, T* lambda) {
    const int n = order_->labelled;
    if (m.leads()) prepare(u, n, *m.arena);
    m.sync();
    each_vector<T>(m, way_.paired ? n : 0, [&](int k) {
      way_.sums.clear(k);
      way_.near.set(k, load(u + k));
    });
    each_piece(m, way_.direct ? 0 : n, [&](int, int begin, int end) {
      for (int k = begin; k < end; ++k) double_u_[k] = double(u[k]);
      for (int k = begin; c_ && k < end; ++k) wide_c_[k] = double(c_[k]);
    });
    m.sync();
    way_.direct ? run_direct(m, u, n, lambda) : run_fields(m, u, lambda);
    m.sync();
    return result_;
  }

  // After run() at the same logits and no offset: the second derivatives.
  void curve(const Member& m, const T* u, T* curvature) {
    const int n = order_->labelled;
    const WeightOfPreferred<T> weight = {order_->below, weights_->gain, nullptr, c_};
    if (way_.direct) return all_curvature<T>(m, u, way_.near, weight, n, way_.sums, curvature);
    auto &fields = way_.fields, &counted = way_.counted;
    m.sync();
    each_vector<T>(m, way_.paired ? n : 0, [&](int k) { way_.sums.clear(k); });
    if (m.leads()) {  // what lies above was overwritten
      fields.collect();
      if (c_) counted.collect();
    }
    m.sync();
    for (int b = m.rank; b < fields.blocks; b += m.size) {
      fields.solve_slope(b, *plus_, 1, c_ ? 0 : 1);
      if (c_) counted.solve_slope(b, *plus_, 0, 1);
      const auto& block = fields.block[b];
      if (block.inner)
        with_curvature(u, way_.near, weight,
                       [&](auto pairs) { rectangle<T>(pairs, block.begin, block.end, block.begin, block.end, way_.sums); });
    }
    m.sync();
    for (int c = m.rank; c < fields.chunks; c += m.size) {
      const int b = fields.chunk[c].block, end = fields.chunk[c].end;
      for (int k = fields.chunk[c].begin; k < end; k += kLanes<double>) {
        Vec<double> field = fields.evaluate(b, load(double_u_ + k), k);
        if (c_) field = load(wide_c_ + k) * field + counted.evaluate(b, load(double_u_ + k), k);
        for (int l = k; l < smaller(k + kLanes<double>, end); ++l)
          curvature[l] =
              T(larger(field[l - k], 0.0)) + (fields.block[b].inner ? way_.sums.rows[l] + way_.sums.columns[l] : T(0));
      }
    }
    m.sync();
  }

 private:
  void prepare(const T* u, int n, Arena& arena) {
    T low, high;
    find_range(u, n, low, high);
    way_.plan(*order_, *weights_, low, high, T(offset_), how_, kLabelCosts<T>, arena, c_, &wide_c_);
    totals_ = arena.take<double>(way_.direct ? kPairTotals : way_.fields.blocks);
    if (way_.direct) return;
    double_u_ = arena.take<double>(n);
    plus_ = field_table<double, kPowers<T>>(offset_, arena);
    minus_ = field_table<double, kPowers<T>>(-offset_, arena);
  }

  void run_direct(const Member& m, const T* u, int n, T* lambda) {
    way_.template with_pairs<true>(u, [&](auto pairs) { all_pairs<T>(m, pairs, n, way_.sums, totals_); });
    if (m.leads()) result_ = pair_total(totals_, n);
    each_vector<T>(m, lambda ? n : 0, [&](int k) { store(lambda + k, way_.sums.value(k)); });
  }

  void run_fields(const Member& m, const T* u, T* lambda) {
    auto &fields = way_.fields, &counted = way_.counted;
    for (int c = m.rank; c < fields.chunks; c += m.size) {
      m.poll();
      fields.deposit(c, double_u_);
      if (c_) counted.deposit(c, double_u_);
    }
    m.sync();
    if (m.leads()) {
      fields.collect();
      if (c_) counted.collect();
      result_ = (c_ ? counted : fields).softplus_of_labels(*plus_, fields);
    }
    m.sync();
    for (int b = m.rank; b < fields.blocks; b += m.size) {
      // With weights: what lies below counts c_i, by the document that reads the field, what lies above its own.
      fields.solve(b, *plus_, *minus_, 1, c_ ? 0 : 1);
      if (c_) counted.solve(b, *plus_, *minus_, 0, 1);
      totals_[b] = 0;
      const auto& block = fields.block[b];
      if (block.inner) {
        way_.template with_pairs<true>(u, [&](auto pairs) {
          rectangle<T>(pairs, block.begin, block.end, block.begin, block.end, way_.sums);
          totals_[b] = pairs.total;
        });
      }
    }
    m.sync();
    if (m.leads())
      for (int b = 0; b < fields.blocks; ++b) result_ += totals_[b];
    for (int c = m.rank; lambda && c < fields.chunks; c += m.size) {
      const int b = fields.chunk[c].block, end = fields.chunk[c].end;
      const bool inner = fields.block[b].inner;
      for (int k = fields.chunk[c].begin; k < end; k += kLanes<double>) {
        Vec<double> field = fields.evaluate(b, load(double_u_ + k), k);
        if (c_) field = load(wide_c_ + k) * field + counted.evaluate(b, load(double_u_ + k), k);
        if (!inner && k + kLanes<double> <= end) {
          store_narrow(lambda + k, field);
          continue;
        }
        for (int l = k; l < smaller(k + kLanes<double>, end); ++l)
          lambda[l] = T(field[l - k]) + (inner ? way_.sums.rows[l] - way_.sums.columns[l] : T(0));
      }
    }
  }

  const Order* order_ = nullptr;
  const PairWeights<T>* weights_ = nullptr;
  const T* c_ = nullptr;
  double* wide_c_ = nullptr;
  double offset_ = 0;
  PairSum how_ = PairSum::auto_;
  LabelSums<T, double> way_;
  const Table *plus_ = nullptr, *minus_ = nullptr;
  double *double_u_ = nullptr, *totals_ = nullptr;
  double result_ = 0;
};

}  // namespace pile::PILE_ISA
