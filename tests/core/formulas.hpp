// The pointwise divergences by their definition, in double. A new divergence needs a line in formulas.cpp, and
// nothing else in these tests.
#pragma once

#include "row_batch.hpp"

namespace pydistill::driver {

// The contribution of one class, from the logarithms of its probabilities.
double divergence_of_class(Divergence divergence, double beta, double log_p, double log_q);

// Whether the divergence is finite if the teacher gives probability 0 to a class to which the student does not.
bool allows_zero_teacher(Divergence divergence);

// w * (log_x - log_y), and 0 where w is 0.
double weighted_log_ratio(double w, double log_x, double log_y);

}  // namespace pydistill::driver
