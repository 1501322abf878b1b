#include "evaluate.hpp"

#include <cmath>
#include <limits>
#include <new>

#include "half.hpp"
#include "parallel.hpp"

namespace pydistill {
namespace {

constexpr double kNan = std::numeric_limits<double>::quiet_NaN();
// Larger gradients would not stay in the last-level cache. They are written with streaming stores.
constexpr int64_t kPastCacheBytes = int64_t(32) << 20;

double number(const void* array, int64_t i, bool is_double) {
  return is_double ? static_cast<const double*>(array)[i] : double(static_cast<const float*>(array)[i]);
}
void put(void* array, int64_t i, double x, bool is_double) {
  if (is_double)
    static_cast<double*>(array)[i] = x;
  else
    static_cast<float*>(array)[i] = float(x);
}

struct Counts {
  double soft_items = 0, hard_items = 0;     // sums of the weights of the rows that count for the term
  int64_t soft_rows = 0, labelled_rows = 0;  // numbers of rows that have the term
};

class AlignedMemory {
 public:
  explicit AlignedMemory(size_t bytes) : data_(static_cast<char*>(::operator new(bytes, kAlignment))) {}
  ~AlignedMemory() { ::operator delete(data_, kAlignment); }
  AlignedMemory(const AlignedMemory&) = delete;
  AlignedMemory& operator=(const AlignedMemory&) = delete;
  char* data() const { return data_; }

 private:
  static constexpr std::align_val_t kAlignment{64};
  char* data_;
};

// Decides for each row which terms count, and with which weight. Fills `plans`; writes no array of the caller.
Counts plan_rows(const RowBatch& batch, bool is_double, std::vector<RowPlan>& plans, Evaluation& result) {
  const LossOptions& options = batch.options;
  const bool soft = options.evaluates_soft(), hard = options.evaluates_hard();
  Counts counts;
  for (int64_t i = 0; i < batch.rows; ++i) {
    RowPlan& plan = plans[i];
    bool ignored = false;
    if (batch.labels) {
      const int64_t label = batch.labels_are_int32 ? static_cast<const int32_t*>(batch.labels)[i]
                                                   : static_cast<const int64_t*>(batch.labels)[i];
      ignored = label == options.ignore_index;
      if (!ignored && (label < 0 || label >= batch.classes)) {
        result.problem = Problem::bad_label, result.problem_row = i;
        return counts;
      }
      plan.label = ignored ? -1 : label;
    }
    const double weight = batch.sample_weight ? number(batch.sample_weight, i, is_double) : 1;
    if (!(weight >= 0) || std::isinf(weight)) {
      result.problem = Problem::bad_weight, result.problem_row = i;
      return counts;
    }
    if (weight == 0 || (ignored && options.unlabeled == Unlabeled::skip)) continue;
    counts.soft_items += weight;
    if (plan.label >= 0)
      counts.hard_items += weight * (batch.class_weight ? number(batch.class_weight, plan.label, is_double) : 1);
    if (!soft && !(hard && plan.label >= 0)) continue;  // no term: the gradient is 0 even if the logits are NaN
    plan.weight = weight;
    counts.soft_rows += soft;
    counts.labelled_rows += options.hard_counts() && plan.label >= 0;
  }
  return counts;
}

double element(const Matrix& m, int64_t column) {
  const char* p = m.at(0, column);
  switch (m.dtype) {
    case DType::float32:
      return *reinterpret_cast<const float*>(p);
    case DType::float64:
      return *reinterpret_cast<const double*>(p);
    case DType::bfloat16:
      return bfloat_to_float(*reinterpret_cast<const uint16_t*>(p));
    case DType::float16:
      return half_to_float(*reinterpret_cast<const uint16_t*>(p));
  }
  return kNan;
}

// Whether the row may be probabilities. A row of a single class gives no evidence: its logit may be 1 by chance.
bool sums_to_one(const Matrix& row, int64_t classes) {
  double sum = 0;
  for (int64_t j = 0; j < classes; ++j) {
    const double x = element(row, j);
    if (!(x >= 0) || (sum += x) > 1.001) return false;  // most rows of logits end here, after a few classes
  }
  return classes > 1 && sum >= 0.999;
}

double quotient(double sum, double items, int64_t rows) { return rows == 0 ? 0 : sum / items; }

// Rounds to the loss's dtype. A number outside the range of float32 becomes inf there.
double rounded(double x, bool is_double) { return is_double ? x : double(float(x)); }

}  // namespace

Evaluation evaluate(const RowBatch& batch, const IsaVariant& isa, int threads, const RowOutputs& out) {
  const LossOptions& options = batch.options;
  const bool is_double = batch.student.dtype == DType::float64;
  const bool soft = options.alpha > 0, hard = options.alpha < 1;
  Evaluation result;
  std::vector<RowPlan> plans(batch.rows);
  const Counts counts = plan_rows(batch, is_double, plans, result);
  if (result.problem != Problem::none) return result;
  result.teacher_sums_to_one =
      soft && batch.rows > 0 && !batch.teacher_indices && sums_to_one(batch.teacher, batch.classes);

  result.soft_items = options.soft_items >= 0 ? options.soft_items : counts.soft_items;
  result.hard_items = options.hard_items >= 0 ? options.hard_items : counts.hard_items;
  const bool mean = options.reduction == Reduction::mean;
  const double soft_items = mean ? result.soft_items : 1, hard_items = mean ? result.hard_items : 1;
  const bool any_soft = counts.soft_rows > 0, any_hard = counts.labelled_rows > 0;
  for (int64_t i = 0; i < batch.rows; ++i) {
    RowPlan& plan = plans[i];
    const double scale = plan.weight * batch.grad_output *
                         (batch.row_grad_output ? number(batch.row_grad_output, i, is_double) : 1);
    if (soft && any_soft) plan.soft_scale = options.alpha * scale / soft_items;
    if (hard && any_hard && plan.label >= 0) plan.hard_scale = (1 - options.alpha) * scale / hard_items;
  }

  std::vector<RowOutcome> outcomes(batch.rows);
  const int64_t elements = batch.rows * batch.classes;
  const bool past_cache = elements * size_of(batch.gradient.dtype) > kPastCacheBytes;
  // All memory is allocated here, before the first row is written: the parallel region must not throw.
  const int shares = row_shares(batch.rows, elements, threads);
  const size_t scratch_bytes = isa.scratch_bytes(batch);
  const AlignedMemory scratch(size_t(shares) * scratch_bytes);
  for_row_shares(batch.rows, shares, [&](int share, int64_t begin, int64_t end) {
    isa.run_rows(batch, plans.data(), outcomes.data(), begin, end, past_cache,
                 scratch.data() + size_t(share) * scratch_bytes);
  });

  // Added in the order of the rows, so that the result does not depend on the number of threads.
  double soft_sum = 0, hard_sum = 0;
  RowOutcome sums;  // of the metrics
  for (int64_t i = 0; i < batch.rows; ++i) {
    const RowOutcome& row = outcomes[i];
    const double soft_i = any_soft ? plans[i].weight * row.soft : 0;  // both are 0 if the row does not count
    const double hard_i = any_hard ? plans[i].weight * row.hard : 0;
    soft_sum += soft_i;
    hard_sum += hard_i;
#define METRIC(name, rows) sums.name += row.name;
#include "metrics.def"
#undef METRIC
    if (out.loss)
      put(out.loss, i, (soft ? options.alpha * soft_i : 0) + (hard ? (1 - options.alpha) * hard_i : 0), is_double);
    if (out.soft) put(out.soft, i, soft ? soft_i : kNan, is_double);
    if (out.hard) put(out.hard, i, hard ? hard_i : kNan, is_double);
  }
  if (mean) {
    soft_sum = quotient(soft_sum, soft_items, counts.soft_rows);
    hard_sum = quotient(hard_sum, hard_items, counts.labelled_rows);
  }
  const double loss = (soft ? options.alpha * soft_sum : 0) + (hard ? (1 - options.alpha) * hard_sum : 0);
  result.loss = rounded(loss, is_double);
  result.soft = soft ? rounded(soft_sum, is_double) : kNan;
  result.hard = hard ? rounded(hard_sum, is_double) : kNan;
#define METRIC(name, rows) \
  result.name = batch.want_metrics && counts.rows ? sums.name / double(counts.rows) : kNan;
#include "metrics.def"
#undef METRIC
  return result;
}

}  // namespace pydistill
