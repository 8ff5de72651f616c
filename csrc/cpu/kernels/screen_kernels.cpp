// Which codes the active instruction set screens with.
#include "cpu/screen/certificate.h"

#include "cpu/kernels/isa.h"

namespace darkmatter::cpu {

const ScreenKernels* screen_kernels() {
  static const ScreenKernels* const chosen = [] {
    const ScreenKernels* integers = active_isa() >= Isa::vnni ? byte_kernels() : word_kernels();
    return integers != nullptr ? integers : float_kernels();
  }();
  return chosen;
}

}  // namespace darkmatter::cpu
