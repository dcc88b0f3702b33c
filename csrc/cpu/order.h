// The documents of one query by falling label: the layout every pair sum works in. Pairs with a label difference are then
// row i against the columns below[i] and after; equal labels never meet.
//
// Words, in all of csrc/cpu:
//   slot, position   a document's place in the caller's row; its place in this order
//   piece            kPiece positions or slots, what a member takes at a time; a window is a piece of slots, seen by position
//   tile             kTile positions that go through several loops together, so that their numbers stay in L1
//   block            a run of labels that share a field (field_sums.h); a chunk is a part of it with moments of its own
//   cell             an interval of logits, kCell wide
//   lane             one number of a vector
//   wide             of logits: spread too far for products of exponentials (pair_sums.h)
#pragma once

#include "load.h"
#include "radix_sort.h"
#include "team.h"

namespace pile::PILE_ISA {

// A whole number of vectors: only the last piece ends within a vector, and there the arrays, all of an arena, have room to its
// end.
constexpr int kPiece = 4096;
PILE_INLINE int pieces(int n) { return (n + kPiece - 1) / kPiece; }
// visit(piece, its first position, its end) for this member's pieces of [0, n).
template <class Visit>
PILE_INLINE void each_piece(const Member& m, int n, Visit visit) {
  for (int p = m.rank; p < pieces(n); p += m.size) visit(p, p * kPiece, smaller(n, (p + 1) * kPiece));
}
// visit(first position) for every vector of this member's pieces.
template <class T, class Visit>
PILE_INLINE void each_vector(const Member& m, int n, Visit visit) {
  each_piece(m, n, [&](int, int begin, int end) {
    for (int k = begin; k < end; k += kLanes<T>) visit(k);
  });
}

constexpr int kTile = 512;

// From how many documents on a list asks whether the call is to end (Member::poll): once, and in each iteration. Shorter lists
// are soon over, and the question would cost them too much.
constexpr int kPollQuery = 64, kPollIteration = 512;

// Positions [begin, end).
struct Span {
  int begin, end;
};

struct Order {
  int n = 0;                // documents
  int labelled = 0;         // the first so many have a label
  int* slot = nullptr;      // slot within the query, by position
  double* label = nullptr;  // by position, < labelled; of each label's first and last position only
  int* below = nullptr;     // by position, < labelled: first position with a smaller label
  // The same documents as spans that were neighbours before they were sorted, `spans` for each window of kPiece slots, some
  // empty: to read a long list window by window, not all of it again for each label. No windows: as good as one.
  int windows = 0, spans = 0;
  const Span* span = nullptr;
  bool has_pairs() const { return labelled > 0 && below[0] < labelled; }
};

// A query's labels where they are a few grades, nearly always. Grades are numbered as they come.
struct Grades {
  static constexpr int kMax = 16;
  int number = 0;
  double value[kMax];
  int count[kMax] = {};

  // `number` if it is not among them.
  int find(double label) const {
    int g = 0;
    while (g < number && value[g] != label) ++g;
    return g;
  }
  bool add(double label) {
    if (number == kMax) return false;
    value[number++] = label;
    return true;
  }
};

// Which grade each label is, and how many are of each. False if there are too many grades. Grades are unpredictable: no branch
// on them where masks serve.
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
  constexpr int kSmall = 32;
  uint8_t of_small[kSmall];  // the grade of a small whole label
  for (int y = 0; y < kSmall; ++y) of_small[y] = Grades::kMax;
  for (int k = 0; k < n; ++k) {
    const int small = label[k] >= 0 && label[k] < kSmall ? int(label[k]) : 0;
    const bool whole = small == label[k];
    int g = whole ? of_small[small] : Grades::kMax;
    if (g == Grades::kMax) {
      g = grades.find(label[k]);
      if (g == grades.number && !grades.add(label[k])) return false;
      if (whole) of_small[small] = uint8_t(g);
    }
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

// By falling label, those of equal ones in their old order. One member.
inline void sort_any(const double* label, const int* slot, int n, Order& order, Arena& arena) {
  const Member alone = {0, 1, nullptr, &arena, false};
  RadixSort<uint64_t> sort;
  sort.take(n, 1, arena);
  for (int i = 0; i < n; ++i) sort.pairs()[i] = {falling_key<uint64_t>(label[i]), i};
  sort.run(alone);
  for (int k = 0; k < n; ++k) {
    const int item = sort.pairs()[k].item;
    order.slot[k] = slot[item];
    order.label[k] = label[item];
  }
  for (int k = n - 1, end = n; k >= 0; --k) {
    if (k + 1 < n && order.label[k] != order.label[k + 1]) end = k + 1;
    order.below[k] = end;
  }
}

// The order of a query's documents, by a team: counting sort, each piece of the slots counted and placed by one member.
class LabelSort {
 public:
  // Orders the documents whose `include` byte is set (nullptr: all `slots`); without labels every document counts as
  // unlabelled. All members call it; the leader's arena holds the result.
  void run(const Member& m, const View& labels, int64_t offset, int slots, const uint8_t* include, Order& order) {
    if (m.leads()) plan(labels, slots, include, order, *m.arena);
    m.sync();
    if (!labels.data || slots == 0) return;
    for (int p = m.rank; p < pieces(slots); p += m.size) count(p, labels, offset, slots, include);
    m.sync();
    if (m.leads()) join(pieces(slots), order, *m.arena);
    m.sync();
    for (int p = m.rank; p < pieces(slots); p += m.size) place(p, order);
    m.sync();
    if (m.leads()) m.arena->release(scratch_);
  }

 private:
  // Scratch of a piece begins here: whole vectors are written past its last document.
  static constexpr int kStride = kPiece + 64;
  struct Piece {
    Grades grades;
    bool graded;
    int labelled, unlabelled;
    int start[Grades::kMax], start_unlabelled;  // positions
  };

  void plan(const View& labels, int slots, const uint8_t* include, Order& order, Arena& arena) {
    order = Order();
    order.slot = arena.take<int>(slots);
    if (!labels.data || slots == 0) {
      for (int i = 0; i < slots; ++i)
        if (!include || include[i]) order.slot[order.n++] = i;
      return;
    }
    order.label = arena.take<double>(slots);
    order.below = arena.take<int>(slots);
    span_ = pieces(slots) > 1 ? arena.take<Span>(pieces(slots) * kSpans) : nullptr;
    scratch_ = arena.mark();
    const int64_t room = pieces(slots) > 1 ? int64_t(pieces(slots)) * kStride : slots;
    label_ = arena.take<double>(room);
    slot_ = arena.take<int>(room);
    unlabelled_ = arena.take<int>(room);
    grade_ = arena.take<uint8_t>(room);
    piece_ = arena.take<Piece>(pieces(slots));
  }

  void count(int p, const View& labels, int64_t offset, int slots, const uint8_t* include) {
    const int begin = p * kPiece, end = smaller(slots, begin + kPiece), own = p * kStride;
    double* label = label_ + own;
    int *slot = slot_ + own, *unlabelled = unlabelled_ + own;
    int n = 0, spare = 0;
    with_labels(labels, [&](const auto* data) {
      const auto all_have_labels = [&](int64_t stride) {  // a loop that a compiler turns into vectors
        bool known = true;
        for (int i = begin; i < end; ++i) {
          label[i - begin] = double(read(data, offset + i * stride));
          slot[i - begin] = i;
          known &= label[i - begin] == label[i - begin];
        }
        return known;
      };
      if (!include && (labels.document == 1 ? all_have_labels(1) : all_have_labels(labels.document))) {
        n = end - begin;
        return;
      }
      for (int i = begin; i < end; ++i) {
        if (include && !include[i]) continue;
        const double y = double(read(data, offset + i * labels.document));
        label[n] = y;
        slot[n] = unlabelled[spare] = i;
        const bool known = y == y;
        n += known;
        spare += !known;
      }
    });
    Piece& piece = piece_[p];
    piece.grades = Grades();
    piece.graded = find_grades(label, n, piece.grades, grade_ + own);
    piece.labelled = n;
    piece.unlabelled = spare;
  }

  void join(int number, Order& order, Arena& arena) {
    Grades all = piece_[0].grades;
    graded_ = piece_[0].graded;
    int n = piece_[0].labelled;
    for (int p = 1; p < number; ++p) {
      const Piece& piece = piece_[p];
      n += piece.labelled;
      graded_ &= piece.graded;
      for (int g = 0; graded_ && g < piece.grades.number; ++g) {
        const int at = all.find(piece.grades.value[g]);
        graded_ = at < all.number || all.add(piece.grades.value[g]);
        if (graded_) all.count[at] += piece.grades.count[g];
      }
    }
    order.labelled = order.n = n;
    for (int p = 0; p < number; ++p) {
      piece_[p].start_unlabelled = order.n;
      order.n += piece_[p].unlabelled;
    }
    if (!graded_) {
      for (int p = 1, to = piece_[0].labelled; p < number; to += piece_[p++].labelled) {
        std::memmove(label_ + to, label_ + p * kStride, piece_[p].labelled * sizeof *label_);
        std::memmove(slot_ + to, slot_ + p * kStride, piece_[p].labelled * sizeof *slot_);
      }
      sort_any(label_, slot_, n, order, arena);
      return;
    }
    int start[Grades::kMax];
    for (int g = 0; g < all.number; ++g) {
      start[g] = 0;
      for (int o = 0; o < all.number; ++o) start[g] += all.value[o] > all.value[g] ? all.count[o] : 0;
      group_[g] = {start[g], start[g] + all.count[g]};
      order.label[group_[g].begin] = order.label[group_[g].end - 1] = all.value[g];
    }
    groups_ = all.number;
    for (int p = 0; p < number; ++p) {
      const Grades& own = piece_[p].grades;
      for (int g = 0; g < own.number; ++g) {
        int& at = start[p == 0 ? g : all.find(own.value[g])];
        piece_[p].start[g] = at;
        at += own.count[g];
      }
      if (number == 1) continue;
      Span* span = span_ + p * kSpans;
      for (int g = 0; g < Grades::kMax; ++g) {
        const int begin = g < own.number ? piece_[p].start[g] : 0;
        span[g] = {begin, begin + (g < own.number ? own.count[g] : 0)};
      }
      span[Grades::kMax] = {piece_[p].start_unlabelled, piece_[p].start_unlabelled + piece_[p].unlabelled};
    }
    if (number > 1) {
      order.windows = number;
      order.spans = kSpans;
      order.span = span_;
    }
  }

  void place(int p, Order& order) {
    Piece& piece = piece_[p];
    const int own = p * kStride;
    for (int k = 0; k < piece.unlabelled; ++k) order.slot[piece.start_unlabelled + k] = unlabelled_[own + k];
    if (!graded_) return;
    scatter_by_grade(slot_ + own, grade_ + own, piece.labelled, piece.grades.number, piece.start, order.slot);
    int* const below = order.below;
    for (int g = 0; g < groups_; ++g) {
      const int end = group_[g].end, last = smaller(end, (p + 1) * kPiece);
      for (int k = larger(group_[g].begin, p * kPiece); k < last; ++k) below[k] = end;
    }
  }

  static constexpr int kSpans = Grades::kMax + 1;  // of a window: its grades', and the unlabelled
  Arena::Mark scratch_ = {};
  double* label_ = nullptr;
  int *slot_ = nullptr, *unlabelled_ = nullptr;
  uint8_t* grade_ = nullptr;
  Piece* piece_ = nullptr;
  bool graded_ = true;
  int groups_ = 0;
  Span group_[Grades::kMax], *span_ = nullptr;
};

}  // namespace pile::PILE_ISA
