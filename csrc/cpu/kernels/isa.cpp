#include "cpu/kernels/isa.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace darkmatter::cpu {

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::vnni:
      return "avx512_vnni";
    case Isa::avx512:
      return "avx512";
    case Isa::avx_vnni:
      return "avx_vnni";
    case Isa::avx2:
      return "avx2";
    default:
      return "scalar";
  }
}

#if defined(__x86_64__)
// __builtin_cpu_supports("avxvnni") exists only from gcc 14 on.
static bool has_avx_vnni() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  return __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) && (eax >> 4 & 1) != 0;
}
#endif

bool supports(Isa isa) {
  if (isa == Isa::scalar) {
    return true;
  }
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") || !__builtin_cpu_supports("f16c")) {
    return false;
  }
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  switch (isa) {
    case Isa::avx2:
      return true;
    case Isa::avx_vnni:
      return has_avx_vnni();
    case Isa::avx512:
      return avx512;
    default:
      return avx512 && __builtin_cpu_supports("avx512vnni");
  }
#else
  return false;
#endif
}

Isa best_isa() {
  Isa best = Isa::scalar;
  for (Isa isa : kIsas) {
    if (supports(isa)) {
      best = isa;
    }
  }
  return best;
}

static Isa requested_isa() {
  const char* wanted = std::getenv("DARKMATTER_CPU_ISA");
  if (wanted == nullptr || *wanted == '\0') {
    return best_isa();
  }
  std::string names;
  for (Isa isa : kIsas) {
    if (std::string(wanted) != isa_name(isa)) {
      names += (names.empty() ? "" : ", ") + std::string(isa_name(isa));
    } else if (supports(isa)) {
      return isa;
    } else {
      throw std::runtime_error(
          std::string("DARKMATTER_CPU_ISA: must be supported by this machine (") + isa_name(best_isa()) + "), got " +
          wanted);
    }
  }
  throw std::runtime_error("DARKMATTER_CPU_ISA: must be " + names + ", got " + wanted);
}

Isa active_isa() {
  static const Isa isa = requested_isa();
  return isa;
}

}  // namespace darkmatter::cpu
