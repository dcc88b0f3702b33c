// The ensemble of one query: calibrate the teachers, then T exponentiated-gradient steps on their weights.
//
// The state is one exponent per document (or per teacher), never a weight per document and teacher: the ensemble logit is the
// tilted mean s_i = Σ_m e^{a_i t_im} t_im / Σ_m e^{a_i t_im}, taken relative to the highest (a_i >= 0) or lowest teacher, so that
// every exponent is <= 0 and differences of close teachers are exact.
//
// One iteration reads the calibrated teachers once: update, tilt (M exponentials per document) and deposit in one pass; then the
// pair sums. Bytes per document and iteration: 4 M + 28 (float32). Operations per iteration and vector of documents: 13 M for the
// exponentials, 50 to deposit into 4 cells, 20 to locate and evaluate; for direct sums 6 n (AVX-512). What limits it is instruction
// issue while a query's teachers fit L2, the memory behind L2 from there on.
//
// All members of a team call the same methods on one shared object; the leader plans, all compute.
#pragma once

#include "loss.h"

namespace pile {
namespace PILE_ISA {

// Of one iteration.
template <class T>
constexpr PairCosts kEnsembleCosts = sizeof(T) == 4 ? PairCosts{0.021, 0.5, 2.7} : PairCosts{0.0885, 5, 11.7};

// Documents that go through update, tilt and deposit together: their exponents and logits stay in L1.
constexpr int kStretch = 512;
// Documents ahead of the gather whose scores are fetched.
constexpr int kPrefetch = 24;

template <class T>
class EnsembleQuery {
 public:
  using Fields = FieldSums<T, kPowers<T>>;
  using Table = FieldTable<T, kPowers<T>>;

  // The leader calls this; `order` holds the documents that some teacher scored. `missing`: some score among them is missing.
  // `tables` are those of ±margin / temperature.
  void plan(const Batch& batch, const EnsembleOptions& options, int64_t q, const Order& order, bool missing, const Table* plus,
            const Table* minus, Arena& arena) {
    batch_ = &batch;
    options_ = &options;
    order_ = &order;
    plus_ = plus;
    minus_ = minus;
    query_ = q;
    n_ = order.n;
    teachers_ = int(batch.teachers);
    missing_ = missing;
    by_document_ = options.granularity == Granularity::document;
    active_ = order.has_pairs();
    // A whole number of vectors, and not a multiple of the page: the teachers' rows must not share cache sets.
    row_ = round_up(n_, kLanes<T>) + kLanes<T>;
    t_ = arena.take<T>(row_ * teachers_);
    a_ = arena.take<T>(n_);
    u_ = arena.take<T>(n_);
    low_ = arena.take<T>(n_);
    high_ = arena.take<T>(n_);
    partial_ = arena.take<Stats>(int64_t(pieces(n_)) * teachers_);
    bounds_ = arena.take<T>(2 * pieces(n_));
    total_ = arena.take<Stats>(teachers_);
    mean_ = arena.take<double>(teachers_);
    unit_ = arena.take<double>(teachers_);
    scale_ = arena.take<double>(teachers_);
    energy_ = arena.take<T>(teachers_);
    weight_ = arena.take<T>(teachers_);
    start_energies();
    if (active_) weights_ = pair_weights<T>(order, options.pair_weight, arena);
  }

  // Calibrate, iterate; then logit() and weights() are ready. `trace`: T + 1 losses, or nullptr.
  void run(const Member& m, T* trace) {
    calibrate(m);
    if (active_) {
      if (m.leads()) prepare_sums(*m.arena, trace != nullptr);
      m.sync();
      for (int64_t it = 0; it < options_->iterations; ++it) {
        if (n_ >= kPollIteration || it % 256 == 255) m.poll();
        if (direct_)
          iterate_direct(m, trace, it);
        else
          iterate_fields(m, trace, it);
      }
    }
    for_pieces(m, n_, [&](int k) { store(u_ + k, tilt(k)); });
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
  double common() const { return common_; }
  // Granularity "query": the teachers' weights.
  const T* query_weights() const { return weight_; }
  // Granularity "document": those of position k, to out[0, M).
  void document_weights(int k, T* out) const {
    const T a = a_[k], reference = a >= 0 ? high_[k] : low_[k];
    T top = -T(__builtin_inf()), total = 0;
    for (int t = 0; t < teachers_; ++t) {
      const T d = t_[t * row_ + k] - reference;
      out[t] = d == d ? a * d + energy_[t] : -T(__builtin_inf());
      top = larger(top, out[t]);
    }
    for (int t = 0; t < teachers_; ++t) total += out[t] = T(__builtin_exp(double(out[t] - top)));
    for (int t = 0; t < teachers_; ++t) out[t] /= total;
  }

 private:
  struct Stats {
    double sum, count;
    T low, high;
  };

  // visit(first position) for every vector of [0, n), shared out among the members. The last vector may reach past n: arrays of
  // an arena have room for it, and nobody else's positions lie there.
  template <class F>
  void for_pieces(const Member& m, int n, F visit) const {
    for (int p = m.rank; p < pieces(n); p += m.size) {
      const int end = smaller(n, (p + 1) * kPiece);
      for (int k = p * kPiece; k < end; k += kLanes<T>) visit(k);
    }
  }

  // Log prior weights, the largest 0; -inf for a teacher that does not take part.
  void start_energies() {
    const View& prior = batch_->prior;
    has_prior_ = prior.data != nullptr;
    for (int t = 0; t < teachers_; ++t) energy_[t] = 0;
    if (!has_prior_) return;
    double top = 0;
    with_logits(prior, [&](const auto* data) {
      auto weight = [&](int t) { return double(read(data, query_ * prior.query + t * prior.teacher)); };
      for (int t = 0; t < teachers_; ++t) top = larger(top, weight(t));
      for (int t = 0; t < teachers_; ++t) energy_[t] = weight(t) > 0 ? T(__builtin_log(weight(t) / top)) : -T(__builtin_inf());
    });
  }

  void calibrate(const Member& m) {
    gather(m);
    m.sync();
    if (m.leads()) {
      for (int t = 0; t < teachers_; ++t) {
        total_[t] = {0, 0, T(__builtin_inf()), T(-__builtin_inf())};
        for (int p = 0; p < pieces(n_); ++p) {
          const Stats& s = partial_[p * teachers_ + t];
          total_[t].sum += s.sum;
          total_[t].count += s.count;
          total_[t].low = smaller(total_[t].low, s.low);
          total_[t].high = larger(total_[t].high, s.high);
        }
        calibrate_by_sums(t);
      }
      if (options_->normalize == Normalize::none) take_off_what_is_common();
      if (!by_document_) refresh_query_weights();
    }
    m.sync();
    if (options_->normalize == Normalize::zscore) {
      for (int p = m.rank; p < pieces(n_); p += m.size)
        for (int t = 0; t < teachers_; ++t) partial_[p * teachers_ + t].sum = squares(t, p);
      m.sync();
      if (m.leads()) {
        for (int t = 0; t < teachers_; ++t) {
          double square = 0;
          for (int p = 0; p < pieces(n_); ++p) square += partial_[p * teachers_ + t].sum;
          // By its extremes: the rounding of a constant's mean must not be blown up to unit scale.
          scale_[t] = total_[t].high > total_[t].low ? 1 / __builtin_sqrt(square / total_[t].count) : 0.0;
        }
      }
      m.sync();
    }
    for (int p = m.rank; p < pieces(n_); p += m.size) scale_piece(p);
    m.sync();
  }

  // A teacher's mean, and the unit in which squares of its logits neither overflow nor vanish: 1 but for doubles of extreme size.
  void calibrate_by_sums(int t) {
    Stats& all = total_[t];
    mean_[t] = 0;
    scale_[t] = unit_[t] = 1;
    if (options_->normalize == Normalize::none || all.count == 0) return;
    if constexpr (sizeof(T) == 8) {
      const double size = larger(all.high, -all.low);
      if (size > 0 && !(size > 1e-130 && size < 1e140)) {
        unit_[t] = __builtin_ldexp(1.0, smaller(larger(-__builtin_ilogb(size), -1000), 1000));
        scale_[t] = 1 / unit_[t];
        all.sum = 0;
        for (int k = 0; k < n_; ++k) {
          const double x = t_[t * row_ + k] * unit_[t];
          all.sum += x == x ? x : 0.0;
        }
      }
    }
    mean_[t] = all.sum / all.count;
  }

  // Logits as they are: the middle of them all, where it is large beside their range. Ensembles and pairs are differences, which
  // have more digits without it, and off and on again it rounds nothing.
  void take_off_what_is_common() {
    double low = __builtin_inf(), high = -low;
    for (int t = 0; t < teachers_; ++t) {
      if (total_[t].count == 0) continue;
      low = smaller(low, double(total_[t].low));
      high = larger(high, double(total_[t].high));
    }
    const double middle = double(T(low / 2 + high / 2));
    common_ = __builtin_fabs(middle) > 2 * (high - low) ? middle : 0;
    for (int t = 0; t < teachers_; ++t) mean_[t] = common_;
  }

  // t[m][k] for this member's positions, and sums over each piece.
  void gather(const Member& m) {
    const View& view = batch_->teacher;
    const int64_t offset = query_ * view.query + batch_->first(query_) * view.document;
    with_logits(view, [&](const auto* data) {
      for (int w = m.rank; w < order_->windows; w += m.size)
        for (int i = 0; i < order_->spans; ++i) {
          const Span span = order_->span[w * order_->spans + i];
          gather_rows(data + offset, view, span.begin, span.end);
        }
      if (order_->windows) m.sync();
      for (int p = m.rank; p < pieces(n_); p += m.size) {
        const int begin = p * kPiece, end = smaller(n_, begin + kPiece);
        if (!order_->windows) gather_rows(data + offset, view, begin, end);
        for (int t = 0; t < teachers_; ++t) {
          T* row = t_ + t * row_;
          if (energy_[t] < -T(1e30))
            for (int k = begin; k < end; ++k) row[k] = T(__builtin_nan(""));
          if (end == n_)  // what a last partial vector reads beyond
            for (int k = end; k < row_; ++k) row[k] = 0;
          Stats& own = partial_[p * teachers_ + t];
          own = stats(row, begin, end);
          if (own.low == -T(__builtin_inf()) || own.high == T(__builtin_inf())) {  // no score, as NaN
            for (int k = begin; k < end; ++k) row[k] = is_finite(row[k]) ? row[k] : T(__builtin_nan(""));
            own = stats(row, begin, end);
          }
        }
      }
    });
  }

  // In label order rows come too irregularly for the hardware to foresee.
  template <class U>
  void gather_rows(const U* data, const View& view, int begin, int end) {
    const int* slot = order_->slot;
    const auto fetch = [&](int k) { __builtin_prefetch(data + slot[smaller(k + kPrefetch, end - 1)] * view.document); };
#if defined(__AVX512F__)
    if constexpr (sizeof(T) == 4 && is_float(static_cast<U*>(nullptr))) {
      if (view.teacher == 1) {
        for (int k = begin; k < end; k += 16) {
          const float* row[16];
          for (int i = 0; i < 16; ++i) {
            fetch(k + i);
            row[i] = data + slot[smaller(k + i, end - 1)] * view.document;
          }
          for (int t = 0; t < teachers_; t += 8) transpose(row, end - k, t, smaller(8, teachers_ - t), t_ + t * row_ + k, row_);
        }
        return;
      }
    }
#endif
    for (int k = begin; k < end; ++k) {
      fetch(k);
      const int64_t from = slot[k] * view.document;
      for (int t = 0; t < teachers_; ++t) t_[t * row_ + k] = T(read(data, from + t * view.teacher));
    }
  }

  Stats stats(const T* row, int begin, int end) const {
    constexpr int W = kLanes<double>;
    Stats s = {0, 0, T(__builtin_inf()), T(-__builtin_inf())};
    Vec<double> sums = {}, counts = {}, lows = splat<double>(__builtin_inf()), highs = splat<double>(-__builtin_inf());
    int k = begin;
    for (; k + W <= end; k += W) {
      const Vec<double> t = as_double(row + k);
      const auto present = t == t;
      sums += present ? t : Vec<double>{};
      counts += present ? splat<double>(1) : Vec<double>{};
      lows = vmin(t, lows);
      highs = vmax(t, highs);
    }
    s.sum = sum<double>(sums);
    s.count = sum<double>(counts);
    for (int l = 0; l < W; ++l) {
      s.low = smaller(s.low, T(lows[l]));
      s.high = larger(s.high, T(highs[l]));
    }
    for (; k < end; ++k) {
      if (row[k] != row[k]) continue;
      s.sum += double(row[k]);
      s.count += 1;
      s.low = smaller(s.low, row[k]);
      s.high = larger(s.high, row[k]);
    }
    return s;
  }

  template <class V>
  PILE_INLINE V in_unit(V x, int t) const {
    if constexpr (sizeof(T) == 8) return x * unit_[t];
    return x;
  }

  double squares(int t, int piece) const {
    constexpr int W = kLanes<double>;
    const T* row = t_ + t * row_;
    const int end = smaller(n_, (piece + 1) * kPiece);
    Vec<double> sums = {};
    int k = piece * kPiece;
    for (; k + W <= end; k += W) {
      const Vec<double> d = in_unit(as_double(row + k), t) - mean_[t];
      sums += d == d ? d * d : Vec<double>{};
    }
    double result = sum<double>(sums);
    for (; k < end; ++k) {
      const double d = in_unit(double(row[k]), t) - mean_[t];
      result += d == d ? d * d : 0.0;
    }
    return result;
  }

  // Calibrated logits in place, each document's lowest and highest teacher, and their range over the piece.
  void scale_piece(int piece) {
    const int begin = piece * kPiece, end = smaller(n_, begin + kPiece);
    Vec<T> lowest = splat<T>(T(__builtin_inf())), highest = -lowest;
    for (int k = begin; k < end; k += kLanes<T>) {
      Vec<T> low = splat<T>(T(__builtin_inf())), high = -low;
      for (int t = 0; t < teachers_; ++t) {
        // In double: a mean far larger than the deviation must not cost float32 digits, nor a scale beyond its range.
        Vec<T> value;
        const T* from = t_ + t * row_ + k;
        if constexpr (sizeof(T) == 8) {
          value = (in_unit(load(from), t) - mean_[t]) * scale_[t];
        } else {
          value = narrow((as_double(from) - mean_[t]) * scale_[t], (as_double(from + kLanes<double>) - mean_[t]) * scale_[t]);
        }
        store(t_ + t * row_ + k, value);
        low = vmin(value, low);
        high = vmax(value, high);
      }
      const int lanes = end - k;
      store(low_ + k, low);
      store(high_ + k, high);
      store(a_ + k, Vec<T>{});
      if (lanes < kLanes<T>) {
        const Ints<T> mask = iota<T>() < typename Simd<T>::integer(lanes);
        low = mask ? low : splat<T>(T(__builtin_inf()));
        high = mask ? high : splat<T>(-T(__builtin_inf()));
      }
      lowest = vmin(low, lowest);
      highest = vmax(high, highest);
    }
    bounds_[2 * piece] = lowest[0];
    bounds_[2 * piece + 1] = highest[0];
    for (int l = 1; l < kLanes<T>; ++l) {
      bounds_[2 * piece] = smaller(bounds_[2 * piece], T(lowest[l]));
      bounds_[2 * piece + 1] = larger(bounds_[2 * piece + 1], T(highest[l]));
    }
  }

  // Ensemble logits of the documents from k on, in the present state.
  PILE_INLINE Vec<T> tilt(int k) const {
    const Vec<T> low = load(low_ + k), high = load(high_ + k), a = load(a_ + k);
    const Vec<T> reference = a >= T(0) ? high : low;
    Vec<T> mass = {}, moment = {};
    if (by_document_ && !missing_ && !has_prior_) {
      // The largest exponent is the reference's own, 0.
      const Vec<T> slope = a * T(1.4426950408889634074);
      for (int t = 0; t < teachers_; ++t) {
        const Vec<T> d = load(t_ + t * row_ + k) - reference;
        const Vec<T> e = falling_exp2<T>(slope * d);
        mass += e;
        moment += e * d;
      }
    } else if (!by_document_ && !missing_) {
      for (int t = 0; t < teachers_; ++t) moment += weight_[t] * (load(t_ + t * row_ + k) - reference);
      mass = splat<T>(1);
    } else {
      const Vec<T> slope = by_document_ ? a : Vec<T>{};
      Vec<T> top = splat<T>(-T(__builtin_inf()));
      for (int t = 0; t < teachers_; ++t) {
        const Vec<T> energy = slope * (load(t_ + t * row_ + k) - reference) + energy_[t];
        top = vmax(energy, top);  // a missing teacher is NaN and loses
      }
      for (int t = 0; t < teachers_; ++t) {
        const Vec<T> d = load(t_ + t * row_ + k) - reference;
        const Vec<T> e = falling_exp2<T>((slope * d + energy_[t] - top) * T(1.4426950408889634074));
        mass += d == d ? e : Vec<T>{};
        moment += d == d ? e * d : Vec<T>{};
      }
    }
    const Vec<T> s = reference + moment * reciprocal<T>(mass);
    // Rounding must not leave the teachers' range; a NaN stays.
    const Vec<T> above = s < low ? low : s;
    return above > high ? high : above;
  }

  // Granularity "query": what the teachers present at the documents from k on hold of the query's weight.
  PILE_INLINE Vec<T> share(int k) const {
    if (!missing_) return splat<T>(1);
    Vec<T> held = {};
    for (int t = 0; t < teachers_; ++t) {
      const Vec<T> value = load(t_ + t * row_ + k);
      held += value == value ? splat<T>(weight_[t]) : Vec<T>{};
    }
    return vmax(held, splat<T>(T(kMinShare)));
  }

  void prepare_sums(Arena& arena, bool trace) {
    const int n = order_->labelled;
    const T per_unit = T(1 / options_->temperature);
    T low = bounds_[0], high = bounds_[1];
    for (int p = 1; p < pieces(n_); ++p) {
      low = smaller(low, bounds_[2 * p]);
      high = larger(high, bounds_[2 * p + 1]);
    }
    low *= per_unit;
    high *= per_unit;
    offset_ = T(options_->margin / options_->temperature);
    const auto grid = Grid<T>::over(low, high, n);
    int groups = 0;
    for (int k = 0; k < n && groups < 64; k = order_->below[k]) ++groups;
    const double blocks =
        smaller(double(groups < 64 ? groups : n), larger(1.0, double(n) / Fields::least_block(grid.cells) * 2));
    direct_ = direct_is_faster(options_->pairwise, grid, double(n) * n / 2, n, blocks, kEnsembleCosts<T>);
    bool inner = direct_;
    if (!direct_) {
      fields_ = Fields();
      fields_.plan(grid, n, order_->below, weights_.gain, arena);
      for (int b = 0; b < fields_.blocks; ++b) inner |= fields_.block[b].inner;
    }
    if (inner) {
      near_.plan(low, high, offset_, n, arena);
      sums_ = PairOutput<T>::take(n, arena);
    }
    if (!by_document_) {
      pull_pieces_ = direct_ ? pieces(n) : fields_.chunks;
      pull_ = arena.take<T>(int64_t(pull_pieces_) * teachers_ * kLanes<T>);
    }
    if (trace) {
      label_loss_.plan(*order_, weights_, double(offset_), options_->pairwise);
      traced_ = arena.take<T>(n);
    }
  }

  void iterate_direct(const Member& m, T* trace, int64_t it) {
    const int n = order_->labelled;
    const T per_unit = T(1 / options_->temperature);
    // Two loops over the same positions: together their chains of dependent instructions are too long to overlap.
    for_pieces(m, n, [&](int k) { store(u_ + k, tilt(k) * per_unit); });
    for_pieces(m, n, [&](int k) {
      near_.set(k, load(u_ + k));
      sums_.clear(k);
    });
    m.sync();
    if (trace) trace_loss(m, trace + it, 1);
    with_label_pairs([&](auto pairs) { all_pairs<T>(m, pairs, n, sums_, nullptr); });
    for (int p = m.rank; p < pieces(n); p += m.size) update(p, p * kPiece, smaller(n, (p + 1) * kPiece), -1);
    finish_update(m);
  }

  void iterate_fields(const Member& m, T* trace, int64_t it) {
    const T per_unit = T(1 / options_->temperature);
    for (int c = m.rank; c < fields_.chunks; c += m.size) {
      m.poll();
      fields_.clear(c);
      for (int begin = fields_.chunk_begin(c); begin < fields_.chunk_end(c); begin += kStretch) {
        const int end = smaller(begin + kStretch, fields_.chunk_end(c));
        // The last iteration's update, here where its documents are read anyway.
        if (by_document_ && it > 0) update(c, begin, end, fields_.chunk_block(c));
        for (int k = begin; k < end; k += kLanes<T>) store(u_ + k, tilt(k) * per_unit, end - k);
        fields_.deposit(c, begin, end, u_);
      }
    }
    m.sync();
    if (trace) trace_loss(m, trace + it, 1);
    if (m.leads()) fields_.collect();
    m.sync();
    for (int b = m.rank; b < fields_.blocks; b += m.size) {
      fields_.solve(b, *plus_, *minus_);
      const auto& block = fields_.block[b];
      if (!block.inner) continue;
      for (int k = block.begin; k < block.end; k += kLanes<T>) {
        sums_.clear(k, block.end - k);
        near_.set(k, load(u_ + k), block.end - k);
      }
      with_label_pairs([&](auto pairs) { pair_block<T>(pairs, block.begin, block.end, block.begin, block.end, sums_); });
    }
    m.sync();
    if (by_document_ && it + 1 < options_->iterations) return;
    for (int c = m.rank; c < fields_.chunks; c += m.size)
      update(c, fields_.chunk_begin(c), fields_.chunk_end(c), fields_.chunk_block(c));
    finish_update(m);
  }

  // λ of the documents from k on: of the block's field (block >= 0), of direct sums (`add`), or both.
  PILE_INLINE Vec<T> lambda(int k, int block, bool add) const {
    Vec<T> value = block >= 0 ? fields_.evaluate(block, load(u_ + k), k) : Vec<T>{};
    if (add) value += sums_.value(k);
    return value;
  }

  // After the pair sums: the exponents of positions [begin, end), or what these documents add to the teachers' exponents.
  void update(int piece, int begin, int end, int block) {
    const bool add = block < 0 || fields_.block[block].inner;  // else a block of one label, and one 1 / k
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

  // Granularity "query": Σ λ (t − s) / share of every teacher, lane by lane.
  void pull_teachers(int piece, int begin, int end, int block, bool add) {
    T* pull = pull_ + int64_t(piece) * teachers_ * kLanes<T>;
    for (int t = 0; t < teachers_; ++t) store(pull + t * kLanes<T>, Vec<T>{});
    T force[kStretch], s[kStretch];
    for (int from = begin; from < end; from += kStretch) {
      const int n = smaller(kStretch, end - from);
      for (int k = 0; k < n; k += kLanes<T>) {
        Vec<T> value = lambda(from + k, block, add);
        if (missing_) value /= share(from + k);
        store(force + k, first_lanes<T>(n - k, value));
        store(s + k, first_lanes<T>(n - k, load(u_ + from + k) * T(options_->temperature)));  // 0 x NaN would be NaN
      }
      int t = 0;
      for (; t + 4 <= teachers_; t += 4) pull_some<4>(pull, t, from, n, force, s);
      for (; t < teachers_; ++t) pull_some<1>(pull, t, from, n, force, s);
    }
  }
  template <int N>
  PILE_INLINE void pull_some(T* pull, int t, int from, int n, const T* force, const T* s) const {
    Vec<T> sums[N];
    for (int i = 0; i < N; ++i) sums[i] = load(pull + (t + i) * kLanes<T>);
    for (int k = 0; k < n; k += kLanes<T>) {
      const Vec<T> f = load(force + k), own = load(s + k);
      for (int i = 0; i < N; ++i) {
        const Vec<T> d = load(t_ + (t + i) * row_ + from + k) - own;
        sums[i] += missing_ ? ((d == d) & (f != T(0)) ? f * d : Vec<T>{}) : f * d;
      }
    }
    for (int i = 0; i < N; ++i) store(pull + (t + i) * kLanes<T>, sums[i]);
  }

  void finish_update(const Member& m) {
    m.sync();
    if (by_document_) return;
    if (m.leads()) {
      for (int t = 0; t < teachers_; ++t) {
        double total = 0;
        for (int p = 0; p < pull_pieces_; ++p) total += double(sum<T>(load(pull_ + (int64_t(p) * teachers_ + t) * kLanes<T>)));
        energy_[t] += T(options_->step_size * total / weights_.total);
      }
      refresh_query_weights();
    }
    m.sync();
  }

  // Softmax of the energies over the teachers that scored some document of the query.
  void refresh_query_weights() {
    double top = -__builtin_inf(), total = 0;
    for (int t = 0; t < teachers_; ++t)
      if (total_[t].count > 0) top = larger(top, double(energy_[t]));
    for (int t = 0; t < teachers_; ++t) total += total_[t].count > 0 ? __builtin_exp(double(energy_[t]) - top) : 0;
    for (int t = 0; t < teachers_; ++t)
      weight_[t] = total_[t].count > 0 ? T(__builtin_exp(double(energy_[t]) - top) / total) : T(0);
  }

  // The label loss at u_ * scale.
  void trace_loss(const Member& m, T* to, T scale) {
    for_pieces(m, order_->labelled, [&](int k) { store(traced_ + k, load(u_ + k) * scale); });
    m.sync();
    const double loss = label_loss_.run(m, traced_, nullptr);
    if (m.leads()) *to = T(loss / weights_.total);
  }

  template <class F>
  void with_label_pairs(F run) const {
    if (weights_.gain)
      near_.wide ? run(label_pairs<true, true>()) : run(label_pairs<true, false>());
    else
      near_.wide ? run(label_pairs<false, true>()) : run(label_pairs<false, false>());
  }
  template <bool kWeighted, bool kWide>
  LabelPairs<T, kWeighted, kWide, false> label_pairs() const {
    return {u_, near_, weights_.gain, order_->below};
  }

  const Batch* batch_ = nullptr;
  const EnsembleOptions* options_ = nullptr;
  const Order* order_ = nullptr;
  const Table *plus_ = nullptr, *minus_ = nullptr;
  int64_t query_ = 0, row_ = 0;
  int n_ = 0, teachers_ = 0, pull_pieces_ = 0;
  bool missing_ = false, by_document_ = true, has_prior_ = false, active_ = false, direct_ = true;
  PairWeights<T> weights_;
  T offset_ = 0;
  T* t_ = nullptr;                                     // [M][row_], calibrated; NaN = missing
  T *a_ = nullptr, *u_ = nullptr, *traced_ = nullptr;  // exponents; logits / temperature
  T *low_ = nullptr, *high_ = nullptr;                 // each document's lowest and highest teacher
  T *energy_ = nullptr, *weight_ = nullptr;            // by teacher
  T *bounds_ = nullptr, *pull_ = nullptr;
  double *mean_ = nullptr, *scale_ = nullptr, *unit_ = nullptr;  // by teacher: calibrated is (t unit − mean) scale
  double common_ = 0;  // what came off all teachers alike and goes back onto the logits
  Stats *partial_ = nullptr, *total_ = nullptr;
  Exponentials<T> near_;
  PairOutput<T> sums_;
  Fields fields_;
  LabelLoss<T> label_loss_;
};

}  // namespace PILE_ISA
}  // namespace pile
