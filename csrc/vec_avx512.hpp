// The register family of AVX-512: 64 bytes, with masks for tails.
#pragma once

#include "vec_f16c.hpp"
#include "vec_x86.hpp"

namespace pydistill::PYDISTILL_ISA {
namespace {
constexpr int kVecBytes = 64;
}
}  // namespace pydistill::PYDISTILL_ISA

#include "vec_type.hpp"

namespace pydistill::PYDISTILL_ISA {
namespace {

inline Vec<float> max(Vec<float> a, Vec<float> b) { return {_mm512_max_ps(a.v, b.v)}; }
inline Vec<double> max(Vec<double> a, Vec<double> b) { return {_mm512_max_pd(a.v, b.v)}; }
inline Vec<float> fma(Vec<float> a, Vec<float> b, Vec<float> c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline Vec<double> fma(Vec<double> a, Vec<double> b, Vec<double> c) { return {_mm512_fmadd_pd(a.v, b.v, c.v)}; }
inline bool any_equal(Vec<float> a, Vec<float> b) { return _mm512_cmpeq_ps_mask(a.v, b.v) != 0; }
inline bool any_equal(Vec<double> a, Vec<double> b) { return _mm512_cmpeq_pd_mask(a.v, b.v) != 0; }

constexpr bool kFastLookup = true;
inline Bits<float> lookup(const int32_t* table, Bits<float> i) {
  return (Bits<float>)_mm512_permutexvar_epi32((__m512i)i, _mm512_load_si512(table));
}

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

inline void stream(float* p, Vec<float> a) { _mm512_stream_ps(p, a.v); }
inline void stream(double* p, Vec<double> a) { _mm512_stream_pd(p, a.v); }

}  // namespace
}  // namespace pydistill::PYDISTILL_ISA
