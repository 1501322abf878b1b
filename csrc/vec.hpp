// Vec<T>: a vector register of float or double, of the register family for which this file is compiled.
//
// CMake compiles kernels.cpp once per ISA variant and names the family's file, vec_<family>.hpp, in
// PYDISTILL_VECTORS. Only these files may depend on an instruction set. Everything that is compiled per ISA has
// internal linkage: otherwise the linker could keep one ISA's copy of an inline function for all of them.
//
// A new family is a file that
// - defines kVecBytes, the size of a register in bytes, and then includes vec_type.hpp, which defines Vec<T> and
//   implements every operation on it as a template that uses no particular instruction;
// - overloads, for Vec<float> and Vec<double>, the templates for which the family has a better instruction;
// - defines kFastLookup, and, if it is true, lookup(); math.hpp then uses a table;
// - defines prefetch(), prefetch_to_write(), stream_fence() and FlushDenormals.
//
// The compiler flag -ffp-contract=off ensures that a product and a sum are fused only by a call of fma().
// Otherwise the sums of the student and of the teacher could be rounded differently, and the divergence of equal
// rows would not be exactly 0.
#pragma once

#include PYDISTILL_VECTORS
