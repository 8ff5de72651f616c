// What this build and this machine are, by name, as text: for Python, which asks through the pybind11 module where
// there is one for its version, and through the C function of the CPU library else. A wheel then serves every version
// of Python.
#pragma once

#include <string>

namespace darkmatter {

// compiler, cuda_archs, nvcc, commit; cpu_isa (in use), cpu_isa_best (of this machine): scalar, avx2, ...; and the
// constants bound_rows, min_tokens_to_pack. Throws std::runtime_error for a DARKMATTER_CPU_ISA this machine does not
// support, or another name.
std::string fact(const std::string& name);

}  // namespace darkmatter

// The same for callers from C: writes at most size - 1 characters to text; returns 0, or 1 where text is an error's
// message.
extern "C" __attribute__((visibility("default"))) int darkmatter_fact(const char* name, char* text, int size);
