// Compiles kernels_body.h for each instruction set and chooses at run time.
#include "cpu/kernels/kernels.h"

#include "cpu/kernels/isa.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

// 64-byte vectors passed between functions would change the ABI; here they only pass through inlined functions.
#pragma GCC diagnostic ignored "-Wpsabi"
// gcc 12 warns about its own intrinsics, whose undefined vectors are meant (gcc bug 105593).
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"

namespace darkmatter::cpu {

// IEEE half to double by arithmetic on its fields, for machines without a conversion instruction.
static double widen_half(Half half) {
  const uint32_t bits = half.x, exponent = bits >> 10 & 31, mantissa = bits & 1023;
  double magnitude;
  if (exponent == 31) {
    magnitude = mantissa ? __builtin_nan("") : __builtin_inf();
  } else if (exponent == 0) {
    magnitude = mantissa * 0x1p-24;
  } else {
    magnitude = (1024 + mantissa) * 0x1p-25 * static_cast<double>(1u << exponent);
  }
  return bits >> 15 ? -magnitude : magnitude;
}

static Half round_half(float value) { return Half(value); }

// DM_ISA: 0 for plain C++, 1 for AVX2 with FMA and F16C, 2 for AVX-512.
#define DM_ISA 0
namespace scalar {
#include "cpu/kernels/kernels_body.h"
}  // namespace scalar
#undef DM_ISA

#if defined(__x86_64__)
#define DM_ISA 1
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
namespace avx2 {
#include "cpu/kernels/kernels_body.h"
}  // namespace avx2
#pragma GCC pop_options
#undef DM_ISA

#define DM_ISA 2
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")
namespace avx512 {
#include "cpu/kernels/kernels_body.h"
}  // namespace avx512
#pragma GCC pop_options
#undef DM_ISA
#endif

const Kernels& kernels() {
#if defined(__x86_64__)
  switch (active_isa()) {
    case Isa::amx:
    case Isa::vnni:
    case Isa::avx512:
      return avx512::table;
    case Isa::avx_vnni:
    case Isa::avx2:
      return avx2::table;
    default:
      break;
  }
#endif
  return scalar::table;
}

}  // namespace darkmatter::cpu
