#include "run_call.hpp"

#include <sanitizer/asan_interface.h>

#include <algorithm>
#include <cmath>

namespace pydistill::driver {
namespace {

constexpr char kUnwritten = 0x5a;

enum Role : size_t {
  student,
  teacher,
  indices,
  log_partitions,
  labels,
  sample_weight,
  class_weight,
  row_grad_output,
  gradient,
  row_loss,
  row_soft,
  row_hard,
};

std::vector<char> copy(const void* from, size_t bytes) {
  const char* p = static_cast<const char*>(from);
  return from ? std::vector<char>(p, p + bytes) : std::vector<char>();
}

bool unchanged(const void* now, const std::vector<char>& before) {
  return before.empty() || std::memcmp(now, before.data(), before.size()) == 0;
}

size_t gradient_bytes(const Call& call) {
  return size_t(elements(call.rows, call.gradient_stride(), call.classes) * size_of(call.student));
}

size_t row_bytes(const Call& call) { return size_t(call.rows * size_of(compute_dtype(call))); }

bool gaps_kept(const Call& call, const Inputs& inputs, const Result& result) {
  const std::vector<char> unwritten(gradient_bytes(call), kUnwritten);
  const std::vector<char>& before = call.in_place ? inputs.student : unwritten;
  const int64_t size = size_of(call.student), stride = call.gradient_stride();
  for (int64_t i = 0; i + 1 < call.rows; ++i) {
    const auto begin = (i * stride + call.classes) * size, end = (i + 1) * stride * size;
    if (!std::equal(before.begin() + begin, before.begin() + end, result.gradient.begin() + begin)) return false;
  }
  return true;
}

bool same_numbers(DType dtype, const std::vector<char>& a, const std::vector<char>& b) {
  if (a.size() != b.size()) return false;
  if (a == b) return true;
  for (size_t i = 0; i < a.size(); i += size_t(size_of(dtype))) {
    const double x = number_at(dtype, &a[i]), y = number_at(dtype, &b[i]);
    if (!(x == y && std::signbit(x) == std::signbit(y)) && !(std::isnan(x) && std::isnan(y))) return false;
  }
  return true;
}

// During its lifetime AddressSanitizer reports even a read of the gaps between the rows of a matrix.
class ForbiddenGaps {
 public:
  ForbiddenGaps(const Matrix& m, int64_t rows, int64_t classes) : m_(m), rows_(rows), classes_(classes) {
    for_each([](char* p, size_t bytes) { ASAN_POISON_MEMORY_REGION(p, bytes); });
  }
  ~ForbiddenGaps() {
    for_each([](char* p, size_t bytes) { ASAN_UNPOISON_MEMORY_REGION(p, bytes); });
  }
  ForbiddenGaps(const ForbiddenGaps&) = delete;
  ForbiddenGaps& operator=(const ForbiddenGaps&) = delete;

 private:
  template <class F>
  void for_each(F f) const {
    if (!m_.data || m_.stride <= classes_) return;
    for (int64_t i = 0; i + 1 < rows_; ++i)
      f(m_.at(i, classes_), size_t((m_.stride - classes_) * size_of(m_.dtype)));
  }

  Matrix m_;
  int64_t rows_, classes_;
};

Evaluation evaluate_between_gaps(const Call& call, const Prepared& prepared, const IsaVariant& isa, int threads) {
  const RowBatch& batch = prepared.batch;
  const ForbiddenGaps student(batch.student, call.rows, call.classes);
  const ForbiddenGaps teacher(batch.teacher, call.rows, call.teacher_classes());
  const ForbiddenGaps gradient(batch.gradient, call.rows, call.classes);
  return evaluate(batch, isa, threads, prepared.rows);
}

}  // namespace

Prepared prepare(const Call& call, const Inputs& in, Memory& memory) {
  Prepared prepared;
  RowBatch& batch = prepared.batch;
  batch.rows = call.rows, batch.classes = call.classes;
  batch.student = {memory.place(Role::student, in.student), call.student, call.student_stride()};
  batch.teacher = {memory.place(Role::teacher, in.teacher), call.teacher, call.teacher_stride()};
  batch.teacher_indices = memory.place(Role::indices, in.indices);
  batch.teacher_classes = call.listed;
  batch.log_partitions = memory.place(Role::log_partitions, in.log_partitions);
  batch.labels = memory.place(Role::labels, in.labels);
  batch.labels_are_int32 = call.labels == Labels::narrow;
  batch.sample_weight = memory.place(Role::sample_weight, in.sample_weight);
  batch.class_weight = memory.place(Role::class_weight, in.class_weight);
  batch.options = call.options;
  batch.options.reduction = call.reduction;
  batch.options.soft_items = call.soft_items, batch.options.hard_items = call.hard_items;
  batch.grad_output = call.grad_output;
  batch.row_grad_output = memory.place(Role::row_grad_output, in.row_grad_output);
  batch.want_metrics = call.metrics;
  if (call.gradient) {
    void* data = call.in_place ? batch.student.data
                               : memory.place(Role::gradient, std::vector<char>(gradient_bytes(call), kUnwritten));
    batch.gradient = {data, call.student, call.gradient_stride()};
  }
  if (call.reduction == Reduction::none) {
    const std::vector<char> unwritten(row_bytes(call), kUnwritten);
    prepared.rows = {memory.place(Role::row_loss, unwritten), memory.place(Role::row_soft, unwritten),
                     memory.place(Role::row_hard, unwritten)};
  }
  return prepared;
}

Result collect(const Call& call, const Inputs& in, const Prepared& prepared, const Evaluation& evaluation) {
  const RowBatch& batch = prepared.batch;
  Result result;
  result.evaluation = evaluation;
  if (call.gradient) result.gradient = copy(batch.gradient.data, gradient_bytes(call));
  result.loss = copy(prepared.rows.loss, row_bytes(call));
  result.soft = copy(prepared.rows.soft, row_bytes(call));
  result.hard = copy(prepared.rows.hard, row_bytes(call));
  result.inputs_kept =
      (call.in_place || unchanged(batch.student.data, in.student)) && unchanged(batch.teacher.data, in.teacher) &&
      unchanged(batch.labels, in.labels) && unchanged(batch.sample_weight, in.sample_weight) &&
      unchanged(batch.class_weight, in.class_weight) && unchanged(batch.row_grad_output, in.row_grad_output);
  result.gaps_kept = !call.gradient || gaps_kept(call, in, result);
  return result;
}

Result run_call(const Call& call, const Inputs& in, Memory& memory, const IsaVariant& isa, int threads) {
  const Prepared prepared = prepare(call, in, memory);
  return collect(call, in, prepared, evaluate_between_gaps(call, prepared, isa, threads));
}

bool same(const Call& call, const Result& a, const Result& b) {
  const auto both = [&](double Evaluation::* field) {
    const double x = a.evaluation.*field, y = b.evaluation.*field;
    return x == y || (std::isnan(x) && std::isnan(y));
  };
  const DType compute = compute_dtype(call);
  return a.evaluation.problem == b.evaluation.problem && a.evaluation.problem_row == b.evaluation.problem_row &&
         a.evaluation.teacher_sums_to_one == b.evaluation.teacher_sums_to_one && both(&Evaluation::loss) &&
         both(&Evaluation::soft) && both(&Evaluation::hard) && both(&Evaluation::agreement) &&
         both(&Evaluation::accuracy) && both(&Evaluation::soft_items) && both(&Evaluation::hard_items) &&
         same_numbers(compute, a.loss, b.loss) && same_numbers(compute, a.soft, b.soft) &&
         same_numbers(compute, a.hard, b.hard) && same_numbers(call.student, a.gradient, b.gradient);
}

double gradient_at(const Call& call, const Result& result, int64_t row, int64_t column) {
  return number_at(call.student,
                   &result.gradient[size_t((row * call.gradient_stride() + column) * size_of(call.student))]);
}

std::vector<const IsaVariant*> usable_isas() {
  std::vector<const IsaVariant*> usable;
  for (const IsaVariant& isa : isa_variants())
    if (isa.usable()) usable.push_back(&isa);
  return usable;
}

}  // namespace pydistill::driver
