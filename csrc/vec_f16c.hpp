// Conversion of float16 with the F16C instructions, for the families of AVX2 and AVX-512: 8 elements at a time.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace pydistill::PYDISTILL_ISA {
namespace {

inline int convert_half_vectors(const char* from, float* to, int n) {
  const uint16_t* a = reinterpret_cast<const uint16_t*>(from);
  int i = 0;
  for (; i + 8 <= n; i += 8)
    _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(a + i))));
  return i;
}

inline int convert_half_vectors(const float* from, char* to, int n) {
  uint16_t* b = reinterpret_cast<uint16_t*>(to);
  int i = 0;
  for (; i + 8 <= n; i += 8)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(b + i),
                     _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT));
  return i;
}

}  // namespace
}  // namespace pydistill::PYDISTILL_ISA
