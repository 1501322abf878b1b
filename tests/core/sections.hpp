// The sections of the driver. Each returns how much it did, in words, and reports what is wrong through fail().
#pragma once

#include <string>

#include "call.hpp"

namespace pydistill::driver {

// Prints the message; the program will exit with 1. Ends at once after the twentieth.
void fail(const std::string& message);
bool failed();

// Printed when a sanitizer ends the program. Null: none.
void set_current(const Call* call);

std::string check_calls();        // every form of call, in guarded memory, against the oracle and between ISAs
std::string check_large();        // a gradient that is written past the caches
std::string check_refusals();     // bad labels and weights: found before anything is written
std::string check_allocations();  // out of memory at every allocation, on one thread and on two
std::string check_threads();  // four callers at once, each on two threads, and gradient memory that is recycled
std::string check_fork();     // a child evaluates after its parent has used the thread pool
// Does something for which a sanitizer must end the program: "overflow", "guard", "undefined", "race" or "free".
std::string plant(const std::string& what);

}  // namespace pydistill::driver
