// darkmatter_ext._C: host-side facts for build_info(), and the constants of the ops that Python needs too.
#include <pybind11/pybind11.h>

#include "cpu/kernels/isa.h"
#include "cpu/screen/certificate.h"
#include "margins.h"

namespace py = pybind11;

static py::dict build() {
  py::dict facts;
#if defined(__clang__)
  facts["compiler"] = "clang " __clang_version__;
#else
  facts["compiler"] = "g++ " __VERSION__;
#endif
  facts["cuda_archs"] = DARKMATTER_CUDA_ARCHS;
  facts["nvcc"] = DARKMATTER_NVCC;
  facts["commit"] = DARKMATTER_COMMIT;
  return facts;
}

PYBIND11_MODULE(_C, module) {
  module.doc() = "How darkmatter_ext was built, what this CPU can do, and constants of the ops.";
  module.attr("BOUND_ROWS") = static_cast<int>(darkmatter::kBoundRows);
  module.attr("MIN_TOKENS_TO_PACK") = darkmatter::cpu::kMinTokensToPack;
  module.def("build", &build, "Facts fixed at build time.");
  module.def(
      "cpu_isa_best", [] { return darkmatter::cpu::isa_name(darkmatter::cpu::best_isa()); },
      "The best instruction set this machine supports: scalar, avx2 or avx512.");
  module.def(
      "cpu_isa", [] { return darkmatter::cpu::isa_name(darkmatter::cpu::active_isa()); },
      "The instruction set in use. Raises RuntimeError when DARKMATTER_CPU_ISA is not one this machine supports.");
}
