// Pointwise divergences D(p, q) = sum_j value_j, with h_j = d value / d log q_j.
// p is the teacher, q the student. The row kernel turns h into the gradient of the student's logits,
// (h_j - q_j * sum_k h_k) / T, so nothing here knows of temperature, weights, labels or reductions.
//
// times(w, x) is w * x, but 0 where w is 0: that is the limit of w * log w, and 0 * inf never arises.
#pragma once

#include "vec.hpp"

namespace pydistill::PYDISTILL_ISA {
namespace {

template <class T>
struct Point {
  Vec<T> p, q, log_ratio;  // log q - log p, from the logits: as a difference of the two it would lose digits
};

// sum p (log p - log q). Its h is -p, whose sum is -1: the row kernel needs no second look at the row.
struct ForwardKl {
  template <class T>
  static Vec<T> value(const Point<T>& x) {
    return -times(x.p, x.log_ratio);
  }
  template <class T>
  static Vec<T> d_log_q(const Point<T>& x) {
    return -x.p;
  }
};

// sum q (log q - log p). +inf, with a NaN gradient, where p is 0 and q is not.
struct ReverseKl {
  template <class T>
  static Vec<T> value(const Point<T>& x) {
    return times(x.q, x.log_ratio);
  }
  template <class T>
  static Vec<T> d_log_q(const Point<T>& x) {
    return times(x.q, x.log_ratio + set<T>(1));
  }
};

}  // namespace
}  // namespace pydistill::PYDISTILL_ISA
