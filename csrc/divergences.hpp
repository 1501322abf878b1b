// Pointwise divergences: D(p, q) = sum_j value_j of a teacher p and a student q, and h_j = d value_j / d log q_j.
//
// The row kernel computes the gradient by the student's logits from h, as (h_j - q_j * sum_k h_k) / T, and applies
// temperature, weights, labels and reductions. Values are in nats and include all constants. h_j may drop a term c
// * q_j, with the same c for all classes j, because this term does not change the gradient. Unless another domain
// is stated, it is p, q >= 0 and 0 < beta <= 1. If beta makes a divergence equal to another one, as for jsd at 0
// and 1, Python passes the other one.
//
// times(w, x) is w * x, but 0 if w is 0: that is the limit of w * log w. Thus 0 * inf does not occur.
#pragma once

#include <algorithm>
#include <cmath>

#include "pack.hpp"

namespace pydistill::PYDISTILL_ISA {
namespace {

// The arguments of a divergence; each is a Pack.
template <class P>
struct Point {
  P p, q;
  P log_ratio;  // log q - log p, from the logits: the difference of two logarithms would lose digits
  // D::reference of the row: the factor of q in h at the student's largest class. It is subtracted from this
  // factor in h, so that h_j is small if q_j is large. Otherwise h_j and q_j * sum_k h_k would cancel.
  P reference;
  P beta, one_minus_beta;  // rounded separately: 1 - beta would have few digits if beta is near 1
};

struct NoReference {
  static double reference(double, double, double) { return 0; }
};

// p and q relative to their mixture m = of_p * p + of_q * q, with of_p + of_q = 1. m is computed from smaller /
// larger, so that nothing overflows, and as a sum of two numbers >= 0, so that nothing cancels if a weight is
// tiny. If p = q, log_p_over_m and log_q_over_m are exactly 0, and overlap is exactly p.
template <class P>
struct Mixture {
  P log_p_over_m, log_q_over_m;
  P overlap;  // p * q / m

  Mixture(const Point<P>& x, const P& of_p, const P& of_q) {
    const P one = constant(1, x.p), zero = constant(0, x.p);
    const P larger = max(x.p, x.q), smaller = where_positive(x.log_ratio, x.p, x.q);
    const P ratio = smaller / larger;
    const P of_larger = where_positive(x.log_ratio, of_q, of_p);
    // m divided by the larger of p and q. It must be a normal number for log and 1 / m.
    const P m = max(smallest(x.p), fma(of_larger, one - ratio, ratio));
    const P larger_over_m = -log(m);
    log_p_over_m = larger_over_m - max(zero, x.log_ratio);
    log_q_over_m = larger_over_m - max(zero, -x.log_ratio);
    overlap = times(smaller, one / m);
  }
};

// log(q / m) of one class, in double, from log q - log p.
inline double log_q_over_mixture(double log_ratio, double of_p, double of_q) {
  const double ratio = std::exp(-std::abs(log_ratio));
  return -std::log(ratio + (log_ratio > 0 ? of_q : of_p) * (1 - ratio)) - std::max(0.0, -log_ratio);
}

// KL(p, q) = sum p (log p - log q). Domain: p >= 0, and q > 0 if p > 0; otherwise +inf. The sum of h is -1, so
// that the row kernel needs no second pass.
struct ForwardKl : NoReference {
  static auto value(const auto& x) { return -times(x.p, x.log_ratio); }
  static auto d_log_q(const auto& x) { return -x.p; }
};

// KL(q, p) = sum q (log q - log p). Domain: q >= 0, and p > 0 if q > 0; otherwise +inf, with a gradient of NaN. h
// drops q * (1 + reference). Without the reference, h would be large if student and teacher disagree, and h_j
// would cancel with q_j * sum_k h_k: at T = 0.5 the error was 2.8 times the permitted bound.
struct ReverseKl {
  static double reference(double log_ratio, double, double) { return log_ratio; }
  static auto value(const auto& x) { return times(x.q, x.log_ratio); }
  static auto d_log_q(const auto& x) { return times(x.q, x.log_ratio - x.reference); }
};

// Jensen-Shannon: beta KL(p, m) + (1 - beta) KL(q, m) with m = beta p + (1 - beta) q.
struct Jsd : NoReference {
  static auto value(const auto& x) {
    return x.beta * times(x.p, Mixture(x, x.beta, x.one_minus_beta).log_p_over_m) + d_log_q(x);
  }
  static auto d_log_q(const auto& x) {
    return x.one_minus_beta * times(x.q, Mixture(x, x.beta, x.one_minus_beta).log_q_over_m);
  }
};

// KL(p, beta p + (1 - beta) q).
struct SkewForwardKl : NoReference {
  static auto value(const auto& x) { return times(x.p, Mixture(x, x.beta, x.one_minus_beta).log_p_over_m); }
  static auto d_log_q(const auto& x) { return -x.one_minus_beta * Mixture(x, x.beta, x.one_minus_beta).overlap; }
};

// KL(q, (1 - beta) p + beta q). h drops q * reference.
struct SkewReverseKl {
  static double reference(double log_ratio, double beta, double one_minus_beta) {
    return log_q_over_mixture(log_ratio, one_minus_beta, beta);
  }
  static auto value(const auto& x) { return times(x.q, Mixture(x, x.one_minus_beta, x.beta).log_q_over_m); }
  static auto d_log_q(const auto& x) {
    const Mixture m(x, x.one_minus_beta, x.beta);
    return times(x.q, m.log_q_over_m - x.reference) + x.one_minus_beta * m.overlap;
  }
};

// 1/2 sum |p - q|. At p = q the derivative is defined as 0.
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
