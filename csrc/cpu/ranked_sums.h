#pragma once
#include "field_sums.h"
#include "ranks.h"
#include "term.h"
namespace pile::PILE_ISA {
template <class T>
class RankedSums {
 public:
  bool plan(const LabelList<T>&, const T*, T, T, PairSum, Arena&) { return false; }
  void run(const Member&, const LabelList<T>&, const Ranks<T>&, const T*, T*) {}
  double result() const { return 0; }
};
}  // namespace pile::PILE_ISA
