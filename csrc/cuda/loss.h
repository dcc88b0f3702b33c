// The student's loss of one query with its gradient, by one team of threads: alpha · D + (1 − alpha) · R.
#pragma once

#include "ensemble.h"

namespace pile {
namespace gpu {

template <class Team>
class LossQuery {
 public:
  PILE_DEVICE LossQuery(const Call& call, const Query& query, const Team& team, const Workspace& w)
      : call_(call), query_(query), team_(team), w_(w), lanes_(kLanes), slot_(w.whole(w.kSlot)) {}

  // After the ensemble, whose counts these are, with its order still in place.
  PILE_DEVICE void run_after(Counts counts) {
    counts_ = counts;
    if (call_.ranks()) {
      if (counts.scored < counts.valid) {
        // A document that no teacher scored still counts in R.
        for (int i = team_.rank; i < query_.n; i += team_.size) {
          w_.keys()[i] = slot_key(call_, query_, i, true);
          slot_[i] = i;
        }
        team_.sync();
        order();
      } else {
        pairs_ = sum_pairs(team_, w_, counts.labelled);
      }
    }
    run();
  }
  // Alone, from the staged tensors.
  PILE_DEVICE void run_alone() {
    if (call_.ranks() || call_.batch.mask.data)
      order();
    else
      counts_ = {0, query_.n, query_.n};
    run();
  }

 private:
  PILE_DEVICE void order() {
    sort_keys(team_, w_.keys(), slot_, query_.n);
    counts_ = Counts::of(w_.keys(), query_.n);
    if (call_.ranks()) pairs_ = weigh_pairs(team_, w_, call_.loss.pair_weight, counts_.labelled);
    team_.sync();
  }
  PILE_DEVICE void run() {
    load();
    const LossOptions& options = call_.loss;
    const bool mse = call_.mse;
    const double distilled = targets_ * (targets_ - 1) / 2;
    const float distill_scale = distilled > 0 ? float(options.alpha / distilled) : 0.0f;
    const float label_scale = pairs_ > 0 ? float((1 - options.alpha) / pairs_) : 0.0f;
    float* losses = w_.field(w_.kPerPair);
    if (!broken_) {
      for (int k = team_.rank / kLanes; k < counts_.valid; k += team_.size / kLanes) {
        float slope = 0, gradient = 0, loss = 0, total = 0;
        if (distill_scale > 0) {
          distill(k, mse, slope, loss);
          gradient += distill_scale * call_.per_tau * lanes_.sum(slope);
          total += distill_scale * loss;
        }
        if (label_scale > 0 && k < counts_.labelled) {
          slope = loss = 0;
          options.pair_weight != PairWeight::none ? rank<true>(k, slope, loss) : rank<false>(k, slope, loss);
          gradient -= label_scale * lanes_.sum(slope);
          total += label_scale * loss;
        }
        total = lanes_.sum(total);
        if (lanes_.rank == 0) losses[k] = total;
        if (call_.out.gradient && lanes_.rank == 0) store_gradient(call_, query_.output + slot_[k], gradient);
      }
    }
    team_.sync();
    const double total = broken_ ? not_a_number() : ordered_sum(team_, counts_.valid, [&](int k) { return losses[k]; });
    if (call_.out.gradient)
      for (int k = team_.rank + (broken_ ? 0 : counts_.valid); k < query_.n; k += team_.size)
        store_gradient(call_, query_.output + slot_[k], k < counts_.valid ? not_a_number() : 0.0f);
    if (team_.rank == 0) {
      call_.losses[query_.index] = float(total);
      call_.has_pairs[query_.index] = distilled > 0 || pairs_ > 0;
    }
  }

  // Student and target by position, and what the pair sums want of them.
  PILE_DEVICE void load() {
    const bool mse = call_.mse;
    float *z = w_.field(w_.kPlainStudent), *scaled_z = w_.field(w_.kScaledStudent), *scaled_s = w_.field(w_.kScaledTarget);
    double broken = 0, targets = 0;
    float low[2] = {kInfinity, kInfinity}, high[2] = {-kInfinity, -kInfinity};
    // Divided is only what has been subtracted: large logits would lose their differences. An ensemble's have no offset left.
    const float z_pivot = counts_.valid > 0 ? w_.field(w_.kStudent)[slot_[0]] : 0.0f;
    float s_pivot = 0;
    if (call_.distills() && !call_.has_ensemble) {
      for (int k = team_.rank; k < counts_.valid; k += team_.size) low[1] = fminf(low[1], w_.field(w_.kLogit)[slot_[k]]);
      s_pivot = lowest(team_, low[1]);
      s_pivot = s_pivot < kInfinity ? s_pivot : 0.0f;
      low[1] = kInfinity;
    }
    columns_ = call_.distills() ? (counts_.valid + 3) / 4 * 4 : 0;
    for (int k = team_.rank; k < larger(counts_.valid, columns_); k += team_.size) {
      const bool valid = k < counts_.valid;
      const float own = valid ? w_.field(w_.kStudent)[slot_[k]] : 0.0f;
      if (valid) {
        z[k] = own;
        broken += fabsf(own) < kInfinity ? 0 : 1;
      }
      if (!call_.distills()) continue;
      const float target = valid ? w_.field(w_.kLogit)[slot_[k]] : not_a_number();
      const bool used = is_number(target);
      scaled_z[k] = used ? (own - z_pivot) * call_.per_tau : DistillColumns::kNeutral;
      scaled_s[k] = used ? (target - s_pivot) * call_.per_tau : DistillColumns::kNeutral;
      if (!used) continue;
      targets += 1;
      low[0] = fminf(low[0], scaled_z[k]);
      high[0] = fmaxf(high[0], scaled_z[k]);
      low[1] = fminf(low[1], scaled_s[k]);
      high[1] = fmaxf(high[1], scaled_s[k]);
    }
    broken_ = team_.sum(broken) > 0;
    if (!call_.distills()) {
      team_.sync();
      return;
    }
    targets_ = team_.sum(targets);
    if (mse) {
      team_.sync();
      const double sum = ordered_sum(team_, counts_.valid, [&](int k) {
        return scaled_s[k] != DistillColumns::kNeutral ? double(scaled_z[k]) - double(scaled_s[k]) : 0.0;
      });
      mean_difference_ = targets_ > 0 ? sum / targets_ : 0.0;
      return;
    }
    Range ranges[2];
    for (int r = 0; r < 2; ++r) ranges[r] = {lowest(team_, low[r]), -lowest(team_, -high[r])};
    wide_ = ranges[0].wide(0) || ranges[1].wide(0);
    for (int k = team_.rank; !wide_ && k < columns_; k += team_.size) {
      const bool used = scaled_s[k] != DistillColumns::kNeutral;
      w_.field(w_.kStudentPower)[k] = used ? expf(scaled_z[k] - ranges[0].middle()) : 0.0f;
      w_.field(w_.kTargetPower)[k] = used ? expf(scaled_s[k] - ranges[1].middle()) : 0.0f;
    }
    team_.sync();
  }

  PILE_DEVICE void distill(int k, bool mse, float& slope, float& loss) const {
    const DistillColumns columns = {w_.field(w_.kScaledStudent), w_.field(w_.kScaledTarget), w_.field(w_.kStudentPower),
                                    w_.field(w_.kTargetPower)};
    if (columns.s[k] == DistillColumns::kNeutral) return;
    if (mse) {
      // Σ_{i<j} (d_i − d_j)² = n Σ (d_i − mean)², d = z − s
      if (lanes_.rank > 0) return;
      const double d = double(columns.z[k]) - double(columns.s[k]) - mean_difference_;
      slope = float(2 * targets_ * d);
      loss = float(targets_ * d * d);
      return;
    }
    const DistillRow row = {k, columns.z[k], columns.s[k], columns.z_power[k], columns.s_power[k]};
    if (wide_)
      distill_wide(columns, row, 0, columns_, lanes_, slope, loss);
    else
      distill_narrow(columns, row, 0, columns_, lanes_, slope, loss);
  }

  template <bool kWeighted>
  PILE_DEVICE void rank(int k, float& slope, float& loss) const {
    const float *z = w_.field(w_.kPlainStudent), *gains = w_.field(w_.kGain);
    const float gain = kWeighted ? gains[k] : 0.0f;
    float above = 0;
    label_losses<true, kWeighted>(z, gains, z[k], gain, 1, 0, w_.whole(w_.kLast)[k], counts_.labelled, lanes_, slope, loss);
    label_losses<false, kWeighted>(z, gains, z[k], gain, 1, 0, 0, w_.whole(w_.kFirst)[k], lanes_, above, loss);
    slope -= above;
  }

  const Call& call_;
  const Query& query_;
  const Team& team_;
  const Workspace& w_;
  const Lanes lanes_;
  int* const slot_;
  Counts counts_;
  bool broken_ = false, wide_ = false;
  int columns_ = 0;
  double pairs_ = 0, targets_ = 0, mean_difference_ = 0;
};

}  // namespace gpu
}  // namespace pile
