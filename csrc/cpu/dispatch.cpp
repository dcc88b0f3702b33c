#include <atomic>
#include <cstring>

#include "job.h"

namespace pile {

namespace {

struct Set {
  const char* name;
  void (*run)(const Job&);
  bool (*works)();
};

const Set kSets[] = {
#if defined(PILE_HAVE_AVX512)
    {"avx512", avx512::run,
     [] {
       return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
              __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("fma");
     }},
#endif
#if defined(PILE_HAVE_AVX2)
    {"avx2", avx2::run, [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }},
#endif
    {"baseline", baseline::run, [] { return true; }},
};

const Set* best() {
  for (const Set& set : kSets)
    if (set.works()) return &set;
  return nullptr;  // not reached: the baseline works everywhere
}

std::atomic<const Set*> chosen{nullptr};

const Set* current() {
  const Set* set = chosen.load(std::memory_order_relaxed);
  if (!set) chosen.store(set = best(), std::memory_order_relaxed);
  return set;
}

}  // namespace

std::string instruction_sets() {
  std::string names;
  for (const Set& set : kSets)
    if (set.works()) names += (names.empty() ? "" : " ") + std::string(set.name);
  return names;
}

const char* instruction_set() { return current()->name; }

bool set_instruction_set(const char* name) {
  for (const Set& set : kSets) {
    if (std::strcmp(set.name, name) == 0 && set.works()) {
      chosen.store(&set);
      return true;
    }
  }
  return false;
}

void run(const Job& job) { current()->run(job); }

void Job::report_wrong_labels(int64_t query) const {
  int64_t first = wrong_labels.load();
  while ((first < 0 || query < first) && !wrong_labels.compare_exchange_weak(first, query)) {
  }
}

}  // namespace pile
