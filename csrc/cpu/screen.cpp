// Which codes the active instruction set screens with.
#include "cpu/screen.h"

#include "cpu/isa.h"

namespace darkmatter {

const ScreenKernels* screen_kernels() {
  static const ScreenKernels* const chosen = active_isa() >= Isa::vnni ? byte_kernels() : word_kernels();
  return chosen;
}

}  // namespace darkmatter
