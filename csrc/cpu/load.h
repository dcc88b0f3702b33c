// Reading tensors of any dtype and stride into plain arrays of float or double.
#pragma once

#include "pile/half.h"
#include "pile/options.h"
#include "simd.h"

namespace pile::PILE_ISA {

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

constexpr bool is_float(const float*) { return true; }
constexpr bool is_float(const void*) { return false; }

template <class T>
PILE_INLINE T read(const T* data, int64_t index) {
  return data[index];
}
// Neither NaN nor infinite: what counts as a teacher's score or a target.
template <class T>
PILE_INLINE bool is_finite(T x) {
  return x - x == 0;
}

PILE_INLINE float read(const BFloat16* data, int64_t index) { return data[index]; }
PILE_INLINE float read(const Float16* data, int64_t index) { return data[index]; }

#if defined(__AVX512F__)
// Columns [first, first + count), count <= 8, of the first so many of 16 rows: column c from out[c * stride] on.
PILE_INLINE void transpose(const float* const (&row)[16], int rows, int first, int count, float* out, int64_t stride) {
  const __mmask8 columns = __mmask8((1 << count) - 1);
  __m512 a[8];  // rows i and i + 8
  for (int i = 0; i < 8; ++i)
    a[i] = _mm512_insertf32x8(_mm512_castps256_ps512(_mm256_maskz_loadu_ps(columns, row[i] + first)),
                              _mm256_maskz_loadu_ps(columns, row[i + 8] + first), 1);
  __m512 b[8];  // b[4 h + c]: of rows 4 h to 4 h + 3 (and 8 on) columns c and c + 4
  for (int h = 0; h < 8; h += 4) {
    const __m512d low01 = _mm512_castps_pd(_mm512_unpacklo_ps(a[h], a[h + 1])),
                  low23 = _mm512_castps_pd(_mm512_unpacklo_ps(a[h + 2], a[h + 3]));
    const __m512d high01 = _mm512_castps_pd(_mm512_unpackhi_ps(a[h], a[h + 1])),
                  high23 = _mm512_castps_pd(_mm512_unpackhi_ps(a[h + 2], a[h + 3]));
    b[h] = _mm512_castpd_ps(_mm512_unpacklo_pd(low01, low23));
    b[h + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(low01, low23));
    b[h + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(high01, high23));
    b[h + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(high01, high23));
  }
  const __m512i early = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27);
  const __m512i late = _mm512_setr_epi32(4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31);
  for (int c = 0; c < count; ++c) {
    const __m512 column = _mm512_permutex2var_ps(b[c % 4], c < 4 ? early : late, b[c % 4 + 4]);
    store(out + c * stride, reinterpret_cast<const Vec<float>&>(column), rows);
  }
}
#endif

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

}  // namespace pile::PILE_ISA
