// bfloat16 and float16 in software, for every backend.
#pragma once

#include <cstdint>
#include <cstring>

#include "pile/shared.h"

namespace pile {

struct BFloat16 {
  uint16_t bits;
  PILE_SHARED operator float() const {
    uint32_t word = uint32_t(bits) << 16;
    float value;
    std::memcpy(&value, &word, 4);
    return value;
  }
  PILE_SHARED static BFloat16 of(float value) {
    uint32_t word;
    std::memcpy(&word, &value, 4);
    if ((word & 0x7fffffff) > 0x7f800000) return {uint16_t((word >> 16) | 0x40)};  // a NaN stays one
    return {uint16_t((word + 0x7fff + ((word >> 16) & 1)) >> 16)};                 // round to nearest even
  }
};

struct Float16 {
  uint16_t bits;
#if defined(__CUDA_ARCH__)  // the instructions; those below would meet flushed subnormals
  PILE_SHARED operator float() const {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
  }
  PILE_SHARED static Float16 of(float value) {
    Float16 half;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(half.bits) : "f"(value));
    return half;
  }
#else
  PILE_SHARED operator float() const {
    // Shift exponent and mantissa into place and rescale by 2^112, which handles subnormals; infinities and NaNs apart.
    uint32_t word = uint32_t(bits & 0x7fff) << 13;
    float value;
    if (word >= 0x0f800000) {
      word += 0x70000000;
      std::memcpy(&value, &word, 4);
    } else {
      std::memcpy(&value, &word, 4);
      value *= 0x1p112f;
    }
    return bits & 0x8000 ? -value : value;
  }
  PILE_SHARED static Float16 of(float value) {
    uint32_t word;
    std::memcpy(&word, &value, 4);
    const uint16_t sign = (word >> 16) & 0x8000;
    word &= 0x7fffffff;
    if (word > 0x7f800000) return {uint16_t(sign | 0x7e00)};
    if (word >= 0x477ff000) return {uint16_t(sign | 0x7c00)};  // 65520 and more round to infinity
    if (word < 0x38800000) {                                   // subnormal: let the adder round at 2^-24
      float magnitude;
      std::memcpy(&magnitude, &word, 4);
      magnitude += 0.5f;
      std::memcpy(&word, &magnitude, 4);
      return {uint16_t(sign | (word - 0x3f000000))};
    }
    word += 0xfff + ((word >> 13) & 1);
    return {uint16_t(sign | ((word - 0x38000000) >> 13))};
  }
#endif
};

}  // namespace pile
