// The terms of the student's loss: their numbers, and the rows that a backend dispatches by.
//
// To add one: its struct, its name in the row of its kind, its file's name at the end; then that file in csrc/cpu/terms and in
// csrc/cuda/terms. Keys and numbers are those of pile_fast/terms.py. A backend that has no such file refuses the term by name.
#if !defined(PILE_TERMS)
#define PILE_TERMS

#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <type_traits>

#include "pile/shared.h"

namespace pile {

// D: the student against the ensemble.
struct DistillLogistic {
  static constexpr const char* kKey = "distill_logistic";
  double temperature;
  template <class Visit>
  void each_number(Visit visit) {
    visit("temperature", temperature);
  }
};
struct DistillMse {
  static constexpr const char* kKey = "distill_mse";
  template <class Visit>
  void each_number(Visit) {}
};
struct DistillKl {
  static constexpr const char* kKey = "distill_kl";
  double temperature;
  template <class Visit>
  void each_number(Visit visit) {
    visit("temperature", temperature);
  }
};

// A document's gain by its label y: 2^y − 1, or y. As numbers they come by their place, as all choices do.
enum class Gain { exp2, linear };
// What LambdaRank's pairs are weighed by: discounts of 1 / log2(1 + rank), or of 1 / rank with gain 1 for labels above 0.
enum class Metric { ndcg, mrr };

// R: the student against the labels.
struct LabelLogistic {
  static constexpr const char* kKey = "label_logistic";
  template <class Visit>
  void each_number(Visit) {}
};
struct GainsAtTemperature {
  double temperature, gain_;
  template <class Visit>
  void each_number(Visit visit) {
    visit("temperature", temperature);
    visit("gain", gain_);
  }
  PILE_SHARED Gain gain() const { return Gain(int(gain_)); }
};
struct LabelSoftmax : GainsAtTemperature {
  static constexpr const char* kKey = "label_softmax";
};
struct LabelLambdaRank {
  static constexpr const char* kKey = "label_lambdarank";
  double cutoff, metric_, gain_;  // cutoff: 0 = none
  template <class Visit>
  void each_number(Visit visit) {
    visit("cutoff", cutoff);
    visit("metric", metric_);
    visit("gain", gain_);
  }
  PILE_SHARED Metric metric() const { return Metric(int(metric_)); }
  PILE_SHARED Gain gain() const { return Gain(int(gain_)); }
};
struct LabelApproxNdcg : GainsAtTemperature {
  static constexpr const char* kKey = "label_approx_ndcg";
};

// One of the terms of a kind, with its numbers; at first none. Plain data: it goes to kernels by value.
template <class... Terms>
class OneOf {
 public:
  template <class Term>
  static OneOf of(const Term& term) {
    static_assert(sizeof(Term) <= sizeof numbers_, "a term holds at most kNumbers doubles");
    OneOf one;
    int32_t row = 0;
    ((void(std::is_same_v<Term, Terms> ? one.row_ = row : 0), ++row), ...);
    std::memcpy(one.numbers_, &term, sizeof term);
    return one;
  }
  // use(Term{}) for each term of the kind.
  template <class Use>
  static void each(Use use) {
    (use(Terms{}), ...);
  }

  bool given() const { return row_ >= 0; }
  // use(the term), by its own type.
  template <class Use>
  PILE_SHARED void visit(Use use) const {
    int32_t row = 0;
    if (!((row++ == row_ && (use(as<Terms>()), true)) || ...)) no_such_term();
  }

  // What a dispatch ends with that has no code for the term.
  static PILE_SHARED void no_such_term() {
#if defined(__CUDA_ARCH__)
    __trap();
#else
    throw std::logic_error("pile: a loss without its term");
#endif
  }

 private:
  static constexpr int kNumbers = 4;

  template <class Term>
  PILE_SHARED Term as() const {
    Term term;
    std::memcpy(&term, numbers_, sizeof term);
    return term;
  }

  int32_t row_ = -1;
  double numbers_[kNumbers] = {};
};

using Distillation = OneOf<DistillLogistic, DistillMse, DistillKl>;
using LabelLoss = OneOf<LabelLogistic, LabelSoftmax, LabelLambdaRank, LabelApproxNdcg>;

}  // namespace pile

#endif

// The backend's own files, found by its include path: it defines PILE_TERM_FILES and includes this header once more.
#if defined(PILE_TERM_FILES)
#if __has_include("terms/distill_logistic.h")
#include "terms/distill_logistic.h"
#endif
#if __has_include("terms/distill_mse.h")
#include "terms/distill_mse.h"
#endif
#if __has_include("terms/distill_kl.h")
#include "terms/distill_kl.h"
#endif
#if __has_include("terms/label_logistic.h")
#include "terms/label_logistic.h"
#endif
#if __has_include("terms/label_softmax.h")
#include "terms/label_softmax.h"
#endif
#if __has_include("terms/label_lambdarank.h")
#include "terms/label_lambdarank.h"
#endif
#if __has_include("terms/label_approx_ndcg.h")
#include "terms/label_approx_ndcg.h"
#endif
#endif
