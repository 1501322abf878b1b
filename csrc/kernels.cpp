// The evaluation of one row, and the functions that an ISA variant exports. CMake compiles this file once per ISA.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "gradient.hpp"
#include "listed.hpp"
#include "row_kernel.hpp"
#include "scan.hpp"
#include "second_pass.hpp"

namespace pydistill::PYDISTILL_ISA {
namespace {

// The value of torch's cross_entropy(reduction="none") for this row, with class weights and label smoothing.
template <class T>
double RowKernel<T>::cross_entropy(int64_t row, const RowPlan& plan, const RowState& state) {
  const double log_sum = std::log(state.full_sum), max = state.full_max;
  T logit = 0;
  read_block(batch_.student.at(row, plan.label), batch_.student.dtype, 1, &logit);
  const double weight = class_weight_ ? double(class_weight_[plan.label]) : 1;
  const double smoothing = options_.label_smoothing;
  const double nll = weight * (max - double(logit) + log_sum);
  if (smoothing == 0) return nll;
  double shifted = 0;  // sum of class_weight * (s - max)
  for (int64_t begin = 0; begin < batch_.classes; begin += kBlock<T>) {
    const int n = block_size(begin);
    const T* s = read(batch_.student, row, begin, n, student_buffer_);
    Vec<T> total = set<T>(0);
    for_each<T>(n, 0, [&](int start, int k, auto width) {
      for (int i = 0; i < width; ++i) {
        const int j = start + i * kLanes<T>;
        Vec<T> x = load(s + j, k) - set<T>(T(max));
        if (class_weight_) x = x * load(class_weight_ + begin + j, k);
        total = total + (k == kLanes<T> ? x : first(x, k));
      }
    });
    shifted += sum(total);
  }
  const double smooth = (class_weight_sum_ * log_sum - shifted) / double(batch_.classes);
  return (1 - smoothing) * nll + smoothing * smooth;
}

// The class of the block at `begin` whose logit is `max`, or the number of classes if there is none.
template <class T>
int64_t RowKernel<T>::argmax(const Matrix& m, int64_t row, int64_t begin, T max) {
  const int n = block_size(begin);
  const T* x = read(m, row, begin, n, student_buffer_);
  int i = 0;
  while (i + kLanes<T> <= n && !any_equal(load(x + i), set<T>(max))) i += kLanes<T>;
  const T* found = std::find(x + i, x + n, max);
  return found == x + n ? batch_.classes : begin + (found - x);
}

// Sets accuracy and agreement. If several classes have the maximum, the lowest counts. A row that has a NaN or is
// all -inf has no maximum.
template <class T>
void RowKernel<T>::compare_argmax(int64_t row, const RowPlan& plan, const RowState& state, RowOutcome& outcome) {
  T student_max = state.max.student, teacher_max = state.max.teacher;
  for (const ListedClass& c : listed_) student_max = std::max(student_max, c.student);
  int64_t best = batch_.classes, teacher_best = batch_.classes;
  if (state.max.student == student_max) best = argmax(batch_.student, row, state.student_max_block, student_max);
  for (const ListedClass& c : listed_)
    if (c.student == student_max) best = std::min(best, c.index);
  outcome.accuracy = best == plan.label;
  if (!state.teacher_valid) return;
  for (const ListedClass& c : listed_) teacher_max = std::max(teacher_max, c.teacher);
  if (!batch_.teacher_indices && state.max.teacher == teacher_max)
    teacher_best = argmax(batch_.teacher, row, state.teacher_max_block, teacher_max);
  for (const ListedClass& c : listed_)
    if (c.teacher == teacher_max) teacher_best = std::min(teacher_best, c.index);
  outcome.agreement = best == teacher_best && best < batch_.classes;
}

template <class T>
RowOutcome RowKernel<T>::run(int64_t row, const RowPlan& plan) {
  RowOutcome outcome;
  RowState state = listed_.empty() ? scan(row) : scan_unlisted(row, plan);
  const Sums& sums = state.sums;
  const double units = options_.t_squared ? temperature_ * temperature_ : 1;
  const double scale = plan.soft_scale * units / temperature_;
  double h_sum = 0;
  Factors factors;
  state.student_valid = sums.student > 0;  // false for NaN
  state.teacher_valid = sums.teacher > 0;
  switch (soft_term_) {
    case SoftTerm::none:
      break;
    case SoftTerm::forward_kl:
      outcome.soft = units * (sums.cross / (sums.teacher * temperature_) + std::log(sums.student / sums.teacher));
      factors.student_exp = scale / sums.student;
      factors.derivative = -scale / sums.teacher;  // h is -p, and its sum is -1
      break;
    case SoftTerm::pointwise: {
      const PointSums points = pointwise_pass(row, state);
      outcome.soft = units * points.value;
      // If h is infinite (reverse_kl with p = 0), the gradient of the whole row is NaN, rather than partly inf.
      h_sum = std::isfinite(points.h) ? points.h : std::numeric_limits<double>::quiet_NaN();
      factors.derivative = scale;
      break;
    }
    case SoftTerm::mse:
      outcome.soft = mse_pass(row, state);
      factors.derivative = 2 * plan.soft_scale / double(batch_.classes);
      break;
    case SoftTerm::topk:
      add_listed(state);
      outcome.soft = units * topk_term(row, scale, state, factors);
      break;
    case SoftTerm::dkd:
      add_listed(state);
      outcome.soft = units * dkd_term(scale, state, factors);
      break;
  }
  if (std::isnan(outcome.soft)) {  // the gradient of the whole row is NaN, even if h is not
    factors.student_exp = factors.derivative = outcome.soft;
    for (ListedClass& c : listed_) c.gradient = outcome.soft;
  }
  if (has_hard_ && plan.label >= 0) outcome.hard = cross_entropy(row, plan, state);
  if (batch_.want_metrics && state.student_valid) compare_argmax(row, plan, state, outcome);
  if (want_gradient_) write_row(row, plan, state, h_sum, factors);
  return outcome;
}

template <class T>
void run_rows(const RowBatch& batch, const RowPlan* plans, RowOutcome* outcomes, int64_t begin, int64_t end,
              bool past_cache, char* scratch) {
  const FlushDenormals flush;
  Arena arena(scratch);
  RowKernel<T> kernel(batch, past_cache, arena);
  for (int64_t row = begin; row < end; ++row) {
    if (plans[row].weight != 0)
      outcomes[row] = kernel.run(row, plans[row]);
    else if (batch.gradient.data)
      std::memset(batch.gradient.at(row, 0), 0, size_t(batch.classes * size_of(batch.gradient.dtype)));
  }
  stream_fence();
}

template <class T>
size_t scratch_bytes(const RowBatch& batch) {
  Arena arena(nullptr);
  const RowKernel<T> kernel(batch, false, arena);
  return arena.used();
}

}  // namespace

void run_rows(const RowBatch& batch, const RowPlan* plans, RowOutcome* outcomes, int64_t begin, int64_t end,
              bool past_cache, char* scratch) {
  const auto run = batch.student.dtype == DType::float64 ? run_rows<double> : run_rows<float>;
  run(batch, plans, outcomes, begin, end, past_cache, scratch);
}

size_t scratch_bytes(const RowBatch& batch) {
  return batch.student.dtype == DType::float64 ? scratch_bytes<double>(batch) : scratch_bytes<float>(batch);
}

}  // namespace pydistill::PYDISTILL_ISA
