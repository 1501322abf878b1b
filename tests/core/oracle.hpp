// The oracle: the loss computed from its definition, in plain loops over doubles.
#pragma once

#include "call.hpp"

namespace pydistill::driver {

struct Expected {
  double loss = 0, soft = 0, hard = 0, soft_items = 0, hard_items = 0;
  double agreement = 0, accuracy = 0;  // NaN if no row counts
  std::vector<double> row_loss;        // weighted
  double objective = 0;                // the function whose gradient the core writes: grad_output included
  std::vector<bool> row_counts;        // false: the row's gradient is exactly 0
  std::vector<double> gradient_scale;  // of each row; an element's rounding error is relative to it
};

// The results for these student logits, which may differ from those of the inputs.
Expected expected(const Call& call, const Inputs& inputs, const std::vector<double>& student);

}  // namespace pydistill::driver
