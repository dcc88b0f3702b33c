// Direct pair sums: what a document hears from its query's documents, by falling label.
//
// Four lanes own a row i, or a block of four rows; the columns are read from shared memory four at a time by one 16-byte load, each
// lane every fourth of them. Each row visits the columns before and after its own label, so equal labels never meet and only the
// quads at a label's edge need masks. An unordered pair is visited from both sides: no sum ever leaves its four lanes, there are no
// accumulators to exchange and no atomics, and an iteration has one barrier.
//
// Ensemble, λ_i = Σ_{y_j ≠ y_i} ω_ij r_ij − Σ_{y_j > y_i} ω_ij,  r_ij = 1 / (1 + e^{u_i − u_j ∓ offset})  (− for j below, + above),
// since σ(−x) = 1 − σ(x); the second sum is a constant of the query. e^{u_i − u_j} = E_i F_j, and four pairs share a reciprocal:
// Σ 1/a = ((a + b) cd + (c + d) ab) / (ab cd). Per four pairs 12 float instructions, 1 reciprocal, 1/4 load (blocks of four rows).
// Per unordered pair that is 6 float instructions and 1/2 reciprocal; meeting each pair once would take 3.5 and 1/2, but also
// about 1 of shuffles, additions and traffic for the columns' sums, a second barrier, and half-empty tiles on the diagonal of the
// short lists this is for; long ones take fields.h.
//
// A quad adds the same bits to a row whether it is masked or not and whether the row comes alone or in a block: fmaf is spelled
// out wherever the compiler could choose, so the number of threads does not show in the result.
#pragma once

#include "device.h"

namespace pile {
namespace gpu {

// A product of four (1 + E F) has to stay a float32: logits that span more than this (with the offset) are "wide", and take an
// exponential per pair, bounded by the same e^20: beyond it σ is 0 to within 2e-9.
constexpr float kNarrow = 20.0f;

constexpr int kLanes = 4;  // that share a row

PILE_DEVICE float4 four(const float* p) { return *reinterpret_cast<const float4*>(p); }

// sum + wa/a + wb/b + wc/c + wd/d
PILE_DEVICE float add_quotients(float sum, float a, float b, float c, float d, float wa, float wb, float wc, float wd) {
  const float ab = a * b, cd = c * d;
  const float first = fmaf(wa, b, wb * a), second = fmaf(wc, d, wd * c);
  return fmaf(fmaf(first, cd, second * ab), reciprocal(ab * cd), sum);
}

// The ensemble's label pairs between the positions [begin, end), and a window [from, to) of them, `from` a multiple of four.
struct LabelColumns {
  const float* u;  // F_j = e^{c − u_j}, or u_j where wide; valid inside the window
  const float* gains;
  const float *row_u, *row_gains;  // the same of the rows
  const int *first, *last;
  int begin, end, from, to;
  float above, below;  // what the offset does to a row's E_i, or to its u_i where wide
  bool wide, weighted;

  PILE_DEVICE void set_offset(float offset) {
    above = wide ? offset : expf(offset);
    below = wide ? -offset : expf(-offset);
  }
  PILE_DEVICE bool plain() const { return !wide && !weighted; }
};

// kPlain: neither wide nor weighted, known to the compiler. Each lane's part of Σ ω r over the columns, for the rows row, …, row + R − 1 (those past the last are the last again).
template <bool kPlain, int R>
PILE_DEVICE void label_pull(const LabelColumns& of, int row, int last_row, const Lanes& lanes, float (&total)[R]) {
  const bool wide = !kPlain && of.wide, weighted = !kPlain && of.weighted;
  float above[R], below[R], gain[R];
  int first[R], last[R];
  int least_first = of.end, most_first = 0, least_last = of.end, most_last = 0;
#pragma unroll
  for (int r = 0; r < R; ++r) {
    const int k = smaller(row + r, last_row);
    const float own = wide ? of.row_u[k] : reciprocal(of.row_u[k]);
    above[r] = wide ? own + of.above : own * of.above;
    below[r] = wide ? own + of.below : own * of.below;
    gain[r] = weighted ? of.row_gains[k] : 0.0f;
    first[r] = of.first[k];
    last[r] = of.last[k];
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
    const float4 c = four(of.u + j);
    float4 g = {};
    if (weighted) g = four(of.gains + j);
#pragma unroll
    for (int r = 0; r < R; ++r) {
      auto weight = [&](float column) { return weighted ? fabsf(gain[r] - column) : 1.0f; };
      total[r] = add_quotients(total[r], factor(own[r], c.x), factor(own[r], c.y), factor(own[r], c.z), factor(own[r], c.w),
                               weight(g.x), weight(g.y), weight(g.z), weight(g.w));
    }
  };
  auto masked = [&](int j) {
    const float4 c = four(of.u + j);
    float4 g = {};
    if (weighted) g = four(of.gains + j);
    const float column[4] = {c.x, c.y, c.z, c.w}, column_gain[4] = {g.x, g.y, g.z, g.w};
#pragma unroll
    for (int r = 0; r < R; ++r) {
      float f[4], weight[4];
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const bool up = j + e >= of.begin && j + e < first[r], down = j + e >= last[r] && j + e < of.end;
        f[e] = up || down ? factor(up ? above[r] : below[r], column[e]) : 1.0f;
        weight[e] = up || down ? (weighted ? fabsf(gain[r] - column_gain[e]) : 1.0f) : 0.0f;
      }
      total[r] = add_quotients(total[r], f[0], f[1], f[2], f[3], weight[0], weight[1], weight[2], weight[3]);
    }
  };
  const int to = smaller(of.to, of.end);
  int j = of.from + 4 * lanes.rank;
  for (; j < smaller(of.begin, to); j += 4 * kLanes) masked(j);
  for (; j + 4 <= smaller(least_first, to); j += 4 * kLanes) whole(j, above);
  for (; j < smaller(most_last, to); j += 4 * kLanes)
    if (j < most_first || j + 4 > least_last) masked(j);
  for (; j + 4 <= to; j += 4 * kLanes) whole(j, below);
  if (j < to) masked(j);
}

// One row's sum to all four lanes; or of a block of four, to each lane its own row's. The same additions in both.
PILE_DEVICE float sum_rows(const Lanes& lanes, const float (&total)[1]) { return lanes.sum(total[0]); }
PILE_DEVICE float sum_rows(const Lanes& lanes, const float (&total)[4]) {
  const bool high = lanes.rank & 2, odd = lanes.rank & 1;
  const float even_sum = (high ? total[2] : total[0]) + __shfl_xor_sync(lanes.mask, high ? total[0] : total[2], 2);
  const float odd_sum = (high ? total[3] : total[1]) + __shfl_xor_sync(lanes.mask, high ? total[1] : total[3], 2);
  return (odd ? odd_sum : even_sum) + __shfl_xor_sync(lanes.mask, odd ? even_sum : odd_sum, 1);
}

// Visit the columns [from, to) by fours: `whole(j)` for four of them, `part(j)` where some lie outside.
template <class Whole, class Part>
PILE_DEVICE void by_fours(int from, int to, const Lanes& lanes, Whole whole, Part part) {
  for (int j = (from & ~3) + 4 * lanes.rank; j < to; j += 4 * kLanes) {
    if (j >= from && j + 4 <= to)
      whole(j);
    else
      part(j);
  }
}

// Σ over columns [from, to) of ω p and, for kBelow, of ω softplus(−x); x = ±scale (u_i − u_j) − offset says how far the pair is ordered
// right.
// Relative accuracy of every pair, however well ordered: with t = e^{−|x|}, p is t / (1 + t) or 1 / (1 + t).
template <bool kBelow, bool kWeighted>
PILE_DEVICE void label_losses(const float* u, const float* gains, float row, float gain, float scale, float offset, int from,
                              int to, const Lanes& lanes, float& slope, float& loss) {
  struct Pair {
    float weight, numerator, denominator, excess;
  };
  auto pair = [&](int j) {
    const float x = scale * (kBelow ? row - u[j] : u[j] - row) - offset;
    const float t = expf(-fabsf(x));
    const float weight = kWeighted ? fabsf(gain - gains[j]) : 1.0f;
    return Pair{weight, weight * (x > 0 ? t : 1.0f), 1.0f + t, fmaxf(-x, 0.0f)};
  };
  by_fours(
      from, to, lanes,
      [&](int j) {
        const Pair a = pair(j), b = pair(j + 1), c = pair(j + 2), d = pair(j + 3);
        slope = add_quotients(slope, a.denominator, b.denominator, c.denominator, d.denominator, a.numerator, b.numerator,
                              c.numerator, d.numerator);
        if constexpr (!kBelow) return;
        if constexpr (kWeighted) {
          for (const Pair& p : {a, b, c, d}) loss += p.weight * (p.excess + kLn2 * log2_fast(p.denominator));
        } else {
          loss += kLn2 * log2_fast(a.denominator * b.denominator * (c.denominator * d.denominator));
          loss += (a.excess + b.excess) + (c.excess + d.excess);
        }
      },
      [&](int j) {
#pragma unroll 1
        for (int k = larger(j, from); k < smaller(j + 4, to); ++k) {
          const Pair p = pair(k);
          slope += p.numerator * reciprocal(p.denominator);
          if (kBelow) loss += p.weight * (p.excess + kLn2 * log2_fast(p.denominator));
        }
      });
}

// The distillation loss's columns by position, valid in the window they are read in; it ends on a multiple of four, by neutral ones.
struct DistillColumns {
  const float *z, *s;              // z / τ, s / τ; where a document has no target, kNeutral
  const float *z_power, *s_power;  // e^{z/τ − c}, e^{s/τ − c}; 0 where neutral; not read where wide
  static constexpr float kNeutral = -1e30f;
};
struct DistillRow {
  int position;
  float z, s, z_power, s_power;
};

// Σ_j σ(z_i − z_j) − σ(s_i − s_j) over the columns [from, to), and i's share of the pairs' cross entropies. With e = e^{−dz} and f = e^{−ds}
// both sigmoids share a reciprocal: σ(dz) − σ(ds) = (f − e) / ((1 + e)(1 + f)), and the cross entropy is log(1 + e) + dz f / (1 + f),
// which is the same from either side of the pair. A neutral column has e = f = 0.
//
// Narrow: e and f are products, half the cross entropy is taken from either side, and one logarithm serves four pairs: 12 float
// instructions, half a reciprocal and a quarter of a logarithm per pair.
PILE_DEVICE void distill_narrow(const DistillColumns& of, const DistillRow& row, int from, int to, const Lanes& lanes,
                                float& slope, float& loss) {
  const float e_row = reciprocal(row.z_power), f_row = reciprocal(row.s_power);
  struct Pair {
    float own, both, slope, loss;  // 1 + e, (1 + e)(1 + f), and the numerators over the latter
  };
  auto pair = [&](float z, float z_power, float s_power) {
    const float e = e_row * z_power, f = f_row * s_power, own = 1.0f + e;
    return Pair{own, fmaf(own, f, own), f - e, (row.z - z) * f * own};
  };
  for (int j = from + 4 * lanes.rank; j < to; j += 4 * kLanes) {
    const float4 z = four(of.z + j), zp = four(of.z_power + j), sp = four(of.s_power + j);
    const Pair a = pair(z.x, zp.x, sp.x), b = pair(z.y, zp.y, sp.y), c = pair(z.z, zp.z, sp.z), d = pair(z.w, zp.w, sp.w);
    const float ab = reciprocal(a.both * b.both), cd = reciprocal(c.both * d.both);
    slope = fmaf(fmaf(a.slope, b.both, b.slope * a.both), ab, slope);
    slope = fmaf(fmaf(c.slope, d.both, d.slope * c.both), cd, slope);
    const float logarithm = log2_fast(a.own * b.own * (c.own * d.own));
    const float rest = fmaf(fmaf(a.loss, b.both, b.loss * a.both), ab, fmaf(c.loss, d.both, d.loss * c.both) * cd);
    loss += 0.5f * fmaf(kLn2, logarithm, rest);
  }
  if (lanes.rank == 0 && row.position >= from && row.position < to) loss -= 0.5f * kLn2;  // i with itself
}

// Wide: an exponential each, bounded so that a product of two factors stays a float32. The cross entropy is taken from the side of the
// student's higher document, where nothing cancels and 1 + e <= 2: one logarithm serves 32 pairs.
PILE_DEVICE void distill_wide(const DistillColumns& of, const DistillRow& row, int from, int to, const Lanes& lanes,
                              float& slope, float& loss) {
  float product = 1;
  int factors = 0;
  for (int j = from + 4 * lanes.rank; j < to; j += 4 * kLanes) {
#pragma unroll 1
    for (int k = j; k < j + 4; ++k) {
      const float dz = row.z - of.z[k];
      const float e = exp_fast(fminf(-dz, 43.0f)), f = exp_fast(fminf(of.s[k] - row.s, 43.0f)), own = 1.0f + e;
      const bool leads = dz > 0 || (dz == 0 && row.position < k);
      const float r = reciprocal(own * (1.0f + f));
      slope = fmaf(f - e, r, slope);
      loss = fmaf(leads ? dz * f * own : 0.0f, r, loss);
      product *= leads ? own : 1.0f;
    }
    if (++factors == 8) {
      loss += kLn2 * log2_fast(product);
      product = 1;
      factors = 0;
    }
  }
  loss += kLn2 * log2_fast(product);
}

}  // namespace gpu
}  // namespace pile
