// Direct pair sums, O(n²): every pair of rows i and columns j > i once, its value added to i and subtracted from j.
//
// At once R rows meet one vector of columns. The rows' values are broadcast and stay in registers, the columns stream
// from L1; a row's sum is reduced once per row, a column's sum is updated once per R rows. Nothing n×n exists.
//
// Per vector of pairs: σ for the ensemble is 1 multiply-add, 1 reciprocal (AVX-512: estimate + 2 multiply-adds) and 2
// additions, 6 instructions for 16 float pairs; the logistic loss takes about 22, the distillation loss about 35. Bytes do
// not matter: a query's columns fit L1. What limits it is the issue rate of the two multiply-add pipes.
#pragma once

#include "order.h"

namespace pile::PILE_ISA {

// σ and log-terms of a pair need exp(u_i − u_j). Within ±kNarrow of the query's middle it is a product of two numbers
// computed once per document; wider spreads take an exponential per pair.
template <class T>
constexpr T kNarrow = T(sizeof(T) == 4 ? 40 : 340);

// What a document's logit looks like to the pair operators: e^{u − middle} and its inverse, or u itself where `wide`.
template <class T>
struct Exponentials {
  T* up = nullptr;    // e^{u − c}
  T* down = nullptr;  // e^{c − u}
  T middle = 0;
  T offset = 0, offset_down = 1, offset_up = 1;  // of the label pairs, e^{−offset}, e^{offset}
  bool wide = false;

  void plan(T low, T high, T pair_offset, int n, Arena& arena) {
    middle = (low + high) / 2;
    offset = pair_offset;
    offset_down = T(__builtin_exp(double(-offset)));
    offset_up = T(__builtin_exp(double(offset)));
    wide = !(high - low + (offset < 0 ? -offset : offset) <= 2 * kNarrow<T>);
    if (wide) return;
    up = arena.take<T>(n);
    down = arena.take<T>(n);
  }
  PILE_INLINE void set(int k, Vec<T> u, int lanes = kLanes<T>) {
    if (wide) return;
    const Vec<T> e = vexp<T>(vmin(u - middle, splat<T>(2 * kNarrow<T>)));
    store(up + k, e, lanes);
    store(down + k, reciprocal<T>(e), lanes);
  }
};

// Σ_below ω σ(offset − (u_i − u_j)) − Σ_above ω σ(offset − (u_j − u_i)): λ of the label pairs. With kLoss also
// Σ_P ω softplus(offset − (u_i − u_j)). kCounted: a pair counts c_i of its row, the preferred document, in both.
template <class T, bool kWeighted, bool kWide, bool kLoss, bool kCounted = false>
struct LabelPairs {
  static constexpr int kRows = kLoss ? 2 : 4;
  const T* u;
  Exponentials<T> near;
  const T* gain;
  const int* below;
  const T* c = nullptr;
  double total = 0;
  Vec<T> loss = {};

  struct Row {
    Vec<T> u, up, down, gain, c;
  };
  PILE_INLINE int first(int i) const { return below[i]; }
  PILE_INLINE Row row(int i) const {
    Row r;
    r.u = splat<T>(u[i] - near.offset);
    if (!kWide) r.up = splat<T>(near.up[i] * near.offset_down);
    if (!kWide && kLoss) r.down = splat<T>(near.down[i] * near.offset_up);
    if (kWeighted) r.gain = splat<T>(gain[i]);
    if (kCounted) r.c = splat<T>(c[i]);
    return r;
  }
  template <bool kMasked>
  PILE_INLINE Vec<T> pair(const Row& r, int j, Ints<T> mask) {
    Vec<T> p, value;
    if (!kLoss) {
      // y = e^{(u_i − offset) − u_j}
      const Vec<T> y = kWide ? vexp<T>(vmin(r.u - load(u + j), splat<T>(2 * kNarrow<T>))) : r.up * load(near.down + j);
      p = reciprocal<T>(T(1) + y);
    } else {
      const Vec<T> x = r.u - load(u + j);
      const Vec<T> t = kWide ? vexp<T>(-vabs<T>(x)) : vmin(r.up * load(near.down + j), r.down * load(near.up + j));
      const Vec<T> q = reciprocal<T>(T(1) + t);
      p = x > T(0) ? t * q : q;
      value = vmax(-x, Vec<T>{}) + vlog1p<T>(t);
    }
    if (kWeighted) {
      const Vec<T> omega = r.gain - load(gain + j);
      p = p * omega;
      if (kLoss) value = value * omega;
    }
    if (kCounted) {
      p = p * r.c;
      if (kLoss) value = value * r.c;
    }
    if (kMasked) p = mask ? p : Vec<T>{};
    if (kLoss) loss += kMasked ? (mask ? value : Vec<T>{}) : value;
    return p;
  }
  PILE_INLINE void flush() {
    if (!kLoss) return;
    total += double(sum<T>(loss));
    loss = Vec<T>{};
  }
};

// Where the values go: a document's pairs as a row are added to rows[], those as a column to columns[]; the result is their
// difference. Two arrays, because a scalar store to one that vectors are loaded from stalls those loads.
template <class T>
struct PairOutput {
  T *rows = nullptr, *columns = nullptr;

  static PairOutput take(int n, Arena& arena) { return {arena.take<T>(n), arena.take<T>(n)}; }
  PILE_INLINE void clear(int k, int lanes = kLanes<T>) const {
    store(rows + k, Vec<T>{}, lanes);
    store(columns + k, Vec<T>{}, lanes);
  }
  PILE_INLINE Vec<T> value(int k) const { return load(rows + k) - load(columns + k); }
  PILE_INLINE Vec<T> sum(int k) const { return load(rows + k) + load(columns + k); }
};

// What a pair adds to its row and to its column: mostly the same.
template <class T>
struct TwoSided {
  Vec<T> row, column;
};
template <class V>
PILE_INLINE V of_row(V value) {
  return value;
}
template <class V>
PILE_INLINE V of_column(V value) {
  return value;
}
template <class T>
PILE_INLINE Vec<T> of_row(TwoSided<T> value) {
  return value.row;
}
template <class T>
PILE_INLINE Vec<T> of_column(TwoSided<T> value) {
  return value.column;
}

// R rows from i against the columns [begin, end) that follow them.
template <class T, int R, class Pairs>
PILE_INLINE void pair_rows(Pairs& pairs, int i, int begin, int end, PairOutput<T> out) {
  typename Pairs::Row row[R];
  Vec<T> acc[R];
  int first[R];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
    row[r] = pairs.row(i + r);
    acc[r] = Vec<T>{};
    first[r] = larger(pairs.first(i + r), begin);
  }
  constexpr int W = kLanes<T>;
  int j = round_down(first[0], W);
  const int full = smaller(round_up(first[R - 1], W), end);
  const bool uniform = first[0] == first[R - 1];  // mostly: rows of one label
  auto masked = [&](int j) {
    const Ints<T> column = iota<T>() + typename Simd<T>::integer(j);
    const Ints<T> inside = column < typename Simd<T>::integer(end);
    Vec<T> sums = {};
    if (uniform) {
      const Ints<T> mask = inside & (column >= typename Simd<T>::integer(first[0]));
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        const auto value = pairs.template pair<true>(row[r], j, mask);
        acc[r] += of_row(value);
        sums += of_column(value);
      }
    } else {
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        const Ints<T> mask = inside & (column >= typename Simd<T>::integer(first[r]));
        const auto value = pairs.template pair<true>(row[r], j, mask);
        acc[r] += of_row(value);
        sums += of_column(value);
      }
    }
    // Only the columns from `begin` on: a neighbour in the same vector may be another thread's.
    const Vec<T> total = load(out.columns + j) + sums;
    if (j >= begin && j + W <= end) return store(out.columns + j, total);
    for (int l = larger(0, begin - j); l < smaller(W, end - j); ++l) out.columns[j + l] = total[l];
  };
  for (; j < full; j += W) masked(j);
  for (; j + W <= end; j += W) {
    Vec<T> sums = {};
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const auto value = pairs.template pair<false>(row[r], j, Ints<T>{});
      acc[r] += of_row(value);
      sums += of_column(value);
    }
    store(out.columns + j, load(out.columns + j) + sums);
  }
  if (j < end) masked(j);
  add_sums<T, R>(out.rows + i, acc);
  pairs.flush();
}

// Rows [row_begin, row_end) against the columns [begin, end).
template <class T, class Pairs>
void rectangle(Pairs& pairs, int row_begin, int row_end, int begin, int end, PairOutput<T> out) {
  constexpr int R = Pairs::kRows;
  if (begin >= end) return;
  int i = row_begin;
  for (; i + R <= row_end && pairs.first(i) < end; i += R) pair_rows<T, R>(pairs, i, begin, end, out);
  for (; i < row_end && pairs.first(i) < end; ++i) pair_rows<T, 1>(pairs, i, begin, end, out);
}

// All pairs of [0, n), by the whole team. From kTournament documents on the square is cut into bands of positions that meet
// like the players of a round-robin tournament: within a round no two games share a document, so the sums have one fixed order
// whoever computes them. `Pairs` is copied per member; the caller adds up `total` over `totals` (see pair_total).
constexpr int kTournament = 2048;
constexpr int kPlayers = 16;
constexpr int kPairsPerPoll = 1 << 22;  // some milliseconds' worth

template <class T, class Pairs>
void all_pairs(const Member& m, Pairs pairs, int n, PairOutput<T> out, double* totals) {
  if (n < kTournament) {
    if (m.leads()) {
      rectangle<T>(pairs, 0, n, 0, n, out);
      if (totals) totals[0] = pairs.total;
    }
    m.sync();
    return;
  }
  const int width = round_up((n + kPlayers - 1) / kPlayers, 64);
  auto meet = [&](int a, int b, int game) {
    if (a > b) {
      const int swap = a;
      a = b;
      b = swap;
    }
    pairs.total = 0;
    const int rows_end = smaller((a + 1) * width, n), begin = smaller(b * width, n), end = smaller((b + 1) * width, n);
    // Some rows at a time, whole groups of them, so that a game of hours can be interrupted.
    const int rows = larger(1, kPairsPerPoll / width / 4) * 4;
    for (int row = smaller(a * width, n); row < rows_end; row += rows) {
      m.poll();
      rectangle<T>(pairs, row, smaller(row + rows, rows_end), begin, end, out);
    }
    if (totals) totals[game] = pairs.total;
  };
  for (int a = m.rank; a < kPlayers; a += m.size) meet(a, a, a);
  m.sync();
  for (int round = 0; round < kPlayers - 1; ++round) {
    // The circle method: the last player sits still, the others rotate.
    for (int game = m.rank; game < kPlayers / 2; game += m.size) {
      const int number = kPlayers + round * (kPlayers / 2) + game;
      if (game == 0)
        meet(kPlayers - 1, round, number);
      else
        meet((round + game) % (kPlayers - 1), (round - game + kPlayers - 1) % (kPlayers - 1), number);
    }
    m.sync();
  }
}

// Room for the partial totals of all_pairs, and their sum in a fixed order.
constexpr int kPairTotals = kPlayers + (kPlayers - 1) * (kPlayers / 2);
PILE_INLINE double pair_total(const double* totals, int n) {
  double total = 0;
  for (int k = 0; k < (n < kTournament ? 1 : kPairTotals); ++k) total += totals[k];
  return total;
}

}  // namespace pile::PILE_ISA
