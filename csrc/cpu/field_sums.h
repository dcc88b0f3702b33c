// Pair sums in linear time ("chebyshev"): documents act on each other through the cells they lie in (pile/field_table.h).
//
// Positions [0, n), by falling label, are cut into blocks. A document meets the documents of every other block through fields:
//
//   deposit    each document adds w · (1, x, …, x^{P−1}) to the moments of its block and cell, w = 1 and its gain;
//   solve      per block, the moments of the blocks below and above are combined and multiplied, cell by cell, with the
//              tabulated P x P matrices: the field, a polynomial per cell;
//   evaluate   each document reads its block's field at its own x by Horner's rule.
//
// A block is one label group, or a run of groups too small to be worth a field each; pairs inside such a run are summed
// directly. So the cost is O(n (P + block) + blocks · (cells · P)²) for any number of distinct labels, graded or all different.
// The weights ω_ij = gain_i − gain_j need no G x G matrix either: they split into a field of counts and one of gains.
//
// Instructions: deposit about 12 per document (its P powers are one vector), or with AVX-512 and few cells 15 + (P + 1) cells
// per vector of documents (moments.h); evaluate 2 P per vector while the cells' coefficients fit two registers (a register
// shuffle looks them up), else P loads for each document. Only cells in which documents lie are solved for. Sums are taken
// chunk by chunk, the chunks cut by n alone, and added in order: the bits do not depend on the number of threads.
#pragma once

#include "field_table.h"
#include "moments.h"

namespace pile::PILE_ISA {

// Float logits are summed with degree 8 tables, double ones with degree 16.
template <class T>
constexpr int kPowers = sizeof(T) == 4 ? 8 : 16;

template <class T, int P>
class FieldSums {
 public:
  using Row = typename Depositor<T, P>::Row;
  using Table = FieldTable<T, P>;

  // A run of positions. `inner`: it holds several labels, whose pairs are summed directly.
  struct Block {
    int begin, end;
    bool inner;
    CellRange filled;  // no document lies in a cell outside it; after collect()
  };

  // What one member deposits: a part of a block, with moments of its own.
  struct Chunk {
    int block, begin, end;
    int64_t moments;  // its first row in moments_
    CellRange filled;
  };

  int blocks = 0, chunks = 0;
  Block* block = nullptr;
  Chunk* chunk = nullptr;
  Grid<T> grid;
  bool weighted = false;

  // Smallest block worth a field: its own direct sums then cost about as much.
  static int least_block(int cells) { return larger(96, 2 * cells * P); }

  // `below` == nullptr: one block, every document meets every other one (and itself). `weights`: of the documents as those that
  // others meet; nullptr: 1 each.
  void plan(Grid<T> cells, int n, const int* below, const T* gain, Arena& arena, const T* weights = nullptr) {
    depositor_ = {cells, gain, weights};
    grid = cells;
    weighted = gain != nullptr;
    const int least = least_block(grid.cells);
    block = arena.take<Block>(n / least * 2 + 3);
    if (!below) {
      block[blocks++] = {0, n, false, {}};
    } else {
      Block open = {0, 0, false, {}};
      auto close = [&] {
        if (open.end > open.begin) block[blocks++] = open;
        open = {open.end, open.end, false, {}};
      };
      for (int k = 0; k < n; k = below[k]) {
        if (below[k] - k >= least) close();
        open.inner = open.end > open.begin;
        open.end = below[k];
        if (open.end - open.begin >= least) close();
      }
      close();
    }
    // Chunks: at most about 64 per query beyond one per block, and long enough to be worth their moments.
    const int longest = larger(larger(1024, 8 * grid.cells), (n + 63) / 64);
    int count = 0;
    for (int b = 0; b < blocks; ++b) count += (block[b].end - block[b].begin + longest - 1) / longest;
    chunk = arena.take<Chunk>(count);
    for (int b = 0; b < blocks; ++b) {
      const int size = block[b].end - block[b].begin, parts = (size + longest - 1) / longest;
      for (int c = 0; c < parts; ++c) {
        chunk[chunks++] = {
            b, block[b].begin + int(int64_t(size) * c / parts), block[b].begin + int(int64_t(size) * (c + 1) / parts), 0, {}};
      }
    }
    row_ = grid.cells * (weighted ? 2 : 1);
    int64_t rows = 0;
    for (int c = 0; c < chunks; ++c) {
      chunk[c].moments = rows;
      rows += copies(c) * row_;
    }
    moments_ = arena.take<Row>(rows);
    block_moments_ = arena.take<Row>(int64_t(blocks) * row_);
    // Coefficients by power, the cells of one power side by side, padded for look-ups in one register or two.
    stride_ = grid.cells <= kLanes<T> ? kLanes<T> : round_up(grid.cells, 2 * kLanes<T>);
    field_ = arena.take<T>(int64_t(blocks) * (weighted ? 2 : 1) * P * stride_);
    // At most the whole query twice: what lies below, what lies above.
    low_ = arena.take<Row>(int64_t(blocks) * row_);
    high_ = arena.take<Row>(int64_t(blocks) * row_);
  }

  // Add all documents of chunk c at logits u[].
  void deposit(int c, const T* u) {
    clear(c);
    deposit(c, chunk[c].begin, chunk[c].end, u);
  }
  void clear(int c) {
    for (int k = 0; k < copies(c) * row_; ++k) moments(c)[k] = Row{};
    chunk[c].filled = depositor_.none();
  }
  // Add the documents [begin, end) of chunk c at logits u[] to its moments.
  void deposit(int c, int begin, int end, const T* u) {
    chunk[c].filled.include(depositor_.add(moments(c), copies(c) > 1 ? row_ : 0, begin, end, u));
  }

  // Sum the moments over each block, and over the blocks below and above it. One member.
  void collect() {
    for (int64_t k = 0; k < int64_t(blocks) * row_; ++k) block_moments_[k] = Row{};
    filled_ = depositor_.none();
    for (int b = 0; b < blocks; ++b) block[b].filled = depositor_.none();
    for (int c = 0; c < chunks; ++c) {
      block[chunk[c].block].filled.include(chunk[c].filled);
      filled_.include(chunk[c].filled);
      Row* to = block_moments_ + int64_t(chunk[c].block) * row_;
      for (int copy = 0; copy < copies(c); ++copy)
        for (int k = 0; k < row_; ++k) to[k] += moments(c)[copy * row_ + k];
    }
    for (int k = 0; k < row_; ++k) low_[int64_t(blocks - 1) * row_ + k] = high_[k] = Row{};
    for (int b = 1; b < blocks; ++b) {
      const int64_t up = int64_t(b) * row_, down = int64_t(blocks - 1 - b) * row_;
      for (int k = 0; k < row_; ++k) {
        high_[up + k] = high_[up - row_ + k] + block_moments_[up - row_ + k];
        low_[down + k] = low_[down + row_ + k] + block_moments_[down + row_ + k];
      }
    }
  }

  // Field of block b for the label pairs, Σ_below ω σ(offset − (u − u_j)) − Σ_above ω σ(offset − (u_j − u)), by σ = 1/2 + κ and
  // κ odd. Counts: Σ_below κ(offset + u_j − u) + Σ_above κ(u_j − u − offset); where gains give ω its sign, minus.
  // `of_low`, `of_high`: what the two sides count.
  void solve(int b, const Table& plus, const Table& minus, T of_low = 1, T of_high = 1) {
    const T sign = weighted ? -of_high : of_high;
    for (int w = 0; w < (weighted ? 2 : 1); ++w) {
      const Row* low = low_ + int64_t(b) * row_ + w * grid.cells;
      const Row* high = high_ + int64_t(b) * row_ + w * grid.cells;
      const double half = (double(of_low) * count(low, grid.cells) - double(sign) * count(high, grid.cells)) / 2;
      if (plus.offset == 0) {  // one table serves both
        Row* both = high_ + int64_t(b) * row_ + w * grid.cells;
        for (int c = 0; c < grid.cells; ++c) both[c] = of_low * low[c] + sign * high[c];
        apply(plus, both, block[b].filled, [&](int c, Row f) {
          f.set(0, f[0] + T(half));
          put(b, w, c, f);
        });
      } else {
        apply(minus, high, block[b].filled, [&](int c, Row f) { put(b, w, c, sign * f); });
        apply(plus, low, block[b].filled, [&](int c, Row f) {
          f = of_low * f;
          f.set(0, f[0] + T(half));
          put(b, w, c, f + get(b, w, c));
        });
      }
    }
  }
  // The same of κ', for second derivatives and no offset: Σ over both sides of ω κ'(u_j − u), ω >= 0.
  void solve_slope(int b, const Table& table, T of_low = 1, T of_high = 1) {
    const T sign = weighted ? -of_high : of_high;
    for (int w = 0; w < (weighted ? 2 : 1); ++w) {
      const Row* low = low_ + int64_t(b) * row_ + w * grid.cells;
      Row* both = high_ + int64_t(b) * row_ + w * grid.cells;
      for (int c = 0; c < grid.cells; ++c) both[c] = of_low * low[c] + sign * both[c];
      each_near_field(table, table.slope, both, block[b].filled, [&](int c, Row f) { put(b, w, c, f); });
    }
  }
  // Field of the only block on itself: Σ_j κ(u_j − u).
  void solve_self(const Table& table) {
    apply(table, block_moments_, filled_, [&](int c, Row f) { put(0, 0, c, f); });
  }

  // Field of the only block on itself under κ': Σ_j κ'(u_j − u).
  void solve_slope_of_self(const Table& table) {
    each_near_field(table, table.slope, block_moments_, filled_, [&](int c, Row f) { put(0, 0, c, f); });
  }

  // Value of block b's field at u for the documents from k on: Σ ω κ.
  PILE_INLINE Vec<T> evaluate(int b, Vec<T> u, int k) const {
    Vec<T> x;
    const Ints<T> cell = grid.locate(u, x);
    const T* f = field_ + int64_t(b) * (weighted ? 2 : 1) * P * stride_;
    const Vec<T> counts = horner(f, cell, x);
    if (!weighted) return counts;
    return load(depositor_.gain + k) * counts - horner(f + P * stride_, cell, x);
  }

  // Σ_P ω softplus(offset − (u_i − u_j)) over pairs of different blocks, by the moments alone: i counts as it does here, j as it
  // does in `others`. Before solve().
  double softplus_of_labels(const Table& plus, const FieldSums& others) const {
    double total = 0;
    for (int b = 0; b + 1 < blocks; ++b) {
      const Row* own = block_moments_ + int64_t(b) * row_;
      const Row* low = others.low_ + int64_t(b) * row_;
      if (weighted)
        total += between<true>(plus, own + grid.cells, low, block[b].filled) -
                 between<true>(plus, own, low + grid.cells, block[b].filled);
      else
        total += between<true>(plus, own, low, block[b].filled);
    }
    return total;
  }
  // Σ_{i<j} c_i c_j ψ(u_i − u_j) of the only block of n documents.
  double psi_of_self(const Table& table, int n) const {
    double squares = n;
    if (depositor_.weight) {
      squares = 0;
      for (int k = 0; k < n; ++k) squares += double(depositor_.weight[k]) * double(depositor_.weight[k]);
    }
    const double itself = squares * 0.69314718055994530942;
    return (between<false>(table, block_moments_, block_moments_, filled_) - itself) / 2;
  }

 private:
  // A long chunk with few cells spreads its sums over copies.
  int copies(int c) const {
    return !depositor_.by_cell() && row_ <= 32 && chunk[c].end - chunk[c].begin >= 64 ? Depositor<T, P>::kCopies : 1;
  }
  Row* moments(int c) const { return moments_ + chunk[c].moments; }

  static double count(const Row* moments, int cells) {
    double total = 0;
    for (int c = 0; c < cells; ++c) total += double(moments[c][0]);
    return total;
  }

  // Cells [from, to] of the source are tabulated for target cell c; those before and after are saturated.
  struct Near {
    int from, to;
  };
  Near near(const Table& table, int c) const {
    return {smaller(larger(0, c + table.first), grid.cells), smaller(grid.cells - 1, c + table.first + Table::kEntries - 1)};
  }

  // Coefficients of the field that the source cells within reach make at target cells c + 1 and c, one after the other.
  using Pair = Numbers<T, 2 * P>;
  // Not inlined: the sanitized build of its many copies would take minutes.
  __attribute__((noinline)) Pair near_fields(const Table& table, const typename Table::Matrices& matrices, const Row* source,
                                             int c) const {
    const int from = larger(filled_.first, near(table, c).from),
              to = smaller(filled_.last, near(table, smaller(c + 1, grid.cells - 1)).to);
    // Some chains of additions, or each would wait for the last; as many as registers hold.
    constexpr int kChains = Pair::kParts > 4 ? 1 : Pair::kParts > 2 ? 2 : 4;
    Pair part[kChains] = {};
    for (int s = from; s <= to; ++s) {
#pragma GCC unroll 16
      for (int k = 0; k < P; ++k) part[k % kChains] += source[s][k] * Pair::at(matrices[k][s - c - table.first]);
    }
    for (int step = kChains / 2; step > 0; step /= 2)
      for (int k = 0; k < step; ++k) part[k] += part[k + step];
    return part[0];
  }
  // visit(c, coefficients at c) for the target cells in rising order.
  template <class Visit>
  void each_near_field(const Table& table, const typename Table::Matrices& matrices, const Row* source, CellRange targets,
                       Visit visit) const {
    for (int c = targets.first; c <= targets.last; c += 2) {
      const Pair both = near_fields(table, matrices, source, c);
      for (int i = 0; i < smaller(2, targets.last + 1 - c); ++i)
        visit(c + i, Row::at(reinterpret_cast<const T*>(&both) + (1 - i) * P));
    }
  }

  // What source moments do to target cells under κ: `use(c, coefficients of the field at cell c)`.
  template <class Use>
  void apply(const Table& table, const Row* source, CellRange targets, Use use) const {
    double before = 0, after = count(source, grid.cells);  // documents in saturated cells
    Near seen = {0, -1};
    each_near_field(table, table.kappa, source, targets, [&](int c, Row f) {
      const Near now = near(table, c);
      for (; seen.from < now.from; ++seen.from) before += double(source[seen.from][0]);
      for (; seen.to < now.to; ++seen.to) after -= double(source[seen.to + 1][0]);
      f.set(0, f[0] + T((after - before) / 2));
      use(c, f);
    });
  }

  // Σ w_i w_j softplus(offset − (u_i − u_j)), or Σ w_i w_j ψ(...) without kLinear, target moments i against source moments j.
  template <bool kLinear>
  double between(const Table& table, const Row* target, const Row* source, CellRange targets) const {
    // Saturated: ψ(v) = |v| / 2 with v = offset + h (s − c) + x_j − x_i; sums over source cells of w and of w (h s + x_j).
    struct Sums {
      double weight = 0, place = 0;
      void add(const Row& moments, int cell, double sign) {
        weight += sign * moments[0];
        place += sign * (kCell * cell * moments[0] + moments[1]);
      }
    };
    Sums before, after;
    for (int s = 0; s < grid.cells; ++s) after.add(source[s], s, 1);
    const Sums all = after;
    Near seen = {0, -1};
    double total = 0;
    each_near_field(table, table.psi, source, targets, [&](int c, Row f) {
      const Near now = near(table, c);
      for (; seen.from < now.from; ++seen.from) before.add(source[seen.from], seen.from, 1);
      for (; seen.to < now.to; ++seen.to) after.add(source[seen.to + 1], seen.to + 1, -1);
      double value = 0;
      for (int k = 0; k < P; ++k) value += double(target[c][k]) * double(f[k]);
      const double w = double(target[c][0]), place = kCell * c * w + double(target[c][1]);
      auto linear = [&](const Sums& sums) { return ((table.offset * w - place) * sums.weight + w * sums.place) / 2; };
      total += value + linear(after) - linear(before) + (kLinear ? linear(all) : 0.0);
    });
    return total;
  }

  void put(int b, int w, int c, Row f) {
    T* to = field_ + ((int64_t(b) * (weighted ? 2 : 1) + w) * P) * stride_ + c;
    for (int k = 0; k < P; ++k) to[k * stride_] = f[k];
  }
  Row get(int b, int w, int c) const {
    const T* from = field_ + ((int64_t(b) * (weighted ? 2 : 1) + w) * P) * stride_ + c;
    Row f;
    for (int k = 0; k < P; ++k) f.set(k, from[k * stride_]);
    return f;
  }

  PILE_INLINE Vec<T> horner(const T* f, Ints<T> cell, Vec<T> x) const {
    Vec<T> value = {};
#if !defined(__clang__)
    if (stride_ == kLanes<T>) {
#pragma GCC unroll 16
      for (int k = P - 1; k >= 0; --k) value = value * x + __builtin_shuffle(load(f + k * stride_), cell);
      return value;
    }
    if (stride_ == 2 * kLanes<T>) {
#pragma GCC unroll 16
      for (int k = P - 1; k >= 0; --k) {
        const T* row = f + k * stride_;
        value = value * x + __builtin_shuffle(load(row), load(row + kLanes<T>), cell);
      }
      return value;
    }
#endif
    typename Simd<T>::integer cells[kLanes<T>];
    std::memcpy(cells, &cell, sizeof cell);
    for (int k = P - 1; k >= 0; --k) {
      const T* row = f + k * stride_;
      T lanes[kLanes<T>];
      for (int l = 0; l < kLanes<T>; ++l) lanes[l] = row[cells[l]];
      value = value * x + load(lanes);
    }
    return value;
  }

  Depositor<T, P> depositor_;
  int row_ = 0, stride_ = 0;
  CellRange filled_ = {};  // no document at all lies in a cell outside it
  Row *moments_ = nullptr, *block_moments_ = nullptr, *low_ = nullptr, *high_ = nullptr;
  T* field_ = nullptr;
};

}  // namespace pile::PILE_ISA
