// The table of ISA variants, from the list that CMake generates.
#include "dispatch.hpp"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

// isa_list.inc has ISA_ENTRY(name, condition) for each variant, best first.
#define ISA_ENTRY(name, condition)                                                                         \
  namespace pydistill::name {                                                                              \
  size_t scratch_bytes(const RowBatch&);                                                                   \
  void run_rows(const RowBatch&, const RowPlan*, RowOutcome*, int64_t begin, int64_t end, bool past_cache, \
                char* scratch);                                                                            \
  }
#include "isa_list.inc"
#undef ISA_ENTRY

namespace pydistill {
namespace {

#if defined(__x86_64__)
// Whether the CPU has the F16C instructions. Every variant that needs them also checks
// __builtin_cpu_supports("avx2") or "avx512f", which also test whether the operating system saves the registers.
bool cpu_has_f16c() {
  unsigned a, b, c = 0, d;
  return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C) != 0;
}
#endif

}  // namespace

const std::vector<IsaVariant>& isa_variants() {
  static const std::vector<IsaVariant> variants = {
#define ISA_ENTRY(name, condition) {#name, [] { return bool(condition); }, &name::scratch_bytes, &name::run_rows},
#include "isa_list.inc"
#undef ISA_ENTRY
  };
  return variants;
}

}  // namespace pydistill
