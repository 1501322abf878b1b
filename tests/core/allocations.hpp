// Counts the allocations by operator new in the core and the driver, and makes chosen ones fail.
#pragma once

#include <cstdint>

namespace pydistill::driver {

int64_t live_allocations();

// During the lifetime of an object the n-th allocation on any thread fails (0: the first), and with `all_after`
// all later ones too.
class FailingAllocations {
 public:
  FailingAllocations(int64_t n, bool all_after);
  ~FailingAllocations();
  FailingAllocations(const FailingAllocations&) = delete;
  FailingAllocations& operator=(const FailingAllocations&) = delete;
};

}  // namespace pydistill::driver
