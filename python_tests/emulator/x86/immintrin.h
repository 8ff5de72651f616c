// AVX-512 and AMX for machines without them: the intrinsics that csrc/cpu uses, in plain C++ on the lanes of the
// vectors.
//
// Found before the compiler's own header, which it includes: types, and everything up to AVX2 with FMA and F16C, are
// the real ones. The emulated functions live in namespace darkmatter and so hide the compiler's; an AVX-512 intrinsic
// that is not written here is still the compiler's and cannot be inlined without its target: an error that names it.
// To add one: a line or a function in arithmetic.h or movement.h, and a line in checks.cpp, which compares it with what
// AVX2 does. Results are those of the instruction to the bit; which of two NaNs comes out is not. Loads and stores
// touch no lane that is masked out, and those that want alignment stop the program without it.
// What this cannot show: speed, register pressure, what the compiler's optimiser does under -mavx512*.
#pragma once

#include_next <immintrin.h>

// Macros in the compiler's header.
#undef _mm256_dpbusd_epi32
#undef _mm256_dpbusds_epi32
#undef _mm256_dpwssd_epi32
#undef _mm256_dpwssds_epi32
#undef _mm256_permutexvar_ps

#include "arithmetic.h"
#include "movement.h"
#include "tiles.h"
