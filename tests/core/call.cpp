#include "call.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <sstream>

#include "formulas.hpp"
#include "half.hpp"

namespace pydistill::driver {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

const char* name_of(Divergence divergence) {
  switch (divergence) {
#define DIVERGENCE(name, type) \
  case Divergence::name:       \
    return #name;
#include "divergences.def"
#undef DIVERGENCE
    case Divergence::mse:
      return "mse";
    case Divergence::dkd:
      return "dkd";
  }
  return "";
}

const char* name_of(DType dtype) {
  constexpr const char* names[] = {"float32", "float64", "bfloat16", "float16"};
  return names[int(dtype)];
}

double wild_number(Random& random) {
  return random.pick({kNan, kInfinity, -kInfinity, 3e38, -3e38, 1e4, -1e4, 1e-40, -1e-310, 0.0});
}

// Draws `listed` classes, ascending, without repetition.
void list_classes(Random& random, int64_t classes, int64_t listed, int64_t* indices) {
  int64_t taken = 0;
  for (int64_t j = 0; j < classes && taken < listed; ++j)
    if (random.below(classes - j) < listed - taken) indices[taken++] = j;
}

std::vector<char> numbers(DType dtype, const std::vector<double>& values) {
  std::vector<char> bytes(values.size() * size_t(size_of(dtype)));
  for (size_t i = 0; i < values.size(); ++i) put_number(dtype, values[i], &bytes[i * size_t(size_of(dtype))]);
  return bytes;
}

// The rows as they are in memory, `stride` apart with NaN between them. `values` is rounded to the dtype; with a
// stride of 0 all rows become the first.
std::vector<char> rows_in_memory(DType dtype, int64_t rows, int64_t classes, int64_t stride,
                                 std::vector<double>& values) {
  std::vector<double> spread(size_t(elements(rows, stride, classes)), kNan);
  for (int64_t i = 0; i < (stride == 0 ? 1 : rows); ++i)
    std::copy_n(&values[size_t(i * classes)], classes, &spread[size_t(i * stride)]);
  const std::vector<char> bytes = numbers(dtype, spread);
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < classes; ++j)
      values[size_t(i * classes + j)] = number_at(dtype, &bytes[size_t((i * stride + j) * size_of(dtype))]);
  return bytes;
}

struct Row {
  int64_t label;
  double weight;
};

// Masks the same classes of student and teacher, but not the label and not all classes of a teacher.
void mask_row(Random& random, const Call& call, const Row& row, const int64_t* indices, double* student,
              double* teacher) {
  for (int64_t j = 0; j < call.classes; ++j) {
    const bool spared = j < 2 || j == row.label || (indices && j == indices[0]);
    if (spared || !random.chance(0.25)) continue;
    student[j] = -kInfinity;
    if (!indices)
      teacher[j] = -kInfinity;
    else if (const int64_t* found = std::find(indices, indices + call.listed, j); found != indices + call.listed)
      teacher[found - indices] = -kInfinity;
  }
}

}  // namespace

uint64_t Random::bits() {
  uint64_t x = state_ += 0x9e3779b97f4a7c15u;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}
double Random::uniform(double low, double high) { return low + (high - low) * double(bits() >> 11) * 0x1p-53; }
int64_t Random::below(int64_t n) { return int64_t(bits() % uint64_t(n)); }

double number_at(DType dtype, const char* p) {
  const auto get = [p](auto x) {
    std::memcpy(&x, p, sizeof x);
    return x;
  };
  switch (dtype) {
    case DType::float32:
      return double(get(float()));
    case DType::float64:
      return get(double());
    case DType::bfloat16:
      return double(bfloat_to_float(get(uint16_t())));
    case DType::float16:
      return double(half_to_float(get(uint16_t())));
  }
  return kNan;
}

void put_number(DType dtype, double x, char* p) {
  const auto put = [p](auto value) { std::memcpy(p, &value, sizeof value); };
  switch (dtype) {
    case DType::float32:
      return put(float(x));
    case DType::float64:
      return put(x);
    case DType::bfloat16:
      return put(float_to_bfloat(float(x)));
    case DType::float16:
      return put(float_to_half(float(x)));
  }
}

std::vector<Call> soft_terms() {
  std::vector<Call> terms;
  const auto add = [&](double alpha, Divergence divergence, double beta, bool listed, bool bucket) {
    Call call;
    call.options.alpha = alpha, call.options.divergence = divergence, call.options.beta = beta;
    call.listed = listed, call.bucket = bucket;
    terms.push_back(call);
  };
  add(0, Divergence::forward_kl, 0, false, false);
  for (const Divergence divergence : {
#define DIVERGENCE(name, type) Divergence::name,
#include "divergences.def"
#undef DIVERGENCE
       }) {
    for (const bool listed : {false, true}) add(0.5, divergence, 0.3, listed, false);
    add(0.5, divergence, 0.3, true, true);
  }
  add(0.5, Divergence::mse, 0, false, false);
  add(0.5, Divergence::dkd, 8, false, false);
  return terms;
}

Call with_size(Call call, int64_t rows, int64_t classes, int64_t listed) {
  call.rows = rows, call.classes = classes;
  if (call.listed > 0) {
    const bool all = !call.bucket && !allows_zero_teacher(call.options.divergence);
    call.listed = all ? classes : std::min(classes, listed);
    call.bucket = call.bucket && call.listed < classes;
  }
  return call;
}

Call with_options(Call call, uint64_t seed) {
  Random random(seed);
  LossOptions& options = call.options;
  const bool dkd = options.divergence == Divergence::dkd;
  call.seed = seed;
  const int64_t rows = random.pick<int64_t>({1, 2, 3, 5});
  const int64_t listed = call.listed > 0 ? random.pick<int64_t>({1, 2, 7, 16, 33, call.classes}) : 0;
  call = with_size(call, rows, call.classes, listed);
  options.temperature = random.pick({1.0, 2.0, 4.0, 3.0, 0.5});
  options.t_squared = random.chance(0.7);
  if (options.alpha > 0) options.alpha = random.pick({0.5, 0.7, 1.0});
  if (options.beta > 0 && !dkd) options.beta = random.pick({0.5, 0.1, 0.9, 0.02});
  const bool needs_labels = options.alpha < 1 || dkd;
  call.labels = random.pick({Labels::wide, Labels::narrow, needs_labels ? Labels::wide : Labels::none});
  options.unlabeled = !dkd && random.chance(0.3) ? Unlabeled::distill : Unlabeled::skip;
  call.values = random.pick({Values::plain, Values::plain, Values::masked, Values::wild});
  if (call.values != Values::masked && random.chance(0.4)) options.label_smoothing = 0.1;
  call.ignored_rows = call.labels != Labels::none && random.chance(0.5);
  call.sample_weight = random.chance(0.4);
  call.class_weight = random.chance(0.4);
  call.reduction = random.pick({Reduction::none, Reduction::sum, Reduction::mean});
  call.row_grad_output = call.reduction == Reduction::none && random.chance(0.5);
  if (call.reduction == Reduction::mean) {
    call.soft_items = random.pick({-1.0, -1.0, 6.0, 0.0});
    call.hard_items = random.pick({-1.0, -1.0, 5.0, 0.0});
  }
  call.grad_output = random.pick({1.0, 1.0, 0.25, -2.0});
  call.gradient = call.in_place || random.chance(0.85);
  call.metrics = random.chance(0.5);
  call.student_gap = random.pick<int64_t>({0, 0, 1, 3, 64});
  call.teacher_gap = random.pick<int64_t>({0, 0, 1, 5, 64});
  call.gradient_gap = random.pick<int64_t>({0, 0, 1, 7, 64});
  call.one_student_row = !call.in_place && random.chance(0.1);
  call.one_teacher_row = random.chance(0.1);
  return call;
}

Inputs make_inputs(const Call& call) {
  Random random(call.seed);
  const int64_t classes = call.classes, width = call.teacher_classes();
  const auto logits = [&](int64_t n) {
    std::vector<double> x(static_cast<size_t>(n));
    for (double& value : x)
      value = call.values == Values::wild && random.chance(0.1) ? wild_number(random) : random.uniform(-6, 6);
    return x;
  };
  Inputs in;
  in.student_values = logits(call.rows * classes);
  in.teacher_values = logits(call.rows * width);
  if (call.listed > 0) in.indices.resize(size_t(call.rows * width));
  std::vector<double> weights, row_grad_output, class_weight(static_cast<size_t>(classes));
  std::vector<int64_t> labels;
  for (double& weight : class_weight) weight = random.uniform(0, 2);
  for (int64_t i = 0; i < call.rows; ++i) {
    double* student = &in.student_values[size_t(i * classes)];
    double* teacher = &in.teacher_values[size_t(i * width)];
    Row row{random.below(classes), call.sample_weight ? random.pick({0.0, 1.0, 0.5, 3.0}) : 1};
    if (call.ignored_rows && random.chance(0.3)) row.label = call.options.ignore_index;
    int64_t* indices = call.listed > 0 ? &in.indices[size_t(i * width)] : nullptr;
    if (indices) list_classes(random, classes, width, indices);
    // A row with several labels, as with a stride of 0, is not masked: one of them could be.
    if (call.values == Values::masked && !call.one_student_row && !call.one_teacher_row)
      mask_row(random, call, row, indices, student, teacher);
    const bool ignored = row.label == call.options.ignore_index;
    // The values of a row that counts for nothing must not be read.
    if (row.weight == 0 || (ignored && (call.options.alpha == 0 || call.options.unlabeled == Unlabeled::skip))) {
      if (!call.one_student_row) std::fill_n(student, classes, kNan);
      if (!call.one_teacher_row) std::fill_n(teacher, width, kNan);
    }
    labels.push_back(row.label), weights.push_back(row.weight);
    row_grad_output.push_back(random.uniform(-1, 2));
  }
  in.student = rows_in_memory(call.student, call.rows, classes, call.student_stride(), in.student_values);
  in.teacher = rows_in_memory(call.teacher, call.rows, width, call.teacher_stride(), in.teacher_values);
  if (call.bucket)
    for (int64_t i = 0; i < call.rows; ++i) {
      double sum = 0;
      for (int64_t k = 0; k < width; ++k)
        sum += std::exp(in.teacher_values[size_t(i * width + k)] / call.options.temperature);
      in.log_partitions.push_back(std::log(sum) + random.uniform(0.05, 2));
    }
  if (!call.has_teacher()) in.teacher.clear(), in.indices.clear(), in.log_partitions.clear();
  const DType compute = compute_dtype(call);
  for (const int64_t label : labels) {
    if (call.labels == Labels::none) break;
    const int32_t narrow = int32_t(label);
    const char* bytes = call.labels == Labels::wide ? reinterpret_cast<const char*>(&label)
                                                    : reinterpret_cast<const char*>(&narrow);
    in.labels.insert(in.labels.end(), bytes, bytes + (call.labels == Labels::wide ? 8 : 4));
  }
  if (call.sample_weight) in.sample_weight = numbers(compute, weights);
  if (call.class_weight) in.class_weight = numbers(compute, class_weight);
  if (call.row_grad_output) in.row_grad_output = numbers(compute, row_grad_output);
  return in;
}

std::string describe(const Call& call) {
  const LossOptions& options = call.options;
  std::ostringstream text;
  text << (options.alpha == 0 ? "no soft term" : name_of(options.divergence)) << ", " << call.rows << " x "
       << call.classes << ", student " << name_of(call.student) << " stride " << call.student_stride()
       << ", teacher " << name_of(call.teacher) << " stride " << call.teacher_stride();
  if (call.listed > 0) text << ", top " << call.listed << (call.bucket ? " with bucket" : " renormalized");
  text << ", alpha " << options.alpha << ", beta " << options.beta << ", T " << options.temperature
       << (options.t_squared ? "" : ", no T^2") << ", smoothing " << options.label_smoothing << ", labels "
       << (call.labels == Labels::none   ? "none"
           : call.labels == Labels::wide ? "int64"
                                         : "int32")
       << (call.ignored_rows ? ", ignored rows" : "")
       << (options.unlabeled == Unlabeled::distill ? ", unlabeled=distill" : "")
       << (call.sample_weight ? ", sample_weight" : "") << (call.class_weight ? ", class_weight" : "")
       << (call.reduction == Reduction::none  ? ", none"
           : call.reduction == Reduction::sum ? ", sum"
                                              : ", mean")
       << ", items " << call.soft_items << " and " << call.hard_items << ", grad_output " << call.grad_output
       << (call.row_grad_output ? " per row" : "") << (call.metrics ? ", metrics" : "")
       << (!call.gradient  ? ", no gradient"
           : call.in_place ? ", in place"
                           : ", gradient stride ");
  if (call.gradient && !call.in_place) text << call.gradient_stride();
  text << (call.values == Values::plain    ? ", plain"
           : call.values == Values::masked ? ", masked"
                                           : ", wild")
       << ", seed " << call.seed;
  return text.str();
}

}  // namespace pydistill::driver
