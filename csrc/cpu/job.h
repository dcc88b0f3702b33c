// One call of the CPU backend, and its entry points: the same code compiled for each instruction set.
#pragma once

#include <atomic>

#include "pile/options.h"

namespace pile {

// ensemble and loss, either or both: an ensemble alone, a loss against batch.target, or a loss against the ensemble.
struct Job {
  Batch batch;
  const EnsembleOptions* ensemble = nullptr;
  const LossOptions* loss = nullptr;
  Outputs out;
  bool wide = false;  // float64 arithmetic
  int threads = 1;
  // The first query whose labels cannot be compared (infinite, or integers from 2^53 on), -1 while there is none.
  std::atomic<int64_t>* wrong_labels = nullptr;
  // Asks whether the caller wants out, and throws if so; called now and then on the caller's thread. May be nullptr.
  void (*interrupt)() = nullptr;
};

namespace baseline {
void run(const Job& job);
}
#if defined(PILE_HAVE_AVX2)
namespace avx2 {
void run(const Job& job);
}
#endif
#if defined(PILE_HAVE_AVX512)
namespace avx512 {
void run(const Job& job);
}
#endif

// What this processor can run, best first, separated by spaces; and the set in use.
const char* instruction_sets();
const char* instruction_set();
// Use another set from now on ("baseline", "avx2", "avx512"); false if this processor or this build lacks it.
bool set_instruction_set(const char* name);
void run(const Job& job);

}  // namespace pile
