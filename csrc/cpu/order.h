// The documents of one query by falling label: the layout every pair sum works in. Pairs with a label difference are then
// row i against the columns below[i] and after; equal labels never meet.
#pragma once

#include "load.h"
#include "team.h"

namespace pile {
namespace PILE_ISA {

struct Order {
  int n = 0;               // documents
  int labelled = 0;        // the first so many have a label
  int* slot = nullptr;     // slot within the query, by position
  double* label = nullptr;  // by position, < labelled; of each label's first and last position only
  int* below = nullptr;    // by position, < labelled: first position with a smaller label
  bool has_pairs() const { return labelled > 0 && below[0] < labelled; }
};

// A query's labels where they are a few grades, nearly always. Grades are numbered as they come.
struct Grades {
  static constexpr int kMax = 16;
  int number = 0;
  double value[kMax];
  int count[kMax] = {};

  bool add(double label) {
    if (number == kMax) return false;
    value[number++] = label;
    return true;
  }
};

// Which grade each label is, and how many are of each. False if there are too many grades. Grades are unpredictable: no branch on
// them where masks serve.
inline bool find_grades(const double* label, int n, Grades& grades, uint8_t* grade) {
#if defined(__AVX512F__)
  for (int k = 0; k < n; k += 8) {
    const __m512d own = _mm512_loadu_pd(label + k);
    __mmask8 unknown = n - k < 8 ? (1u << (n - k)) - 1 : 0xff;
    const __mmask8 all = unknown;
    __m128i found = _mm_setzero_si128();
    for (int g = 0;; ++g) {
      if (g == grades.number) {
        if (!unknown) break;
        if (!grades.add(label[k + __builtin_ctz(unknown)])) return false;
      }
      const __mmask8 hits = _mm512_mask_cmp_pd_mask(all, own, _mm512_set1_pd(grades.value[g]), _CMP_EQ_OQ);
      found = _mm_mask_mov_epi8(found, hits, _mm_set1_epi8(char(g)));
      grades.count[g] += __builtin_popcount(hits);
      unknown &= __mmask8(~hits);
    }
    _mm_storel_epi64(reinterpret_cast<__m128i*>(grade + k), found);
  }
#else
  int counts[2][Grades::kMax] = {};  // by turns: a count must not wait for the last one's store
  for (int k = 0; k < n; ++k) {
    int g = 0;
    while (g < grades.number && grades.value[g] != label[k]) ++g;
    if (g == grades.number && !grades.add(label[k])) return false;
    grade[k] = uint8_t(g);
    ++counts[k & 1][g];
  }
  for (int g = 0; g < grades.number; ++g) grades.count[g] = counts[0][g] + counts[1][g];
#endif
  return true;
}

// slot[] by grade into out[], each grade's from start[grade] on, in their old order.
inline void scatter_by_grade(const int* slot, const uint8_t* grade, int n, int grades, int (&start)[Grades::kMax], int* out) {
#if defined(__AVX512F__)
  for (int k = 0; k < n; k += 16) {
    const __mmask16 all = n - k < 16 ? (1u << (n - k)) - 1 : 0xffff;
    const __m128i of = _mm_loadu_si128(reinterpret_cast<const __m128i*>(grade + k));
    const __m512i slots = _mm512_loadu_si512(slot + k);
    for (int g = 0; g < grades; ++g) {
      const __mmask16 hits = _mm_mask_cmpeq_epi8_mask(all, of, _mm_set1_epi8(char(g)));
      const int count = __builtin_popcount(hits);
      _mm512_mask_storeu_epi32(out + start[g], __mmask16((1u << count) - 1), _mm512_maskz_compress_epi32(hits, slots));
      start[g] += count;
    }
  }
#else
  (void)grades;
  for (int k = 0; k < n; ++k) out[start[grade[k]]++] = slot[k];
#endif
}

// Stable counting sort. False if there are too many grades.
inline bool sort_grades(const double* label, const int* slot, int n, Order& order, Arena& arena) {
  Grades grades;
  uint8_t* grade = arena.take<uint8_t>(n);
  if (!find_grades(label, n, grades, grade)) return false;
  int start[Grades::kMax];
  for (int g = 0; g < grades.number; ++g) {
    start[g] = 0;
    for (int o = 0; o < grades.number; ++o) start[g] += grades.value[o] > grades.value[g] ? grades.count[o] : 0;
    const int end = start[g] + grades.count[g];
    order.label[start[g]] = order.label[end - 1] = grades.value[g];
    for (int k = start[g]; k < end; ++k) order.below[k] = end;
  }
  scatter_by_grade(slot, grade, n, grades.number, start, order.slot);
  return true;
}

// Stable radix sort by falling label, a byte at a time; bytes that are the same everywhere cost nothing.
inline void sort_any(const double* label, const int* slot, int n, Order& order, Arena& arena) {
  uint64_t* key = arena.take<uint64_t>(n);
  uint64_t* other_key = arena.take<uint64_t>(n);
  int* item = arena.take<int>(n);
  int* other_item = arena.take<int>(n);
  for (int i = 0; i < n; ++i) {
    const double canonical = label[i] + 0.0;  // -0 is 0
    int64_t word;
    std::memcpy(&word, &canonical, 8);
    const uint64_t rising = uint64_t(word) ^ (uint64_t(word >> 63) | (uint64_t(1) << 63));
    key[i] = ~rising;
    item[i] = i;
  }
  if (n <= 64) {
    for (int i = 1; i < n; ++i) {
      const uint64_t k = key[i];
      const int it = item[i];
      int j = i;
      for (; j > 0 && key[j - 1] > k; --j) {
        key[j] = key[j - 1];
        item[j] = item[j - 1];
      }
      key[j] = k;
      item[j] = it;
    }
  } else {
    for (int shift = 0; shift < 64; shift += 8) {
      int count[256] = {};
      for (int i = 0; i < n; ++i) ++count[(key[i] >> shift) & 255];
      if (count[(key[0] >> shift) & 255] == n) continue;
      for (int b = 0, start = 0; b < 256; ++b) {
        const int c = count[b];
        count[b] = start;
        start += c;
      }
      for (int i = 0; i < n; ++i) {
        const int to = count[(key[i] >> shift) & 255]++;
        other_key[to] = key[i];
        other_item[to] = item[i];
      }
      uint64_t* k = key;
      key = other_key;
      other_key = k;
      int* it = item;
      item = other_item;
      other_item = it;
    }
  }
  for (int k = 0; k < n; ++k) {
    order.slot[k] = slot[item[k]];
    order.label[k] = label[item[k]];
  }
  for (int k = n - 1, end = n; k >= 0; --k) {
    if (k + 1 < n && order.label[k] != order.label[k + 1]) end = k + 1;
    order.below[k] = end;
  }
}

// Order the documents whose `include` byte is set (nullptr: all `slots`). Without labels every document counts as unlabelled.
inline Order order_by_label(const View& labels, int64_t offset, int slots, const uint8_t* include, Arena& arena) {
  Order order;
  order.slot = arena.take<int>(slots);
  if (!labels.data) {
    for (int i = 0; i < slots; ++i)
      if (!include || include[i]) order.slot[order.n++] = i;
    return order;
  }
  order.label = arena.take<double>(slots);
  order.below = arena.take<int>(slots);
  const Arena::Mark scratch = arena.mark();
  double* label = arena.take<double>(slots);
  int* slot = arena.take<int>(slots);
  int* unlabelled = arena.take<int>(slots);
  int n = 0, spare = 0;
  with_labels(labels, [&](const auto* data) {
    const auto all_have_labels = [&](int64_t stride) {  // a loop that a compiler turns into vectors
      bool known = true;
      for (int i = 0; i < slots; ++i) {
        label[i] = double(read(data, offset + i * stride));
        slot[i] = i;
        known &= label[i] == label[i];
      }
      return known;
    };
    if (!include && (labels.document == 1 ? all_have_labels(1) : all_have_labels(labels.document))) {
      n = slots;
      return;
    }
    for (int i = 0; i < slots; ++i) {
      if (include && !include[i]) continue;
      const double y = double(read(data, offset + i * labels.document));
      label[n] = y;
      slot[n] = unlabelled[spare] = i;
      const bool known = y == y;
      n += known;
      spare += !known;
    }
  });
  if (!sort_grades(label, slot, n, order, arena)) sort_any(label, slot, n, order, arena);
  for (int k = 0; k < spare; ++k) order.slot[n + k] = unlabelled[k];
  order.n = n + spare;
  order.labelled = n;
  arena.release(scratch);
  return order;
}

// The pairs' weights: ω_ij = gain_i − gain_j, or 1 where gain is nullptr.
template <class T>
struct PairWeights {
  const T* gain = nullptr;     // by position, about the middle of the query's gains
  T* inverse = nullptr;        // 1 / k_i, 0 where a document has no pair
  double total = 0;            // K = Σ ω over P
};

template <class T>
PairWeights<T> pair_weights(const Order& order, PairWeight kind, Arena& arena) {
  PairWeights<T> w;
  const int n = order.labelled;
  T* gain = kind == PairWeight::none ? nullptr : arena.take<T>(n);
  w.inverse = arena.take<T>(n);
  auto value = [&](int k) { return kind == PairWeight::gain_gap ? __builtin_exp2(order.label[k]) : order.label[k]; };
  const double middle = gain && n ? (value(0) + value(n - 1)) / 2 : 0;
  double all = 0;
  if (gain) {
    for (int k = 0; k < n; k = order.below[k]) {
      const T g = T(value(k) - middle);
      for (int i = k; i < order.below[k]; ++i) gain[i] = g;
      all += double(g) * (order.below[k] - k);
    }
  }
  double above = 0;  // Σ gain before this label
  for (int k = 0; k < n;) {
    const int end = order.below[k];
    double up = k, down = n - end;
    if (gain) {
      const double own = double(gain[k]) * (end - k);
      up = above - k * double(gain[k]);
      down = (n - end) * double(gain[k]) - (all - above - own);
      above += own;
    }
    const double total = up + down;
    for (int i = k; i < end; ++i) w.inverse[i] = total > 0 ? T(1 / total) : T(0);
    w.total += down * (end - k);
    k = end;
  }
  w.gain = gain;
  return w;
}

}  // namespace PILE_ISA
}  // namespace pile
