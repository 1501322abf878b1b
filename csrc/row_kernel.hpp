// The row kernel. Compiled once per ISA, each into a namespace of its own (PYDISTILL_ISA).
//
// What it claims, for a row of C classes: one read of the student's and the teacher's logits from memory, one
// write of the gradient; the exponentials are computed once, against the running maximum, and wait in a scratch
// row (L2) for the row's sums. forward_kl needs no more than that. The other divergences look at the row once
// more, in cache, for log p and log q. With a top-k teacher, and for dkd, some classes stand apart: listed.hpp.
//
// NaN: a logit of NaN or +inf, or a row of -inf only, makes the sums NaN and with them the row, as in torch.
#pragma once

#include <algorithm>
#include <limits>
#include <memory>
#include <numeric>
#include <span>

#include "convert.hpp"
#include "for_each.hpp"
#include "math.hpp"
#include "row_batch.hpp"

namespace pydistill::PYDISTILL_ISA {
namespace {

constexpr double kLog2e = 1.4426950408889634;

// How exp(s), needed by cross-entropy, comes from exp(s / T), needed by the soft term.
enum class HardExp { none, same, square, fourth, own };

template <HardExp H, class T>
inline Vec<T> power(Vec<T> e) {
  if constexpr (H == HardExp::same) return e;
  const Vec<T> square = e * e;
  if constexpr (H == HardExp::square) return square;
  return square * square;
}

// What exp2 needs: c = log2(e) / T, and the argument below which the result is 0.
template <class T>
struct Base {
  explicit Base(double temperature)
      : c(set<T>(T(1.4426950408889634 / temperature))),
        lowest(set<T>(T(Exp2<T>::lowest_exponent * temperature * 0.6931471805599453))) {}
  Vec<T> c, lowest;
};

// Sums over one block or, rescaled, over a row so far: of exp((s - max) / T), of exp((t - max) / T), of the
// latter times the difference of the shifted logits, and of exp(s - max).
struct Sums {
  double student = 0, teacher = 0, cross = 0, hard = 0;
};

template <class T>
struct Scratch {
  T* student;  // exp((s - max) / T)
  T* teacher;  // exp((t - max) / T); later h of a divergence that needs a second pass
  T* hard;     // exp(s - max), where it is not a power of the first
};

struct PointSums {
  double value = 0, h = 0;
};

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

}  // namespace
}  // namespace pydistill::PYDISTILL_ISA
