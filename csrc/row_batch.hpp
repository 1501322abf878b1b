// What crosses the boundary between Python and the kernels: plain structs, no torch.
#pragma once

#include <cstdint>

namespace pydistill {

enum class DType : int { float32, float64, bfloat16, float16 };

enum class Divergence : int {
#define DIVERGENCE(name, type) name,
#include "divergences.def"
#undef DIVERGENCE
  mse,  // the two that are no sum over classes of a function of p and q
  dkd,
};

inline int64_t size_of(DType dtype) { return dtype == DType::float64 ? 8 : dtype == DType::float32 ? 4 : 2; }

// Rows of `classes` consecutive elements, `stride` elements apart (0: one row shown many times).
struct Matrix {
  void* data = nullptr;
  DType dtype = DType::float32;
  int64_t stride = 0;

  char* at(int64_t row, int64_t column) const {
    return static_cast<char*>(data) + (row * stride + column) * size_of(dtype);
  }
};

struct LossOptions {
  Divergence divergence = Divergence::forward_kl;
  double beta = 0;
  double temperature = 1;
  double alpha = 0.5;
  bool t_squared = true;
  int64_t ignore_index = -100;
  bool distill_unlabeled = false;
  double label_smoothing = 0;
};

enum class Reduction : int { none, sum, mean };

struct RowBatch {
  int64_t rows = 0, classes = 0;
  Matrix student, teacher;  // the teacher is not looked at where alpha is 0
  // A top-k teacher: its matrix has `teacher_classes` logits per row, of these classes, ascending. Null: of all.
  const int64_t* teacher_indices = nullptr;
  int64_t teacher_classes = 0;
  // Log-sum-exp of all the teacher's logits / T, per row; the rest of its mass is one more outcome. Null: no rest.
  const double* log_partitions = nullptr;
  const void* labels = nullptr;
  bool labels_are_int32 = false;
  const void* sample_weight = nullptr;  // in the compute type: double for float64 students, else float
  const void* class_weight = nullptr;   // in the compute type
  LossOptions options;
  Reduction reduction = Reduction::mean;
  double soft_items = -1, hard_items = -1;  // denominators of "mean"; negative: to be counted
  double grad_output = 1;                   // folded into every row's scale,
  const void* row_grad_output = nullptr;    // and this, per row, in the compute type
  Matrix gradient;                          // data is null where no gradient is wanted; dtype as the student
  bool want_argmax = false;

  // Whether a term has a weight. A given denominator of 0 says that no row counts for it anywhere.
  bool evaluates_soft() const { return options.alpha > 0 && !(reduction == Reduction::mean && soft_items == 0); }
  bool evaluates_hard() const { return options.alpha < 1 && !(reduction == Reduction::mean && hard_items == 0); }
};

// What one row needs to know beside its logits; made once, before anything is written.
struct RowPlan {
  int64_t label = -1;     // -1: no hard term
  double weight = 0;      // 0: the row counts for nothing
  double soft_scale = 0;  // factor of this row's soft term in the gradient
  double hard_scale = 0;
};

// What the kernel finds out about one row, before weights: terms in nats, T^2 included.
struct RowOutcome {
  double soft = 0, hard = 0;
  bool same_argmax = false, correct = false;
};

}  // namespace pydistill
