// The student's ranks: documents by falling logit, and what each rank is worth where documents share it.
#pragma once

#include <type_traits>

#include "gains.h"

namespace pile::PILE_ISA {

// Documents by falling logit. Those of equal logits, a tie, share the mean discount of their ranks.
template <class T>
class Ranks {
 public:
  double* discount = nullptr;  // by rank from 0, the mean over a tie
  double ideal = 0;            // Σ gain · discount in the best order

  // All members; the leader's arena holds the result. Logits by position, of the labelled documents.
  void run(const Member& m, const Order& order, const Gains& gains, Metric metric, double cutoff, const T* z) {
    const int n = order.labelled;
    if (m.leads()) {
      sort_.take(n, m.size, *m.arena);
      discount = m.arena->take<double>(n);
    }
    m.sync();
    each_piece(m, n, [&](int, int begin, int end) {
      for (int k = begin; k < end; ++k) sort_.pairs()[k] = {falling_key<Key>(z[k]), k};
    });
    write_discounts(m, metric, cutoff, n, discount);
    m.sync();
    sort_.run(m);
    if (m.leads()) {
      ideal = ideal_dcg(order, gains, discount);
      share_ties(n, *m.arena);
    }
    m.sync();
  }

  // Adds what pairs within ties count, whose logits do not differ: λ to `lambda` by position, and to `curvature` unless that is
  // nullptr. Returns the sum of their losses. `gain` by position; c may be nullptr. One member.
  template <class Gain>
  double add_ties(const Order& order, const Gain* gain, const T* c, T* lambda, T* curvature) const {
    double loss = 0;
    for (int t = 0; t < ties_; ++t) {
      const Tie& tie = tie_[t];
      // Positions rise within a tie, so labels fall: one pass with the sums over the labels before, one with those behind.
      double higher = 0, higher_gain = 0;  // Σ c, Σ c gain
      const auto pass = [&](auto&& each_label) {
        for (int k = tie.begin; k < tie.end;) {
          int end = k + 1;
          while (end < tie.end && position(end) < order.below[position(k)]) ++end;
          each_label(k, end);
          k = end;
        }
      };
      double all_gain = 0;
      for (int k = tie.begin; k < tie.end; ++k) all_gain += double(gain[position(k)]);
      int seen = 0;
      double seen_gain = 0;
      pass([&](int begin, int end) {
        const double own = double(gain[position(begin)]);
        seen += end - begin;
        seen_gain += own * (end - begin);
        const double lower = (tie.end - tie.begin - seen) * own - (all_gain - seen_gain);
        const double upper = higher_gain - higher * own;
        for (int k = begin; k < end; ++k) {
          const double weight = c ? double(c[position(k)]) : 1.0;
          lambda[position(k)] += T(tie.apart / 2 * (weight * lower - upper));
          if (curvature) curvature[position(k)] += T(tie.apart / 4 * (weight * lower + upper));
          loss += tie.apart * weight * lower;
          higher += weight;
          higher_gain += weight * own;
        }
      });
    }
    return loss * 0.69314718055994530942;
  }
  int position(int rank) const { return sort_.pairs()[rank].item; }
  T logit(int rank) const { return of_falling_key<T>(sort_.pairs()[rank].key); }
  bool has_ties() const { return ties_ > 0; }

 private:
  using Key = std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>;
  struct Tie {
    int begin, end;  // ranks
    double apart;    // the mean of |d_p − d_q| over two of its ranks
  };

  void share_ties(int n, Arena& arena) {
    const auto key = [&](int rank) { return sort_.pairs()[rank].key; };
    ties_ = 0;
    int ties = 0;
    for (int k = 1; k < n; ++k) ties += key(k) == key(k - 1) && (k == 1 || key(k - 1) != key(k - 2));
    tie_ = arena.take<Tie>(ties);
    for (int k = 0; ties_ < ties;) {
      int end = k + 1;
      while (end < n && key(end) == key(k)) ++end;
      if (end - k > 1) {
        double sum = 0, apart = 0;
        for (int r = k; r < end; ++r) {
          sum += discount[r];
          apart += discount[r] * double(end - 1 + k - 2 * r);
        }
        const double size = end - k;
        for (int r = k; r < end; ++r) discount[r] = sum / size;
        tie_[ties_++] = {k, end, apart / (size * (size - 1) / 2)};
      }
      k = end;
    }
  }

  RadixSort<Key> sort_;
  Tie* tie_ = nullptr;
  int ties_ = 0;
};

}  // namespace pile::PILE_ISA
