// What crosses the border between the bindings and a backend: plain structs of pointers, sizes and options.
// Shared by the CPU and the GPU backends; no torch, no pybind11.
#pragma once

#include <cstdint>

namespace pile {

enum class DType : int32_t { f32, f64, bf16, f16, i64, i32, i16, i8, u8, boolean };

enum class Granularity : int32_t { document, query };
enum class Normalize : int32_t { zscore, center, none };
enum class PairWeight : int32_t { none, label_gap, gain_gap };
enum class PairSum : int32_t { automatic, direct, chebyshev };
enum class Distillation : int32_t { logistic, mse };
enum class Reduction : int32_t { mean, sum, none };

// The fields of pile_fast.options.EnsembleOptions, in its order.
struct EnsembleOptions {
  int64_t iterations;
  double step_size;
  Granularity granularity;
  Normalize normalize;
  double temperature;
  double margin;
  PairWeight pair_weight;
  PairSum pairwise;
};

// The fields of pile_fast.options.LossOptions, in its order.
struct LossOptions {
  double alpha;
  Distillation distillation;
  double distillation_temperature;
  PairWeight pair_weight;
  Reduction reduction;
  PairSum pairwise;
};

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
  View cu_seqlens;  // present: packed

  bool packed() const { return cu_seqlens.data != nullptr; }

  // First slot of query q, counted over the whole batch for outputs, and the number of its slots.
  int64_t begin(int64_t q) const { return packed() ? offset(q) : q * slots; }
  int64_t length(int64_t q) const { return packed() ? offset(q + 1) - offset(q) : slots; }
  // First document of query q within its row of an input.
  int64_t first(int64_t q) const { return packed() ? offset(q) : 0; }

 private:
  int64_t offset(int64_t q) const {
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
};

}  // namespace pile
