// Conversion of blocks of elements between their dtype in memory and the compute type, float or double.
#pragma once

#include <type_traits>

#include "half.hpp"
#include "row_batch.hpp"
#include "vec.hpp"

namespace pydistill::PYDISTILL_ISA {
namespace {

template <class T>
constexpr DType kComputeDType = sizeof(T) == 8 ? DType::float64 : DType::float32;

// Converts n elements, each with one(), in a loop that the compiler vectorises.
template <class To, class From, class Convert>
inline void convert(const char* from, char* to, int n, Convert one) {
  const From* a = reinterpret_cast<const From*>(from);
  To* b = reinterpret_cast<To*>(to);
  for (int i = 0; i < n; ++i) b[i] = To(one(a[i]));
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
  switch (dtype) {
    case DType::bfloat16:
      return convert<uint16_t, float>(reinterpret_cast<const char*>(from), to, n, float_to_bfloat);
    case DType::float16: {
      const int done = convert_half_vectors(from, to, n);
      return convert<uint16_t, float>(reinterpret_cast<const char*>(from + done), to + 2 * done, n - done,
                                      float_to_half);
    }
    case DType::float32:
    case DType::float64:
      return;  // compute types, which need no conversion: the gradient is written to memory directly
  }
}

}  // namespace
}  // namespace pydistill::PYDISTILL_ISA
