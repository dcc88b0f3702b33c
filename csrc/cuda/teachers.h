// The teachers of a query: what they scored, their calibration, and the ensemble logit as their tilted mean.
//
// The state is one exponent per document (or per teacher), never a weight per document and teacher:
// s_i = Σ_m e^{a_i t_im} t_im / Σ_m e^{a_i t_im}, taken relative to the highest (a_i >= 0) or lowest teacher, so that every
// exponent is <= 0 and differences of close teachers are exact.
#pragma once

#include "order.h"

namespace pile::gpu {

// What one pass over some of a teacher's scores finds; parts are joined in order.
struct Moments {
  double count = 0, mean = 0, squares = 0;  // squares: Σ (t − mean)²
  Range range;

  PILE_DEVICE void join(const Moments& other) {
    range.join(other.range);
    if (other.count == 0) return;
    const double all = count + other.count, distance = other.mean - mean;
    mean += distance * other.count / all;
    squares += other.squares + distance * distance * count * other.count / all;
    count = all;
  }
};

// Of raw(m, i) for i in [begin, end), NaN = missing: kTeacherLanes lanes per teacher, `use(m, moments)` by their first. However
// many threads there are, the order of the additions is the same.
constexpr int kTeacherLanes = 8;
template <class Team, class Raw, class Use>
PILE_DEVICE void measure(const Team& team, int teachers, int begin, int end, Raw raw, Use use) {
  const Lanes lanes(kTeacherLanes);
  for (int m = team.rank / kTeacherLanes; m < teachers; m += team.size / kTeacherLanes) {
    Moments found;
    double sum = 0;
    float present = 0;
#pragma unroll 4
    for (int i = begin + lanes.rank; i < end; i += kTeacherLanes) {
      const float t = raw(m, i);
      found.range.join(t);
      sum += is_number(t) ? t : 0.0f;
      present += is_number(t) ? 1.0f : 0.0f;
    }
    found.range = lanes.joined(found.range);
    found.count = lanes.sum(present);
    found.mean = found.count > 0 ? lanes.sum(sum) / found.count : 0.0;
    double squares = 0;
#pragma unroll 4
    for (int i = begin + lanes.rank; i < end; i += kTeacherLanes) {
      const float t = raw(m, i);
      const double d = is_number(t) ? t - found.mean : 0.0;
      squares += d * d;
    }
    found.squares = lanes.sum(squares);
    if (lanes.rank == 0) use(m, found);
  }
}

// A teacher's calibration t̃ = (t − mean) · scale. In double: a mean far larger than the deviation must not cost float32
// digits, nor a scale beyond float32's range.
struct Calibration {
  double mean, scale;

  PILE_DEVICE Calibration(const Moments& of, Normalize normalize)
      : mean(normalize == Normalize::none ? 0.0 : of.mean), scale(1) {
    if (normalize == Normalize::none || normalize == Normalize::center) return;
    const double low = of.range.low, range = double(of.range.high) - low;
    if (normalize == Normalize::minmax) mean = low;
    // Constant by its extremes: the rounding of a constant's mean must not be blown up to unit scale.
    scale = !(range > 0) ? 0.0 : normalize == Normalize::minmax ? 1 / range : 1 / sqrt(of.squares / of.count);
  }
  PILE_DEVICE Calibration(double mean, double scale) : mean(mean), scale(scale) {}
  PILE_DEVICE float operator()(float t) const { return float((double(t) - mean) * scale); }
};

// What calibration starts from: a score, or a probability's logit, see pile_fast/reference.py; what is no number stays so. In
// double, where the difference of near ones keeps its digits and 1 - p is exact.
PILE_DEVICE float before_calibration(float score, Normalize normalize) {
  if (normalize != Normalize::logit || !is_number(score)) return score;
  const double epsilon = 0x1p-23, p = smaller(larger(double(score), epsilon), 1 - epsilon);
  return float(log(p / (1 - p)));
}

// Of logits as they are (Normalize::none): their middle, where it is large beside their range. Ensembles and pairs are
// differences, which have more digits without it, and off and on again it rounds nothing.
PILE_DEVICE float common_offset(const Range& of) {
  const float middle = of.low / 2 + of.high / 2;
  return of.high >= of.low && fabsf(middle) > 2 * (of.high - of.low) ? middle : 0.0f;
}

// A teacher's prior weight, of any dtype; what is no number above 0 counts as 0, and only that: a smaller number than float32
// has is its smallest.
constexpr float kLeastWeight = std::numeric_limits<float>::min();
PILE_DEVICE float prior_weight(const Call& call, int64_t query, int m) {
  const View& prior = call.batch.prior;
  if (!prior.data) return 1;
  const double weight = load_number(prior, query * prior.query + m * prior.teacher);
  return weight > 0 && weight < double(kInfinity) ? float(larger(weight, double(kLeastWeight))) : 0.0f;
}

// A score as calibration starts from it, NaN where there is none.
PILE_DEVICE float raw_score(const Call& call, const Query& query, int64_t i, int m) {
  const View& view = call.batch.teacher;
  if (!holds_document(call, query, i)) return not_a_number();
  return before_calibration(load_score(view, at(view, query, i) + m * view.teacher), call.ensemble.normalize);
}

// Its log weight to start from, the largest 0; -inf for a teacher that does not take part.
PILE_DEVICE float start_energy(const Call& call, int64_t query, int m) {
  if (!call.batch.prior.data) return 0;
  float top = 0;
#pragma unroll 1
  for (int other = 0; other < call.teachers(); ++other) top = fmaxf(top, prior_weight(call, query, other));
  const float own = prior_weight(call, query, m);
  return own > 0 ? logf(fmaxf(own / top, kLeastWeight)) : -kInfinity;
}

// What a query's pull on a teacher of that energy comes to; NaN where there is none.
PILE_DEVICE float pull_of(float energy, double pulled, double pairs) {
  return pairs > 0 && energy > -kInfinity ? float(pulled / pairs) : not_a_number();
}
// A query's label loss: 0 without a pair, but NaN beside the pulls, as theirs.
PILE_DEVICE float label_loss(const Call& call, double loss, double pairs) {
  return pairs > 0 ? float(loss / pairs) : call.out.pulls ? not_a_number() : 0.0f;
}

// One query's teachers as its pair sums see them.
struct Teachers {
  const float* t;       // [M][stride], calibrated
  const float* energy;  // [M] log weights but for a constant, -inf: takes no part; then [M] weights, their softmax
  const float *low, *high;
  int64_t stride;
  int count;
  bool by_document, plain;  // plain: no score is missing and, by document, no prior given

  PILE_DEVICE float weight(int m) const { return energy[count + m]; }
  PILE_DEVICE float score(int m, int row) const { return t[m * stride + row]; }

  PILE_DEVICE Range range(int row) const {
    Range range;
#pragma unroll 1
    for (int m = 0; m < count; ++m) range.join(score(m, row));
    return range;
  }

  // The exponents' reference and their largest value.
  struct Tilt {
    float slope, reference, top;
  };
  PILE_DEVICE Tilt tilt(int k, int row, float exponent) const {
    Tilt tilt = {by_document ? exponent : 0.0f, exponent >= 0 ? high[k] : low[k], 0};
    if (plain) return tilt;  // by document the reference's own, 0
    tilt.top = -kInfinity;
    for (int m = 0; m < count; ++m) tilt.top = fmaxf(tilt.top, tilt.slope * (score(m, row) - tilt.reference) + energy[m]);
    return tilt;
  }
  PILE_DEVICE float share(const Tilt& tilt, int m, float d) const {
    if (plain) return by_document ? exp_fast(tilt.slope * d) : weight(m);
    return is_number(d) ? exp_fast(tilt.slope * d + energy[m] - tilt.top) : 0.0f;
  }

  // Ensemble logit of position k, whose scores stand in row `row`, at exponent a_k.
  PILE_DEVICE float logit(int k, int row, float exponent) const {
    const Tilt at = tilt(k, row, exponent);
    float mass = 0, moment = 0;
#pragma unroll 4
    for (int m = 0; m < count; ++m) {
      const float d = score(m, row) - at.reference, e = share(at, m, d);
      mass += e;
      moment += e > 0 ? e * d : 0.0f;
    }
    // Rounding must not leave the teachers' range.
    return fminf(fmaxf(at.reference + moment * reciprocal(mass), low[k]), high[k]);
  }

  // Its teachers' weights to to[0, M); 0 where none scored it.
  PILE_DEVICE void weights(int k, int row, bool scored, float exponent, float* to) const {
    if (!scored) {
      for (int m = 0; m < count; ++m) to[m] = 0;
      return;
    }
    const Tilt at = tilt(k, row, exponent);
    float mass = 0;
#pragma unroll 1
    for (int m = 0; m < count; ++m) mass += share(at, m, score(m, row) - at.reference);
#pragma unroll 1
    for (int m = 0; m < count; ++m) to[m] = share(at, m, score(m, row) - at.reference) / mass;
  }

  // Weights that documents share: what the teachers present at the document hold of the query's weight.
  PILE_DEVICE float held(int row) const {
    if (plain) return 1;
    float held = 0;
#pragma unroll 1
    for (int m = 0; m < count; ++m) held += is_number(score(m, row)) ? weight(m) : 0.0f;
    return fmaxf(held, float(kMinShare));
  }

  // Weights that documents share: use(m, Σ force_k (t_km − s_k)) over positions [begin, end), kTeacherLanes lanes to a teacher.
  template <class Team, class Row, class Force, class Use>
  PILE_DEVICE void pull(const Team& team, int begin, int end, Row row, Force force, const float* s, Use use) const {
    const Lanes lanes(kTeacherLanes);
    for (int m = team.rank / kTeacherLanes; m < count; m += team.size / kTeacherLanes) {
      double pulled = 0;
      for (int k = begin + lanes.rank; k < end; k += kTeacherLanes) {
        const float d = score(m, row(k)) - s[k];
        pulled += is_number(d) ? force(k) * d : 0.0f;
      }
      pulled = lanes.sum(pulled);
      if (lanes.rank == 0) use(m, pulled);
    }
  }
};

// Softmax of the energies [M] to the weights behind them; 0 where none takes part. Callers put a barrier before and after.
template <class Team>
PILE_DEVICE void refresh_weights(const Team& team, float* energy, int teachers) {
  float top = -kInfinity, total = 0;
#pragma unroll 1
  for (int m = 0; m < teachers; ++m) top = fmaxf(top, energy[m]);
  if (!(top > -kInfinity)) top = 0;
#pragma unroll 1
  for (int m = 0; m < teachers; ++m) total += expf(energy[m] - top);
#pragma unroll 1
  for (int m = team.rank; m < teachers; m += team.size) energy[teachers + m] = total > 0 ? expf(energy[m] - top) / total : 0.0f;
}

}  // namespace pile::gpu
