// The ISA variants that were compiled, best first, and which of them this CPU can run.
#pragma once

#include <cstddef>
#include <vector>

#include "row_batch.hpp"

namespace pydistill {

// Rows [begin, end), with scratch memory that is aligned to 64 bytes. Allocates nothing and throws nothing: it
// runs in a parallel region.
using RunRows = void (*)(const RowBatch&, const RowPlan*, RowOutcome*, int64_t begin, int64_t end, bool past_cache,
                         char* scratch);

struct IsaVariant {
  const char* name;
  bool (*usable)();
  size_t (*scratch_bytes)(const RowBatch&);  // of one call of run_rows; a multiple of 64
  RunRows run_rows;
};

const std::vector<IsaVariant>& isa_variants();

}  // namespace pydistill
