// The device's primitives: fast arithmetic, and the threads that work on a query together.
#pragma once

#include "runtime.h"

#include <cstdint>
#include <limits>
#include <type_traits>

#define PILE_DEVICE __device__ __forceinline__

#if defined(PILE_EMULATION)
#define PILE_SHARED_MEMORY(name) unsigned char* const name = static_cast<unsigned char*>(emulation::shared_memory())
#define PILE_LAUNCH(kernel, grid, threads, shared, stream, ...) \
  ((void)(stream), emulation::launch(grid, threads, shared, [&] { kernel(__VA_ARGS__); }))
#else
#define PILE_SHARED_MEMORY(name) extern __shared__ __align__(16) unsigned char name[]
#define PILE_LAUNCH(kernel, grid, threads, shared, stream, ...) kernel<<<grid, threads, shared, stream>>>(__VA_ARGS__)
#endif

namespace pile {
namespace gpu {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr unsigned kWholeWarp = 0xffffffffu;
constexpr float kLog2e = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

PILE_DEVICE float not_a_number() { return __int_as_float(0x7fc00000); }
PILE_DEVICE bool is_number(float x) { return x == x; }

#if defined(__CUDA_ARCH__)
// To 1 ulp, one instruction, where a division takes eight.
PILE_DEVICE float reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
PILE_DEVICE float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
PILE_DEVICE float log2_fast(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
#else
PILE_DEVICE float reciprocal(float x) { return 1.0f / x; }
PILE_DEVICE float exp2_fast(float x) { return std::exp2(x); }
PILE_DEVICE float log2_fast(float x) { return std::log2(x); }
#endif
// Relative error |x| 2^-24 from the product: for |x| up to some tens.
PILE_DEVICE float exp_fast(float x) { return exp2_fast(x * kLog2e); }

// `count` neighbouring lanes of a warp, a power of two, that share a piece of work. All of them make every call.
struct Lanes {
  int count, rank;
  unsigned mask;

  PILE_DEVICE explicit Lanes(int count)
      : count(count),
        rank(int(threadIdx.x) & (count - 1)),
        mask((count == 32 ? kWholeWarp : (1u << count) - 1) << (threadIdx.x & 31 & ~unsigned(count - 1))) {}

  // Every lane gets the same bits: the two operands of each addition are the same, whoever adds.
  template <class T>
  PILE_DEVICE T sum(T value) const {
    for (int step = count / 2; step > 0; step /= 2) value += __shfl_xor_sync(mask, value, step);
    return value;
  }
  PILE_DEVICE float lowest(float value) const {
    for (int step = count / 2; step > 0; step /= 2) value = fminf(value, __shfl_xor_sync(mask, value, step));
    return value;
  }
  PILE_DEVICE float highest(float value) const { return -lowest(-value); }
};

// The threads that own a query: a warp, or the whole block. `partial`: shared room for a double per warp.
struct WarpTeam {
  static constexpr bool kOneWarp = true;
  int rank = int(threadIdx.x) & 31, size = 32;
  double* partial = nullptr;

  PILE_DEVICE void sync() const { __syncwarp(kWholeWarp); }
  PILE_DEVICE double sum(double value) const { return Lanes(32).sum(value); }
};

struct BlockTeam {
  static constexpr bool kOneWarp = false;
  int rank = int(threadIdx.x), size = int(blockDim.x);
  double* partial = nullptr;

  PILE_DEVICE void sync() const { __syncthreads(); }
  // Of counts: exact in any order.
  PILE_DEVICE double sum(double value) const {
    value = Lanes(32).sum(value);
    sync();
    if (rank % 32 == 0) partial[rank / 32] = value;
    sync();
    double total = 0;
    for (int w = 0; w < size / 32; ++w) total += partial[w];
    return total;
  }
};

// Σ value(k) over k in [0, n), in an order that does not depend on the team, to every thread.
template <class Team, class Value>
PILE_DEVICE double ordered_sum(const Team& team, int n, Value value) {
  double total = 0;
  if (team.rank < 32) {
#pragma unroll 1
    for (int k = team.rank; k < n; k += 32) total += value(k);
    total = Lanes(32).sum(total);
  }
  if (Team::kOneWarp) return total;
  team.sync();
  if (team.rank == 0) team.partial[0] = total;
  team.sync();
  return team.partial[0];
}

template <class Team>
PILE_DEVICE float lowest(const Team& team, float value) {
  value = Lanes(32).lowest(value);
  if (Team::kOneWarp) return value;
  team.sync();
  if (team.rank % 32 == 0) team.partial[team.rank / 32] = value;
  team.sync();
  for (int w = 0; w < team.size / 32; ++w) value = fminf(value, float(team.partial[w]));
  return value;
}

}  // namespace gpu
}  // namespace pile
