// Pointwise divergences D(p, q) = sum_j value_j, with h_j = d value_j / d log q_j.
// p is the teacher, q the student. The row kernel turns h into the gradient of the student's logits,
// (h_j - q_j * sum_k h_k) / T, so nothing here knows of temperature, weights, labels or reductions. A constant
// times q_j may be left out of h_j: that gradient does not change.
//
// times(w, x) is w * x, but 0 where w is 0: that is the limit of w * log w, and 0 * inf never arises.
#pragma once

#include <algorithm>
#include <cmath>

#include "pack.hpp"

namespace pydistill::PYDISTILL_ISA {
namespace {

// log_ratio is log q - log p, from the logits: as a difference of two logs of p and q it would lose digits.
// rest is 1 - beta, rounded once: near 1 the rounded beta has lost it. reference is D::reference of the row: the
// factor of q in h at the student's largest class, for a D whose h would otherwise be large where q is, so that h
// and its sum cancel. All are Packs.
template <class P>
struct Point {
  P p, q, log_ratio, reference, beta, rest;
};

struct NoReference {
  static double reference(double, double, double) { return 0; }
};

// p and q relative to their mixture m = of_p * p + of_q * q, where of_p + of_q = 1. Computed from smaller /
// larger, so that nothing overflows, and as a sum of two numbers >= 0, so that nothing cancels when a weight is
// tiny; exactly 0, 0 and p where p = q.
template <class P>
struct Mixture {
  P log_p_over_m, log_q_over_m, overlap;  // overlap: p * q / m

  Mixture(const Point<P>& x, const P& of_p, const P& of_q) {
    const P one = constant(1, x.p), zero = constant(0, x.p);
    const P larger = max(x.p, x.q), smaller = where_positive(x.log_ratio, x.p, x.q);
    const P ratio = smaller / larger;
    const P of_larger = where_positive(x.log_ratio, of_q, of_p);
    const P m =
        max(smallest(x.p), fma(of_larger, one - ratio, ratio));  // over the larger; normal, for log and 1 / m
    const P larger_over_m = -log(m);
    log_p_over_m = larger_over_m - max(zero, x.log_ratio);
    log_q_over_m = larger_over_m - max(zero, -x.log_ratio);
    overlap = times(smaller, one / m);
  }
};

// log(q / m) of one class in double, from log q - log p.
inline double log_q_over_mixture(double log_ratio, double of_p, double of_q) {
  const double ratio = std::exp(-std::abs(log_ratio));
  return -std::log(ratio + (log_ratio > 0 ? of_q : of_p) * (1 - ratio)) - std::max(0.0, -log_ratio);
}

// sum p (log p - log q). Its h is -p, whose sum is -1: the row kernel needs no second look at the row.
struct ForwardKl : NoReference {
  static auto value(const auto& x) { return -times(x.p, x.log_ratio); }
  static auto d_log_q(const auto& x) { return -x.p; }
};

// sum q (log q - log p). +inf, with a NaN gradient, where p is 0 and q is not. Without the reference h would be
// large where student and teacher disagree, and its sum would cancel: 2.8 times the bound on the error at T = 0.5.
struct ReverseKl {
  static double reference(double log_ratio, double, double) { return log_ratio; }
  static auto value(const auto& x) { return times(x.q, x.log_ratio); }
  static auto d_log_q(const auto& x) { return times(x.q, x.log_ratio - x.reference); }
};

// beta KL(p, m) + (1 - beta) KL(q, m) with m = beta p + (1 - beta) q.
struct Jsd : NoReference {
  static auto value(const auto& x) {
    return x.beta * times(x.p, Mixture(x, x.beta, x.rest).log_p_over_m) + d_log_q(x);
  }
  static auto d_log_q(const auto& x) { return x.rest * times(x.q, Mixture(x, x.beta, x.rest).log_q_over_m); }
};

// KL(p, beta p + (1 - beta) q).
struct SkewForwardKl : NoReference {
  static auto value(const auto& x) { return times(x.p, Mixture(x, x.beta, x.rest).log_p_over_m); }
  static auto d_log_q(const auto& x) { return -x.rest * Mixture(x, x.beta, x.rest).overlap; }
};

// KL(q, (1 - beta) p + beta q).
struct SkewReverseKl {
  static double reference(double log_ratio, double beta, double rest) {
    return log_q_over_mixture(log_ratio, rest, beta);
  }
  static auto value(const auto& x) { return times(x.q, Mixture(x, x.rest, x.beta).log_q_over_m); }
  static auto d_log_q(const auto& x) {
    const Mixture m(x, x.rest, x.beta);
    return times(x.q, m.log_q_over_m - x.reference) + x.rest * m.overlap;
  }
};

// 1/2 sum |p - q|. Where they are equal the derivative is taken as 0.
struct TotalVariation : NoReference {
  static auto value(const auto& x) { return constant(0.5, x.q) * abs(x.q - x.p); }
  static auto d_log_q(const auto& x) { return constant(0.5, x.q) * times(x.q - x.p, x.q / abs(x.q - x.p)); }
};

// 1/2 sum (sqrt p - sqrt q)^2.
struct SquaredHellinger : NoReference {
  static auto value(const auto& x) { return constant(0.5, x.q) * square(sqrt(x.q) - sqrt(x.p)); }
  static auto d_log_q(const auto& x) { return constant(0.5, x.q) * sqrt(x.q) * (sqrt(x.q) - sqrt(x.p)); }
};

}  // namespace
}  // namespace pydistill::PYDISTILL_ISA
