// Sorting by keys, by a team.
#pragma once

#include <cstdint>
#include <cstring>

#include "team.h"

namespace pile::PILE_ISA {

// Rises as a number falls; -0 is 0. Key: the unsigned integer of its size.
template <class Key, class T>
Key falling_key(T x) {
  static_assert(sizeof(Key) == sizeof(T));
  const T canonical = x + T(0);
  Key word;
  std::memcpy(&word, &canonical, sizeof word);
  const Key sign = Key(1) << (8 * sizeof(Key) - 1);
  return word & sign ? word : ~(word | sign);
}
// The number of a key.
template <class T, class Key>
T of_falling_key(Key key) {
  const Key sign = Key(1) << (8 * sizeof(Key) - 1), word = key & sign ? key : ~key & ~sign;
  T x;
  std::memcpy(&x, &word, sizeof x);
  return x;
}

// A stable radix sort of (key, item) by rising keys, by a team; the result does not depend on the team's size. A byte at a time,
// keys beside their items: more digits at once, or two arrays, would write to more pages than a processor keeps track of.
template <class Key>
class RadixSort {
 public:
  struct Pair {
    Key key;
    int item;
  };

  // Room for n pairs, which the caller fills.
  void take(int n, int members, Arena& arena) {
    n_ = n;
    pairs_ = arena.take<Pair>(n);
    other_ = arena.take<Pair>(n);
    counts_ = n > kInsertion ? arena.take<int>(int64_t(members) * kDigits * (members > 1 ? 1 : sizeof(Key))) : nullptr;
  }
  Pair* pairs() const { return pairs_; }

  void run(const Member& m) {
    if (n_ <= kInsertion) {
      if (m.leads()) insert();
      m.sync();
      return;
    }
    if (m.size == 1) return run_alone();
    const int from = int(int64_t(n_) * m.rank / m.size), to = int(int64_t(n_) * (m.rank + 1) / m.size);
    for (int shift = 0; shift < int(8 * sizeof(Key)); shift += 8) {
      int* count = counts_ + int64_t(m.rank) * kDigits;
      for (int d = 0; d < kDigits; ++d) count[d] = 0;
      for (int k = from; k < to; ++k) ++count[digit(pairs_[k].key, shift)];
      m.sync();
      if (m.leads()) skip_ = place(counts_, m.size);
      m.sync();
      for (int k = from; k < to && !skip_; ++k) other_[count[digit(pairs_[k].key, shift)]++] = pairs_[k];
      m.sync();
      if (m.leads() && !skip_) swap();
      m.sync();
    }
  }

 private:
  static constexpr int kInsertion = 64, kDigits = 256;

  static PILE_INLINE int digit(Key key, int shift) { return int(key >> shift) & (kDigits - 1); }
  void swap() {
    Pair* swap = pairs_;
    pairs_ = other_;
    other_ = swap;
  }

  // One member counts all digits at once: the order in which it finds them does not matter.
  void run_alone() {
    constexpr int kBytes = sizeof(Key);
    for (int d = 0; d < kBytes * kDigits; ++d) counts_[d] = 0;
    for (int k = 0; k < n_; ++k)
#pragma GCC unroll 8
      for (int b = 0; b < kBytes; ++b) ++counts_[b * kDigits + digit(pairs_[k].key, 8 * b)];
    for (int b = 0; b < kBytes; ++b) {
      int* count = counts_ + b * kDigits;
      if (place(count, 1)) continue;
      for (int k = 0; k < n_; ++k) other_[count[digit(pairs_[k].key, 8 * b)]++] = pairs_[k];
      swap();
    }
  }

  // In place of how many pairs of a digit each member has: where its first one goes. True if all pairs have the same digit.
  bool place(int* counts, int members) const {
    for (int d = 0, start = 0; d < kDigits; ++d) {
      const int before = start;
      for (int r = 0; r < members; ++r) {
        int& own = counts[int64_t(r) * kDigits + d];
        const int size = own;
        own = start;
        start += size;
      }
      if (start - before == n_) return true;
    }
    return false;
  }

  void insert() {
    for (int k = 1; k < n_; ++k) {
      const Pair own = pairs_[k];
      int to = k;
      for (; to > 0 && pairs_[to - 1].key > own.key; --to) pairs_[to] = pairs_[to - 1];
      pairs_[to] = own;
    }
  }

  Pair *pairs_ = nullptr, *other_ = nullptr;
  int* counts_ = nullptr;
  int n_ = 0;
  bool skip_ = false;
};

}  // namespace pile::PILE_ISA
