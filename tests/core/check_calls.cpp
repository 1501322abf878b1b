// Results of every form of call, in every kind of memory, on every ISA.
#include <algorithm>
#include <cstring>

#include "compare.hpp"
#include "sections.hpp"

namespace pydistill::driver {
namespace {

// Around multiples of the vectors' lanes, and around blocks of 256, 512 and 1024 elements.
constexpr int64_t kClasses[] = {1,   2,   3,   4,   5,    7,    8,    9,    15,   16,   17,
                                31,  32,  33,  63,  64,   65,   127,  128,  129,  255,  256,
                                257, 511, 512, 513, 1000, 1023, 1024, 1025, 1100, 2047, 2049};
constexpr DType kDTypes[] = {DType::float32, DType::float64, DType::bfloat16, DType::float16};

// Checks one call on every ISA in every kind of memory. The oracle does not cover wild values.
void check_call(const Call& call, std::vector<Memory>& memories) {
  set_current(&call);
  const Inputs inputs = make_inputs(call);
  const bool has_oracle = call.values != Values::wild;
  const Expected wanted = has_oracle ? expected(call, inputs, inputs.student_values) : Expected();
  const auto report = [&](const IsaVariant& isa, const std::string& what) {
    if (!what.empty()) fail(std::string(isa.name) + ": " + what + "\n  " + describe(call));
  };
  Result best;
  for (const IsaVariant* isa : usable_isas()) {
    const Result result = run_call(call, inputs, memories[0], *isa);
    for (size_t k = 1; k < memories.size(); ++k)
      if (!same(call, result, run_call(call, inputs, memories[k], *isa)))
        report(*isa, "the result depends on the address");
    if (!result.inputs_kept) report(*isa, "the inputs were written to");
    if (!result.gaps_kept) report(*isa, "the gaps between the gradient's rows were written to");
    if (!has_oracle) continue;
    report(*isa, compare_values(call, result, wanted));
    if (best.evaluation.loss == 0 && best.gradient.empty()) best = result;
    report(*isa, compare_results(call, best, result, wanted));
    if (call.gradient && isa == usable_isas().front())
      report(*isa, compare_gradient(call, inputs, result, wanted));
  }
  set_current(nullptr);
}

Inputs rows_of(const Call& call, const Inputs& all, int64_t first, int64_t rows) {
  const auto part = [&](const std::vector<char>& from, int64_t row_bytes) {
    return std::vector<char>(from.begin() + first * row_bytes, from.begin() + (first + rows) * row_bytes);
  };
  Inputs in;
  in.student = part(all.student, call.classes * size_of(call.student));
  in.teacher = part(all.teacher, call.classes * size_of(call.teacher));
  in.labels = part(all.labels, sizeof(int64_t));
  return in;
}

}  // namespace

std::string check_calls() {
  std::vector<Memory> memories;
  for (const Place place : {Place::allocator, Place::before_guard, Place::after_guard})
    memories.emplace_back(place);
  uint64_t calls = 0;
  for (const Call& term : soft_terms())
    for (const DType student : kDTypes)
      for (const DType teacher : kDTypes)
        for (const int64_t classes : kClasses)
          for (const bool in_place : {false, true}) {
            Call call = term;
            call.student = student, call.teacher = teacher;
            call.classes = classes, call.in_place = in_place;
            check_call(with_options(call, ++calls), memories);
          }
  return std::to_string(calls) + " calls on each of " + std::to_string(usable_isas().size()) +
         " ISAs, each in three kinds of memory";
}

// Rows are independent: evaluated alone, with a gradient too small to be written past the caches, a few of them
// must have the same bits as among all rows.
std::string check_large() {
  int calls = 0;
  for (const DType student : {DType::float32, DType::float64})
    for (const int64_t classes : {33, 300007}) {
      // Each dtype and each number of classes once beside either guard.
      const Place place = ++calls % 3 == 1 ? Place::before_guard : Place::after_guard;
      Call call;
      call.student = student, call.teacher = DType::float32, call.classes = classes;
      call.rows = (int64_t(33) << 20) / (classes * size_of(student)) + 1;
      call.reduction = Reduction::none, call.options.temperature = 3, call.options.divergence = Divergence::jsd;
      call.gradient_gap = 1;  // every other row begins at an odd address
      call.seed = uint64_t(calls);
      set_current(&call);
      Memory memory(place), memory_of_part(Place::allocator);
      const Inputs inputs = make_inputs(call);
      for (const IsaVariant* isa : usable_isas()) {
        const Result whole = run_call(call, inputs, memory, *isa);
        if (!whole.gaps_kept || !whole.inputs_kept)
          fail("memory outside of the gradient's rows was written: " + describe(call));
        for (const int64_t first : {int64_t(0), call.rows - 5}) {
          Call part = call;
          part.rows = 5;
          const Result alone = run_call(part, rows_of(call, inputs, first, part.rows), memory_of_part, *isa);
          const auto at = whole.gradient.begin() + first * call.gradient_stride() * size_of(student);
          if (!std::equal(alone.gradient.begin(), alone.gradient.end(), at))
            fail(std::string(isa->name) + ": a row has other bits among many rows\n  " + describe(call));
        }
      }
    }
  set_current(nullptr);
  return std::to_string(calls) + " calls on each ISA";
}

std::string check_invalid() {
  Memory memory(Place::before_guard);
  int calls = 0;
  for (const IsaVariant* isa : usable_isas())
    for (const int64_t label : {int64_t(-1), int64_t(10), int64_t(1) << 40, INT64_MIN, INT64_MAX, int64_t(0)})
      for (const bool in_place : {false, true}) {
        Call call;
        call.rows = 4, call.class_weight = call.sample_weight = true, call.in_place = in_place;
        call.reduction = Reduction::none;
        Inputs inputs = make_inputs(call);
        const bool bad_weight = label == 0;
        std::memcpy(&inputs.labels[2 * sizeof label], &label, sizeof label);
        const float negative = -1;
        if (bad_weight) std::memcpy(&inputs.sample_weight[2 * sizeof negative], &negative, sizeof negative);
        const Result result = run_call(call, inputs, memory, *isa);
        const Evaluation& e = result.evaluation;
        const bool found =
            e.problem == (bad_weight ? Problem::bad_weight : Problem::bad_label) && e.problem_row == 2;
        if (!found) fail(std::string(isa->name) + ": label " + std::to_string(label) + " was not reported");
        const std::vector<char> before =
            in_place ? inputs.student : std::vector<char>(result.gradient.size(), result.gradient.front());
        if (result.gradient != before || !result.inputs_kept) fail("an invalid call wrote something");
        ++calls;
      }
  return std::to_string(calls) + " calls";
}

}  // namespace pydistill::driver
