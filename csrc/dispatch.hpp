// The ISA variants that were compiled, best first, and which of them this CPU can run.
#pragma once

#include <vector>

#include "row_batch.hpp"

namespace pydistill {

using RunRows = void (*)(const RowBatch&, const RowPlan*, RowOutcome*, int64_t begin, int64_t end,
                         bool past_cache);

struct IsaVariant {
  const char* name;
  bool (*usable)();
  RunRows run_rows;
};

const std::vector<IsaVariant>& isa_variants();

}  // namespace pydistill
