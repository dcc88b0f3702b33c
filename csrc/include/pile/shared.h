// What every shared header needs: functions for host and device, and always inline. A header is compiled for several
// instruction sets, and of an inline function that is not inlined the linker keeps one copy, which may hold instructions of the
// best set.
#pragma once

#if defined(__CUDACC__)
#define PILE_SHARED __host__ __device__ __forceinline__
#else
#define PILE_SHARED inline __attribute__((always_inline))
#endif
