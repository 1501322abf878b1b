// Common parts of the x86 register families: prefetches, the fence after streaming stores, the flag for denormals.
#pragma once

#include <immintrin.h>

namespace pydistill::PYDISTILL_ISA {
namespace {

inline void prefetch(const char* p) { _mm_prefetch(p, _MM_HINT_T0); }
inline void prefetch_to_write(const char* p) { __builtin_prefetch(p, 1); }
inline void stream_fence() { _mm_sfence(); }

// Flushes denormal results to 0 during the lifetime of the object. Powers of small exponentials are often
// denormal, and a denormal takes a hundred cycles on some CPUs. Numbers below 1e-38 do not matter to a loss.
class FlushDenormals {
 public:
  FlushDenormals() : saved_(_mm_getcsr()) { _mm_setcsr(saved_ | 0x8000u); }
  ~FlushDenormals() { _mm_setcsr(saved_); }
  FlushDenormals(const FlushDenormals&) = delete;
  FlushDenormals& operator=(const FlushDenormals&) = delete;

 private:
  unsigned saved_;
};

}  // namespace
}  // namespace pydistill::PYDISTILL_ISA
