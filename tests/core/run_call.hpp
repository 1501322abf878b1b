// Runs a Call: places its arrays in memory, calls the core and collects the results.
#pragma once

#include "call.hpp"
#include "memory.hpp"

namespace pydistill::driver {

// A call whose arrays are in memory.
struct Prepared {
  RowBatch batch;
  RowOutputs rows;
};
Prepared prepare(const Call& call, const Inputs& inputs, Memory& memory);

// Everything that a call returned and wrote, and whether it left all other memory unchanged.
struct Result {
  Evaluation evaluation;
  std::vector<char> gradient, loss, soft, hard;  // empty if the call does not ask for it
  bool inputs_kept = true, gaps_kept = true;
};
Result run_call(const Call& call, const Inputs& inputs, Memory& memory, const IsaVariant& isa, int threads = 1);
// The result of a prepared call that has been evaluated.
Result collect(const Call& call, const Inputs& inputs, const Prepared& prepared, const Evaluation& evaluation);

// Equal to the bit; NaN equals NaN.
bool same(const Call& call, const Result& a, const Result& b);
double gradient_at(const Call& call, const Result& result, int64_t row, int64_t column);

std::vector<const IsaVariant*> usable_isas();

}  // namespace pydistill::driver
