// Intrinsics that compute: each lane, products of narrow integers, comparisons, reductions.
#pragma once

#include <cmath>

#include "lanes.h"

namespace darkmatter {

// name(a, b) and its two masked forms; T is how a lane is read, x and y are the lanes of a and b.
#define EMULATED_BINARY(name, V, T, expression)                          \
  EMULATED V _mm512_##name(V a, V b) {                                   \
    return x86::make<V, T>([&](int i) {                                  \
      const T x = x86::lane<T>(a, i), y = x86::lane<T>(b, i);            \
      return static_cast<T>(expression);                                 \
    });                                                                  \
  }                                                                      \
  EMULATED V _mm512_mask_##name(V source, x86::Mask<T, V> k, V a, V b) { \
    return x86::select<T>(k, _mm512_##name(a, b), source);               \
  }                                                                      \
  EMULATED V _mm512_maskz_##name(x86::Mask<T, V> k, V a, V b) { return x86::select<T>(k, _mm512_##name(a, b), V{}); }

EMULATED_BINARY(add_ps, __m512, float, x + y)
EMULATED_BINARY(sub_ps, __m512, float, x - y)
EMULATED_BINARY(mul_ps, __m512, float, x* y)
EMULATED_BINARY(div_ps, __m512, float, x / y)
EMULATED_BINARY(max_ps, __m512, float, x > y ? x : y)  // the second when one is NaN
EMULATED_BINARY(min_ps, __m512, float, x < y ? x : y)
EMULATED_BINARY(add_pd, __m512d, double, x + y)
EMULATED_BINARY(sub_pd, __m512d, double, x - y)
EMULATED_BINARY(mul_pd, __m512d, double, x* y)
EMULATED_BINARY(div_pd, __m512d, double, x / y)
EMULATED_BINARY(max_pd, __m512d, double, x > y ? x : y)
EMULATED_BINARY(min_pd, __m512d, double, x < y ? x : y)
EMULATED_BINARY(add_epi64, __m512i, uint64_t, x + y)
EMULATED_BINARY(sub_epi64, __m512i, uint64_t, x - y)
EMULATED_BINARY(add_epi32, __m512i, uint32_t, x + y)
EMULATED_BINARY(sub_epi32, __m512i, uint32_t, x - y)
EMULATED_BINARY(mullo_epi32, __m512i, uint32_t, x* y)
EMULATED_BINARY(max_epi32, __m512i, int32_t, x > y ? x : y)
EMULATED_BINARY(min_epi32, __m512i, int32_t, x < y ? x : y)
EMULATED_BINARY(add_epi16, __m512i, uint16_t, x + y)
EMULATED_BINARY(sub_epi16, __m512i, uint16_t, x - y)
EMULATED_BINARY(mullo_epi16, __m512i, uint16_t, static_cast<uint32_t>(x) * y)
EMULATED_BINARY(mulhi_epi16, __m512i, int16_t, x* y >> 16)
EMULATED_BINARY(max_epi16, __m512i, int16_t, x > y ? x : y)
EMULATED_BINARY(min_epi16, __m512i, int16_t, x < y ? x : y)
EMULATED_BINARY(add_epi8, __m512i, uint8_t, x + y)
EMULATED_BINARY(sub_epi8, __m512i, uint8_t, x - y)
EMULATED_BINARY(and_epi32, __m512i, uint32_t, x& y)
EMULATED_BINARY(or_epi32, __m512i, uint32_t, x | y)
EMULATED_BINARY(xor_epi32, __m512i, uint32_t, x ^ y)
EMULATED_BINARY(andnot_epi32, __m512i, uint32_t, ~x& y)
#undef EMULATED_BINARY

EMULATED __m512i _mm512_and_si512(__m512i a, __m512i b) { return _mm512_and_epi32(a, b); }
EMULATED __m512i _mm512_or_si512(__m512i a, __m512i b) { return _mm512_or_epi32(a, b); }
EMULATED __m512i _mm512_xor_si512(__m512i a, __m512i b) { return _mm512_xor_epi32(a, b); }
EMULATED __m512i _mm512_andnot_si512(__m512i a, __m512i b) { return _mm512_andnot_epi32(a, b); }

// The masked forms of 256-bit instructions, on the real ones.
#define EMULATED_MASKED(name, V, T)                                      \
  EMULATED V _mm256_mask_##name(V source, x86::Mask<T, V> k, V a, V b) { \
    return x86::select<T>(k, _mm256_##name(a, b), source);               \
  }                                                                      \
  EMULATED V _mm256_maskz_##name(x86::Mask<T, V> k, V a, V b) { return x86::select<T>(k, _mm256_##name(a, b), V{}); }

EMULATED_MASKED(add_ps, __m256, float)
EMULATED_MASKED(sub_ps, __m256, float)
EMULATED_MASKED(mul_ps, __m256, float)
EMULATED_MASKED(add_epi32, __m256i, int32_t)
EMULATED_MASKED(sub_epi32, __m256i, int32_t)
#undef EMULATED_MASKED

// name(a) of lanes x, and name(a, count) for shifts.
#define EMULATED_UNARY(name, V, T, expression) \
  EMULATED V _mm512_##name(V a) {              \
    return x86::make<V, T>([&](int i) {        \
      const T x = x86::lane<T>(a, i);          \
      return static_cast<T>(expression);       \
    });                                        \
  }
#define EMULATED_SHIFT(name, T, expression)               \
  EMULATED __m512i _mm512_##name(__m512i a, unsigned n) { \
    return x86::make<__m512i, T>([&](int i) {             \
      const T x = x86::lane<T>(a, i);                     \
      return static_cast<T>(expression);                  \
    });                                                   \
  }

EMULATED_UNARY(abs_ps, __m512, uint32_t, x & 0x7fffffff)
EMULATED_UNARY(abs_pd, __m512d, uint64_t, x & 0x7fffffffffffffff)
EMULATED_UNARY(abs_epi32, __m512i, int32_t, x < 0 ? 0u - x : x)
EMULATED_UNARY(abs_epi16, __m512i, int16_t, x < 0 ? -x : x)
EMULATED_UNARY(sqrt_ps, __m512, float, std::sqrt(x))
EMULATED_UNARY(sqrt_pd, __m512d, double, std::sqrt(x))
EMULATED_SHIFT(slli_epi32, uint32_t, n < 32 ? x << n : 0)
EMULATED_SHIFT(srli_epi32, uint32_t, n < 32 ? x >> n : 0)
EMULATED_SHIFT(srai_epi32, int32_t, x >> (n < 32 ? n : 31))
EMULATED_SHIFT(slli_epi16, uint16_t, n < 16 ? x << n : 0)
EMULATED_SHIFT(srli_epi16, uint16_t, n < 16 ? x >> n : 0)
EMULATED_SHIFT(srai_epi16, int16_t, x >> (n < 16 ? n : 15))
#undef EMULATED_UNARY
#undef EMULATED_SHIFT

// One rounding; sign_product and sign_sum are + or -.
#define EMULATED_FMA(name, V, T, sign_product, sign_sum)                                                 \
  EMULATED V _mm512_##name(V a, V b, V c) {                                                              \
    return x86::make<V, T>([&](int i) {                                                                  \
      return std::fma(sign_product x86::lane<T>(a, i), x86::lane<T>(b, i), sign_sum x86::lane<T>(c, i)); \
    });                                                                                                  \
  }                                                                                                      \
  EMULATED V _mm512_mask_##name(V a, x86::Mask<T, V> k, V b, V c) {                                      \
    return x86::select<T>(k, _mm512_##name(a, b, c), a);                                                 \
  }                                                                                                      \
  EMULATED V _mm512_maskz_##name(x86::Mask<T, V> k, V a, V b, V c) {                                     \
    return x86::select<T>(k, _mm512_##name(a, b, c), V{});                                               \
  }

EMULATED_FMA(fmadd_ps, __m512, float, +, +)
EMULATED_FMA(fmsub_ps, __m512, float, +, -)
EMULATED_FMA(fnmadd_ps, __m512, float, -, +)
EMULATED_FMA(fmadd_pd, __m512d, double, +, +)
EMULATED_FMA(fmsub_pd, __m512d, double, +, -)
EMULATED_FMA(fnmadd_pd, __m512d, double, -, +)
#undef EMULATED_FMA

namespace x86 {

// The sum of N neighbouring products of narrow integers, added to a 32-bit lane; with `saturate` to what fits.
template <typename A, typename B, bool saturate, typename V>
EMULATED V add_products(V sum, V a, V b) {
  constexpr int n = 4 / sizeof(A);
  return make<V, int32_t>([&](int i) {
    int64_t total = lane<int32_t>(sum, i);
    for (int e = n * i; e < n * (i + 1); ++e) {
      total += static_cast<int64_t>(lane<A>(a, e)) * lane<B>(b, e);
    }
    if (saturate) {
      total = total > INT32_MAX ? INT32_MAX : total < INT32_MIN ? INT32_MIN : total;
    }
    return static_cast<int32_t>(total);
  });
}

// Two products of 8-bit integers, saturated to 16 bits.
template <typename V>
EMULATED V add_byte_products(V a, V b) {
  return make<V, int16_t>([&](int i) {
    const int total =
        lane<uint8_t>(a, 2 * i) * lane<int8_t>(b, 2 * i) + lane<uint8_t>(a, 2 * i + 1) * lane<int8_t>(b, 2 * i + 1);
    return static_cast<int16_t>(total > INT16_MAX ? INT16_MAX : total < INT16_MIN ? INT16_MIN : total);
  });
}

}  // namespace x86

EMULATED __m512i _mm512_madd_epi16(__m512i a, __m512i b) {
  return x86::add_products<int16_t, int16_t, false>(__m512i{}, a, b);
}
EMULATED __m512i _mm512_maddubs_epi16(__m512i a, __m512i b) { return x86::add_byte_products(a, b); }

// AVX-512 VNNI, the same with AVX-512 VL, and AVX-VNNI.
#define EMULATED_VNNI(name, A, B, saturate)                                     \
  EMULATED __m512i _mm512_##name##_epi32(__m512i c, __m512i a, __m512i b) {     \
    return x86::add_products<A, B, saturate>(c, a, b);                          \
  }                                                                             \
  EMULATED __m256i _mm256_##name##_epi32(__m256i c, __m256i a, __m256i b) {     \
    return x86::add_products<A, B, saturate>(c, a, b);                          \
  }                                                                             \
  EMULATED __m256i _mm256_##name##_avx_epi32(__m256i c, __m256i a, __m256i b) { \
    return x86::add_products<A, B, saturate>(c, a, b);                          \
  }

EMULATED_VNNI(dpbusd, uint8_t, int8_t, false)
EMULATED_VNNI(dpbusds, uint8_t, int8_t, true)
EMULATED_VNNI(dpwssd, int16_t, int16_t, false)
EMULATED_VNNI(dpwssds, int16_t, int16_t, true)
#undef EMULATED_VNNI

namespace x86 {

// The predicates _CMP_*; those from 16 on differ in exceptions only.
template <typename T>
EMULATED bool compare(T x, T y, int predicate) {
  const bool unordered = x != x || y != y;
  switch (predicate & 7) {
    case 0:
      return (predicate & 8) ? unordered || x == y : x == y;
    case 1:
      return (predicate & 8) ? unordered || x < y : x < y;
    case 2:
      return (predicate & 8) ? unordered || x <= y : x <= y;
    case 3:
      return (predicate & 8) ? false : unordered;
    case 4:
      return (predicate & 8) ? !unordered && x != y : unordered || x != y;
    case 5:
      return (predicate & 8) ? x >= y : unordered || x >= y;
    case 6:
      return (predicate & 8) ? x > y : unordered || x > y;
    default:
      return (predicate & 8) ? true : !unordered;
  }
}

// The predicates _MM_CMPINT_*.
template <typename T>
EMULATED bool compare_integers(T x, T y, int predicate) {
  switch (predicate & 7) {
    case 0:
      return x == y;
    case 1:
      return x < y;
    case 2:
      return x <= y;
    case 3:
      return false;
    case 4:
      return x != y;
    case 5:
      return x >= y;
    case 6:
      return x > y;
    default:
      return true;
  }
}

}  // namespace x86

// name_mask(a, b, predicate) and its masked form.
#define EMULATED_COMPARE(prefix, name, V, T, compare)                                                \
  EMULATED x86::Mask<T, V> prefix##_##name##_mask(V a, V b, int predicate) {                         \
    return x86::make_mask<T, V>(                                                                     \
        [&](int i) { return x86::compare(x86::lane<T>(a, i), x86::lane<T>(b, i), predicate); });     \
  }                                                                                                  \
  EMULATED x86::Mask<T, V> prefix##_mask_##name##_mask(x86::Mask<T, V> k, V a, V b, int predicate) { \
    return k & prefix##_##name##_mask(a, b, predicate);                                              \
  }
#define EMULATED_COMPARE_INTEGERS(suffix, T)                                           \
  EMULATED_COMPARE(_mm512, cmp_##suffix, __m512i, T, compare_integers)                 \
  EMULATED x86::Mask<T, __m512i> _mm512_cmpeq_##suffix##_mask(__m512i a, __m512i b) {  \
    return _mm512_cmp_##suffix##_mask(a, b, 0);                                        \
  }                                                                                    \
  EMULATED x86::Mask<T, __m512i> _mm512_cmpneq_##suffix##_mask(__m512i a, __m512i b) { \
    return _mm512_cmp_##suffix##_mask(a, b, 4);                                        \
  }                                                                                    \
  EMULATED x86::Mask<T, __m512i> _mm512_cmplt_##suffix##_mask(__m512i a, __m512i b) {  \
    return _mm512_cmp_##suffix##_mask(a, b, 1);                                        \
  }                                                                                    \
  EMULATED x86::Mask<T, __m512i> _mm512_cmpge_##suffix##_mask(__m512i a, __m512i b) {  \
    return _mm512_cmp_##suffix##_mask(a, b, 5);                                        \
  }                                                                                    \
  EMULATED x86::Mask<T, __m512i> _mm512_cmpgt_##suffix##_mask(__m512i a, __m512i b) {  \
    return _mm512_cmp_##suffix##_mask(a, b, 6);                                        \
  }

EMULATED_COMPARE(_mm512, cmp_ps, __m512, float, compare)
EMULATED_COMPARE(_mm512, cmp_pd, __m512d, double, compare)
EMULATED_COMPARE(_mm256, cmp_ps, __m256, float, compare)
EMULATED_COMPARE_INTEGERS(epi32, int32_t)
EMULATED_COMPARE_INTEGERS(epi16, int16_t)
EMULATED_COMPARE_INTEGERS(epi8, int8_t)
#undef EMULATED_COMPARE
#undef EMULATED_COMPARE_INTEGERS

namespace x86 {

// A sequence of instructions, not one: gcc and clang fold the upper half onto the lower until one lane is left.
template <typename T, typename V, typename F>
EMULATED T reduce(const V& v, const F& f) {
  T lanes[kLanesOf<T, V>];
  std::memcpy(lanes, &v, sizeof(v));
  for (int n = kLanesOf<T, V> / 2; n > 0; n /= 2) {
    for (int i = 0; i < n; ++i) {
      lanes[i] = f(lanes[i], lanes[i + n]);
    }
  }
  return lanes[0];
}

}  // namespace x86

#define EMULATED_REDUCE(name, V, T, expression)                                    \
  EMULATED T _mm512_reduce_##name(V a) {                                           \
    return x86::reduce<T>(a, [](T x, T y) { return static_cast<T>(expression); }); \
  }

EMULATED_REDUCE(add_ps, __m512, float, x + y)
EMULATED_REDUCE(max_ps, __m512, float, x > y ? x : y)
EMULATED_REDUCE(min_ps, __m512, float, x < y ? x : y)
EMULATED_REDUCE(add_pd, __m512d, double, x + y)
EMULATED_REDUCE(max_pd, __m512d, double, x > y ? x : y)
EMULATED_REDUCE(min_pd, __m512d, double, x < y ? x : y)
EMULATED_REDUCE(max_epi32, __m512i, int32_t, x > y ? x : y)
EMULATED_REDUCE(min_epi32, __m512i, int32_t, x < y ? x : y)
#undef EMULATED_REDUCE
EMULATED int32_t _mm512_reduce_add_epi32(__m512i a) {
  return static_cast<int32_t>(x86::reduce<uint32_t>(a, [](uint32_t x, uint32_t y) { return x + y; }));
}
EMULATED int64_t _mm512_reduce_add_epi64(__m512i a) {
  return static_cast<int64_t>(x86::reduce<uint64_t>(a, [](uint64_t x, uint64_t y) { return x + y; }));
}

}  // namespace darkmatter
