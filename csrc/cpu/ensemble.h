// The ensemble of one query: calibrate the teachers, then T exponentiated-gradient steps on their weights.
//
// The state is one exponent per document (or per teacher), never a weight per document and teacher: the ensemble logit is the
// tilted mean s_i = Σ_m e^{a_i t_im} t_im / Σ_m e^{a_i t_im}, taken relative to the highest (a_i >= 0) or lowest teacher, so
// that every exponent is <= 0 and differences of close teachers are exact.
//
// Weights that all queries share come from outside, iteration by iteration (Run::fit); here is each query's pull on them.
//
// One iteration reads the calibrated teachers once: update, tilt (M exponentials per document) and deposit in one pass; then
// the pair sums. Bytes per document and iteration: 4 M + 28 (float32). Operations per iteration and vector of documents: 13 M
// for the exponentials, 50 to deposit into 4 cells, 20 to locate and evaluate; for direct sums 6 n (AVX-512). What limits it is
// instruction issue while a query's teachers fit L2, the memory behind L2 from there on.
//
// All members of a team call the same methods on one shared object; the leader plans, all compute.
#pragma once

#include "label_pairs.h"
#include "teachers.h"

namespace pile::PILE_ISA {

// Of one iteration.
template <class T>
constexpr PairCosts kEnsembleCosts = sizeof(T) == 4 ? PairCosts{0.021, 0.5, 2.7} : PairCosts{0.0885, 5, 11.7};

template <class T>
class EnsembleQuery {
 public:
  using Table = FieldTable<T, kPowers<T>>;

  // The leader calls this; `order` holds the documents that some teacher scored. `missing`: some score among them is missing.
  // `tables` are those of ±margin / temperature. `by_pairs`: there will be iterations, pulls or a trace.
  void plan(const Batch& batch, const EnsembleOptions& options, int64_t q, const Order& order, bool missing, bool by_pairs,
            const Table* plus, const Table* minus, Arena& arena) {
    options_ = &options;
    order_ = &order;
    plus_ = plus;
    minus_ = minus;
    n_ = order.n;
    by_document_ = options.granularity == Granularity::document;
    has_prior_ = batch.prior.data != nullptr;
    active_ = by_pairs && order.has_pairs();
    teachers_.plan(batch, options.normalize, q, order, missing, arena);
    a_ = arena.take<T>(n_);
    u_ = arena.take<T>(n_);
    weight_ = arena.take<T>(teachers_.count);
    g_ = arena.take<double>(teachers_.count);
    if (active_) weights_ = pair_weights<T>(order, options.pair_weight, arena);
  }

  // Calibrate the teachers, make the sums ready.
  void prepare(const Member& m, bool trace) {
    each_vector<T>(m, n_, [&](int k) { store(a_ + k, Vec<T>{}); });
    teachers_.calibrate(m);
    if (m.leads()) {
      if (!by_document_) refresh_query_weights();
      if (active_) prepare_sums(*m.arena, trace);
    }
    m.sync();
  }

  // After prepare(): the pulls at weights from outside, given also as their logarithms, the largest 0; and the label loss there,
  // to `loss` unless it is nullptr.
  void pull_at(const Member& m, const T* weights, const T* energies, T* loss) {
    if (m.leads()) {
      bool all = true;
      for (int t = 0; t < teachers_.count; ++t) {
        teachers_.energy[t] = energies[t];
        weight_[t] = weights[t];
        all &= teachers_.scored(t);
      }
      if (!all) refresh_query_weights();
    }
    m.sync();
    pull(m, loss);
  }

  // Iterate after prepare(); then logits() and weights are ready. `trace`: T + 1 losses, or nullptr. `with_pulls`: also pulls().
  void run(const Member& m, T* trace, bool with_pulls) {
    for (int64_t it = 0; active_ && it < options_->iterations; ++it) {
      if (by_document_) {
        if (n_ >= kPollIteration || it % 256 == 255) m.poll();
        sweep(m, trace ? trace + it : nullptr, it);
      } else {
        if (it % 256 == 255) m.poll();
        pull(m, trace ? trace + it : nullptr);
        if (m.leads()) {
          for (int t = 0; t < teachers_.count; ++t) teachers_.energy[t] += T(options_->step_size * g_[t]);
          refresh_query_weights();
        }
        m.sync();
      }
    }
    if (with_pulls && active_) pull(m, nullptr);
    each_vector<T>(m, n_, [&](int k) { store(u_ + k, tilt(k)); });
    m.sync();
    if (trace) {
      if (active_)
        trace_loss(m, trace + options_->iterations, T(1 / options_->temperature));
      else if (m.leads())
        for (int64_t it = 0; it <= options_->iterations; ++it) trace[it] = 0;
    }
  }

  // Ensemble logits by position, after run(); `common()` below those of the teachers.
  const T* logits() const { return u_; }
  double common() const { return teachers_.common; }
  // The slope of the label loss, downwards, along a teacher's weight, of weights that all documents share; NaN if it has none.
  double pull(int t) const { return active_ && teachers_.scored(t) ? g_[t] : __builtin_nan(""); }
  bool active() const { return active_; }
  // Weights that all documents of the query share.
  const T* query_weights() const { return weight_; }
  // Granularity "document": those of position k, to out[0, M).
  void document_weights(int k, T* out) const {
    const T a = a_[k], reference = a >= 0 ? teachers_.highest[k] : teachers_.lowest[k];
    T top = -T(__builtin_inf()), total = 0;
    for (int t = 0; t < teachers_.count; ++t) {
      const T d = teachers_.row(t)[k] - reference;
      out[t] = d == d ? a * d + teachers_.energy[t] : -T(__builtin_inf());
      top = larger(top, out[t]);
    }
    for (int t = 0; t < teachers_.count; ++t) total += out[t] = T(__builtin_exp(double(out[t] - top)));
    for (int t = 0; t < teachers_.count; ++t) out[t] /= total;
  }

 private:
  // Ensemble logits of the documents from k on, in the present state.
  PILE_INLINE Vec<T> tilt(int k) const {
    const Vec<T> low = load(teachers_.lowest + k), high = load(teachers_.highest + k), a = load(a_ + k);
    const Vec<T> reference = a >= T(0) ? high : low;
    Vec<T> mass = {}, moment = {};
    if (by_document_ && !teachers_.missing && !has_prior_) {
      // The largest exponent is the reference's own, 0.
      const Vec<T> slope = a * T(1.4426950408889634074);
      for (int t = 0; t < teachers_.count; ++t) {
        const Vec<T> d = load(teachers_.row(t) + k) - reference;
        const Vec<T> e = falling_exp2<T>(slope * d);
        mass += e;
        moment += e * d;
      }
    } else if (!by_document_ && !teachers_.missing) {
      for (int t = 0; t < teachers_.count; ++t) moment += weight_[t] * (load(teachers_.row(t) + k) - reference);
      mass = splat<T>(1);
    } else {
      const Vec<T> slope = by_document_ ? a : Vec<T>{};
      Vec<T> top = splat<T>(-T(__builtin_inf()));
      for (int t = 0; t < teachers_.count; ++t) {
        const Vec<T> energy = slope * (load(teachers_.row(t) + k) - reference) + teachers_.energy[t];
        top = vmax(energy, top);  // a missing teacher is NaN and loses
      }
      for (int t = 0; t < teachers_.count; ++t) {
        const Vec<T> d = load(teachers_.row(t) + k) - reference;
        const Vec<T> e = falling_exp2<T>((slope * d + teachers_.energy[t] - top) * T(1.4426950408889634074));
        mass += d == d ? e : Vec<T>{};
        moment += d == d ? e * d : Vec<T>{};
      }
    }
    const Vec<T> s = reference + moment * reciprocal<T>(mass);
    // Rounding must not leave the teachers' range; a NaN stays.
    const Vec<T> above = s < low ? low : s;
    return above > high ? high : above;
  }

  // Weights that documents share: what the teachers present at the documents from k on hold of the query's weight.
  PILE_INLINE Vec<T> share(int k) const {
    if (!teachers_.missing) return splat<T>(1);
    Vec<T> held = {};
    for (int t = 0; t < teachers_.count; ++t) {
      const Vec<T> value = load(teachers_.row(t) + k);
      held += value == value ? splat<T>(weight_[t]) : Vec<T>{};
    }
    return vmax(held, splat<T>(T(kMinShare)));
  }

  void prepare_sums(Arena& arena, bool trace) {
    const T per_unit = T(1 / options_->temperature);
    T low, high;
    teachers_.find_range(low, high);
    offset_ = T(options_->margin / options_->temperature);
    pairs_.plan(*order_, weights_, low * per_unit, high * per_unit, offset_, options_->pairwise, kEnsembleCosts<T>, arena);
    if (!by_document_) {
      pull_parts_ = pairs_.direct ? pieces(order_->labelled) : pairs_.fields.chunks;
      pull_ = arena.take<T>(int64_t(pull_parts_) * teachers_.count * kLanes<T>);
    }
    if (trace) {
      label_loss_.plan(*order_, weights_, double(offset_), options_->pairwise);
      traced_ = arena.take<T>(order_->labelled);
    }
  }

  // The pair sums of an iteration, and from them the exponents of granularity "document", or pull_. `loss`: where the label loss
  // goes, or nullptr.
  void sweep(const Member& m, T* loss, int64_t it) {
    if (pairs_.direct)
      sweep_direct(m, loss);
    else
      sweep_fields(m, loss, it);
    m.sync();
  }

  void pull(const Member& m, T* loss) {
    if (n_ >= kPollIteration) m.poll();
    sweep(m, loss, 0);
    if (!m.leads()) return;
    for (int t = 0; t < teachers_.count; ++t) {
      double total = 0;
      for (int p = 0; p < pull_parts_; ++p)
        total += double(sum<T>(load(pull_ + (int64_t(p) * teachers_.count + t) * kLanes<T>)));
      g_[t] = total / weights_.total;
    }
  }

  void sweep_direct(const Member& m, T* loss) {
    const int n = order_->labelled;
    const T per_unit = T(1 / options_->temperature);
    // Two loops over the same positions: together their chains of dependent instructions are too long to overlap.
    each_vector<T>(m, n, [&](int k) { store(u_ + k, tilt(k) * per_unit); });
    each_vector<T>(m, n, [&](int k) {
      pairs_.near.set(k, load(u_ + k));
      pairs_.sums.clear(k);
    });
    m.sync();
    if (loss) trace_loss(m, loss, 1);
    pairs_.template with_pairs<false>(u_, [&](auto pairs) { all_pairs<T>(m, pairs, n, pairs_.sums, nullptr); });
    for (int p = m.rank; p < pieces(n); p += m.size) update(p, p * kPiece, smaller(n, (p + 1) * kPiece), -1);
  }

  void sweep_fields(const Member& m, T* loss, int64_t it) {
    const T per_unit = T(1 / options_->temperature);
    for (int c = m.rank; c < pairs_.fields.chunks; c += m.size) {
      m.poll();
      pairs_.fields.clear(c);
      for (int begin = pairs_.fields.chunk[c].begin; begin < pairs_.fields.chunk[c].end; begin += kTile) {
        const int end = smaller(begin + kTile, pairs_.fields.chunk[c].end);
        // The last iteration's update, here where its documents are read anyway.
        if (by_document_ && it > 0) update(c, begin, end, pairs_.fields.chunk[c].block);
        for (int k = begin; k < end; k += kLanes<T>) store(u_ + k, tilt(k) * per_unit, end - k);
        pairs_.fields.deposit(c, begin, end, u_);
      }
    }
    m.sync();
    if (loss) trace_loss(m, loss, 1);
    if (m.leads()) pairs_.fields.collect();
    m.sync();
    for (int b = m.rank; b < pairs_.fields.blocks; b += m.size) {
      pairs_.fields.solve(b, *plus_, *minus_);
      const auto& block = pairs_.fields.block[b];
      if (!block.inner) continue;
      for (int k = block.begin; k < block.end; k += kLanes<T>) {
        pairs_.sums.clear(k, block.end - k);
        pairs_.near.set(k, load(u_ + k), block.end - k);
      }
      pairs_.template with_pairs<false>(
          u_, [&](auto pairs) { rectangle<T>(pairs, block.begin, block.end, block.begin, block.end, pairs_.sums); });
    }
    m.sync();
    if (by_document_ && it + 1 < options_->iterations) return;
    for (int c = m.rank; c < pairs_.fields.chunks; c += m.size)
      update(c, pairs_.fields.chunk[c].begin, pairs_.fields.chunk[c].end, pairs_.fields.chunk[c].block);
  }

  // λ of the documents from k on: of the block's field (block >= 0), of direct sums (`add`), or both.
  PILE_INLINE Vec<T> lambda(int k, int block, bool add) const {
    Vec<T> value = block >= 0 ? pairs_.fields.evaluate(block, load(u_ + k), k) : Vec<T>{};
    if (add) value += pairs_.sums.value(k);
    return value;
  }

  // After the pair sums: the exponents of positions [begin, end), or what these documents add to the teachers' exponents.
  void update(int piece, int begin, int end, int block) {
    const bool add = block < 0 || pairs_.fields.block[block].inner;  // else a block of one label, and one 1 / k
    if (!by_document_) return pull_teachers(piece, begin, end, block, add);
    const T step = T(options_->step_size);
    for (int k = begin; k < end; k += kLanes<T>) {
      const int lanes = smaller(kLanes<T>, end - k);
      Vec<T> move = step * (lambda(k, block, add) * (add ? load(weights_.inverse + k) : splat<T>(weights_.inverse[begin])));
      if (lanes < kLanes<T>) move = first_lanes<T>(lanes, move);
      // A block ends anywhere, and behind it may be another thread's documents; behind a piece there are none that move.
      store(a_ + k, load(a_ + k) + move, block < 0 ? kLanes<T> : lanes);
    }
  }

  // Weights that documents share: Σ λ (t − s) / share of every teacher, lane by lane.
  void pull_teachers(int piece, int begin, int end, int block, bool add) {
    T* pull = pull_ + int64_t(piece) * teachers_.count * kLanes<T>;
    for (int t = 0; t < teachers_.count; ++t) store(pull + t * kLanes<T>, Vec<T>{});
    T force[kTile], s[kTile];
    for (int from = begin; from < end; from += kTile) {
      const int n = smaller(kTile, end - from);
      for (int k = 0; k < n; k += kLanes<T>) {
        Vec<T> value = lambda(from + k, block, add);
        if (teachers_.missing) value /= share(from + k);
        store(force + k, first_lanes<T>(n - k, value));
        store(s + k, first_lanes<T>(n - k, load(u_ + from + k) * T(options_->temperature)));  // 0 x NaN would be NaN
      }
      int t = 0;
      for (; t + 4 <= teachers_.count; t += 4) pull_some<4>(pull, t, from, n, force, s);
      for (; t < teachers_.count; ++t) pull_some<1>(pull, t, from, n, force, s);
    }
  }
  template <int N>
  PILE_INLINE void pull_some(T* pull, int t, int from, int n, const T* force, const T* s) const {
    Vec<T> sums[N];
    for (int i = 0; i < N; ++i) sums[i] = load(pull + (t + i) * kLanes<T>);
    for (int k = 0; k < n; k += kLanes<T>) {
      const Vec<T> f = load(force + k), own = load(s + k);
      for (int i = 0; i < N; ++i) {
        const Vec<T> d = load(teachers_.row(t + i) + from + k) - own;
        sums[i] += teachers_.missing ? ((d == d) & (f != T(0)) ? f * d : Vec<T>{}) : f * d;
      }
    }
    for (int i = 0; i < N; ++i) store(pull + (t + i) * kLanes<T>, sums[i]);
  }

  // Softmax of the energies over the teachers that scored some document of the query.
  void refresh_query_weights() {
    double top = -__builtin_inf(), total = 0;
    for (int t = 0; t < teachers_.count; ++t)
      if (teachers_.scored(t)) top = larger(top, double(teachers_.energy[t]));
    for (int t = 0; t < teachers_.count; ++t)
      total += teachers_.scored(t) ? __builtin_exp(double(teachers_.energy[t]) - top) : 0;
    for (int t = 0; t < teachers_.count; ++t)
      weight_[t] = teachers_.scored(t) ? T(__builtin_exp(double(teachers_.energy[t]) - top) / total) : T(0);
  }

  // The label loss at u_ * scale.
  void trace_loss(const Member& m, T* to, T scale) {
    each_vector<T>(m, order_->labelled, [&](int k) { store(traced_ + k, load(u_ + k) * scale); });
    m.sync();
    const Arena::Mark mark = m.arena->mark();
    const double loss = label_loss_.run(m, traced_, nullptr);
    if (m.leads()) *to = T(loss / weights_.total);
    m.sync();
    m.arena->release(mark);
  }

  const EnsembleOptions* options_ = nullptr;
  const Order* order_ = nullptr;
  const Table *plus_ = nullptr, *minus_ = nullptr;
  int n_ = 0, pull_parts_ = 0;
  bool by_document_ = true, has_prior_ = false, active_ = false;
  T offset_ = 0;
  Teachers<T> teachers_;
  PairWeights<T> weights_;
  LabelSums<T, T> pairs_;
  T *a_ = nullptr, *u_ = nullptr, *traced_ = nullptr;  // exponents; logits / temperature
  T* weight_ = nullptr;                                // by teacher
  T* pull_ = nullptr;                                  // by part of the documents and teacher, a vector each
  double* g_ = nullptr;                                // by teacher: the last pull
  LabelPairLoss<T> label_loss_;
};

}  // namespace pile::PILE_ISA
