// Vec<T> and its operations, for any machine. They use the vector types of GCC and Clang, whose operators,
// comparisons and ?: work lane by lane. A register family (vec.hpp) overloads some of the templates.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

namespace pydistill::PYDISTILL_ISA {
namespace {

template <class T>
constexpr int kLanes = kVecBytes / int(sizeof(T));

template <class T>
struct RegisterOf {
  typedef T type __attribute__((vector_size(kVecBytes)));
};
template <class T>
using Register = typename RegisterOf<T>::type;

// The bits of the lanes of T, as integers.
template <class T>
using Integer = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
template <class T>
using Bits = Register<Integer<T>>;

// A struct around the register, so that templates can deduce T.
template <class T>
struct Vec {
  Register<T> v;
  T operator[](int i) const { return v[i]; }
};

template <class T>
inline Vec<T> set(T x) {
  return {x - Register<T>{}};  // compiles to a broadcast; a loop over the lanes compiles to a chain of inserts
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
// The larger number, or b if a or b is NaN, as the instructions of x86 define it.
template <class T>
inline Vec<T> max(Vec<T> a, Vec<T> b) {
  return {a.v > b.v ? a.v : b.v};
}
// a * b + c, fused if the family has an instruction for it.
template <class T>
inline Vec<T> fma(Vec<T> a, Vec<T> b, Vec<T> c) {
  return a * b + c;
}
// w * x, but 0 if w is 0, for any x. If w is NaN, the result is NaN.
template <class T>
inline Vec<T> times(Vec<T> w, Vec<T> x) {
  const Register<T> zero = {};
  return {w.v == zero ? zero : w.v * x.v};
}

// Per lane, a if x > 0, else b.
template <class T>
inline Vec<T> where_positive(Vec<T> x, Vec<T> a, Vec<T> b) {
  return {x.v > Register<T>{} ? a.v : b.v};
}
// Per lane, a if x = y, else b. Equal infinities are equal.
template <class T>
inline Vec<T> where_equal(Vec<T> x, Vec<T> y, Vec<T> a, Vec<T> b) {
  return {x.v == y.v ? a.v : b.v};
}
template <class T>
inline bool any_equal(Vec<T> a, Vec<T> b) {
  bool any = false;
  for (int i = 0; i < kLanes<T>; ++i) any |= a[i] == b[i];
  return any;
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
// A streaming store, which bypasses the caches, if the family has one. p must be aligned to kVecBytes.
template <class T>
inline void stream(T* p, Vec<T> a) {
  store(p, a);
}

// The next three functions handle n < kLanes elements. They do not access memory from p[n] on.

// The first n lanes of a, and 0 in the others.
template <class T>
inline Vec<T> first(Vec<T> a, int n) {
  Vec<T> r = a;
  for (int i = 0; i < kLanes<T>; ++i) r.v[i] = i < n ? a.v[i] : T(0);
  return r;
}
// The first n lanes from memory, and `pad` in the others.
template <class T>
inline Vec<T> load_first(const T* p, int n, T pad) {
  Vec<T> r = set<T>(pad);
  for (int i = 0; i < kLanes<T> - 1; ++i)
    if (i < n) r.v[i] = p[i];
  return r;
}
template <class T>
inline void store_first(T* p, Vec<T> a, int n) {
  for (int i = 0; i < kLanes<T> - 1; ++i)
    if (i < n) p[i] = a.v[i];
}

// Converts between float16 and float32 in whole vectors and returns the number of converted elements, which is 0
// unless the family has instructions for the conversion.
template <class From, class To>
inline int convert_half_vectors(const From*, To*, int) {
  return 0;
}

// Combines all lanes with f, for sum() and maximum(): repeatedly combines the upper with the lower half until one
// lane is left. The order is fixed.
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

}  // namespace
}  // namespace pydistill::PYDISTILL_ISA
