// Threads and memory: a team runs one function on several threads, which meet at barriers and own an arena each.
//
// The threads are PyTorch's: those of the OpenMP runtime that it has loaded, found at run time, so that this extension needs
// neither OpenMP nor PyTorch to build. Threads of our own would have to wake beside PyTorch's, which spin for milliseconds
// after each of its operations, and OMP_* settings would not reach them. docs/cpu.md has the figures. Results never depend on
// the team's size: work is cut by the problem, not by the number of threads.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>

#include "pile/shared.h"

namespace pile {

// A bump allocator. Memory is uninitialised, aligned to 64 bytes, and lives until reset().
class Arena {
 public:
  Arena() = default;
  Arena(const Arena&) = delete;
  ~Arena();

  template <class T>
  PILE_SHARED T* take(int64_t count) {
    return static_cast<T*>(take_bytes(count * static_cast<int64_t>(sizeof(T))));
  }
  // Forget everything taken since `mark()`; slabs stay for the next query.
  struct Mark {
    int slab;
    int64_t used;
  };
  PILE_SHARED Mark mark() const { return {current_, current_ < 0 ? 0 : used_}; }
  void release(Mark mark);
  // Between calls: forget everything. One slab of moderate size stays; several become one at the next call.
  void trim();

 private:
  static constexpr int kMaxSlabs = 48;
  void* take_bytes(int64_t bytes);
  void* slabs_[kMaxSlabs] = {};
  int64_t sizes_[kMaxSlabs] = {};
  int count_ = 0, current_ = -1;
  int64_t used_ = 0;
  int64_t first_ = 0;  // size of the next first slab
};

struct TeamState {
  std::atomic<int> arrived{0};
  std::atomic<int> round{0};
  std::atomic<bool> failed{false};
  std::atomic<int> left{0};       // members that are done, or have given up
  std::atomic<int64_t> next{0};   // the first query that nobody has taken
  void (*interrupt)() = nullptr;  // see run_team
  int64_t asked = 0;              // when it was last called
};

// Thrown at a barrier when another member failed.
struct TeamFailed {};

// One thread's view of its team.
struct Member {
  int rank;
  int size;
  TeamState* state;
  Arena* arena;
  bool calls;  // the thread that run_team was called on

  PILE_SHARED bool leads() const { return rank == 0; }
  // Between pieces of work of a few milliseconds at most, at no fixed place: throws if the call is to end, because another
  // member failed or the caller was interrupted.
  void poll() const;
  // The first of the next `count` queries that nobody has taken yet.
  int64_t take_queries(int64_t count) const;
  // All members wait for each other.
  PILE_SHARED void sync() const {
    if (size > 1) wait();
  }

 private:
  void wait() const;
};

// Whether there are threads beside the caller's: an OpenMP runtime is loaded, and this process is not a forked child.
bool has_threads();

// Run `function(member, context)` on at most `threads` threads, the caller among them; returns when all are done.
// The caller works alone where there are no others, or another call has them. Throws std::bad_alloc, and what `interrupt`
// throws, which the caller's own thread, member 0, asks some times a second (nullptr: never).
void run_team(int threads, void (*function)(const Member&, void*), void* context, void (*interrupt)());

}  // namespace pile
