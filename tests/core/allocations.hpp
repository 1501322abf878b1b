// Operator new as the core and the driver call it: counted, and made to fail when asked.
#pragma once

#include <cstdint>

namespace pydistill::driver {

int64_t live_allocations();

// While one lives, allocations fail, on every thread: the n-th from now on (0: the first), and all after it if
// `all_after`.
class FailingAllocations {
 public:
  FailingAllocations(int64_t n, bool all_after);
  ~FailingAllocations();
  FailingAllocations(const FailingAllocations&) = delete;
  FailingAllocations& operator=(const FailingAllocations&) = delete;
};

}  // namespace pydistill::driver
