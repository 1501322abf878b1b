// Rows in which some classes stand apart: the k classes of a top-k teacher, and the label of dkd.
//
// The scan over a row leaves them out, so that the sums, and the maximum they refer to, are those of the rest:
// taken from a whole row's by subtraction they would be lost where the classes apart hold nearly all of the mass.
// The classes apart are few: their exponentials are taken as the scan takes them, the rest is computed in double.
#pragma once

#include <utility>

#include "divergences.hpp"
#include "row_kernel.hpp"

namespace pydistill::PYDISTILL_ISA {
namespace {

// The classes apart of a row, in the order of their indices, as Python hands them over.
template <class T>
void RowKernel<T>::set_apart(int64_t row, const RowPlan& plan) {
  const int64_t count = int64_t(apart_.size());
  for (int64_t k = 0; k < count; ++k) {
    Apart& a = apart_[size_t(k)];
    const bool topk = kind_ == Kind::topk;
    a.index = topk ? batch_.teacher_indices[row * count + k] : plan.label;
    if (topk) read_block(batch_.teacher.at(row, k), batch_.teacher.dtype, 1, &a.teacher);
  }
}

// A block for the scan, in `to`, which may be the block itself, with the mask in place of the classes apart. Their
// logits go into `logit` only here, where the block is in cache: looked up before the scan, each is a wait for
// memory.
template <class T>
const T* RowKernel<T>::without(std::span<Apart> apart, const T* x, int64_t begin, int n, T* to,
                               T Apart::* logit) const {
  if (x != to) std::memcpy(to, x, size_t(n) * sizeof(T));
  for (Apart& a : apart) a.*logit = std::exchange(to[a.index - begin], mask_);
  return to;
}

// The scan over the rest. A mask of -inf is always right. But where the teacher is scanned too it makes 0 * inf of
// the cross sum, whose block is then computed again; the lowest number does not, and is right unless it is the
// maximum.
template <class T>
typename RowKernel<T>::RowState RowKernel<T>::scan_without_apart(int64_t row, const RowPlan& plan) {
  constexpr T lowest = std::numeric_limits<T>::lowest();
  set_apart(row, plan);
  mask_ = scan_teacher_ ? lowest : -std::numeric_limits<T>::infinity();
  RowState state = scan(row);
  if (scan_teacher_ && (state.max.student == lowest || state.max.teacher == lowest)) {
    mask_ = -std::numeric_limits<T>::infinity();
    state = scan(row);
  }
  return state;
}

// exp(x / T) of a few numbers x <= 0, in place, in whole vectors.
template <class T>
inline void exponentials_in_place(T* x, int count, const Base<T>& base) {
  for (int j = count; j % kLanes<T> != 0; ++j) x[j] = std::numeric_limits<T>::lowest();
  for (int j = 0; j < count; j += kLanes<T>) {
    const Vec<T> d[1] = {load(x + j)};
    Vec<T> e[1];
    exp2(d, base.c, base.lowest, e);
    store(x + j, e[0]);
  }
}

// After the scan: what it found is the rest's. The sum for cross-entropy gets the classes apart back.
template <class T>
void RowKernel<T>::add_apart(RowState& state) {
  state.whole_max = double(state.max.student);
  for (const Apart& a : apart_) state.whole_max = std::max(state.whole_max, double(a.student));
  if (!hard_) return;
  state.whole_sum = state.sums.hard * std::exp(double(state.max.student) - state.whole_max);
  const int count = int(apart_.size());
  for (int k = 0; k < count; ++k) h_[k] = apart_[size_t(k)].student - T(state.whole_max);
  exponentials_in_place(h_, count, hard_base_);
  for (int k = 0; k < count; ++k) {
    apart_[size_t(k)].hard = double(h_[k]);
    state.whole_sum += double(h_[k]);
  }
}

// Value and sum of h over the outcomes, whose h goes into h_.
template <class T>
template <class D>
PointSums RowKernel<T>::outcomes(int count) {
  const double beta = options_.beta, rest = 1 - beta;
  const T reference = T(D::reference(double(log_ratio_[std::max_element(q_, q_ + count) - q_]), beta, rest));
  double value = 0, h_sum = 0;
  for (int j = 0; j < count; j += kLanes<T>) {
    using One = Pack<1, T>;
    const Point<One> x{One{load(p_ + j)},      One{load(q_ + j)},    One{load(log_ratio_ + j)},
                       One{set<T>(reference)}, One{set<T>(T(beta))}, One{set<T>(T(rest))}};
    const Vec<T> v = D::value(x).v[0], h = D::d_log_q(x).v[0];
    store(h_ + j, h);
    for (int i = 0; i < kLanes<T> && j + i < count; ++i) value += double(v[i]), h_sum += double(h[i]);
  }
  return {value, h_sum};
}

// The divergence of the k classes and the rest as one more outcome. Without a log-partition the rest has p = 0:
// every divergence that is finite there is proportional to q then, so one outcome stands for all of its classes.
template <class T>
double RowKernel<T>::topk_term(int64_t row, double scale, RowState& state, Factors& factors) {
  const int rest = int(apart_.size());
  double teacher_max = -std::numeric_limits<double>::infinity();
  for (const Apart& a : apart_) teacher_max = std::max(teacher_max, double(a.teacher));
  double student_sum = state.sums.student * std::exp((double(state.max.student) - state.whole_max) / temperature_);
  double teacher_sum = 0;
  for (int k = 0; k < rest; ++k) {
    const Apart& a = apart_[size_t(k)];
    q_[k] = a.student - T(state.whole_max), p_[k] = a.teacher - T(teacher_max);
  }
  exponentials_in_place(q_, rest, soft_base_);
  exponentials_in_place(p_, rest, soft_base_);
  for (int k = 0; k < rest; ++k) {
    student_sum += double(q_[k]);
    // The mass of the rest is what these lack of 1: in float they could be off by more.
    teacher_sum += batch_.log_partitions
                       ? std::exp((double(apart_[size_t(k)].teacher) - teacher_max) / temperature_)
                       : double(p_[k]);
  }
  const double log_student_sum = std::log(student_sum), log_teacher_sum = std::log(teacher_sum);
  state.student_ordered = student_sum > 0, state.teacher_ordered = teacher_sum > 0;
  double log_partition = log_teacher_sum, rest_mass = 0;  // of the teacher's logits less their maximum
  if (batch_.log_partitions) {
    log_partition = batch_.log_partitions[row] - teacher_max / temperature_;
    rest_mass = std::max(0.0, -std::expm1(log_teacher_sum - log_partition));
    if (std::isnan(log_partition)) rest_mass = log_partition;
  }
  if (!(student_sum > 0 && teacher_sum > 0)) return std::numeric_limits<double>::quiet_NaN();  // no softmax
  // Equal logits of all classes must give equal probabilities to the bit.
  const double by_student = 1 / student_sum;
  const double by_teacher = batch_.log_partitions ? std::exp(-log_partition) : 1 / teacher_sum;
  for (int k = 0; k < rest; ++k) {
    const Apart& a = apart_[size_t(k)];
    const double log_q = (double(a.student) - state.whole_max) / temperature_ - log_student_sum;
    const double log_p = (double(a.teacher) - teacher_max) / temperature_ - log_partition;
    q_[k] = T(double(q_[k]) * by_student), p_[k] = T(double(p_[k]) * by_teacher), log_ratio_[k] = T(log_q - log_p);
  }
  const double log_q_rest = (double(state.max.student) - state.whole_max) / temperature_ +
                            std::log(state.sums.student) - log_student_sum;
  p_[rest] = T(rest_mass), q_[rest] = T(std::exp(log_q_rest));
  log_ratio_[rest] = T(log_q_rest - std::log(rest_mass));
  for (int k = rest + 1; k % kLanes<T> != 0; ++k) p_[k] = q_[k] = log_ratio_[k] = 0;

  PointSums points;
  switch (options_.divergence) {
#define DIVERGENCE(name, type)         \
  case Divergence::name:               \
    points = outcomes<type>(rest + 1); \
    break;
#include "divergences.def"
#undef DIVERGENCE
    case Divergence::mse:
    case Divergence::dkd:
      break;  // refused by Python
  }
  if (!std::isfinite(points.h)) points.h = std::numeric_limits<double>::quiet_NaN();
  for (int k = 0; k < rest; ++k) apart_[size_t(k)].gradient = scale * (double(h_[k]) - double(q_[k]) * points.h);
  if (state.sums.student != 0)
    factors.student = scale * (double(h_[rest]) - std::exp(log_q_rest) * points.h) / state.sums.student;
  return points.value;
}

// log(sigmoid(x)).
inline double log_sigmoid(double x) { return std::min(x, 0.0) - std::log1p(std::exp(-std::abs(x))); }

// KL of (label, rest), and beta times the KL within the rest. The log-odds of the label say all about the first.
template <class T>
double RowKernel<T>::dkd_term(double scale, RowState& state, Factors& factors) {
  const Sums& sums = state.sums;
  Apart& label = apart_.front();
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
  state.student_ordered = !std::isnan(student);
  state.teacher_ordered = !std::isnan(teacher);
  double beta = 0;  // without mass among the others there is nothing to compare
  if (sums.teacher != 0) {
    beta = batch_.classes == 2 ? 0 : options_.beta;  // a single other class has no gradient within itself
    const double within = sums.student == 0
                              ? infinity
                              : sums.cross / (sums.teacher * temperature_) + std::log(sums.student / sums.teacher);
    value += term(options_.beta, within);
    factors.third = -scale * beta / sums.teacher;
  }
  if (sums.student != 0) factors.student = scale * (p - q + beta) / sums.student;
  label.gradient = scale * (q - p);
  return value;
}

}  // namespace
}  // namespace pydistill::PYDISTILL_ISA
