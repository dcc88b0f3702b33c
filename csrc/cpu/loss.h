// The student's loss of one query with its gradient: alpha · D + (1 − alpha) · R, D and R by the terms' own files.
#pragma once

#include "term.h"

#define PILE_TERM_FILES
#include "pile/terms.h"

namespace pile::PILE_ISA {

// The objects of a kind's terms.
template <class T, class Kind>
struct Losses;
template <class T, class... Terms>
struct Losses<T, OneOf<Terms...>> : Loss<T, Terms>... {};

// All members of a team call run() on one shared object.
template <class T>
class QueryLoss {
 public:
  // The documents are those of `order`, which has labels if alpha < 1. `targets`: by slot; nullptr: the batch's. `share`: what
  // the query's loss is multiplied by. `counts`: room for two numbers per piece. The gradient goes to `gradient` by slot, unless
  // that is nullptr, the second derivatives to `hessian`, likewise. To the leader: the loss, and whether a term applies.
  void run(const Member& m, const Batch& batch, const LossOptions& options, int64_t q, const Order& order, const T* targets,
           double share, int* counts, T* gradient, T* hessian, double* loss, uint8_t* applies) {
    if (m.leads()) {
      Arena& arena = *m.arena;
      n_ = order.n;
      z_ = arena.take<T>(n_);
      c_ = batch.weights.data ? arena.take<T>(n_) : nullptr;
      label_ = Part{arena.take<T>(n_), hessian ? arena.take<T>(n_) : nullptr};
      if (options.alpha > 0) {
        at_ = arena.take<int>(n_);
        distill_z_ = arena.take<T>(n_);
        distill_s_ = arena.take<T>(n_);
        distill_c_ = c_ ? arena.take<T>(n_) : nullptr;
        distill_ = Part{arena.take<T>(n_), hessian ? arena.take<T>(n_) : nullptr};
      }
    }
    m.sync();
    each_piece(m, n_,
               [&](int p, int begin, int end) { gather(batch, options, q, order, targets, begin, end, counts + 2 * p); });
    m.sync();
    if (m.leads()) join_pieces(counts);
    m.sync();
    double total = finite_ ? 0 : __builtin_nan("");
    Part label = label_, distill = distill_;
    if (options.alpha < 1)
      run_term(m, options, options.label_loss, labels_, LabelList<T>{order, z_, c_, label.curvature},
               share * (1 - options.alpha), label, total);
    if (options.alpha > 0)
      run_term(m, options, options.distillation, distillations_,
               DistillList<T>{distilled_, distill_z_, distill_s_, distill_c_, distill.curvature}, share * options.alpha,
               distill, total);
    if (m.leads()) {
      *loss = total;
      *applies = label.applies | distill.applies;
      if (gradient && distill.applies && distilled_ < n_) {  // the slope by position, from the back
        spread(distill.slope);
        if (hessian) spread(distill.curvature);
      }
    }
    if (!gradient) return;
    m.sync();
    const int ranked = label.applies ? order.labelled : 0;
    each_piece(m, hessian ? n_ : 0, [&](int, int begin, int end) {
      write_gradient(order, begin, end, hessian, [&](int k) {
        if (!finite_) return T(__builtin_nan(""));
        return (k < ranked ? T(label.curve_scale) * label.curvature[k] : T(0)) +
               (distill.applies ? T(distill.curve_scale) * distill.curvature[k] : T(0));
      });
    });
    each_piece(m, n_, [&](int, int begin, int end) {
      if (!finite_)
        write_gradient(order, begin, end, gradient, [](int) { return T(__builtin_nan("")); });
      else if (!distill.applies)
        write_gradient(order, begin, end, gradient,
                       [&](int k) { return k < ranked ? T(-label.scale) * label.slope[k] : T(0); });
      else
        write_gradient(order, begin, end, gradient, [&](int k) {
          return (k < ranked ? T(-label.scale) * label.slope[k] : T(0)) + T(distill.scale) * distill.slope[k];
        });
    });
  }

 private:
  // What a term adds to the gradient, scale · slope, and to the hessian.
  struct Part {
    T *slope = nullptr, *curvature = nullptr;
    double scale = 0, curve_scale = 0;
    bool applies = false;
  };

  // From documents with a target to positions, in place; 0 elsewhere.
  void spread(T* values) const {
    for (int k = n_ - 1, d = distilled_ - 1; k >= 0; --k) values[k] = d >= 0 && at_[d] == k ? values[d--] : T(0);
  }

  template <class Value>
  static void write_gradient(const Order& order, int begin, int end, T* gradient, Value value) {
    for (int k = begin; k < end; ++k) gradient[order.slot[k]] = value(k);
  }

  template <class Kind, class List>
  void run_term(const Member& m, const LossOptions& options, const Kind& kind, Losses<T, Kind>& losses, const List& list,
                double share, Part& part, double& total) const {
    kind.visit([&](auto term) {
      using Own = Loss<T, decltype(term)>;
      if constexpr (Own::kHere) {
        part.applies = Own::applies(term, list);
        if (!part.applies || !finite_) return;
        const Arena::Mark mark = m.arena->mark();
        const Found found = static_cast<Own&>(losses).run(m, term, options, list, part.slope);
        m.sync();
        m.arena->release(mark);
        const double scale = share / found.size;
        part.scale = scale / found.unit;
        part.curve_scale = part.scale / found.unit;
        total += scale * found.sum;
      } else {
        Kind::no_such_term();
      }
    });
  }

  // A piece of the student's logits and the weights by position, and of (logit, target, weight) of documents with a target.
  void gather(const Batch& batch, const LossOptions& options, int64_t q, const Order& order, const T* targets, int begin,
              int end, int* counts) const {
    const int* slot = order.slot;
    const auto read_to = [&](const View& view, T* to) {
      bool finite = true;
      with_logits(view, [&](const auto* data) {
        const int64_t at = q * view.query + batch.first(q) * view.document;
        for (int k = begin; k < end; ++k) {
          to[k] = T(read(data, at + slot[k] * view.document));
          finite &= is_finite(to[k]);
        }
      });
      return finite;
    };
    const bool finite = read_to(batch.student, z_);
    if (c_) read_to(batch.weights, c_);
    int to = begin;
    if (options.alpha > 0) {
      if (!targets) read_to(batch.target, distill_s_);
      for (int k = begin; k < end; ++k) {
        const T target = targets ? targets[slot[k]] : distill_s_[k];
        at_[to] = k;
        distill_z_[to] = z_[k];
        distill_s_[to] = target;
        if (c_) distill_c_[to] = c_[k];
        to += is_finite(target);
      }
    }
    counts[0] = finite;
    counts[1] = to - begin;
  }

  void join_pieces(const int* counts) {
    finite_ = true;
    distilled_ = 0;
    for (int p = 0; p < pieces(n_); ++p) {
      const int from = p * kPiece, count = counts[2 * p + 1];
      finite_ &= counts[2 * p] != 0;
      if (from != distilled_) {
        std::memmove(at_ + distilled_, at_ + from, count * sizeof *at_);
        std::memmove(distill_z_ + distilled_, distill_z_ + from, count * sizeof(T));
        std::memmove(distill_s_ + distilled_, distill_s_ + from, count * sizeof(T));
        if (c_) std::memmove(distill_c_ + distilled_, distill_c_ + from, count * sizeof(T));
      }
      distilled_ += count;
    }
  }

  Losses<T, Distillation> distillations_;
  Losses<T, LabelLoss> labels_;
  int n_ = 0, distilled_ = 0;  // documents; those with a target
  bool finite_ = true;
  int* at_ = nullptr;  // positions of those with a target
  T *z_ = nullptr, *c_ = nullptr, *distill_z_ = nullptr, *distill_s_ = nullptr, *distill_c_ = nullptr;
  Part label_, distill_;
};

}  // namespace pile::PILE_ISA
