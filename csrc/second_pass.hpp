// The second pass over a row, which uses the exponentials and sums of the scan: pointwise divergences, and mse.
#pragma once

#include "divergences.hpp"
#include "row_kernel.hpp"

namespace pydistill::PYDISTILL_ISA {
namespace {

// Numbers of a row from which, with its exponentials and logits, probabilities and log-ratios are computed.
template <class T>
struct Normaliser {
  T student_max, teacher_max, inverse_temperature;
  T log_sum_ratio;          // log(sum of the student's exponentials / sum of the teacher's)
  double log_ratio_at_max;  // log q - log p of the student's largest class
  double beta, one_minus_beta;
};

// Value and sum of h over one block. h overwrites the teacher's exponentials. The exponentials of this block,
// times student_factor and teacher_factor, are the probabilities. gnu::flatten inlines all calls; without it value
// and h do not share common subexpressions, and the pass takes three times as long.
template <class D, class T>
[[gnu::flatten]] inline PointSums pointwise(const T* s, const T* t, int n, const Normaliser<T>& z,
                                            T student_factor, T teacher_factor, const Scratch<T>& scratch) {
  const Vec<T> student_max = set<T>(z.student_max), teacher_max = set<T>(z.teacher_max);
  const Vec<T> inverse = set<T>(z.inverse_temperature), log_sum_ratio = set<T>(z.log_sum_ratio);
  const Vec<T> by_student = set<T>(student_factor), by_teacher = set<T>(teacher_factor);
  const Vec<T> reference = set<T>(T(D::reference(z.log_ratio_at_max, z.beta, z.one_minus_beta)));
  const Vec<T> beta = set<T>(T(z.beta)), one_minus_beta = set<T>(T(z.one_minus_beta));
  Vec<T> value = set<T>(0), h_sum = value;
  for_each<T>(n, 0, [&](int start, int k, auto width) {
    constexpr int w = width;
    Point<Pack<w, T>> x;
    for (int i = 0; i < w; ++i) {
      const int j = start + i * kLanes<T>;
      const Vec<T> shifted = (load(s + j, k) - student_max) - (load(t + j, k) - teacher_max);
      x.p.v[i] = load(scratch.teacher_exp + j) * by_teacher;
      x.q.v[i] = load(scratch.student_exp + j) * by_student;
      x.log_ratio.v[i] = shifted * inverse - log_sum_ratio;
      x.reference.v[i] = reference, x.beta.v[i] = beta, x.one_minus_beta.v[i] = one_minus_beta;
    }
    Pack<w, T> v = D::value(x), h = D::d_log_q(x);
    for (int i = 0; i < w; ++i) {
      if (k != kLanes<T>) v.v[i] = first(v.v[i], k), h.v[i] = first(h.v[i], k);
      value = value + v.v[i];
      h_sum = h_sum + h.v[i];
      store(scratch.derivative() + start + i * kLanes<T>, h.v[i]);
    }
  });
  return {sum(value), sum(h_sum)};
}

template <class T>
PointSums RowKernel<T>::pointwise_pass(int64_t row, const RowState& state) {
  Normaliser<T> z{state.max.student,
                  state.max.teacher,
                  T(1 / temperature_),
                  T(std::log(state.sums.student / state.sums.teacher)),
                  0,
                  options_.beta,
                  1 - options_.beta};
  const int64_t best = argmax(batch_.student, row, state.student_max_block, state.max.student);
  T at_best = 0;
  if (best < batch_.classes) read_block(batch_.teacher.at(row, best), batch_.teacher.dtype, 1, &at_best);
  z.log_ratio_at_max = (double(z.teacher_max) - double(at_best)) / temperature_ - double(z.log_sum_ratio);
  PointSums total;
  for (int64_t begin = 0, b = 0; begin < batch_.classes; begin += kBlock<T>, ++b) {
    const int n = block_size(begin);
    const T* s = read(batch_.student, row, begin, n, student_buffer_);
    const T* t = read(batch_.teacher, row, begin, n, teacher_buffer_);
    const auto factor = [&](T block_max, T max, double sum) {
      return T(std::exp2((double(block_max) - double(max)) * std::numbers::log2e / temperature_) / sum);
    };
    const T student_factor = factor(block_max_[b].student, state.max.student, state.sums.student);
    const T teacher_factor = factor(block_max_[b].teacher, state.max.teacher, state.sums.teacher);
    PointSums sums;
    switch (options_.divergence) {
#define DIVERGENCE(name, type)                                                             \
  case Divergence::name:                                                                   \
    sums = pointwise<type>(s, t, n, z, student_factor, teacher_factor, scratch_at(begin)); \
    break;
#include "divergences.def"
#undef DIVERGENCE
      case Divergence::mse:
      case Divergence::dkd:
        break;  // neither is pointwise
    }
    total.value += sums.value;
    total.h += sums.h;
  }
  return total;
}

// The sum of (s - t)^2 over one block. A class whose logit is -inf in both adds 0. The differences are stored
// unless `difference` is null.
template <class T>
inline T squared_difference(const T* s, const T* t, int n, T* difference) {
  Vec<T> total = set<T>(0);
  for_each<T>(n, 0, [&](int start, int k, auto width) {
    for (int i = 0; i < width; ++i) {
      const int j = start + i * kLanes<T>;
      const Vec<T> a = load(s + j, k), b = load(t + j, k), masked = set<T>(-std::numeric_limits<T>::infinity());
      Vec<T> d = where_equal(a, masked, where_equal(b, masked, set<T>(0), a - b), a - b);
      if (k != kLanes<T>) d = first(d, k);
      total = fma(d, d, total);
      if (difference) store(difference + j, d);
    }
  });
  return sum(total);
}

template <class T>
double RowKernel<T>::mse_pass(int64_t row, RowState& state) {
  double total = 0;
  for (int64_t begin = 0; begin < batch_.classes; begin += kBlock<T>) {
    const int n = block_size(begin);
    const T* s = read(batch_.student, row, begin, n, student_buffer_);
    const T* t = read(batch_.teacher, row, begin, n, teacher_buffer_);
    total += squared_difference(s, t, n, want_gradient_ ? scratch_at(begin).derivative() : nullptr);
    if (!batch_.want_metrics) continue;
    const T max = block_maximum(t, n, state.max.teacher);  // the scan does not read the teacher
    if (max > state.max.teacher || begin == 0) state.max.teacher = max, state.teacher_max_block = begin;
  }
  state.teacher_valid = !std::isnan(total);
  return total / double(batch_.classes);
}

}  // namespace
}  // namespace pydistill::PYDISTILL_ISA
