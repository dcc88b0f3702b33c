// The CPU backend for one instruction set: every query of a batch, by a team of threads.
//
// A query is worked on in one arena, its documents gathered into plain arrays by falling label, whatever the layout, strides and
// dtypes it came in; so the kernels below know nothing of them. Queries go to one thread each, handed out by a counter; long ones
// that would leave threads idle are worked on by the whole team, one after the other. Either way a query's arithmetic is the same, to
// the bit.
#pragma once

#include "ensemble.h"
#include "job.h"

namespace pile {
namespace PILE_ISA {

// From kLong documents on a team may share a query's work, from kHuge on it does if there are only a few such queries.
constexpr int kLong = 4096, kHuge = 1 << 17;

template <class T>
class Run {
 public:
  Run(const Job& job, const FieldTable<T, kPowers<T>>* plus, const FieldTable<T, kPowers<T>>* minus)
      : job_(job), batch_(job.batch), plus_(plus), minus_(minus) {}

  void operator()(const Member& m) {
    if (m.leads() && job_.loss) {
      losses_ = m.arena->take<double>(batch_.queries);
      has_pairs_ = m.arena->take<uint8_t>(batch_.queries);
      gradient_ = static_cast<T*>(job_.out.gradient);
      const bool as_computed = batch_.student.dtype == (sizeof(T) == 4 ? DType::f32 : DType::f64);
      if (gradient_ && !as_computed) gradient_ = m.arena->take<T>(documents());
    }
    m.sync();
    const bool shared = m.size > 1 && share_long_queries(m);
    if (shared) {
      for (int64_t q = 0; q < batch_.queries; ++q) {
        if (batch_.length(q) < kLong) continue;
        query(m, team_, q);
      }
      m.sync();
    }
    const int64_t grain = larger<int64_t>(1, smaller<int64_t>(64, batch_.queries / (16 * m.size)));
    const Member alone = {0, 1, m.state, m.arena, m.calls};
    Scratch own;
    for (;;) {
      const int64_t begin = m.state->next.fetch_add(grain, std::memory_order_relaxed);
      if (begin >= batch_.queries) break;
      m.poll();
      for (int64_t q = begin; q < smaller(begin + grain, batch_.queries); ++q)
        if (!shared || batch_.length(q) < kLong) query(alone, own, q);
    }
    m.sync();
    if (job_.loss) reduce(m);
    if (job_.out.logits && m.leads())  // documents of no query
      for (int64_t d = covered(); d < documents(); ++d) static_cast<T*>(job_.out.logits)[d] = T(__builtin_nan(""));
    if (job_.out.weights && job_.ensemble->granularity == Granularity::document && m.leads())
      for (int64_t d = covered() * batch_.teachers; d < documents() * batch_.teachers; ++d)
        static_cast<T*>(job_.out.weights)[d] = 0;
  }

 private:
  // What the members working on one query share.
  struct Scratch {
    Arena::Mark after_order;
    uint8_t *valid, *scored;  // by slot
    uint8_t* takes_part;      // by teacher: has a positive prior; nullptr: all have
    int* counts;              // by piece of slots: valid, scored, scores missing
    LabelSort sort;
    Order order, loss_order;
    T* target;  // by slot
    EnsembleQuery<T> ensemble;
    PairWeights<T> weights;
    LabelLoss<T> label_loss;
    DistillLoss<T> distill_loss;
    int *at, distilled;  // positions that are distilled
    T *z, *lambda, *distill_z, *distill_s, *slope;
    double* squares;  // of square_loss
    bool finite;
  };

  int64_t documents() const { return batch_.packed() ? batch_.slots : batch_.queries * batch_.slots; }
  int64_t covered() const { return batch_.queries ? batch_.begin(batch_.queries - 1) + batch_.length(batch_.queries - 1) : 0; }

  // Not where whole queries, each taken by the next free member, keep all of them about as busy: that needs no barriers, and nobody
  // waits for what one member does alone (to sort labels that are no grades, say). Huge lists are shared in any case, so that there
  // is one in memory at a time.
  bool share_long_queries(const Member& m) const {
    int64_t count = 0, total = 0, longest = 0;
    for (int64_t q = 0; q < batch_.queries; ++q) {
      const int64_t length = batch_.length(q);
      count += length >= kLong;
      total += length;
      longest = larger(longest, length);
    }
    if (count == 0 || count >= 4 * m.size) return false;
    if (longest >= kHuge) return true;
    const Arena::Mark mark = m.arena->mark();
    int64_t* busy = m.arena->take<int64_t>(m.size);
    for (int r = 0; r < m.size; ++r) busy[r] = 0;
    int64_t before = 0, last = 0;  // in documents: handed out so far; when the last member would end
    for (int64_t q = 0; q < batch_.queries; before += batch_.length(q++)) {
      if (batch_.length(q) < kLong) continue;
      int free = 0;
      for (int r = 1; r < m.size; ++r) free = busy[r] < busy[free] ? r : free;
      busy[free] = larger(busy[free], before / m.size) + batch_.length(q);
      last = larger(last, busy[free]);
    }
    m.arena->release(mark);
    return last * m.size > total + total / 4;
  }

  void query(const Member& m, Scratch& s, int64_t q) {
    const int slots = int(batch_.length(q));
    if (slots >= kPollQuery) m.poll();
    const Arena::Mark own = m.arena->mark();
    if (m.leads()) {
      s.valid = m.arena->take<uint8_t>(slots);
      s.scored = job_.ensemble ? m.arena->take<uint8_t>(slots) : nullptr;
      s.counts = m.arena->take<int>(3 * (pieces(slots) + 1));
      s.target = job_.out.logits ? nullptr : m.arena->take<T>(slots);
      s.takes_part = nullptr;
      if (const View& prior = batch_.prior; prior.data) {
        s.takes_part = m.arena->take<uint8_t>(batch_.teachers);
        with_logits(prior, [&](const auto* data) {
          for (int64_t t = 0; t < batch_.teachers; ++t) s.takes_part[t] = read(data, q * prior.query + t * prior.teacher) > 0;
        });
      }
    }
    m.sync();
    scan(m, s, q, slots);
    m.sync();
    int valid = 0, scored = 0, missing = 0;
    for (int p = 0; p < pieces(slots); ++p) {
      valid += s.counts[3 * p];
      scored += s.counts[3 * p + 1];
      missing += s.counts[3 * p + 2];
    }
    if (job_.ensemble) run_ensemble(m, s, q, slots, scored, missing > 0);
    if (job_.loss) run_loss(m, s, q, slots, valid, scored);
    m.sync();
    m.arena->release(own);
  }

  // Which slots hold a document, and which of those a teacher scored.
  void scan(const Member& m, Scratch& s, int64_t q, int slots) const {
    const View &mask = batch_.mask, &teacher = batch_.teacher;
    const int64_t mask_at = q * mask.query, first = batch_.first(q);
    for (int p = m.rank; p < pieces(slots); p += m.size) {
      const int begin = p * kPiece, end = smaller(slots, begin + kPiece);
      int valid = 0, scored = 0, missing = 0;
      if (mask.data) {
        for (int i = begin; i < end; ++i)
          valid += s.valid[i] = static_cast<const uint8_t*>(mask.data)[mask_at + i * mask.document] != 0;
      } else {
        std::memset(s.valid + begin, 1, end - begin);
        valid = end - begin;
      }
      if (job_.ensemble) {
        const int teachers = int(batch_.teachers);
        with_logits(teacher, [&](const auto* data) {
          // Mostly nothing is missing, and the scores stand side by side: one look at all of them.
          if (!s.takes_part && teacher.teacher == 1 && teacher.document == teachers) {
            const auto* scores = data + q * teacher.query + (first + begin) * teacher.document;
            int absent = 0;
            for (int64_t k = 0; k < int64_t(end - begin) * teachers; ++k) {
              absent += !is_finite(read(scores, k));
            }
            if (absent == 0) {
              std::memcpy(s.scored + begin, s.valid + begin, end - begin);
              scored = valid;
              return;
            }
          }
          for (int i = begin; i < end; ++i) {
            const int64_t at = q * teacher.query + (first + i) * teacher.document;
            int present = 0;
            for (int t = 0; t < teachers; ++t) {
              present += is_finite(read(data, at + t * teacher.teacher)) & (!s.takes_part || s.takes_part[t]);
            }
            s.scored[i] = s.valid[i] & (present > 0);
            scored += s.scored[i];
            missing += s.scored[i] ? teachers - present : 0;
          }
        });
      }
      s.counts[3 * p] = valid;
      s.counts[3 * p + 1] = scored;
      s.counts[3 * p + 2] = missing;
    }
  }

  void run_ensemble(const Member& m, Scratch& s, int64_t q, int slots, int scored, bool missing) {
    const EnsembleOptions& options = *job_.ensemble;
    const int64_t begin = batch_.begin(q), offset = q * batch_.labels.query + batch_.first(q) * batch_.labels.document;
    T* trace = job_.out.trace ? static_cast<T*>(job_.out.trace) + q * (options.iterations + 1) : nullptr;
    T* logits = job_.out.logits ? static_cast<T*>(job_.out.logits) + begin : s.target;
    T* weights = static_cast<T*>(job_.out.weights);
    const int64_t teachers = batch_.teachers;
    const bool by_document = options.granularity == Granularity::document;
    s.sort.run(m, batch_.labels, offset, slots, scored < slots ? s.scored : nullptr, s.order);
    if (m.leads()) {
      check_labels(s.order, q);
      s.after_order = m.arena->mark();
      s.ensemble.plan(batch_, options, q, s.order, missing, plus_, minus_, *m.arena);
      if (scored < slots) {
        for (int i = 0; i < slots; ++i) logits[i] = T(__builtin_nan(""));
        if (weights && by_document)
          for (int64_t i = 0; i < slots * teachers; ++i) weights[begin * teachers + i] = 0;
      }
    }
    m.sync();
    s.ensemble.run(m, trace);
    const double common = job_.out.logits ? s.ensemble.common() : 0;  // a loss needs differences only
    for (int p = m.rank; p < pieces(scored); p += m.size) {
      for (int k = p * kPiece; k < smaller(scored, (p + 1) * kPiece); ++k) {
        const int slot = s.order.slot[k];
        logits[slot] = T(double(s.ensemble.logits()[k]) + common);
        if (weights && by_document) s.ensemble.document_weights(k, weights + (begin + slot) * teachers);
      }
    }
    if (weights && !by_document && m.leads())
      for (int64_t t = 0; t < teachers; ++t) weights[q * teachers + t] = s.ensemble.query_weights()[t];
    m.sync();
    if (m.leads()) m.arena->release(s.after_order);  // the loss works in the same memory
  }

  // Infinite labels, and integers that doubles do not tell apart: the call fails, and names the first such query.
  void check_labels(const Order& order, int64_t q) const {
    if (order.labelled == 0) return;
    const double limit = batch_.labels.dtype == DType::i64 ? 0x1p53 : __builtin_inf();
    if (order.label[0] < limit && order.label[order.labelled - 1] > -limit) return;
    int64_t first = job_.wrong_labels->load(std::memory_order_relaxed);
    while ((first < 0 || q < first) && !job_.wrong_labels->compare_exchange_weak(first, q, std::memory_order_relaxed)) {
    }
  }

  void run_loss(const Member& m, Scratch& s, int64_t q, int slots, int valid, int scored) {
    const LossOptions& options = *job_.loss;
    const int64_t begin = batch_.begin(q), first = batch_.first(q);
    T* gradient = gradient_ ? gradient_ + begin : nullptr;
    const bool same = job_.ensemble && scored == valid;
    if (!same) {
      const View labels = options.alpha < 1 ? batch_.labels : View{};
      s.sort.run(m, labels, q * labels.query + first * labels.document, slots, valid < slots ? s.valid : nullptr, s.loss_order);
    }
    if (m.leads()) {
      Arena& arena = *m.arena;
      if (same)
        s.loss_order = s.order;
      else
        check_labels(s.loss_order, q);
      s.z = arena.take<T>(valid);
      s.lambda = arena.take<T>(valid);
      if (options.alpha > 0) {
        s.at = arena.take<int>(valid);
        s.distill_z = arena.take<T>(valid);
        s.distill_s = arena.take<T>(valid);
        s.slope = arena.take<T>(valid);
        s.squares = arena.take<double>(2 * pieces(valid));
      }
      if (options.alpha < 1 && s.loss_order.has_pairs()) {
        s.weights = pair_weights<T>(s.loss_order, options.pair_weight, arena);
        s.label_loss.plan(s.loss_order, s.weights, 0, options.pairwise);
      }
    }
    m.sync();
    for (int p = m.rank; p < pieces(valid); p += m.size) gather_logits(s, q, p, valid);
    m.sync();
    if (m.leads()) join_pieces(s, valid);
    m.sync();
    double loss = 0, label_scale = 0, distill_scale = 0;
    const bool label_pairs = options.alpha < 1 && s.loss_order.has_pairs(), distill_pairs = s.distilled > 1;
    if (!s.finite) {
      loss = __builtin_nan("");
    } else {
      if (label_pairs) {
        label_scale = (1 - options.alpha) / s.weights.total;
        loss += label_scale * s.label_loss.run(m, s.z, s.lambda);
      }
      if (distill_pairs) {
        const int n = s.distilled;
        distill_scale = options.alpha / (double(n) * (n - 1) / 2);
        options.distillation.visit([&](auto term) {
          if constexpr (std::is_same_v<decltype(term), DistillMse>) {
            loss += distill_scale * square_loss(m, s.distill_z, s.distill_s, n, s.squares, s.slope);
          } else {
            loss += distill_scale *
                    s.distill_loss.run(m, s.distill_z, s.distill_s, n, 1 / term.temperature, options.pairwise, s.slope);
            distill_scale /= term.temperature;
          }
        });
      }
    }
    if (m.leads()) {
      losses_[q] = loss;
      has_pairs_[q] = label_pairs | distill_pairs;
      if (gradient && distill_pairs && s.distilled < valid) {  // the slope by position, from the back
        for (int k = valid - 1, d = s.distilled - 1; k >= 0; --k) s.slope[k] = d >= 0 && s.at[d] == k ? s.slope[d--] : T(0);
      }
    }
    if (!gradient) return;
    for (int p = m.rank; valid < slots && p < pieces(slots); p += m.size)
      for (int i = p * kPiece; i < smaller(slots, (p + 1) * kPiece); ++i)
        if (!s.valid[i]) gradient[i] = 0;
    m.sync();
    const int ranked = label_pairs ? s.loss_order.labelled : 0;
    for (int p = m.rank; p < pieces(valid); p += m.size) {
      for (int k = p * kPiece; k < smaller(valid, (p + 1) * kPiece); ++k) {
        T g = k < ranked ? T(-label_scale) * s.lambda[k] : T(0);
        if (distill_pairs) g += T(distill_scale) * s.slope[k];
        gradient[s.loss_order.slot[k]] = s.finite ? g : T(__builtin_nan(""));
      }
    }
  }

  // A piece of the student's logits by position, and of the pairs (logit, target) of documents with a target.
  void gather_logits(Scratch& s, int64_t q, int piece, int valid) const {
    const LossOptions& options = *job_.loss;
    const int64_t first = batch_.first(q);
    const int begin = piece * kPiece, end = smaller(valid, begin + kPiece);
    const int* slot = s.loss_order.slot;
    bool finite = true;
    with_logits(batch_.student, [&](const auto* data) {
      const int64_t at = q * batch_.student.query + first * batch_.student.document;
      for (int k = begin; k < end; ++k) {
        s.z[k] = T(read(data, at + slot[k] * batch_.student.document));
        finite &= is_finite(s.z[k]);
      }
    });
    int to = begin;
    if (options.alpha > 0) {
      if (!job_.ensemble) {
        with_logits(batch_.target, [&](const auto* data) {
          const int64_t at = q * batch_.target.query + first * batch_.target.document;
          for (int k = begin; k < end; ++k) s.target[slot[k]] = T(read(data, at + slot[k] * batch_.target.document));
        });
      }
      for (int k = begin; k < end; ++k) {
        const T target = s.target[slot[k]];
        s.at[to] = k;
        s.distill_z[to] = s.z[k];
        s.distill_s[to] = target;
        to += is_finite(target);
      }
    }
    s.counts[3 * piece] = finite;
    s.counts[3 * piece + 1] = to - begin;
  }

  void join_pieces(Scratch& s, int valid) const {
    s.finite = true;
    s.distilled = 0;
    for (int p = 0; p < pieces(valid); ++p) {
      const int from = p * kPiece, count = s.counts[3 * p + 1];
      s.finite &= s.counts[3 * p] != 0;
      if (from != s.distilled) {
        std::memmove(s.at + s.distilled, s.at + from, count * sizeof(int));
        std::memmove(s.distill_z + s.distilled, s.distill_z + from, count * sizeof(T));
        std::memmove(s.distill_s + s.distilled, s.distill_s + from, count * sizeof(T));
      }
      s.distilled += count;
    }
  }

  // The batch's loss, and the gradient in the student's dtype. Queries are added in order, in double.
  void reduce(const Member& m) const {
    T* loss = static_cast<T*>(job_.out.loss);
    double total = 0;
    int64_t count = 0;
    for (int64_t q = 0; q < batch_.queries; ++q) {
      total += losses_[q];
      count += has_pairs_[q];
    }
    const bool mean = job_.loss->reduction == Reduction::mean;
    const double scale = mean && count > 1 ? 1.0 / double(count) : 1.0;
    if (m.leads()) {
      if (job_.loss->reduction == Reduction::none)
        for (int64_t q = 0; q < batch_.queries; ++q) loss[q] = T(losses_[q]);
      else
        *loss = T(total * scale);
    }
    if (!gradient_) return;
    const int64_t all = documents(), used = covered();
    const int64_t from = all * m.rank / m.size, to = all * (m.rank + 1) / m.size;
    if (static_cast<void*>(gradient_) == job_.out.gradient) {
      if (scale != 1)
        for (int64_t d = from; d < smaller(to, used); ++d) gradient_[d] *= T(scale);
      for (int64_t d = larger(from, used); d < to; ++d) gradient_[d] = 0;
    } else {
      for (int64_t d = from; d < to; ++d)
        write(job_.out.gradient, batch_.student.dtype, d, d < used ? gradient_[d] * T(scale) : T(0));
    }
    m.sync();
  }

  const Job& job_;
  const Batch& batch_;
  const FieldTable<T, kPowers<T>>*plus_, *minus_;
  double* losses_ = nullptr;
  uint8_t* has_pairs_ = nullptr;
  T* gradient_ = nullptr;
  Scratch team_;
};

// No more threads than the work keeps busy for some 20 microseconds each.
inline int useful_threads(const Job& job) {
  const Batch& batch = job.batch;
  const double documents = double(batch.packed() ? batch.slots : batch.queries * batch.slots);
  const double length = documents / larger<int64_t>(1, batch.queries);
  if (batch.queries == 1 && length < kLong) return 1;
  const double passes = job.ensemble ? double(job.ensemble->iterations) + 2 : 2;
  const double nanoseconds = documents * passes * (2 + double(batch.teachers) / 2 + smaller(length, 256.0) / 32);
  return int(larger(1.0, smaller(double(job.threads), nanoseconds / 20000)));
}

template <class T>
void run_as(const Job& job) {
  using Table = FieldTable<T, kPowers<T>>;
  static const Table centred(0);
  const Table *plus = &centred, *minus = &centred;
  const double offset = job.ensemble ? job.ensemble->margin / job.ensemble->temperature : 0;
  Table* owned[2] = {};
  if (offset != 0) {
    plus = owned[0] = new Table(offset);
    minus = owned[1] = new Table(-offset);
  }
  Run<T> run(job, plus, minus);
  struct Release {
    Table** owned;
    ~Release() {
      delete owned[0];
      delete owned[1];
    }
  } release{owned};
  run_team(useful_threads(job), [](const Member& m, void* run) { (*static_cast<Run<T>*>(run))(m); }, &run, job.interrupt);
}

void run(const Job& job) { job.wide ? run_as<double>(job) : run_as<float>(job); }

}  // namespace PILE_ISA
}  // namespace pile
