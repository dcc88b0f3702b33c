// Direct pair sums: what a document hears from its query's documents, by falling label.
//
// Four lanes own a row i, or four of them; the columns are read from shared memory four at a time by one 16-byte load, each
// lane every fourth of them. Each row visits the columns before and after its own label, so equal labels never meet and only
// the quads at a label's edge need masks. An unordered pair is visited from both sides: no sum ever leaves its four lanes,
// there are no accumulators to exchange and no atomics, and an iteration has one barrier.
//
// Ensemble, λ_i = Σ_{y_j ≠ y_i} ω_ij r_ij − Σ_{y_j > y_i} ω_ij,  r_ij = 1 / (1 + e^{u_i − u_j ∓ offset}) (−: j below),
// since σ(−x) = 1 − σ(x); the second sum is a constant of the query. e^{u_i − u_j} = E_i F_j, and four pairs share a
// reciprocal: Σ 1/a = ((a + b) cd + (c + d) ab) / (ab cd). Per four pairs 12 float instructions, 1 reciprocal, 1/4 load (four
// rows at once). Per unordered pair that is 6 float instructions and 1/2 reciprocal; meeting each pair once would take 3.5 and
// 1/2, but also about 1 of shuffles, additions and traffic for the columns' sums, a second barrier, and half-empty tiles on the
// diagonal of the short lists this is for; long ones take fields.h.
//
// A quad adds the same bits to a row whether it is masked or not and whether the row comes alone or with others: fmaf is
// spelled out wherever the compiler could choose, so the number of threads does not show in the result.
#pragma once

#include "device.h"

namespace pile::gpu {

constexpr int kLanes = 4;  // that share a row

PILE_DEVICE float4 four(const float* p) { return *reinterpret_cast<const float4*>(p); }

// sum + wa/a + wb/b + wc/c + wd/d
PILE_DEVICE float add_quotients(float sum, float a, float b, float c, float d, float wa, float wb, float wc, float wd) {
  const float ab = a * b, cd = c * d;
  const float first = fmaf(wa, b, wb * a), second = fmaf(wc, d, wd * c);
  return fmaf(fmaf(first, cd, second * ab), reciprocal(ab * cd), sum);
}

// The ensemble's label pairs between the positions [begin, end), for a window [from, to) of columns, `from` a multiple of four.
struct LabelColumns {
  struct Rows {
    const float *u, *gains;
    const int *first, *last;  // where a row's label begins and ends
  } rows;
  struct Window {
    const float *u, *gains;  // of the columns, valid inside the window: F_j = e^{c − u_j}, or u_j where wide, as the rows'
    int begin, end, from, to;
  } window;
  bool wide, weighted;
  float above, below;  // what the offset does to a row's E_i, or to its u_i where wide

  PILE_DEVICE LabelColumns(const Rows& rows, bool wide, bool weighted, float offset)
      : rows(rows),
        window(),
        wide(wide),
        weighted(weighted),
        above(wide ? offset : expf(offset)),
        below(wide ? -offset : expf(-offset)) {}
};

// Each lane's part of Σ ω r over the columns, for the rows row, …, row + R − 1 (those past the last are the last again).
// kPlain: neither wide nor weighted, known to the compiler.
template <bool kPlain, int R>
PILE_DEVICE void label_pull(const LabelColumns& of, int row, int last_row, const Lanes& lanes, float (&total)[R]) {
  const LabelColumns::Window& in = of.window;
  const bool wide = !kPlain && of.wide, weighted = !kPlain && of.weighted;
  float above[R], below[R], gain[R];
  int first[R], last[R];
  int least_first = in.end, most_first = 0, least_last = in.end, most_last = 0;
#pragma unroll
  for (int r = 0; r < R; ++r) {
    const int k = smaller(row + r, last_row);
    const float own = wide ? of.rows.u[k] : reciprocal(of.rows.u[k]);
    above[r] = wide ? own + of.above : own * of.above;
    below[r] = wide ? own + of.below : own * of.below;
    gain[r] = weighted ? of.rows.gains[k] : 0.0f;
    first[r] = of.rows.first[k];
    last[r] = of.rows.last[k];
    least_first = smaller(least_first, first[r]);
    most_first = larger(most_first, first[r]);
    least_last = smaller(least_last, last[r]);
    most_last = larger(most_last, last[r]);
    total[r] = 0;
  }
  auto factor = [&](float own, float column) {
    return wide ? 1.0f + exp_fast(fminf(own - column, kNarrow)) : fmaf(own, column, 1.0f);
  };
  auto whole = [&](int j, const float (&own)[R]) {
    const float4 c = four(in.u + j);
    float4 g = {};
    if (weighted) g = four(in.gains + j);
#pragma unroll
    for (int r = 0; r < R; ++r) {
      auto weight = [&](float column) { return weighted ? fabsf(gain[r] - column) : 1.0f; };
      total[r] = add_quotients(total[r], factor(own[r], c.x), factor(own[r], c.y), factor(own[r], c.z), factor(own[r], c.w),
                               weight(g.x), weight(g.y), weight(g.z), weight(g.w));
    }
  };
  auto masked = [&](int j) {
    const float4 c = four(in.u + j);
    float4 g = {};
    if (weighted) g = four(in.gains + j);
    const float column[4] = {c.x, c.y, c.z, c.w}, column_gain[4] = {g.x, g.y, g.z, g.w};
#pragma unroll
    for (int r = 0; r < R; ++r) {
      float f[4], weight[4];
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const bool up = j + e >= in.begin && j + e < first[r], down = j + e >= last[r] && j + e < in.end;
        f[e] = up || down ? factor(up ? above[r] : below[r], column[e]) : 1.0f;
        weight[e] = up || down ? (weighted ? fabsf(gain[r] - column_gain[e]) : 1.0f) : 0.0f;
      }
      total[r] = add_quotients(total[r], f[0], f[1], f[2], f[3], weight[0], weight[1], weight[2], weight[3]);
    }
  };
  const int to = smaller(in.to, in.end);
  int j = in.from + 4 * lanes.rank;
  for (; j < smaller(in.begin, to); j += 4 * kLanes) masked(j);
  for (; j + 4 <= smaller(least_first, to); j += 4 * kLanes) whole(j, above);
  for (; j < smaller(most_last, to); j += 4 * kLanes)
    if (j < most_first || j + 4 > least_last) masked(j);
  for (; j + 4 <= to; j += 4 * kLanes) whole(j, below);
  if (j < to) masked(j);
}

// One row's sum to all four lanes; or of four rows, to each lane its own. The same additions in both.
PILE_DEVICE float sum_rows(const Lanes& lanes, const float (&total)[1]) { return lanes.sum(total[0]); }
PILE_DEVICE float sum_rows(const Lanes& lanes, const float (&total)[4]) {
  const bool high = lanes.rank & 2, odd = lanes.rank & 1;
  const float even_sum = (high ? total[2] : total[0]) + __shfl_xor_sync(lanes.mask, high ? total[0] : total[2], 2);
  const float odd_sum = (high ? total[3] : total[1]) + __shfl_xor_sync(lanes.mask, high ? total[1] : total[3], 2);
  return (odd ? odd_sum : even_sum) + __shfl_xor_sync(lanes.mask, odd ? even_sum : odd_sum, 1);
}

// Σ ω r over the columns for R rows, four rows' sums to a lane each.
template <int R>
PILE_DEVICE float pull_rows(const LabelColumns& of, int row, int last_row, const Lanes& lanes) {
  float total[R];
  if (!of.wide && !of.weighted)
    label_pull<true, R>(of, row, last_row, lanes, total);
  else
    label_pull<false, R>(of, row, last_row, lanes, total);
  return sum_rows(lanes, total);
}

// A document's part of a sum over pairs and its slope.
struct SlopeAndLoss {
  float slope = 0, loss = 0;
};

// Logits u and, where ω is their difference, gains of columns, and their documents' weights, if they have any; scale and offset
// of softplus(offset − scale (u_i − u_j)).
struct LossColumns {
  const float *u, *gains;
  bool weighted;
  float scale = 1, offset = 0;
  const float *weights = nullptr, *more = nullptr;  // `more`: what else a term asked for
};

struct One {  // for every pair
  PILE_DEVICE float operator()(int) const { return 1; }
};

// Adds, over the columns [from, to) and a row at u, weight(j) p and, for kBelow, weight(j) softplus(−x); x = ±scale (u_i − u_j) −
// offset says how far the pair is ordered right. Relative accuracy of every pair, however well ordered: with t = e^{−|x|}, p is
// t / (1 + t) or 1 / (1 + t).
template <bool kBelow, class Weight>
PILE_DEVICE void add_losses(const LossColumns& of, float row, int from, int to, const Lanes& lanes, SlopeAndLoss& sums,
                            Weight weight_of) {
  constexpr bool kWeighted = !std::is_same_v<Weight, One>;
  struct Pair {
    float weight, numerator, denominator, excess;
  };
  auto pair = [&](int j) {
    const float x = of.scale * (kBelow ? row - of.u[j] : of.u[j] - row) - of.offset;
    const float t = expf(-fabsf(x));
    const float weight = weight_of(j);
    return Pair{weight, weight * (x > 0 ? t : 1.0f), 1.0f + t, fmaxf(-x, 0.0f)};
  };
  for (int j = (from & ~3) + 4 * lanes.rank; j < to; j += 4 * kLanes) {
    if (j >= from && j + 4 <= to) {
      const Pair a = pair(j), b = pair(j + 1), c = pair(j + 2), d = pair(j + 3);
      sums.slope = add_quotients(sums.slope, a.denominator, b.denominator, c.denominator, d.denominator, a.numerator,
                                 b.numerator, c.numerator, d.numerator);
      if (!kBelow) continue;
      if constexpr (kWeighted) {
        for (const Pair& p : {a, b, c, d}) sums.loss += p.weight * (p.excess + kLn2 * log2_fast(p.denominator));
      } else {
        sums.loss += kLn2 * log2_fast(a.denominator * b.denominator * (c.denominator * d.denominator));
        sums.loss += (a.excess + b.excess) + (c.excess + d.excess);
      }
    } else {
#pragma unroll 1
      for (int k = larger(j, from); k < smaller(j + 4, to); ++k) {
        const Pair p = pair(k);
        sums.slope += p.numerator * reciprocal(p.denominator);
        if (kBelow) sums.loss += p.weight * (p.excess + kLn2 * log2_fast(p.denominator));
      }
    }
  }
}
// The same where pairs weigh as their gains do, a row's gain being `gain`.
template <bool kBelow>
PILE_DEVICE void add_losses(const LossColumns& of, float row, float gain, int from, int to, const Lanes& lanes,
                            SlopeAndLoss& sums) {
  if (of.weighted)
    add_losses<kBelow>(of, row, from, to, lanes, sums, [&](int j) { return fabsf(gain - of.gains[j]); });
  else
    add_losses<kBelow>(of, row, from, to, lanes, sums, One());
}

}  // namespace pile::gpu
