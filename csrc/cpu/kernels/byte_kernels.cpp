// The screening kernels on 8-bit codes: AVX-512 VNNI.
//
// Rows are rotated by one orthogonal map, so that no single dimension is an outlier that ruins the 8-bit scale, and
// rounded to codes in [-127, 127]; those of tokens are stored unsigned, + 128. Products: 255 * 127 * d < 2^31.
#include "cpu/screen/certificate.h"

#if defined(__x86_64__)
#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <utility>

// gcc 12 warns about its own intrinsics, whose undefined vectors are meant (gcc bug 105593).
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,prefer-vector-width=512")

#define DM_INLINE inline __attribute__((always_inline))

namespace darkmatter::cpu {
namespace {

// Signs of the dimensions before the rotation (period 64, arbitrary): without them a constant vector would be an
// outlier of the rotated one.
constexpr uint64_t kSigns = 0x9E3779B97F4A7C15ull;

// Largest power of two that divides d_padded, at most 256: the size of a rotated block.
inline int64_t block_of(int64_t d_padded) {
  int64_t block = 64;
  while (block < 256 && d_padded % (2 * block) == 0) {
    block *= 2;
  }
  return block;
}

// In-place orthonormal Walsh-Hadamard transform of each block: log2(block) stages, each adds at most one unit roundoff
// to the relative error of the norm.
void rotate(float* v, int64_t d_padded) {
  const int64_t block = block_of(d_padded);
  const float scale = 1.0f / std::sqrt(static_cast<float>(block));
  for (int64_t start = 0; start < d_padded; start += block) {
    float* b = v + start;
    for (int64_t half = 1; half < 16; half *= 2) {  // within one vector: partner by shuffle
      const auto partner = [half](__m512 a) {
        switch (half) {
          case 1:
            return _mm512_permute_ps(a, 0xB1);
          case 2:
            return _mm512_permute_ps(a, 0x4E);
          case 4:
            return _mm512_shuffle_f32x4(a, a, 0xB1);
          default:
            return _mm512_shuffle_f32x4(a, a, 0x4E);
        }
      };
      const __mmask16 second = half == 1 ? 0xAAAA : half == 2 ? 0xCCCC : half == 4 ? 0xF0F0 : 0xFF00;
      for (int64_t e = 0; e < block; e += 16) {
        const __m512 a = _mm512_loadu_ps(b + e), p = partner(a);
        _mm512_storeu_ps(b + e, _mm512_mask_sub_ps(_mm512_add_ps(a, p), second, p, a));
      }
    }
    for (int64_t half = 16; half < block; half *= 2) {
      for (int64_t first = 0; first < block; first += 2 * half) {
        for (int64_t e = first; e < first + half; e += 16) {
          const __m512 a = _mm512_loadu_ps(b + e), p = _mm512_loadu_ps(b + e + half);
          _mm512_storeu_ps(b + e, _mm512_add_ps(a, p));
          _mm512_storeu_ps(b + e + half, _mm512_sub_ps(a, p));
        }
      }
    }
    for (int64_t e = 0; e < block; ++e) {
      b[e] *= scale;
    }
  }
}

// Relative error of the rotated vector: conversion to float32, at most 8 stages, scaling; doubled for second order.
constexpr double kRotationError = 2 * 11 * kUnit;

// Rotates row into scratch, and rounds it to codes in [-127, 127]. The norms are those of the rotated float32 row.
RoundedRow round_row(const double* row, int64_t d, int64_t d_padded, float* scratch, int8_t* codes) {
  for (int64_t e = 0; e < d_padded; e += 8) {
    const __mmask8 valid = d - e >= 8 ? 0xFF : d <= e ? 0 : (1 << (d - e)) - 1;
    const __m256 v = _mm512_cvtpd_ps(_mm512_maskz_loadu_pd(valid, row + e));
    const __mmask8 minus = static_cast<__mmask8>(kSigns >> (e % 64));
    _mm256_storeu_ps(scratch + e, _mm256_mask_sub_ps(v, minus, _mm256_setzero_ps(), v));
  }
  rotate(scratch, d_padded);
  __m512 sizes = _mm512_setzero_ps();
  __mmask16 not_finite = 0;
  for (int64_t e = 0; e < d_padded; e += 16) {
    const __m512 size = _mm512_abs_ps(_mm512_loadu_ps(scratch + e));
    not_finite |= _mm512_cmp_ps_mask(size, _mm512_set1_ps(3e38f), _CMP_NLE_UQ);
    sizes = _mm512_max_ps(sizes, size);
  }
  const float largest = _mm512_reduce_max_ps(sizes);
  const bool finite = not_finite == 0;
  RoundedRow result{};
  if (!finite || !(largest > 1e-30f)) {  // no usable scale: codes of zero, all of the row is rounding
    std::memset(codes, 0, d_padded);
    result.norm = result.rounding = finite ? 1e-30 * std::sqrt(static_cast<double>(d_padded)) : HUGE_VAL;
    return result;
  }
  result.scale = largest / 127.0f;
  const float inverse = 127.0f / largest;
  __m512d norm = _mm512_setzero_pd(), code_norm = norm, rounding = norm;
  const __m512d wide_scale = _mm512_set1_pd(result.scale);
  for (int64_t e = 0; e < d_padded; e += 8) {
    const __m256 v = _mm256_loadu_ps(scratch + e);
    // min and max: largest * inverse may round to a hair above 127
    __m256i code = _mm256_cvtps_epi32(_mm256_mul_ps(v, _mm256_set1_ps(inverse)));
    code = _mm256_max_epi32(_mm256_min_epi32(code, _mm256_set1_epi32(127)), _mm256_set1_epi32(-127));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(codes + e), _mm256_cvtepi32_epi8(code));
    const __m512d wide = _mm512_cvtps_pd(v), back = _mm512_mul_pd(_mm512_cvtepi32_pd(code), wide_scale);
    const __m512d lost = _mm512_sub_pd(wide, back);
    norm = _mm512_fmadd_pd(wide, wide, norm);
    code_norm = _mm512_fmadd_pd(back, back, code_norm);
    rounding = _mm512_fmadd_pd(lost, lost, rounding);
  }
  result.norm = std::sqrt(_mm512_reduce_add_pd(norm));
  result.code_norm = std::sqrt(_mm512_reduce_add_pd(code_norm));
  result.rounding = std::sqrt(_mm512_reduce_add_pd(rounding));
  return result;
}

ScreenedToken encode_token(const double* row, int64_t d, int64_t d_padded, double error, float* scratch, void* codes) {
  const RoundedRow rounded = round_row(row, d, d_padded, scratch, static_cast<int8_t*>(codes));
  for (int64_t e = 0; e < d_padded; ++e) {
    static_cast<uint8_t*>(codes)[e] ^= 0x80;  // code + 128
  }
  ScreenedToken token{};
  token.scale = rounded.scale;
  token.alpha = static_cast<float>((rounded.rounding + kRotationError * rounded.norm + error) * kOutward);
  token.beta = static_cast<float>(rounded.code_norm * kOutward);
  token.screened = rounded.scale > 0 && rounded.norm > 1e-25 && rounded.norm < 1e30;
  return token;
}

void encode_latent(
    const double* row, const LatentTerms& terms, int64_t d, int64_t d_padded, float* scratch, int8_t* first,
    int64_t stride, int32_t* sum, float* bounds, int64_t ld_bounds) {
  alignas(64) int8_t own[kMaxScreenD];
  const RoundedRow rounded = round_row(row, d, d_padded, scratch, own);
  int32_t total = 0;
  for (int64_t group = 0; group < d_padded / 4; ++group) {
    std::memcpy(first + group * stride, own + group * 4, 4);
    total += own[4 * group] + own[4 * group + 1] + own[4 * group + 2] + own[4 * group + 3];
  }
  *sum = 128 * total;
  store_bounds(
      rounded, rounded.norm * (1 + kRotationError) + kTinyNorm,
      rounded.rounding + kRotationError * rounded.norm + kTinyNorm, terms, bounds, ld_bounds);
}

constexpr int64_t kTokensAtOnce = 8;  // 8 x 3 sums in registers

template <int A>
DM_INLINE void tile(const uint8_t* x, const int8_t* panel, int64_t d_padded, int32_t* out) {
  __m512i sums[A][3];
#pragma GCC unroll 8
  for (int a = 0; a < A; ++a) {
#pragma GCC unroll 3
    for (int b = 0; b < 3; ++b) {
      sums[a][b] = _mm512_setzero_si512();
    }
  }
  for (int64_t e = 0; e < d_padded; e += 4) {
    __m512i w[3];
#pragma GCC unroll 3
    for (int b = 0; b < 3; ++b) {
      w[b] = _mm512_loadu_si512(panel + e * kPanel + 64 * b);
    }
#pragma GCC unroll 8
    for (int a = 0; a < A; ++a) {
      int32_t four;
      std::memcpy(&four, x + a * d_padded + e, 4);
      const __m512i codes = _mm512_set1_epi32(four);
#pragma GCC unroll 3
      for (int b = 0; b < 3; ++b) {
        sums[a][b] = _mm512_dpbusd_epi32(sums[a][b], codes, w[b]);
      }
    }
  }
#pragma GCC unroll 8
  for (int a = 0; a < A; ++a) {
#pragma GCC unroll 3
    for (int b = 0; b < 3; ++b) {
      _mm512_storeu_si512(out + a * kPanel + 16 * b, sums[a][b]);
    }
  }
}

void products(const void* codes, int64_t tokens, const int8_t* panel, int64_t d_padded, int32_t* out) {
  const auto* x = static_cast<const uint8_t*>(codes);
  if (tokens == kTokensAtOnce) {
    return tile<8>(x, panel, d_padded, out);
  }
  int64_t t = 0;
  for (; t + 4 <= tokens; t += 4) {
    tile<4>(x + t * d_padded, panel, d_padded, out + t * kPanel);
  }
  for (; t < tokens; ++t) {
    tile<1>(x + t * d_padded, panel, d_padded, out + t * kPanel);
  }
}

// Sixteen places of one token: their scores and the bounds of the scores' errors.
struct Sixteen {
  __m512 score, bound;

  DM_INLINE Sixteen(
      const int32_t* products, const ScreenedToken& token, const ScreenedWeights& weights, int64_t first) {
    const float* bounds = weights.bounds + first;
    const int64_t padded = weights.padded();
    const auto row = [&](int which) { return _mm512_loadu_ps(bounds + which * padded); };
    const __m512i sum = _mm512_sub_epi32(_mm512_loadu_si512(products), _mm512_loadu_si512(weights.sums + first));
    const __m512 scaled = _mm512_mul_ps(_mm512_cvtepi32_ps(sum), _mm512_set1_ps(token.scale));
    score = _mm512_fmadd_ps(scaled, row(kScale), row(kBias));
    bound = _mm512_fmadd_ps(
        _mm512_set1_ps(token.alpha), row(kNorm),
        _mm512_fmadd_ps(_mm512_set1_ps(token.beta), row(kRounding), row(kSlack)));
  }
};

void intervals(
    const int32_t* products, const ScreenedToken& token, const ScreenedWeights& weights, int64_t panel, float* score,
    float* bound) {
  for (int64_t l = 0; l < kPanel; l += 16) {
    const Sixteen found(products + l, token, weights, panel * kPanel + l);
    _mm512_storeu_ps(score + l, found.score);
    _mm512_storeu_ps(bound + l, found.bound);
  }
}

int64_t hits(
    const int32_t* products, const ScreenedToken& token, const ScreenedWeights& weights, int64_t panel,
    const float* limits, int64_t step, float* score, float* upper, int32_t* place) {
  int64_t count = 0;
#pragma GCC unroll 3
  for (int64_t l = 0; l < kPanel; l += 16) {
    const int64_t first = panel * kPanel + l, beyond = weights.n_places - first;  // the last panel is padded
    const Sixteen found(products + l, token, weights, first);
    // upper_end; max gives its second operand when one is NaN
    const __m512 sum = _mm512_add_ps(_mm512_max_ps(_mm512_set1_ps(-kLargestScore), found.score), found.bound);
    const __m512 limit = step ? _mm512_loadu_ps(limits + first) : _mm512_set1_ps(*limits);
    const __mmask16 valid = beyond >= 16 ? 0xFFFF : beyond <= 0 ? 0 : (1 << beyond) - 1;
    const __mmask16 in = _mm512_mask_cmp_ps_mask(valid, sum, limit, _CMP_NLT_UQ);
    if (in) {
      const __m512i numbers = _mm512_add_epi32(
          _mm512_set1_epi32(static_cast<int32_t>(first)),
          _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
      const __m512 known =
          _mm512_mask_mov_ps(sum, _mm512_cmp_ps_mask(sum, sum, _CMP_UNORD_Q), _mm512_set1_ps(__builtin_inff()));
      // whole vectors into the room behind: a masked store of compressed lanes is microcode on some processors
      _mm512_storeu_si512(place + count, _mm512_maskz_compress_epi32(in, numbers));
      _mm512_storeu_ps(score + count, _mm512_maskz_compress_ps(in, found.score));
      _mm512_storeu_ps(upper + count, _mm512_maskz_compress_ps(in, known));
      count += __builtin_popcount(in);
    }
  }
  return count;
}

// Quickselect, sixteen values at a time: those above the pivot go to one half of the scratch, those below stay.
float nth_largest(const float* values, int64_t n, int64_t nth, float* scratch) {
  float *here = scratch, *above = scratch + n + 16;
  for (int64_t i = 0; i < n; i += 16) {
    const __mmask16 valid = n - i >= 16 ? 0xFFFF : (1 << (n - i)) - 1;
    const __m512 smallest = _mm512_set1_ps(-__builtin_inff());
    // max gives its second operand when the first is NaN
    _mm512_storeu_ps(here + i, _mm512_max_ps(_mm512_mask_loadu_ps(smallest, valid, values + i), smallest));
  }
  while (true) {
    const float a = here[0], b = here[n / 2], c = here[n - 1];
    const float pivot = std::max(std::min(a, b), std::min(std::max(a, b), c));
    const __m512 wide_pivot = _mm512_set1_ps(pivot);
    int64_t n_above = 0, n_below = 0;
    for (int64_t i = 0; i < n; i += 16) {
      const __mmask16 valid = n - i >= 16 ? 0xFFFF : (1 << (n - i)) - 1;
      const __m512 value = _mm512_loadu_ps(here + i);
      const __mmask16 up = _mm512_mask_cmp_ps_mask(valid, value, wide_pivot, _CMP_GT_OQ);
      const __mmask16 down = _mm512_mask_cmp_ps_mask(valid, value, wide_pivot, _CMP_LT_OQ);
      _mm512_storeu_ps(above + n_above, _mm512_maskz_compress_ps(up, value));
      _mm512_storeu_ps(here + n_below, _mm512_maskz_compress_ps(down, value));
      n_above += __builtin_popcount(up);
      n_below += __builtin_popcount(down);
    }
    if (nth <= n_above) {
      std::swap(here, above);
      n = n_above;
    } else if (nth <= n - n_below) {
      return pivot;
    } else {
      nth -= n - n_below;
      n = n_below;
    }
  }
}

// ROWS rows at a time with CHAINS sums each: enough independent sums to hide the latency of the multiply-adds.
template <int ROWS, int CHAINS>
DM_INLINE void dots_of_rows(
    const float* w, const uint16_t* const* rows, int64_t d, float* out, const char* next, const char* next_end) {
  __m512 sums[ROWS][CHAINS];
#pragma GCC unroll 4
  for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 4
    for (int c = 0; c < CHAINS; ++c) {
      sums[r][c] = _mm512_setzero_ps();
    }
  }
  int64_t e = 0;
  for (; e + 16 * CHAINS <= d; e += 16 * CHAINS) {
#pragma GCC unroll 4
    for (int c = 0; c < CHAINS; ++c) {
      if (next < next_end) {
        _mm_prefetch(next, _MM_HINT_T1);
        next += 64;
      }
      const __m512 left = _mm512_loadu_ps(w + e + 16 * c);
#pragma GCC unroll 4
      for (int r = 0; r < ROWS; ++r) {
        const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(rows[r] + e + 16 * c));
        sums[r][c] = _mm512_fmadd_ps(left, _mm512_cvtph_ps(half), sums[r][c]);
      }
    }
  }
  for (; e < d; e += 16) {
    const __mmask16 valid = d - e >= 16 ? 0xFFFF : (1 << (d - e)) - 1;
    const __m512 left = _mm512_maskz_loadu_ps(valid, w + e);
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r) {
      sums[r][0] = _mm512_fmadd_ps(left, _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(valid, rows[r] + e)), sums[r][0]);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 4
    for (int c = 1; c < CHAINS; ++c) {
      sums[r][0] = _mm512_add_ps(sums[r][0], sums[r][c]);
    }
    out[r] = _mm512_reduce_add_ps(sums[r][0]);
  }
}

void half_dots(
    const float* w, const uint16_t* rows, int64_t d, const int32_t* index, int64_t n, float* out, const char* next,
    const char* next_end) {
  int64_t r = 0;
  const uint16_t* some[4];
  const auto point = [&](int count) {
    for (int i = 0; i < count; ++i) {
      some[i] = rows + index[r + i] * d;
    }
  };
  for (; r + 4 <= n; r += 4) {
    point(4);
    dots_of_rows<4, 2>(w, some, d, out + r, next, next_end);
    next = next_end;
  }
  for (; r + 2 <= n; r += 2) {
    point(2);
    dots_of_rows<2, 4>(w, some, d, out + r, next, next_end);
    next = next_end;
  }
  if (r < n) {
    point(1);
    dots_of_rows<1, 4>(w, some, d, out + r, next, next_end);
  }
}

double to_half(const double* from, double scale, uint16_t* to, int64_t n) {
  const __m512d up = _mm512_set1_pd(scale), down = _mm512_set1_pd(1.0 / scale);
  __m512d squares = _mm512_setzero_pd();
  for (int64_t e = 0; e < n; e += 8) {
    const __mmask8 valid = n - e >= 8 ? 0xFF : (1 << (n - e)) - 1;
    const __m512d wide = _mm512_maskz_loadu_pd(valid, from + e);
    const __m128i half = _mm256_cvtps_ph(_mm512_cvtpd_ps(_mm512_mul_pd(wide, up)), _MM_FROUND_TO_NEAREST_INT);
    _mm_mask_storeu_epi16(to + e, valid, half);
    const __m512d back = _mm512_mul_pd(_mm512_cvtps_pd(_mm256_cvtph_ps(half)), down);
    const __m512d lost = _mm512_sub_pd(wide, back);
    squares = _mm512_fmadd_pd(lost, lost, squares);
  }
  return std::sqrt(_mm512_reduce_add_pd(squares)) * kOutward;
}

void to_float(const double* from, float* to, int64_t n) {
  for (int64_t e = 0; e < n; e += 8) {
    const __mmask8 valid = n - e >= 8 ? 0xFF : (1 << (n - e)) - 1;
    _mm256_mask_storeu_ps(to + e, valid, _mm512_cvtpd_ps(_mm512_maskz_loadu_pd(valid, from + e)));
  }
}

const ScreenKernels table = {kTokensAtOnce, 1,        1,         64,   kPanel,      true,    encode_token,
                             encode_latent, products, intervals, hits, nth_largest, to_half, to_float,
                             half_dots};

}  // namespace

const ScreenKernels* byte_kernels() { return &table; }

}  // namespace darkmatter::cpu

#pragma GCC pop_options

#else

namespace darkmatter::cpu {

const ScreenKernels* byte_kernels() { return nullptr; }

}  // namespace darkmatter::cpu

#endif
