// The sections of the driver. Each reports errors through fail() and returns a summary of what it checked.
#pragma once

#include <string>

#include "call.hpp"

namespace pydistill::driver {

// Prints the message; the program will exit with 1, and does so at once after the twentieth message.
void fail(const std::string& message);

// The call to print if a sanitizer ends the program; null for none.
void set_current(const Call* call);

std::string check_calls();        // every form of call, in guarded memory, against the oracle and between ISAs
std::string check_large();        // a gradient that is written past the caches
std::string check_invalid();      // invalid labels and weights are reported before anything is written
std::string check_allocations();  // every allocation fails once, on one thread and on two
std::string check_threads();  // four callers at once, each on two threads, and gradient memory that they exchange
std::string check_fork();     // a child evaluates a call after its parent has used the thread pool
// Commits an error for which a sanitizer must end the program: "overflow", "guard", "undefined", "race" or "free".
std::string plant(const std::string& what);

}  // namespace pydistill::driver
