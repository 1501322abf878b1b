// Rows with listed classes: the k classes of a top-k teacher, or dkd's label. All other classes are the rest.
//
// The scan leaves the listed classes out, so that its sums and maxima are those of the rest. If the sums of the
// rest were computed by subtraction from the sums of the whole row, they would lose their digits whenever the
// listed classes hold nearly all of the mass. There are few listed classes: their exponentials are computed in
// vectors, as in the scan, and everything else in double.
#pragma once

#include <utility>

#include "divergences.hpp"
#include "row_kernel.hpp"

namespace pydistill::PYDISTILL_ISA {
namespace {

// Sets the indices of the listed classes of a row, and the logits of a top-k teacher. The indices are ascending,
// because Python passes them sorted.
template <class T>
void RowKernel<T>::list_classes(int64_t row, const RowPlan& plan) {
  const int64_t count = int64_t(listed_.size());
  for (int64_t k = 0; k < count; ++k) {
    ListedClass& c = listed_[size_t(k)];
    const bool topk = soft_term_ == SoftTerm::topk;
    c.index = topk ? batch_.teacher_indices[row * count + k] : plan.label;
    if (topk) read_block(batch_.teacher.at(row, k), batch_.teacher.dtype, 1, &c.teacher);
  }
}

// Copies a block to `to`, which may be the block itself, and replaces the logits of the listed classes by the
// mask. The logits are first saved in the member `logit` of their ListedClass. This is done here, because the
// block is in cache: a look-up before the scan would wait for memory once per class.
template <class T>
const T* RowKernel<T>::mask_listed(std::span<ListedClass> listed, const T* x, int64_t begin, int n, T* to,
                                   T ListedClass::* logit) const {
  if (x != to) std::memcpy(to, x, size_t(n) * sizeof(T));
  for (ListedClass& c : listed) c.*logit = std::exchange(to[c.index - begin], mask_);
  return to;
}

// The scan over the rest. A mask of -inf is always correct. But if the teacher is scanned too, it causes a product
// 0 * inf in the cross sum of each block with a listed class, and the sum is then computed twice. The lowest
// finite number avoids that. It is incorrect only if no logit of the rest is greater; the row is then scanned
// again.
template <class T>
typename RowKernel<T>::RowState RowKernel<T>::scan_unlisted(int64_t row, const RowPlan& plan) {
  constexpr T lowest = std::numeric_limits<T>::lowest();
  list_classes(row, plan);
  mask_ = scan_teacher_ ? lowest : -std::numeric_limits<T>::infinity();
  RowState state = scan(row);
  if (scan_teacher_ && (state.max.student == lowest || state.max.teacher == lowest)) {
    mask_ = -std::numeric_limits<T>::infinity();
    state = scan(row);
  }
  return state;
}

// Replaces `count` numbers x <= 0 by exp(x / T). Pads x to whole vectors, for which the array must have room.
template <class T>
inline void exponentials_in_place(T* x, int count, const ExpBase<T>& base) {
  for (int j = count; j % kLanes<T> != 0; ++j) x[j] = std::numeric_limits<T>::lowest();
  for (int j = 0; j < count; j += kLanes<T>) {
    const Vec<T> d[1] = {load(x + j)};
    Vec<T> e[1];
    exp2(d, base.c, base.lowest, e);
    store(x + j, e[0]);
  }
}

// Adds the listed classes to the student's maximum and its sum at T = 1: the cross-entropy needs those over all
// classes.
template <class T>
void RowKernel<T>::add_listed(RowState& state) {
  state.full_max = double(state.max.student);
  for (const ListedClass& c : listed_) state.full_max = std::max(state.full_max, double(c.student));
  if (!has_hard_) return;
  state.full_sum = state.sums.hard * std::exp(double(state.max.student) - state.full_max);
  const int count = int(listed_.size());
  for (int k = 0; k < count; ++k) h_[k] = listed_[size_t(k)].student - T(state.full_max);
  exponentials_in_place(h_, count, hard_base_);
  for (int k = 0; k < count; ++k) {
    listed_[size_t(k)].hard_exp = double(h_[k]);
    state.full_sum += double(h_[k]);
  }
}

// Value and sum of h over the first `count` elements of p_, q_ and log_ratio_. Writes their h to h_.
template <class T>
template <class D>
PointSums RowKernel<T>::pointwise_listed(int count) {
  const double beta = options_.beta, one_minus_beta = 1 - beta;
  const double log_ratio_at_max = double(log_ratio_[std::max_element(q_, q_ + count) - q_]);
  const T reference = T(D::reference(log_ratio_at_max, beta, one_minus_beta));
  double value = 0, h_sum = 0;
  for (int j = 0; j < count; j += kLanes<T>) {
    using One = Pack<1, T>;
    const Point<One> x{One{load(p_ + j)},      One{load(q_ + j)},    One{load(log_ratio_ + j)},
                       One{set<T>(reference)}, One{set<T>(T(beta))}, One{set<T>(T(one_minus_beta))}};
    const Vec<T> v = D::value(x).v[0], h = D::d_log_q(x).v[0];
    store(h_ + j, h);
    for (int i = 0; i < kLanes<T> && j + i < count; ++i) value += double(v[i]), h_sum += double(h[i]);
  }
  return {value, h_sum};
}

// Fills p_, q_ and log_ratio_ with the listed classes and, as one more class after them, the rest. Returns log q
// of the rest, or nullopt if the softmax of student or teacher is undefined.
template <class T>
std::optional<double> RowKernel<T>::topk_probabilities(int64_t row, RowState& state) {
  const int count = int(listed_.size());
  double teacher_max = -std::numeric_limits<double>::infinity();
  for (const ListedClass& c : listed_) teacher_max = std::max(teacher_max, double(c.teacher));
  double student_sum = state.sums.student * std::exp((double(state.max.student) - state.full_max) / temperature_);
  double teacher_sum = 0;
  for (int k = 0; k < count; ++k) {
    const ListedClass& c = listed_[size_t(k)];
    q_[k] = c.student - T(state.full_max), p_[k] = c.teacher - T(teacher_max);
  }
  exponentials_in_place(q_, count, soft_base_);
  exponentials_in_place(p_, count, soft_base_);
  for (int k = 0; k < count; ++k) {
    student_sum += double(q_[k]);
    // If there are log-partitions, the sum is computed in double: the mass of the rest is 1 minus the share of
    // this sum, and float would lose its digits.
    teacher_sum += batch_.log_partitions
                       ? std::exp((double(listed_[size_t(k)].teacher) - teacher_max) / temperature_)
                       : double(p_[k]);
  }
  const double log_student_sum = std::log(student_sum), log_teacher_sum = std::log(teacher_sum);
  state.student_valid = student_sum > 0, state.teacher_valid = teacher_sum > 0;
  if (!state.student_valid || !state.teacher_valid) return std::nullopt;
  double log_partition = log_teacher_sum;  // log-sum-exp of (t - teacher_max) / T over the classes with mass
  double rest_mass = 0;
  if (batch_.log_partitions) {
    log_partition = batch_.log_partitions[row] - teacher_max / temperature_;
    rest_mass = std::max(0.0, -std::expm1(log_teacher_sum - log_partition));
    if (std::isnan(log_partition)) rest_mass = log_partition;
  }
  // If the teacher lists all classes and its logits equal the student's, the probabilities must be equal to the
  // bit. Without log-partitions, therefore, both are computed with 1 / sum.
  const double by_student = 1 / student_sum;
  const double by_teacher = batch_.log_partitions ? std::exp(-log_partition) : 1 / teacher_sum;
  for (int k = 0; k < count; ++k) {
    const ListedClass& c = listed_[size_t(k)];
    const double log_q = (double(c.student) - state.full_max) / temperature_ - log_student_sum;
    const double log_p = (double(c.teacher) - teacher_max) / temperature_ - log_partition;
    q_[k] = T(double(q_[k]) * by_student), p_[k] = T(double(p_[k]) * by_teacher), log_ratio_[k] = T(log_q - log_p);
  }
  const double log_q_rest =
      (double(state.max.student) - state.full_max) / temperature_ + std::log(state.sums.student) - log_student_sum;
  p_[count] = T(rest_mass), q_[count] = T(std::exp(log_q_rest));
  log_ratio_[count] = T(log_q_rest - std::log(rest_mass));
  for (int k = count + 1; k % kLanes<T> != 0; ++k) p_[k] = q_[k] = log_ratio_[k] = 0;
  return log_q_rest;
}

// The divergence over the listed classes and, as one more class, the rest. Without log-partitions, p = 0 in the
// rest. A divergence that is finite at p = 0 is proportional to q there, so that one class can represent the rest.
template <class T>
double RowKernel<T>::topk_term(int64_t row, double scale, RowState& state, Factors& factors) {
  const int count = int(listed_.size());
  const std::optional<double> log_q_rest = topk_probabilities(row, state);
  if (!log_q_rest) return std::numeric_limits<double>::quiet_NaN();
  PointSums points;
  switch (options_.divergence) {
#define DIVERGENCE(name, type)                  \
  case Divergence::name:                        \
    points = pointwise_listed<type>(count + 1); \
    break;
#include "divergences.def"
#undef DIVERGENCE
    case Divergence::mse:
    case Divergence::dkd:
      break;  // Python rejects a top-k teacher for these
  }
  if (!std::isfinite(points.h)) points.h = std::numeric_limits<double>::quiet_NaN();
  for (int k = 0; k < count; ++k) listed_[size_t(k)].gradient = scale * (double(h_[k]) - double(q_[k]) * points.h);
  if (state.sums.student != 0)
    factors.student_exp = scale * (double(h_[count]) - std::exp(*log_q_rest) * points.h) / state.sums.student;
  return points.value;
}

// log(sigmoid(x)).
inline double log_sigmoid(double x) { return std::min(x, 0.0) - std::log1p(std::exp(-std::abs(x))); }

// Decoupled knowledge distillation: the KL divergence between the two-class distributions (label, rest), which
// depends on the log-odds of the label only, plus beta times the KL divergence within the rest.
template <class T>
double RowKernel<T>::dkd_term(double scale, RowState& state, Factors& factors) {
  const Sums& sums = state.sums;
  ListedClass& label = listed_.front();
  constexpr double infinity = std::numeric_limits<double>::infinity();
  const auto log_odds = [&](T logit, T max, double sum) {
    if (double(logit) == infinity) return std::numeric_limits<double>::quiet_NaN();
    if (sum == 0) return std::isfinite(logit) ? infinity : std::numeric_limits<double>::quiet_NaN();
    return (double(logit) - double(max)) / temperature_ - std::log(sum);
  };
  const double student = log_odds(label.student, state.max.student, sums.student);
  const double teacher = log_odds(label.teacher, state.max.teacher, sums.teacher);
  const double q = 1 / (1 + std::exp(-student)), p = 1 / (1 + std::exp(-teacher));
  const double p_rest = 1 / (1 + std::exp(teacher));
  const auto term = [](double weight, double x) { return weight == 0 ? 0 : weight * x; };
  double value = term(p, log_sigmoid(teacher) - log_sigmoid(student)) +
                 term(p_rest, log_sigmoid(-teacher) - log_sigmoid(-student));
  state.student_valid = !std::isnan(student);
  state.teacher_valid = !std::isnan(teacher);
  double beta = 0;  // of the gradient; 0 if the teacher's rest has no mass, and so nothing to compare with
  if (sums.teacher != 0) {
    beta = batch_.classes == 2 ? 0 : options_.beta;  // within a single class the gradient is 0
    const double within = sums.student == 0
                              ? infinity
                              : sums.cross / (sums.teacher * temperature_) + std::log(sums.student / sums.teacher);
    value += term(options_.beta, within);
    factors.derivative = -scale * beta / sums.teacher;
  }
  if (sums.student != 0) factors.student_exp = scale * (p - q + beta) / sums.student;
  label.gradient = scale * (q - p);
  return value;
}

}  // namespace
}  // namespace pydistill::PYDISTILL_ISA
