// The teachers of one query: their scores gathered by position, and calibrated.
#pragma once

#include "order.h"

namespace pile::PILE_ISA {

// Documents ahead of the gather whose scores are fetched.
constexpr int kPrefetch = 24;

template <class T>
class Teachers {
 public:
  int count = 0;
  bool missing = false;                     // some score
  T *lowest = nullptr, *highest = nullptr;  // by position
  T* energy = nullptr;  // by teacher: log prior weights, the largest 0; -inf: takes no part. The ensemble goes on from there.
  double common = 0;    // what came off all scores and goes back onto the logits

  // The leader calls this; `order` holds the documents that some teacher scored. `some_missing`: some score among them is
  // missing.
  void plan(const Batch& batch, Normalize normalize, int64_t q, const Order& order, bool some_missing, Arena& arena) {
    batch_ = &batch;
    normalize_ = normalize;
    order_ = &order;
    query_ = q;
    n_ = order.n;
    count = int(batch.teachers);
    missing = some_missing;
    // A whole number of vectors, and not a multiple of the page: the teachers' rows must not share cache sets.
    row_ = round_up(n_, kLanes<T>) + kLanes<T>;
    t_ = arena.take<T>(row_ * count);
    lowest = arena.take<T>(n_);
    highest = arena.take<T>(n_);
    partial_ = arena.take<Stats>(int64_t(pieces(n_)) * count);
    bounds_ = arena.take<T>(2 * pieces(n_));
    total_ = arena.take<Stats>(count);
    mean_ = arena.take<double>(count);
    unit_ = arena.take<double>(count);
    scale_ = arena.take<double>(count);
    energy = arena.take<T>(count);
    start_energies();
  }

  // All members of a team call this on one shared object.
  void calibrate(const Member& m) {
    gather(m);
    m.sync();
    if (m.leads()) {
      for (int t = 0; t < count; ++t) {
        total_[t] = {0, 0, T(__builtin_inf()), T(-__builtin_inf())};
        for (int p = 0; p < pieces(n_); ++p) {
          const Stats& s = partial_[p * count + t];
          total_[t].sum += s.sum;
          total_[t].count += s.count;
          total_[t].low = smaller(total_[t].low, s.low);
          total_[t].high = larger(total_[t].high, s.high);
        }
        calibrate_by_sums(t);
      }
      if (normalize_ == Normalize::none) take_off_what_is_common();
    }
    m.sync();
    if (by_deviation()) {
      for (int p = m.rank; p < pieces(n_); p += m.size)
        for (int t = 0; t < count; ++t) partial_[p * count + t].sum = squares(t, p);
      m.sync();
      if (m.leads()) {
        for (int t = 0; t < count; ++t) {
          double square = 0;
          for (int p = 0; p < pieces(n_); ++p) square += partial_[p * count + t].sum;
          // By its extremes: the rounding of a constant's mean must not be blown up to unit scale.
          scale_[t] = total_[t].high > total_[t].low ? 1 / __builtin_sqrt(square / total_[t].count) : 0.0;
        }
      }
      m.sync();
    }
    for (int p = m.rank; p < pieces(n_); p += m.size) scale_piece(p);
    m.sync();
  }

  // A teacher's calibrated scores by position; NaN where one is missing.
  PILE_INLINE const T* row(int t) const { return t_ + t * row_; }
  // Whether it has any.
  bool scored(int t) const { return total_[t].count > 0; }
  // The range of them all.
  void find_range(T& low, T& high) const {
    low = bounds_[0];
    high = bounds_[1];
    for (int p = 1; p < pieces(n_); ++p) {
      low = smaller(low, bounds_[2 * p]);
      high = larger(high, bounds_[2 * p + 1]);
    }
  }

 private:
  bool by_deviation() const { return normalize_ == Normalize::zscore || normalize_ == Normalize::logit; }

  struct Stats {
    double sum, count;
    T low, high;
  };

  void start_energies() {
    const View& prior = batch_->prior;
    for (int t = 0; t < count; ++t) energy[t] = 0;
    if (!prior.data) return;
    double top = 0;
    with_logits(prior, [&](const auto* data) {
      auto weight = [&](int t) { return double(read(data, query_ * prior.query + t * prior.teacher)); };
      for (int t = 0; t < count; ++t) top = larger(top, weight(t));
      for (int t = 0; t < count; ++t) energy[t] = weight(t) > 0 ? T(__builtin_log(weight(t) / top)) : -T(__builtin_inf());
    });
  }

  // A teacher's mean, and the unit in which squares of its logits neither overflow nor vanish: 1 but for doubles of extreme
  // size.
  void calibrate_by_sums(int t) {
    Stats& all = total_[t];
    mean_[t] = 0;
    scale_[t] = unit_[t] = 1;
    if (normalize_ == Normalize::none || all.count == 0) return;
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
    if (normalize_ == Normalize::minmax) {
      const double low = double(all.low) * unit_[t], high = double(all.high) * unit_[t];
      mean_[t] = low;
      scale_[t] = high > low ? 1 / (high - low) : 0.0;
    }
  }

  // Logits as they are: the middle of them all, where it is large beside their range. Ensembles and pairs are differences,
  // which have more digits without it, and off and on again it rounds nothing.
  void take_off_what_is_common() {
    double low = __builtin_inf(), high = -low;
    for (int t = 0; t < count; ++t) {
      if (total_[t].count == 0) continue;
      low = smaller(low, double(total_[t].low));
      high = larger(high, double(total_[t].high));
    }
    const double middle = double(T(low / 2 + high / 2));
    common = __builtin_fabs(middle) > 2 * (high - low) ? middle : 0;
    for (int t = 0; t < count; ++t) mean_[t] = common;
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
        for (int t = 0; t < count; ++t) {
          T* row = t_ + t * row_;
          if (energy[t] < -T(1e30))
            for (int k = begin; k < end; ++k) row[k] = T(__builtin_nan(""));
          if (end == n_)  // what a last partial vector reads beyond
            for (int k = end; k < row_; ++k) row[k] = 0;
          Stats& own = partial_[p * count + t];
          if (normalize_ == Normalize::logit)
            for (int k = begin; k < end; ++k) row[k] = probability_logit(row[k]);
          own = stats(row, begin, end);
          if (own.low == -T(__builtin_inf()) || own.high == T(__builtin_inf())) {  // no score, as NaN
            for (int k = begin; k < end; ++k) row[k] = is_finite(row[k]) ? row[k] : T(__builtin_nan(""));
            own = stats(row, begin, end);
          }
        }
      }
    });
  }

  // See pile_fast/reference.py; what is not finite stays so.
  static T probability_logit(T probability) {
    if (!is_finite(probability)) return probability;
    const double epsilon = sizeof(T) == 8 ? 0x1p-52 : 0x1p-23, p = smaller(larger(double(probability), epsilon), 1 - epsilon);
    return T(__builtin_log(p) - __builtin_log1p(-p));
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
          for (int t = 0; t < count; t += 8) transpose(row, end - k, t, smaller(8, count - t), t_ + t * row_ + k, row_);
        }
        return;
      }
    }
#endif
    for (int k = begin; k < end; ++k) {
      fetch(k);
      const int64_t from = slot[k] * view.document;
      for (int t = 0; t < count; ++t) t_[t * row_ + k] = T(read(data, from + t * view.teacher));
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
    Vec<T> piece_low = splat<T>(T(__builtin_inf())), piece_high = -piece_low;
    for (int k = begin; k < end; k += kLanes<T>) {
      Vec<T> low = splat<T>(T(__builtin_inf())), high = -low;
      for (int t = 0; t < count; ++t) {
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
      store(lowest + k, low);
      store(highest + k, high);
      if (lanes < kLanes<T>) {
        const Ints<T> mask = iota<T>() < typename Simd<T>::integer(lanes);
        low = mask ? low : splat<T>(T(__builtin_inf()));
        high = mask ? high : splat<T>(-T(__builtin_inf()));
      }
      piece_low = vmin(low, piece_low);
      piece_high = vmax(high, piece_high);
    }
    bounds_[2 * piece] = piece_low[0];
    bounds_[2 * piece + 1] = piece_high[0];
    for (int l = 1; l < kLanes<T>; ++l) {
      bounds_[2 * piece] = smaller(bounds_[2 * piece], T(piece_low[l]));
      bounds_[2 * piece + 1] = larger(bounds_[2 * piece + 1], T(piece_high[l]));
    }
  }

  const Batch* batch_ = nullptr;
  const Order* order_ = nullptr;
  Normalize normalize_ = Normalize::zscore;
  int64_t query_ = 0, row_ = 0;
  int n_ = 0;
  T* t_ = nullptr;                                               // [count][row_]
  T* bounds_ = nullptr;                                          // of the pieces
  double *mean_ = nullptr, *scale_ = nullptr, *unit_ = nullptr;  // by teacher: calibrated is (t unit − mean) scale
  Stats *partial_ = nullptr, *total_ = nullptr;
};

}  // namespace pile::PILE_ISA
