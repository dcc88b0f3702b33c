// The device's primitives: fast arithmetic, and the threads that work on a query together.
#pragma once

#include "call.h"

#include <cstdint>
#include <limits>
#include <type_traits>

#define PILE_DEVICE __device__ __forceinline__

#if defined(PILE_EMULATION)
#define PILE_SHARED_MEMORY(name) unsigned char* const name = static_cast<unsigned char*>(emulation::shared_memory())
#else
#define PILE_SHARED_MEMORY(name) extern __shared__ __align__(16) unsigned char name[]
#endif

namespace pile::gpu {

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), int64_t grid, int threads, size_t shared, cudaStream_t stream,
            Arguments... arguments) {
#if defined(PILE_EMULATION)
  emulation::launch(unsigned(grid), threads, shared, [&] { kernel(arguments...); });
#else
  // clang-format off
  kernel<<<unsigned(grid), threads, shared, stream>>>(arguments...);
  // clang-format on
#endif
}

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr unsigned kWholeWarp = 0xffffffffu;
constexpr float kLog2e = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;
// A product of four (1 + E F) has to stay a float32: logits that span more than this (with the offset) are "wide", and take an
// exponential per pair, bounded by the same e^20: beyond it σ is 0 to within 2e-9.
constexpr float kNarrow = 20.0f;

PILE_DEVICE float not_a_number() { return __int_as_float(0x7fc00000); }
PILE_DEVICE bool is_number(float x) { return x == x; }

// To 1 ulp or so, one instruction: a division takes eight.
#if defined(__CUDA_ARCH__)
#define PILE_INSTRUCTION(name, instruction, otherwise)             \
  PILE_DEVICE float name(float x) {                                \
    float y;                                                       \
    asm(instruction ".approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x)); \
    return y;                                                      \
  }
#else
#define PILE_INSTRUCTION(name, instruction, otherwise) \
  PILE_DEVICE float name(float x) { return otherwise; }
#endif
PILE_INSTRUCTION(reciprocal, "rcp", 1.0f / x)
PILE_INSTRUCTION(exp2_fast, "ex2", std::exp2(x))
PILE_INSTRUCTION(log2_fast, "lg2", std::log2(x))
// Relative error |x| 2^-24 from the product: for |x| up to some tens.
PILE_DEVICE float exp_fast(float x) { return exp2_fast(x * kLog2e); }

// The lowest and the highest of some numbers, NaN left out. `wide`, of u = s / temperature: do the pair sums need an
// exponential each?
struct Range {
  float low = kInfinity, high = -kInfinity;

  PILE_DEVICE void join(float value) {
    low = fminf(low, value);
    high = fmaxf(high, value);
  }
  PILE_DEVICE void join(const Range& other) {
    low = fminf(low, other.low);
    high = fmaxf(high, other.high);
  }
  PILE_DEVICE float middle() const { return high >= low ? (low + high) / 2 : 0.0f; }
  PILE_DEVICE bool wide(float offset) const { return !(high - low + fabsf(offset) <= kNarrow) && high >= low; }
};

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
  PILE_DEVICE Range joined(Range range) const {
    for (int step = count / 2; step > 0; step /= 2)
      range.join({__shfl_xor_sync(mask, range.low, step), __shfl_xor_sync(mask, range.high, step)});
    return range;
  }
};

// The threads that own a query: a warp, or the whole block. `partial`: shared room for a double per warp.
struct WarpTeam {
  static constexpr bool kOneWarp = true;
  double* partial;
  int rank = int(threadIdx.x) & 31, size = 32;

  PILE_DEVICE explicit WarpTeam(void* partial = nullptr) : partial(static_cast<double*>(partial)) {}
  PILE_DEVICE void sync() const { __syncwarp(kWholeWarp); }
  PILE_DEVICE double sum(double value) const { return Lanes(32).sum(value); }
};

struct BlockTeam {
  static constexpr bool kOneWarp = false;
  static constexpr int kBytes = 32 * sizeof(double);  // of `partial`, at most
  double* partial;
  int rank = int(threadIdx.x), size = int(blockDim.x);

  PILE_DEVICE explicit BlockTeam(void* partial = nullptr) : partial(static_cast<double*>(partial)) {}
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

// The range of the numbers that any of the team's threads has seen, to every thread.
template <class Team>
PILE_DEVICE Range joined(const Team& team, Range range) {
  range = Lanes(32).joined(range);
  if (Team::kOneWarp) return range;
  static_assert(sizeof(Range) == sizeof(double), "a range fits where a warp's double does");
  Range* const partial = reinterpret_cast<Range*>(team.partial);
  team.sync();
  if (team.rank % 32 == 0) partial[team.rank / 32] = range;
  team.sync();
  for (int w = 0; w < team.size / 32; ++w) range.join(partial[w]);
  return range;
}

}  // namespace pile::gpu
