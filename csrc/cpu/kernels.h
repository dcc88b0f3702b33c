// The CPU backend for one instruction set: every query of a batch, by a team of threads.
//
// A query is worked on in one arena, its documents gathered into plain arrays by falling label, whatever the layout, strides
// and dtypes it came in; so the kernels below know nothing of them. Queries go to one thread each, handed out by a counter;
// long ones that would leave threads idle are worked on by the whole team, one after the other. Either way a query's arithmetic
// is the same, to the bit.
#pragma once

#include <new>

#include "ensemble.h"
#include "job.h"
#include "loss.h"

namespace pile::PILE_ISA {

// From kLong documents on a team may share a query's work, from kHuge on it does if there are only a few such queries.
constexpr int kLong = 4096, kHuge = 1 << 17;

template <class T>
class Run {
 public:
  explicit Run(const Job& job) : job_(job), batch_(job.batch) {}

  void operator()(const Member& m) {
    if (m.leads() && job_.ensemble) {
      const double offset = job_.ensemble->margin / job_.ensemble->temperature;
      plus_ = field_table<T, kPowers<T>>(offset, *m.arena);
      minus_ = field_table<T, kPowers<T>>(-offset, *m.arena);
    }
    if (m.leads() && job_.loss) {
      losses_ = m.arena->take<double>(batch_.queries);
      counts_ = m.arena->take<uint8_t>(batch_.queries);
      gradient_ = static_cast<T*>(job_.out.gradient);
      const bool as_computed = batch_.student.dtype == (sizeof(T) == 4 ? DType::f32 : DType::f64);
      if (gradient_ && !as_computed) gradient_ = m.arena->take<T>(documents());
    }
    m.sync();
    const bool by_team = m.size > 1 && share_long_queries(m);
    if (job_.exponents) return fit(m, by_team);
    each_query(m, by_team, [&](const Member& who, Scratch& s, int64_t q) { query(who, s, q); });
    if (job_.loss) reduce(m);
    if (job_.out.logits && m.leads())  // documents of no query
      for (int64_t d = covered(); d < documents(); ++d) static_cast<T*>(job_.out.logits)[d] = T(__builtin_nan(""));
    if (job_.out.weights && job_.ensemble->granularity == Granularity::document && m.leads())
      for (int64_t d = covered() * batch_.teachers; d < documents() * batch_.teachers; ++d)
        static_cast<T*>(job_.out.weights)[d] = 0;
  }

 private:
  int64_t label_offset(int64_t q) const { return q * batch_.labels.query + batch_.first(q) * batch_.labels.document; }

  // What the members working on one query share.
  struct Scratch {
    Arena::Mark after_order;
    uint8_t *valid, *scored;  // by slot
    uint8_t* counted;         // by slot, what the loss sees: valid ones whose weight is not 0
    uint8_t* takes_part;      // by teacher: has a positive prior; nullptr: all have
    int* counts;              // by piece of slots: valid, scored, scores missing, counted
    LabelSort sort;
    Order order;
    T* target;  // the ensemble by slot, unless it is an output
    EnsembleQuery<T> ensemble;
    QueryLoss<T> loss;
  };

  // A query of a fit, which stays in memory through all iterations.
  struct Prepared {
    Order order;
    EnsembleQuery<T> ensemble;
  };

  // visit(member, scratch, query): long ones `by_team`, the others as members are free.
  template <class Visit>
  void each_query(const Member& m, bool by_team, Visit visit) {
    if (by_team) {
      for (int64_t q = 0; q < batch_.queries; ++q) {
        if (batch_.length(q) < kLong) continue;
        visit(m, team_, q);
      }
      m.sync();
    }
    const int64_t grain = larger<int64_t>(1, smaller<int64_t>(64, batch_.queries / (16 * m.size)));
    const Member alone = {0, 1, m.state, m.arena, m.calls};
    Scratch own;
    for (;;) {
      const int64_t begin = m.take_queries(grain);
      if (begin >= batch_.queries) break;
      m.poll();
      for (int64_t q = begin; q < smaller(begin + grain, batch_.queries); ++q)
        if (!by_team || batch_.length(q) < kLong) visit(alone, own, q);
    }
    m.sync();
  }

  int64_t documents() const { return batch_.packed() ? batch_.slots : batch_.queries * batch_.slots; }
  int64_t covered() const { return batch_.queries ? batch_.begin(batch_.queries - 1) + batch_.length(batch_.queries - 1) : 0; }

  // Not where whole queries, each taken by the next free member, keep all of them about as busy: that needs no barriers, and
  // nobody waits for what one member does alone (to sort labels that are no grades, say). Huge lists are shared in any case, so
  // that there is one in memory at a time.
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

  struct Counts {
    int valid, scored, missing, counted;
  };

  void query(const Member& m, Scratch& s, int64_t q) {
    const int slots = int(batch_.length(q));
    const Arena::Mark own = m.arena->mark();
    const Counts found = look_at(m, s, q, slots);
    if (job_.ensemble) run_ensemble(m, s, q, slots, found.scored, found.missing > 0);
    if (job_.loss) run_loss(m, s, q, slots, found);
    m.sync();
    m.arena->release(own);
  }

  // Takes the memory that a query begins with, and looks at its slots.
  Counts look_at(const Member& m, Scratch& s, int64_t q, int slots) {
    if (slots >= kPollQuery) m.poll();
    if (m.leads()) {
      s.valid = m.arena->take<uint8_t>(slots);
      s.scored = job_.ensemble ? m.arena->take<uint8_t>(slots) : nullptr;
      s.counted = job_.loss && weighs() ? m.arena->take<uint8_t>(slots) : s.valid;
      s.counts = m.arena->take<int>(4 * (pieces(slots) + 1));
      s.target = job_.ensemble && !job_.out.logits ? m.arena->take<T>(slots) : nullptr;
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
    Counts found = {};
    for (int p = 0; p < pieces(slots); ++p) {
      found.valid += s.counts[4 * p];
      found.scored += s.counts[4 * p + 1];
      found.missing += s.counts[4 * p + 2];
      found.counted += s.counts[4 * p + 3];
    }
    return found;
  }

  // Weights that all queries share (docs/algorithm.md, 2a): every query with a pair is prepared once, then an iteration is a
  // sweep over them, and a step by the sum of their pulls.
  void fit(const Member& m, bool by_team) {
    const int teachers = int(batch_.teachers);
    if (m.leads()) {
      prepared_ = m.arena->take<Prepared*>(batch_.queries);
      pulls_ = m.arena->take<double>(batch_.queries * teachers);
      label_losses_ = m.arena->take<T>(batch_.queries);
      weights_ = m.arena->take<T>(teachers);
      energies_ = m.arena->take<T>(teachers);
    }
    m.sync();
    each_query(m, by_team, [&](const Member& who, Scratch& s, int64_t q) { prepare(who, s, q); });
    T* trace = static_cast<T*>(job_.out.trace);
    double* a = job_.exponents;
    if (m.leads())
      for (int t = 0; t < teachers; ++t) a[t] = 0;
    const int64_t iterations = job_.ensemble->iterations;
    for (int64_t it = 0; it < iterations + (trace != nullptr); ++it) {
      if (m.leads()) {
        set_weights();
        m.state->next = 0;
      }
      m.sync();
      each_query(m, by_team, [&](const Member& who, Scratch&, int64_t q) {
        if (!prepared_[q]) return;
        prepared_[q]->ensemble.pull_at(who, weights_, energies_, trace ? label_losses_ + q : nullptr);
        for (int t = 0; who.leads() && t < teachers; ++t) pulls_[q * teachers + t] = prepared_[q]->ensemble.pull(t);
      });
      if (m.leads()) step(trace ? trace + it : nullptr, it < iterations);
    }
  }

  // The query ready for the sweeps of a fit, or nullptr: it has no pair.
  void prepare(const Member& m, Scratch& s, int64_t q) {
    const int slots = int(batch_.length(q));
    const Arena::Mark own = m.arena->mark();
    const Counts found = look_at(m, s, q, slots);
    s.sort.run(m, batch_.labels, label_offset(q), slots, found.scored < slots ? s.scored : nullptr, s.order);
    if (m.leads()) {
      check_labels(s.order, q);
      prepared_[q] = nullptr;
      if (s.order.has_pairs()) {
        Prepared* kept = prepared_[q] = new (m.arena->take<Prepared>(1)) Prepared;
        kept->order = s.order;
        kept->ensemble.plan(batch_, *job_.ensemble, q, kept->order, found.missing > 0, true, plus_, minus_, *m.arena);
      }
    }
    m.sync();
    if (prepared_[q])
      prepared_[q]->ensemble.prepare(m, job_.out.trace != nullptr);
    else
      m.arena->release(own);
  }

  // The weights of the present exponents.
  void set_weights() {
    const View& prior = batch_.prior;
    const int teachers = int(batch_.teachers);
    double top = -__builtin_inf();
    const auto energy = [&](int t) {
      double weight = 1;
      if (prior.data) with_logits(prior, [&](const auto* data) { weight = double(read(data, t * prior.teacher)); });
      return weight > 0 ? __builtin_log(weight) + job_.exponents[t] : -__builtin_inf();
    };
    for (int t = 0; t < teachers; ++t) top = larger(top, energy(t));
    double total = 0;
    for (int t = 0; t < teachers; ++t) total += __builtin_exp(energy(t) - top);
    for (int t = 0; t < teachers; ++t) {
      energies_[t] = T(energy(t) - top);
      weights_[t] = T(__builtin_exp(energy(t) - top) / total);
    }
  }

  // The mean label loss of this sweep, and, if it `moves`, reference.shared_step. Queries are added in order.
  void step(T* loss, bool moves) {
    const int teachers = int(batch_.teachers);
    double* a = job_.exponents;
    double losses = 0, center = 0;
    int64_t queries = 0;
    for (int64_t q = 0; q < batch_.queries; ++q) {
      if (!prepared_[q]) continue;
      ++queries;
      if (loss) losses += double(label_losses_[q]);
    }
    if (loss) *loss = T(queries ? losses / double(queries) : 0.0);
    if (!moves || queries == 0) return;
    for (int t = 0; t < teachers; ++t) center += a[t] / teachers;
    for (int t = 0; t < teachers; ++t) {
      double pull = 0;
      int64_t count = 0;
      for (int64_t q = 0; q < batch_.queries; ++q) {
        if (!prepared_[q]) continue;
        const double own = pulls_[q * teachers + t];
        count += own == own;
        pull += own == own ? own : 0.0;
      }
      const double step = job_.ensemble->step_size;
      a[t] = (a[t] - center + step * (count ? pull / double(count) : 0.0)) /
             (1 + step * job_.ensemble->shrinkage / double(queries));
    }
  }

  bool weighs() const { return batch_.weights.data || batch_.query_weights.data; }
  double query_weight(int64_t q) const {
    const View& weights = batch_.query_weights;
    double weight = 1;
    if (weights.data) with_logits(weights, [&](const auto* data) { weight = double(read(data, q * weights.query)); });
    return weight;
  }
  // Of the slots [begin, end): which the loss sees, and how many those are.
  int count_weights(const Scratch& s, int64_t q, int begin, int end) const {
    const View& weights = batch_.weights;
    int counted = 0;
    if (query_weight(q) == 0) {
      std::memset(s.counted + begin, 0, end - begin);
    } else if (!weights.data) {
      std::memcpy(s.counted + begin, s.valid + begin, end - begin);
      for (int i = begin; i < end; ++i) counted += s.counted[i];
    } else {
      with_logits(weights, [&](const auto* data) {
        const int64_t at = q * weights.query + batch_.first(q) * weights.document;
        for (int i = begin; i < end; ++i)
          counted += s.counted[i] = s.valid[i] & uint8_t(!(read(data, at + i * weights.document) == 0));
      });
    }
    return counted;
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
      s.counts[4 * p] = valid;
      s.counts[4 * p + 1] = scored;
      s.counts[4 * p + 2] = missing;
      s.counts[4 * p + 3] = s.counted == s.valid ? valid : count_weights(s, q, begin, end);
    }
  }

  void run_ensemble(const Member& m, Scratch& s, int64_t q, int slots, int scored, bool missing) {
    const EnsembleOptions& options = *job_.ensemble;
    const int64_t begin = batch_.begin(q);
    T* trace = job_.out.trace ? static_cast<T*>(job_.out.trace) + q * (options.iterations + 1) : nullptr;
    T* logits = job_.out.logits ? static_cast<T*>(job_.out.logits) + begin : s.target;
    T* weights = static_cast<T*>(job_.out.weights);
    T* pulls = static_cast<T*>(job_.out.pulls);
    const int64_t teachers = batch_.teachers;
    const bool by_pairs = options.iterations > 0 || trace || pulls;
    const bool by_document = options.granularity == Granularity::document;
    const bool by_label = by_pairs || (job_.loss && job_.loss->alpha < 1);
    if (!by_label) look_at_labels(m, s, q, slots);
    s.sort.run(m, by_label ? batch_.labels : View{}, label_offset(q), slots, scored < slots ? s.scored : nullptr, s.order);
    if (m.leads()) {
      check_labels(s.order, q);
      s.after_order = m.arena->mark();
      s.ensemble.plan(batch_, options, q, s.order, missing, by_pairs, plus_, minus_, *m.arena);
      if (scored < slots) {
        for (int i = 0; i < slots; ++i) logits[i] = T(__builtin_nan(""));
        if (weights && by_document)
          for (int64_t i = 0; i < slots * teachers; ++i) weights[begin * teachers + i] = 0;
      }
    }
    m.sync();
    s.ensemble.prepare(m, trace != nullptr);
    s.ensemble.run(m, trace, pulls != nullptr);
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
    if (pulls && m.leads())
      for (int64_t t = 0; t < teachers; ++t) pulls[q * teachers + t] = T(s.ensemble.pull(int(t)));
    m.sync();
    if (m.leads()) m.arena->release(s.after_order);  // the loss works in the same memory
  }

  // Infinite labels, and integers that doubles do not tell apart: the call fails.
  void check_labels(const Order& order, int64_t q) const {
    if (order.labelled == 0) return;
    const double limit = label_limit();
    if (order.label[0] < limit && order.label[order.labelled - 1] > -limit) return;
    job_.report_wrong_labels(q);
  }
  // The same where nothing goes by label.
  void look_at_labels(const Member& m, const Scratch& s, int64_t q, int slots) const {
    const View& labels = batch_.labels;
    const int64_t offset = label_offset(q);
    const double limit = label_limit();
    with_labels(labels, [&](const auto* data) {
      for (int p = m.rank; p < pieces(slots); p += m.size) {
        int wrong = 0;
        for (int i = p * kPiece; i < smaller(slots, (p + 1) * kPiece); ++i) {
          const double y = double(read(data, offset + i * labels.document));
          wrong |= s.valid[i] & (__builtin_fabs(y) >= limit);
        }
        if (wrong) job_.report_wrong_labels(q);
      }
    });
  }
  double label_limit() const { return batch_.labels.dtype == DType::i64 ? 0x1p53 : __builtin_inf(); }

  void run_loss(const Member& m, Scratch& s, int64_t q, int slots, Counts found) {
    const LossOptions& options = *job_.loss;
    const int64_t begin = batch_.begin(q);
    T* gradient = gradient_ ? gradient_ + begin : nullptr;
    T* hessian = job_.hessian ? static_cast<T*>(job_.hessian) + begin : nullptr;
    const T* targets = !job_.ensemble ? nullptr : job_.out.logits ? static_cast<T*>(job_.out.logits) + begin : s.target;
    const bool same = job_.ensemble && found.scored == found.valid && found.counted == found.valid;
    if (!same) {
      const View labels = options.alpha < 1 ? batch_.labels : View{};
      const int64_t offset = q * labels.query + batch_.first(q) * labels.document;
      s.sort.run(m, labels, offset, slots, found.counted < slots ? s.counted : nullptr, s.order);
      if (m.leads()) check_labels(s.order, q);
    }
    for (int p = m.rank; gradient && found.counted < slots && p < pieces(slots); p += m.size)
      for (int i = p * kPiece; i < smaller(slots, (p + 1) * kPiece); ++i)
        if (!s.counted[i]) {
          gradient[i] = 0;
          if (hessian) hessian[i] = 0;
        }
    s.loss.run(m, batch_, options, q, s.order, targets, query_weight(q), s.counts, gradient, hessian, losses_ + q, counts_ + q);
  }

  // The batch's loss, and the gradient in the student's dtype. Queries are added in order, in double.
  void reduce(const Member& m) const {
    T* loss = static_cast<T*>(job_.out.loss);
    double total = 0;
    int64_t count = 0;
    for (int64_t q = 0; q < batch_.queries; ++q) {
      total += losses_[q];
      count += counts_[q];
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
    for (int64_t d = larger(from, used); job_.hessian && d < to; ++d) static_cast<T*>(job_.hessian)[d] = 0;
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
  const FieldTable<T, kPowers<T>>*plus_ = nullptr, *minus_ = nullptr;  // of ±margin / temperature
  double* losses_ = nullptr;
  uint8_t* counts_ = nullptr;
  T* gradient_ = nullptr;
  Scratch team_;
  // Of a fit: by query, pulls also by teacher.
  Prepared** prepared_ = nullptr;
  double* pulls_ = nullptr;
  T* label_losses_ = nullptr;
  T *weights_ = nullptr, *energies_ = nullptr;  // by teacher; energies are log weights, the largest 0
};

// No more threads than the work keeps busy for some 20 microseconds each.
inline int useful_threads(const Job& job) {
  const Batch& batch = job.batch;
  const double documents = double(batch.packed() ? batch.slots : batch.queries * batch.slots);
  const double length = documents / larger<int64_t>(1, batch.queries);
  if (batch.queries == 1 && length < kLong) return 1;
  const double passes = job.ensemble ? double(job.ensemble->iterations) + (job.out.pulls ? 3 : 2) : 2;
  const double nanoseconds = documents * passes * (2 + double(batch.teachers) / 2 + smaller(length, 256.0) / 32);
  return int(larger(1.0, smaller(double(job.threads), nanoseconds / 20000)));
}

template <class T>
void run_as(const Job& job) {
  Run<T> run(job);
  run_team(useful_threads(job), [](const Member& m, void* run) { (*static_cast<Run<T>*>(run))(m); }, &run, job.interrupt);
}

void run(const Job& job) { job.float64 ? run_as<double>(job) : run_as<float>(job); }

bool has_term(const char* key, bool curvature) {
  bool has = false;
  const auto look = [&](auto term) {
    using Own = Loss<float, decltype(term)>;
    has |= (curvature ? Own::kCurvature : Own::kHere) && std::strcmp(term.kKey, key) == 0;
  };
  Distillation::each(look);
  LabelLoss::each(look);
  return has;
}

}  // namespace pile::PILE_ISA
