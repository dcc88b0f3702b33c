// Reading tensors of any dtype and stride into plain arrays of float or double.
#pragma once

#include "pile/half.h"
#include "pile/options.h"
#include "simd.h"

namespace pile {
namespace PILE_ISA {

// Call `function(typed pointer)` with the type behind a floating dtype.
template <class F>
PILE_INLINE void with_logits(const View& view, F function) {
  switch (view.dtype) {
    case DType::f64: return function(static_cast<const double*>(view.data));
    case DType::bf16: return function(static_cast<const BFloat16*>(view.data));
    case DType::f16: return function(static_cast<const Float16*>(view.data));
    default: return function(static_cast<const float*>(view.data));
  }
}

// The same for any dtype a label may have.
template <class F>
PILE_INLINE void with_labels(const View& view, F function) {
  switch (view.dtype) {
    case DType::i64: return function(static_cast<const int64_t*>(view.data));
    case DType::i32: return function(static_cast<const int32_t*>(view.data));
    case DType::i16: return function(static_cast<const int16_t*>(view.data));
    case DType::i8: return function(static_cast<const int8_t*>(view.data));
    case DType::u8:
    case DType::boolean: return function(static_cast<const uint8_t*>(view.data));
    default: return with_logits(view, function);
  }
}

template <class T>
PILE_INLINE T read(const T* data, int64_t index) {
  return data[index];
}
PILE_INLINE float read(const BFloat16* data, int64_t index) { return data[index]; }
PILE_INLINE float read(const Float16* data, int64_t index) { return data[index]; }

// Store a gradient in the student's dtype.
template <class T>
PILE_INLINE void write(void* data, DType dtype, int64_t index, T value) {
  switch (dtype) {
    case DType::f64: static_cast<double*>(data)[index] = double(value); return;
    case DType::bf16: static_cast<BFloat16*>(data)[index] = BFloat16::of(float(value)); return;
    case DType::f16: static_cast<Float16*>(data)[index] = Float16::of(float(value)); return;
    default: static_cast<float*>(data)[index] = float(value);
  }
}

}  // namespace PILE_ISA
}  // namespace pile
