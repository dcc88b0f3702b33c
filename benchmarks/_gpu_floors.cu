// What a GPU can do at most, for benchmarks/gpu_check.py: reciprocals, multiply-adds, an empty launch. Loaded through ctypes.
#include <cuda_runtime.h>

namespace {

constexpr int kChains = 8, kThreads = 256;

__device__ __forceinline__ float step(float x, bool reciprocal) {
  if (!reciprocal) return fmaf(x, 0.999f, 0.5f);
  float y;
  asm volatile("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// `iterations` times kChains independent operations per thread.
template <bool kReciprocal>
__global__ void __launch_bounds__(kThreads) chains(float* to, int iterations) {
  float x[kChains];
  for (int c = 0; c < kChains; ++c) x[c] = 1.0f + 0.001f * float(threadIdx.x + c);
  for (int i = 0; i < iterations; ++i)
#pragma unroll
    for (int c = 0; c < kChains; ++c) x[c] = step(x[c], kReciprocal);
  float total = 0;
  for (int c = 0; c < kChains; ++c) total += x[c];
  to[blockIdx.x * kThreads + threadIdx.x] = total;
}

__global__ void nothing() {}

}  // namespace

extern "C" {

// Operations of one launch: blocks * 256 * 8 * iterations. Returns the launch's error code.
int floor_reciprocals(float* to, int blocks, int iterations, void* stream) {
  chains<true><<<blocks, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(to, iterations);
  return cudaGetLastError();
}
int floor_multiply_adds(float* to, int blocks, int iterations, void* stream) {
  chains<false><<<blocks, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(to, iterations);
  return cudaGetLastError();
}
int floor_launch(void* stream) {
  nothing<<<1, 32, 0, static_cast<cudaStream_t>(stream)>>>();
  return cudaGetLastError();
}
}
