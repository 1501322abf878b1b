// Call: the description of one call of the core. Its inputs are generated from a seed.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "evaluate.hpp"

namespace pydistill::driver {

// splitmix64: the same numbers on every machine.
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}
  uint64_t bits();
  double uniform(double low, double high);
  int64_t below(int64_t n);
  bool chance(double probability) { return uniform(0, 1) < probability; }
  template <class T>
  T pick(std::initializer_list<T> choices) {
    return choices.begin()[below(int64_t(choices.size()))];
  }

 private:
  uint64_t state_;
};

enum class Labels { none, wide, narrow };  // int64 or int32
// plain: logits in [-6, 6]. masked: some classes are -inf for student and teacher. wild: one logit in ten is NaN,
// infinite, huge or denormal.
enum class Values { plain, masked, wild };

struct Call {
  int64_t rows = 3, classes = 10;
  DType student = DType::float32, teacher = DType::float32;
  LossOptions options;
  Reduction reduction = Reduction::mean;
  int64_t listed = 0;   // classes of a top-k teacher; 0: the teacher has all
  bool bucket = false;  // the mass of all classes that a top-k teacher does not list is one more class
  Labels labels = Labels::wide;
  bool ignored_rows = false, sample_weight = false, class_weight = false, row_grad_output = false;
  double soft_items = -1, hard_items = -1, grad_output = 1;
  bool gradient = true, in_place = false, metrics = false;
  int64_t student_gap = 0, teacher_gap = 0, gradient_gap = 0;  // elements between two rows
  bool one_student_row = false, one_teacher_row = false;       // stride 0: all rows are one row in memory
  Values values = Values::plain;
  uint64_t seed = 1;

  bool is_double() const { return student == DType::float64; }
  int64_t teacher_classes() const { return listed > 0 ? listed : classes; }
  int64_t student_stride() const { return one_student_row ? 0 : classes + student_gap; }
  int64_t teacher_stride() const { return one_teacher_row ? 0 : teacher_classes() + teacher_gap; }
  int64_t gradient_stride() const { return in_place ? student_stride() : classes + gradient_gap; }
  bool has_teacher() const { return options.alpha > 0; }
};

// The bytes that the core receives, and the same logits as doubles, row by row without gaps.
struct Inputs {
  std::vector<char> student, teacher, labels, sample_weight, class_weight, row_grad_output;
  std::vector<int64_t> indices;
  std::vector<double> log_partitions;
  std::vector<double> student_values, teacher_values;
};

// One call for every form of the soft term: none, mse, dkd, and each pointwise divergence with a teacher of all
// classes and with a top-k teacher of either tail.
std::vector<Call> soft_terms();
// The same call with another size. A top-k teacher lists `listed` classes, or all of them if the divergence would
// be infinite where it has no mass.
Call with_size(Call call, int64_t rows, int64_t classes, int64_t listed);
// The same call with a random number of rows and random values of all options but the form of the soft term.
Call with_options(Call call, uint64_t seed);
Inputs make_inputs(const Call& call);
std::string describe(const Call& call);

double number_at(DType dtype, const char* p);
void put_number(DType dtype, double x, char* p);
inline int64_t elements(int64_t rows, int64_t stride, int64_t classes) { return (rows - 1) * stride + classes; }
inline DType compute_dtype(const Call& call) { return call.is_double() ? DType::float64 : DType::float32; }

}  // namespace pydistill::driver
