// Evaluation of one batch: checks labels and weights, computes the denominators, runs the rows on threads and adds
// up their results.
#pragma once

#include "dispatch.hpp"

namespace pydistill {

enum class Problem : int { none, bad_label, bad_weight };

// Loss, terms and denominators, as distillation_loss defines them. A metric is NaN if no row counts for it.
struct Evaluation {
  Problem problem = Problem::none;
  int64_t problem_row = -1;
  double loss = 0, soft = 0, hard = 0;
  double soft_items = 0, hard_items = 0;
  bool teacher_sums_to_one = false;  // the teacher's logits may be probabilities, judged by the first row
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
