// Pair sums in linear time ("chebyshev"): documents act on each other through the cells they lie in (pile/field_table.h has the
// mathematics, csrc/cpu/field_sums.h the same on the CPU).
//
//   deposit     a warp adds up the powers (1, x, …, x^7) of its documents cell by cell, with a vote to pass over empty cells
//   solve       a block per label block: the moments of those below and above it, times the tabulated 8 x 8 matrices
//   evaluate    a document reads its label block's field at its own x by Horner's rule
//
// No atomics: every sum has one order. Per document and pass: deposit about 10 instructions per cell its warp has documents in,
// evaluate 20; solve does not depend on the number of documents but for reading the moments of every 1,024 of them.
#pragma once

#include "workspace.h"
#include "pile/field_table.h"

namespace pile::gpu {

constexpr int kPowers = 8;
constexpr int kMostCells = 64;  // a range of 96; logits beyond are summed directly
using Reach = FieldReach<kPowers>;
constexpr int kTableWords = Reach::kEntries * kPowers * kPowers;

// Value of the field, coefficients [cells][kPowers], at x in a cell.
PILE_DEVICE float horner(const float* field, int cell, float x) {
  const float* f = field + cell * kPowers;
  float value = f[kPowers - 1];
#pragma unroll
  for (int k = kPowers - 2; k >= 0; --k) value = fmaf(value, x, f[k]);
  return value;
}

// The cells a query's logits fall into; cells == 0: no usable grid.
struct Grid {
  float origin = 0;
  int cells = 0;

  PILE_DEVICE static Grid over(float low, float high) {
    Grid grid;
    const float count = (high - low) * float(1 / kCell) + 1;
    if (!(count <= float(kMostCells)) || !(count >= 1)) return grid;
    grid.cells = int(count);
    // Centred: the outer cells share what the last one has to spare.
    grid.origin = float((double(low) + double(high) - grid.cells * kCell) / 2);
    return grid;
  }
  // Cell of u, and u relative to the cell's centre. Clamped: rounding may put a logit a hair outside.
  PILE_DEVICE int locate(float u, float& x) const {
    const float from = u - origin;
    const int cell = smaller(larger(int(floorf(from * float(1 / kCell))), 0), cells - 1);
    x = from - (float(cell) + 0.5f) * float(kCell);
    return cell;
  }
  // A field at u.
  PILE_DEVICE float value(const float* field, float u) const {
    float x;
    const int cell = locate(u, x);
    return horner(field, cell, x);
  }
};

// Cells [from, to] of the source are tabulated for target cell c; those before and after are saturated.
struct Near {
  int from, to;
  PILE_DEVICE Near(int first, int cells, int c)
      : from(smaller(larger(0, c + first), cells)), to(smaller(cells - 1, c + first + Reach::kEntries - 1)) {}
};

// The table of κ, or of ψ, at an offset, applied to moments [cells][kPowers].
struct CellTable {
  const float* entries;
  double offset;

  // What source moments do to coefficient `power` of target cell c under κ.
  PILE_DEVICE float apply_kappa(const float* source, int cells, int c, int power) const {
    const int first = Reach::first(offset);
    const Near near(first, cells, c);
    float total = 0;
    for (int s = near.from; s <= near.to; ++s) {
      const float* matrix = entries + (s - c - first) * kPowers * kPowers + power;
#pragma unroll
      for (int a = 0; a < kPowers; ++a) total = fmaf(source[s * kPowers + a], matrix[a * kPowers], total);
    }
    if (power > 0) return total;
    float before = 0, after = 0;
    for (int s = 0; s < near.from; ++s) before += source[s * kPowers];
    for (int s = near.to + 1; s < cells; ++s) after += source[s * kPowers];
    return total + (after - before) / 2;
  }

  // Target cell c's part of Σ w_i w_j ψ(offset − (u_i − u_j)), target moments i against source moments j, with kLinear of
  // softplus.
  template <bool kLinear>
  PILE_DEVICE double apply_psi(const float* target, const float* source, int cells, int c) const {
    const int first = Reach::first(offset);
    const Near near(first, cells, c);
    double total = 0;
    for (int s = near.from; s <= near.to; ++s) {
      const float* matrix = entries + (s - c - first) * kPowers * kPowers;
      for (int a = 0; a < kPowers; ++a) {
        float row = 0;
        for (int b = 0; b < kPowers; ++b) row = fmaf(matrix[a * kPowers + b], target[c * kPowers + b], row);
        total += double(row) * source[s * kPowers + a];
      }
    }
    // Saturated: ψ(v) = |v| / 2 with v = offset + h (s − c) + x_j − x_i; softplus adds v / 2.
    const double weight = target[c * kPowers], place = kCell * c * weight + target[c * kPowers + 1];
    for (int s = 0; s < cells; ++s) {
      const double sign = (s > near.to) - (s < near.from) + (kLinear ? 1 : 0);
      if (sign == 0) continue;
      const double other = source[s * kPowers], other_place = kCell * s * other + source[s * kPowers + 1];
      total += sign * ((offset * weight - place) * other + weight * other_place) / 2;
    }
    return total;
  }
};

// Eight values of every lane, summed over the warp; lane l gets that of power l / 4.
PILE_DEVICE float sum_powers(float (&value)[kPowers], int lane) {
#pragma unroll
  for (int half = kPowers / 2, step = 16; half > 0; half /= 2, step /= 2) {
    const bool high = lane & step;
#pragma unroll
    for (int k = 0; k < half; ++k) {
      const float keep = high ? value[k + half] : value[k], give = high ? value[k] : value[k + half];
      value[k] = keep + __shfl_xor_sync(kWholeWarp, give, step);
    }
  }
  float total = value[0];
  for (int step = 2; step > 0; step /= 2) total += __shfl_xor_sync(kWholeWarp, total, step);
  return total;
}

constexpr int kCellsAtOnce = 16;
// Shared floats that deposit() works in, by `threads`.
constexpr int deposit_words(int threads) { return threads / 32 * 2 * kCellsAtOnce * kPowers; }

// Moments of documents at logits u(i), i in [0, count), to to[kinds][cells][kPowers]: their powers, and with gains also those
// weighted by the gains; with weights everything times these. NaN: takes no part. At most kOwn documents a thread; the whole
// block calls.
template <int kOwn, class Logit>
PILE_DEVICE void deposit(const Grid& grid, int count, Logit u, const float* gains, float* partial, float* to,
                         const float* weights = nullptr) {
  const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32, warps = int(blockDim.x) / 32, kinds = gains ? 2 : 1;
  int cell[kOwn];
  float x[kOwn], weight[kOwn], gain[kOwn];
#pragma unroll
  for (int own = 0; own < kOwn; ++own) {
    const int k = own * int(blockDim.x) + int(threadIdx.x);
    const float at = k < count ? u(k) : not_a_number();
    x[own] = 0;
    cell[own] = is_number(at) ? grid.locate(at, x[own]) : -1;
    weight[own] = !weights ? 1.0f : k < count ? weights[k] : 0.0f;
    gain[own] = gains && k < count ? weight[own] * gains[k] : 0.0f;
  }
  for (int begin = 0; begin < grid.cells; begin += kCellsAtOnce) {
    const int cells = smaller(kCellsAtOnce, grid.cells - begin), words = cells * kPowers;
    for (int c = 0; c < cells; ++c) {
      bool any = false;
#pragma unroll
      for (int own = 0; own < kOwn; ++own) any = any || cell[own] == begin + c;
      const bool found = __any_sync(kWholeWarp, any);
      for (int kind = 0; kind < kinds; ++kind) {
        float value[kPowers] = {};
#pragma unroll
        for (int own = 0; own < kOwn; ++own) {
          float power = cell[own] == begin + c ? (kind ? gain[own] : weight[own]) : 0.0f;
#pragma unroll
          for (int k = 0; k < kPowers; ++k, power *= x[own]) value[k] += power;
        }
        const float total = found ? sum_powers(value, lane) : 0.0f;
        if (lane % 4 == 0) partial[(warp * kinds + kind) * words + c * kPowers + lane / 4] = total;
      }
    }
    __syncthreads();
    for (int e = int(threadIdx.x); e < kinds * words; e += int(blockDim.x)) {
      float total = 0;
      for (int w = 0; w < warps; ++w) total += partial[w * kinds * words + e];
      to[e / words * grid.cells * kPowers + begin * kPowers + e % words] = total;
    }
    __syncthreads();
  }
}

// Moments in rows of `words`, `stride` apart; `partial`: blockDim.x floats of shared memory.
struct MomentRows {
  const float* rows;
  int64_t stride;
  int words;
  float* partial;

  // Σ over the rows [from, end), to to[words] in shared memory.
  PILE_DEVICE void sum(int from, int end, float* to) const {
    const int threads = int(blockDim.x), rank = int(threadIdx.x), slices = larger(threads / words, 1);
    for (int base = 0; base < words; base += threads) {
      const int e = base + rank % (slices > 1 ? words : threads), slice = slices > 1 ? rank / words : 0;
      float total = 0;
      if (e < words && slice < slices)
#pragma unroll 4
        for (int r = from + slice; r < end; r += slices) total += rows[r * stride + e];
      partial[rank] = total;
      __syncthreads();
      if (slice == 0 && e < words) {
        for (int s = 1; s < slices; ++s) total += partial[rank + s * words];
        to[e] = total;
      }
      __syncthreads();
    }
  }
};

}  // namespace pile::gpu
