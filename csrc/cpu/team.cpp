#include "team.h"

#include <pthread.h>
#include <sched.h>
#include <sys/mman.h>

#include <condition_variable>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <mutex>
#include <new>
#include <thread>

namespace pile {

namespace {

constexpr int64_t kFirstBlock = int64_t{1} << 18;
constexpr int64_t kHugePage = int64_t{1} << 21;
// Memory an idle thread may hold: fresh pages would cost a long list a tenth of its time.
constexpr int64_t kKeep = int64_t{1} << 27;
constexpr int kSpins = 4000;

inline void relax() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

template <class Condition>
void spin_until(Condition condition) {
  for (int i = 0; !condition(); ++i) {
    if (i < kSpins)
      relax();
    else
      sched_yield();
  }
}

}  // namespace

Arena::~Arena() {
  for (int i = 0; i < count_; ++i) std::free(blocks_[i]);
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
    if (count_ == kMaxBlocks) throw std::bad_alloc();
    int64_t size = count_ == 0 && first_ > kFirstBlock ? first_ : kFirstBlock;
    while (size < bytes) size *= 2;
    if (size > kHugePage && bytes > size / 2) size = (bytes + kHugePage - 1) / kHugePage * kHugePage;
    void* block = nullptr;
    if (posix_memalign(&block, size >= kHugePage ? kHugePage : 64, size)) throw std::bad_alloc();
#ifdef MADV_HUGEPAGE
    if (size >= kHugePage) madvise(block, size, MADV_HUGEPAGE);
#endif
    blocks_[count_] = block;
    sizes_[count_] = size;
    current_ = count_++;
    used_ = 0;
  }
  void* taken = static_cast<char*>(blocks_[current_]) + used_;
  used_ += bytes;
#if defined(PILE_POISON)
  std::memset(taken, 0xff, bytes);  // NaN, and -1: what is read before it is written shows
#endif
  return taken;
}

void Arena::release(Mark mark) {
  current_ = mark.block < 0 ? (count_ ? 0 : -1) : mark.block;
  used_ = mark.used;
}

void Arena::trim() {
  current_ = count_ ? 0 : -1;
  used_ = 0;
  if (count_ == 0 || (count_ == 1 && sizes_[0] <= kKeep)) return;
  int64_t total = 0;
  for (int i = 0; i < count_; ++i) {
    total += sizes_[i];
    std::free(blocks_[i]);
  }
  first_ = total < kKeep ? total : kKeep;
  count_ = 0;
  current_ = -1;
}

void Member::wait() const {
  const int round = state->round.load(std::memory_order_relaxed);
  if (state->arrived.fetch_add(1, std::memory_order_acq_rel) + 1 == size) {
    state->arrived.store(0, std::memory_order_relaxed);
    state->round.store(round + 1, std::memory_order_release);
  } else {
    spin_until([&] {
      return state->round.load(std::memory_order_acquire) != round || state->failed.load(std::memory_order_relaxed);
    });
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

// Threads that wait for work: briefly spinning, for the next step of a training loop is near, then asleep.
class Pool {
 public:
  std::mutex busy;

  void run(int threads, void (*function)(const Member&, void*), void* context) {
    TeamState state;
    while (workers_ < threads - 1) {
      std::thread(&Pool::work, this, ++workers_, generation_.load()).detach();
    }
    function_ = function;
    context_ = context;
    state_ = &state;
    size_ = threads;
    error_ = nullptr;
    remaining_.store(workers_, std::memory_order_relaxed);
    {
      std::lock_guard<std::mutex> lock(mutex_);
      generation_.fetch_add(1, std::memory_order_release);
    }
    if (sleeping_.load(std::memory_order_acquire)) wake_.notify_all();
    take_part(0);
    spin_until([&] { return remaining_.load(std::memory_order_acquire) == 0; });
    if (error_) std::rethrow_exception(error_);
  }

 private:
  void take_part(int rank) {
    if (rank >= size_) return;
    CallArena arena;
    try {
      function_({rank, size_, state_, arena.get()}, context_);
    } catch (const TeamFailed&) {
    } catch (...) {
      std::lock_guard<std::mutex> lock(mutex_);
      if (!error_) error_ = std::current_exception();
      state_->failed.store(true, std::memory_order_relaxed);
    }
  }

  void work(int rank, int64_t seen) {
    for (;;) {
      auto called = [&] { return generation_.load(std::memory_order_acquire) != seen; };
      for (int i = 0; i < kSpins && !called(); ++i) relax();
      if (!called()) {
        std::unique_lock<std::mutex> lock(mutex_);
        sleeping_.fetch_add(1, std::memory_order_acq_rel);
        wake_.wait(lock, called);
        sleeping_.fetch_sub(1, std::memory_order_relaxed);
      }
      ++seen;
      take_part(rank);
      remaining_.fetch_sub(1, std::memory_order_release);
    }
  }

  int workers_ = 0;
  std::atomic<int64_t> generation_{0};
  std::atomic<int> remaining_{0}, sleeping_{0};
  std::mutex mutex_;
  std::condition_variable wake_;
  void (*function_)(const Member&, void*) = nullptr;
  void* context_ = nullptr;
  TeamState* state_ = nullptr;
  int size_ = 1;
  std::exception_ptr error_;
};

// Never destroyed: its threads outlive main(). Replaced in a forked child, which has no threads.
std::atomic<Pool*> pool{nullptr};

Pool& the_pool() {
  static std::once_flag once;
  std::call_once(once, [] {
    pool.store(new Pool);
    pthread_atfork(nullptr, nullptr, [] { pool.store(new Pool); });
  });
  return *pool.load(std::memory_order_acquire);
}

}  // namespace

void run_team(int threads, void (*function)(const Member&, void*), void* context) {
  if (threads > 1) {
    Pool& pool = the_pool();
    std::unique_lock<std::mutex> lock(pool.busy, std::try_to_lock);
    if (lock.owns_lock()) return pool.run(threads, function, context);
  }
  CallArena arena;
  TeamState state;
  function({0, 1, &state, arena.get()}, context);
}

}  // namespace pile
