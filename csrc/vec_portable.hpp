// The register family for any other machine: 16 bytes, without particular instructions.
#pragma once

namespace pydistill::PYDISTILL_ISA {
namespace {
constexpr int kVecBytes = 16;
}
}  // namespace pydistill::PYDISTILL_ISA

#include "vec_type.hpp"

namespace pydistill::PYDISTILL_ISA {
namespace {

constexpr bool kFastLookup = false;

inline void prefetch(const char*) {}
inline void prefetch_to_write(const char*) {}
inline void stream_fence() {}

struct FlushDenormals {
  FlushDenormals() {}  // avoids a warning about an unused variable
};

}  // namespace
}  // namespace pydistill::PYDISTILL_ISA
