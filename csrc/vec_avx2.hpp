// The register family of AVX2 and FMA: 32 bytes.
#pragma once

#include "vec_f16c.hpp"
#include "vec_x86.hpp"

namespace pydistill::PYDISTILL_ISA {
namespace {
constexpr int kVecBytes = 32;
}
}  // namespace pydistill::PYDISTILL_ISA

#include "vec_type.hpp"

namespace pydistill::PYDISTILL_ISA {
namespace {

inline Vec<float> max(Vec<float> a, Vec<float> b) { return {_mm256_max_ps(a.v, b.v)}; }
inline Vec<double> max(Vec<double> a, Vec<double> b) { return {_mm256_max_pd(a.v, b.v)}; }
inline Vec<float> fma(Vec<float> a, Vec<float> b, Vec<float> c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
inline Vec<double> fma(Vec<double> a, Vec<double> b, Vec<double> c) { return {_mm256_fmadd_pd(a.v, b.v, c.v)}; }
inline bool any_equal(Vec<float> a, Vec<float> b) {
  return _mm256_movemask_ps(_mm256_cmp_ps(a.v, b.v, _CMP_EQ_OQ)) != 0;
}
inline bool any_equal(Vec<double> a, Vec<double> b) {
  return _mm256_movemask_pd(_mm256_cmp_pd(a.v, b.v, _CMP_EQ_OQ)) != 0;
}

constexpr bool kFastLookup = true;
inline Bits<float> lookup(const int32_t* table, Bits<float> i) {
  return (Bits<float>)_mm256_permutevar8x32_epi32(_mm256_load_si256((const __m256i*)table), (__m256i)i);
}

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

inline void stream(float* p, Vec<float> a) { _mm256_stream_ps(p, a.v); }
inline void stream(double* p, Vec<double> a) { _mm256_stream_pd(p, a.v); }

}  // namespace
}  // namespace pydistill::PYDISTILL_ISA
