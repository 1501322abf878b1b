// The one loop with its tail.
#pragma once

#include <limits>
#include <type_traits>

#include "vec.hpp"

namespace pydistill::PYDISTILL_ISA {
namespace {

// A block stays in L1; with two accumulators each float lane adds 32 terms before the sum goes on in double.
template <class T>
constexpr int kBlock = 64 * kVecBytes / int(sizeof(float));

// Calls f(j, k, width): `width` vectors from element j on, a constant for the compiler. By kAtOnce whole vectors,
// then one by one; k counts the elements of a single vector, fewer than its lanes in the tail and in the `head`
// that leads to an aligned address.
template <class T, int kAtOnce = 2, class F>
inline void for_each(int n, int head, F f) {
  constexpr int lanes = kLanes<T>;
  constexpr std::integral_constant<int, 1> single;
  constexpr std::integral_constant<int, kAtOnce> several;
  int j = 0;
  if (head > 0) f(0, head, single), j = head;
  for (; j + kAtOnce * lanes <= n; j += kAtOnce * lanes) f(j, lanes, several);
  for (; j + lanes <= n; j += lanes) f(j, lanes, single);
  if (j < n) f(j, n - j, single);
}

template <class T>
inline Vec<T> load(const T* p, int k) {
  return k == kLanes<T> ? load(p) : load_first(p, k, std::numeric_limits<T>::lowest());
}
template <class T>
inline void store(T* p, Vec<T> a, int k) {
  k == kLanes<T> ? store(p, a) : store_first(p, a, k);
}

}  // namespace
}  // namespace pydistill::PYDISTILL_ISA
