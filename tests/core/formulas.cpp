#include "formulas.hpp"

#include <cmath>
#include <limits>

namespace pydistill::driver {

double weighted_log_ratio(double w, double log_x, double log_y) { return w == 0 ? 0 : w * (log_x - log_y); }

double divergence_of_class(Divergence divergence, double beta, double log_p, double log_q) {
  const double p = std::exp(log_p), q = std::exp(log_q);
  const auto log_mixture = [&](double of_p) { return std::log(of_p * p + (1 - of_p) * q); };
  const auto kl = weighted_log_ratio;
  switch (divergence) {
    case Divergence::forward_kl:
      return kl(p, log_p, log_q);
    case Divergence::reverse_kl:
      return kl(q, log_q, log_p);
    case Divergence::jsd:
      return beta * kl(p, log_p, log_mixture(beta)) + (1 - beta) * kl(q, log_q, log_mixture(beta));
    case Divergence::skew_forward_kl:
      return kl(p, log_p, log_mixture(beta));
    case Divergence::skew_reverse_kl:
      return kl(q, log_q, log_mixture(1 - beta));
    case Divergence::total_variation:
      return std::abs(p - q) / 2;
    case Divergence::squared_hellinger:
      return std::pow(std::sqrt(p) - std::sqrt(q), 2) / 2;
    case Divergence::mse:
    case Divergence::dkd:
      break;  // not pointwise: oracle.cpp
  }
  return std::numeric_limits<double>::quiet_NaN();
}

bool allows_zero_teacher(Divergence divergence) {
  return std::isfinite(
      divergence_of_class(divergence, 0.5, -std::numeric_limits<double>::infinity(), std::log(0.5)));
}

}  // namespace pydistill::driver
