// The first pass over a row: maxima, exponentials and their sums, block by block.
#pragma once

#include <utility>

#include "row_kernel.hpp"

namespace pydistill::PYDISTILL_ISA {
namespace {

template <class T>
inline T block_maximum(const T* x, int n, T start) {
  Vec<T> a[2] = {set<T>(start), set<T>(start)};
  for_each<T>(n, 0, [&](int j, int k, auto width) {
    for (int i = 0; i < width; ++i) a[i] = max(a[i], load(x + j + i * kLanes<T>, k));
  });
  return maximum(max(a[0], a[1]));
}

// The exponentials of a block that is in L1, and their sums.
//
// If kTeacher is set, the teacher is exponentiated too. If kKeep is set, the exponentials are stored in `out`. If
// kMasked is set, a product 0 * inf counts as 0 in the cross sum; this is needed only if a logit is -inf.
// `ahead_s` and `ahead_t` point to the logits of the next block, which are prefetched; step_s and step_t are the
// sizes of their elements in bytes.
template <class T, HardExp H, bool kTeacher, bool kKeep, bool kMasked>
inline Sums exponentials(const T* s, const T* t, int n, T student_max, T teacher_max, const ExpBase<T>& soft,
                         const ExpBase<T>& hard, const Scratch<T>& out, const char* ahead_s, int64_t step_s,
                         const char* ahead_t, int64_t step_t) {
  const Vec<T> ms = set<T>(student_max), mt = set<T>(teacher_max), soft_c = soft.c, soft_lowest = soft.lowest;
  // Vectors per step. Four chains of dependent instructions overlap: 2 of the student and 2 of the teacher, or 4
  // of the student.
  constexpr int at_once = kTeacher ? 2 : 4;
  Vec<T> student[at_once], hard_sum[at_once], teacher[2] = {set<T>(0), set<T>(0)},
                                              cross[2] = {set<T>(0), set<T>(0)};
  for (int i = 0; i < at_once; ++i) student[i] = hard_sum[i] = set<T>(0);
  for_each<T, at_once>(n, 0, [&](int j, int k, auto width) {
    constexpr int w = width, lanes = kLanes<T>;
    const bool tail = k != lanes;
    prefetch(ahead_s + j * step_s);
    if constexpr (w * kVecBytes > 64) prefetch(ahead_s + (j + w / 2 * lanes) * step_s);
    if constexpr (kTeacher) prefetch(ahead_t + j * step_t);
    Vec<T> shifted[kTeacher ? 2 * w : w], e[kTeacher ? 2 * w : w];  // of the student, then of the teacher
    for (int i = 0; i < w; ++i) shifted[i] = load(s + j + i * lanes, k) - ms;
    if constexpr (kTeacher)
      for (int i = 0; i < w; ++i) shifted[w + i] = load(t + j + i * lanes, k) - mt;
    Vec<T> difference[w];  // before exp2(): otherwise the shifted logits would be spilled to the stack
    if constexpr (kTeacher)
      for (int i = 0; i < w; ++i) difference[i] = shifted[w + i] - shifted[i];
    exp2(shifted, soft_c, soft_lowest, e);
    for (int i = 0; i < w; ++i) {
      if (tail) e[i] = first(e[i], k);
      student[i] = student[i] + e[i];
      if constexpr (kKeep) store(out.student_exp + j + i * lanes, e[i]);
      if constexpr (H == HardExp::square || H == HardExp::fourth) {
        const Vec<T> root = H == HardExp::square ? e[i] : e[i] * e[i];
        hard_sum[i] = fma(root, root, hard_sum[i]);
      }
    }
    if constexpr (kTeacher)
      for (int i = 0; i < w; ++i) {
        Vec<T> f = e[w + i], d = difference[i];
        if (tail) f = first(f, k), d = first(d, k);
        teacher[i] = teacher[i] + f;
        cross[i] = kMasked ? cross[i] + times(f, d) : fma(f, d, cross[i]);
        if constexpr (kKeep) store(out.teacher_exp + j + i * lanes, f);
      }
    if constexpr (H == HardExp::own) {
      Vec<T> g[w], x[w];
      for (int i = 0; i < w; ++i) x[i] = shifted[i];
      exp2(x, hard.c, hard.lowest, g);
      for (int i = 0; i < w; ++i) {
        if (tail) g[i] = first(g[i], k);
        hard_sum[i] = hard_sum[i] + g[i];
        if constexpr (kKeep) store(out.hard_exp + j + i * lanes, g[i]);
      }
    }
  });
  for (int i = at_once / 2; i > 0; i /= 2)
    for (int k = 0; k < i; ++k)
      student[k] = student[k] + student[k + i], hard_sum[k] = hard_sum[k] + hard_sum[k + i];
  Sums r{sum(student[0]), sum(teacher[0] + teacher[1]), sum(cross[0] + cross[1]), sum(hard_sum[0])};
  if constexpr (H == HardExp::same) r.hard = r.student;
  return r;
}

// Prefetches the cache lines of the gradient, so that they arrive while the block is exponentiated.
template <class T>
void RowKernel<T>::prefetch_gradient(int64_t row, int64_t begin, int n) const {
  const char* end = batch_.gradient.at(row, begin + n);
  for (const char* p = batch_.gradient.at(row, begin); p < end; p += 64) prefetch_to_write(p);
}

// Rescales the sums so far to new maxima. If student and teacher are equal, their maxima rise together, and the
// cross sum stays 0.
template <class T>
void RowKernel<T>::rescale(RowState& state, const Maxima& max) const {
  Sums& sums = state.sums;
  const double student_rise = double(max.student) - double(state.max.student);
  const double teacher_rise = double(max.teacher) - double(state.max.teacher);
  if (student_rise > 0 || teacher_rise > 0) {
    const double factor = std::exp2(-teacher_rise * std::numbers::log2e / temperature_);
    sums.cross = factor == 0 ? 0 : factor * (sums.cross + sums.teacher * (student_rise - teacher_rise));
    sums.teacher *= factor;
    sums.student *= std::exp2(-student_rise * std::numbers::log2e / temperature_);
    sums.hard *= std::exp2(-student_rise * std::numbers::log2e);
  }
  state.max = max;
}

template <class T>
template <HardExp H, bool kTeacher>
Sums RowKernel<T>::scan_block(const T* s, const T* t, int64_t begin, int n, const Maxima& max, int64_t row) {
  const bool last = begin + kBlock<T> >= batch_.classes;
  const int64_t next_row = last ? row + 1 : row, next_begin = last ? 0 : begin + kBlock<T>;
  const auto pass = [&]<bool kKeep, bool kMasked>() {
    return exponentials<T, H, kTeacher, kKeep, kMasked>(
        s, t, n, max.student, max.teacher, soft_base_, hard_base_, scratch_at(begin),
        batch_.student.at(next_row, next_begin), size_of(batch_.student.dtype),
        kTeacher ? batch_.teacher.at(next_row, next_begin) : nullptr, size_of(batch_.teacher.dtype));
  };
  Sums sums = keep_exps_ ? pass.template operator()<true, false>() : pass.template operator()<false, false>();
  // The cross sum may be infinite or NaN because a logit is -inf. It is then computed again with kMasked.
  if (kTeacher && !std::isfinite(sums.cross))
    sums.cross =
        (keep_exps_ ? pass.template operator()<true, true>() : pass.template operator()<false, true>()).cross;
  return sums;
}

// The variant of scan_block for a kernel. It is chosen once per kernel: for a small row, a choice among ten
// inlined variants would take longer than the scan.
template <class T>
template <bool kTeacher>
typename RowKernel<T>::ScanBlock RowKernel<T>::scan_block_for(HardExp hard_exp) {
  switch (hard_exp) {
    case HardExp::none:
      return &RowKernel::scan_block<HardExp::none, kTeacher>;
    case HardExp::same:
      return &RowKernel::scan_block<HardExp::same, kTeacher>;
    case HardExp::square:
      return &RowKernel::scan_block<HardExp::square, kTeacher>;
    case HardExp::fourth:
      return &RowKernel::scan_block<HardExp::fourth, kTeacher>;
    case HardExp::own:
      return &RowKernel::scan_block<HardExp::own, kTeacher>;
  }
  return nullptr;
}

template <class T>
typename RowKernel<T>::RowState RowKernel<T>::scan(int64_t row) {
  RowState state;
  size_t next_listed = 0;
  for (int64_t begin = 0, b = 0; begin < batch_.classes; begin += kBlock<T>, ++b) {
    const int n = block_size(begin);
    const T *s = read(batch_.student, row, begin, n, student_buffer_), *t = nullptr;
    if (scan_teacher_) t = read(batch_.teacher, row, begin, n, teacher_buffer_);
    const size_t first_listed = next_listed;
    while (next_listed < listed_.size() && listed_[next_listed].index < begin + n) ++next_listed;
    const std::span<ListedClass> listed(listed_.data() + first_listed, next_listed - first_listed);
    if (!listed.empty()) {
      s = mask_listed(listed, s, begin, n, in_place_ ? const_cast<T*>(s) : student_buffer_, &ListedClass::student);
      if (t) t = mask_listed(listed, t, begin, n, teacher_buffer_, &ListedClass::teacher);
    }
    Maxima max{block_maximum(s, n, state.max.student),
               t ? block_maximum(t, n, state.max.teacher) : state.max.teacher};
    if (max.student > state.max.student) state.student_max_block = begin;
    if (max.teacher > state.max.teacher) state.teacher_max_block = begin;
    if (b == 0) state.max = max;
    rescale(state, max);
    block_max_[b] = max;
    if (want_gradient_ && !in_place_ && !past_cache_) prefetch_gradient(row, begin, n);
    const Sums sums = (this->*scan_block_)(s, t, begin, n, max, row);
    if (in_place_)  // restores the masked logits, because the cross-entropy and the argmax read the row again
      for (const ListedClass& c : listed) const_cast<T*>(s)[c.index - begin] = c.student;
    state.sums.student += sums.student;
    state.sums.teacher += sums.teacher;
    state.sums.cross += sums.cross;
    state.sums.hard += sums.hard;
  }
  state.full_max = double(state.max.student);
  state.full_sum = state.sums.hard;
  return state;
}

}  // namespace
}  // namespace pydistill::PYDISTILL_ISA
