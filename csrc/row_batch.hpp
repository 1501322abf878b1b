// The batch that Python passes to the kernels, and the results of each row: plain structs, without torch.
#pragma once

#include <cstdint>

namespace pydistill {

enum class DType : int { float32, float64, bfloat16, float16 };

enum class Divergence : int {
#define DIVERGENCE(name, type) name,
#include "divergences.def"
#undef DIVERGENCE
  mse,  // mse and dkd are not sums over the classes of a function of p and q
  dkd,
};

inline int64_t size_of(DType dtype) {
  switch (dtype) {  // without a default, so that the compiler warns about a new dtype
    case DType::float64:
      return 8;
    case DType::float32:
      return 4;
    case DType::bfloat16:
    case DType::float16:
      break;
  }
  return 2;
}

// Rows of consecutive elements that start `stride` elements apart. If the stride is 0, all rows are the same.
struct Matrix {
  void* data = nullptr;
  DType dtype = DType::float32;
  int64_t stride = 0;

  char* at(int64_t row, int64_t column) const {
    return static_cast<char*>(data) + (row * stride + column) * size_of(dtype);
  }
};

enum class Unlabeled : int { skip, distill };
enum class Reduction : int { none, sum, mean };

struct LossOptions {
#define OPTION(type, name, default_value) type name = default_value;
#include "options.def"
#undef OPTION

  // Whether the loss contains a term. If the given denominator is 0, no row of the whole step counts for the term.
  bool evaluates_soft() const { return alpha > 0 && soft_counts(); }
  bool evaluates_hard() const { return alpha < 1 && hard_counts(); }
  bool soft_counts() const { return !(reduction == Reduction::mean && soft_items == 0); }
  bool hard_counts() const { return !(reduction == Reduction::mean && hard_items == 0); }
};

// The arguments of one evaluation. Optional arrays are null if they are absent.
struct RowBatch {
  int64_t rows = 0, classes = 0;
  Matrix student, teacher;  // the teacher is not read if alpha is 0
  // For a top-k teacher, a row of `teacher` has `teacher_classes` logits, and the same row of `teacher_indices`
  // has their classes, in ascending order. If teacher_indices is null, the teacher has a logit for every class.
  const int64_t* teacher_indices = nullptr;
  int64_t teacher_classes = 0;
  // Log-sum-exp of all of the teacher's logits / T, per row. The classes without a logit then are one more class,
  // which has the rest of the mass. If log_partitions is null, they have no mass.
  const double* log_partitions = nullptr;
  const void* labels = nullptr;
  bool labels_are_int32 = false;
  // The compute type of the following arrays is double for float64 students, else float.
  const void* sample_weight = nullptr;
  const void* class_weight = nullptr;
  LossOptions options;
  double grad_output = 1;                 // a factor of the whole gradient
  const void* row_grad_output = nullptr;  // a factor for the gradient of each row
  Matrix gradient;                        // in the student's dtype; data is null if no gradient is wanted
  bool want_metrics = false;

  bool evaluates_soft() const { return options.evaluates_soft(); }
  bool evaluates_hard() const { return options.evaluates_hard(); }
};

// Label, weight and scales of one row. They are computed for all rows before the first gradient is written.
struct RowPlan {
  int64_t label = -1;     // -1 if the row has no hard term
  double weight = 0;      // 0 if the row counts for no term
  double soft_scale = 0;  // factor of the row's soft term in the gradient
  double hard_scale = 0;  // factor of the row's hard term in the gradient
};

// Results of one row, without its weight. The terms are in nats; the soft term includes T^2 if the option
// t_squared is set. If a row does not count, all of its results are 0.
struct RowOutcome {
  double soft = 0, hard = 0;
#define METRIC(name, rows) double name = 0;
#include "metrics.def"
#undef METRIC
};

}  // namespace pydistill
