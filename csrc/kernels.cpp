// The row kernel. Compiled once per ISA, each into a namespace of its own (PYDISTILL_ISA).
//
// What it claims, for a row of C classes: one read of the student's and the teacher's logits from memory, one
// write of the gradient; the exponentials are computed once, against the running maximum, and wait in a scratch
// row (L2) for the row's sums. forward_kl needs no more than that. The other divergences look at the row once
// more, in cache, for log p and log q.
//
// NaN: a logit of NaN or +inf, or a row of -inf only, makes the sums NaN and with them the row, as in torch.
#include <algorithm>
#include <memory>
#include <new>
#include <utility>

#include "rows.hpp"

namespace pydistill::PYDISTILL_ISA {
namespace {

constexpr double kLog2e = 1.4426950408889634;

template <class T>
class RowKernel {
 public:
  RowKernel(const RowBatch& batch, bool past_cache);
  RowOutcome run(int64_t row, const RowPlan& plan);

 private:
  static constexpr int block = kBlock<T>;

  struct Running {
    T student = std::numeric_limits<T>::lowest(), teacher = std::numeric_limits<T>::lowest();
  };
  struct RowState {
    Sums sums;
    Running max;
    int64_t student_block = 0, teacher_block = 0;  // where the maxima are
  };

  const T* read(const Matrix& m, int64_t row, int64_t begin, int n, T* buffer) const;
  RowState scan(int64_t row);
  template <HardExp H, bool kSoft>
  Sums scan_block(const T* s, const T* t, int64_t begin, int n, const Running& max, int64_t row);
  void rescale(RowState& state, const Running& max) const;
  PointSums second_pass(int64_t row, const RowState& state);
  double cross_entropy(int64_t row, const RowPlan& plan, const RowState& state);
  void write(int64_t row, const RowPlan& plan, const RowState& state, double h_sum);
  int64_t argmax(const Matrix& m, int64_t row, int64_t begin, T max);
  Scratch<T> scratch_at(int64_t begin) const {
    return {scratch_.student + begin, scratch_.teacher + begin, scratch_.hard + begin};
  }
  int count(int64_t begin) const { return int(std::min<int64_t>(block, batch_.classes - begin)); }

  const RowBatch& batch_;
  const LossOptions& options_;
  const T* class_weight_;
  double class_weight_sum_ = 0;
  bool soft_, hard_, write_, keep_, shortcut_, past_cache_;
  HardExp hard_exp_;
  double temperature_;
  Base<T> soft_base_, hard_base_;
  std::unique_ptr<T[], void (*)(T*)> memory_;
  Scratch<T> scratch_;
  T *student_block_, *teacher_block_, *out_block_;
  Running* block_max_;
};

template <class T>
T* aligned_array(int64_t n) {
  return static_cast<T*>(::operator new(size_t(n) * sizeof(T), std::align_val_t(64)));
}
template <class T>
void free_aligned(T* p) {
  ::operator delete(p, std::align_val_t(64));
}

HardExp how_to_exponentiate(bool soft, bool hard, double temperature) {
  if (!hard) return HardExp::none;
  if (!soft || temperature == 1) return HardExp::same;
  return temperature == 2 ? HardExp::square : temperature == 4 ? HardExp::fourth : HardExp::own;
}

template <class T>
RowKernel<T>::RowKernel(const RowBatch& batch, bool past_cache)
    : batch_(batch),
      options_(batch.options),
      class_weight_(static_cast<const T*>(batch.class_weight)),
      soft_(batch.options.alpha > 0),
      hard_(batch.options.alpha < 1),
      write_(batch.gradient.data != nullptr),
      shortcut_(!soft_ || batch.options.divergence == Divergence::forward_kl),
      past_cache_(past_cache),
      hard_exp_(how_to_exponentiate(soft_, hard_, batch.options.temperature)),
      temperature_(soft_ ? batch.options.temperature : 1),
      soft_base_(temperature_),
      hard_base_(1),
      memory_(nullptr, free_aligned<T>) {
  keep_ = write_ || !shortcut_;
  // Rows end in whole pairs of vectors; a small row is a small allocation, which a small batch notices.
  const int64_t blocks = (batch.classes + block - 1) / block;
  const int64_t padded = (batch.classes + 2 * kLanes<T> - 1) / (2 * kLanes<T>) * (2 * kLanes<T>);
  const int64_t row = keep_ ? padded : 0, one_block = std::min<int64_t>(block, padded);
  memory_.reset(aligned_array<T>(3 * row + 3 * one_block + 2 * blocks));
  T* p = memory_.get();
  scratch_ = {p, p + row, p + 2 * row};
  p += 3 * row;
  student_block_ = p, teacher_block_ = p + one_block, out_block_ = p + 2 * one_block;
  block_max_ = reinterpret_cast<Running*>(p + 3 * one_block);
  if (class_weight_)
    for (int64_t j = 0; j < batch.classes; ++j) class_weight_sum_ += class_weight_[j];
  else
    class_weight_sum_ = double(batch.classes);
}

// A block in the compute type: memory itself, or converted into `buffer`.
template <class T>
const T* RowKernel<T>::read(const Matrix& m, int64_t row, int64_t begin, int n, T* buffer) const {
  const char* from = m.at(row, begin);
  if (m.dtype == (sizeof(T) == 8 ? DType::float64 : DType::float32)) return reinterpret_cast<const T*>(from);
  read_block(from, m.dtype, n, buffer);
  return buffer;
}

// The sums refer to the maxima so far; let them refer to new ones. Equal rows rise together: their cross sum stays
// 0.
template <class T>
void RowKernel<T>::rescale(RowState& state, const Running& max) const {
  Sums& sums = state.sums;
  const double student_rise = double(max.student) - double(state.max.student);
  const double teacher_rise = double(max.teacher) - double(state.max.teacher);
  if (student_rise > 0 || teacher_rise > 0) {
    const double factor = std::exp2(-teacher_rise * kLog2e / temperature_);
    sums.cross = factor == 0 ? 0 : factor * (sums.cross + sums.teacher * (student_rise - teacher_rise));
    sums.teacher *= factor;
    sums.student *= std::exp2(-student_rise * kLog2e / temperature_);
    sums.hard *= std::exp2(-student_rise * kLog2e);
  }
  state.max = max;
}

template <class T>
template <HardExp H, bool kSoft>
Sums RowKernel<T>::scan_block(const T* s, const T* t, int64_t begin, int n, const Running& max, int64_t row) {
  const auto pass = [&]<bool kKeep, bool kMasked>() {
    return exponentials<T, H, kSoft, kKeep, kMasked>(
        s, t, n, max.student, max.teacher, soft_base_, hard_base_, scratch_at(begin),
        batch_.student.at(row, begin + block), size_of(batch_.student.dtype),
        kSoft ? batch_.teacher.at(row, begin + block) : nullptr, size_of(batch_.teacher.dtype));
  };
  Sums sums = keep_ ? pass.template operator()<true, false>() : pass.template operator()<false, false>();
  // An infinite or NaN cross sum: perhaps 0 * inf at a masked class.
  if (kSoft && !std::isfinite(sums.cross))
    sums.cross = (keep_ ? pass.template operator()<true, true>() : pass.template operator()<false, true>()).cross;
  return sums;
}

template <class T>
typename RowKernel<T>::RowState RowKernel<T>::scan(int64_t row) {
  RowState state;
  for (int64_t begin = 0, b = 0; begin < batch_.classes; begin += block, ++b) {
    const int n = count(begin);
    const T* s = read(batch_.student, row, begin, n, student_block_);
    const T* t = soft_ ? read(batch_.teacher, row, begin, n, teacher_block_) : nullptr;
    Running max{block_maximum(s, n, state.max.student), soft_ ? block_maximum(t, n, state.max.teacher) : T(0)};
    if (max.student > state.max.student) state.student_block = begin;
    if (max.teacher > state.max.teacher) state.teacher_block = begin;
    if (b == 0) state.max = max;
    rescale(state, max);
    block_max_[b] = max;
    Sums sums;
    switch (hard_exp_) {
      case HardExp::none:
        sums = scan_block<HardExp::none, true>(s, t, begin, n, max, row);
        break;
      case HardExp::same:
        sums = soft_ ? scan_block<HardExp::same, true>(s, t, begin, n, max, row)
                     : scan_block<HardExp::same, false>(s, t, begin, n, max, row);
        break;
      case HardExp::square:
        sums = scan_block<HardExp::square, true>(s, t, begin, n, max, row);
        break;
      case HardExp::fourth:
        sums = scan_block<HardExp::fourth, true>(s, t, begin, n, max, row);
        break;
      case HardExp::own:
        sums = scan_block<HardExp::own, true>(s, t, begin, n, max, row);
        break;
    }
    state.sums.student += sums.student;
    state.sums.teacher += sums.teacher;
    state.sums.cross += sums.cross;
    state.sums.hard += sums.hard;
  }
  return state;
}

template <class T>
PointSums RowKernel<T>::second_pass(int64_t row, const RowState& state) {
  const Normaliser<T> z{state.max.student, state.max.teacher, T(1 / temperature_),
                        T(std::log(state.sums.student / state.sums.teacher))};
  PointSums total;
  for (int64_t begin = 0, b = 0; begin < batch_.classes; begin += block, ++b) {
    const int n = count(begin);
    const T* s = read(batch_.student, row, begin, n, student_block_);
    const T* t = read(batch_.teacher, row, begin, n, teacher_block_);
    const auto factor = [&](T block_max, T max, double sum) {
      return T(std::exp2((double(block_max) - double(max)) * kLog2e / temperature_) / sum);
    };
    const T fs = factor(block_max_[b].student, state.max.student, state.sums.student);
    const T ft = factor(block_max_[b].teacher, state.max.teacher, state.sums.teacher);
    PointSums sums;
    switch (options_.divergence) {
#define DIVERGENCE(name, type)                                     \
  case Divergence::name:                                           \
    sums = pointwise<type>(s, t, n, z, fs, ft, scratch_at(begin)); \
    break;
#include "divergences.def"
#undef DIVERGENCE
    }
    total.value += sums.value;
    total.h += sums.h;
  }
  return total;
}

// torch's value for this row under reduction="none", class weight and label smoothing included.
template <class T>
double RowKernel<T>::cross_entropy(int64_t row, const RowPlan& plan, const RowState& state) {
  const double log_sum = std::log(state.sums.hard), max = double(state.max.student);
  T logit = 0;
  read_block(batch_.student.at(row, plan.label), batch_.student.dtype, 1, &logit);
  const double weight = class_weight_ ? double(class_weight_[plan.label]) : 1;
  const double smoothing = options_.label_smoothing;
  const double nll = weight * (max - double(logit) + log_sum);
  if (smoothing == 0) return nll;
  double shifted = 0;  // sum of class_weight * (s - max)
  for (int64_t begin = 0; begin < batch_.classes; begin += block) {
    const int n = count(begin);
    const T* s = read(batch_.student, row, begin, n, student_block_);
    Vec<T> total = set<T>(0);
    for_each<T>(n, 0, [&](int start, int k, auto width) {
      for (int i = 0; i < width; ++i) {
        const int j = start + i * kLanes<T>;
        Vec<T> x = load(s + j, k) - set<T>(state.max.student);
        if (class_weight_) x = x * load(class_weight_ + begin + j, k);
        total = total + (k == kLanes<T> ? x : first(x, k));
      }
    });
    shifted += sum(total);
  }
  const double smooth = (class_weight_sum_ * log_sum - shifted) / double(batch_.classes);
  return (1 - smoothing) * nll + smoothing * smooth;
}

template <class T>
void RowKernel<T>::write(int64_t row, const RowPlan& plan, const RowState& state, double h_sum) {
  const Sums& sums = state.sums;
  const double scale = plan.soft_scale * (options_.t_squared ? temperature_ : 1 / temperature_);
  const bool hard = hard_ && plan.label >= 0;
  const double smoothing = hard ? options_.label_smoothing : 0;
  const double label_weight = !hard ? 0 : class_weight_ ? double(class_weight_[plan.label]) : 1;
  const double uniform = smoothing / double(batch_.classes);
  const double hard_total = (1 - smoothing) * label_weight + uniform * class_weight_sum_;
  const double onehot = plan.hard_scale * (1 - smoothing) * label_weight;
  const bool weighted_smoothing = class_weight_ && smoothing > 0;

  // With the shortcut sum h is -1. Otherwise h is centred in scratch, before any factor: where q is near 1 the two
  // parts cancel, and in float32 only there exactly.
  const double student = soft_ && shortcut_ ? scale / sums.student : 0;
  const double third = shortcut_ ? -scale / sums.teacher : scale;
  const double hard_factor = hard ? plan.hard_scale * hard_total / sums.hard : 0;

  for (int64_t begin = 0, b = 0; begin < batch_.classes; begin += block, ++b) {
    const int n = count(begin);
    const double student_drop = (double(block_max_[b].student) - double(state.max.student)) * kLog2e;
    const double teacher_drop = (double(block_max_[b].teacher) - double(state.max.teacher)) * kLog2e;
    const double fs = student_drop == 0 ? 1 : std::exp2(student_drop / temperature_);
    const double ft = !shortcut_ || teacher_drop == 0 ? 1 : std::exp2(teacher_drop / temperature_);
    const double fh = student_drop == 0 ? 1 : std::exp2(student_drop);
    Coefficients<T> by{T(student * fs),
                       T(third * ft),
                       T(hard_factor * fh),
                       T(weighted_smoothing ? 0 : -plan.hard_scale * uniform),
                       T(plan.hard_scale * uniform),
                       weighted_smoothing ? class_weight_ + begin : nullptr};
    if (hard_exp_ == HardExp::same) by.student = T((student + hard_factor) * fs);

    if (!shortcut_) centre(scratch_at(begin), n, T(fs / sums.student), T(h_sum));
    char* memory = batch_.gradient.at(row, begin);
    const bool direct = batch_.gradient.dtype == (sizeof(T) == 8 ? DType::float64 : DType::float32);
    T* out = direct ? reinterpret_cast<T*>(memory) : out_block_;
    const auto fill = [&](const Scratch<T>& in, int width, bool past_cache, T* to) {
      switch (hard_exp_) {
        case HardExp::none:
          return write_gradient<T, HardExp::none, true>(in, width, by, past_cache, to);
        case HardExp::same:
          return soft_ ? write_gradient<T, HardExp::same, true>(in, width, by, past_cache, to)
                       : write_gradient<T, HardExp::same, false>(in, width, by, past_cache, to);
        case HardExp::square:
          return write_gradient<T, HardExp::square, true>(in, width, by, past_cache, to);
        case HardExp::fourth:
          return write_gradient<T, HardExp::fourth, true>(in, width, by, past_cache, to);
        case HardExp::own:
          return write_gradient<T, HardExp::own, true>(in, width, by, past_cache, to);
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
    if constexpr (std::is_same_v<T, float>)
      if (!direct) write_block(out, batch_.gradient.dtype, n, memory);
  }
}

template <class T>
int64_t RowKernel<T>::argmax(const Matrix& m, int64_t row, int64_t begin, T max) {
  const int n = count(begin);
  const T* x = read(m, row, begin, n, student_block_);
  return begin + (std::find(x, x + n, max) - x);
}

template <class T>
RowOutcome RowKernel<T>::run(int64_t row, const RowPlan& plan) {
  RowOutcome outcome;
  const RowState state = scan(row);
  const Sums& sums = state.sums;
  const double units = options_.t_squared ? temperature_ * temperature_ : 1;
  double h_sum = -1;
  if (soft_ && shortcut_) {
    outcome.soft = units * (sums.cross / (sums.teacher * temperature_) + std::log(sums.student / sums.teacher));
  } else if (soft_) {
    const PointSums points = second_pass(row, state);
    outcome.soft = units * points.value;
    // An infinite h (reverse_kl where p is 0): the whole row's gradient is NaN, not a mixture of NaN and inf.
    h_sum = std::isfinite(points.h) ? points.h : std::numeric_limits<double>::quiet_NaN();
  }
  if (hard_ && plan.label >= 0) outcome.hard = cross_entropy(row, plan, state);
  if (batch_.want_argmax && sums.student > 0) {  // false for NaN
    const int64_t best = argmax(batch_.student, row, state.student_block, state.max.student);
    outcome.correct = best == plan.label;
    outcome.same_argmax =
        soft_ && sums.teacher > 0 && best == argmax(batch_.teacher, row, state.teacher_block, state.max.teacher);
  }
  if (write_) write(row, plan, state, h_sum);
  return outcome;
}

template <class T>
void run_rows(const RowBatch& batch, const RowPlan* plans, RowOutcome* outcomes, int64_t begin, int64_t end,
              bool past_cache) {
  const FlushDenormals flush;
  RowKernel<T> kernel(batch, past_cache);
  for (int64_t row = begin; row < end; ++row) {
    if (plans[row].weight != 0)
      outcomes[row] = kernel.run(row, plans[row]);
    else if (batch.gradient.data)
      std::memset(batch.gradient.at(row, 0), 0, size_t(batch.classes * size_of(batch.gradient.dtype)));
  }
  stream_fence();
}

}  // namespace

void run_rows(const RowBatch& batch, const RowPlan* plans, RowOutcome* outcomes, int64_t begin, int64_t end,
              bool past_cache) {
  batch.student.dtype == DType::float64 ? run_rows<double>(batch, plans, outcomes, begin, end, past_cache)
                                        : run_rows<float>(batch, plans, outcomes, begin, end, past_cache);
}

}  // namespace pydistill::PYDISTILL_ISA
