#include "team.h"

#include <dlfcn.h>
#include <pthread.h>
#include <sched.h>
#include <sys/mman.h>
#include <time.h>

#include <cstdlib>
#include <cstring>
#include <exception>
#include <mutex>
#include <new>

namespace pile {

namespace {

constexpr int64_t kFirstSlab = int64_t{1} << 18;
constexpr int64_t kHugePage = int64_t{1} << 21;
// Memory an idle thread may hold: fresh pages would cost a long list a tenth of its time.
constexpr int64_t kKeep = int64_t{1} << 27;
// Between two questions whether the caller was interrupted, in nanoseconds.
constexpr int64_t kAsk = 50'000'000;
// Then a waiting thread offers its core: the one it waits for may be queued on it.
constexpr int kSpins = 300;

inline void relax() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// In nanoseconds, to a few milliseconds: the coarse clock costs no call of the kernel.
inline int64_t now() {
#ifdef CLOCK_MONOTONIC_COARSE
  constexpr clockid_t clock = CLOCK_MONOTONIC_COARSE;
#else
  constexpr clockid_t clock = CLOCK_MONOTONIC;
#endif
  timespec time;
  clock_gettime(clock, &time);
  return int64_t(time.tv_sec) * 1'000'000'000 + time.tv_nsec;
}

}  // namespace

Arena::~Arena() {
  for (int i = 0; i < count_; ++i) std::free(slabs_[i]);
}

void* Arena::take_bytes(int64_t bytes) {
  // Room for one whole vector past the end, so that the last partial vector can be loaded.
  bytes = (bytes + 127) & ~int64_t{63};
  while (current_ < 0 || used_ + bytes > sizes_[current_]) {
    if (current_ + 1 < count_) {
      ++current_;
      used_ = 0;
      continue;
    }
    if (count_ == kMaxSlabs) throw std::bad_alloc();
    int64_t held = 0;
    for (int i = 0; i < count_; ++i) held += sizes_[i];
    int64_t size = count_ == 0 && first_ > kFirstSlab ? first_ : kFirstSlab;
    while (size < held / 4) size *= 2;  // few slabs, however much many queries take together
    while (size < bytes) size *= 2;
    if (size > kHugePage && bytes > size / 2) size = (bytes + kHugePage - 1) / kHugePage * kHugePage;
    void* slab = nullptr;
    if (posix_memalign(&slab, size >= kHugePage ? kHugePage : 64, size)) throw std::bad_alloc();
#ifdef MADV_HUGEPAGE
    if (size >= kHugePage) madvise(slab, size, MADV_HUGEPAGE);
#endif
    slabs_[count_] = slab;
    sizes_[count_] = size;
    current_ = count_++;
    used_ = 0;
  }
  void* taken = static_cast<char*>(slabs_[current_]) + used_;
  used_ += bytes;
#if defined(PILE_POISON)
  std::memset(taken, 0xff, bytes);  // NaN, and -1: what is read before it is written shows
#endif
  return taken;
}

void Arena::release(Mark mark) {
  current_ = mark.slab < 0 ? (count_ ? 0 : -1) : mark.slab;
  used_ = mark.used;
}

void Arena::trim() {
  current_ = count_ ? 0 : -1;
  used_ = 0;
  if (count_ == 0 || (count_ == 1 && sizes_[0] <= kKeep)) return;
  int64_t total = 0;
  for (int i = 0; i < count_; ++i) {
    total += sizes_[i];
    std::free(slabs_[i]);
  }
  first_ = total < kKeep ? total : kKeep;
  count_ = 0;
  current_ = -1;
}

void Member::poll() const {
  if (state->failed.load(std::memory_order_relaxed)) throw TeamFailed();
  if (!calls || !state->interrupt) return;
  const int64_t time = now();
  if (time - state->asked < kAsk) return;
  state->asked = time;
  state->interrupt();
}

int64_t Member::take_queries(int64_t count) const { return state->next.fetch_add(count, std::memory_order_relaxed); }

void Member::wait() const {
  poll();
  const int round = state->round.load(std::memory_order_relaxed);
  if (state->arrived.fetch_add(1, std::memory_order_acq_rel) + 1 == size) {
    state->arrived.store(0, std::memory_order_relaxed);
    state->round.store(round + 1, std::memory_order_release);
  } else {
    const auto released = [&] {
      return state->round.load(std::memory_order_acquire) != round || state->failed.load(std::memory_order_relaxed);
    };
    for (int i = 0; !released(); ++i) i < kSpins ? relax() : void(sched_yield());
  }
  if (state->failed.load(std::memory_order_relaxed)) throw TeamFailed();
}

namespace {

// A thread's arena for one call: whatever way the call ends, nothing of it stays taken.
class CallArena {
 public:
  ~CallArena() { arena().trim(); }
  Arena* get() { return &arena(); }

 private:
  static Arena& arena() {
    static thread_local Arena arena;
    return arena;
  }
};

// A forked child has none of the runtime's threads, whoever had it start them, and the runtime would wait for them.
std::atomic<bool> forked{false};
[[maybe_unused]] const int fork_handler = pthread_atfork(nullptr, nullptr, [] { forked.store(true); });

// The OpenMP runtime of this process, by the entry points that GCC's compiler calls and LLVM's runtime has as well.
struct OpenMP {
  void (*parallel)(void (*function)(void*), void* context, unsigned threads, unsigned flags);
  int (*rank)();
  int (*size)();
  std::mutex busy;

  bool usable() const { return parallel && rank && size && !forked.load(std::memory_order_relaxed); }
};

OpenMP& openmp() {
  static OpenMP* const runtime = [] {
    auto* found = new OpenMP{};  // never destroyed: threads may outlive main()
    found->parallel = reinterpret_cast<decltype(found->parallel)>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
    found->rank = reinterpret_cast<decltype(found->rank)>(dlsym(RTLD_DEFAULT, "omp_get_thread_num"));
    found->size = reinterpret_cast<decltype(found->size)>(dlsym(RTLD_DEFAULT, "omp_get_num_threads"));
    return found;
  }();
  return *runtime;
}

// One call on a team. Its size is known when the runtime has given the threads, which may be fewer than asked for.
struct Call {
  void (*function)(const Member&, void*);
  void* context;
  int threads;
  TeamState state;
  std::mutex mutex;
  std::exception_ptr error;

  void take_part(int rank, int size) {
    if (rank >= size) return;
    CallArena arena;
    bool gave_up = true;
    try {
      function({rank, size, &state, arena.get(), rank == 0}, context);
      gave_up = false;
    } catch (const TeamFailed&) {
    } catch (...) {
      std::lock_guard<std::mutex> lock(mutex);
      if (!error) error = std::current_exception();
      state.failed.store(true, std::memory_order_relaxed);
    }
    state.left.fetch_add(1, std::memory_order_acq_rel);
    // Others may still work in this member's arena; they notice at their next barrier or poll.
    while (gave_up && state.left.load(std::memory_order_acquire) < size) sched_yield();
  }
};

}  // namespace

bool has_threads() { return openmp().usable(); }

void run_team(int threads, void (*function)(const Member&, void*), void* context, void (*interrupt)()) {
  Call call{function, context, threads, {}, {}, {}};
  call.state.interrupt = interrupt;
  if (interrupt) call.state.asked = now();
  OpenMP& runtime = openmp();
  std::unique_lock<std::mutex> lock(runtime.busy, std::defer_lock);
  if (threads > 1 && runtime.usable() && lock.try_lock()) {
    // All of PyTorch's threads, though some may have nothing to do: the runtime ends threads that a smaller team leaves out.
    const auto part = [](void* context) {
      Call& call = *static_cast<Call*>(context);
      const int given = openmp().size();
      call.take_part(openmp().rank(), given < call.threads ? given : call.threads);
    };
    runtime.parallel(part, &call, 0, 0);
  } else {
    call.take_part(0, 1);
  }
  if (call.error) std::rethrow_exception(call.error);
}

}  // namespace pile
