// D as cross entropies of pairs: Σ_{i<j} BCE(σ(z_i − z_j), σ(s_i − s_j)), z and s in units of τ.
//
// With e = e^{−dz} and f = e^{−ds} both sigmoids share a reciprocal: σ(dz) − σ(ds) = (f − e) / ((1 + e)(1 + f)), and the cross
// entropy is log(1 + e) + dz f / (1 + f), which is the same from either side of the pair. Long lists meet through two fields of
// all documents:
//
//   Σ_{i<j} BCE = Σ_{i<j} log 2cosh(dz/2) − (σ(ds) − 1/2) dz,  the second sum −Σ_i z_i Σ_j κ(s_j − s_i),
//   slope_i = field_s − field_z,
//
// unless a range is too wide for a grid or direct sums are asked for: then every piece walks through all columns, tile by tile.
// Where documents have weights a pair counts c_i c_j: moments are weighted, and direct sums take a loop of their own.
#pragma once

#include "../terms.h"

namespace pile::gpu {

// Columns and rows of the direct sums; `more` are e^{z − c} and e^{s − c}, 0 without a target, not read where wide. Of documents
// with weights these take the first's place.
constexpr float kNeutral = -1e30f;  // z and s without a target: e = f = 0
struct DistillRow {
  int position;
  float z, s, z_power, s_power;
};

// Adds Σ_j σ(z_i − z_j) − σ(s_i − s_j) over the columns [from, to), and i's share of the pairs' cross entropies.
//
// Narrow: e and f are products, half the cross entropy is taken from either side, and one logarithm serves four pairs: 12 float
// instructions, half a reciprocal and a quarter of a logarithm per pair.
PILE_DEVICE void distill_narrow(const Tile& of, const DistillRow& row, int from, int to, const Lanes& lanes,
                                SlopeAndLoss& sums) {
  const float e_row = reciprocal(row.z_power), f_row = reciprocal(row.s_power);
  struct Pair {
    float own, both, slope, loss;  // 1 + e, (1 + e)(1 + f), and the numerators over the latter
  };
  auto pair = [&](float z, float z_power, float s_power) {
    const float e = e_row * z_power, f = f_row * s_power, own = 1.0f + e;
    return Pair{own, fmaf(own, f, own), f - e, (row.z - z) * f * own};
  };
  for (int j = from + 4 * lanes.rank; j < to; j += 4 * kLanes) {
    const float4 z = four(of.student + j), zp = four(of.student_more + j), sp = four(of.target_more + j);
    const Pair a = pair(z.x, zp.x, sp.x), b = pair(z.y, zp.y, sp.y), c = pair(z.z, zp.z, sp.z), d = pair(z.w, zp.w, sp.w);
    const float ab = reciprocal(a.both * b.both), cd = reciprocal(c.both * d.both);
    sums.slope = fmaf(fmaf(a.slope, b.both, b.slope * a.both), ab, sums.slope);
    sums.slope = fmaf(fmaf(c.slope, d.both, d.slope * c.both), cd, sums.slope);
    const float logarithm = log2_fast(a.own * b.own * (c.own * d.own));
    const float rest = fmaf(fmaf(a.loss, b.both, b.loss * a.both), ab, fmaf(c.loss, d.both, d.loss * c.both) * cd);
    sums.loss += 0.5f * fmaf(kLn2, logarithm, rest);
  }
  if (lanes.rank == 0 && row.position >= from && row.position < to) sums.loss -= 0.5f * kLn2;  // i with itself
}

// Wide: an exponential each, bounded so that a product of two factors stays a float32. The cross entropy is taken from the side
// of the student's higher document, where nothing cancels and 1 + e <= 2: one logarithm serves 32 pairs.
PILE_DEVICE void distill_wide(const Tile& of, const DistillRow& row, int from, int to, const Lanes& lanes, SlopeAndLoss& sums) {
  float product = 1;
  int factors = 0;
  for (int j = from + 4 * lanes.rank; j < to; j += 4 * kLanes) {
#pragma unroll 1
    for (int k = j; k < j + 4; ++k) {
      const float dz = row.z - of.student[k];
      const float e = exp_fast(fminf(-dz, 43.0f)), f = exp_fast(fminf(of.target[k] - row.s, 43.0f)), own = 1.0f + e;
      const bool leads = dz > 0 || (dz == 0 && row.position < k);
      const float r = reciprocal(own * (1.0f + f));
      sums.slope = fmaf(f - e, r, sums.slope);
      sums.loss = fmaf(leads ? dz * f * own : 0.0f, r, sums.loss);
      product *= leads ? own : 1.0f;
    }
    if (++factors == 8) {
      sums.loss += kLn2 * log2_fast(product);
      product = 1;
      factors = 0;
    }
  }
  sums.loss += kLn2 * log2_fast(product);
}

// Of documents with weights, which are the columns' `student_more`: an exponential each as where it is wide, and a logarithm.
PILE_DEVICE void distill_weighted(const Tile& of, const DistillRow& row, int from, int to, const Lanes& lanes,
                                  SlopeAndLoss& sums) {
#pragma unroll 1
  for (int j = from + lanes.rank; j < to; j += kLanes) {
    const float dz = row.z - of.student[j], weight = of.student_more[j];
    const float e = exp_fast(fminf(-dz, 43.0f)), f = exp_fast(fminf(of.target[j] - row.s, 43.0f)), own = 1.0f + e;
    const float r = reciprocal(own * (1.0f + f));
    sums.slope = fmaf(weight, (f - e) * r, sums.slope);
    if (dz > 0 || (dz == 0 && row.position < j))
      sums.loss = fmaf(weight, fmaf(dz * f * own, r, kLn2 * log2_fast(own)), sums.loss);
  }
}

// The two fields of a long list, of its student (0) and of its target (1): their grids, and where they lie in the term's
// scratch.
struct DistillFields {
  const LongState& state;
  Grid student, target;

  PILE_DEVICE explicit DistillFields(const LongQuery& q) : state(q.state) {
    if (state.pairwise == PairSum::direct || q.own.broken) return;
    student = Grid::over(q.own.student.low, q.own.student.high);
    target = Grid::over(q.own.target.low, q.own.target.high);
  }
  PILE_DEVICE bool usable() const { return student.cells > 0 && target.cells > 0; }
  PILE_DEVICE float* moments(int which, int64_t piece) const {
    return state.of_distillation + (which * state.pieces + piece) * LongState::kKind;
  }
  PILE_DEVICE float* field(int which, int64_t query) const {
    return state.of_distillation + (2 * (state.pieces + query) + which) * LongState::kKind;
  }
};

template <class State>
__global__ void __launch_bounds__(kPieceThreads, 2) deposit_distillation(const State state) {
  PILE_SHARED_MEMORY(base);
  const PieceMemory memory(base);
  const BlockTeam team;
  const Piece piece(state);
  const LossPiece list(piece, memory, team);
  const DistillFields fields(piece);
  if (!fields.usable() || piece.begin >= piece.end) return;
  for (int which = 0; which < 2; ++which) {
    const auto logit = [&](int i) {
      const float s = list.scaled_target(piece.begin + i);
      return which || !is_number(s) ? s : list.scaled_student(piece.begin + i);
    };
    const Grid& grid = which ? fields.target : fields.student;
    deposit<kOwn>(grid, piece.end - piece.begin, logit, nullptr, memory.partial, fields.moments(which, piece.index),
                  list.weight ? list.weight + piece.begin : nullptr);
  }
}

// The field of all documents on themselves, of the student (even blocks) or the target (odd); and Σ ψ of the student's pairs.
template <class State>
__global__ void __launch_bounds__(kSolveThreads, 1) solve_distillation(const State state) {
  PILE_SHARED_MEMORY(memory);
  const int which = blockIdx.x % 2;
  const LongQuery q(state, blockIdx.x / 2);
  const DistillFields fields(q);
  if (!fields.usable()) return;
  float* const all = reinterpret_cast<float*>(memory);
  float* const partial = all + LongState::kKind;
  const BlockTeam team(partial + kSolveThreads);
  const int cells = which ? fields.target.cells : fields.student.cells, words = cells * kPowers;
  const MomentRows rows = {fields.moments(which, q.first_piece()), LongState::kKind, words, partial};
  rows.sum(0, q.piece_count(), all);
  float* field = fields.field(which, q.query.index);
  const CellTable kappa = state.table(0), psi = state.table(2);
  for (int e = team.rank; e < words; e += team.size) field[e] = kappa.apply_kappa(all, cells, e / kPowers, e % kPowers);
  if (which) return;
  const double sum = ordered_sum(team, cells, [&](int c) { return psi.template apply_psi<false>(all, all, cells, c); });
  if (team.rank == 0) q.own.distill_rest = (sum - q.own.target_squares * 0.69314718055994530942) / 2;
}

template <>
struct Loss<DistillLogistic> : DistillTerm {
  static float unit(const DistillLogistic& term) { return float(1 / term.temperature); }

  template <class List>
  PILE_DEVICE static void add(DistillLogistic, const List& list, float scale) {
    if constexpr (!List::kWhole) {
      const DistillFields fields(list.piece);
      if (fields.usable()) return add_fields(fields, list, scale);
    }
    if (list.weight)
      add_pairs<Columns::weighted>(list, scale);
    else if (list.facts.student.wide(0) || list.facts.target.wide(0))
      add_pairs<Columns::wide>(list, scale);
    else
      add_pairs<Columns::narrow>(list, scale);
  }

  static int64_t words(const LongState& state) {
    return state.pairwise == PairSum::direct ? 0 : 2 * (state.pieces + state.call.batch.queries) * LongState::kKind;
  }
  template <class Run>
  static void launch(const Run& run, const DistillLogistic&) {
    if (run.state.pairwise == PairSum::direct) return;
    run.pieces(deposit_distillation<LongState>, PieceMemory::kBytes);
    constexpr size_t kBytes = (LongState::kKind + kSolveThreads) * sizeof(float) + BlockTeam::kBytes;
    gpu::launch(solve_distillation<LongState>, 2 * run.state.call.batch.queries, kSolveThreads, kBytes, run.stream, run.state);
  }
  PILE_DEVICE static double rest(const LongQuery& q) { return q.own.distill_rest; }

 private:
  enum class Columns { narrow, wide, weighted };
  template <Columns kColumns, class List>
  PILE_DEVICE static void add_pairs(const List& list, float scale) {
    const Tile tile = list.tile;
    const float z_middle = list.facts.student.middle(), s_middle = list.facts.target.middle();
    const auto row_at = [&](int k) {
      const bool used = k < list.columns && is_number(list.scaled_target(k));
      const float z = used ? list.scaled_student(k) : kNeutral, s = used ? list.scaled_target(k) : kNeutral;
      if (!used || kColumns == Columns::wide) return DistillRow{k, z, s, 0, 0};
      if (kColumns == Columns::weighted) return DistillRow{k, z, s, list.weight[k], 0};
      return DistillRow{k, z, s, expf(z - z_middle), expf(s - s_middle)};
    };
    list.tiles(
        [&](int j, int to) {
          const DistillRow column = row_at(j);
          tile.student[to] = column.z;
          tile.target[to] = column.s;
          tile.student_more[to] = column.z_power;
          tile.target_more[to] = column.s_power;
        },
        [&](int from, int to) {
          const Tile columns = tile.from(from);
          list.rows(list.begin, list.end, [&](int k) {
            const DistillRow row =
                List::kWhole ? DistillRow{k, tile.student[k], tile.target[k], tile.student_more[k], tile.target_more[k]}
                             : row_at(k);
            if (row.s == kNeutral) return;
            SlopeAndLoss sums;
            if constexpr (kColumns == Columns::narrow)
              distill_narrow(columns, row, from, to, list.lanes, sums);
            else if constexpr (kColumns == Columns::wide)
              distill_wide(columns, row, from, to, list.lanes, sums);
            else
              distill_weighted(columns, row, from, to, list.lanes, sums);
            sums.slope *= list.call.distill_unit;
            list.add_row(k, kColumns == Columns::weighted ? scale * row.z_power : scale, sums);
          });
        });
  }

  template <class List>
  PILE_DEVICE static void add_fields(const DistillFields& fields, const List& list, float scale) {
    float* const field = list.memory.field;
    const float *of_student = fields.field(0, list.piece.query.index), *of_target = fields.field(1, list.piece.query.index);
    for (int e = list.team.rank; e < fields.student.cells * kPowers; e += list.team.size) field[e] = of_student[e];
    for (int e = list.team.rank; e < fields.target.cells * kPowers; e += list.team.size)
      field[LongState::kKind + e] = of_target[e];
    list.team.sync();
    list.each([&](int k) {
      const float z = list.scaled_student(k), s = list.scaled_target(k);
      if (!is_number(s)) return;
      const float of_z = fields.student.value(field, z), of_s = fields.target.value(field + LongState::kKind, s);
      const float own = scale * list.weight_of(k);
      // z about its middle: the cross terms are then no larger than they must be.
      list.add(k, own * list.call.distill_unit * (of_s - of_z), own * (z - list.facts.student.middle()) * of_s);
    });
  }
};

}  // namespace pile::gpu
