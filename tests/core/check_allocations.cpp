// Failing allocations: the caller gets std::bad_alloc, no memory is leaked, and no row is written.
#include <algorithm>
#include <fstream>
#include <new>

#include "allocations.hpp"
#include "gradient_memory.hpp"
#include "run_call.hpp"
#include "sections.hpp"

namespace pydistill::driver {
namespace {

enum class Written { nothing, whole_rows, parts_of_rows };

// Compares the outputs with those before the call and with those of a call that succeeded.
Written what_was_written(const Call& call, const Result& now, const Result& before, const Result& done) {
  if (now.loss != before.loss || now.soft != before.soft || now.hard != before.hard) return Written::parts_of_rows;
  Written written = Written::nothing;
  const size_t row = size_t(call.classes * size_of(call.student));
  for (size_t at = 0; at < now.gradient.size(); at += row) {
    const auto row_is = [&](const Result& r) {
      return std::equal(&now.gradient[at], &now.gradient[at] + row, &r.gradient[at]);
    };
    if (row_is(before)) continue;
    if (!row_is(done)) return Written::parts_of_rows;
    written = Written::whole_rows;
  }
  return written;
}

// Makes each allocation of a call fail in turn. Returns their number.
int fail_each(const Call& call, const IsaVariant& isa, int threads, bool all_after) {
  const Inputs inputs = make_inputs(call);
  Memory memory(Place::allocator);
  const Result done = run_call(call, inputs, memory, isa, threads);
  for (int n = 0;; ++n) {
    const auto report = [&](const char* what) {
      fail(std::string(isa.name) + ", " + std::to_string(threads) + " threads, allocation " + std::to_string(n) +
           (all_after ? " and all after it" : "") + " fails: " + what + "\n  " + describe(call));
    };
    const Prepared prepared = prepare(call, inputs, memory);
    const Result before = collect(call, inputs, prepared, Evaluation());
    const int64_t live = live_allocations();
    bool threw = false;
    Evaluation evaluation;
    try {
      const FailingAllocations failing(n, all_after);
      evaluation = evaluate(prepared.batch, isa, threads, prepared.rows);
    } catch (const std::bad_alloc&) {
      threw = true;
    }
    if (live_allocations() != live) report("memory was leaked");
    const Result now = collect(call, inputs, prepared, evaluation);
    if (!threw) {
      if (!same(call, now, done)) report("a later call has another result");
      return n;
    }
    const Written written = what_was_written(call, now, before, done);
    if (written == Written::parts_of_rows) report("parts of rows were written");
    if (written == Written::whole_rows) report("rows were written");
  }
}

int64_t address_space() {
  int64_t pages = 0;
  std::ifstream("/proc/self/statm") >> pages;
  return pages;
}

int check_gradient_memory() {
  constexpr size_t bytes = size_t(16) << 20;
  constexpr int attempts = 20;
  GradientMemory::release();
  const int64_t live = live_allocations();
  for (const size_t too_large : {size_t(1) << 60, SIZE_MAX / 2}) {
    try {
      const GradientMemory memory(too_large);
      fail("gradient memory of " + std::to_string(too_large) + " bytes was allocated");
    } catch (const std::bad_alloc&) {
    }
  }
  const int64_t before = address_space();
  for (int k = 0; k < attempts; ++k) try {
      const FailingAllocations failing(0, true);
      const GradientMemory memory(bytes);
      fail("gradient memory was allocated although the allocator had failed");
    } catch (const std::bad_alloc&) {
    }
  const int64_t grown = (address_space() - before) * sysconf(_SC_PAGESIZE);
  if (grown > int64_t(bytes) * attempts / 2)
    fail("gradient memory: " + std::to_string(attempts) + " failed allocations left " + std::to_string(grown) +
         " bytes mapped");
  GradientMemory::release();
  if (live_allocations() != live) fail("gradient memory: an allocation was leaked");
  return attempts + 2;
}

}  // namespace

std::string check_allocations() {
  int failures = check_gradient_memory();
  for (const Call& term : soft_terms())
    for (const IsaVariant* isa : usable_isas())
      for (const int threads : {1, 2})
        for (const bool all_after : {false, true}) {
          Call call = with_size(term, 64, 1025, 7);     // large enough for two threads
          call.in_place = all_after == (threads == 1);  // with either kind of failure and of thread count
          call.reduction = Reduction::none;
          const int n = fail_each(call, *isa, threads, all_after);
          if (n < 3) fail("fewer allocations than those of plans, outcomes and scratch memory: " + describe(call));
          failures += n;
        }
  return std::to_string(failures) + " failed allocations";
}

}  // namespace pydistill::driver
