// The instruction set in use, at any time the one a test names: not the machine's, nor the environment's of the start.
#include <cstring>

#define __builtin_cpu_supports(feature) true
#define active_isa isa_of_the_environment
#include "cpu/kernels/isa.cpp"
#undef active_isa
#include "cpu/screen/certificate.h"

namespace darkmatter::cpu {

static Isa chosen = Isa::scalar;

Isa active_isa() { return chosen; }

}  // namespace darkmatter::cpu

#define static  // the choice of codes is made at each call, not at the first
#include "cpu/kernels/screen_kernels.cpp"
#undef static

// False for a name that isa_name does not give.
extern "C" __attribute__((visibility("default"))) bool darkmatter_emulated_isa(const char* name) {
  using darkmatter::cpu::Isa;
  for (const Isa isa : darkmatter::cpu::kIsas) {
    if (std::strcmp(darkmatter::cpu::isa_name(isa), name) == 0) {
      darkmatter::cpu::chosen = isa;
      return true;
    }
  }
  return false;
}
