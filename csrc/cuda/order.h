// The documents of a query by falling label: the layout every pair sum works in. A document's label pairs are then the
// positions before its label's first and after its last; equal labels never meet.
#pragma once

#include "load.h"

namespace pile::gpu {

// A key per slot: smaller for a larger label, then the unlabelled documents, those no teacher scored, the slots without a
// document.
constexpr int64_t kAbsent = std::numeric_limits<int64_t>::max(), kUnscored = kAbsent - 1, kUnlabelled = kAbsent - 2;

// A double's bits as an integer of the same order; and back.
PILE_DEVICE int64_t in_order(int64_t bits) { return bits ^ (bits >> 63 & std::numeric_limits<int64_t>::max()); }
PILE_DEVICE int64_t label_key(double label) {
  if (!(fabs(label) < double(kInfinity))) return kUnlabelled;  // NaN; or infinite, which orders nothing
  return ~in_order(__double_as_longlong(label + 0.0));         // 0 and -0 are one label
}
PILE_DEVICE double label_of(int64_t key) { return __longlong_as_double(in_order(~key)); }

// of_loss: a document of weight 0 is absent, which the ensemble sees.
PILE_DEVICE int64_t slot_key(const Call& call, const Query& query, int64_t i, bool with_labels, bool of_loss) {
  if (!(of_loss ? counts_in_loss(call, query, i) : holds_document(call, query, i))) return kAbsent;
  const View& labels = call.batch.labels;
  return with_labels ? label_key(load_number(labels, at(labels, query, i))) : kUnlabelled;
}

// Bitonic sort by (key, slot), ascending, for any n: what lies beyond n counts as largest and never moves.
template <class Team>
PILE_DEVICE void sort_keys(const Team& team, int64_t* keys, int* slots, int n) {
  auto exchange = [&](int i, int partner) {
    if (partner <= i || partner >= n) return;
    const int64_t a = keys[i], b = keys[partner];
    const int slot_a = slots[i], slot_b = slots[partner];
    if (a < b || (a == b && slot_a < slot_b)) return;
    keys[i] = b;
    keys[partner] = a;
    slots[i] = slot_b;
    slots[partner] = slot_a;
  };
  for (int size = 2; size / 2 < n; size *= 2) {
    for (int i = team.rank; i < n; i += team.size) exchange(i, i ^ (size - 1));
    team.sync();
    for (int stride = size / 4; stride > 0; stride /= 2) {
      for (int i = team.rank; i < n; i += team.size) exchange(i, i ^ stride);
      team.sync();
    }
  }
}

// First position in [begin, end) whose key is not below `key`.
PILE_DEVICE int lower_bound(const int64_t* keys, int begin, int end, int64_t key) {
  while (begin < end) {
    const int middle = (begin + end) / 2;
    if (keys[middle] < key)
      begin = middle + 1;
    else
      end = middle;
  }
  return begin;
}

// How many positions, from the front, hold a labelled document; one some teacher scored; a document.
struct Counts {
  int labelled = 0, scored = 0, valid = 0;
  PILE_DEVICE static Counts of(const int64_t* keys, int n) {
    Counts counts;
    counts.labelled = lower_bound(keys, 0, n, kUnlabelled);
    counts.scored = lower_bound(keys, counts.labelled, n, kUnscored);
    counts.valid = lower_bound(keys, counts.scored, n, kAbsent);
    return counts;
  }
};

// A label's gain, in [0, 1]: weights enter by their ratios alone, so the query's largest may be 1, and no label is too large.
struct Gains {
  LabelGain kind;
  double highest = 0, low = 0, per_range = 0;
  PILE_DEVICE Gains(LabelGain kind, const int64_t* keys, int labelled) : kind(kind) {
    if (kind == LabelGain::none || labelled == 0) return;
    highest = label_of(keys[0]);
    // Pairs take differences, so they begin at the lowest label; lists at label 0.
    low = kind == LabelGain::exp2 ? exp2(-highest) : takes_gains(kind) ? 0.0 : value(keys[labelled - 1]);
    const double range = value(keys[0]) - low;
    per_range = range > 0 ? 1 / range : 0;
  }
  PILE_DEVICE double value(int64_t key) const {
    const double label = label_of(key);
    if (kind == LabelGain::any) return label > 0 ? 1.0 : 0.0;
    const bool power = kind == LabelGain::gain_gap || kind == LabelGain::exp2;
    return power ? exp2(label - highest) : label / 2;  // halves: a gap may be too large for a double
  }
  PILE_DEVICE double operator()(int64_t key) const { return (value(key) - low) * per_range; }
};
// A label that cannot be a gain, which a host refuses, makes its query's loss NaN.
PILE_DEVICE bool has_negative_gain(LabelGain kind, const int64_t* keys, int labelled) {
  return takes_gains(kind) && labelled > 0 && label_of(keys[labelled - 1]) < 0;
}

// Running sums: to[k + 1] = before + Σ_{j <= k} of[j] for k in [0, n), by one warp.
template <class Team, class T>
PILE_DEVICE void running_sum(const Team& team, const T* of, double* to, int n, double before = 0) {
  if (team.rank >= 32) return;
  for (int begin = 0; begin < n; begin += 32) {
    const int k = begin + team.rank;
    double own = k < n ? double(of[k]) : 0.0;
    for (int step = 1; step < 32; step *= 2) {
      const double left = __shfl_sync(kWholeWarp, own, larger(team.rank - step, 0));
      if (team.rank >= step) own += left;
    }
    if (k < n) to[k + 1] = before + own;
    before += __shfl_sync(kWholeWarp, own, 31);
  }
}

// K = Σ ω over P: every pair is above one document.
template <class Team>
PILE_DEVICE double sum_pairs(const Team& team, const Workspace& w, int labelled) {
  return ordered_sum(team, labelled, [&](int k) { return w.field(w.kAbove)[k]; });
}

// Σ ω over the pairs of a position with the positions above its label, which begins at `first`, and below, from `last` on.
// prefix: running sums of the gains, nullptr where ω = 1.
struct OwnPairs {
  double above, below;
  PILE_DEVICE OwnPairs(int first, int last, int labelled, const double* prefix, double gain)
      : above(first), below(labelled - last) {
    if (!prefix) return;
    above = prefix[first] - above * gain;
    below = below * gain - (prefix[labelled] - prefix[last]);
  }
  PILE_DEVICE float share() const { return above + below > 0 ? float(1 / (above + below)) : 0.0f; }
};

// Each position's label's first and last position, and gain; of pairs also Σ ω above it, and 1 / k_i.
template <class Team>
PILE_DEVICE void weigh_order(const Team& team, const Workspace& w, LabelGain kind, int labelled) {
  const int64_t* keys = w.keys();
  int *first = w.whole(w.kFirst), *last = w.whole(w.kLast);
  float* gain = w.field(w.kGain);
  const bool weighted = kind != LabelGain::none;
  const Gains gain_of(kind, keys, labelled);
  for (int k = team.rank; k < labelled; k += team.size) {
    first[k] = lower_bound(keys, 0, k, keys[k]);
    last[k] = lower_bound(keys, k + 1, labelled, keys[k] + 1);
    if (weighted) gain[k] = float(gain_of(keys[k]));
  }
  team.sync();
  if (takes_gains(kind)) return;
  if (weighted) {
    if (team.rank == 0) w.prefix()[0] = 0;
    running_sum(team, gain, w.prefix(), labelled);
    team.sync();
  }
  for (int k = team.rank; k < labelled; k += team.size) {
    const OwnPairs own(first[k], last[k], labelled, weighted ? w.prefix() : nullptr, weighted ? gain[k] : 0.0f);
    w.field(w.kAbove)[k] = float(own.above);
    w.field(w.kPerPair)[k] = own.share();
  }
  team.sync();
}

}  // namespace pile::gpu
