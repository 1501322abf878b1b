// RowKernel: computes loss and gradient of one row after another. It is compiled once per ISA, each time in its
// own namespace (PYDISTILL_ISA).
//
// The kernel reads the logits of a row from memory once and writes the gradient of the row once. The steps are:
// - scan.hpp: the exponentials, relative to the running maximum, and their sums. The exponentials are kept in
//   scratch memory, which stays in the L2 cache. forward_kl and dkd need no further pass.
// - second_pass.hpp: the other divergences, class by class, from the probabilities that follow from the sums; also
//   mse.
// - listed.hpp: the listed classes, which the scan leaves out: the k classes of a top-k teacher, or dkd's label.
// - gradient.hpp: combines the scratch arrays into the gradient.
// - kernels.cpp: the order of the steps, the cross-entropy and the metrics.
//
// If a logit of a row is NaN or +inf, the sums are NaN; if all logits are -inf, the sums are 0. In both cases loss
// and gradient of the row are NaN, as in torch. mse, which needs no sums, has its own rules (second_pass.hpp).
#pragma once

#include <algorithm>
#include <limits>
#include <memory>
#include <numbers>
#include <numeric>
#include <optional>
#include <span>

#include "convert.hpp"
#include "for_each.hpp"
#include "math.hpp"
#include "row_batch.hpp"

namespace pydistill::PYDISTILL_ISA {
namespace {

// How the soft term of a row is computed.
enum class SoftTerm { none, forward_kl, pointwise, mse, topk, dkd };

inline SoftTerm soft_term_of(const RowBatch& batch) {
  if (!batch.evaluates_soft()) return SoftTerm::none;
  if (batch.options.divergence == Divergence::mse) return SoftTerm::mse;
  if (batch.options.divergence == Divergence::dkd) return SoftTerm::dkd;
  if (batch.teacher_indices) return SoftTerm::topk;
  return batch.options.divergence == Divergence::forward_kl ? SoftTerm::forward_kl : SoftTerm::pointwise;
}

// Whether the soft term divides the logits by T. mse compares them undivided.
inline bool is_tempered(SoftTerm term) { return term != SoftTerm::none && term != SoftTerm::mse; }

// How the cross-entropy gets exp(s) from the soft term's exp(s / T):
// - none: there is no cross-entropy;
// - same: T = 1, so the two are equal;
// - square: T = 2, exp(s / T) is squared;
// - fourth: T = 4, exp(s / T) is squared twice;
// - own: exp(s) is computed in addition.
enum class HardExp { none, same, square, fourth, own };

inline HardExp hard_exp_of(bool tempered, bool hard, double temperature) {
  if (!hard) return HardExp::none;
  if (!tempered || temperature == 1) return HardExp::same;
  return temperature == 2 ? HardExp::square : temperature == 4 ? HardExp::fourth : HardExp::own;
}

// Arguments of exp2() in math.hpp for exp(x / T): the factor c = log2(e) / T, and the lowest x, below which the
// result is 0.
template <class T>
struct ExpBase {
  explicit ExpBase(double temperature)
      : c(set<T>(T(std::numbers::log2e / temperature))),
        lowest(set<T>(T(Exp2<T>::lowest_exponent * temperature * std::numbers::ln2))) {}
  Vec<T> c, lowest;
};

// Sums over the classes of one block, or of all blocks so far, rescaled to one maximum.
struct Sums {
  double student = 0;  // exp((s - max) / T)
  double teacher = 0;  // exp((t - max) / T)
  double cross = 0;    // exp((t - max) / T) * ((t - max of t) - (s - max of s))
  double hard = 0;     // exp(s - max)
};

// Value of a pointwise divergence, and the sum of its derivatives h_j by log q_j (divergences.hpp).
struct PointSums {
  double value = 0, h = 0;
};

// Arrays of a row, kept between the scan and the gradient.
template <class T>
struct Scratch {
  T* student_exp;  // exp((s - max) / T)
  T* teacher_exp;  // exp((t - max) / T)
  T* hard_exp;     // exp(s - max), for HardExp::own only

  // The derivatives h_j of the divergence by log q_j (divergences.hpp), up to a factor. For forward_kl and dkd,
  // whose h_j is proportional to p_j, this is teacher_exp. The second pass overwrites teacher_exp with h, or for
  // mse with the difference s - t.
  T* derivative() const { return teacher_exp; }
};

// Factors by which the gradient combines the scratch arrays.
struct Factors {
  double student_exp = 0, derivative = 0, hard_exp = 0;
};

// gradient_j = student_exp * student_exp_j + derivative * derivative_j + hard_exp * exp(s_j - max) + constant
//              - smooth * class_weight_j, for the classes j of one block
template <class T>
struct BlockFactors {
  T student_exp, derivative, hard_exp, constant, smooth;
  const T* class_weight;  // of this block; null if `constant` includes the label smoothing
};

// Arena: places arrays one after the other in a block of memory that the caller allocated. An Arena that is
// constructed with a null pointer only adds up the size that this block needs.
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
  struct Maxima {
    T student = std::numeric_limits<T>::lowest(), teacher = std::numeric_limits<T>::lowest();
  };
  // The result of the scan. Sums and maxima leave out the listed classes.
  struct RowState {
    Sums sums;
    Maxima max;
    int64_t student_max_block = 0, teacher_max_block = 0;  // first class of the block with the maximum
    double full_max = 0, full_sum = 0;                     // of the student at T = 1, over all classes
    bool student_valid = false, teacher_valid = false;     // no NaN, no +inf, not all -inf
  };
  // A class that the scan leaves out: a class of a top-k teacher, or dkd's label.
  struct ListedClass {
    int64_t index;
    T student, teacher;   // logits
    double gradient;      // of the soft term
    double hard_exp = 0;  // exp(student - full_max)
  };
  // The gradient of the cross-entropy by a logit: scale * (total * softmax - uniform * class_weight), minus onehot
  // at the label.
  struct HardGradient {
    bool present = false, weighted_smoothing = false;
    double scale = 0, total = 0, uniform = 0, onehot = 0;
  };

  // scan.hpp
  RowState scan(int64_t row);
  template <HardExp H, bool kTeacher>
  Sums scan_block(const T* s, const T* t, int64_t begin, int n, const Maxima& max, int64_t row);
  using ScanBlock = Sums (RowKernel::*)(const T*, const T*, int64_t, int, const Maxima&, int64_t);
  template <bool kTeacher>
  static ScanBlock scan_block_for(HardExp hard_exp);
  void prefetch_gradient(int64_t row, int64_t begin, int n) const;
  void rescale(RowState& state, const Maxima& max) const;

  // second_pass.hpp
  PointSums pointwise_pass(int64_t row, const RowState& state);
  double mse_pass(int64_t row, RowState& state);

  // listed.hpp
  void list_classes(int64_t row, const RowPlan& plan);
  const T* mask_listed(std::span<ListedClass> listed, const T* x, int64_t begin, int n, T* to,
                       T ListedClass::* logit) const;
  RowState scan_unlisted(int64_t row, const RowPlan& plan);
  void add_listed(RowState& state);
  template <class D>
  PointSums pointwise_listed(int count);
  std::optional<double> topk_probabilities(int64_t row, RowState& state);
  double topk_term(int64_t row, double scale, RowState& state, Factors& factors);
  double dkd_term(double scale, RowState& state, Factors& factors);

  // gradient.hpp
  void write_row(int64_t row, const RowPlan& plan, const RowState& state, double h_sum, Factors factors);
  HardGradient hard_gradient(const RowPlan& plan) const;
  void combine(const Scratch<T>& in, int n, const BlockFactors<T>& by, bool past_cache, T* out) const;
  double gradient_of(const ListedClass& listed, const HardGradient& hard, const RowPlan& plan,
                     const RowState& state) const;

  // kernels.cpp
  double cross_entropy(int64_t row, const RowPlan& plan, const RowState& state);
  int64_t argmax(const Matrix& m, int64_t row, int64_t begin, T max);
  void compare_argmax(int64_t row, const RowPlan& plan, const RowState& state, RowOutcome& outcome);

  const T* read(const Matrix& m, int64_t row, int64_t begin, int n, T* buffer) const;
  Scratch<T> scratch_at(int64_t begin) const {
    return {scratch_.student_exp + begin, scratch_.teacher_exp + begin, scratch_.hard_exp + begin};
  }
  int block_size(int64_t begin) const { return int(std::min<int64_t>(kBlock<T>, batch_.classes - begin)); }

  const RowBatch& batch_;
  const LossOptions& options_;
  const T* class_weight_;
  double class_weight_sum_ = 0;
  SoftTerm soft_term_;
  bool has_hard_;  // the loss has a cross-entropy
  bool want_gradient_;
  bool in_place_;        // the gradient is written over the student's logits
  bool past_cache_;      // the gradient is written with streaming stores; not in place, where its lines are cached
  bool scan_teacher_;    // the scan exponentiates the teacher, which has a logit for every class
  bool has_derivative_;  // the gradient reads Scratch::derivative()
  bool keep_exps_;       // the scan stores its exponentials
  HardExp hard_exp_;
  ScanBlock scan_block_;
  double temperature_;
  ExpBase<T> soft_base_, hard_base_;
  Scratch<T> scratch_;
  T *student_buffer_, *teacher_buffer_, *gradient_buffer_;  // blocks in the compute type
  Maxima* block_max_;                                       // the running maxima after each block
  std::span<ListedClass> listed_;                           // of the current row, by index
  T mask_ = 0;                   // logit that replaces a listed class in the scan; its exponential is 0
  T *p_, *q_, *log_ratio_, *h_;  // of the listed classes, and of all others as one more class
};

template <class T>
RowKernel<T>::RowKernel(const RowBatch& batch, bool past_cache, Arena& arena)
    : batch_(batch),
      options_(batch.options),
      class_weight_(static_cast<const T*>(batch.class_weight)),
      soft_term_(soft_term_of(batch)),
      has_hard_(batch.evaluates_hard()),
      want_gradient_(batch.gradient.data != nullptr),
      in_place_(want_gradient_ && batch.gradient.data == batch.student.data),
      past_cache_(past_cache && !in_place_),
      scan_teacher_(soft_term_ == SoftTerm::forward_kl || soft_term_ == SoftTerm::pointwise ||
                    soft_term_ == SoftTerm::dkd),
      has_derivative_(scan_teacher_ || soft_term_ == SoftTerm::mse),
      keep_exps_(want_gradient_ || soft_term_ == SoftTerm::pointwise),
      hard_exp_(hard_exp_of(is_tempered(soft_term_), has_hard_, batch.options.temperature)),
      scan_block_(scan_teacher_ ? scan_block_for<true>(hard_exp_) : scan_block_for<false>(hard_exp_)),
      temperature_(is_tempered(soft_term_) ? batch.options.temperature : 1),
      soft_base_(temperature_),
      hard_base_(1) {
  // Rows are padded to whole pairs of vectors. Small rows get little memory: allocating more slows down a small
  // batch.
  const int64_t blocks = (batch.classes + kBlock<T> - 1) / kBlock<T>;
  const int64_t padded = (batch.classes + 2 * kLanes<T> - 1) / (2 * kLanes<T>)*(2 * kLanes<T>);
  const int64_t row = keep_exps_ ? padded : 0, one_block = std::min<int64_t>(kBlock<T>, padded);
  const int64_t listed = soft_term_ == SoftTerm::topk  ? batch.teacher_classes
                         : soft_term_ == SoftTerm::dkd ? 1
                                                       : 0;
  const int64_t with_rest = (listed + 2 * kLanes<T>) / kLanes<T> * kLanes<T>;  // in whole vectors
  scratch_ = {arena.take<T>(row), arena.take<T>(row), arena.take<T>(row)};
  for (T** x : {&student_buffer_, &teacher_buffer_, &gradient_buffer_}) *x = arena.take<T>(one_block);
  for (T** x : {&p_, &q_, &log_ratio_, &h_}) *x = arena.take<T>(with_rest);
  block_max_ = arena.take<Maxima>(blocks);
  listed_ = {arena.take<ListedClass>(listed), arena.measures() ? 0 : size_t(listed)};
  std::uninitialized_value_construct(listed_.begin(), listed_.end());
  class_weight_sum_ = double(batch.classes);
  // Only label smoothing needs the sum. A kernel that only measures its memory computes it too, which is harmless.
  if (class_weight_ && options_.label_smoothing > 0)
    class_weight_sum_ = std::accumulate(class_weight_, class_weight_ + batch.classes, 0.0);
}

// A block in the compute type: a pointer to the logits themselves, or to `buffer` if they had to be converted.
template <class T>
const T* RowKernel<T>::read(const Matrix& m, int64_t row, int64_t begin, int n, T* buffer) const {
  const char* from = m.at(row, begin);
  if (m.dtype == kComputeDType<T>) return reinterpret_cast<const T*>(from);
  read_block(from, m.dtype, n, buffer);
  return buffer;
}

}  // namespace
}  // namespace pydistill::PYDISTILL_ISA
