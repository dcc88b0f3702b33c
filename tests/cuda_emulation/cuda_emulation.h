// The part of CUDA that csrc/cuda uses, on the CPU: for tests. Included in place of the CUDA headers (PILE_EMULATION).
//
// Every CUDA thread is a fiber; a fiber runs until it meets a barrier or a warp collective. The order in which the fibers of a
// block get their turn can be chosen: a kernel whose results depend on it reads something that no barrier orders. Shared memory is
// allocated to the byte (AddressSanitizer sees what lies beyond) and filled with NaN before a block starts.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>

#if !defined(__x86_64__)
#error "the emulation switches fibers in x86-64 assembly"
#endif

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

namespace emulation {

struct Index {
  unsigned x;
};
// Of the fiber that runs.
extern Index thread, block, block_size, grid_size;

void launch(unsigned grid, unsigned threads, size_t shared_bytes, const std::function<void()>& kernel);
void* shared_memory();
void block_barrier();
// What every lane of `mask` posted: the value of lane `source`, or with source < 0 a bit per lane whose value is not 0.
uint64_t warp_collective(unsigned mask, uint64_t value, int source);

// "forward", "backward" or "random"; false if it is none of them.
bool set_order(const char* name);
// What cudaDevAttrMaxSharedMemoryPerBlockOptin answers.
void set_shared_limit(int bytes);
int shared_limit();

template <class T>
uint64_t to_bits(T value) {
  static_assert(sizeof(T) <= 8, "one register pair");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  return bits;
}
template <class T>
T from_bits(uint64_t bits) {
  T value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
inline int lane() { return int(thread.x % 32); }

}  // namespace emulation

#define threadIdx ::emulation::thread
#define blockIdx ::emulation::block
#define blockDim ::emulation::block_size
#define gridDim ::emulation::grid_size

inline void __syncthreads() { emulation::block_barrier(); }
inline void __syncwarp(unsigned mask = 0xffffffffu) { emulation::warp_collective(mask, 0, emulation::lane()); }
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes) {
  return emulation::from_bits<T>(emulation::warp_collective(mask, emulation::to_bits(value), emulation::lane() ^ lanes));
}
template <class T>
T __shfl_sync(unsigned mask, T value, int source) {
  return emulation::from_bits<T>(emulation::warp_collective(mask, emulation::to_bits(value), source));
}
inline int __any_sync(unsigned mask, int predicate) { return emulation::warp_collective(mask, predicate != 0, -1) != 0; }

template <class T>
T __ldg(const T* p) {
  return *p;
}
inline float __int_as_float(int bits) { return emulation::from_bits<float>(uint32_t(bits)); }
inline long long __double_as_longlong(double value) { return (long long)emulation::to_bits(value); }
inline double __longlong_as_double(long long bits) { return emulation::from_bits<double>(uint64_t(bits)); }

using cudaError_t = int;
using cudaStream_t = void*;
constexpr cudaError_t cudaSuccess = 0;
enum cudaDeviceAttr { cudaDevAttrMaxSharedMemoryPerBlockOptin, cudaDevAttrMultiProcessorCount };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return "no error"; }
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline cudaError_t cudaGetDeviceCount(int* count) { return *count = 1, cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrMaxSharedMemoryPerBlockOptin ? emulation::shared_limit() : 4;
  return cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t) {
  return std::memset(to, value, bytes), cudaSuccess;
}
template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel*, cudaFuncAttribute, int) {
  return cudaSuccess;
}
