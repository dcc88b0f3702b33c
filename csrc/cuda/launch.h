// The CUDA backend's entry points. Nothing here allocates or waits; what CUDA reports as an error is thrown with its message.
#pragma once

#include <stdexcept>
#include <string>

#include "call.h"

namespace pile {
namespace gpu {

inline void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) throw std::runtime_error(std::string("CUDA error at ") + what + ": " + cudaGetErrorString(error));
}

struct Device {
  int processors = 0, shared_bytes = 0;
};

// How lists that a team of threads takes alone are run; a function of shapes and the device.
struct ShortPlan {
  bool warps = false;         // a team is a warp, else a block
  bool spills = false;        // some list of a packed batch may not fit shared memory
  int threads = 0;            // per block
  int rows = 0;               // see Call
  int capacity = 0;           // documents that fit
  int64_t shared_bytes = 0;   // per block
  int64_t scratch_words = 0;  // 4 bytes each
};

// capacity == 0: the lists are for run_long. `direct`: direct sums are wanted even where linear time is faster.
ShortPlan plan_short(int64_t queries, int64_t slots, bool packed, int teachers, bool direct, const Device& device);
void run_short(Call call, const ShortPlan& plan, cudaStream_t stream);

// Lists of any length, by many blocks: `keys` to sort by, and what sorting gave. An ensemble writes call.out.logits, a loss reads
// call.batch.target; a loss without label pairs needs no order (nullptr).
void launch_keys(const Call& call, int64_t* keys, bool scored, cudaStream_t stream);
int64_t long_ensemble_bytes(const Call& call);
void run_long_ensemble(const Call& call, void* scratch, const int64_t* keys, const int64_t* order, cudaStream_t stream);
int64_t long_loss_bytes(const Call& call);
void run_long_loss(const Call& call, void* scratch, const int64_t* keys, const int64_t* order, cudaStream_t stream);

// The loss over all queries; and where `scaled` is given, the mean's gradient from call.out.gradient to it.
void reduce(const Call& call, void* scaled, DType scaled_dtype, const Device& device, cudaStream_t stream);

}  // namespace gpu
}  // namespace pile
