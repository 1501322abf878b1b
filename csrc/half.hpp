// Conversion of single numbers between float and the bits of float16 and bfloat16. Internal linkage, so that every
// ISA variant has its own copy.
#pragma once

#include <cstdint>
#include <cstring>

namespace pydistill {
namespace {

inline float half_to_float(uint16_t h) {
  const uint32_t sign = uint32_t(h & 0x8000u) << 16;
  const uint32_t magnitude = h & 0x7fffu;
  uint32_t bits;
  if (magnitude >= 0x7c00u) {  // inf, NaN
    bits = 0x7f800000u | ((magnitude & 0x3ffu) << 13);
  } else if (magnitude >= 0x0400u) {
    bits = (magnitude << 13) + ((127u - 15u) << 23);
  } else {  // zero or denormal: magnitude * 2^-24, exact in float
    const float x = float(magnitude) * 0x1p-24f;
    std::memcpy(&bits, &x, sizeof bits);
  }
  bits |= sign;
  float r;
  std::memcpy(&r, &bits, sizeof r);
  return r;
}

inline uint16_t float_to_half(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  const uint16_t sign = uint16_t((bits >> 16) & 0x8000u);
  bits &= 0x7fffffffu;
  if (bits > 0x7f800000u) return sign | 0x7e00u;   // NaN
  if (bits >= 0x477ff000u) return sign | 0x7c00u;  // rounds to inf
  if (bits < 0x38800000u) {                        // below 2^-14: adding 0.5 rounds to a multiple of 2^-24
    float magnitude;
    std::memcpy(&magnitude, &bits, sizeof magnitude);
    magnitude += 0.5f;
    std::memcpy(&bits, &magnitude, sizeof bits);
    return sign | uint16_t(bits - 0x3f000000u);
  }
  bits += 0xfffu + ((bits >> 13) & 1u);  // to nearest, ties to even
  return sign | uint16_t((bits - ((127u - 15u) << 23)) >> 13);
}

inline float bfloat_to_float(uint16_t b) {
  const uint32_t bits = uint32_t(b) << 16;
  float r;
  std::memcpy(&r, &bits, sizeof r);
  return r;
}

inline uint16_t float_to_bfloat(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  const uint16_t rounded = uint16_t((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
  return x != x ? uint16_t(0x7fc0u) : rounded;
}

}  // namespace
}  // namespace pydistill
