// One batch: check the labels and weights, find the denominators, run the rows over threads, reduce.
#pragma once

#include "dispatch.hpp"

namespace pydistill {

enum class Problem : int { none, bad_label, bad_weight };

// Terms and loss in the units of the public function; agreement and accuracy NaN where there is no row for them.
struct Evaluation {
  Problem problem = Problem::none;
  int64_t problem_row = -1;
  double loss = 0, soft = 0, hard = 0;
  double agreement = 0, accuracy = 0;
  double soft_items = 0, hard_items = 0;
  bool teacher_sums_to_one = false;  // the first row: perhaps probabilities were passed as logits
};

// Per-row results, in the compute type, for reduction="none"; null otherwise.
struct RowOutputs {
  void* loss = nullptr;
  void* soft = nullptr;
  void* hard = nullptr;
};

Evaluation evaluate(const RowBatch& batch, const IsaVariant& isa, int threads, const RowOutputs& rows);

}  // namespace pydistill
