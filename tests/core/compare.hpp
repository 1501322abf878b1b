// Comparisons of results. Each returns a description of the first difference, or an empty string.
#pragma once

#include "oracle.hpp"
#include "run_call.hpp"

namespace pydistill::driver {

std::string compare_values(const Call& call, const Result& result, const Expected& expected);
// Compares the slope of the gradient along a random direction with the central difference of the oracle's losses.
std::string compare_gradient(const Call& call, const Inputs& inputs, const Result& result, const Expected& here);
// Compares the results of the same call on two ISAs.
std::string compare_results(const Call& call, const Result& a, const Result& b, const Expected& expected);

}  // namespace pydistill::driver
