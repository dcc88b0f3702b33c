// Sums of w_j σ(u_j − u_i) and of w_j σ'(u_i − u_j) over all pairs of documents that lie in the order of their logits: linear
// time at any spread, and no difference of large numbers.
//
// For v >= 0 and x = e^{−v}, σ(−v) = x / (1 + x) and σ'(v) = x / (1 + x)². Both are x times a function that is smooth on [0, 1],
// whose nearest pole lies at −1: the polynomial that interpolates it at K nodes errs by about 5.83^−K, 5.83 = 3 + √8 (measured,
// of σ: K = 12 4e-10, K = 20 1e-15, relative to x). And the powers of x = e^{−(u_i − u_j)} are products of what i has and what j
// has, so what the documents above i do to it are K sums that run down the list,
//
//   A_k(i) = Σ_{j above i} w_j e^{−k (u_j − u_i)} = (A_k(i − 1) + w_{i−1}) E_i^k,   E_i = e^{−(u_{i−1} − u_i)} <= 1,
//
// and so upwards for those below it. All terms are positive where the weights are, and errors fade as they run.
//
// A chunk of ranks, cut by n alone, is as many strands as a vector has lanes; its documents are stored strand beside strand, so
// that a lane is a strand. A first pass finds what each strand hands on, a second starts with what it was handed. Instructions per
// vector of documents and direction: 3 K and 5 K (of σ' alone 4 K), no gather and no sum over lanes; about 50 bytes a document,
// which lie in L2. What limits it is the issue rate of the two multiply-add pipes.
#pragma once

#include <cmath>

#include "order.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace pile::PILE_ISA {

// σ(−v) ≈ Σ_{k<K} sigma[k] x^{k+1} and σ'(v) ≈ Σ slope[k] x^{k+1}, x = e^{−v}; exact at v = 0.
template <int K>
struct SigmoidPowers {
  double sigma[K], slope[K];

  SigmoidPowers() {
    using Real = long double;
    // The ends of [0, 1] are nodes. The divided differences of 1/(1 + x) and of its square have a closed form.
    Real node[K], of_sigma[K], of_slope[K], product = 1, sum = 0;
    for (int k = 0; k < K; ++k) {
      node[k] = (1 + std::cos(Real(3.14159265358979323846264338327950288L) * k / (K - 1))) / 2;
      product /= k ? -(1 + node[k]) : 1 + node[k];
      sum += 1 / (1 + node[k]);
      of_sigma[k] = product;
      of_slope[k] = product * sum;
    }
    const auto expand = [&](const Real* newton, double* powers) {
      Real p[K] = {newton[K - 1]};
      for (int k = K - 2; k >= 0; --k) {
        for (int d = K - 1; d >= 0; --d) p[d] = (d ? p[d - 1] : 0) - node[k] * p[d];
        p[0] += newton[k];
      }
      for (int d = 0; d < K; ++d) powers[d] = double(p[d]);
    };
    expand(of_sigma, sigma);
    expand(of_slope, slope);
  }
  static const SigmoidPowers& get() {
    static const SigmoidPowers powers;
    return powers;
  }
};

// While it lives, this thread's numbers next to 0 are 0: where no weight is near, the sums fade through them, and some processors
// take a hundred times as long for those.
class FlushToZero {
 public:
#if defined(__SSE2__)
  FlushToZero() : before_(_mm_getcsr()) { _mm_setcsr(before_ | 0x8040); }
  ~FlushToZero() { _mm_setcsr(before_); }

 private:
  unsigned before_;
#else
  FlushToZero() {}
#endif
  FlushToZero(const FlushToZero&) = delete;
};

template <int K>
class SigmoidScan {
  static constexpr int W = kLanes<double>;

 public:
  static constexpr int kChunk = 1024;

  // Documents that lie beside each other are `rank` of 0, 1, ... in the order of falling logits; where they are stored is their
  // slot. A chunk's last strands may be shorter: what is stored there besides has weight 0.
  int chunks = 0, slots = 0;

  // Room for n documents. One member.
  void plan(int n, Arena& arena) {
    chunks = (n + kChunk - 1) / kChunk;
    slots = (chunks - 1) * kChunk + round_up(n - (chunks - 1) * kChunk, W);
    u_ = arena.take<double>(slots);
    step_ = arena.take<double>(slots);
    carry_ = arena.take<Carry>(chunks);
  }

  // The slots of chunk c, and how many documents each of its strands has at most.
  struct Chunk {
    int begin, end, length;
  };
  Chunk chunk(int c) const {
    const int begin = c * kChunk, end = smaller(slots, begin + kChunk);
    return {begin, end, (end - begin) / W};
  }
  // visit(slot, rank) for the documents of chunk c; rank >= n: there is none, and that slot is to have the last one's logit.
  template <class Visit>
  PILE_INLINE void each_document(int c, Visit visit) const {
    const Chunk own = chunk(c);
    for (int lane = 0, rank = own.begin; lane < W; ++lane)
      for (int slot = own.begin + lane; slot < own.end; slot += W) visit(slot, rank++);
  }
  // The ranks of the documents in the vector of slots from `slot` on, of chunk c.
  PILE_INLINE Vec<double> ranks(int c, int slot) const {
    const Chunk own = chunk(c);
    return to_vec<double>(iota<double>()) * double(own.length) + double(own.begin + (slot - own.begin) / W);
  }

  // Where the logits go, by slot, and then set() by the same member.
  double* logits() const { return u_; }
  void set(int c) const {
    const Chunk own = chunk(c);
    for (int k = own.begin + W; k < own.end; k += W) store(step_ + k, vexp<double>(load(u_ + k) - load(u_ + k - W)));
  }

  // What the strands of chunk c hand on; w: the weights of its slots.
  void hand_on(int c, const double* w) const {
    const FlushToZero flush;
    const Chunk own = chunk(c);
    Vec<double> sums[K];
    const auto add = [&](Vec<double> weight, Vec<double> step) {
      Vec<double> power = step;
#pragma GCC unroll 32
      for (int k = 0; k < K; ++k) {
        sums[k] = sums[k] * power + weight;
        power *= step;
      }
    };
    const auto start = [&](int slot) {
      for (int k = 0; k < K; ++k) sums[k] = load(w + slot - own.begin);
    };
    start(own.begin);
    for (int k = own.begin + W; k < own.end; k += W) add(load(w + k - own.begin), load(step_ + k));
    join<true>(c, sums);
    start(own.end - W);
    for (int k = own.end - W; k > own.begin; k -= W) add(load(w + k - W - own.begin), load(step_ + k));
    join<false>(c, sums);
  }
  // Then: what each chunk is handed by the others. One member.
  void carry() const {
    const FlushToZero flush;
    const auto at = [&](int c, bool down) { return u_[down ? chunk(c).begin : chunk(c).end - 1]; };
    for (const bool down : {true, false}) {
      double total[K] = {};
      for (int i = 0; i < chunks; ++i) {
        const int c = down ? i : chunks - 1 - i, next = down ? c + 1 : c - 1;
        const double across = std::exp(-std::fabs(at(c, true) - at(c, false)));
        const double gap = i + 1 < chunks ? std::exp(-std::fabs(at(c, !down) - at(next, down))) : 1;
        double of_across = across, of_gap = gap;
        for (int k = 0; k < K; ++k, of_across *= across, of_gap *= gap) {
          double& own = carry_[c].chunk[!down][k];
          const double sum = own;
          own = total[k];
          total[k] = (total[k] * of_across + sum) * of_gap;
        }
      }
    }
  }
  // Then, of the slots of chunk c: Σ_below w σ − Σ_above w σ, of the lower from the upper, unless `sigma` is nullptr; and Σ w σ'
  // of all others.
  template <bool kSigma>
  void read(int c, const double* w, double* sigma, double* slope) const {
    const FlushToZero flush;
    const SigmoidPowers<K>& powers = SigmoidPowers<K>::get();
    const Chunk own = chunk(c);
    const int n = own.end - own.begin;
    const double* const step = step_ + own.begin;
    Vec<double> sums[K], of_sigma, of_slope;
    start<true>(c, sums);
    for (int k = 0;; k += W) {
      look<kSigma>(powers, sums, of_sigma, of_slope);
      if (kSigma) store(sigma + k, of_sigma);
      store(slope + k, of_slope);
      if (k + W == n) break;
      move(sums, load(w + k), load(step + k + W));
    }
    start<false>(c, sums);
    for (int k = n - W;; k -= W) {
      look<kSigma>(powers, sums, of_sigma, of_slope);
      if (kSigma) store(sigma + k, of_sigma - load(sigma + k));
      store(slope + k, of_slope + load(slope + k));
      if (k == 0) break;
      move(sums, load(w + k), load(step + k));
    }
  }

 private:
  // [from above, from below]: what a chunk hands on, as its last document or its first sees it, and after carry() what it is
  // handed; and what each strand is handed by the others of its chunk.
  struct Carry {
    double chunk[2][K], strand[2][K][W];
  };

  template <bool kSigma>
  static PILE_INLINE void look(const SigmoidPowers<K>& powers, const Vec<double> (&sums)[K], Vec<double>& sigma,
                               Vec<double>& slope) {
    sigma = slope = Vec<double>{};
#pragma GCC unroll 32
    for (int k = 0; k < K; ++k) {
      if (kSigma) sigma += powers.sigma[k] * sums[k];
      slope += powers.slope[k] * sums[k];
    }
  }
  static PILE_INLINE void move(Vec<double> (&sums)[K], Vec<double> weight, Vec<double> step) {
    Vec<double> power = step;
#pragma GCC unroll 32
    for (int k = 0; k < K; ++k) {
      sums[k] = (sums[k] + weight) * power;
      power *= step;
    }
  }

  // `sums`: of each strand, as its last document sees them (kDown), or its first one. To carry_[c]: what the chunk hands on, and
  // what each strand is handed by the others of its chunk.
  template <bool kDown>
  void join(int c, const Vec<double> (&sums)[K]) const {
    const Chunk own = chunk(c);
    const double *first = u_ + own.begin, *last = u_ + own.end - W;
    Carry& carry = carry_[c];
    double total[K] = {};
    for (int i = 0; i < W; ++i) {
      const int lane = kDown ? i : W - 1 - i;
      for (int k = 0; k < K; ++k) carry.strand[!kDown][k][lane] = total[k];
      // To this strand's far end, and from there to the next strand's near one.
      const double across = std::exp(last[lane] - first[lane]);
      const bool end = i == W - 1;
      const double gap = end ? 1 : kDown ? std::exp(first[lane + 1] - last[lane]) : std::exp(first[lane] - last[lane - 1]);
      double of_across = across, of_gap = gap;
      for (int k = 0; k < K; ++k, of_across *= across, of_gap *= gap)
        total[k] = (total[k] * of_across + sums[k][lane]) * of_gap;
    }
    for (int k = 0; k < K; ++k) carry.chunk[!kDown][k] = total[k];
  }
  // What the strands' first documents (kDown), or their last ones, see of all strands before.
  template <bool kDown>
  PILE_INLINE void start(int c, Vec<double> (&sums)[K]) const {
    const Chunk own = chunk(c);
    const Vec<double> from = splat<double>(u_[kDown ? own.begin : own.end - 1]);
    const Vec<double> to = load(u_ + (kDown ? own.begin : own.end - W));
    const Vec<double> step = vexp<double>(-vabs<double>(from - to));
    Vec<double> power = step;
    for (int k = 0; k < K; ++k) {
      sums[k] = load(carry_[c].strand[!kDown][k]) + carry_[c].chunk[!kDown][k] * power;
      power *= step;
    }
  }

  double *u_ = nullptr, *step_ = nullptr;
  Carry* carry_ = nullptr;
};

}  // namespace pile::PILE_ISA
