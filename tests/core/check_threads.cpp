// Threads: several callers at once, each on two OpenMP threads, gradient memory that they exchange, and a fork.
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <thread>

#include "gradient_memory.hpp"
#include "parallel.hpp"
#include "run_call.hpp"
#include "sections.hpp"

#if !defined(_OPENMP)
#error "the driver also tests threads: build it with OpenMP"
#endif

namespace pydistill::driver {
namespace {

constexpr int kCallers = 4, kThreads = 2;

std::vector<Call> calls_for_two_threads() {
  std::vector<Call> calls;
  for (const Call& term : soft_terms()) {
    Call call = with_size(term, 65, 1025, 7);
    call.options.temperature = 2, call.metrics = true, call.ignored_rows = true;
    call.seed = calls.size() + 1;
    calls.push_back(call);
  }
  return calls;
}

// Evaluates the same inputs as the other callers, with a gradient of its own in memory that another caller may
// just have released. Returns whether the results are always those of a single caller.
bool repeat(const Call& call, const Inputs& inputs, const Prepared& shared, const IsaVariant& isa,
            const Result& alone, int times) {
  for (int k = 0; k < times; ++k) {
    const size_t bytes = alone.gradient.size();
    GradientMemory memory(bytes * size_t(1 + k % 3));
    Prepared own = shared;
    own.batch.gradient.data = memory.data();
    const Evaluation evaluation = evaluate(own.batch, isa, kThreads, own.rows);
    if (!same(call, alone, collect(call, inputs, own, evaluation))) return false;
  }
  return true;
}

// Takes and releases gradient memory many times. Returns whether no other caller wrote to it meanwhile. Sleeps
// after every step: on two cores, callers that do not sleep seldom overlap.
bool recycle(int caller) {
  Random random{uint64_t(caller)};
  const auto let_others_run = [&] { std::this_thread::sleep_for(std::chrono::microseconds(random.below(30))); };
  for (int k = 0; k < 1000; ++k) {
    {
      GradientMemory memory(size_t(1 + random.below(3)) << 21);
      char* first = static_cast<char*>(memory.data());
      char* last = first + memory.bytes() - 1;
      *first = *last = char(caller);
      let_others_run();
      if (*first != caller || *last != caller) return false;
    }
    let_others_run();
    if (random.chance(0.5)) GradientMemory::release();
  }
  return true;
}

// Calls f(caller) for all callers at once, each on a thread of its own. Returns whether all returned true.
template <class F>
bool all_at_once(F f) {
  bool good[kCallers] = {};
  std::vector<std::thread> callers;
  for (int caller = 0; caller < kCallers; ++caller)
    callers.emplace_back([&, caller] { good[caller] = f(caller); });
  for (std::thread& caller : callers) caller.join();
  return std::all_of(good, good + kCallers, [](bool x) { return x; });
}

}  // namespace

std::string check_threads() {
  const std::vector<const IsaVariant*> isas = usable_isas();
  if (!all_at_once(recycle)) fail("two callers had the same gradient memory at the same time");
  int calls = 0;
  for (const Call& call : calls_for_two_threads())
    for (const IsaVariant* isa : isas) {
      const Inputs inputs = make_inputs(call);
      Memory memory(Place::allocator), memory_alone(Place::allocator);
      const Result alone = run_call(call, inputs, memory_alone, *isa, 1);
      const Prepared shared = prepare(call, inputs, memory);
      if (!all_at_once([&](int) { return repeat(call, inputs, shared, *isa, alone, 3); }))
        fail(std::string(isa->name) + ": other bits on two threads with four callers\n  " + describe(call));
      calls += 3 * kCallers;
    }
  GradientMemory::release();
  return std::to_string(calls) + " calls on " + std::to_string(kThreads) + " threads each, by " +
         std::to_string(kCallers) + " callers at once";
}

std::string check_fork() {
  watch_forks();
  Call call = calls_for_two_threads().front();
  const Inputs inputs = make_inputs(call);
  Memory memory(Place::allocator);
  const IsaVariant& isa = *usable_isas().front();
  const Result before = run_call(call, inputs, memory, isa, kThreads);
  const pid_t child = fork();
  if (child == 0) {
    alarm(60);  // a child that waited for the parent's threads would never end
    _exit(same(call, before, run_call(call, inputs, memory, isa, kThreads)) ? 0 : 1);
  }
  int status = 0;
  if (child < 0 || waitpid(child, &status, 0) != child || status != 0)
    fail("a forked child ended with status " + std::to_string(status));
  return "one child";
}

std::string plant(const std::string& what) {
  if (what == "undefined") {
    const volatile int largest = INT32_MAX;
    return std::to_string(largest + 1);
  }
  if (what == "free") {
    const int* number = new int(1);
    int seen = 0;
    std::thread reader([&] { seen = *number; });
    std::this_thread::sleep_for(std::chrono::milliseconds(20));  // does not synchronise
    delete number;
    reader.join();
    return what + std::string(size_t(seen), '.');
  }
  Call call;
  call.rows = 65, call.classes = 1025;
  const Inputs inputs = make_inputs(call);
  Memory memory(what == "guard" ? Place::before_guard : Place::allocator);
  Prepared prepared = prepare(call, inputs, memory);
  if (what == "overflow" || what == "guard") ++prepared.batch.classes;
  if (what == "race") prepared.batch.gradient.stride = 0;
  evaluate(prepared.batch, *usable_isas().back(), what == "race" ? kThreads : 1, prepared.rows);
  return what;
}

}  // namespace pydistill::driver
