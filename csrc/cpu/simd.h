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

namespace pile::PILE_ISA {

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
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) return _mm512_mask_storeu_ps(p, __mmask16((1u << count) - 1), reinterpret_cast<__m512&>(v));
  if constexpr (sizeof(T) == 8) return _mm512_mask_storeu_pd(p, __mmask8((1u << count) - 1), reinterpret_cast<__m512d&>(v));
#endif
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
// The vector of floats that two of doubles round to.
PILE_INLINE Vec<float> narrow(Vec<double> first, Vec<double> second) {
  typedef float Half __attribute__((vector_size(PILE_VECTOR_BYTES / 2)));
  const Half halves[2] = {__builtin_convertvector(first, Half), __builtin_convertvector(second, Half)};
#if defined(__AVX512F__)  // not through memory: a load must not wait for two stores
  return reinterpret_cast<Vec<float>>(_mm512_insertf32x8(_mm512_castps256_ps512(reinterpret_cast<const __m256&>(halves[0])),
                                                         reinterpret_cast<const __m256&>(halves[1]), 1));
#elif defined(__AVX2__)
  return reinterpret_cast<Vec<float>>(
      _mm256_set_m128(reinterpret_cast<const __m128&>(halves[1]), reinterpret_cast<const __m128&>(halves[0])));
#else
  Vec<float> both;
  std::memcpy(&both, halves, sizeof both);
  return both;
#endif
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
// v, and 0 in the lane of that number, if there is one.
template <class T>
PILE_INLINE Vec<T> without(int lane, Vec<T> v) {
  return iota<T>() == typename Simd<T>::integer(lane) ? Vec<T>{} : v;
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
// The instructions that do just that; GCC makes two of the above.
#if defined(__AVX512F__)
PILE_INLINE Vec<float> vmax(Vec<float> a, Vec<float> b) {
  return reinterpret_cast<Vec<float>>(_mm512_maskz_max_ps(0xffff, reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b)));
}
PILE_INLINE Vec<float> vmin(Vec<float> a, Vec<float> b) {
  return reinterpret_cast<Vec<float>>(_mm512_maskz_min_ps(0xffff, reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b)));
}
PILE_INLINE Vec<double> vmax(Vec<double> a, Vec<double> b) {
  return reinterpret_cast<Vec<double>>(_mm512_maskz_max_pd(0xff, reinterpret_cast<__m512d>(a), reinterpret_cast<__m512d>(b)));
}
PILE_INLINE Vec<double> vmin(Vec<double> a, Vec<double> b) {
  return reinterpret_cast<Vec<double>>(_mm512_maskz_min_pd(0xff, reinterpret_cast<__m512d>(a), reinterpret_cast<__m512d>(b)));
}
#endif
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

#if defined(__AVX512F__)
template <class T>
PILE_INLINE int least(Ints<T> v) {
  return sizeof(T) == 4 ? _mm512_reduce_min_epi32(reinterpret_cast<__m512i&>(v))
                        : int(_mm512_reduce_min_epi64(reinterpret_cast<__m512i&>(v)));
}
template <class T>
PILE_INLINE int greatest(Ints<T> v) {
  return sizeof(T) == 4 ? _mm512_reduce_max_epi32(reinterpret_cast<__m512i&>(v))
                        : int(_mm512_reduce_max_epi64(reinterpret_cast<__m512i&>(v)));
}
// Lanes of a and b side by side, by their numbers there.
PILE_INLINE Vec<float> pick(Vec<float> a, Ints<float> lanes, Vec<float> b) {
  return reinterpret_cast<Vec<float>>(
      _mm512_permutex2var_ps(reinterpret_cast<__m512>(a), reinterpret_cast<__m512i>(lanes), reinterpret_cast<__m512>(b)));
}
PILE_INLINE Vec<double> pick(Vec<double> a, Ints<double> lanes, Vec<double> b) {
  return reinterpret_cast<Vec<double>>(
      _mm512_permutex2var_pd(reinterpret_cast<__m512d>(a), reinterpret_cast<__m512i>(lanes), reinterpret_cast<__m512d>(b)));
}
// The sums of the lanes of v[0], ..., v[N - 1], one after the other from v[0] on. Each vector holds `Groups` sums in progress:
// every step adds the halves of each and leaves half as many vectors.
template <class T, int N, int Groups = 1>
PILE_INLINE void lane_sums(Vec<T>* v) {
  constexpr int half = kLanes<T> / Groups / 2;
  if constexpr (half > 0) {
    Ints<T> first, second;
    for (int l = 0; l < kLanes<T>; ++l) {
      first[l] = l / half * 2 * half + l % half;
      second[l] = first[l] + half;
    }
    for (int i = 0; i < (N + 1) / 2; ++i) {
      const Vec<T> a = v[2 * i], b = v[N > 1 ? 2 * i + 1 : 0];
      v[i] = pick(a, first, b) + pick(a, second, b);
    }
    lane_sums<T, (N + 1) / 2, 2 * Groups>(v);
  }
}
#endif

// N numbers that are treated alike, in as many registers as they take: a compiler's vector that is wider than a register is taken
// apart number by number wherever its lanes are chosen or filled.
template <class T, int N>
struct Numbers {
  static constexpr int kPart = N < kLanes<T> ? N : kLanes<T>, kParts = N / kPart;
  typedef T Part __attribute__((vector_size(kPart * sizeof(T))));
  Part part[kParts];

  // Part by part: a copy of the whole would go through memory in other pieces than it is read in, and wait there.
  static PILE_INLINE Numbers at(const T* p) {
    Numbers numbers;
    for (int i = 0; i < kParts; ++i) std::memcpy(&numbers.part[i], p + i * kPart, sizeof(Part));
    return numbers;
  }
  PILE_INLINE T operator[](int k) const { return part[k / kPart][k % kPart]; }
  PILE_INLINE void set(int k, T x) { part[k / kPart][k % kPart] = x; }
  PILE_INLINE Numbers& operator+=(const Numbers& other) {
    for (int i = 0; i < kParts; ++i) part[i] += other.part[i];
    return *this;
  }
  friend PILE_INLINE Numbers operator+(Numbers a, const Numbers& b) { return a += b; }
  friend PILE_INLINE Numbers operator-(Numbers a, const Numbers& b) {
    for (int i = 0; i < kParts; ++i) a.part[i] -= b.part[i];
    return a;
  }
  friend PILE_INLINE Numbers operator*(Numbers a, const Numbers& b) {
    for (int i = 0; i < kParts; ++i) a.part[i] *= b.part[i];
    return a;
  }
  friend PILE_INLINE Numbers operator*(T x, Numbers a) {
    for (int i = 0; i < kParts; ++i) a.part[i] *= x;
    return a;
  }
};
template <class T, int N>
PILE_INLINE T sum(const Numbers<T, N>& numbers) {
  typename Numbers<T, N>::Part total = numbers.part[0];
  for (int i = 1; i < numbers.kParts; ++i) total += numbers.part[i];
  T result = total[0];
  if constexpr (numbers.kPart == kLanes<T>) return sum<T>(total);
  for (int k = 1; k < numbers.kPart; ++k) result += total[k];
  return result;
}

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
  const Vec<float> n = reinterpret_cast<Vec<float>>(_mm512_maskz_roundscale_ps(
      0xffff, reinterpret_cast<__m512>(x * 1.4426950408889634f), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  const Vec<float> r = x - n * S::kLn2High - n * S::kLn2Low;
  Vec<float> p = splat<float>(1.f / float(factorial(S::kExpTerms)));
#pragma GCC unroll 16
  for (int k = S::kExpTerms - 1; k >= 0; --k) p = p * r + 1.f / float(factorial(k));
  return reinterpret_cast<Vec<float>>(_mm512_maskz_scalef_ps(0xffff, reinterpret_cast<__m512>(p), reinterpret_cast<__m512>(n)));
}
#endif

// 2^y of y <= 0 for a sum of such terms: y's rounding counts in the result by |y| 2^-24, which the result's own smallness makes
// up for.
template <class T>
PILE_INLINE Vec<T> falling_exp2(Vec<T> y) {
  return vexp<T>(y * T(0.69314718055994530942));
}
#if defined(__AVX512F__)
// Nine instructions: 2^y = 2^floor(y) 2^f with f = y - floor(y), and scalef takes the floor itself.
template <>
PILE_INLINE Vec<float> falling_exp2<float>(Vec<float> y) {
  y = vmax(y, splat<float>(-150.f));
  const Vec<float> f = reinterpret_cast<Vec<float>>(
      _mm512_maskz_reduce_ps(0xffff, reinterpret_cast<__m512>(y), _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC));
  // The polynomial of least relative error on [0, 1] with p(0) = 1: 2e-9.
  Vec<float> p = splat<float>(2.16129151e-4f);
  p = p * f + 1.24678464e-3f;
  p = p * f + 9.67545157e-3f;
  p = p * f + 5.54852806e-2f;
  p = p * f + 2.40229306e-1f;
  p = p * f + 6.93147044e-1f;
  p = p * f + 1.f;
  return reinterpret_cast<Vec<float>>(_mm512_maskz_scalef_ps(0xffff, reinterpret_cast<__m512>(p), reinterpret_cast<__m512>(y)));
}
#endif

// log(1 + t) for t in [0, 1], small t to full relative accuracy: 2 atanh(t / (2 + t)).
template <class T, int kTerms = Simd<T>::kLog1pTerms>
PILE_INLINE Vec<T> vlog1p(Vec<T> t) {
  Vec<T> w = t * reciprocal<T>(T(2) + t);
  Vec<T> w2 = w * w;
  Vec<T> p = splat<T>(T(1) / T(2 * kTerms - 1));
#pragma GCC unroll 20
  for (int k = kTerms - 2; k >= 0; --k) p = p * w2 + T(1) / T(2 * k + 1);
  return T(2) * w * p;
}

// log(x) of x >= 1: x is m 2^n with m in [1, 2).
template <class T, int kTerms = Simd<T>::kLog1pTerms>
PILE_INLINE Vec<T> vlog(Vec<T> x) {
  using S = Simd<T>;
  const Ints<T> all = bits<T>(x);
  // The exponent as a number: in the low bits of 2^kMantissa it is what it adds to that.
  constexpr T whole = T(int64_t(1) << S::kMantissa);
  const Vec<T> exponent = from_bits<T>((all >> S::kMantissa) | bits<T>(splat<T>(whole))) - (whole + T(S::kBias));
  const Ints<T> one = Ints<T>{} + (typename S::integer(S::kBias) << S::kMantissa);
  const Ints<T> fraction = all & ((typename S::integer(1) << S::kMantissa) - 1);
  return exponent * T(0.69314718055994530942) + vlog1p<T, kTerms>(from_bits<T>(fraction | one) - T(1));
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

}  // namespace pile::PILE_ISA
