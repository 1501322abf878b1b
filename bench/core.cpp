// core_bench ISA ROWS CLASSES REPEATS: calls the core without Python and torch, for instruction counts and
// profilers.
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "dispatch.hpp"
#include "evaluate.hpp"

using namespace pydistill;

namespace {

const IsaVariant* find_isa(const char* name) {
  for (const IsaVariant& isa : isa_variants())
    if (isa.usable() && std::strcmp(name, isa.name) == 0) return &isa;
  return nullptr;
}

// Logits in [-6, 6), the same on every machine: how often the running maximum rises depends on them.
std::vector<float> logits(int64_t n, uint32_t seed) {
  std::vector<float> x(n);
  for (float& value : x) {
    seed = seed * 1664525u + 1013904223u;
    value = float(seed >> 8) / float(1 << 24) * 12 - 6;
  }
  return x;
}

}  // namespace

int main(int argc, char** argv) {
  const IsaVariant* isa = argc == 5 ? find_isa(argv[1]) : nullptr;
  const int64_t rows = argc == 5 ? std::atoll(argv[2]) : 0, classes = argc == 5 ? std::atoll(argv[3]) : 0;
  const int repeats = argc == 5 ? std::atoi(argv[4]) : 0;
  if (!isa || rows < 1 || classes < 1 || repeats < 1) {
    std::fprintf(stderr, "usage: core_bench ISA ROWS CLASSES REPEATS; this CPU supports:");
    for (const IsaVariant& variant : isa_variants())
      if (variant.usable()) std::fprintf(stderr, " %s", variant.name);
    std::fprintf(stderr, "\n");
    return 2;
  }
  std::vector<float> student = logits(rows * classes, 1), teacher = logits(rows * classes, 2);
  std::vector<float> gradient(rows * classes);
  std::vector<int64_t> labels(rows);
  for (int64_t i = 0; i < rows; ++i) labels[i] = i * 7 % classes;
  RowBatch batch;
  batch.rows = rows, batch.classes = classes;
  batch.student = {student.data(), DType::float32, classes};
  batch.teacher = {teacher.data(), DType::float32, classes};
  batch.labels = labels.data();
  batch.options.temperature = 4, batch.options.alpha = 0.7;
  batch.gradient = {gradient.data(), DType::float32, classes};

  double loss = 0;
  const auto start = std::chrono::steady_clock::now();
  for (int k = 0; k < repeats; ++k) loss = evaluate(batch, *isa, 1, {}).loss;
  const std::chrono::duration<double> elapsed = std::chrono::steady_clock::now() - start;
  const double calls = double(repeats), elements = calls * double(rows * classes);
  std::printf("%s %lld x %lld: loss %.9g, %.3f us per call, %.3f ns per element\n", isa->name, (long long)rows,
              (long long)classes, loss, elapsed.count() / calls * 1e6, elapsed.count() / elements * 1e9);
}
