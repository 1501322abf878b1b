// for_each: the loop over the vectors of a block, including the tail, which does not fill a vector.
#pragma once

#include <limits>
#include <type_traits>

#include "vec.hpp"

namespace pydistill::PYDISTILL_ISA {
namespace {

// Number of elements of a block, small enough for the L1 cache. With two accumulators, each lane of floats adds 32
// terms. The sums of the blocks are added in double.
template <class T>
constexpr int kBlock = 64 * kVecBytes / int(sizeof(float));

// Calls f(j, k, width) for all n elements; one call handles `width` vectors that start at element j. `width` is a
// std::integral_constant: kAtOnce as long as that many vectors are left, then 1. k is the number of elements in
// each vector. It is less than the number of lanes only in the tail and in the first `head` elements, which come
// before an aligned address.
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

// Loads k elements. The lanes after them are padded with the lowest number, whose exponential is 0.
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
