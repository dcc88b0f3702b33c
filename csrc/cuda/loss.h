// The student's loss of one query with its gradient, by one team of threads: alpha · D + (1 − alpha) · R.
#pragma once

#include "ensemble.h"
#include "terms.h"

namespace pile::gpu {

template <class Team>
class LossQuery : public TermList<Team, true> {
 public:
  using List = TermList<Team, true>;
  using List::begin, List::call, List::columns, List::end, List::facts, List::first, List::gain, List::last, List::loss,
      List::slope, List::slot, List::student, List::target, List::team, List::tile;

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
    if (!call.by_pairs()) {
      counts_ = {0, query_.n, query_.n};
      if (call.ranks() || call.batch.mask.data) order();
    } else if (call.ranks()) {
      if (counts_.scored < counts_.valid) {
        // A document that no teacher scored still counts in R.
        for (int i = team.rank; i < query_.n; i += team.size) {
          w_.keys()[i] = slot_key(call, query_, i, true);
          slot[i] = i;
        }
        team.sync();
        order();
      } else {
        facts.pairs = sum_pairs(team, w_, counts_.labelled);
      }
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
      return is_number(s) ? double(this->scaled_student(k)) - double(s) : 0.0;
    });
    return sum / facts.targets;
  }
  template <class Load, class Use>
  PILE_DEVICE void tiles(Load load, Use use) const {
    const int to = (columns + 3) / 4 * 4;
    for (int k = team.rank; k < to; k += team.size) load(k, k);
    team.sync();
    use(0, to);
  }
  template <class Use>
  PILE_DEVICE void label_tiles(Use use) const {
    use(LabelTile{{student, gain, call.loss.pair_weight != PairWeight::none}, 0, counts_.labelled, 0, 0, counts_.labelled});
  }

 private:
  PILE_DEVICE void order() {
    sort_keys(team, w_.keys(), slot, query_.n);
    counts_ = Counts::of(w_.keys(), query_.n);
    if (call.ranks()) facts.pairs = weigh_pairs(team, w_, call.loss.pair_weight, counts_.labelled);
    team.sync();
  }
  // The student by position, and the facts.
  PILE_DEVICE void load() {
    begin = 0;
    end = columns = counts_.valid;
    double broken = 0, targets = 0;
    Range of_student, of_target;
    for (int k = team.rank; k < end; k += team.size) {
      const float z = w_.field(w_.kStudent)[slot[k]], s = call.distills() ? target[slot[k]] : not_a_number();
      w_.field(w_.kPlainStudent)[k] = z;
      slope[k] = loss[k] = 0;
      broken += fabsf(z) < kInfinity ? 0 : 1;
      if (!is_number(s)) continue;
      targets += 1;
      of_student.join(z);
      of_target.join(s);
    }
    facts.broken = team.sum(broken) > 0;
    if (call.distills()) {
      facts.targets = team.sum(targets);
      facts.settle(joined(team, of_student), joined(team, of_target), call.distill_unit);
    }
    team.sync();
  }

  const Query& query_;
  const Workspace& w_;
  Counts counts_;
};

}  // namespace pile::gpu
