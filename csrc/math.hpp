// exp2 and log of vectors. Each function states its lane types, its range and its largest error.
#pragma once

#include <cmath>
#include <cstdint>
#include <iterator>
#include <limits>
#include <type_traits>

#include "vec.hpp"

namespace pydistill::PYDISTILL_ISA {
namespace {

// Constants of exp2 for T. 2^f = 1 + f * p(f). In the comments, steps is 2^log_steps.
struct Exp2WithTable {  // p is minimax, of degree 2; relative error of 2^f 2.5e-8
  static constexpr int log_steps = 3;
  static constexpr float p[] = {0x1.62e432p-1f, 0x1.ec0c32p-3f, 0x1.c6a002p-5f};
  // The bits of 2^(k / steps) minus k << (mantissa_bits - log_steps), for k < 8. They are stored twice, because an
  // AVX-512 register holds 16 numbers.
  alignas(64) static constexpr int32_t step_bits[] = {
      0x3f800000, 0x3f7b95c2, 0x3f7837f0, 0x3f75fed7, 0x3f7504f3, 0x3f75672a, 0x3f7744fd, 0x3f7ac0c7,
      0x3f800000, 0x3f7b95c2, 0x3f7837f0, 0x3f75fed7, 0x3f7504f3, 0x3f75672a, 0x3f7744fd, 0x3f7ac0c7};
};
struct Exp2WithoutTable {  // p is minimax, of degree 5; relative error of 2^f 1.6e-8
  static constexpr int log_steps = 0;
  static constexpr float p[] = {0x1.62e43p-1f,  0x1.ebfbdap-3f,  0x1.c6aed4p-5f,
                                0x1.3b2dbcp-7f, 0x1.5f456ap-10f, 0x1.41d334p-13f};
};
template <class T>
struct Exp2;
template <>
struct Exp2<float> : std::conditional_t<kFastLookup, Exp2WithTable, Exp2WithoutTable> {
  static constexpr int mantissa_bits = 23;
  static constexpr float lowest_exponent = -127.0f;
};
template <>
struct Exp2<double> {  // p is Taylor's, of degree 12; relative error of 2^f 4e-18
  static constexpr int log_steps = 0;
  static constexpr double p[] = {0.6931471805599453,     0.2402265069591007,     0.055504108664821576,
                                 0.009618129107628477,   0.0013333558146428441,  0.00015403530393381606,
                                 1.5252733804059838e-05, 1.3215486790144305e-06, 1.0178086009239696e-07,
                                 7.054911620801121e-09,  4.44553827187081e-10,   2.5678435993488196e-11,
                                 1.3691488853904124e-12};
  static constexpr int mantissa_bits = 52;
  static constexpr double lowest_exponent = -1023.0;
};

// The bits of 2^(n / steps) minus n << (mantissa_bits - log_steps).
template <class T>
inline Bits<T> step_bits(Bits<T> n) {
  using E = Exp2<T>;
  if constexpr (E::log_steps > 0)
    return lookup(E::step_bits, n);
  else
    return Bits<T>{} + (Integer<T>(std::numeric_limits<T>::max_exponent - 1) << E::mantissa_bits);  // bits of 1
}

// result[i] = 2^(d[i] * c), for N vectors.
//
// Lane types: float, double.
// Range:      d <= 0, c > 0. Exactly 0 if d * c is below -126 (double: -1022.5), NaN for NaN.
// Max error:  1.5 ULP (double: 2 ULP) in addition to the rounding of c. Without a fused fma(), |d * c| ULP more.
// Arguments:  lowest is Exp2<T>::lowest_exponent / c, computed once by the caller.
// Method:     With d * c = n / steps + f, the result is 2^(n / steps) * 2^f. Adding 1.5 * 2^mantissa_bits / steps
//             leaves n in the low bits of the sum. f is in [-1/2, 1/2] / steps. It is computed with one fma, so
//             that the product is not rounded. The N polynomials are evaluated together, degree by degree: each is
//             a chain of dependent instructions, and a CPU's scheduler overlaps only a few chains.
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
    scale[i].v = (Register<T>)((n << shift) + step_bits<T>(n));
  }
  for (int i = 0; i < N; ++i) result[i] = fma(f[i], set<T>(E::p[degree]), set<T>(E::p[degree - 1]));
  for (int k = degree - 2; k >= 0; --k)
    for (int i = 0; i < N; ++i) result[i] = fma(result[i], f[i], set<T>(E::p[k]));
  for (int i = 0; i < N; ++i) result[i] = fma(f[i] * scale[i], result[i], scale[i]);
}

// log(x), the natural logarithm.
//
// Lane types: float, double.
// Range:      normal numbers > 0. Exactly 0 at 1, NaN for NaN.
// Max error:  1 ULP (double: that of libm).
// Method:     float: x = 2^n (1 + f) with 1 + f in [sqrt(1/2), sqrt(2)]; log(1 + f) = f - f^2 / 2 + f^3 p(f), p
//             minimax of degree 6, relative error 3.5e-8; n log(2) is added in two parts.
//             double: libm, lane by lane.
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

}  // namespace
}  // namespace pydistill::PYDISTILL_ISA
