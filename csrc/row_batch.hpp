// The batch that Python hands to the kernels, and their results per row: plain structs, without torch.
#pragma once

#include <cstdint>

namespace pydistill {

enum class DType : int { float32, float64, bfloat16, float16 };

enum class Divergence : int {
#define DIVERGENCE(name, type) name,
#include "divergences.def"
#undef DIVERGENCE
  mse,  // mse and dkd are not sums over classes of a function of p and q
  dkd,
};

inline int64_t size_of(DType dtype) { return dtype == DType::float64 ? 8 : dtype == DType::float32 ? 4 : 2; }

// Rows of consecutive elements. They start `stride` elements apart; with a stride of 0 all are the same row.
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

  // Whether a term has a weight. A given denominator of 0 says that no row counts for it in the whole step.
  bool evaluates_soft() const { return alpha > 0 && soft_counts(); }
  bool evaluates_hard() const { return alpha < 1 && hard_counts(); }
  bool soft_counts() const { return !(reduction == Reduction::mean && soft_items == 0); }
  bool hard_counts() const { return !(reduction == Reduction::mean && hard_items == 0); }
};

struct RowBatch {
  int64_t rows = 0, classes = 0;
  Matrix student, teacher;  // the teacher is not read if alpha is 0
  // A top-k teacher: its matrix has `teacher_classes` logits per row, those of the classes `teacher_indices`, in
  // ascending order. Null: the teacher has a logit for every class.
  const int64_t* teacher_indices = nullptr;
  int64_t teacher_classes = 0;
  // Log-sum-exp of all the teacher's logits / T, per row: the classes without a logit are one more outcome, which
  // has the rest of the mass. Null: they have no mass.
  const double* log_partitions = nullptr;
  const void* labels = nullptr;
  bool labels_are_int32 = false;
  // The compute type of the following arrays is double for float64 students, else float.
  const void* sample_weight = nullptr;
  const void* class_weight = nullptr;
  LossOptions options;
  double grad_output = 1;                 // multiplies the gradient of every row
  const void* row_grad_output = nullptr;  // multiplies the gradient of its row
  Matrix gradient;                        // in the student's dtype; data is null if no gradient is wanted
  bool want_metrics = false;

  bool evaluates_soft() const { return options.evaluates_soft(); }
  bool evaluates_hard() const { return options.evaluates_hard(); }
};

// Label, weight and scales of one row; computed for all rows before the first gradient is written.
struct RowPlan {
  int64_t label = -1;     // -1: no hard term
  double weight = 0;      // 0: the row counts for no term
  double soft_scale = 0;  // factor of this row's soft term in the gradient
  double hard_scale = 0;  // factor of its hard term
};

// Results of one row, before weights. The terms are in nats and include T^2. A row that does not count keeps the
// zeros.
struct RowOutcome {
  double soft = 0, hard = 0;
#define METRIC(name, rows) double name = 0;
#include "metrics.def"
#undef METRIC
};

}  // namespace pydistill
