// Vec<T>: the only file that knows an instruction set. kernels.cpp includes it once per ISA; everything has
// internal linkage, or the linker could keep one ISA's copy of an inline function for all.
//
// Compiled with -ffp-contract=off: a product and a sum fuse only where fma() says so. Otherwise the student's and
// the teacher's sums may round differently, and the divergence of equal rows is no longer exactly 0.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <iterator>
#include <limits>
#include <type_traits>

#include "half.hpp"
#include "row_batch.hpp"

#if !defined(PYDISTILL_PORTABLE)
#include <immintrin.h>
#endif

namespace pydistill::PYDISTILL_ISA {
namespace {

#if defined(PYDISTILL_PORTABLE)
constexpr int kVecBytes = 16;
#elif defined(__AVX512F__)
constexpr int kVecBytes = 64;
#elif defined(__AVX2__)
constexpr int kVecBytes = 32;
#else
constexpr int kVecBytes = 16;
#endif

template <class T>
constexpr int kLanes = kVecBytes / int(sizeof(T));

template <class T>
struct IntegerOf;
template <>
struct IntegerOf<float> {
  using type = int32_t;
};
template <>
struct IntegerOf<double> {
  using type = int64_t;
};
template <class T>
using Integer = typename IntegerOf<T>::type;

// GCC and Clang know vectors on every machine: operators, comparisons and ?: work lane by lane. The portable build
// uses nothing else.
template <class T>
struct RegisterOf {
  typedef T type __attribute__((vector_size(kVecBytes)));
};
template <class T>
using Register = typename RegisterOf<T>::type;

// A struct around the register, so that templates can deduce T.
template <class T>
struct Vec {
  Register<T> v;
  T operator[](int i) const { return v[i]; }
};

template <class T>
inline Vec<T> set(T x) {
  return {x - Register<T>{}};  // a broadcast; a loop over the lanes becomes a chain of inserts
}
template <class T>
inline Vec<T> operator+(Vec<T> a, Vec<T> b) {
  return {a.v + b.v};
}
template <class T>
inline Vec<T> operator-(Vec<T> a, Vec<T> b) {
  return {a.v - b.v};
}
template <class T>
inline Vec<T> operator*(Vec<T> a, Vec<T> b) {
  return {a.v * b.v};
}
template <class T>
inline Vec<T> operator/(Vec<T> a, Vec<T> b) {
  return {a.v / b.v};
}
template <class T>
inline Vec<T> operator-(Vec<T> a) {
  return set<T>(0) - a;
}
template <class T>
inline Vec<T> abs(Vec<T> a) {
  return {a.v < Register<T>{} ? -a.v : a.v};
}
template <class T>
inline Vec<T> sqrt(Vec<T> a) {
  for (int i = 0; i < kLanes<T>; ++i) a.v[i] = std::sqrt(a.v[i]);
  return a;
}
// a where x > 0, else b.
template <class T>
inline Vec<T> where_positive(Vec<T> x, Vec<T> a, Vec<T> b) {
  return {x.v > Register<T>{} ? a.v : b.v};
}
// a where x = y, infinities included, else b.
template <class T>
inline Vec<T> where_equal(Vec<T> x, Vec<T> y, Vec<T> a, Vec<T> b) {
  return {x.v == y.v ? a.v : b.v};
}

#if defined(__AVX512F__) && !defined(PYDISTILL_PORTABLE)
inline bool any_equal(Vec<float> a, Vec<float> b) { return _mm512_cmpeq_ps_mask(a.v, b.v) != 0; }
inline bool any_equal(Vec<double> a, Vec<double> b) { return _mm512_cmpeq_pd_mask(a.v, b.v) != 0; }
#elif defined(__AVX2__) && !defined(PYDISTILL_PORTABLE)
inline bool any_equal(Vec<float> a, Vec<float> b) {
  return _mm256_movemask_ps(_mm256_cmp_ps(a.v, b.v, _CMP_EQ_OQ)) != 0;
}
inline bool any_equal(Vec<double> a, Vec<double> b) {
  return _mm256_movemask_pd(_mm256_cmp_pd(a.v, b.v, _CMP_EQ_OQ)) != 0;
}
#else
template <class T>
inline bool any_equal(Vec<T> a, Vec<T> b) {
  bool any = false;
  for (int i = 0; i < kLanes<T>; ++i) any |= a[i] == b[i];
  return any;
}
#endif

// w * x, and 0 where w is 0, whatever x is. A NaN weight stays NaN.
template <class T>
inline Vec<T> times(Vec<T> w, Vec<T> x) {
  const Register<T> zero = {};
  return {w.v == zero ? zero : w.v * x.v};
}

template <class T>
inline Vec<T> load(const T* p) {
  Vec<T> r;
  std::memcpy(&r.v, p, sizeof r.v);
  return r;
}
template <class T>
inline void store(T* p, Vec<T> a) {
  std::memcpy(p, &a.v, sizeof a.v);
}

// Tails. first(a, n): the first n lanes of a, 0 in the rest. load_first: the first n lanes from memory, `pad` in
// the rest. Nothing beyond p[n - 1] is touched, n < kLanes.
#if defined(__AVX512F__) && !defined(PYDISTILL_PORTABLE)
inline Vec<float> first(Vec<float> a, int n) { return {_mm512_maskz_mov_ps(__mmask16((1u << n) - 1), a.v)}; }
inline Vec<double> first(Vec<double> a, int n) { return {_mm512_maskz_mov_pd(__mmask8((1u << n) - 1), a.v)}; }
inline Vec<float> load_first(const float* p, int n, float pad) {
  return {_mm512_mask_loadu_ps(_mm512_set1_ps(pad), __mmask16((1u << n) - 1), p)};
}
inline Vec<double> load_first(const double* p, int n, double pad) {
  return {_mm512_mask_loadu_pd(_mm512_set1_pd(pad), __mmask8((1u << n) - 1), p)};
}
inline void store_first(float* p, Vec<float> a, int n) { _mm512_mask_storeu_ps(p, __mmask16((1u << n) - 1), a.v); }
inline void store_first(double* p, Vec<double> a, int n) {
  _mm512_mask_storeu_pd(p, __mmask8((1u << n) - 1), a.v);
}
#else
#if defined(__AVX2__) && !defined(PYDISTILL_PORTABLE)
inline __m256i lanes_below(int n, float) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
inline __m256i lanes_below(int n, double) {
  return _mm256_cmpgt_epi64(_mm256_set1_epi64x(n), _mm256_setr_epi64x(0, 1, 2, 3));
}
inline Vec<float> first(Vec<float> a, int n) {
  return {_mm256_and_ps(a.v, _mm256_castsi256_ps(lanes_below(n, 0.0f)))};
}
inline Vec<double> first(Vec<double> a, int n) {
  return {_mm256_and_pd(a.v, _mm256_castsi256_pd(lanes_below(n, 0.0)))};
}
inline Vec<float> load_first(const float* p, int n, float pad) {
  const __m256i mask = lanes_below(n, 0.0f);
  return {_mm256_blendv_ps(_mm256_set1_ps(pad), _mm256_maskload_ps(p, mask), _mm256_castsi256_ps(mask))};
}
inline Vec<double> load_first(const double* p, int n, double pad) {
  const __m256i mask = lanes_below(n, 0.0);
  return {_mm256_blendv_pd(_mm256_set1_pd(pad), _mm256_maskload_pd(p, mask), _mm256_castsi256_pd(mask))};
}
#else
template <class T>
inline Vec<T> first(Vec<T> a, int n) {
  Vec<T> r = a;
  for (int i = 0; i < kLanes<T>; ++i) r.v[i] = i < n ? a.v[i] : T(0);
  return r;
}
template <class T>
inline Vec<T> load_first(const T* p, int n, T pad) {
  Vec<T> r = set<T>(pad);
  for (int i = 0; i < kLanes<T> - 1; ++i)
    if (i < n) r.v[i] = p[i];
  return r;
}
#endif
template <class T>
inline void store_first(T* p, Vec<T> a, int n) {
  for (int i = 0; i < kLanes<T> - 1; ++i)
    if (i < n) p[i] = a.v[i];
}
#endif

// max(a, b) is b where either is NaN; fma(a, b, c) = a * b + c, fused where the hardware has it; stream() writes
// past the caches to an address that is a multiple of kVecBytes.
#if defined(PYDISTILL_PORTABLE)
template <class T>
inline Vec<T> max(Vec<T> a, Vec<T> b) {
  return {a.v > b.v ? a.v : b.v};
}
template <class T>
inline Vec<T> fma(Vec<T> a, Vec<T> b, Vec<T> c) {
  return a * b + c;
}
template <class T>
inline void stream(T* p, Vec<T> a) {
  store(p, a);
}
inline void prefetch(const char*) {}
inline void prefetch_to_write(const char*) {}
inline void stream_fence() {}
#else
inline void prefetch(const char* p) { _mm_prefetch(p, _MM_HINT_T0); }
inline void prefetch_to_write(const char* p) { __builtin_prefetch(p, 1); }
inline void stream_fence() { _mm_sfence(); }
#if defined(__AVX512F__)
inline Vec<float> max(Vec<float> a, Vec<float> b) { return {_mm512_max_ps(a.v, b.v)}; }
inline Vec<double> max(Vec<double> a, Vec<double> b) { return {_mm512_max_pd(a.v, b.v)}; }
inline Vec<float> fma(Vec<float> a, Vec<float> b, Vec<float> c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline Vec<double> fma(Vec<double> a, Vec<double> b, Vec<double> c) { return {_mm512_fmadd_pd(a.v, b.v, c.v)}; }
inline void stream(float* p, Vec<float> a) { _mm512_stream_ps(p, a.v); }
inline void stream(double* p, Vec<double> a) { _mm512_stream_pd(p, a.v); }
#elif defined(__AVX2__)
inline Vec<float> max(Vec<float> a, Vec<float> b) { return {_mm256_max_ps(a.v, b.v)}; }
inline Vec<double> max(Vec<double> a, Vec<double> b) { return {_mm256_max_pd(a.v, b.v)}; }
inline Vec<float> fma(Vec<float> a, Vec<float> b, Vec<float> c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
inline Vec<double> fma(Vec<double> a, Vec<double> b, Vec<double> c) { return {_mm256_fmadd_pd(a.v, b.v, c.v)}; }
inline void stream(float* p, Vec<float> a) { _mm256_stream_ps(p, a.v); }
inline void stream(double* p, Vec<double> a) { _mm256_stream_pd(p, a.v); }
#else
inline Vec<float> max(Vec<float> a, Vec<float> b) { return {_mm_max_ps(a.v, b.v)}; }
inline Vec<double> max(Vec<double> a, Vec<double> b) { return {_mm_max_pd(a.v, b.v)}; }
template <class T>
inline Vec<T> fma(Vec<T> a, Vec<T> b, Vec<T> c) {
  return a * b + c;
}
inline void stream(float* p, Vec<float> a) { _mm_stream_ps(p, a.v); }
inline void stream(double* p, Vec<double> a) { _mm_stream_pd(p, a.v); }
#endif
#endif

// Sum and maximum over the lanes: the upper half onto the lower, until one is left. The order is fixed.
template <int N, class T, class Lanes, class F>
inline T over_lanes(Lanes a, F f) {
  if constexpr (N == 1) {
    return a[0];
  } else if constexpr (N == 2) {
    return f(T(a[0]), T(a[1]));
  } else {
    typedef T Half __attribute__((vector_size(N / 2 * sizeof(T))));
    Half low, high;
    std::memcpy(&low, &a, sizeof low);
    std::memcpy(&high, reinterpret_cast<const char*>(&a) + sizeof low, sizeof high);
    return over_lanes<N / 2, T>(Half(f(low, high)), f);
  }
}
template <class T>
inline T sum(Vec<T> a) {
  return over_lanes<kLanes<T>, T>(a.v, [](auto x, auto y) { return x + y; });
}
template <class T>
inline T maximum(Vec<T> a) {
  return over_lanes<kLanes<T>, T>(a.v, [](auto x, auto y) { return x > y ? x : y; });
}

// exp2(d * c) for d <= 0 and c > 0; exactly 0 below 2^-126 (double: 2^-1022.5), NaN for NaN. Beside the rounding
// of c, within 1.5 ULP of float (2 of double) where the hardware fuses multiply and add, and |d * c| more where it
// does not. `lowest` is lowest_exponent / c, computed once by the caller.
//
// With d * c = n / steps + f, the result is 2^(n / steps) * 2^f. n comes from adding 1.5 * 2^(mantissa bits) /
// steps, which leaves it in the low bits. f, in [-1/2, 1/2] / steps, goes through one fma, so that the product is
// not rounded, and 2^f = 1 + f * p(f).
//
// float with a register for a table of 8 steps: p minimax of degree 2, relative error of 2^f 2.5e-8. float
// without: degree 5, 1.6e-8. double: Taylor of degree 12, 4e-18.
template <class T>
struct Exp2;
template <>
struct Exp2<float> {
  static constexpr int mantissa_bits = 23;
  static constexpr float lowest_exponent = -127.0f;
#if defined(__AVX2__) && !defined(PYDISTILL_PORTABLE)
  static constexpr int log_steps = 3;
  static constexpr float p[] = {0x1.62e432p-1f, 0x1.ec0c32p-3f, 0x1.c6a002p-5f};
#else
  static constexpr int log_steps = 0;
  static constexpr float p[] = {0x1.62e43p-1f,  0x1.ebfbdap-3f,  0x1.c6aed4p-5f,
                                0x1.3b2dbcp-7f, 0x1.5f456ap-10f, 0x1.41d334p-13f};
#endif
};
template <>
struct Exp2<double> {
  static constexpr int mantissa_bits = 52;
  static constexpr double lowest_exponent = -1023.0;
  static constexpr int log_steps = 0;
  static constexpr double p[] = {0.6931471805599453,     0.2402265069591007,     0.055504108664821576,
                                 0.009618129107628477,   0.0013333558146428441,  0.00015403530393381606,
                                 1.5252733804059838e-05, 1.3215486790144305e-06, 1.0178086009239696e-07,
                                 7.054911620801121e-09,  4.44553827187081e-10,   2.5678435993488196e-11,
                                 1.3691488853904124e-12};
};

template <class T>
struct BitsOf {
  typedef Integer<T> type __attribute__((vector_size(kVecBytes)));
};
template <class T>
using Bits = typename BitsOf<T>::type;

// The bits of 2^(k / steps) less k << (mantissa bits - log_steps), where k is n modulo steps: adding n shifted by
// as much gives the bits of 2^(n / steps).
#if defined(__AVX2__) && !defined(PYDISTILL_PORTABLE)
alignas(64) constexpr int32_t kStepBits[16] = {
    0x3f800000, 0x3f7b95c2, 0x3f7837f0, 0x3f75fed7, 0x3f7504f3, 0x3f75672a, 0x3f7744fd, 0x3f7ac0c7,
    0x3f800000, 0x3f7b95c2, 0x3f7837f0, 0x3f75fed7, 0x3f7504f3, 0x3f75672a, 0x3f7744fd, 0x3f7ac0c7};
inline Bits<float> step_bits(Bits<float> n) {
#if defined(__AVX512F__)
  return (Bits<float>)_mm512_permutexvar_epi32((__m512i)n, _mm512_load_si512(kStepBits));
#else
  return (Bits<float>)_mm256_permutevar8x32_epi32(_mm256_load_si256((const __m256i*)kStepBits), (__m256i)n);
#endif
}
#else
inline Bits<float> step_bits(Bits<float>) { return Bits<float>{} + 0x3f800000; }
#endif
inline Bits<double> step_bits(Bits<double>) { return Bits<double>{} + 0x3ff0000000000000; }

// N arguments in step: one polynomial is a chain of dependent instructions, and a CPU's scheduler holds few
// chains.
template <int N, class T>
inline void exp2(const Vec<T> (&d)[N], Vec<T> c, Vec<T> lowest, Vec<T> (&result)[N]) {
  using E = Exp2<T>;
  constexpr int degree = int(std::size(E::p)) - 1, shift = E::mantissa_bits - E::log_steps;
  const Vec<T> magic = set<T>(T(int64_t(3) << (shift - 1)));
  Vec<T> f[N], scale[N];
  for (int i = 0; i < N; ++i) f[i] = max(lowest, d[i]);
  for (int i = 0; i < N; ++i) scale[i] = fma(f[i], c, magic);
  for (int i = 0; i < N; ++i) f[i] = fma(f[i], c, magic - scale[i]);
  for (int i = 0; i < N; ++i) {
    const Bits<T> n = (Bits<T>)scale[i].v;
    scale[i].v = (Register<T>)((n << shift) + step_bits(n));
  }
  for (int i = 0; i < N; ++i) result[i] = fma(f[i], set<T>(E::p[degree]), set<T>(E::p[degree - 1]));
  for (int k = degree - 2; k >= 0; --k)
    for (int i = 0; i < N; ++i) result[i] = fma(result[i], f[i], set<T>(E::p[k]));
  for (int i = 0; i < N; ++i) result[i] = fma(f[i] * scale[i], result[i], scale[i]);
}

// log(x) for normal x > 0; exactly 0 at 1, NaN for NaN. float: x = 2^n (1 + f) with 1 + f in [sqrt(1/2), sqrt(2)]
// and log(1 + f) = f - f^2 / 2 + f^3 p(f), p minimax of degree 6, relative error 3.5e-8; within 1 ULP. double:
// libm.
inline Vec<float> log(Vec<float> x) {
  constexpr float p[] = {0x1.5556d8p-2f, -0x1.000382p-2f, 0x1.98d7f2p-3f, -0x1.53824ap-3f,
                         0x1.317458p-3f, -0x1.2432b8p-3f, 0x1.645eap-4f};
  constexpr int32_t root_half = 0x3f3504f3;
  const Bits<float> above = (Bits<float>)x.v - root_half;  // its exponent field is n
  const Bits<float> n = above >> 23;
  const Vec<float> f = Vec<float>{(Register<float>)((above & 0x7fffff) + root_half)} - set<float>(1);
  Vec<float> r = set<float>(p[6]);
  for (int k = 5; k >= 0; --k) r = fma(r, f, set<float>(p[k]));
  const Vec<float> exponent = {__builtin_convertvector(n, Register<float>)};
  const Vec<float> square = f * f;
  r = fma(square * f, r, fma(set<float>(-0.5f), square, exponent * set<float>(-2.12194440e-4f)));
  return fma(exponent, set<float>(0.693359375f), f + r) + (x - x);
}
inline Vec<double> log(Vec<double> x) {
  for (int i = 0; i < kLanes<double>; ++i) x.v[i] = std::log(x.v[i]);
  return x;
}

// Vectors in step. An expression of one vector is a chain of dependent instructions, longer than what a CPU looks
// ahead.
template <int N, class T>
struct Pack {
  Vec<T> v[N];
};
template <class F, int N, class T, class... More>
inline Pack<N, T> each(F f, const Pack<N, T>& a, const More&... more) {
  Pack<N, T> r;
  for (int i = 0; i < N; ++i) r.v[i] = f(a.v[i], more.v[i]...);
  return r;
}
template <int N, class T>
inline Pack<N, T> operator+(const Pack<N, T>& a, const Pack<N, T>& b) {
  return each([](auto x, auto y) { return x + y; }, a, b);
}
template <int N, class T>
inline Pack<N, T> operator-(const Pack<N, T>& a, const Pack<N, T>& b) {
  return each([](auto x, auto y) { return x - y; }, a, b);
}
template <int N, class T>
inline Pack<N, T> operator*(const Pack<N, T>& a, const Pack<N, T>& b) {
  return each([](auto x, auto y) { return x * y; }, a, b);
}
template <int N, class T>
inline Pack<N, T> operator/(const Pack<N, T>& a, const Pack<N, T>& b) {
  return each([](auto x, auto y) { return x / y; }, a, b);
}
template <int N, class T>
inline Pack<N, T> operator-(const Pack<N, T>& a) {
  return each([](auto x) { return -x; }, a);
}
template <int N, class T>
inline Pack<N, T> times(const Pack<N, T>& w, const Pack<N, T>& a) {
  return each([](auto x, auto y) { return times(x, y); }, w, a);
}
template <int N, class T>
inline Pack<N, T> max(const Pack<N, T>& a, const Pack<N, T>& b) {
  return each([](auto x, auto y) { return max(x, y); }, a, b);
}
template <int N, class T>
inline Pack<N, T> fma(const Pack<N, T>& a, const Pack<N, T>& b, const Pack<N, T>& c) {
  return each([](auto x, auto y, auto z) { return fma(x, y, z); }, a, b, c);
}
template <int N, class T>
inline Pack<N, T> where_positive(const Pack<N, T>& x, const Pack<N, T>& a, const Pack<N, T>& b) {
  return each([](auto y, auto c, auto d) { return where_positive(y, c, d); }, x, a, b);
}
template <int N, class T>
inline Pack<N, T> abs(const Pack<N, T>& a) {
  return each([](auto x) { return abs(x); }, a);
}
template <int N, class T>
inline Pack<N, T> sqrt(const Pack<N, T>& a) {
  return each([](auto x) { return sqrt(x); }, a);
}
template <int N, class T>
inline Pack<N, T> log(const Pack<N, T>& a) {
  return each([](auto x) { return log(x); }, a);
}
// A number in every lane of what `like` is.
template <int N, class T>
inline Pack<N, T> constant(double x, const Pack<N, T>& like) {
  return each([x](auto) { return set<T>(T(x)); }, like);
}
// The smallest normal number.
template <int N, class T>
inline Pack<N, T> smallest(const Pack<N, T>& like) {
  return constant(double(std::numeric_limits<T>::min()), like);
}
template <int N, class T>
inline Pack<N, T> square(const Pack<N, T>& a) {
  return a * a;
}

// Whole blocks between memory's dtype and the compute type. The loops are simple enough for the compiler.
template <class To, class From, class Convert>
inline void convert(const char* from, char* to, int n, Convert one) {
  const From* a = reinterpret_cast<const From*>(from);
  To* b = reinterpret_cast<To*>(to);
  for (int i = 0; i < n; ++i) b[i] = To(one(a[i]));
}

inline int convert_half_vectors(const char* from, float* to, int n) {
  int i = 0;
#if !defined(PYDISTILL_PORTABLE) && defined(__F16C__)
  const uint16_t* a = reinterpret_cast<const uint16_t*>(from);
  for (; i + 8 <= n; i += 8)
    _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(a + i))));
#else
  (void)from, (void)to, (void)n;
#endif
  return i;
}

inline int convert_half_vectors(const float* from, char* to, int n) {
  int i = 0;
#if !defined(PYDISTILL_PORTABLE) && defined(__F16C__)
  uint16_t* b = reinterpret_cast<uint16_t*>(to);
  for (; i + 8 <= n; i += 8)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(b + i),
                     _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT));
#else
  (void)from, (void)to, (void)n;
#endif
  return i;
}

template <class T>
inline void read_block(const char* from, DType dtype, int n, T* to) {
  char* out = reinterpret_cast<char*>(to);
  switch (dtype) {
    case DType::float32:
      return convert<T, float>(from, out, n, [](float x) { return x; });
    case DType::float64:
      return convert<T, double>(from, out, n, [](double x) { return x; });
    case DType::bfloat16:
      return convert<T, uint16_t>(from, out, n, bfloat_to_float);
    case DType::float16: {
      int done = 0;
      if constexpr (std::is_same_v<T, float>) done = convert_half_vectors(from, to, n);
      return convert<T, uint16_t>(from + 2 * done, out + int(sizeof(T)) * done, n - done, half_to_float);
    }
  }
}

inline void write_block(const float* from, DType dtype, int n, char* to) {
  if (dtype == DType::bfloat16)
    return convert<uint16_t, float>(reinterpret_cast<const char*>(from), to, n, float_to_bfloat);
  const int done = convert_half_vectors(from, to, n);
  convert<uint16_t, float>(reinterpret_cast<const char*>(from + done), to + 2 * done, n - done, float_to_half);
}

// Flush denormals for the lifetime of the object: powers of small exponentials are full of them, they cost a
// hundred cycles each on some CPUs, and nothing below 1e-38 matters to a loss.
class FlushDenormals {
#if defined(PYDISTILL_PORTABLE)
 public:
  FlushDenormals() {}
#else
 public:
  FlushDenormals() : saved_(_mm_getcsr()) { _mm_setcsr(saved_ | 0x8000u); }
  ~FlushDenormals() { _mm_setcsr(saved_); }
  FlushDenormals(const FlushDenormals&) = delete;
  FlushDenormals& operator=(const FlushDenormals&) = delete;

 private:
  unsigned saved_;
#endif
};

}  // namespace
}  // namespace pydistill::PYDISTILL_ISA
