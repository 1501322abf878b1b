#include "oracle.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "formulas.hpp"

namespace pydistill::driver {
namespace {

constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

double log_sum_exp(const double* x, int64_t n, double temperature) {
  const double max = *std::max_element(x, x + n);
  double sum = 0;
  for (int64_t j = 0; j < n; ++j) sum += std::exp((x[j] - max) / temperature);
  return max / temperature + std::log(sum);
}

struct Row {
  const double *student, *teacher;
  const int64_t* indices;
  double log_partition;
  int64_t label;
};

double mean_square(const Row& row, int64_t classes) {
  double sum = 0;
  for (int64_t j = 0; j < classes; ++j)
    if (std::isfinite(row.student[j]) || std::isfinite(row.teacher[j]))
      sum += std::pow(row.student[j] - row.teacher[j], 2);
  return sum / double(classes);
}

double pointwise(const Call& call, const Row& row) {
  const double t = call.options.temperature, beta = call.options.beta;
  const double student = log_sum_exp(row.student, call.classes, t);
  const double teacher = log_sum_exp(row.teacher, call.classes, t);
  double sum = 0;
  for (int64_t j = 0; j < call.classes; ++j)
    sum += divergence_of_class(call.options.divergence, beta, row.teacher[j] / t - teacher,
                               row.student[j] / t - student);
  return sum;
}

double topk(const Call& call, const Row& row) {
  const double t = call.options.temperature, beta = call.options.beta;
  const Divergence divergence = call.options.divergence;
  const double student = log_sum_exp(row.student, call.classes, t);
  const double listed = log_sum_exp(row.teacher, call.listed, t);
  const double teacher = call.bucket ? row.log_partition : listed;
  double sum = 0, rest = 0;
  int64_t k = 0;
  for (int64_t j = 0; j < call.classes; ++j) {
    const double log_q = row.student[j] / t - student;
    if (k < call.listed && row.indices[k] == j)
      sum += divergence_of_class(divergence, beta, row.teacher[k++] / t - teacher, log_q);
    else
      rest += std::exp(log_q);
  }
  if (call.listed == call.classes) return sum;
  return sum + divergence_of_class(divergence, beta, std::log(-std::expm1(listed - teacher)), std::log(rest));
}

double dkd(const Call& call, const Row& row) {
  const double t = call.options.temperature;
  const auto without_label = [&](const double* x) {
    std::vector<double> others(x, x + call.classes);
    others.erase(others.begin() + row.label);
    return others;
  };
  const std::vector<double> s = without_label(row.student), q = without_label(row.teacher);
  if (s.empty()) return 0;
  const int64_t n = int64_t(s.size());
  const double student = log_sum_exp(row.student, call.classes, t),
               teacher = log_sum_exp(row.teacher, call.classes, t);
  const double student_rest = log_sum_exp(s.data(), n, t), teacher_rest = log_sum_exp(q.data(), n, t);
  const auto kl = [](double log_p, double log_q) { return weighted_log_ratio(std::exp(log_p), log_p, log_q); };
  double within = 0;
  for (size_t j = 0; j < s.size(); ++j) within += kl(q[j] / t - teacher_rest, s[j] / t - student_rest);
  return kl(row.teacher[row.label] / t - teacher, row.student[row.label] / t - student) +
         kl(teacher_rest - teacher, student_rest - student) + call.options.beta * within;
}

double soft_term(const Call& call, const Row& row) {
  const LossOptions& options = call.options;
  if (options.divergence == Divergence::mse) return mean_square(row, call.classes);
  const double divergence = options.divergence == Divergence::dkd ? dkd(call, row)
                            : row.indices                         ? topk(call, row)
                                                                  : pointwise(call, row);
  return divergence * (options.t_squared ? options.temperature * options.temperature : 1);
}

double cross_entropy(const Call& call, const Row& row, const std::vector<double>& class_weight) {
  const double log_sum = log_sum_exp(row.student, call.classes, 1), smoothing = call.options.label_smoothing;
  double smooth = 0;
  if (smoothing > 0)
    for (int64_t j = 0; j < call.classes; ++j) smooth += class_weight[size_t(j)] * (log_sum - row.student[j]);
  return (1 - smoothing) * class_weight[size_t(row.label)] * (log_sum - row.student[row.label]) +
         smoothing * smooth / double(call.classes);
}

std::vector<double> as_doubles(DType dtype, const std::vector<char>& bytes, size_t n) {
  std::vector<double> x(n, 1);
  for (size_t i = 0; i < n && !bytes.empty(); ++i) x[i] = number_at(dtype, &bytes[i * size_t(size_of(dtype))]);
  return x;
}

int64_t label_of(const Call& call, const Inputs& in, int64_t row) {
  if (call.labels == Labels::none) return -1;
  int64_t wide = 0;
  int32_t narrow = 0;
  if (call.labels == Labels::wide)
    std::memcpy(&wide, &in.labels[size_t(row) * sizeof wide], sizeof wide);
  else
    std::memcpy(&narrow, &in.labels[size_t(row) * sizeof narrow], sizeof narrow), wide = narrow;
  return wide;
}

int64_t argmax(const double* x, int64_t n) { return std::max_element(x, x + n) - x; }

}  // namespace

Expected expected(const Call& call, const Inputs& in, const std::vector<double>& student) {
  const LossOptions& options = call.options;
  const double alpha = options.alpha;
  const DType compute = compute_dtype(call);
  const size_t rows = size_t(call.rows);
  const std::vector<double> weight = as_doubles(compute, in.sample_weight, rows);
  const std::vector<double> class_weight = as_doubles(compute, in.class_weight, size_t(call.classes));
  const std::vector<double> row_grad_output = as_doubles(compute, in.row_grad_output, rows);
  const bool mean = call.reduction == Reduction::mean;
  // A given denominator of 0 says that no row counts for the term.
  const bool soft_counts = !mean || call.soft_items != 0, hard_counts = !mean || call.hard_items != 0;

  Expected out;
  std::vector<double> soft(rows), hard(rows);
  int64_t soft_rows = 0, labelled_rows = 0, agree = 0, correct = 0;
  for (int64_t i = 0; i < call.rows; ++i) {
    const size_t at = size_t(i);
    const Row row{&student[at * size_t(call.classes)], &in.teacher_values[at * size_t(call.teacher_classes())],
                  in.indices.empty() ? nullptr : &in.indices[at * size_t(call.listed)],
                  in.log_partitions.empty() ? 0 : in.log_partitions[at], label_of(call, in, i)};
    const bool labelled = row.label >= 0, ignored = row.label == options.ignore_index;
    const bool counts = weight[at] > 0 && !(ignored && options.unlabeled == Unlabeled::skip);
    if (counts) out.soft_items += weight[at];
    if (counts && labelled) out.hard_items += weight[at] * class_weight[size_t(row.label)];
    const bool has_soft = counts && alpha > 0 && soft_counts;
    const bool has_hard = counts && alpha < 1 && hard_counts && labelled;
    out.row_counts.push_back(has_soft || has_hard);
    if (!has_soft && !has_hard) continue;
    if (has_soft) soft[at] = weight[at] * soft_term(call, row);
    if (has_hard) hard[at] = weight[at] * cross_entropy(call, row, class_weight);
    const int64_t best = argmax(row.student, call.classes);
    if (has_soft) {
      const int64_t k = argmax(row.teacher, call.teacher_classes());
      agree += best == (row.indices ? row.indices[k] : k);
      ++soft_rows;
    }
    if (labelled && hard_counts) correct += best == row.label, ++labelled_rows;
  }
  if (call.soft_items >= 0) out.soft_items = call.soft_items;
  if (call.hard_items >= 0) out.hard_items = call.hard_items;
  const double soft_items = mean && soft_counts && soft_rows ? out.soft_items : 1;
  const double hard_items = mean && hard_counts && labelled_rows ? out.hard_items : 1;
  for (size_t i = 0; i < rows; ++i) {
    out.row_loss.push_back(alpha * soft[i] + (1 - alpha) * hard[i]);
    out.soft += soft[i] / soft_items, out.hard += hard[i] / hard_items;
    const double scale = call.grad_output * row_grad_output[i] * weight[i];
    const double soft_scale = options.t_squared ? options.temperature : 1 / options.temperature;
    out.gradient_scale.push_back(std::abs(scale) * (alpha * soft_scale / soft_items + (1 - alpha) / hard_items));
    out.objective += call.grad_output * row_grad_output[i] *
                     (alpha * soft[i] / soft_items + (1 - alpha) * hard[i] / hard_items);
  }
  out.loss = alpha * out.soft + (1 - alpha) * out.hard;
  if (alpha == 0) out.soft = kNan;
  if (alpha == 1) out.hard = kNan;
  out.agreement = call.metrics && soft_rows ? double(agree) / double(soft_rows) : kNan;
  out.accuracy = call.metrics && labelled_rows ? double(correct) / double(labelled_rows) : kNan;
  return out;
}

}  // namespace pydistill::driver
