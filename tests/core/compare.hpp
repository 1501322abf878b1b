// Comparisons of results. Each returns what is wrong, or nothing.
#pragma once

#include "oracle.hpp"
#include "run_call.hpp"

namespace pydistill::driver {

std::string compare_values(const Call& call, const Result& result, const Expected& expected);
// The gradient along a random direction, against the difference of the oracle's losses ahead and behind.
std::string compare_gradient(const Call& call, const Inputs& inputs, const Result& result, const Expected& here);
// Of the same call on two ISAs.
std::string compare_results(const Call& call, const Result& a, const Result& b, const Expected& expected);

}  // namespace pydistill::driver
