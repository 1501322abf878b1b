// The register family of SSE2, which every x86-64 CPU has: 16 bytes.
#pragma once

#include "vec_x86.hpp"

namespace pydistill::PYDISTILL_ISA {
namespace {
constexpr int kVecBytes = 16;
}
}  // namespace pydistill::PYDISTILL_ISA

#include "vec_type.hpp"

namespace pydistill::PYDISTILL_ISA {
namespace {

inline Vec<float> max(Vec<float> a, Vec<float> b) { return {_mm_max_ps(a.v, b.v)}; }
inline Vec<double> max(Vec<double> a, Vec<double> b) { return {_mm_max_pd(a.v, b.v)}; }

constexpr bool kFastLookup = false;

inline void stream(float* p, Vec<float> a) { _mm_stream_ps(p, a.v); }
inline void stream(double* p, Vec<double> a) { _mm_stream_pd(p, a.v); }

}  // namespace
}  // namespace pydistill::PYDISTILL_ISA
