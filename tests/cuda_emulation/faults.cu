// Kernels that are wrong on purpose, to see that the emulation finds what it is for, and the same put right.
#include <pybind11/pybind11.h>

#include <vector>

#include "device.h"

namespace {

using pile::gpu::Lanes;

enum Fault { none, missing_barrier, beyond_shared_memory, missing_lanes, uneven_barriers, never_written };

// Reverses 64 numbers through shared memory.
__global__ void reverse(int* to, Fault fault) {
  PILE_SHARED_MEMORY(memory);
  int* const shared = reinterpret_cast<int*>(memory);
  const int rank = int(threadIdx.x);
  if (fault != never_written || rank != 7) shared[rank] = rank;
  if (fault == beyond_shared_memory && rank == 0) shared[64] = 1;
  if (fault != missing_barrier) __syncthreads();
  if (fault == uneven_barriers && rank == 0) __syncthreads();
  to[rank] = shared[63 - rank];
  if (fault == missing_lanes && rank % 4 == 3) return;
  to[rank] += 0 * Lanes(4).sum(1);
}

std::vector<int> run(int fault) {
  std::vector<int> to(64, -2);
  pile::gpu::launch(reverse, 1, 64, 64 * sizeof(int), nullptr, to.data(), static_cast<Fault>(fault));
  return to;
}

}  // namespace

PYBIND11_MODULE(faults, m) {
  m.def("run", [](int fault) {
    pybind11::list list;
    for (int value : run(fault)) list.append(value);
    return list;
  });
  m.def("set_order", &emulation::set_order);
}
