// The student's loss of one query with its gradient, by one team of threads: alpha · D + (1 − alpha) · R.
#pragma once

#include "ensemble.h"
#include "terms.h"

namespace pile::gpu {

template <class Team>
class LossQuery : public TermList<Team, true> {
 public:
  using List = TermList<Team, true>;
  using List::begin, List::call, List::columns, List::end, List::facts, List::first, List::gain, List::labelled, List::last,
      List::loss, List::slope, List::slot, List::student, List::target, List::team, List::tile, List::weight;

  PILE_DEVICE LossQuery(const Call& call, const Query& query, const Team& team, const Workspace& w)
      : List{call, team}, query_(query), w_(w) {
    student = w.field(w.kPlainStudent);
    target = w.field(w.kLogit);
    gain = w.field(w.kGain);
    first = w.whole(w.kFirst);
    last = w.whole(w.kLast);
    slot = w.whole(w.kSlot);
    slope = w.field(w.kSlope);
    loss = w.field(w.kLoss);
    tile = {w.field(w.kTileStudent), w.field(w.kTileTarget), w.field(w.kTileStudentMore), w.field(w.kTileTargetMore)};
  }

  // From the staged tensors and the ensemble; of one that went by pairs these are the counts, its order still in place.
  PILE_DEVICE void run(const Counts& of_ensemble) {
    counts_ = of_ensemble;
    const bool weighted = call.batch.weights.data != nullptr;
    if (!call.by_pairs()) {
      counts_ = {0, query_.n, query_.n};
      if (weighted && call.has_ensemble) renew_keys();
      if (call.ranks() || call.batch.mask.data || weighted) order();
    } else if (weighted || (call.ranks() && !keeps_order())) {
      renew_keys();
      order();
    }
    load();
    bool learns = false;
    for_terms(call, facts, [&](auto of, auto term, float scale) {
      learns = true;
      if (facts.broken) return;
      of.add(term, *this, scale);
      team.sync();
    });
    const double total = facts.broken ? not_a_number() : ordered_sum(team, end, [&](int k) { return loss[k]; });
    if (call.out.gradient)
      for (int k = team.rank; k < query_.n; k += team.size)
        store_gradient(call, query_.output + slot[k], k >= end ? 0.0f : facts.broken ? not_a_number() : slope[k]);
    if (team.rank > 0) return;
    call.losses[query_.index] = float(total);
    call.has_pairs[query_.index] = learns;
  }

  PILE_DEVICE double mean_difference() const {
    const double sum = ordered_sum(team, end, [&](int k) {
      const float s = this->scaled_target(k);
      return is_number(s) ? this->weight_of(k) * (double(this->scaled_student(k)) - double(s)) : 0.0;
    });
    return sum / facts.target_weight;
  }
  template <class Parts>
  PILE_DEVICE double sum(const Parts& parts, int which) const {
    return this->sum_own([&](int k) { return parts(which, k); });
  }
  PILE_DEVICE Range label_range() const {
    Range range;
    this->each([&](int k) {
      if (k < labelled) range.join(student[k]);
    });
    return joined(team, range);
  }
  template <class Load, class Use>
  PILE_DEVICE void tiles(Load load, Use use) const {
    const int to = (columns + 3) / 4 * 4;
    for (int k = team.rank; k < to; k += team.size) load(k, k);
    team.sync();
    use(0, to);
  }
  // By position, floats that a label term has for itself; which < 2.
  PILE_DEVICE float* own_field(int which) const { return which ? tile.target_more : tile.student_more; }
  template <class Use>
  PILE_DEVICE void label_tiles(const float* more, Use use) const {
    const LossColumns columns = {student, gain, call.label_gain != LabelGain::none, 1, 0, weight, more};
    use(LabelTile{columns, 0, labelled, 0, 0, labelled});
  }

 private:
  // Is the ensemble's order the loss's? Not where a document that no teacher scored still counts in R, nor for other gains.
  PILE_DEVICE bool keeps_order() const {
    return counts_.scored == counts_.valid && call.label_gain == gain_of(call.ensemble.pair_weight);
  }
  PILE_DEVICE void renew_keys() {
    for (int i = team.rank; i < query_.n; i += team.size) {
      w_.keys()[i] = slot_key(call, query_, i, call.ranks(), true);
      slot[i] = i;
    }
    team.sync();
  }
  PILE_DEVICE void order() {
    sort_keys(team, w_.keys(), slot, query_.n);
    counts_ = Counts::of(w_.keys(), query_.n);
    if (call.ranks()) {
      facts.broken = has_negative_gain(call.label_gain, w_.keys(), counts_.labelled);
      weigh_order(team, w_, call.label_gain, counts_.labelled);
    }
    team.sync();
  }
  // The student and the weights by position, and the facts.
  PILE_DEVICE void load() {
    facts.weight = query_weight(call, query_);
    if (facts.weight == 0) counts_ = {};
    begin = 0;
    end = columns = counts_.valid;
    labelled = counts_.labelled;
    double broken = facts.broken || !is_number(facts.weight), targets = 0;
    Range of_student, of_target;
    for (int k = team.rank; k < end; k += team.size) {
      const float z = w_.field(w_.kStudent)[slot[k]], s = call.distills() ? target[slot[k]] : not_a_number();
      w_.field(w_.kPlainStudent)[k] = z;
      broken += fabsf(z) < kInfinity ? 0 : 1;
      if (!is_number(s)) continue;
      targets += 1;
      of_student.join(z);
      of_target.join(s);
    }
    if (call.batch.weights.data) {
      team.sync();
      weight = w_.field(w_.kWeight);
      for (int k = team.rank; k < end; k += team.size) {
        const float c = document_weight(call, query_, slot[k]);
        w_.field(w_.kWeight)[k] = c;
        broken += is_number(c) ? 0 : 1;
      }
    }
    facts.broken = team.sum(broken) > 0;
    if (call.distills()) {
      facts.targets = team.sum(targets);
      facts.settle(joined(team, of_student), joined(team, of_target), call.distill_unit);
      facts.target_weight = facts.targets;
    }
    team.sync();
    if (call.distills() && weight) {
      const auto of_target = [&](int k) { return is_number(this->scaled_target(k)) ? weight[k] : 0.0f; };
      facts.target_weight = ordered_sum(team, end, of_target);
    }
    // What pairs weigh lies where slopes and losses will.
    if (call.ranks()) {
      if (!takes_gains(call.label_gain)) facts.pairs = sum_pairs(team, w_, labelled);
      with_loss(call.loss.label_loss, [&](auto of, auto term) { facts.pairs = of.total(term, *this); });
      team.sync();
    }
    for (int k = team.rank; k < end; k += team.size) slope[k] = loss[k] = 0;
    team.sync();
  }

  const Query& query_;
  const Workspace& w_;
  Counts counts_;
};

}  // namespace pile::gpu
