// The loss by its definition, in plain loops over doubles: a check on what the core returns.
#pragma once

#include "call.hpp"

namespace pydistill::driver {

struct Expected {
  double loss = 0, soft = 0, hard = 0, soft_items = 0, hard_items = 0;
  double agreement = 0, accuracy = 0;  // without a row: NaN
  std::vector<double> row_loss;        // weighted
  double objective = 0;                // what the gradient is of: grad_output included
  std::vector<bool> row_counts;        // false: the row's gradient is exactly 0
  std::vector<double> gradient_scale;  // of a row: an element's share of it is what is rounded
};

// For these student logits, which need not be the inputs' own.
Expected expected(const Call& call, const Inputs& inputs, const std::vector<double>& student);

}  // namespace pydistill::driver
