// Compiles word_kernels_body.h for each instruction set that has 16-bit dot products and chooses at run time.
#include <cmath>
#include <cstring>

#include "cpu/kernels/isa.h"
#include "cpu/screen/certificate.h"

#if defined(__x86_64__)
#include <immintrin.h>

#pragma GCC diagnostic ignored "-Wpsabi"
// gcc 12 warns about its own intrinsics, whose undefined vectors are meant (gcc bug 105593).
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"

namespace darkmatter::cpu {

// DM_WORDS: 1 for AVX2, 2 for AVX2 with AVX-VNNI, 3 for AVX-512.
#define DM_WORDS 1
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
namespace words_avx2 {
#include "cpu/kernels/word_kernels_body.h"
}  // namespace words_avx2
#pragma GCC pop_options
#undef DM_WORDS

#define DM_WORDS 2
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avxvnni")
namespace words_avx_vnni {
#include "cpu/kernels/word_kernels_body.h"
}  // namespace words_avx_vnni
#pragma GCC pop_options
#undef DM_WORDS

#define DM_WORDS 3
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")
namespace words_avx512 {
#include "cpu/kernels/word_kernels_body.h"
}  // namespace words_avx512
#pragma GCC pop_options
#undef DM_WORDS

const ScreenKernels* word_kernels() {
  switch (active_isa()) {
    case Isa::amx:
    case Isa::vnni:
    case Isa::avx512:
      return &words_avx512::table;
    case Isa::avx_vnni:
      return &words_avx_vnni::table;
    case Isa::avx2:
      return &words_avx2::table;
    default:
      return nullptr;
  }
}

}  // namespace darkmatter::cpu

#else

namespace darkmatter::cpu {

const ScreenKernels* word_kernels() { return nullptr; }

}  // namespace darkmatter::cpu

#endif
