// Reading tensors of any dtype and stride, and writing gradients.
#pragma once

#include "workspace.h"

namespace pile::gpu {

template <class T>
PILE_DEVICE T read(const T* data, int64_t at) {
  return __ldg(data + at);
}
PILE_DEVICE float read(const BFloat16* data, int64_t at) { return BFloat16{__ldg(&data[at].bits)}; }
PILE_DEVICE float read(const Float16* data, int64_t at) { return Float16{__ldg(&data[at].bits)}; }

// Call `use(typed pointer)` with the type behind a logits tensor's dtype; float64 logits never come here.
template <class Use>
PILE_DEVICE void with_logits(const View& view, Use use) {
  switch (view.dtype) {
    case DType::bf16: return use(static_cast<const BFloat16*>(view.data));
    case DType::f16: return use(static_cast<const Float16*>(view.data));
    default: return use(static_cast<const float*>(view.data));
  }
}

PILE_DEVICE float load_logit(const View& view, int64_t at) {
  float value = 0;
  with_logits(view, [&](const auto* data) { value = read(data, at); });
  return value;
}

// A teacher's score, or a target: NaN where there is none, as infinite ones are.
PILE_DEVICE float finite_or_nan(float x) { return fabsf(x) < kInfinity ? x : not_a_number(); }
PILE_DEVICE float load_score(const View& view, int64_t at) { return finite_or_nan(load_logit(view, at)); }

// A label, or a weight.
PILE_DEVICE double load_number(const View& view, int64_t at) {
  switch (view.dtype) {
    case DType::f64: return read(static_cast<const double*>(view.data), at);
    case DType::i64: return double(read(static_cast<const int64_t*>(view.data), at));
    case DType::i32: return read(static_cast<const int32_t*>(view.data), at);
    case DType::i16: return read(static_cast<const int16_t*>(view.data), at);
    case DType::i8: return read(static_cast<const int8_t*>(view.data), at);
    case DType::u8:
    case DType::boolean: return read(static_cast<const uint8_t*>(view.data), at);
    default: return load_logit(view, at);
  }
}

// Where query's slot i lies in a tensor.
PILE_DEVICE int64_t at(const View& view, const Query& query, int64_t i) {
  return query.index * view.query + (query.input + i) * view.document;
}

PILE_DEVICE bool holds_document(const Call& call, const Query& query, int64_t i) {
  const View& mask = call.batch.mask;
  return !mask.data || read(static_cast<const uint8_t*>(mask.data), at(mask, query, i)) != 0;
}

// Whether a document counts in the loss; its weight, and its query's. Weights that cannot be, which a host refuses, are NaN.
PILE_DEVICE float weight_or_nan(double weight) {
  const float w = float(weight);
  return weight >= 0 && w < kInfinity ? w : not_a_number();
}
PILE_DEVICE bool counts_in_loss(const Call& call, const Query& query, int64_t i) {
  const View& weights = call.batch.weights;
  return holds_document(call, query, i) && !(weights.data && load_number(weights, at(weights, query, i)) == 0);
}
PILE_DEVICE float document_weight(const Call& call, const Query& query, int64_t i) {
  const View& weights = call.batch.weights;
  return weights.data ? weight_or_nan(load_number(weights, at(weights, query, i))) : 1.0f;
}
PILE_DEVICE float query_weight(const Call& call, const Query& query) {
  const View& weights = call.batch.query_weights;
  return weights.data ? weight_or_nan(load_number(weights, query.index * weights.query)) : 1.0f;
}

// In the student's dtype; in float32 where the reduction still has to scale it.
PILE_DEVICE void store_gradient(const Call& call, int64_t document, float value) {
  switch (call.scaled ? DType::f32 : call.batch.student.dtype) {
    case DType::bf16: static_cast<BFloat16*>(call.out.gradient)[document] = BFloat16::of(value); return;
    case DType::f16: static_cast<Float16*>(call.out.gradient)[document] = Float16::of(value); return;
    default: static_cast<float*>(call.out.gradient)[document] = value;
  }
}

// Raw scores of a query's n documents to to[m * stride + i], by 16-byte loads where they lie side by side.
template <class Team>
PILE_DEVICE void copy_teachers(const Call& call, const Query& query, const Team& team, float* to, int64_t stride) {
  const View& view = call.batch.teacher;
  const int teachers = call.teachers(), n = query.n;
  const int64_t base = at(view, query, 0);
  with_logits(view, [&](const auto* data) {
    constexpr int kVector = 16 / sizeof(*data);
    if (view.teacher == 1 && view.document == teachers && teachers % kVector == 0 &&
        reinterpret_cast<uintptr_t>(data + base) % 16 == 0) {
      const int per_document = teachers / kVector;
#pragma unroll 2
      for (int v = team.rank; v < n * per_document; v += team.size) {
        const uint4 packed = __ldg(reinterpret_cast<const uint4*>(data + base) + v);
        const int i = v / per_document, m = v % per_document * kVector;
        const unsigned words[4] = {packed.x, packed.y, packed.z, packed.w};
#pragma unroll
        for (int e = 0; e < kVector; ++e) {
          using Element = std::decay_t<decltype(*data)>;
          if constexpr (sizeof(Element) == 4) {
            to[(m + e) * stride + i] = __int_as_float(int(words[e]));
          } else {
            to[(m + e) * stride + i] = Element{uint16_t(words[e / 2] >> (e % 2 * 16))};
          }
        }
      }
      return;
    }
#pragma unroll 4
    for (int64_t e = team.rank; e < int64_t(n) * teachers; e += team.size) {
      const int i = int(e / teachers), m = int(e % teachers);
      to[m * stride + i] = read(data, base + i * view.document + m * view.teacher);
    }
  });
}

}  // namespace pile::gpu
