// Pointwise divergences D(p, q) = sum_j value_j, with h_j = d value_j / d log q_j.
// p is the teacher, q the student. The row kernel turns h into the gradient of the student's logits,
// (h_j - q_j * sum_k h_k) / T, so nothing here knows of temperature, weights, labels or reductions. A constant
// times q_j may be left out of h_j: that gradient does not change.
//
// times(w, x) is w * x, but 0 where w is 0: that is the limit of w * log w, and 0 * inf never arises.
#pragma once

#include "vec.hpp"

namespace pydistill::PYDISTILL_ISA {
namespace {

// log_ratio is log q - log p, from the logits: as a difference of two logs of p and q it would lose digits.
// reference is its value at the student's largest class. All are Packs.
template <class P>
struct Point {
  P p, q, log_ratio, reference, beta;
};

// How p and q lie to m = weight * p + (1 - weight) * q. Through the smaller of the two over the larger, so that
// nothing overflows, and exactly 0, 0 and p where p = q.
template <class P>
struct Mixture {
  P log_p_over_m, log_q_over_m, overlap;  // overlap: p * q / m

  Mixture(const Point<P>& x, const P& weight) {
    const P one = constant(1, x.p), zero = constant(0, x.p);
    const P larger = max(x.p, x.q), smaller = where_positive(x.log_ratio, x.p, x.q);
    const P m =
        fma(where_positive(x.log_ratio, weight, one - weight), smaller / larger - one, one);  // over the larger
    const P larger_over_m = -log(m);
    log_p_over_m = larger_over_m - max(zero, x.log_ratio);
    log_q_over_m = larger_over_m - max(zero, -x.log_ratio);
    overlap = times(x.p, x.q / max(smallest(x.p), m * larger));
  }
};

// sum p (log p - log q). Its h is -p, whose sum is -1: the row kernel needs no second look at the row.
struct ForwardKl {
  static auto value(const auto& x) { return -times(x.p, x.log_ratio); }
  static auto d_log_q(const auto& x) { return -x.p; }
};

// sum q (log q - log p). +inf, with a NaN gradient, where p is 0 and q is not. Without the reference h would be
// large where student and teacher disagree, and its sum would cancel: 2.8 times the bound on the error at T = 0.5.
struct ReverseKl {
  static auto value(const auto& x) { return times(x.q, x.log_ratio); }
  static auto d_log_q(const auto& x) { return times(x.q, x.log_ratio - x.reference); }
};

// beta KL(p, m) + (1 - beta) KL(q, m) with m = beta p + (1 - beta) q.
struct Jsd {
  static auto value(const auto& x) { return x.beta * times(x.p, Mixture(x, x.beta).log_p_over_m) + d_log_q(x); }
  static auto d_log_q(const auto& x) {
    return (constant(1, x.q) - x.beta) * times(x.q, Mixture(x, x.beta).log_q_over_m);
  }
};

// KL(p, beta p + (1 - beta) q).
struct SkewForwardKl {
  static auto value(const auto& x) { return times(x.p, Mixture(x, x.beta).log_p_over_m); }
  static auto d_log_q(const auto& x) { return (x.beta - constant(1, x.q)) * Mixture(x, x.beta).overlap; }
};

// KL(q, (1 - beta) p + beta q).
struct SkewReverseKl {
  static auto value(const auto& x) { return times(x.q, Mixture(x, constant(1, x.q) - x.beta).log_q_over_m); }
  static auto d_log_q(const auto& x) {
    const auto rest = constant(1, x.q) - x.beta;
    return value(x) + rest * Mixture(x, rest).overlap;
  }
};

// 1/2 sum |p - q|. Where they are equal the derivative is taken as 0.
struct TotalVariation {
  static auto value(const auto& x) { return constant(0.5, x.q) * abs(x.q - x.p); }
  static auto d_log_q(const auto& x) { return constant(0.5, x.q) * times(x.q - x.p, x.q / abs(x.q - x.p)); }
};

// 1/2 sum (sqrt p - sqrt q)^2.
struct SquaredHellinger {
  static auto value(const auto& x) { return constant(0.5, x.q) * square(sqrt(x.q) - sqrt(x.p)); }
  static auto d_log_q(const auto& x) { return constant(0.5, x.q) * sqrt(x.q) * (sqrt(x.q) - sqrt(x.p)); }
};

}  // namespace
}  // namespace pydistill::PYDISTILL_ISA
