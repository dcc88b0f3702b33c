// Label pairs weighted by gains and ranks, Σ c_i (g_i − g_j) |d_i − d_j|, in linear time.
//
// By falling logit the discounts d fall, so |d_i − d_j| is d_i − d_j for every document j ranked below i and d_j − d_i for every
// one above: with the signs of above and below two sets of moments, weighted by 1 and by d, replace the n x n matrix. Documents
// of equal gain form a group; what group a sees of the others are their moments weighted by |g_a − g_b|, one combination of them.
//
//   deposit   each document adds (1, x, …, x^{P−1}) and d times it to its group's moments in its chunk, a part of a cell;
//   fields    other cells lie above or below as wholes: their moments, combined for each group and cell, times the tabulated
//             matrices (pile/field_table.h) make polynomials, one weighted by 1 and one by d;
//   sweep     within a cell documents pass in the order of their logits. Each reads the moments of those below less those above,
//             combined for its group, through the matrix of the cell with itself, and then steps from below to above.
//
// κ is odd and ψ is even, so the matrix of a cell with itself has κ where the powers' parities differ and ψ where they agree: one
// product of P x P gives both. Per document about P/8 · (20 + 2 G) vector operations with G groups; a pass over 25 bytes a
// document, and a scattered write. What limits it is the issue rate of the multiply-add pipes.
//
// Documents of equal logits have equal discounts and add nothing here; see Ranks::add_ties.
#pragma once

#include "field_sums.h"
#include "ranks.h"

namespace pile::PILE_ISA {

template <class T>
constexpr PairCosts kRankedCosts = sizeof(T) == 4 ? PairCosts{0.5, 30, 60} : PairCosts{1.5, 80, 250};

template <class T>
class RankedSums {
 public:
  static constexpr int kGroups = 16;

  // Whether so many groups at logits in [low, high] are better summed here than pair by pair; if so, takes its memory. One
  // member. `gain` by position.
  bool plan(const Order& order, const T* gain, const T* c, T low, T high, PairSum how, Arena& arena) {
    const int n = order.labelled;
    groups_ = 0;
    for (int k = 0; k < n;) {
      if (groups_ == kGroups) return false;
      start_[groups_] = k;
      gain_[groups_++] = double(gain[k]);
      const T own = gain[k];
      while (k < n && gain[k] == own) k = order.below[k];
    }
    middle_ = double(T(low / 2 + high / 2));
    grid_ = Grid<double>::over(double(low) - middle_, double(high) - middle_, n);
    if (direct_is_faster(how, grid_, double(n) * n / 2, n, groups_, kRankedCosts<T>)) return false;
    for (int a = 0; a < groups_; ++a)
      for (int b = 0; b < kGroups; ++b) apart_[a][b] = b < groups_ ? __builtin_fabs(gain_[a] - gain_[b]) : 0.0;
    counted_ = c != nullptr;
    sets_ = counted_ ? 4 : 2;
    u_ = arena.take<double>(n);
    group_ = arena.take<uint8_t>(n);
    // At most a chunk per cell beyond those of the longest length.
    longest_ = larger(1024, (n + 63) / 64);
    chunk_ = arena.take<Chunk>(n / longest_ + grid_.cells);
    moments_ = arena.take<Row>((int64_t(n) / longest_ + grid_.cells) * rows());
    cell_moments_ = arena.take<Row>(int64_t(grid_.cells) * rows());
    seen_ = arena.take<Row>(int64_t(grid_.cells) * groups_ * 4);
    field_ = arena.take<Field>(int64_t(grid_.cells) * groups_);
    loss_ = arena.take<double>(n / longest_ + 2 * grid_.cells);
    table_ = field_table<double, P>(0, arena);
    return true;
  }

  // λ to `lambda` by position, and second derivatives to `curvature` unless that is nullptr; result() is the sum of the losses.
  // All members.
  void run(const Member& m, int n, const Ranks<T>& ranks, const T* c, T* lambda, T* curvature) {
    each_piece(m, n, [&](int, int begin, int end) {
      for (int k = begin; k < end; ++k) {
        u_[k] = double(ranks.logit(k)) - middle_;
        int group = 0;
        for (int g = 1; g < groups_; ++g) group += ranks.position(k) >= start_[g];
        group_[k] = uint8_t(group);
      }
    });
    m.sync();
    if (m.leads()) cut(n);
    m.sync();
    for (int k = m.rank; k < chunks_; k += m.size) {
      m.poll();
      counted_ ? deposit<true>(k, ranks, c) : deposit<false>(k, ranks, c);
    }
    m.sync();
    if (m.leads()) collect();
    m.sync();
    for (int cell = m.rank; cell < grid_.cells; cell += m.size) combine(cell);
    m.sync();
    for (int cell = m.rank; cell < grid_.cells; cell += m.size) loss_[chunks_ + cell] = solve(cell);
    m.sync();
    for (int k = m.rank; k < chunks_; k += m.size) {
      m.poll();
      loss_[k] = counted_ ? sweep<true>(k, ranks, c, lambda, curvature) : sweep<false>(k, ranks, c, lambda, curvature);
    }
  }
  double result() const {
    double total = 0;
    for (int k = 0; k < chunks_ + grid_.cells; ++k) total += loss_[k];
    return total;
  }

 private:
  static constexpr int P = kPowers<T>;
  using Table = FieldTable<double, P>;
  using Row = typename Depositor<double, P>::Row;
  // Moments come as sets: weighted by 1, by d and, if documents have weights c, by c and by c d.
  enum { kOne, kDiscount };
  enum { kLow, kHigh };

  // Ranks [begin, end) of one cell.
  struct Chunk {
    int begin, end, cell;
    double signed_sums[4];  // Σ of 1, g, d, g d over the documents below less those above, as its first one sees them
  };
  // What a group sees in a cell of the others: polynomials of those of other cells. low: documents with smaller labels, which
  // count by the reader's weight; high: the others, or all of them where documents have no weights.
  struct Field {
    Row of[2][2];       // [low, high][1, d]
    double half[2][2];  // Σ of those below less above: what σ has beyond κ
  };

  int rows() const { return groups_ * sets_; }
  Row* moments(int chunk) const { return moments_ + int64_t(chunk) * rows(); }
  Row* cell_moments(int cell) const { return cell_moments_ + int64_t(cell) * rows(); }
  // [group][low, high][1, d]
  Row* seen(int cell, int group) const { return seen_ + (int64_t(cell) * groups_ + group) * 4; }
  double local(int rank, int cell) const { return (u_[rank] - grid_.origin) - (cell + 0.5) * kCell; }
  int cell_of(int rank) const {
    const double cell = (u_[rank] - grid_.origin) * (1 / kCell);
    return int(smaller(larger(cell, 0.0), grid_.cells - 0.5));
  }

  void cut(int n) {
    chunks_ = 0;
    for (int begin = 0; begin < n;) {
      const int cell = cell_of(begin);
      int end = begin + 1, beyond = n;  // the cell ends in [end, beyond]
      while (end < beyond) {
        const int middle = end + (beyond - end) / 2;
        if (cell_of(middle) == cell)
          end = middle + 1;
        else
          beyond = middle;
      }
      const int parts = (end - begin + longest_ - 1) / longest_;
      for (int k = 0; k < parts; ++k)
        chunk_[chunks_++] = {
            begin + int(int64_t(end - begin) * k / parts), begin + int(int64_t(end - begin) * (k + 1) / parts), cell, {}};
      begin = end;
    }
  }

  template <bool kCounted>
  void deposit(int k, const Ranks<T>& ranks, const T* c) {
    Chunk& chunk = chunk_[k];
    Row* to = moments(k);
    for (int r = 0; r < rows(); ++r) to[r] = Row{};
    double sums[4] = {};
    for (int t = chunk.begin; t < chunk.end; ++t) {
      const Row p = Depositor<double, P>::powers(local(t, chunk.cell));
      const double d = ranks.discount[t];
      step<kCounted>(to + group_[t] * sets_, p, d, kCounted ? double(c[ranks.position(t)]) : 1.0, 1.0);
      add(sums, gain_[group_[t]], d, 1.0);
    }
    for (int s = 0; s < 4; ++s) chunk.signed_sums[s] = sums[s];
  }
  template <bool kCounted>
  static PILE_INLINE void step(Row* to, const Row& powers, double d, double c, double times) {
    const Row p = times * powers;
    to[kOne] += p;
    to[kDiscount] += d * p;
    if (!kCounted) return;
    to[2 + kOne] += c * p;
    to[2 + kDiscount] += c * d * p;
  }
  static PILE_INLINE void add(double (&sums)[4], double gain, double d, double times) {
    sums[0] += times;
    sums[1] += times * gain;
    sums[2] += times * d;
    sums[3] += times * (gain * d);
  }

  // The cells' moments, and in place of each chunk's what its first document sees: its cell's below less above. One member.
  void collect() {
    for (int64_t r = 0; r < int64_t(grid_.cells) * rows(); ++r) cell_moments_[r] = Row{};
    double all[4] = {};
    for (int k = 0; k < chunks_; ++k) {
      Row* cell = cell_moments(chunk_[k].cell);
      for (int r = 0; r < rows(); ++r) cell[r] += moments(k)[r];
      for (int s = 0; s < 4; ++s) all[s] += chunk_[k].signed_sums[s];
    }
    for (int k = 0, cell = -1; k < chunks_; ++k) {
      for (int s = 0; s < 4; ++s) {
        const double own = chunk_[k].signed_sums[s];
        chunk_[k].signed_sums[s] = all[s];
        all[s] -= 2 * own;
      }
      Row* to = moments(k);
      for (int r = 0; r < rows(); ++r) {
        const Row own = to[r];
        to[r] = chunk_[k].cell == cell ? next_[r] : cell_moments(chunk_[k].cell)[r];
        next_[r] = to[r] - 2.0 * own;
      }
      cell = chunk_[k].cell;
    }
  }

  // What each group sees of a cell's moments.
  void combine(int cell) {
    const Row* of = cell_moments(cell);
    for (int a = 0; a < groups_; ++a) {
      Row* to = seen(cell, a);
      for (int k = 0; k < 4; ++k) to[k] = Row{};
      for (int b = 0; b < groups_; ++b) {
        const int side = b > a && counted_ ? 0 : 2, from = b * sets_ + (b < a && counted_ ? 2 : 0);
        to[side + kOne] += apart_[a][b] * of[from + kOne];
        to[side + kDiscount] += apart_[a][b] * of[from + kDiscount];
      }
    }
  }

  // The fields of all groups in a cell; returns the losses of its documents with those of the cells below it.
  double solve(int cell) {
    const int from = larger(0, cell + table_->first), to = smaller(grid_.cells - 1, cell + table_->first + Table::kEntries - 1);
    double loss = 0;
    for (int a = 0; a < groups_; ++a) {
      Field& field = field_[int64_t(cell) * groups_ + a];
      field = Field{};
      for (int set = 0; set < 2; ++set) {
        for (int side = counted_ ? 0 : 1; side < 2; ++side) {
          Row kappa[2] = {}, psi[2] = {};  // two chains of additions each
          double half = 0, saturated = 0;
          Far below;  // of saturated cells
          for (int s = 0; s < grid_.cells; ++s) {
            if (s == cell) continue;
            const Row& of = seen(s, a)[2 * side + set];
            const double sign = s < cell ? 1 : -1;
            half += sign * of[0];
            if (s < from || s > to) {
              saturated -= of[0] / 2;
              if (s < cell) below.add(of, s);
              continue;
            }
            const int entry = s - cell - table_->first + 1;
#pragma GCC unroll 16
            for (int k = 0; k < P; ++k) kappa[k % 2] += (sign * of[k]) * Row::at(table_->kappa[k][entry]);
            if (s > cell) continue;
#pragma GCC unroll 16
            for (int k = 0; k < P; ++k) psi[k % 2] += of[k] * Row::at(table_->psi[k][entry]);
          }
          Row kappas = kappa[0] + kappa[1];
          kappas.set(0, kappas[0] + saturated);
          field.of[side][set] = kappas;
          field.half[side][set] = half;
          // A pair counts (d_i − d_j): the sources' set 1 meets the own set d, and the other way round with a minus.
          const Row& own = cell_moments(cell)[a * sets_ + (side == kLow ? 2 : 0) + 1 - set];
          loss += (set == kOne ? 1 : -1) * (dot(own, psi[0] + psi[1]) + below.times(own, cell));
        }
      }
    }
    return loss;
  }
  // Σ |v| / 2 over pairs with documents far below.
  struct Far {
    double weight = 0, place = 0;
    void add(const Row& moments, int cell) {
      weight += moments[0];
      place += kCell * cell * moments[0] + moments[1];
    }
    double times(const Row& own, int cell) const { return ((kCell * cell * own[0] + own[1]) * weight - own[0] * place) / 2; }
  };

  static PILE_INLINE double dot(const Row& a, const Row& b) { return sum(a * b); }

  // (0, 1, 2 x, …, (P − 1) x^{P−2}).
  static PILE_INLINE Row slopes_of_powers(Row p) {
    Row slopes = {};
    for (int k = 1; k < P; ++k) slopes.set(k, k * p[k - 1]);
    return slopes;
  }

  template <bool kCounted>
  double sweep(int k, const Ranks<T>& ranks, const T* c, T* lambda, T* curvature) const {
    Row odd, even;
    for (int p = 0; p < P; ++p) {
      odd.set(p, p & 1);
      even.set(p, !(p & 1));
    }
    Row self[P];  // of the cell with itself: κ where parities differ, else ψ
    for (int p = 0; p < P; ++p) {
      const Row kappa = Row::at(table_->kappa[p][-table_->first + 1]), psi = Row::at(table_->psi[p][-table_->first + 1]);
      self[p] = p & 1 ? kappa * even + psi * odd : kappa * odd + psi * even;
    }
    const Chunk& chunk = chunk_[k];
    const Field* fields = field_ + int64_t(chunk.cell) * groups_;
    Row state[kGroups * 4];
    for (int r = 0; r < rows(); ++r) state[r] = moments(k)[r];
    double sums[4];
    for (int s = 0; s < 4; ++s) sums[s] = chunk.signed_sums[s];
    double loss = 0;
    for (int t = chunk.begin; t < chunk.end; ++t) {
      const int a = group_[t], position = ranks.position(t);
      const double d = ranks.discount[t], weight = kCounted ? double(c[position]) : 1.0;
      const Row p = Depositor<double, P>::powers(local(t, chunk.cell));
      const Field& field = fields[a];
      Row all, far;
      double half;
      if (kCounted) {
        Row low[2] = {}, high[2] = {};
        for (int b = 0; b < a; ++b)
          for (int set = 0; set < 2; ++set) high[set] += apart_[a][b] * state[b * 4 + 2 + set];
        for (int b = a + 1; b < groups_; ++b)
          for (int set = 0; set < 2; ++set) low[set] += apart_[a][b] * state[b * 4 + set];
        const Row lower = weight * (d * low[0] - low[1]), higher = d * high[0] - high[1];
        all = lower + higher;
        far = weight * (d * field.of[kLow][0] - field.of[kLow][1]) + (d * field.of[kHigh][0] - field.of[kHigh][1]);
        half = (lower[0] + weight * (d * field.half[kLow][0] - field.half[kLow][1]) - higher[0] -
                (d * field.half[kHigh][0] - field.half[kHigh][1])) /
               2;
      } else {
        Row ones = {}, discounts = {};
        for (int b = 0; b < groups_; ++b) {
          ones += apart_[a][b] * state[b * 2];
          discounts += apart_[a][b] * state[b * 2 + 1];
        }
        all = d * ones - discounts;
        far = d * field.of[kHigh][0] - field.of[kHigh][1];
        half = (gain_[a] * d * sums[0] - d * sums[1] - gain_[a] * sums[2] + sums[3]) / 2;
      }
      Row of_even = {}, of_odd = {};
#pragma GCC unroll 16
      for (int q = 0; q < P; q += 2) {
        of_even += all[q] * self[q];
        of_odd += all[q + 1] * self[q + 1];
      }
      const Row odd_p = odd * p, even_p = even * p;
      lambda[position] = T(half + sum(of_even * odd_p + of_odd * even_p + far * p));
      if (curvature) {
        const Row kappa = of_even * odd + of_odd * even;
        curvature[position] = T(larger(-dot(kappa + far, slopes_of_powers(p)), 0.0));
      }
      loss += sum(of_even * even_p + of_odd * odd_p) / 2 - u_[t] * half;
      step<kCounted>(state + a * sets_, p, d, weight, -2.0);
      if (!kCounted) add(sums, gain_[a], d, -2.0);
    }
    return loss;
  }

  Grid<double> grid_;
  double middle_ = 0;
  int groups_ = 0, sets_ = 2, chunks_ = 0, longest_ = 0;
  bool counted_ = false;
  int start_[kGroups];  // first position
  double gain_[kGroups], apart_[kGroups][kGroups];
  Row next_[kGroups * 4];
  double *u_ = nullptr, *loss_ = nullptr;
  uint8_t* group_ = nullptr;
  Chunk* chunk_ = nullptr;
  Row *moments_ = nullptr, *cell_moments_ = nullptr, *seen_ = nullptr;
  Field* field_ = nullptr;
  const Table* table_ = nullptr;
};

}  // namespace pile::PILE_ISA
