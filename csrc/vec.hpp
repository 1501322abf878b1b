// Vec<T>: a register full of float or double, in the register family that this compilation is for.
//
// CMake compiles kernels.cpp once per ISA variant and names the family's file, vec_<family>.hpp, in
// PYDISTILL_VECTORS. Only these files may depend on an instruction set. Everything that is compiled per ISA has
// internal linkage: otherwise the linker could keep one ISA's copy of an inline function for all of them.
//
// A new family is a file that
// - defines kVecBytes, the bytes of a register, and then includes vec_type.hpp, which has Vec<T> and every
//   operation on it as a template that needs no instruction by name;
// - overloads, for Vec<float> and Vec<double>, the templates for which the family has a better instruction;
// - defines kFastLookup, and lookup() if that is true: math.hpp then uses a table;
// - defines prefetch(), prefetch_to_write(), stream_fence() and FlushDenormals.
//
// The flags have -ffp-contract=off: a product and a sum are fused only where fma() is called. Otherwise the sums
// of the student and of the teacher could be rounded differently, and the divergence of equal rows would not be
// exactly 0.
#pragma once

#include PYDISTILL_VECTORS
