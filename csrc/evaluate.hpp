// Evaluation of one batch: check labels and weights, compute the denominators, run the rows on threads, reduce.
#pragma once

#include "dispatch.hpp"

namespace pydistill {

enum class Problem : int { none, bad_label, bad_weight };

// Loss, terms and denominators as the public function defines them. A metric is NaN if no row counts for it.
struct Evaluation {
  Problem problem = Problem::none;
  int64_t problem_row = -1;
  double loss = 0, soft = 0, hard = 0;
  double soft_items = 0, hard_items = 0;
  bool teacher_sums_to_one = false;  // the teacher's first row may be probabilities, passed as logits
#define METRIC(name, rows) double name = 0;
#include "metrics.def"
#undef METRIC
};

// Per-row results, in the compute type, for reduction="none"; null otherwise.
struct RowOutputs {
  void* loss = nullptr;
  void* soft = nullptr;
  void* hard = nullptr;
};

Evaluation evaluate(const RowBatch& batch, const IsaVariant& isa, int threads, const RowOutputs& rows);

}  // namespace pydistill
