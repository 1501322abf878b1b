// Vec<T>: the only file that knows an instruction set. kernels.cpp includes it once per ISA; everything has
// internal linkage, or the linker could keep one ISA's copy of an inline function for all.
//
// Compiled with -ffp-contract=off: a product and a sum fuse only where fma() says so. Otherwise the student's and
// the teacher's sums may round differently, and the divergence of equal rows is no longer exactly 0.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

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
