// What losses of whole lists are made of: the largest logit, and sums over the documents, piece by piece.
#pragma once

#include "grid.h"

namespace pile::PILE_ISA {

// The documents' largest logit, and a document that has it.
template <class T>
class LargestLogit {
 public:
  T value = 0;
  int position = 0;
  double range = 0;

  void take(int n, Arena& arena) { by_piece_ = arena.take<T>(2 * pieces(n)); }
  // All members; look(), a barrier, find(), a barrier.
  void look(const Member& m, const T* logits, int n) const {
    each_piece(m, n, [&](int p, int begin, int end) {
      find_range(logits + begin, end - begin, by_piece_[2 * p], by_piece_[2 * p + 1]);
    });
  }
  // One member.
  void find(const T* logits, int n) {
    T low = by_piece_[0];
    int piece = 0;
    for (int p = 1; p < pieces(n); ++p) {
      low = smaller(low, by_piece_[2 * p]);
      if (by_piece_[2 * p + 1] > by_piece_[2 * piece + 1]) piece = p;
    }
    value = by_piece_[2 * piece + 1];
    range = double(value) - double(low);
    position = piece * kPiece;
    while (logits[position] != value) ++position;
  }

 private:
  T* by_piece_ = nullptr;  // lowest and highest
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
