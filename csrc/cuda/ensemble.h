// The ensemble of one query by one team of threads: calibrate the teachers, then T exponentiated-gradient steps on their
// weights, or none, and how the query pulls on weights that all queries share.
#pragma once

#include "pairs.h"
#include "teachers.h"

namespace pile::gpu {

// Read a query's tensors into the workspace, everything at once: one wait for the memory, not one per phase.
template <class Team>
PILE_DEVICE void stage(const Call& call, const Query& query, const Team& team, const Workspace& w) {
  const Batch& batch = call.batch;
  const int teachers = call.teachers();
  if (call.has_ensemble) copy_teachers(call, query, team, w.teachers, w.stride);
  for (int m = team.rank; m < teachers; m += team.size) w.energy(teachers)[m] = start_energy(call, query.index, m);
  const bool with_labels = call.by_pairs() || call.ranks();
  const bool with_target = call.distills() && !call.has_ensemble;
  for (int i = team.rank; i < query.n; i += team.size) {
    const int64_t key = slot_key(call, query, i, with_labels, !call.has_ensemble);
    w.keys()[i] = key;
    w.whole(w.kSlot)[i] = i;
    // Under the mask nothing is read.
    if (call.has_loss) w.field(w.kStudent)[i] = key == kAbsent ? 0.0f : load_logit(batch.student, at(batch.student, query, i));
    if (with_target)
      w.field(w.kLogit)[i] = key == kAbsent ? not_a_number() : load_score(batch.target, at(batch.target, query, i));
  }
  team.sync();
}

template <class Team>
class EnsembleQuery {
 public:
  PILE_DEVICE EnsembleQuery(const Call& call, const Query& query, const Team& team, const Workspace& w)
      : call_(call), query_(query), team_(team), w_(w), count_(call.teachers()), lanes_(kLanes), slot_(w.whole(w.kSlot)) {}

  // From the staged tensors to logits by slot in w.kLogit (NaN: no teacher scored the document) and the outputs asked for.
  PILE_DEVICE Counts run() {
    inspect();
    calibrate();
    if (call_.by_pairs()) order();
    start();
    for (int it = 0;; ++it) {
      const bool last = it == int(call_.ensemble.iterations);
      trace(it);
      if (last && !call_.out.pulls) break;
      pull(it & 1);
      if (!call_.by_document()) pull_teachers(last);
      if (last) break;
      if (!call_.by_document()) reweight();
    }
    team_.sync();
    finish();
    return counts_;
  }

 private:
  PILE_DEVICE Teachers teachers() const {
    return {w_.teachers, w_.energy(count_), w_.field(w_.kLow), w_.field(w_.kHigh), w_.stride, count_, call_.by_document(),
            plain_};
  }

  // Which scores take part, and which documents no teacher scored: for the order their keys say so.
  PILE_DEVICE void inspect() {
    double missing = 0;
    for (int i = team_.rank; i < query_.n; i += team_.size) {
      const int64_t key = w_.keys()[i];
      int present = 0;
#pragma unroll 1
      for (int m = 0; m < count_; ++m) {
        float* t = w_.teachers + m * w_.stride + i;
        if (key == kAbsent || !(w_.energy(count_)[m] > -kInfinity)) *t = not_a_number();
        *t = before_calibration(finite_or_nan(*t), call_.ensemble.normalize);
        present += is_number(*t);
      }
      if (call_.by_pairs() && key != kAbsent && present == 0) w_.keys()[i] = kUnscored;
      if (present > 0) missing += count_ - present;
    }
    plain_ = team_.sum(missing) == 0 && !(call_.by_document() && call_.batch.prior.data);
    team_.sync();
  }

  PILE_DEVICE void calibrate() {
    const Normalize normalize = call_.ensemble.normalize;
    measure(
        team_, count_, 0, query_.n, [&](int m, int i) { return w_.teachers[m * w_.stride + i]; },
        [&](int m, const Moments& of) {
          const Calibration own(of, normalize);
          w_.mean()[m] = own.mean;
          w_.scale(count_)[m] = own.scale;
          if (!(of.count > 0)) w_.energy(count_)[m] = -kInfinity;
        });
    team_.sync();
    float common = 0;
    if (normalize == Normalize::none) {
      Range raw;
      for (int m = 0; m < count_; ++m)
        for (int i = team_.rank; i < query_.n; i += team_.size) raw.join(w_.teachers[m * w_.stride + i]);
      common = common_offset(joined(team_, raw));
      if (team_.rank == 0) w_.mean()[0] = common;  // for finish()
    }
    Range range;
#pragma unroll 1
    for (int m = 0; m < count_; ++m) {
      const Calibration own(normalize == Normalize::none ? double(common) : w_.mean()[m], w_.scale(count_)[m]);
      for (int i = team_.rank; i < query_.n; i += team_.size) {
        float* t = w_.teachers + m * w_.stride + i;
        *t = own(*t);
        range.join(*t);
      }
    }
    refresh_weights(team_, w_.energy(count_), count_);
    if (!call_.by_pairs()) return;
    range = joined(team_, range);
    range = {range.low * call_.per_unit, range.high * call_.per_unit};
    wide_ = range.wide(call_.offset);
    middle_ = range.middle();
  }

  // By falling label; without it positions are slots.
  PILE_DEVICE void order() {
    sort_keys(team_, w_.keys(), slot_, query_.n);
    counts_ = Counts::of(w_.keys(), query_.n);
    weigh_order(team_, w_, gain_of(call_.ensemble.pair_weight), counts_.labelled);
    pairs_ = sum_pairs(team_, w_, counts_.labelled);
    team_.sync();
  }

  PILE_DEVICE bool leads() const { return lanes_.rank == 0; }
  // Does the loop keep s itself? For the trace, and for the teachers' pulls.
  PILE_DEVICE bool keeps_logits() const { return call_.out.trace || !call_.by_document(); }

  PILE_DEVICE void set_logit(int k, float s, int to) const {
    const float u = s * call_.per_unit;
    w_.field(to ? w_.kU1 : w_.kU0)[k] = wide_ ? u : expf(middle_ - u);
    if (keeps_logits()) w_.field(w_.kLogit)[k] = s;
  }

  PILE_DEVICE void start() {
    const Teachers of = teachers();
    for (int k = team_.rank; k < query_.n; k += team_.size) {
      const Range range = of.range(slot_[k]);
      w_.field(w_.kLow)[k] = range.low;
      w_.field(w_.kHigh)[k] = range.high;
      w_.field(w_.kExponent)[k] = 0;
      if (k < counts_.labelled) set_logit(k, of.logit(k, slot_[k], 0), 0);
    }
    team_.sync();
  }

  // λ of every labelled document; by document also its new exponent and logit.
  PILE_DEVICE void pull(int read) {
    const int labelled = counts_.labelled;
    const float *u = w_.field(call_.by_document() && read ? w_.kU1 : w_.kU0), *gains = w_.field(w_.kGain);
    LabelColumns columns({u, gains, w_.whole(w_.kFirst), w_.whole(w_.kLast)}, wide_,
                         call_.ensemble.pair_weight != PairWeight::none, call_.offset);
    columns.window = {u, gains, 0, labelled, 0, labelled};
    const bool alone = !Team::kOneWarp && call_.rows == 1;
    const int rows = alone ? 1 : 4, step = team_.size / kLanes * rows;
    // Every four lanes take a row, or four of them, in turn.
    for (int row = team_.rank / kLanes * rows; row < labelled; row += step) {
      const float pulled =
          alone ? pull_rows<1>(columns, row, labelled - 1, lanes_) : pull_rows<4>(columns, row, labelled - 1, lanes_);
      const int k = alone ? row : row + lanes_.rank;
      if (alone ? leads() : k < labelled) move(k, pulled - w_.field(w_.kAbove)[k], 1 - read);
    }
    team_.sync();
  }
  PILE_DEVICE void move(int k, float lambda, int write) const {
    const Teachers of = teachers();
    float& exponent = w_.field(w_.kExponent)[k];
    if (!call_.by_document()) {
      exponent = lambda / of.held(slot_[k]);
      return;
    }
    exponent += call_.step * (lambda * w_.field(w_.kPerPair)[k]);
    set_logit(k, of.logit(k, slot_[k], exponent), write);
  }

  // Weights that documents share: the pulls on the teachers, into their energies or, the last ones, into the output.
  PILE_DEVICE void pull_teachers(bool last) const {
    const float *force = w_.field(w_.kExponent), *s = w_.field(w_.kLogit);
    float* const energy = w_.energy(count_);
    teachers().pull(
        team_, 0, counts_.labelled, [&](int k) { return slot_[k]; }, [&](int k) { return force[k]; }, s,
        [&](int m, double pulled) {
          if (last)
            static_cast<float*>(call_.out.pulls)[query_.index * count_ + m] = pull_of(energy[m], pulled, pairs_);
          else if (pairs_ > 0)
            energy[m] += float(call_.ensemble.step_size * pulled / pairs_);
        });
    team_.sync();
  }
  // Every logit by the new energies.
  PILE_DEVICE void reweight() {
    refresh_weights(team_, w_.energy(count_), count_);
    team_.sync();
    const Teachers of = teachers();
    for (int k = team_.rank; k < counts_.labelled; k += team_.size) set_logit(k, of.logit(k, slot_[k], 0), 0);
    team_.sync();
  }

  // The label loss before iteration `it`.
  PILE_DEVICE void trace(int it) {
    if (!call_.out.trace) return;
    const bool weighted = call_.ensemble.pair_weight != PairWeight::none;
    const LossColumns columns = {w_.field(w_.kLogit), w_.field(w_.kGain), weighted, call_.per_unit, call_.offset};
    float* losses = w_.field(call_.by_document() && (it & 1) ? w_.kU0 : w_.kU1);  // not read by this iteration
    for (int k = team_.rank / kLanes; k < counts_.labelled; k += team_.size / kLanes) {
      SlopeAndLoss sums;
      add_losses<true>(columns, columns.u[k], weighted ? columns.gains[k] : 0.0f, w_.whole(w_.kLast)[k], counts_.labelled,
                       lanes_, sums);
      const float loss = lanes_.sum(sums.loss);
      if (leads()) losses[k] = loss;
    }
    team_.sync();
    const double loss = ordered_sum(team_, counts_.labelled, [&](int k) { return losses[k]; });
    team_.sync();
    if (team_.rank == 0) {
      float* to = static_cast<float*>(call_.out.trace) + query_.index * (call_.ensemble.iterations + 1);
      to[it] = label_loss(call_, loss, pairs_);
    }
  }

  // Outputs, and logits by slot.
  PILE_DEVICE void finish() {
    const Teachers of = teachers();
    float* logits = static_cast<float*>(call_.out.logits);
    float* weights = static_cast<float*>(call_.out.weights);
    const float common = call_.ensemble.normalize == Normalize::none ? float(w_.mean()[0]) : 0.0f;
    for (int k = team_.rank; k < query_.n; k += team_.size) {
      const int slot = slot_[k];
      const bool scored = w_.field(w_.kLow)[k] <= w_.field(w_.kHigh)[k];
      const float exponent = scored && call_.by_document() ? w_.field(w_.kExponent)[k] : 0.0f;
      const float s = scored ? of.logit(k, slot, exponent) : not_a_number();
      w_.field(w_.kLogit)[slot] = s;
      if (logits) logits[query_.output + slot] = s + common;
      if (weights && call_.by_document()) of.weights(k, slot, scored, exponent, weights + (query_.output + slot) * count_);
    }
    if (weights && !call_.by_document())
      for (int m = team_.rank; m < count_; m += team_.size) weights[query_.index * count_ + m] = w_.energy(count_)[count_ + m];
    team_.sync();
  }

  const Call& call_;
  const Query& query_;
  const Team& team_;
  const Workspace& w_;
  const int count_;
  const Lanes lanes_;
  int* const slot_;
  Counts counts_;
  bool wide_ = false, plain_ = false;
  double pairs_ = 0;
  float middle_ = 0;  // of the range of u
};

}  // namespace pile::gpu
