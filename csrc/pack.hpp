// Pack: several vectors that are computed by one expression.
#pragma once

#include <limits>

#include "math.hpp"

namespace pydistill::PYDISTILL_ISA {
namespace {

// N vectors, with the operations of Vec. An expression of one vector is a chain of dependent instructions that is
// longer than the window in which a CPU searches for independent instructions. The N chains of N vectors
// overlap.
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
// A Pack like `like`, with x in every lane.
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

}  // namespace
}  // namespace pydistill::PYDISTILL_ISA
