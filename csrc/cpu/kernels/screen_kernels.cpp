// Which codes the active instruction set screens with.
#include "cpu/screen/certificate.h"

#include "cpu/kernels/isa.h"

namespace darkmatter::cpu {

const ScreenKernels* screen_kernels() {
  static const ScreenKernels* const chosen = [] {
    const Isa isa = active_isa();
    const ScreenKernels* integers = isa == Isa::amx    ? tile_kernels()
                                    : isa == Isa::vnni ? byte_kernels()
                                                       : word_kernels();
    return integers != nullptr ? integers : float_kernels();
  }();
  return chosen;
}

}  // namespace darkmatter::cpu
