// for_each: the loop over the vectors of a block, with its tail.
#pragma once

#include <limits>
#include <type_traits>

#include "vec.hpp"

namespace pydistill::PYDISTILL_ISA {
namespace {

// Elements of a block: few enough to stay in L1. With two accumulators each float lane adds 32 terms; the sums of
// blocks are added in double.
template <class T>
constexpr int kBlock = 64 * kVecBytes / int(sizeof(float));

// Calls f(j, k, width) for `width` vectors from element j on: first for kAtOnce vectors at a time, then for single
// ones. `width` is a std::integral_constant. k is the number of elements in a single vector: fewer than its lanes
// in the tail, and in the `head` elements that come before an aligned address.
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

// k elements; lanes beyond them are padded with the lowest number, whose exponential is 0.
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
