// The CUDA backend's entry points. Nothing here allocates or waits; what CUDA reports as an error is thrown with its message.
#pragma once

#include <stdexcept>
#include <string>

#include "call.h"

namespace pile::gpu {

inline void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) throw std::runtime_error(std::string("CUDA error at ") + what + ": " + cudaGetErrorString(error));
}

struct Device {
  int processors = 0, shared_bytes = 0;
};

// How lists that a team of threads takes alone are run; a function of shapes and the device.
struct ShortPlan {
  bool warps = false;        // a team is a warp, else a block
  bool spills = false;       // some list of a packed batch may not fit shared memory
  int threads = 0;           // per block
  int rows = 0;              // see Call
  int capacity = 0;          // documents that fit
  int64_t shared_bytes = 0;  // per block
  int64_t scratch_bytes = 0;
};

// Is there a file in csrc/cuda/terms for the term of this key?
bool has_term(const std::string& key);
void set_options(Call& call, const EnsembleOptions* ensemble, const LossOptions* loss);

// capacity == 0: the lists are for run_long. `sweeps`: how often the ensemble sums over its label pairs. `direct`: direct sums
// are wanted even where linear time is faster.
ShortPlan plan_short(int64_t queries, int64_t slots, bool packed, int teachers, int64_t sweeps, bool direct,
                     const Device& device);
void run_short(Call call, const ShortPlan& plan, cudaStream_t stream);

// Lists of any length, by many blocks: `keys` to sort by, and what sorting gave. An ensemble writes call.out.logits, a loss
// reads call.batch.target; without label pairs neither needs an order (nullptr).
void long_keys(const Call& call, int64_t* keys, cudaStream_t stream);
int64_t long_bytes(const Call& call);
void run_long_ensemble(const Call& call, const int64_t* keys, const int64_t* order, cudaStream_t stream);
void run_long_loss(const Call& call, const int64_t* keys, const int64_t* order, cudaStream_t stream);

// The loss over all queries; for the mean of which a gradient is wanted also call.scaled, from call.out.gradient.
void reduce(const Call& call, const Device& device, cudaStream_t stream);

}  // namespace pile::gpu
