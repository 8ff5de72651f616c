// darkmatter_ext._C: facts about the build and the machine, see facts.h.
#include <pybind11/pybind11.h>

#include "facts.h"

PYBIND11_MODULE(_C, module) {
  module.doc() = "How darkmatter_ext was built, what this CPU can do, and constants of the ops.";
  module.def(
      "fact", &darkmatter::fact,
      "A fact by name, as text: compiler, cuda_archs, nvcc, commit, cpu_isa, cpu_isa_best, bound_rows, "
      "min_tokens_to_pack. Raises RuntimeError when DARKMATTER_CPU_ISA is not one this machine supports.");
}
