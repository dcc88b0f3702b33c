// The cell-to-cell matrices of the linear-time pair sums (pile/field_table.h), tabulated in long double.
#pragma once

#include <new>

#include "pile/field_table.h"
#include "team.h"

namespace pile::PILE_ISA {

template <class T, int P>
struct FieldTable : FieldReach<P> {
  using FieldReach<P>::kEntries;

  // [source power][entry + 1][target power]: the rows of neighbouring entries are neighbours, so that one vector serves two
  // target cells. An entry of zeros at either end stands for cells that do not see each other.
  using Matrices = T[P][kEntries + 2][P];

  double offset;
  int first;
  Matrices kappa = {}, psi = {}, slope = {};  // slope: of κ

  explicit FieldTable(double offset) : offset(offset), first(FieldReach<P>::first(offset)) {
    using Real = long double;
    CellNodes<Real, P> cell;
    for (int p = 0; p < P; ++p) cell.set(p);
    for (int e = 0; e < kEntries; ++e) {
      const Real shift = Real(this->offset) + Real(kCell) * (first + e);
      fill(kappa, e, shift, cell.node, cell.lagrange, [](Real v) { return PILE_ISA::kappa(v); });
      fill(psi, e, shift, cell.node, cell.lagrange, [](Real v) { return PILE_ISA::psi(v); });
      fill(slope, e, shift, cell.node, cell.lagrange, [](Real v) { return PILE_ISA::kappa_slope(v); });
    }
  }

 private:
  template <class Real, class Kernel>
  static void fill(Matrices& out, int entry, Real shift, const Real (&node)[P], const Real (&lagrange)[P][P], Kernel kernel) {
    Real value[P][P], half[P][P];
    for (int s = 0; s < P; ++s)
      for (int t = 0; t < P; ++t) value[s][t] = kernel(shift + node[s] - node[t]);
    for (int a = 0; a < P; ++a)
      for (int t = 0; t < P; ++t) {
        half[a][t] = 0;
        for (int s = 0; s < P; ++s) half[a][t] += lagrange[a][s] * value[s][t];
      }
    for (int a = 0; a < P; ++a)
      for (int b = 0; b < P; ++b) {
        Real total = 0;
        for (int t = 0; t < P; ++t) total += lagrange[b][t] * half[a][t];
        out[a][entry + 1][b] = T(total);
      }
  }
};

// The table of an offset: mostly 0, whose table all share; else in the arena.
template <class T, int P>
const FieldTable<T, P>* field_table(double offset, Arena& arena) {
  static const FieldTable<T, P> centred(0);
  return offset == 0 ? &centred : new (arena.take<FieldTable<T, P>>(1)) FieldTable<T, P>(offset);
}

}  // namespace pile::PILE_ISA
