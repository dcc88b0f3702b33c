// The cells a query's logits fall into, and which of the two ways to sum over its pairs is faster on them.
#pragma once

#include "pair_sums.h"
#include "pile/field_table.h"

namespace pile::PILE_ISA {

// The cells a query's logits fall into.
template <class T>
struct Grid {
  T origin = 0;
  int cells = 0;  // 0: no usable grid (a logit is not finite, or too many cells)

  static Grid over(T low, T high, int n) {
    Grid grid;
    const double count = double(high - low) / kCell + 1;
    // More cells than this cost more than they save, in time and in memory.
    if (!(count >= 1 && count <= larger(64, n / 8))) return grid;
    grid.cells = int(count);
    // Centred: the outer cells share what the last one has to spare.
    grid.origin = T((double(low) + double(high) - grid.cells * kCell) / 2);
    return grid;
  }
  // Cell of u, and u relative to the cell's centre. Clamped: rounding may put a logit a hair outside.
  PILE_INLINE Ints<T> locate(Vec<T> u, Vec<T>& x) const {
    const Vec<T> from = u - origin;
    Vec<T> cell = from * T(1 / kCell);
    cell = vmin(vmax(cell, Vec<T>{}), splat<T>(T(cells) - T(0.5)));
    const Ints<T> index = to_ints<T>(cell);
    x = from - (to_vec<T>(index) + T(0.5)) * T(kCell);
    return index;
  }
};

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

// Which sum is faster. Costs in nanoseconds, fitted to the crossovers measured in docs/cpu.md: a pair, a document, and what
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

}  // namespace pile::PILE_ISA
