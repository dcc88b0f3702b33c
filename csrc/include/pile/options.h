// What crosses the border between the bindings and a backend: plain structs of pointers, sizes and options.
// Shared by the CPU and the GPU backends; no torch, no pybind11.
#pragma once

#include <cstdint>

#include "pile/shared.h"
#include "pile/terms.h"

namespace pile {

enum class DType : int32_t { f32, f64, bf16, f16, i64, i32, i16, i8, u8, boolean };

// An enumeration, and its names as Python has them; a trailing _ keeps one from being a C++ keyword.
#define PILE_ENUM(Name, ...)                 \
  enum class Name : int32_t { __VA_ARGS__ }; \
  constexpr const char* names_of(Name) { return #__VA_ARGS__; }

PILE_ENUM(Granularity, shared, document, query)
PILE_ENUM(Normalize, zscore, center, none, minmax, logit)
PILE_ENUM(PairWeight, none, label_gap, gain_gap)
PILE_ENUM(PairSum, auto_, direct, chebyshev)
PILE_ENUM(Reduction, mean, sum, none)

// The options, X(type, name) each, named as the fields of pile_fast.options; the bindings fill them by name.
#define PILE_ENSEMBLE_OPTIONS(X) \
  X(int64_t, iterations)         \
  X(double, step_size)           \
  X(Granularity, granularity)    \
  X(double, shrinkage)           \
  X(Normalize, normalize)        \
  X(double, temperature)         \
  X(double, margin)              \
  X(PairWeight, pair_weight)     \
  X(PairSum, pairwise)
#define PILE_LOSS_OPTIONS(X)    \
  X(double, alpha)              \
  X(Distillation, distillation) \
  X(LabelLoss, label_loss)      \
  X(PairWeight, pair_weight)    \
  X(Reduction, reduction)       \
  X(PairSum, pairwise)

#define PILE_MEMBER(type, name) type name = {};
struct EnsembleOptions {
  PILE_ENSEMBLE_OPTIONS(PILE_MEMBER)
};
struct LossOptions {
  PILE_LOSS_OPTIONS(PILE_MEMBER)
};
#undef PILE_MEMBER

constexpr double kMinShare = 0x1p-10;  // see pile_fast/reference.py

// A strided tensor. Strides count elements: per query (0 if packed), per document, per teacher. data == nullptr: absent.
struct View {
  const void* data = nullptr;
  DType dtype = DType::f32;
  int64_t query = 0;
  int64_t document = 0;
  int64_t teacher = 0;
};

struct Batch {
  int64_t queries = 0;
  int64_t slots = 0;     // documents per query (padded) or in all (packed)
  int64_t teachers = 0;  // M
  View student, target, teacher, labels, mask, prior;
  View cu_seqlens;              // present: packed
  View weights, query_weights;  // of documents and of queries in the loss

  PILE_SHARED bool packed() const { return cu_seqlens.data != nullptr; }

  // On the host. First slot of query q, counted over the whole batch for outputs, and the number of its slots.
  PILE_SHARED int64_t begin(int64_t q) const { return packed() ? offset(q) : q * slots; }
  PILE_SHARED int64_t length(int64_t q) const { return packed() ? offset(q + 1) - offset(q) : slots; }
  // First document of query q within its row of an input.
  PILE_SHARED int64_t first(int64_t q) const { return packed() ? offset(q) : 0; }

 private:
  PILE_SHARED int64_t offset(int64_t q) const {
    return cu_seqlens.dtype == DType::i64 ? static_cast<const int64_t*>(cu_seqlens.data)[q * cu_seqlens.document]
                                          : static_cast<const int32_t*>(cu_seqlens.data)[q * cu_seqlens.document];
  }
};

// Contiguous outputs in the dtype of the arithmetic (float32 or float64), but for the gradient, which has the student's.
// nullptr: not asked for.
struct Outputs {
  void* logits = nullptr;    // documents
  void* weights = nullptr;   // documents x M, or Q x M
  void* trace = nullptr;     // Q x (iterations + 1)
  void* loss = nullptr;      // Q, or 1
  void* gradient = nullptr;  // documents
  void* pulls = nullptr;     // Q x M, NaN where a query has none
};

}  // namespace pile
