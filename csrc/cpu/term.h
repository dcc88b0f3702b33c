// What a term of the student's loss is on the CPU: a specialisation of Loss in a file of its own, terms/NAME.h.
#pragma once

#include <type_traits>

#include "order.h"

namespace pile::PILE_ISA {

// What a distillation term sees: student and target of the query's documents that have a target, and the documents' weights
// (nullptr: 1 each), which are > 0. `curvature`: where the second derivatives go, each by one logit alone; nullptr: not wanted.
template <class T>
struct DistillList {
  int n;
  const T *z, *s, *c;
  T* curvature = nullptr;
};
// What a label term sees: the student's logits by position, and the order, which has the labels; the others as above.
template <class T>
struct LabelList {
  const Order& order;
  const T *z, *c;
  T* curvature = nullptr;
};

// What run() finds in a query: the term is sum / size, its derivative by the list's logit k is slope[k] / (size · unit); of a
// label term the slope is λ, which way and how strongly the document must move, so its derivative is minus that. The second
// derivative is curvature[k] / (size · unit²).
struct Found {
  double sum, size, unit = 1;
};

// There is no file. A term's file specialises this:
//
//   Found run(const Member& m, const Term& term, const LossOptions& options, const List<T>& list, T* slope);
//
// All members of a team call it on one shared object where the term applies() and the student's logits are finite, and every
// member gets what is found. What the leader takes from m.arena is given back afterwards. Every slope of the list is written, and
// every curvature, if it is wanted and the term has kCurvature.
template <class T, class Term>
struct Loss {
  static constexpr bool kHere = false, kCurvature = false;
};

// What a term is unless its file says otherwise: about pairs.
struct DistillTerm {
  static constexpr bool kHere = true, kCurvature = false;
  template <class Term, class T>
  static bool applies(const Term&, const DistillList<T>& list) {
    return list.n > 1;
  }
};
struct LabelTerm {
  static constexpr bool kHere = true, kCurvature = false;
  template <class Term, class T>
  static bool applies(const Term&, const LabelList<T>& list) {
    return list.order.has_pairs();
  }
};

// A distillation term of float logits, computed in double: for lists whose logits all but agree. A slope is then the difference of
// two nearly equal numbers, and float32's rounding of those shows in it.
template <class T, class Term>
class InDouble {
 public:
  static constexpr double kClose = 0x1p-6;  // the widest range of such logits, in units of the temperature

  // Its memory, if it is wanted. One member.
  bool take(bool wanted, const DistillList<T>& list, Arena& arena) {
    wanted_ = wanted && sizeof(T) == 4;
    if (!wanted_) return false;
    for (double** array : {&z_, &s_, &slope_, &curvature_}) *array = arena.take<double>(list.n);
    c_ = list.c ? arena.take<double>(list.n) : nullptr;
    return true;
  }
  bool wanted() const { return wanted_; }

  Found run(const Member& m, const Term& term, const LossOptions& options, const DistillList<T>& list, T* slope) {
    if constexpr (sizeof(T) == 4) {
      each_piece(m, list.n, [&](int, int begin, int end) {
        for (int k = begin; k < end; ++k) {
          z_[k] = double(list.z[k]);
          s_[k] = double(list.s[k]);
          if (c_) c_[k] = double(list.c[k]);
        }
      });
      m.sync();
      const DistillList<double> wide = {list.n, z_, s_, c_, list.curvature ? curvature_ : nullptr};
      const Found found = loss_.run(m, term, options, wide, slope_);
      m.sync();
      each_piece(m, list.n, [&](int, int begin, int end) {
        for (int k = begin; k < end; ++k) {
          slope[k] = T(slope_[k]);
          if (list.curvature) list.curvature[k] = T(curvature_[k]);
        }
      });
      m.sync();
      return found;
    }
    return {};
  }

 private:
  struct Nothing {};
  std::conditional_t<sizeof(T) == 4, Loss<double, Term>, Nothing> loss_;
  bool wanted_ = false;
  double *z_ = nullptr, *s_ = nullptr, *c_ = nullptr, *slope_ = nullptr, *curvature_ = nullptr;
};

}  // namespace pile::PILE_ISA
