// The scheduler of the emulation: fibers, barriers, warp collectives. One block at a time, one fiber at a time.
#include "cuda_emulation.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

// Save this stack pointer to *from and go on at `to`: the registers a callee has to keep lie on the stack.
extern "C" void emulation_switch(void** from, void* to);
asm(R"(
.text
.globl emulation_switch
.type emulation_switch,@function
emulation_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size emulation_switch,.-emulation_switch
)");

namespace emulation {

Index thread, block, block_size, grid_size;

namespace {

constexpr size_t kStack = size_t(1) << 18;

struct Stack {
  char* base;
  Stack()
      : base(static_cast<char*>(
            mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0))) {
    if (base == MAP_FAILED) throw std::bad_alloc();
  }
  Stack(Stack&& other) noexcept : base(other.base) { other.base = nullptr; }
  ~Stack() {
    if (base) munmap(base, kStack);
  }
};

enum class State { ready, at_barrier, in_collective, done };

struct Fiber {
  void* stack_pointer = nullptr;
  void* fake_stack = nullptr;  // AddressSanitizer's
  State state = State::ready;
  unsigned mask = 0;  // of the collective it waits in
  uint64_t value = 0;
  int source = 0;
};

// Everything of the block that runs.
std::vector<Stack> stacks;
std::vector<Fiber> fibers;
Fiber* running = nullptr;
void* scheduler_stack = nullptr;
void* scheduler_fake = nullptr;
const void* scheduler_bottom = nullptr;
size_t scheduler_size = 0;
const std::function<void()>* body = nullptr;
unsigned char* shared = nullptr;
unsigned live = 0, at_barrier = 0;
std::string problem;
std::string order_name = "forward";
std::mt19937 random_numbers(0);
int shared_bytes_limit = 99 * 1024;

int index_of(const Fiber* fiber) { return int(fiber - fibers.data()); }

void before_switch([[maybe_unused]] void** fake, [[maybe_unused]] const void* bottom, [[maybe_unused]] size_t size) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(fake, bottom, size);
#endif
}
void after_switch([[maybe_unused]] void* fake, [[maybe_unused]] const void** bottom, [[maybe_unused]] size_t* size) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake, bottom, size);
#endif
}

void to_scheduler(bool for_good) {
  Fiber* self = running;
  before_switch(for_good ? nullptr : &self->fake_stack, scheduler_bottom, scheduler_size);
  emulation_switch(&self->stack_pointer, scheduler_stack);
  after_switch(self->fake_stack, &scheduler_bottom, &scheduler_size);
}

void to_fiber(Fiber& fiber) {
  running = &fiber;
  thread.x = unsigned(index_of(&fiber));
  before_switch(&scheduler_fake, stacks[thread.x].base, kStack);
  emulation_switch(&scheduler_stack, fiber.stack_pointer);
  after_switch(scheduler_fake, nullptr, nullptr);
  running = nullptr;
}

void release_barrier() {
  if (at_barrier == 0 || at_barrier < live) return;
  at_barrier = 0;
  for (Fiber& fiber : fibers)
    if (fiber.state == State::at_barrier) fiber.state = State::ready;
}

extern "C" void emulation_fiber() {
  after_switch(nullptr, &scheduler_bottom, &scheduler_size);
  (*body)();
  running->state = State::done;
  --live;
  const int first = index_of(running) / 32 * 32;
  for (int l = first; l < first + 32 && l < int(fibers.size()); ++l)
    if (fibers[l].state == State::in_collective && fibers[l].mask >> lane() & 1)
      problem = "a warp collective waits for a thread that has left";
  release_barrier();  // those that have left are not waited for
  to_scheduler(true);
  std::abort();
}

void run_block(const std::vector<unsigned>& order) {
  live = unsigned(fibers.size());
  at_barrier = 0;
  for (size_t t = 0; t < fibers.size(); ++t) {
    fibers[t] = Fiber();
    // As if emulation_switch had been called from emulation_fiber's first instruction; a call leaves the stack 8 off 16 bytes.
    void** top = reinterpret_cast<void**>(stacks[t].base + kStack) - 2;
    top[0] = reinterpret_cast<void*>(&emulation_fiber);
    fibers[t].stack_pointer = top - 6;
    for (int k = 1; k <= 6; ++k) top[-k] = nullptr;
  }
  while (live > 0 && problem.empty()) {
    bool progress = false;
    for (unsigned t : order) {
      if (fibers[t].state != State::ready) continue;
      to_fiber(fibers[t]);
      progress = true;
      if (!problem.empty()) break;
    }
    if (!progress) problem = "deadlock: not every thread reaches the same barrier or warp collective";
  }
}

}  // namespace

bool set_order(const char* name) {
  const std::string wanted = name;
  if (wanted != "forward" && wanted != "backward" && wanted != "random") return false;
  order_name = wanted;
  random_numbers.seed(0);
  return true;
}

void set_shared_limit(int bytes) { shared_bytes_limit = bytes; }
int shared_limit() { return shared_bytes_limit; }

void* shared_memory() { return shared; }

void block_barrier() {
  running->state = State::at_barrier;
  ++at_barrier;
  release_barrier();
  to_scheduler(false);
}

uint64_t warp_collective(unsigned mask, uint64_t value, int source) {
  Fiber* self = running;
  const int first = index_of(self) / 32 * 32;
  self->state = State::in_collective;
  self->mask = mask;
  self->value = value;
  self->source = source;
  bool complete = true;
  if (!(mask >> lane() & 1) || (source >= 0 && !(mask >> source & 1)))
    problem = "a warp collective's mask lacks the lane itself or its source";
  for (int l = 0; l < 32; ++l) {
    if (!(mask >> l & 1)) continue;
    const Fiber* other = first + l < int(fibers.size()) ? &fibers[first + l] : nullptr;
    if (!other || other->state == State::done) problem = "a warp collective waits for a thread that has left";
    // A lane that waits under another mask is not here yet; if it never comes the scheduler finds a deadlock.
    complete = complete && other && other->state == State::in_collective && other->mask == mask;
  }
  if (complete && problem.empty()) {
    uint64_t answer[32] = {}, ballot = 0;
    for (int l = 0; l < 32; ++l)
      if (mask >> l & 1) ballot |= uint64_t(fibers[first + l].value != 0) << l;
    for (int l = 0; l < 32; ++l)
      if (mask >> l & 1) answer[l] = fibers[first + l].source < 0 ? ballot : fibers[first + fibers[first + l].source].value;
    for (int l = 0; l < 32; ++l) {
      if (!(mask >> l & 1)) continue;
      fibers[first + l].value = answer[l];
      fibers[first + l].state = State::ready;
    }
  }
  to_scheduler(false);
  return self->value;
}

void launch(unsigned grid, unsigned threads, size_t shared_bytes, const std::function<void()>& kernel) {
  if (grid == 0 || threads == 0 || threads > 1024) throw std::runtime_error("emulation: invalid configuration argument");
  if (shared_bytes > size_t(shared_bytes_limit)) throw std::runtime_error("emulation: too much shared memory");
  while (stacks.size() < threads) stacks.emplace_back();
  fibers.resize(threads);
  body = &kernel;
  block_size.x = threads;
  grid_size.x = grid;
  problem.clear();
  std::vector<unsigned> order(threads), blocks(grid);
  auto arrange = [](std::vector<unsigned>& items) {
    std::iota(items.begin(), items.end(), 0u);
    if (order_name == "backward") std::reverse(items.begin(), items.end());
    if (order_name == "random") std::shuffle(items.begin(), items.end(), random_numbers);
  };
  arrange(blocks);
  for (unsigned b : blocks) {
    block.x = b;
    arrange(order);
    std::unique_ptr<unsigned char, void (*)(void*)> memory(
        static_cast<unsigned char*>(std::aligned_alloc(16, (shared_bytes + 15) / 16 * 16)), std::free);
    shared = memory.get();
    if (shared_bytes) std::memset(shared, 0xff, shared_bytes);
    run_block(order);
    shared = nullptr;
    if (!problem.empty()) throw std::runtime_error("emulation: " + problem);
  }
}

}  // namespace emulation
