// Reading tensors of any dtype and stride into plain arrays of float or double.
#pragma once

#include "pile/options.h"
#include "simd.h"

namespace pile {
namespace PILE_ISA {

struct BFloat16 {
  uint16_t bits;
  PILE_INLINE operator float() const {
    uint32_t wide = uint32_t(bits) << 16;
    float value;
    std::memcpy(&value, &wide, 4);
    return value;
  }
  PILE_INLINE static BFloat16 of(float value) {
    uint32_t wide;
    std::memcpy(&wide, &value, 4);
    if ((wide & 0x7fffffff) > 0x7f800000) return {uint16_t((wide >> 16) | 0x40)};  // a NaN stays one
    return {uint16_t((wide + 0x7fff + ((wide >> 16) & 1)) >> 16)};                 // round to nearest even
  }
};

struct Float16 {
  uint16_t bits;
  PILE_INLINE operator float() const {
    // Shift exponent and mantissa into place and rescale by 2^112, which handles subnormals; infinities and NaNs apart.
    uint32_t wide = uint32_t(bits & 0x7fff) << 13;
    float value;
    if (wide >= 0x0f800000) {
      wide += 0x70000000;
      std::memcpy(&value, &wide, 4);
    } else {
      std::memcpy(&value, &wide, 4);
      value *= 0x1p112f;
    }
    return bits & 0x8000 ? -value : value;
  }
  PILE_INLINE static Float16 of(float value) {
    uint32_t wide;
    std::memcpy(&wide, &value, 4);
    const uint16_t sign = (wide >> 16) & 0x8000;
    wide &= 0x7fffffff;
    if (wide > 0x7f800000) return {uint16_t(sign | 0x7e00)};
    if (wide >= 0x477ff000) return {uint16_t(sign | 0x7c00)};  // 65520 and more round to infinity
    if (wide < 0x38800000) {                                    // subnormal: let the adder round at 2^-24
      float magnitude;
      std::memcpy(&magnitude, &wide, 4);
      magnitude += 0.5f;
      std::memcpy(&wide, &magnitude, 4);
      return {uint16_t(sign | (wide - 0x3f000000))};
    }
    wide += 0xfff + ((wide >> 13) & 1);
    return {uint16_t(sign | ((wide - 0x38000000) >> 13))};
  }
};

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
