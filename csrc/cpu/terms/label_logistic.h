// R as the mean over label pairs, weighted by ω, of c_i softplus(−(z_i − z_j)): RankNet.
#pragma once

#include "../label_pairs.h"
#include "../term.h"

namespace pile::PILE_ISA {

template <class T>
class Loss<T, LabelLogistic> : public LabelTerm {
 public:
  static constexpr bool kCurvature = true;

  // Slope: λ.
  Found run(const Member& m, const LabelLogistic&, const LossOptions& options, const LabelList<T>& list, T* slope) {
    if (m.leads()) {
      weights_ = pair_weights<T>(list.order, options.pair_weight, *m.arena);
      pairs_.plan(list.order, weights_, 0, options.pairwise, list.c);
    }
    m.sync();
    const double sum = pairs_.run(m, list.z, slope);
    if (list.curvature) pairs_.curve(m, list.z, list.curvature);
    return {sum, weights_.total};
  }

 private:
  PairWeights<T> weights_;
  LabelPairLoss<T> pairs_;
};

}  // namespace pile::PILE_ISA
