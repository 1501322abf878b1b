// The ISA variants that were compiled, best first, and whether this CPU supports them.
#pragma once

#include <cstddef>
#include <vector>

#include "row_batch.hpp"

namespace pydistill {

// Computes the rows [begin, end). The scratch memory is aligned to 64 bytes. The function runs in a parallel
// region, so it must not allocate or throw.
using RunRows = void (*)(const RowBatch&, const RowPlan*, RowOutcome*, int64_t begin, int64_t end, bool past_cache,
                         char* scratch);

struct IsaVariant {
  const char* name;
  bool (*usable)();
  size_t (*scratch_bytes)(const RowBatch&);  // scratch memory for one call of run_rows; a multiple of 64
  RunRows run_rows;
};

const std::vector<IsaVariant>& isa_variants();

}  // namespace pydistill
