#include "compare.hpp"

#include <algorithm>
#include <cmath>
#include <cstdio>

namespace pydistill::driver {
namespace {

struct Accuracy {
  double compute;   // of values, and of elements of the gradient relative to its largest
  double rounding;  // of an element of the gradient, relative
  double smallest;  // denormals of the dtype
};
Accuracy accuracy_of(DType student) {
  switch (student) {
    case DType::float32:
      return {1e-5, 1e-6, 0};
    case DType::float64:
      return {1e-11, 1e-14, 0};
    case DType::bfloat16:
      return {1e-5, 0x1p-7, 0};
    case DType::float16:
      return {1e-5, 0x1p-10, 0x1p-23};
  }
  return {};
}

bool close(double a, double b, double tolerance) {
  if (std::isnan(a) || std::isnan(b)) return std::isnan(a) && std::isnan(b);
  return a == b || std::abs(a - b) <= tolerance * std::max({1.0, std::abs(a), std::abs(b)});
}

std::string numbers(const char* what, double got, double wanted) {
  char text[120];
  std::snprintf(text, sizeof text, "%s: %.12g instead of %.12g", what, got, wanted);
  return text;
}

}  // namespace

std::string compare_values(const Call& call, const Result& result, const Expected& expected) {
  const Evaluation& e = result.evaluation;
  const double tolerance = accuracy_of(call.student).compute * 4;
  const struct {
    const char* name;
    double got, wanted;
  } fields[] = {{"loss", e.loss, expected.loss},
                {"soft", e.soft, expected.soft},
                {"hard", e.hard, expected.hard},
                {"agreement", e.agreement, expected.agreement},
                {"accuracy", e.accuracy, expected.accuracy},
                {"soft_items", e.soft_items, expected.soft_items},
                {"hard_items", e.hard_items, expected.hard_items}};
  for (const auto& field : fields)
    if (!close(field.got, field.wanted, tolerance)) return numbers(field.name, field.got, field.wanted);
  if (e.problem != Problem::none) return "a problem is reported for a valid call";
  const DType compute = compute_dtype(call);
  for (int64_t i = 0; i < call.rows && !result.loss.empty(); ++i) {
    const double got = number_at(compute, &result.loss[size_t(i * size_of(compute))]);
    if (!close(got, expected.row_loss[size_t(i)], tolerance))
      return numbers("a row's loss", got, expected.row_loss[size_t(i)]);
  }
  return "";
}

std::string compare_gradient(const Call& call, const Inputs& inputs, const Result& result, const Expected& here) {
  constexpr double step = 1e-6;
  if (!std::isfinite(here.objective)) return "";
  Random random(call.seed + 1);
  std::vector<double> ahead = inputs.student_values, behind = inputs.student_values;
  double slope = 0, size = 0;
  for (int64_t i = 0; i < call.rows; ++i)
    for (int64_t j = 0; j < call.classes; ++j) {
      const double g = gradient_at(call, result, i, j), direction = random.chance(0.5) ? 1 : -1;
      if (!here.row_counts[size_t(i)] && g != 0) return numbers("a row that does not count", g, 0);
      slope += g * direction, size += std::abs(g);
      const size_t at = size_t(i * call.classes + j);
      ahead[at] += step * direction, behind[at] -= step * direction;
    }
  const double wanted =
      (expected(call, inputs, ahead).objective - expected(call, inputs, behind).objective) / (2 * step);
  const Accuracy accuracy = accuracy_of(call.student);
  const double tolerance = std::max(accuracy.compute, 1e-8) * 4 * std::max(1.0, std::abs(here.objective)) +
                           (std::max(accuracy.compute, 1e-7) + accuracy.rounding) * size +
                           accuracy.smallest * double(call.rows * call.classes);
  if (!(std::abs(slope - wanted) <= tolerance)) return numbers("the gradient along a direction", slope, wanted);
  return "";
}

std::string compare_results(const Call& call, const Result& a, const Result& b, const Expected& expected) {
  const Accuracy accuracy = accuracy_of(call.student);
  for (const auto field : {&Evaluation::loss, &Evaluation::soft, &Evaluation::hard})
    if (!close(a.evaluation.*field, b.evaluation.*field, accuracy.compute))
      return numbers("two ISAs", a.evaluation.*field, b.evaluation.*field);
  for (int64_t i = 0; i < call.rows && call.gradient; ++i) {
    double largest = expected.gradient_scale[size_t(i)];
    for (int64_t j = 0; j < call.classes; ++j) largest = std::max(largest, std::abs(gradient_at(call, a, i, j)));
    for (int64_t j = 0; j < call.classes; ++j) {
      const double x = gradient_at(call, a, i, j), y = gradient_at(call, b, i, j);
      const double tolerance = accuracy.compute * largest + accuracy.rounding * std::abs(x) + accuracy.smallest;
      if (!(std::abs(x - y) <= tolerance)) return numbers("the gradient of two ISAs", x, y);
    }
  }
  return "";
}

}  // namespace pydistill::driver
