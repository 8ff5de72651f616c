#include "cpu/kernels/isa.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace darkmatter::cpu {

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::amx:
      return "amx_int8";
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

// Tiles hold 8 KB a thread, which Linux keeps for a process that has asked for it (torch's oneDNN asks too).
static bool has_amx() {
#if defined(__linux__)
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  constexpr unsigned kTile = 1u << 24, kInt8 = 1u << 25;
  if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) || (edx & kTile) == 0 || (edx & kInt8) == 0) {
    return false;
  }
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
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
    case Isa::vnni:
      return avx512 && __builtin_cpu_supports("avx512vnni");
    default:
      return avx512 && __builtin_cpu_supports("avx512vnni") && has_amx();
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
