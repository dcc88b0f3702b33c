// What losses of whole lists are made of: the largest logit, and sums over the documents, piece by piece.
#pragma once

#include "grid.h"

namespace pile::PILE_ISA {

template <class T>
class LargestLogit {
 public:
  void take(int n, Arena& arena) { by_piece_ = arena.take<T>(pieces(n)); }
  void look(const Member& m, const T* logits, int n) const {
    each_piece(m, n, [&](int p, int begin, int end) {
      T low;
      find_range(logits + begin, end - begin, low, by_piece_[p]);
    });
  }
  T top(int n) const {
    T top = by_piece_[0];
    for (int p = 1; p < pieces(n); ++p) top = larger(top, by_piece_[p]);
    return top;
  }

 private:
  T* by_piece_ = nullptr;
};

// Some sums over the documents, in vectors within a tile and in double beyond.
template <class T>
class ListSums {
 public:
  static constexpr int kMax = 3;

  void take(int sums, int n, Arena& arena) {
    number_ = sums;
    by_piece_ = arena.take<double>(int64_t(sums) * pieces(n));
  }
  // visit(k, lanes, sums) adds the vector of documents from k on, of which the first `lanes` are there, to sums[0, number).
  template <class Visit>
  void add(const Member& m, int n, Visit visit) const {
    each_piece(m, n, [&](int p, int begin, int end) {
      double totals[kMax] = {};
      for (int tile = begin; tile < end; tile += kTile) {
        Vec<T> sums[kMax] = {};
        for (int k = tile; k < smaller(end, tile + kTile); k += kLanes<T>) visit(k, end - k, sums);
        for (int s = 0; s < number_; ++s) totals[s] += double(sum<T>(sums[s]));
      }
      for (int s = 0; s < number_; ++s) by_piece_[int64_t(p) * number_ + s] = totals[s];
    });
  }
  double total(int n, int which) const {
    double total = 0;
    for (int p = 0; p < pieces(n); ++p) total += by_piece_[int64_t(p) * number_ + which];
    return total;
  }

 private:
  int number_ = 0;
  double* by_piece_ = nullptr;
};

}  // namespace pile::PILE_ISA
