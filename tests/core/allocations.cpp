// The linker's --wrap redirects the calls in this program's objects to the functions here. The sanitizer keeps its
// own operator new, which ThreadSanitizer does not let a program replace.
#include "allocations.hpp"

#include <atomic>
#include <cstddef>
#include <new>

namespace pydistill::driver {
namespace {

// Relaxed: with a stronger order ThreadSanitizer would see a synchronisation in every allocation.
std::atomic<int64_t> live{0}, made{0}, first_to_fail{-1}, last_to_fail{-1};

// Counts an allocation. Returns false if it is to fail.
bool count_allocation() {
  const int64_t n = made.fetch_add(1, std::memory_order_relaxed);
  if (n >= first_to_fail.load(std::memory_order_relaxed) && n <= last_to_fail.load(std::memory_order_relaxed))
    return false;
  live.fetch_add(1, std::memory_order_relaxed);
  return true;
}
void count_release(void* p) {
  if (p) live.fetch_sub(1, std::memory_order_relaxed);
}

}  // namespace

int64_t live_allocations() { return live.load(std::memory_order_relaxed); }

FailingAllocations::FailingAllocations(int64_t n, bool all_after) {
  const int64_t first = made.load(std::memory_order_relaxed) + n;
  last_to_fail.store(all_after ? INT64_MAX : first, std::memory_order_relaxed);
  first_to_fail.store(first, std::memory_order_relaxed);
}
FailingAllocations::~FailingAllocations() {
  last_to_fail.store(-1, std::memory_order_relaxed);
  first_to_fail.store(-1, std::memory_order_relaxed);
}

}  // namespace pydistill::driver

using pydistill::driver::count_allocation, pydistill::driver::count_release;

// The forms that clang and GCC call: (mangled name, parameters, arguments).
#define WRAPPED_NEW(name, parameters, arguments)     \
  void* __real_##name parameters;                    \
  void* __wrap_##name parameters {                   \
    if (!count_allocation()) throw std::bad_alloc(); \
    return __real_##name arguments;                  \
  }
#define WRAPPED_DELETE(name, parameters, arguments) \
  void __real_##name parameters;                    \
  void __wrap_##name parameters {                   \
    count_release(p);                               \
    __real_##name arguments;                        \
  }
extern "C" {
WRAPPED_NEW(_Znwm, (size_t n), (n))
WRAPPED_NEW(_Znam, (size_t n), (n))
WRAPPED_NEW(_ZnwmSt11align_val_t, (size_t n, std::align_val_t a), (n, a))
void* __real__ZnwmRKSt9nothrow_t(size_t n, const std::nothrow_t& nothrow);
void* __wrap__ZnwmRKSt9nothrow_t(size_t n, const std::nothrow_t& nothrow) {
  return count_allocation() ? __real__ZnwmRKSt9nothrow_t(n, nothrow) : nullptr;
}
WRAPPED_DELETE(_ZdlPv, (void* p), (p))
WRAPPED_DELETE(_ZdlPvm, (void* p, size_t n), (p, n))
WRAPPED_DELETE(_ZdaPv, (void* p), (p))
WRAPPED_DELETE(_ZdlPvSt11align_val_t, (void* p, std::align_val_t a), (p, a))
WRAPPED_DELETE(_ZdlPvmSt11align_val_t, (void* p, size_t n, std::align_val_t a), (p, n, a))
}
