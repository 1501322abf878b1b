// The gradient of a row, computed from the scratch arrays that the passes filled.
#pragma once

#include "row_kernel.hpp"

namespace pydistill::PYDISTILL_ISA {
namespace {

// Replaces h_j by h_j - q_j * h_sum, for the classes j of one block.
template <class T>
inline void centre(const Scratch<T>& scratch, int n, T student_factor, T h_sum) {
  for_each<T>(n, 0, [&](int start, int, auto width) {
    for (int i = 0; i < width; ++i) {
      const int j = start + i * kLanes<T>;
      const Vec<T> q = load(scratch.student_exp + j) * set<T>(student_factor);
      store(scratch.derivative() + j, fma(set<T>(-h_sum), q, load(scratch.derivative() + j)));
    }
  });
}

// exp(s - max) from e = exp((s - max) / T), for T = 1, 2 or 4.
template <HardExp H, class T>
inline Vec<T> power(Vec<T> e) {
  if constexpr (H == HardExp::same) return e;
  const Vec<T> square = e * e;
  if constexpr (H == HardExp::square) return square;
  return square * square;
}

// Writes the gradient of one block: the sum that BlockFactors defines, without in.derivative() unless kDerivative
// is set.
template <class T, HardExp H, bool kDerivative>
inline void write_gradient(const Scratch<T>& in, int n, const BlockFactors<T>& by, bool past_cache, T* out) {
  // Copies: otherwise the compiler would have to assume that the stores change the factors.
  const Vec<T> student_exp = set<T>(by.student_exp), derivative = set<T>(by.derivative);
  const Vec<T> hard_exp = set<T>(by.hard_exp), constant = set<T>(by.constant), smooth = set<T>(-by.smooth);
  const T* class_weight = by.class_weight;
  const auto value = [=](int j, int k) {
    Vec<T> r = constant;
    if constexpr (kDerivative) r = fma(derivative, load(in.derivative() + j), r);
    const Vec<T> e = load(in.student_exp + j);
    if constexpr (H == HardExp::own) r = fma(hard_exp, load(in.hard_exp + j), r);
    if constexpr (H == HardExp::square || H == HardExp::fourth) r = fma(hard_exp, power<H>(e), r);
    r = fma(student_exp, e, r);
    if (class_weight) r = fma(smooth, load(class_weight + j, k), r);
    return r;
  };
  const uintptr_t address = reinterpret_cast<uintptr_t>(out);
  if (!past_cache || address % sizeof(T) != 0)
    return for_each<T>(n, 0, [&](int j, int k, auto width) {
      for (int i = 0; i < width; ++i) store(out + j + i * kLanes<T>, value(j + i * kLanes<T>, k), k);
    });
  const int misaligned = int(address % kVecBytes / sizeof(T));
  const int head = misaligned ? std::min(n, kLanes<T> - misaligned) : 0;
  for_each<T>(n, head, [&](int j, int k, auto width) {
    if (k != kLanes<T>) return store_first(out + j, value(j, k), k);
    for (int i = 0; i < width; ++i) stream(out + j + i * kLanes<T>, value(j + i * kLanes<T>, k));
  });
}

template <class T>
void RowKernel<T>::combine(const Scratch<T>& in, int n, const BlockFactors<T>& by, bool past_cache, T* out) const {
  const auto pass = [&]<HardExp H>() {
    has_derivative_ ? write_gradient<T, H, true>(in, n, by, past_cache, out)
                    : write_gradient<T, H, false>(in, n, by, past_cache, out);
  };
  switch (hard_exp_) {
    case HardExp::none:
      return pass.template operator()<HardExp::none>();
    case HardExp::same:
      return pass.template operator()<HardExp::same>();
    case HardExp::square:
      return pass.template operator()<HardExp::square>();
    case HardExp::fourth:
      return pass.template operator()<HardExp::fourth>();
    case HardExp::own:
      return pass.template operator()<HardExp::own>();
  }
}

template <class T>
typename RowKernel<T>::HardGradient RowKernel<T>::hard_gradient(const RowPlan& plan) const {
  HardGradient hard;
  hard.present = has_hard_ && plan.label >= 0;
  const double smoothing = hard.present ? options_.label_smoothing : 0;
  const double label_weight = !hard.present ? 0 : class_weight_ ? double(class_weight_[plan.label]) : 1;
  hard.scale = plan.hard_scale;
  hard.uniform = smoothing / double(batch_.classes);
  hard.total = (1 - smoothing) * label_weight + hard.uniform * class_weight_sum_;
  hard.onehot = plan.hard_scale * (1 - smoothing) * label_weight;
  hard.weighted_smoothing = class_weight_ && smoothing > 0;
  return hard;
}

template <class T>
double RowKernel<T>::gradient_of(const ListedClass& listed, const HardGradient& hard, const RowPlan& plan,
                                 const RowState& state) const {
  if (!hard.present) return listed.gradient;
  const double share = hard.weighted_smoothing ? hard.uniform * double(class_weight_[listed.index]) : hard.uniform;
  const double softmax = listed.hard_exp / state.full_sum;
  return listed.gradient +
         (hard.scale * (hard.total * softmax - share) - (listed.index == plan.label ? hard.onehot : 0));
}

template <class T>
void RowKernel<T>::write_row(int64_t row, const RowPlan& plan, const RowState& state, double h_sum,
                             Factors factors) {
  const HardGradient hard = hard_gradient(plan);
  const double unlisted_share = listed_.empty() ? 1 : std::exp(double(state.max.student) - state.full_max);
  factors.hard_exp = hard.present ? hard.scale * hard.total * unlisted_share / state.full_sum : 0;
  // h is centred in scratch memory, before any other factor is applied. If q_j is near 1, h_j and q_j * h_sum
  // cancel. In float32 the result is exact only if neither of them has been multiplied by a rounded factor.
  const bool centred = soft_term_ == SoftTerm::pointwise;
  auto listed = listed_.begin();

  for (int64_t begin = 0, b = 0; begin < batch_.classes; begin += kBlock<T>, ++b) {
    const int n = block_size(begin);
    // The exponentials refer to the running maximum of their block. The factors rescale them to that of the row.
    const double student_drop = (double(block_max_[b].student) - double(state.max.student)) * std::numbers::log2e;
    const double teacher_drop = (double(block_max_[b].teacher) - double(state.max.teacher)) * std::numbers::log2e;
    const double fs = student_drop == 0 ? 1 : std::exp2(student_drop / temperature_);
    const double ft = centred || teacher_drop == 0 ? 1 : std::exp2(teacher_drop / temperature_);
    const double fh = student_drop == 0 ? 1 : std::exp2(student_drop);
    BlockFactors<T> by{T(factors.student_exp * fs),  T(factors.derivative * (scan_teacher_ ? ft : 1)),
                       T(factors.hard_exp * fh),     T(hard.weighted_smoothing ? 0 : -hard.scale * hard.uniform),
                       T(hard.scale * hard.uniform), hard.weighted_smoothing ? class_weight_ + begin : nullptr};
    if (hard_exp_ == HardExp::same) by.student_exp = T((factors.student_exp + factors.hard_exp) * fs);

    if (centred) centre(scratch_at(begin), n, T(fs / state.sums.student), T(h_sum));
    char* memory = batch_.gradient.at(row, begin);
    const bool direct = batch_.gradient.dtype == kComputeDType<T>;
    T* out = direct ? reinterpret_cast<T*>(memory) : gradient_buffer_;
    combine(scratch_at(begin), n, by, direct && past_cache_, out);
    if (hard.present && plan.label >= begin && plan.label < begin + n) {
      // The value is computed again, because a read would have to wait until a streaming store has reached memory.
      T at_label;
      if (by.class_weight) by.class_weight = class_weight_ + plan.label;
      combine(scratch_at(plan.label), 1, by, false, &at_label);
      out[plan.label - begin] = at_label - T(hard.onehot);
    }
    for (; listed != listed_.end() && listed->index < begin + n; ++listed)
      out[listed->index - begin] = T(gradient_of(*listed, hard, plan, state));
    if constexpr (std::is_same_v<T, float>)
      if (!direct) write_block(out, batch_.gradient.dtype, n, memory);
  }
}

}  // namespace
}  // namespace pydistill::PYDISTILL_ISA
