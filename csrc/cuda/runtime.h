// CUDA's host interface, or in tests the emulation's.
#pragma once

#if defined(PILE_EMULATION)
#include "cuda_emulation.h"
#else
#include <cuda_runtime.h>
#endif

#include "pile/half.h"
#include "pile/options.h"

namespace pile {
namespace gpu {

template <class T>
PILE_SHARED T smaller(T a, T b) {
  return a < b ? a : b;
}
template <class T>
PILE_SHARED T larger(T a, T b) {
  return a > b ? a : b;
}

}  // namespace gpu
}  // namespace pile
