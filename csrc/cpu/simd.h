// Vectors of one instruction set. Included once per set, inside that set's namespace: every file below kernels.h is compiled
// for baseline, AVX2 + FMA and AVX-512 in turn (GCC/Clang vector extensions; other CPUs take the baseline, 16 bytes).
// Nothing here may be a std:: template: the linker would merge its copies across instruction sets.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define PILE_VECTOR_BYTES 64
#elif defined(__AVX2__)
#define PILE_VECTOR_BYTES 32
#else
#define PILE_VECTOR_BYTES 16
#endif

#define PILE_INLINE inline __attribute__((always_inline))

namespace pile {
namespace PILE_ISA {

template <class T>
struct Simd;

template <>
struct Simd<float> {
  typedef float vec __attribute__((vector_size(PILE_VECTOR_BYTES)));
  typedef int32_t ints __attribute__((vector_size(PILE_VECTOR_BYTES)));
  using integer = int32_t;
  static constexpr float kRound = 12582912.f;  // 1.5 * 2^23: adding it rounds to an integer held in the low bits
  static constexpr float kLn2High = 0.693145751953125f, kLn2Low = 1.42860677e-6f;
  static constexpr float kMinExponent = -87.f;
  static constexpr int kMantissa = 23, kBias = 127;
  static constexpr int kExpTerms = 7;    // Taylor on |r| <= ln2/2: 5e-9
  static constexpr int kLog1pTerms = 8;  // 2 atanh(w), w <= 1/3: 6e-9
};

template <>
struct Simd<double> {
  typedef double vec __attribute__((vector_size(PILE_VECTOR_BYTES)));
  typedef int64_t ints __attribute__((vector_size(PILE_VECTOR_BYTES)));
  using integer = int64_t;
  static constexpr double kRound = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr double kLn2High = 6.93147180369123816490e-01, kLn2Low = 1.90821492927058770002e-10;
  static constexpr double kMinExponent = -708.;
  static constexpr int kMantissa = 52, kBias = 1023;
  static constexpr int kExpTerms = 13;    // 4e-18
  static constexpr int kLog1pTerms = 17;  // 2e-18
};

template <class T>
using Vec = typename Simd<T>::vec;
template <class T>
using Ints = typename Simd<T>::ints;
template <class T>
constexpr int kLanes = PILE_VECTOR_BYTES / sizeof(T);

template <class T>
PILE_INLINE Vec<T> load(const T* p) {
  Vec<T> v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
template <class T>
PILE_INLINE void store(T* p, Vec<T> v) {
  std::memcpy(p, &v, sizeof v);
}
// The first `count` lanes only: what lies behind belongs to someone else.
template <class T>
PILE_INLINE void store(T* p, Vec<T> v, int count) {
  if (count >= kLanes<T>) return store(p, v);
  T lanes[kLanes<T>];
  store(lanes, v);
  for (int i = 0; i < count; ++i) p[i] = lanes[i];
}
// As many numbers as a vector of doubles holds, from and to an array of either precision.
template <class T>
PILE_INLINE Vec<double> as_double(const T* p) {
  typedef T Part __attribute__((vector_size(sizeof(T) * kLanes<double>)));
  Part part;
  std::memcpy(&part, p, sizeof part);
  return __builtin_convertvector(part, Vec<double>);
}
template <class T>
PILE_INLINE void store_narrow(T* p, Vec<double> v) {
  typedef T Part __attribute__((vector_size(sizeof(T) * kLanes<double>)));
  const Part part = __builtin_convertvector(v, Part);
  std::memcpy(p, &part, sizeof part);
}
template <class T>
PILE_INLINE Vec<T> splat(T x) {
  return x - Vec<T>{};
}
template <class T>
PILE_INLINE Ints<T> iota() {
  Ints<T> v;
  for (int i = 0; i < kLanes<T>; ++i) v[i] = i;
  return v;
}
// v, and 0 in the lanes from `count` on.
template <class T>
PILE_INLINE Vec<T> first_lanes(int count, Vec<T> v) {
  return iota<T>() < typename Simd<T>::integer(count) ? v : Vec<T>{};
}
template <class T>
PILE_INLINE Ints<T> bits(Vec<T> v) {
  Ints<T> r;
  std::memcpy(&r, &v, sizeof r);
  return r;
}
template <class T>
PILE_INLINE Vec<T> from_bits(Ints<T> v) {
  Vec<T> r;
  std::memcpy(&r, &v, sizeof r);
  return r;
}
template <class T>
PILE_INLINE Vec<T> to_vec(Ints<T> v) {
  return __builtin_convertvector(v, Vec<T>);
}
template <class T>
PILE_INLINE Ints<T> to_ints(Vec<T> v) {
  return __builtin_convertvector(v, Ints<T>);
}
// a where the lane is greater, else b; a NaN in `a` gives b.
template <class V>
PILE_INLINE V vmax(V a, V b) {
  return a > b ? a : b;
}
template <class V>
PILE_INLINE V vmin(V a, V b) {
  return a < b ? a : b;
}
template <class T>
PILE_INLINE Vec<T> vabs(Vec<T> v) {
  return from_bits<T>(bits<T>(v) & ~(typename Simd<T>::integer(1) << (sizeof(T) * 8 - 1)));
}
// Sum of the lanes, in halves.
template <class T>
PILE_INLINE T sum(Vec<T> v) {
  T lanes[kLanes<T>];
  store(lanes, v);
  for (int half = kLanes<T> / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  return lanes[0];
}
#if defined(__AVX512F__)
template <>
PILE_INLINE float sum<float>(Vec<float> v) {
  return _mm512_reduce_add_ps(reinterpret_cast<__m512&>(v));
}
template <>
PILE_INLINE double sum<double>(Vec<double> v) {
  return _mm512_reduce_add_pd(reinterpret_cast<__m512d&>(v));
}
#endif

// out[r] += sum of the lanes of v[r].
template <class T, int R>
PILE_INLINE void add_sums(T* out, const Vec<T> (&v)[R]) {
  for (int r = 0; r < R; ++r) out[r] += sum<T>(v[r]);
}
#if defined(__AVX512F__)
// Four at a time, in half the instructions.
template <>
PILE_INLINE void add_sums<float, 4>(float* out, const Vec<float> (&v)[4]) {
  __m256 half[4];
  for (int r = 0; r < 4; ++r) {
    const __m512 x = reinterpret_cast<const __m512&>(v[r]);
    half[r] = _mm256_add_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps(x, 1));
  }
  const __m256 quarters = _mm256_hadd_ps(_mm256_hadd_ps(half[0], half[1]), _mm256_hadd_ps(half[2], half[3]));
  const __m128 sums = _mm_add_ps(_mm256_castps256_ps128(quarters), _mm256_extractf128_ps(quarters, 1));
  _mm_storeu_ps(out, _mm_add_ps(_mm_loadu_ps(out), sums));
}
#endif

// 1 / x for normal x. AVX-512: 14-bit estimate and one Newton step, 2^-27 or better, at a third of a division's price.
template <class T>
PILE_INLINE Vec<T> reciprocal(Vec<T> x) {
  return T(1) / x;
}
#if defined(__AVX512F__)
template <>
PILE_INLINE Vec<float> reciprocal<float>(Vec<float> x) {
  Vec<float> r = reinterpret_cast<Vec<float>>(_mm512_maskz_rcp14_ps(0xffff, reinterpret_cast<__m512>(x)));
  return r + r * (1.f - x * r);
}
#endif

constexpr double factorial(int k) { return k < 2 ? 1 : k * factorial(k - 1); }

// exp(x) for x below the overflow bound; clamps at e^kMinExponent instead of reaching 0.
template <class T>
PILE_INLINE Vec<T> vexp(Vec<T> x) {
  using S = Simd<T>;
  x = vmax(x, splat<T>(S::kMinExponent));
  Vec<T> shifted = x * T(1.4426950408889634074) + S::kRound;
  Vec<T> n = shifted - S::kRound;
  Vec<T> r = x - n * S::kLn2High - n * S::kLn2Low;
  Vec<T> p = splat<T>(T(1) / T(factorial(S::kExpTerms)));
#pragma GCC unroll 16
  for (int k = S::kExpTerms - 1; k >= 0; --k) p = p * r + T(1) / T(factorial(k));
  return p * from_bits<T>((bits<T>(shifted) << S::kMantissa) + (typename S::integer(S::kBias) << S::kMantissa));
}

#if defined(__AVX512F__)
// The same with the rounding and scaling instructions of AVX-512, 13 instead of 16; goes on to 0.
template <>
PILE_INLINE Vec<float> vexp<float>(Vec<float> x) {
  using S = Simd<float>;
  x = vmax(x, splat<float>(-105.f));
  const Vec<float> n = reinterpret_cast<Vec<float>>(
      _mm512_maskz_roundscale_ps(0xffff, reinterpret_cast<__m512>(x * 1.4426950408889634f), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  const Vec<float> r = x - n * S::kLn2High - n * S::kLn2Low;
  Vec<float> p = splat<float>(1.f / float(factorial(S::kExpTerms)));
#pragma GCC unroll 16
  for (int k = S::kExpTerms - 1; k >= 0; --k) p = p * r + 1.f / float(factorial(k));
  return reinterpret_cast<Vec<float>>(_mm512_maskz_scalef_ps(0xffff, reinterpret_cast<__m512>(p), reinterpret_cast<__m512>(n)));
}
#endif

// log(1 + t) for t in [0, 1], small t to full relative accuracy: 2 atanh(t / (2 + t)).
template <class T>
PILE_INLINE Vec<T> vlog1p(Vec<T> t) {
  Vec<T> w = t * reciprocal<T>(T(2) + t);
  Vec<T> w2 = w * w;
  Vec<T> p = splat<T>(T(1) / T(2 * Simd<T>::kLog1pTerms - 1));
#pragma GCC unroll 20
  for (int k = Simd<T>::kLog1pTerms - 2; k >= 0; --k) p = p * w2 + T(1) / T(2 * k + 1);
  return T(2) * w * p;
}

template <class I>
PILE_INLINE I round_down(I x, int multiple) {
  return x - x % multiple;
}
template <class I>
PILE_INLINE I round_up(I x, int multiple) {
  return round_down(x + multiple - 1, multiple);
}
template <class X>
PILE_INLINE X smaller(X a, X b) {
  return b < a ? b : a;
}
template <class X>
PILE_INLINE X larger(X a, X b) {
  return a < b ? b : a;
}

}  // namespace PILE_ISA
}  // namespace pile
