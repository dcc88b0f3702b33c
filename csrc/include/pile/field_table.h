// The constants of the linear-time pair sum: how two cells of documents act on each other.
//
// The logits' range is cut into cells of width h = 1.5. Within a cell a logit is u = centre + x with |x| <= h/2. For two cells
// δ apart the kernel k(offset + hδ + x_j − x_i) is a smooth function of x_i and x_j: its poles are π away, so the polynomial
// that interpolates it at P x P Chebyshev nodes errs by about 8.5^-P (measured, worst pair: P = 8 8e-8, P = 16 2e-13; h = 2:
// 7e-7 for P = 8). Written in powers of x_i and x_j it is a P x P matrix, here entry [source power][target power]. Powers are
// as well conditioned as Chebyshev polynomials here, because the kernel's Taylor series itself converges on the cell (radius π
// > h/2), and they make moments and evaluation cheapest.
//
// Two kernels: κ(v) = σ(v) − 1/2, and ψ(v) = log(2 cosh(v/2)) = softplus(v) − v/2. Beyond `reach` they are ±1/2 and |v|/2 to
// the last bit that matters. And κ' = σ', which is 0 there.
#pragma once

#include <cmath>

#include "pile/shared.h"

#if !defined(PILE_ISA)  // what is compiled once, not for each instruction set of a CPU
#define PILE_ISA gpu
#endif

namespace pile::PILE_ISA {

constexpr double kCell = 1.5;  // h

// The two kernels.
template <class Real>
PILE_SHARED Real kappa(Real v) {
  return std::tanh(v / 2) / 2;
}
template <class Real>
PILE_SHARED Real kappa_slope(Real v) {
  const Real small = std::exp(-std::fabs(v));
  return small / ((1 + small) * (1 + small));
}
template <class Real>
PILE_SHARED Real psi(Real v) {
  return std::fabs(v) / 2 + std::log1p(std::exp(-std::fabs(v)));
}

// Chebyshev nodes of a cell, and lagrange[k][p]: the coefficient of x^k in node p's basis polynomial. set(p) for every p first.
template <class Real, int P>
struct CellNodes {
  Real node[P], lagrange[P][P];

  PILE_SHARED void set(int p) {
    const Real pi = Real(3.14159265358979323846264338327950288L);
    node[p] = Real(kCell / 2) * std::cos(pi * (2 * p + 1) / (2 * P));
    Real previous[P] = {1}, current[P] = {0, 1};  // T_0, T_1 in powers
    for (int k = 0; k < P; ++k) lagrange[k][p] = (k == 0 ? Real(1) : Real(0)) / P;
    for (int degree = 1; degree < P; ++degree) {
      const Real value = std::cos(degree * pi * (2 * p + 1) / (2 * P)) * 2 / P;
      for (int k = 0; k < P; ++k) lagrange[k][p] += value * current[k];
      for (int k = P - 1; k >= 0; --k) {
        const Real next = 2 * (k ? current[k - 1] : Real(0)) - previous[k];
        previous[k] = next;
      }
      for (int k = 0; k < P; ++k) {
        const Real swap = previous[k];
        previous[k] = current[k];
        current[k] = swap;
      }
    }
    Real scale = 1;
    for (int k = 0; k < P; ++k, scale *= Real(kCell / 2)) lagrange[k][p] /= scale;
  }
};

// Cells that see each other: kEntries of them around the one that the offset makes the nearest.
template <int P>
struct FieldReach {
  static constexpr double kReach = P <= 8 ? 18.0 : 38.0;
  static constexpr int kSpan = int(kReach / kCell) + 2;  // to either side
  static constexpr int kEntries = 2 * kSpan + 1;
  // Entry e is for cells δ = first + e apart; below and above them the kernel is saturated.
  static PILE_SHARED int first(double offset) { return int(std::floor(-offset / kCell + 0.5)) - kSpan; }
};

}  // namespace pile::PILE_ISA
