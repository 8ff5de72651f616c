#include "facts.h"

#include <cstring>
#include <exception>
#include <stdexcept>

#include "cpu/kernels/isa.h"
#include "cpu/screen/certificate.h"
#include "margins.h"

namespace darkmatter {

std::string fact(const std::string& name) {
  if (name == "compiler") {
#if defined(__clang__)
    return "clang " __clang_version__;
#else
    return "g++ " __VERSION__;
#endif
  }
  if (name == "cuda_archs") return DARKMATTER_CUDA_ARCHS;
  if (name == "nvcc") return DARKMATTER_NVCC;
  if (name == "commit") return DARKMATTER_COMMIT;
  if (name == "cpu_isa") return cpu::isa_name(cpu::active_isa());
  if (name == "cpu_isa_best") return cpu::isa_name(cpu::best_isa());
  if (name == "bound_rows") return std::to_string(kBoundRows);
  if (name == "min_tokens_to_pack") return std::to_string(cpu::kMinTokensToPack);
  throw std::runtime_error("fact: unknown name " + name);
}

}  // namespace darkmatter

extern "C" int darkmatter_fact(const char* name, char* text, int size) {
  std::string found;
  int failed = 0;
  try {
    found = darkmatter::fact(name);
  } catch (const std::exception& error) {
    found = error.what();
    failed = 1;
  }
  std::strncpy(text, found.c_str(), size - 1);
  text[size - 1] = '\0';
  return failed;
}
