// One call of the CPU backend, and its entry points: the same code compiled for each instruction set.
#pragma once

#include <atomic>
#include <string>

#include "pile/options.h"

namespace pile {

// ensemble and loss, either or both: an ensemble alone, a loss against batch.target, or a loss against the ensemble. Weights that
// all queries share are the prior's; with `exponents` the call does nothing but fit them.
struct Job {
  Batch batch;
  const EnsembleOptions* ensemble = nullptr;
  const LossOptions* loss = nullptr;
  Outputs out;
  double* exponents = nullptr;  // M; then out.trace is the batch's, iterations + 1
  void* hessian = nullptr;      // documents, in the dtype of the arithmetic: with reduction "none" and a gradient
  bool float64 = false;         // the arithmetic
  int threads = 1;
  // The first query whose labels cannot be compared (infinite, or integers from 2^53 on), -1 while there is none.
  mutable std::atomic<int64_t> wrong_labels{-1};
  void report_wrong_labels(int64_t query) const;
  // Asks whether the caller wants out, and throws if so; called now and then on the caller's thread. May be nullptr.
  void (*interrupt)() = nullptr;
};

namespace baseline {
void run(const Job& job);
// The sets have the same ones. `curvature`: with second derivatives.
bool has_term(const char* key, bool curvature);
}  // namespace baseline
namespace avx2 {
void run(const Job& job);
}
namespace avx512 {
void run(const Job& job);
}

// What this processor can run, best first, separated by spaces; and the set in use.
std::string instruction_sets();
const char* instruction_set();
// Use another set from now on ("baseline", "avx2", "avx512"); false if this processor or this build lacks it.
bool set_instruction_set(const char* name);
void run(const Job& job);

}  // namespace pile
