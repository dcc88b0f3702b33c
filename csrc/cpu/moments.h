// What the documents of each cell are to other cells: their moments Σ c w · (1, x, …, x^{P−1}), x from the cell's centre, w = 1
// and the documents' gains, c the documents' weights.
#pragma once

#include "grid.h"

namespace pile::PILE_ISA {

// Cells [first, last].
struct CellRange {
  int first, last;
  void include(CellRange other) {
    first = smaller(first, other.first);
    last = larger(last, other.last);
  }
};

// Adds documents to moments: a row per cell, and where there are gains as many rows more.
template <class T, int P>
struct Depositor {
  using Row = Numbers<T, P>;  // one cell's moments or coefficients

  Grid<T> grid;
  const T* gain = nullptr;
  const T* weight = nullptr;  // nullptr: 1 each

  // Documents [begin, end) at logits u[]; returns the cells that may have got something. Neighbouring documents mostly lie in
  // the same few cells, and each sum would wait for the last one's store: they go by turns to kCopies copies of the rows,
  // `stride` apart (0: one).
  static constexpr int kCopies = 4;
  CellRange add(Row* rows, int stride, int begin, int end, const T* u) const {
    if (by_cell()) return add_by_cell(rows, begin, end, u);
    constexpr int W = kLanes<T>;
    for (int k = begin; k < end; k += W) {
      Vec<T> x;
      const Ints<T> cell = grid.locate(load(u + k), x);
      T xs[W];
      typename Simd<T>::integer cells[W];
      store(xs, x);
      std::memcpy(cells, &cell, sizeof cell);
      const int lanes = smaller(W, end - k);
      for (int l = 0; l < lanes; ++l) {
        const Row p = weight ? weight[k + l] * powers(xs[l]) : powers(xs[l]);
        Row* const to = rows + (l % kCopies) * stride + cells[l];
        *to += p;
        if (gain) to[grid.cells] += gain[k + l] * p;
      }
    }
    return {0, grid.cells - 1};
  }
  CellRange none() const { return {grid.cells, -1}; }

#if defined(__AVX512F__)
  // While the cells are few, document by document is not the way: a vector of documents is added to the P sums of every cell,
  // under the mask of those that lie in it. The sums of kAtOnce cells stay in registers, and none waits for the store of the
  // last one.
  static constexpr int kAtOnce = 24 / P, kByCell = 12;
  bool by_cell() const { return grid.cells * P <= kByCell * kLanes<T>; }

 private:
  // Returns the cells that got something.
  __attribute__((noinline)) CellRange add_by_cell(Row* to, int begin, int end, const T* u) const {
    constexpr int W = kLanes<T>;
    T x[kTile];
    typename Simd<T>::integer cell[kTile];
    CellRange filled = none();
    for (; begin < end; begin += kTile) {
      const int n = smaller(kTile, end - begin);
      Ints<T> low = Ints<T>{} + grid.cells, high = {};
      for (int k = 0; k < n; k += W) {
        Vec<T> at;
        Ints<T> own = grid.locate(load(u + begin + k), at);
        if (n - k < W) {
          const Ints<T> within = iota<T>() < typename Simd<T>::integer(n - k);
          low = within & (own < low) ? own : low;
          own |= ~within;
        } else {
          low = own < low ? own : low;
        }
        high = own > high ? own : high;
        store(x + k, at);
        std::memcpy(cell + k, &own, sizeof own);
      }
      // Documents of one label are mostly near each other: the cells between the outermost two that are not empty, in equal
      // steps.
      const int first = least<T>(low), count = greatest<T>(high) + 1 - first;
      filled.include({first, first + count - 1});
      const int steps = (count + kAtOnce - 1) / kAtOnce, at_once = (count + steps - 1) / steps;
      for (int c = first; c < first + count; c += at_once) {
        for (int w = 0; w < (gain ? 2 : 1); ++w) {
          Row* rows = to + w * grid.cells + c;
          const T *gains = w ? gain + begin : nullptr, *weights = weight ? weight + begin : nullptr;
          const int some = smaller(at_once, first + count - c);
          if (some == 1)
            add_cells<1>(rows, c, n, x, cell, gains, weights);
          else if (some == 2 && kAtOnce >= 2)
            add_cells<kAtOnce >= 2 ? 2 : 1>(rows, c, n, x, cell, gains, weights);
          else
            add_cells<kAtOnce>(rows, c, n, x, cell, gains, weights);
        }
      }
    }
    return filled;
  }
  template <int N>
  PILE_INLINE void add_cells(Row* to, int first, int n, const T* x, const typename Simd<T>::integer* cell, const T* gains,
                             const T* weights) const {
    Vec<T> sums[N][P] = {};
    int k = 0;
    do {
      const Vec<T> at = load(x + k);
      Vec<T> power = gains ? load(gains + k) : splat<T>(1);
      if (weights) power *= load(weights + k);
      Ints<T> own;
      std::memcpy(&own, cell + k, sizeof own);
#pragma GCC unroll 16
      for (int p = 0; p < P; ++p) {
#pragma GCC unroll 4
        for (int i = 0; i < N; ++i) sums[i][p] = own == first + i ? sums[i][p] + power : sums[i][p];
        power *= at;
      }
    } while ((k += kLanes<T>) < n);
#pragma GCC unroll 4
    for (int i = 0; i < N; ++i) {
      lane_sums<T, P>(sums[i]);
      to[i] += Row::at(reinterpret_cast<const T*>(sums[i]));
    }
  }
#else
  static constexpr bool by_cell() { return false; }

 private:
  CellRange add_by_cell(Row*, int, int, const T*) const { return {}; }
#endif

 public:
  // (1, x, …, x^{P−1}): one factor per binary digit of the exponent within a register, then one register after the other.
  static PILE_INLINE Row powers(T x) {
    Row row;
    T step = x;
    row.part[0] = one_or<1>(x);
    if constexpr (Row::kPart > 2) row.part[0] *= one_or<2>(step *= step);
    if constexpr (Row::kPart > 4) row.part[0] *= one_or<4>(step *= step);
    if constexpr (Row::kPart > 8) row.part[0] *= one_or<8>(step *= step);
    step *= step;
#pragma GCC unroll 8
    for (int k = 1; k < Row::kParts; ++k) row.part[k] = row.part[k - 1] * step;
    return row;
  }

 private:
  template <int kDigit>
  static PILE_INLINE typename Row::Part one_or(T x) {
    using Part = typename Row::Part;
    decltype(Part{} < Part{}) mask;
    for (int k = 0; k < Row::kPart; ++k) mask[k] = k & kDigit ? -1 : 0;
    return mask ? x - Part{} : T(1) - Part{};
  }
};

}  // namespace pile::PILE_ISA
