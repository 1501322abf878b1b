// The only place that calls the core.
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

// What a call returned and wrote, to the bit; and what it should have left alone.
struct Result {
  Evaluation evaluation;
  std::vector<char> gradient, loss, soft, hard;  // empty where none was asked for
  bool inputs_kept = true, gaps_kept = true;
};
Result run_call(const Call& call, const Inputs& inputs, Memory& memory, const IsaVariant& isa, int threads = 1);
// Of a call that was prepared before and has been evaluated.
Result collect(const Call& call, const Inputs& inputs, const Prepared& prepared, const Evaluation& evaluation);

// Equal to the bit; NaN equals NaN.
bool same(const Call& call, const Result& a, const Result& b);
double gradient_at(const Call& call, const Result& result, int64_t row, int64_t column);

std::vector<const IsaVariant*> usable_isas();

}  // namespace pydistill::driver
