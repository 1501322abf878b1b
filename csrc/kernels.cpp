// The row kernel. Compiled once per ISA, each into a namespace of its own (PYDISTILL_ISA).
//
// What it claims, for a row of C classes: one read of the student's and the teacher's logits from memory, one
// write of the gradient; the exponentials are computed once, against the running maximum, and wait in a scratch
// row (L2) for the row's sums. forward_kl needs no more than that. The other divergences look at the row once
// more, in cache, for log p and log q. With a top-k teacher, and for dkd, some classes stand apart: apart.hpp.
//
// NaN: a logit of NaN or +inf, or a row of -inf only, makes the sums NaN and with them the row, as in torch.
#include <algorithm>
#include <memory>
#include <numeric>
#include <span>
#include <utility>

#include "rows.hpp"

namespace pydistill::PYDISTILL_ISA {
namespace {

constexpr double kLog2e = 1.4426950408889634;

// How the soft term of a row is computed.
enum class Kind { none, shortcut, pointwise, mse, topk, dkd };

inline Kind kind_of(const RowBatch& batch) {
  if (!batch.evaluates_soft()) return Kind::none;
  if (batch.options.divergence == Divergence::mse) return Kind::mse;
  if (batch.options.divergence == Divergence::dkd) return Kind::dkd;
  if (batch.teacher_indices) return Kind::topk;
  return batch.options.divergence == Divergence::forward_kl ? Kind::shortcut : Kind::pointwise;
}

// Arrays, one behind the other, in memory that was allocated before. Without memory it only adds up how much they
// take.
class Arena {
 public:
  explicit Arena(char* memory) : memory_(memory) {}
  bool measures() const { return memory_ == nullptr; }
  size_t used() const { return used_; }

  template <class T>
  T* take(int64_t n) {
    char* p = measures() ? nullptr : memory_ + used_;
    used_ += (size_t(n) * sizeof(T) + 63) / 64 * 64;
    return reinterpret_cast<T*>(p);
  }

 private:
  char* memory_;
  size_t used_ = 0;
};

template <class T>
class RowKernel {
 public:
  RowKernel(const RowBatch& batch, bool past_cache, Arena& arena);
  RowOutcome run(int64_t row, const RowPlan& plan);

 private:
  static constexpr int block = kBlock<T>;

  struct Running {
    T student = std::numeric_limits<T>::lowest(), teacher = std::numeric_limits<T>::lowest();
  };
  struct RowState {
    Sums sums;
    Running max;
    int64_t student_block = 0, teacher_block = 0;           // where the maxima are
    double whole_max = 0, whole_sum = 0;                    // of exp(s - whole_max), over all classes
    bool student_ordered = false, teacher_ordered = false;  // whether there is a maximum: no NaN, not all -inf
  };
  // What the gradient has of what waits in scratch: of exp((s - max) / T), of the third array, of exp(s - max).
  struct Factors {
    double student = 0, third = 0, hard = 0;
  };
  // A class that stands apart from the sums over a row.
  struct Apart {
    int64_t index;
    T student, teacher;
    double gradient;  // of the soft term
    double hard = 0;  // exp(student - whole_max)
  };

  const T* read(const Matrix& m, int64_t row, int64_t begin, int n, T* buffer) const;
  RowState scan(int64_t row);
  template <HardExp H, bool kSoft>
  Sums scan_block(const T* s, const T* t, int64_t begin, int n, const Running& max, int64_t row);
  using ScanBlock = Sums (RowKernel::*)(const T*, const T*, int64_t, int, const Running&, int64_t);
  template <bool kSoft>
  static ScanBlock scan_block_for(HardExp hard);
  void fetch_gradient(int64_t row, int64_t begin, int n) const;
  void rescale(RowState& state, const Running& max) const;
  PointSums second_pass(int64_t row, const RowState& state);
  double difference_pass(int64_t row, RowState& state);
  void set_apart(int64_t row, const RowPlan& plan);
  RowState scan_without_apart(int64_t row, const RowPlan& plan);
  void add_apart(RowState& state);
  const T* without(std::span<Apart> apart, const T* x, int64_t begin, int n, T* to, T Apart::* logit) const;
  double topk_term(int64_t row, double scale, RowState& state, Factors& factors);
  double dkd_term(double scale, RowState& state, Factors& factors);
  template <class D>
  PointSums outcomes(int count);
  double cross_entropy(int64_t row, const RowPlan& plan, const RowState& state);
  void write(int64_t row, const RowPlan& plan, const RowState& state, double h_sum, Factors factors);
  void compare_argmax(int64_t row, const RowPlan& plan, const RowState& state, RowOutcome& outcome);
  int64_t argmax(const Matrix& m, int64_t row, int64_t begin, T max);
  Scratch<T> scratch_at(int64_t begin) const {
    return {scratch_.student + begin, scratch_.teacher + begin, scratch_.hard + begin};
  }
  int count(int64_t begin) const { return int(std::min<int64_t>(block, batch_.classes - begin)); }

  const RowBatch& batch_;
  const LossOptions& options_;
  const T* class_weight_;
  double class_weight_sum_ = 0;
  Kind kind_;
  bool soft_, hard_, write_;
  bool in_place_;      // the gradient goes over the student's logits
  bool past_cache_;    // the gradient is written past the caches; in place the row is in one still
  bool scan_teacher_;  // the teacher has a value for every class, to be exponentiated
  bool third_;         // the gradient has something of scratch_.teacher
  bool keep_;
  HardExp hard_exp_;
  ScanBlock scan_block_;
  double temperature_;
  Base<T> soft_base_, hard_base_;
  Scratch<T> scratch_;
  T *student_block_, *teacher_block_, *out_block_;
  Running* block_max_;
  std::span<Apart> apart_;       // of the row at hand, by index
  T mask_ = 0;                   // what stands for them in a scan; its exponential is 0
  T *p_, *q_, *log_ratio_, *h_;  // of the classes apart, and of the rest as one more outcome
};

HardExp how_to_exponentiate(bool soft, bool hard, double temperature) {
  if (!hard) return HardExp::none;
  if (!soft || temperature == 1) return HardExp::same;
  return temperature == 2 ? HardExp::square : temperature == 4 ? HardExp::fourth : HardExp::own;
}

template <class T>
RowKernel<T>::RowKernel(const RowBatch& batch, bool past_cache, Arena& arena)
    : batch_(batch),
      options_(batch.options),
      class_weight_(static_cast<const T*>(batch.class_weight)),
      kind_(kind_of(batch)),
      soft_(kind_ != Kind::none),
      hard_(batch.evaluates_hard()),
      write_(batch.gradient.data != nullptr),
      in_place_(write_ && batch.gradient.data == batch.student.data),
      past_cache_(past_cache && !in_place_),
      scan_teacher_(kind_ == Kind::shortcut || kind_ == Kind::pointwise || kind_ == Kind::dkd),
      third_(scan_teacher_ || kind_ == Kind::mse),
      hard_exp_(how_to_exponentiate(soft_ && kind_ != Kind::mse, hard_, batch.options.temperature)),
      scan_block_(scan_teacher_ ? scan_block_for<true>(hard_exp_) : scan_block_for<false>(hard_exp_)),
      temperature_(soft_ && kind_ != Kind::mse ? batch.options.temperature : 1),
      soft_base_(temperature_),
      hard_base_(1) {
  keep_ = write_ || kind_ == Kind::pointwise;
  // Rows end in whole pairs of vectors; a small row is a small allocation, which a small batch notices.
  const int64_t blocks = (batch.classes + block - 1) / block;
  const int64_t padded = (batch.classes + 2 * kLanes<T> - 1) / (2 * kLanes<T>)*(2 * kLanes<T>);
  const int64_t row = keep_ ? padded : 0, one_block = std::min<int64_t>(block, padded);
  const int64_t apart = kind_ == Kind::topk ? batch.teacher_classes : kind_ == Kind::dkd ? 1 : 0;
  const int64_t outcomes = (apart + 2 * kLanes<T>) / kLanes<T> * kLanes<T>;  // the rest too, in whole vectors
  scratch_ = {arena.take<T>(row), arena.take<T>(row), arena.take<T>(row)};
  for (T** x : {&student_block_, &teacher_block_, &out_block_}) *x = arena.take<T>(one_block);
  for (T** x : {&p_, &q_, &log_ratio_, &h_}) *x = arena.take<T>(outcomes);
  block_max_ = arena.take<Running>(blocks);
  apart_ = {arena.take<Apart>(apart), arena.measures() ? 0 : size_t(apart)};
  std::uninitialized_value_construct(apart_.begin(), apart_.end());
  class_weight_sum_ = double(batch.classes);
  if (class_weight_ && options_.label_smoothing > 0)  // nothing else asks for it
    class_weight_sum_ = std::accumulate(class_weight_, class_weight_ + batch.classes, 0.0);
}

// A block in the compute type: memory itself, or converted into `buffer`.
template <class T>
const T* RowKernel<T>::read(const Matrix& m, int64_t row, int64_t begin, int n, T* buffer) const {
  const char* from = m.at(row, begin);
  if (m.dtype == (sizeof(T) == 8 ? DType::float64 : DType::float32)) return reinterpret_cast<const T*>(from);
  read_block(from, m.dtype, n, buffer);
  return buffer;
}

// Lines that the gradient will fill arrive while the block is being exponentiated.
template <class T>
void RowKernel<T>::fetch_gradient(int64_t row, int64_t begin, int n) const {
  const char* end = batch_.gradient.at(row, begin + n);
  for (const char* p = batch_.gradient.at(row, begin); p < end; p += 64) prefetch_to_write(p);
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
  const bool last = begin + block >= batch_.classes;
  const int64_t next_row = last ? row + 1 : row, next_begin = last ? 0 : begin + block;
  const auto pass = [&]<bool kKeep, bool kMasked>() {
    return exponentials<T, H, kSoft, kKeep, kMasked>(
        s, t, n, max.student, max.teacher, soft_base_, hard_base_, scratch_at(begin),
        batch_.student.at(next_row, next_begin), size_of(batch_.student.dtype),
        kSoft ? batch_.teacher.at(next_row, next_begin) : nullptr, size_of(batch_.teacher.dtype));
  };
  Sums sums = keep_ ? pass.template operator()<true, false>() : pass.template operator()<false, false>();
  // An infinite or NaN cross sum: perhaps 0 * inf at a masked class.
  if (kSoft && !std::isfinite(sums.cross))
    sums.cross = (keep_ ? pass.template operator()<true, true>() : pass.template operator()<false, true>()).cross;
  return sums;
}

// Chosen once: a choice among ten inlined passes costs a small row more than the pass.
template <class T>
template <bool kSoft>
typename RowKernel<T>::ScanBlock RowKernel<T>::scan_block_for(HardExp hard) {
  switch (hard) {
    case HardExp::none:
      return &RowKernel::scan_block<HardExp::none, kSoft>;
    case HardExp::same:
      return &RowKernel::scan_block<HardExp::same, kSoft>;
    case HardExp::square:
      return &RowKernel::scan_block<HardExp::square, kSoft>;
    case HardExp::fourth:
      return &RowKernel::scan_block<HardExp::fourth, kSoft>;
    case HardExp::own:
      return &RowKernel::scan_block<HardExp::own, kSoft>;
  }
  return nullptr;
}

template <class T>
typename RowKernel<T>::RowState RowKernel<T>::scan(int64_t row) {
  RowState state;
  size_t next_apart = 0;
  for (int64_t begin = 0, b = 0; begin < batch_.classes; begin += block, ++b) {
    const int n = count(begin);
    const T *s = read(batch_.student, row, begin, n, student_block_), *t = nullptr;
    if (scan_teacher_) t = read(batch_.teacher, row, begin, n, teacher_block_);
    const size_t first_apart = next_apart;
    while (next_apart < apart_.size() && apart_[next_apart].index < begin + n) ++next_apart;
    const std::span<Apart> apart(apart_.data() + first_apart, next_apart - first_apart);
    if (!apart.empty()) {
      s = without(apart, s, begin, n, in_place_ ? const_cast<T*>(s) : student_block_, &Apart::student);
      if (t) t = without(apart, t, begin, n, teacher_block_, &Apart::teacher);
    }
    Running max{block_maximum(s, n, state.max.student),
                t ? block_maximum(t, n, state.max.teacher) : state.max.teacher};
    if (max.student > state.max.student) state.student_block = begin;
    if (max.teacher > state.max.teacher) state.teacher_block = begin;
    if (b == 0) state.max = max;
    rescale(state, max);
    block_max_[b] = max;
    if (write_ && !in_place_ && !past_cache_) fetch_gradient(row, begin, n);
    const Sums sums = (this->*scan_block_)(s, t, begin, n, max, row);
    if (in_place_)  // back: the cross-entropy and the argmax read the row again
      for (const Apart& a : apart) const_cast<T*>(s)[a.index - begin] = a.student;
    state.sums.student += sums.student;
    state.sums.teacher += sums.teacher;
    state.sums.cross += sums.cross;
    state.sums.hard += sums.hard;
  }
  state.whole_max = double(state.max.student);
  state.whole_sum = state.sums.hard;
  return state;
}

template <class T>
PointSums RowKernel<T>::second_pass(int64_t row, const RowState& state) {
  Normaliser<T> z{state.max.student,
                  state.max.teacher,
                  T(1 / temperature_),
                  T(std::log(state.sums.student / state.sums.teacher)),
                  0,
                  options_.beta,
                  1 - options_.beta};
  const int64_t best = argmax(batch_.student, row, state.student_block, state.max.student);
  T at_best = 0;
  if (best < batch_.classes) read_block(batch_.teacher.at(row, best), batch_.teacher.dtype, 1, &at_best);
  z.log_ratio_at_best = (double(z.teacher_max) - double(at_best)) / temperature_ - double(z.log_ratio);
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
      case Divergence::mse:
      case Divergence::dkd:
        break;  // neither comes here
    }
    total.value += sums.value;
    total.h += sums.h;
  }
  return total;
}

template <class T>
double RowKernel<T>::difference_pass(int64_t row, RowState& state) {
  double total = 0;
  for (int64_t begin = 0; begin < batch_.classes; begin += block) {
    const int n = count(begin);
    const T* s = read(batch_.student, row, begin, n, student_block_);
    const T* t = read(batch_.teacher, row, begin, n, teacher_block_);
    total += squared_difference(s, t, n, write_ ? scratch_at(begin).teacher : nullptr);
    if (!batch_.want_metrics) continue;
    const T top = block_maximum(t, n, state.max.teacher);
    if (top > state.max.teacher || begin == 0) state.max.teacher = top, state.teacher_block = begin;
  }
  state.teacher_ordered = !std::isnan(total);
  return total / double(batch_.classes);
}

// torch's value for this row under reduction="none", class weight and label smoothing included.
template <class T>
double RowKernel<T>::cross_entropy(int64_t row, const RowPlan& plan, const RowState& state) {
  const double log_sum = std::log(state.whole_sum), max = state.whole_max;
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

template <class T>
int64_t RowKernel<T>::argmax(const Matrix& m, int64_t row, int64_t begin, T max) {
  const int n = count(begin);
  const T* x = read(m, row, begin, n, student_block_);
  int i = 0;
  while (i + kLanes<T> <= n && !any_equal(load(x + i), set<T>(max))) i += kLanes<T>;
  const T* found = std::find(x + i, x + n, max);
  return found == x + n ? batch_.classes : begin + (found - x);
}

// Ties go to the lowest class; a row with NaN, or of -inf only, has no maximum.
template <class T>
void RowKernel<T>::compare_argmax(int64_t row, const RowPlan& plan, const RowState& state, RowOutcome& outcome) {
  T student_max = state.max.student, teacher_max = state.max.teacher;
  for (const Apart& a : apart_) student_max = std::max(student_max, a.student);
  int64_t best = batch_.classes, teacher_best = batch_.classes;
  if (state.max.student == student_max) best = argmax(batch_.student, row, state.student_block, student_max);
  for (const Apart& a : apart_)
    if (a.student == student_max) best = std::min(best, a.index);
  outcome.accuracy = best == plan.label;
  if (!state.teacher_ordered) return;
  for (const Apart& a : apart_) teacher_max = std::max(teacher_max, a.teacher);
  if (!batch_.teacher_indices && state.max.teacher == teacher_max)
    teacher_best = argmax(batch_.teacher, row, state.teacher_block, teacher_max);
  for (const Apart& a : apart_)
    if (a.teacher == teacher_max) teacher_best = std::min(teacher_best, a.index);
  outcome.agreement = best == teacher_best && best < batch_.classes;
}

template <class T>
RowOutcome RowKernel<T>::run(int64_t row, const RowPlan& plan) {
  RowOutcome outcome;
  RowState state = apart_.empty() ? scan(row) : scan_without_apart(row, plan);
  const Sums& sums = state.sums;
  const double units = options_.t_squared ? temperature_ * temperature_ : 1;
  const double scale = plan.soft_scale * units / temperature_;
  double h_sum = 0;
  Factors factors;
  state.student_ordered = sums.student > 0;  // false for NaN
  state.teacher_ordered = sums.teacher > 0;
  switch (kind_) {
    case Kind::none:
      break;
    case Kind::shortcut:
      outcome.soft = units * (sums.cross / (sums.teacher * temperature_) + std::log(sums.student / sums.teacher));
      factors = {scale / sums.student, -scale / sums.teacher};  // h is -p, its sum -1
      break;
    case Kind::pointwise: {
      const PointSums points = second_pass(row, state);
      outcome.soft = units * points.value;
      // An infinite h (reverse_kl where p is 0): the whole row's gradient is NaN, not a mixture of NaN and inf.
      h_sum = std::isfinite(points.h) ? points.h : std::numeric_limits<double>::quiet_NaN();
      factors.third = scale;
      break;
    }
    case Kind::mse:
      outcome.soft = difference_pass(row, state);
      factors.third = 2 * plan.soft_scale / double(batch_.classes);
      break;
    case Kind::topk:
    case Kind::dkd:
      add_apart(state);
      outcome.soft =
          units * (kind_ == Kind::topk ? topk_term(row, scale, state, factors) : dkd_term(scale, state, factors));
      break;
  }
  if (std::isnan(outcome.soft)) {  // then so is the whole row's gradient, also where h does not see the NaN
    factors.student = factors.third = outcome.soft;
    for (Apart& a : apart_) a.gradient = outcome.soft;
  }
  if (hard_ && plan.label >= 0) outcome.hard = cross_entropy(row, plan, state);
  if (batch_.want_metrics && state.student_ordered) compare_argmax(row, plan, state, outcome);
  if (write_) write(row, plan, state, h_sum, factors);
  return outcome;
}

}  // namespace
}  // namespace pydistill::PYDISTILL_ISA

#include "apart.hpp"

namespace pydistill::PYDISTILL_ISA {
namespace {

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
