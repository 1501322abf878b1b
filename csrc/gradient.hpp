// The gradient of a row.
#pragma once

#include "row_kernel.hpp"

namespace pydistill::PYDISTILL_ISA {
namespace {

// h_j - q_j * sum h, in place of h.
template <class T>
inline void centre(const Scratch<T>& scratch, int n, T student_factor, T h_sum) {
  for_each<T>(n, 0, [&](int start, int, auto width) {
    for (int i = 0; i < width; ++i) {
      const int j = start + i * kLanes<T>;
      const Vec<T> q = load(scratch.student + j) * set<T>(student_factor);
      store(scratch.teacher + j, fma(set<T>(-h_sum), q, load(scratch.teacher + j)));
    }
  });
}

// gradient_j = student * e_j + third * f_j + hard * exp(s_j - max) + constant - smooth * class_weight_j
template <class T>
struct Coefficients {
  T student, third, hard, constant, smooth;
  const T* class_weight;  // of this block; null where smooth is folded into constant
};
template <class T, HardExp H, bool kSoft>
inline void write_gradient(const Scratch<T>& in, int n, const Coefficients<T>& by, bool past_cache, T* out) {
  // Copies: the compiler must not think that what is stored could change them.
  const Vec<T> student = set<T>(by.student), third = set<T>(by.third), hard = set<T>(by.hard);
  const Vec<T> constant = set<T>(by.constant), smooth = set<T>(-by.smooth);
  const T* class_weight = by.class_weight;
  const auto value = [=](int j, int k) {
    Vec<T> r = constant;
    if constexpr (kSoft) r = fma(third, load(in.teacher + j), r);
    const Vec<T> e = load(in.student + j);
    if constexpr (H == HardExp::own) r = fma(hard, load(in.hard + j), r);
    if constexpr (H == HardExp::square || H == HardExp::fourth) r = fma(hard, power<H>(e), r);
    r = fma(student, e, r);
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
void RowKernel<T>::write(int64_t row, const RowPlan& plan, const RowState& state, double h_sum, Factors factors) {
  const bool hard = hard_ && plan.label >= 0;
  const double smoothing = hard ? options_.label_smoothing : 0;
  const double label_weight = !hard ? 0 : class_weight_ ? double(class_weight_[plan.label]) : 1;
  const double uniform = smoothing / double(batch_.classes);
  const double hard_total = (1 - smoothing) * label_weight + uniform * class_weight_sum_;
  const double onehot = plan.hard_scale * (1 - smoothing) * label_weight;
  const bool weighted_smoothing = class_weight_ && smoothing > 0;

  const double rest_share = apart_.empty() ? 1 : std::exp(double(state.max.student) - state.whole_max);
  factors.hard = hard ? plan.hard_scale * hard_total * rest_share / state.whole_sum : 0;
  // Centred in scratch, before any factor: where q is near 1 the two parts cancel, and in float32 only there
  // exactly.
  const bool centred = kind_ == Kind::pointwise;
  auto apart = apart_.begin();

  for (int64_t begin = 0, b = 0; begin < batch_.classes; begin += block, ++b) {
    const int n = count(begin);
    const double student_drop = (double(block_max_[b].student) - double(state.max.student)) * kLog2e;
    const double teacher_drop = (double(block_max_[b].teacher) - double(state.max.teacher)) * kLog2e;
    const double fs = student_drop == 0 ? 1 : std::exp2(student_drop / temperature_);
    const double ft = centred || teacher_drop == 0 ? 1 : std::exp2(teacher_drop / temperature_);
    const double fh = student_drop == 0 ? 1 : std::exp2(student_drop);
    Coefficients<T> by{T(factors.student * fs),      T(factors.third * (third_ && scan_teacher_ ? ft : 1)),
                       T(factors.hard * fh),         T(weighted_smoothing ? 0 : -plan.hard_scale * uniform),
                       T(plan.hard_scale * uniform), weighted_smoothing ? class_weight_ + begin : nullptr};
    if (hard_exp_ == HardExp::same) by.student = T((factors.student + factors.hard) * fs);

    if (centred) centre(scratch_at(begin), n, T(fs / state.sums.student), T(h_sum));
    char* memory = batch_.gradient.at(row, begin);
    const bool direct = batch_.gradient.dtype == (sizeof(T) == 8 ? DType::float64 : DType::float32);
    T* out = direct ? reinterpret_cast<T*>(memory) : out_block_;
    const auto fill = [&](const Scratch<T>& in, int width, bool past_cache, T* to) {
      const auto pass = [&]<HardExp H>() {
        third_ ? write_gradient<T, H, true>(in, width, by, past_cache, to)
               : write_gradient<T, H, false>(in, width, by, past_cache, to);
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
    };
    fill(scratch_at(begin), n, direct && past_cache_, out);
    if (hard && plan.label >= begin && plan.label < begin + n) {
      // Computed again instead of read back: what was streamed is on its way to memory.
      T at_label;
      if (by.class_weight) by.class_weight = class_weight_ + plan.label;
      fill(scratch_at(plan.label), 1, false, &at_label);
      out[plan.label - begin] = at_label - T(onehot);
    }
    for (; apart != apart_.end() && apart->index < begin + n; ++apart) {
      double g = apart->gradient;
      if (hard) {
        const double share = weighted_smoothing ? uniform * double(class_weight_[apart->index]) : uniform;
        const double softmax = apart->hard / state.whole_sum;
        g += plan.hard_scale * (hard_total * softmax - share) - (apart->index == plan.label ? onehot : 0);
      }
      out[apart->index - begin] = T(g);
    }
    if constexpr (std::is_same_v<T, float>)
      if (!direct) write_block(out, batch_.gradient.dtype, n, memory);
  }
}

}  // namespace
}  // namespace pydistill::PYDISTILL_ISA
