#include "cpu/isa.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace darkmatter {

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::vnni:
      return "avx512_vnni";
    case Isa::avx512:
      return "avx512";
    case Isa::avx2:
      return "avx2";
    default:
      return "scalar";
  }
}

Isa best_isa() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool fma = __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  if (fma && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    return __builtin_cpu_supports("avx512vnni") ? Isa::vnni : Isa::avx512;
  }
  if (fma && __builtin_cpu_supports("avx2")) {
    return Isa::avx2;
  }
#endif
  return Isa::scalar;
}

static Isa requested_isa() {
  const char* wanted = std::getenv("DARKMATTER_CPU_ISA");
  if (wanted == nullptr || *wanted == '\0') {
    return best_isa();
  }
  for (Isa isa : {Isa::scalar, Isa::avx2, Isa::avx512, Isa::vnni}) {
    if (std::string(wanted) == isa_name(isa)) {
      if (isa > best_isa()) {
        throw std::runtime_error(
            std::string("DARKMATTER_CPU_ISA: must be supported by this machine (") + isa_name(best_isa()) + "), got " +
            wanted);
      }
      return isa;
    }
  }
  throw std::runtime_error(
      std::string("DARKMATTER_CPU_ISA: must be scalar, avx2, avx512 or avx512_vnni, got ") + wanted);
}

Isa active_isa() {
  static const Isa isa = requested_isa();
  return isa;
}

}  // namespace darkmatter
