// What a term of the student's loss is on the CPU: a specialisation of Loss in a file of its own, terms/NAME.h.
#pragma once

#include "order.h"

namespace pile::PILE_ISA {

// What a distillation term sees: student and target of the query's documents that have a target, and the documents' weights
// (nullptr: 1 each), which are > 0.
template <class T>
struct DistillList {
  int n;
  const T *z, *s, *c;
};
// What a label term sees: the student's logits by position, and the order, which has the labels; weights as above.
template <class T>
struct LabelList {
  const Order& order;
  const T *z, *c;
};

// What run() finds in a query: the term is sum / size, its derivative by the list's logit k is slope[k] / (size · unit); of a
// label term the slope is λ, which way and how strongly the document must move, so its derivative is minus that.
struct Found {
  double sum, size, unit = 1;
};

// There is no file. A term's file specialises this:
//
//   Found run(const Member& m, const Term& term, const LossOptions& options, const List<T>& list, T* slope);
//
// All members of a team call it on one shared object where the term applies() and the student's logits are finite, and every
// member gets what is found. What the leader takes from m.arena is given back afterwards. Every slope of the list is written.
template <class T, class Term>
struct Loss {
  static constexpr bool kHere = false;
};

// What a term is unless its file says otherwise: about pairs.
struct DistillTerm {
  static constexpr bool kHere = true;
  template <class Term, class T>
  static bool applies(const Term&, const DistillList<T>& list) {
    return list.n > 1;
  }
};
struct LabelTerm {
  static constexpr bool kHere = true;
  template <class Term, class T>
  static bool applies(const Term&, const LabelList<T>& list) {
    return list.order.has_pairs();
  }
};

}  // namespace pile::PILE_ISA
