// Rows of which some classes are listed: the k classes of a top-k teacher, or dkd's label.
//
// The scan over a row leaves the listed classes out, so that its sums, and the maxima that they refer to, are
// those of the rest, that is of all other classes. Computed by subtraction from the sums of the whole row they
// would lose their digits where the listed classes hold nearly all of the mass. The listed classes are few: their
// exponentials are computed in vectors, as in the scan, and everything else in double.
#pragma once

#include <utility>

#include "divergences.hpp"
#include "row_kernel.hpp"

namespace pydistill::PYDISTILL_ISA {
namespace {

// The listed classes of a row, in the order of their indices: Python passes them sorted.
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

// A block for the scan, with the mask in place of the listed classes. `to` receives it and may be the block
// itself. The listed logits are copied to `logit` here, where the block is in cache: a look-up before the scan
// would wait for memory once per class.
template <class T>
const T* RowKernel<T>::mask_listed(std::span<ListedClass> listed, const T* x, int64_t begin, int n, T* to,
                                   T ListedClass::* logit) const {
  if (x != to) std::memcpy(to, x, size_t(n) * sizeof(T));
  for (ListedClass& c : listed) c.*logit = std::exchange(to[c.index - begin], mask_);
  return to;
}

// The scan over the rest. A mask of -inf is always right, but if the teacher is scanned too it makes 0 * inf in
// the cross sum of every block, which is then computed twice. The lowest finite number avoids that, and is right
// unless it is the maximum of the rest.
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

// Replaces `count` numbers x <= 0 by exp(x / T), in whole vectors.
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

// Adds the listed classes to the student's maximum and sum at T = 1, which the cross-entropy needs over all
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

// Value and sum of h over the first `count` elements of p_, q_ and log_ratio_. Their h is written to h_.
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

// Fills p_, q_ and log_ratio_ with the listed classes and, as one more class behind them, the rest. Returns log q
// of the rest, or nothing if student or teacher has no softmax.
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
    // With log-partitions in double: the mass of the rest is 1 minus this sum's share, and float would lose it.
    teacher_sum += batch_.log_partitions
                       ? std::exp((double(listed_[size_t(k)].teacher) - teacher_max) / temperature_)
                       : double(p_[k]);
  }
  const double log_student_sum = std::log(student_sum), log_teacher_sum = std::log(teacher_sum);
  state.student_valid = student_sum > 0, state.teacher_valid = teacher_sum > 0;
  if (!state.student_valid || !state.teacher_valid) return std::nullopt;
  double log_partition = log_teacher_sum, rest_mass = 0;  // of the teacher's logits less their maximum
  if (batch_.log_partitions) {
    log_partition = batch_.log_partitions[row] - teacher_max / temperature_;
    rest_mass = std::max(0.0, -std::expm1(log_teacher_sum - log_partition));
    if (std::isnan(log_partition)) rest_mass = log_partition;
  }
  // If the logits of all classes are equal, so must be the probabilities, to the bit.
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

// The divergence over the listed classes and the rest. Without log-partitions the teacher's rest has p = 0: there,
// a divergence that is finite is proportional to q, so that one class can stand for all of the rest.
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

// Decoupled knowledge distillation: the KL divergence of (label, rest), a function of the label's log-odds alone,
// and beta times the KL divergence within the rest.
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
  double beta = 0;  // without mass in the teacher's rest there is nothing to compare
  if (sums.teacher != 0) {
    beta = batch_.classes == 2 ? 0 : options_.beta;  // within a rest of one class the gradient is 0
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
