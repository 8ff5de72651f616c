// Intrinsics that move and convert: constants, loads, stores, masks, permutations, conversions.
#pragma once

#include "lanes.h"

namespace darkmatter {

#define EMULATED_SET1(name, V, T)                       \
  EMULATED V _mm512_##name(T value) {                   \
    return x86::make<V, T>([&](int) { return value; }); \
  }
EMULATED_SET1(set1_ps, __m512, float)
EMULATED_SET1(set1_pd, __m512d, double)
EMULATED_SET1(set1_epi64, __m512i, int64_t)
EMULATED_SET1(set1_epi32, __m512i, int32_t)
EMULATED_SET1(set1_epi16, __m512i, int16_t)
EMULATED_SET1(set1_epi8, __m512i, int8_t)
#undef EMULATED_SET1

EMULATED __m512 _mm512_setzero_ps() { return __m512{}; }
EMULATED __m512d _mm512_setzero_pd() { return __m512d{}; }
EMULATED __m512i _mm512_setzero_si512() { return __m512i{}; }

namespace x86 {
// The last argument is lane 0. (The compiler's _mm512_setr_* are macros that reverse them and call _mm512_set_*.)
template <typename V, typename T, typename... Values>
EMULATED V set(Values... values) {
  static_assert(sizeof...(values) == kLanesOf<T, V>);
  const T lanes[] = {static_cast<T>(values)...};
  return make<V, T>([&](int i) { return lanes[kLanesOf<T, V> - 1 - i]; });
}
}  // namespace x86
template <typename... T>
EMULATED __m512 _mm512_set_ps(T... values) {
  return x86::set<__m512, float>(values...);
}
template <typename... T>
EMULATED __m512d _mm512_set_pd(T... values) {
  return x86::set<__m512d, double>(values...);
}
template <typename... T>
EMULATED __m512i _mm512_set_epi32(T... values) {
  return x86::set<__m512i, int32_t>(values...);
}
template <typename... T>
EMULATED __m512i _mm512_set_epi64(T... values) {
  return x86::set<__m512i, int64_t>(values...);
}

namespace x86 {

template <typename V>
EMULATED V load(const void* from) {
  V v;
  std::memcpy(&v, from, sizeof(v));
  return v;
}

// Lanes that are masked out are not read, and not written.
template <typename V, typename T>
EMULATED V masked_load(V source, Mask<T, V> k, const void* from) {
  return make<V, T>([&](int i) {
    T value = lane<T>(source, i);
    if (bit(k, i)) {
      std::memcpy(&value, static_cast<const char*>(from) + i * sizeof(T), sizeof(T));
    }
    return value;
  });
}
template <typename V, typename T>
EMULATED void masked_store(void* to, Mask<T, V> k, const V& v) {
  for (int i = 0; i < kLanesOf<T, V>; ++i) {
    if (bit(k, i)) {
      std::memcpy(static_cast<char*>(to) + i * sizeof(T), reinterpret_cast<const char*>(&v) + i * sizeof(T), sizeof(T));
    }
  }
}

}  // namespace x86

#define EMULATED_LOAD(suffix, V)                                                    \
  EMULATED V _mm512_loadu_##suffix(const void* from) { return x86::load<V>(from); } \
  EMULATED void _mm512_storeu_##suffix(void* to, V v) { std::memcpy(to, &v, sizeof(v)); }
#define EMULATED_ALIGNED(suffix, V)                    \
  EMULATED V _mm512_load_##suffix(const void* from) {  \
    x86::aligned(from, 64);                            \
    return x86::load<V>(from);                         \
  }                                                    \
  EMULATED void _mm512_store_##suffix(void* to, V v) { \
    x86::aligned(to, 64);                              \
    std::memcpy(to, &v, sizeof(v));                    \
  }                                                    \
  EMULATED void _mm512_stream_##suffix(void* to, V v) { _mm512_store_##suffix(to, v); }
#define EMULATED_MASKED_LOAD(prefix, suffix, V, T)                                         \
  EMULATED V prefix##_mask_loadu_##suffix(V source, x86::Mask<T, V> k, const void* from) { \
    return x86::masked_load<V, T>(source, k, from);                                        \
  }                                                                                        \
  EMULATED V prefix##_maskz_loadu_##suffix(x86::Mask<T, V> k, const void* from) {          \
    return x86::masked_load<V, T>(V{}, k, from);                                           \
  }                                                                                        \
  EMULATED void prefix##_mask_storeu_##suffix(void* to, x86::Mask<T, V> k, V v) { x86::masked_store<V, T>(to, k, v); }
#define EMULATED_MASKED_INTEGER_LOADS(prefix, V)  \
  EMULATED_MASKED_LOAD(prefix, epi64, V, int64_t) \
  EMULATED_MASKED_LOAD(prefix, epi32, V, int32_t) \
  EMULATED_MASKED_LOAD(prefix, epi16, V, int16_t) \
  EMULATED_MASKED_LOAD(prefix, epi8, V, int8_t)

EMULATED_LOAD(ps, __m512)
EMULATED_LOAD(pd, __m512d)
EMULATED_LOAD(si512, __m512i)
EMULATED_LOAD(epi64, __m512i)
EMULATED_LOAD(epi32, __m512i)
EMULATED_LOAD(epi16, __m512i)
EMULATED_LOAD(epi8, __m512i)
EMULATED_ALIGNED(ps, __m512)
EMULATED_ALIGNED(pd, __m512d)
EMULATED_ALIGNED(si512, __m512i)
EMULATED_MASKED_LOAD(_mm512, ps, __m512, float)
EMULATED_MASKED_LOAD(_mm512, pd, __m512d, double)
EMULATED_MASKED_LOAD(_mm256, ps, __m256, float)
EMULATED_MASKED_LOAD(_mm256, pd, __m256d, double)
EMULATED_MASKED_INTEGER_LOADS(_mm512, __m512i)
EMULATED_MASKED_INTEGER_LOADS(_mm256, __m256i)
EMULATED_MASKED_LOAD(_mm, epi16, __m128i, int16_t)
EMULATED_MASKED_LOAD(_mm, epi8, __m128i, int8_t)
#undef EMULATED_LOAD
#undef EMULATED_ALIGNED
#undef EMULATED_MASKED_LOAD
#undef EMULATED_MASKED_INTEGER_LOADS

// Lanes chosen by a mask.
namespace x86 {

// The lanes of `from` whose bit is set, one after the other; those behind keep `source`.
template <typename V, typename T>
EMULATED V compress(V source, Mask<T, V> k, V from) {
  int next = 0;
  for (int i = 0; i < kLanesOf<T, V>; ++i) {
    if (bit(k, i)) {
      const T value = lane<T>(from, i);
      std::memcpy(reinterpret_cast<char*>(&source) + next++ * sizeof(T), &value, sizeof(T));
    }
  }
  return source;
}
template <typename V, typename T>
EMULATED void compress_store(void* to, Mask<T, V> k, V from) {
  const V packed = compress<V, T>(V{}, k, from);
  std::memcpy(to, &packed, __builtin_popcountll(k) * sizeof(T));
}
// The first lanes of `from`, one after the other, where the bit is set; `source` elsewhere.
template <typename V, typename T>
EMULATED V expand(V source, Mask<T, V> k, V from) {
  int next = 0;
  return make<V, T>([&](int i) { return bit(k, i) ? lane<T>(from, next++) : lane<T>(source, i); });
}

}  // namespace x86

#define EMULATED_CHOICES(prefix, suffix, V, T)                                                                     \
  EMULATED V prefix##_mask_mov_##suffix(V source, x86::Mask<T, V> k, V a) { return x86::select<T>(k, a, source); } \
  EMULATED V prefix##_maskz_mov_##suffix(x86::Mask<T, V> k, V a) { return x86::select<T>(k, a, V{}); }             \
  EMULATED V prefix##_mask_blend_##suffix(x86::Mask<T, V> k, V a, V b) { return x86::select<T>(k, b, a); }
#define EMULATED_COMPRESSIONS(prefix, suffix, V, T)                                                              \
  EMULATED_CHOICES(prefix, suffix, V, T)                                                                         \
  EMULATED V prefix##_mask_compress_##suffix(V source, x86::Mask<T, V> k, V a) {                                 \
    return x86::compress<V, T>(source, k, a);                                                                    \
  }                                                                                                              \
  EMULATED V prefix##_maskz_compress_##suffix(x86::Mask<T, V> k, V a) { return x86::compress<V, T>(V{}, k, a); } \
  EMULATED void prefix##_mask_compressstoreu_##suffix(void* to, x86::Mask<T, V> k, V a) {                        \
    x86::compress_store<V, T>(to, k, a);                                                                         \
  }                                                                                                              \
  EMULATED V prefix##_maskz_expand_##suffix(x86::Mask<T, V> k, V a) { return x86::expand<V, T>(V{}, k, a); }

EMULATED_COMPRESSIONS(_mm512, ps, __m512, float)
EMULATED_COMPRESSIONS(_mm512, pd, __m512d, double)
EMULATED_COMPRESSIONS(_mm512, epi32, __m512i, int32_t)
EMULATED_COMPRESSIONS(_mm512, epi64, __m512i, int64_t)
EMULATED_COMPRESSIONS(_mm256, ps, __m256, float)
EMULATED_COMPRESSIONS(_mm256, epi32, __m256i, int32_t)
EMULATED_CHOICES(_mm512, epi16, __m512i, int16_t)
EMULATED_CHOICES(_mm512, epi8, __m512i, int8_t)
#undef EMULATED_CHOICES
#undef EMULATED_COMPRESSIONS

// Between vector types and sizes. What a cast leaves undefined is garbage on purpose.
namespace x86 {
template <typename V, typename W>
EMULATED V widened(const W& low, int fill) {
  V v;
  std::memset(&v, fill, sizeof(v));
  std::memcpy(&v, &low, sizeof(low));
  return v;
}
template <typename V, typename W>
EMULATED V with_part(V whole, const W& part, int which) {
  std::memcpy(reinterpret_cast<char*>(&whole) + which * sizeof(W), &part, sizeof(part));
  return whole;
}
}  // namespace x86
EMULATED __m512i _mm512_castps_si512(__m512 a) { return reinterpret_cast<__m512i>(a); }
EMULATED __m512 _mm512_castsi512_ps(__m512i a) { return reinterpret_cast<__m512>(a); }
EMULATED __m512i _mm512_castpd_si512(__m512d a) { return reinterpret_cast<__m512i>(a); }
EMULATED __m512d _mm512_castsi512_pd(__m512i a) { return reinterpret_cast<__m512d>(a); }
EMULATED __m512d _mm512_castps_pd(__m512 a) { return reinterpret_cast<__m512d>(a); }
EMULATED __m512 _mm512_castpd_ps(__m512d a) { return reinterpret_cast<__m512>(a); }
EMULATED __m256i _mm512_castsi512_si256(__m512i a) { return x86::half<__m256i>(a, 0); }
EMULATED __m128i _mm512_castsi512_si128(__m512i a) { return x86::half<__m128i>(a, 0); }
EMULATED __m256 _mm512_castps512_ps256(__m512 a) { return x86::half<__m256>(a, 0); }
EMULATED __m256d _mm512_castpd512_pd256(__m512d a) { return x86::half<__m256d>(a, 0); }
EMULATED __m512i _mm512_castsi256_si512(__m256i a) { return x86::widened<__m512i>(a, 0xa5); }
EMULATED __m512 _mm512_castps256_ps512(__m256 a) { return x86::widened<__m512>(a, 0xa5); }
EMULATED __m512d _mm512_castpd256_pd512(__m256d a) { return x86::widened<__m512d>(a, 0xa5); }
EMULATED __m512i _mm512_zextsi256_si512(__m256i a) { return x86::widened<__m512i>(a, 0); }
EMULATED __m512i _mm512_zextsi128_si512(__m128i a) { return x86::widened<__m512i>(a, 0); }
EMULATED __m256i _mm512_extracti64x4_epi64(__m512i a, int i) { return x86::half<__m256i>(a, i & 1); }
EMULATED __m256i _mm512_extracti32x8_epi32(__m512i a, int i) { return x86::half<__m256i>(a, i & 1); }
EMULATED __m256 _mm512_extractf32x8_ps(__m512 a, int i) { return x86::half<__m256>(a, i & 1); }
EMULATED __m256d _mm512_extractf64x4_pd(__m512d a, int i) { return x86::half<__m256d>(a, i & 1); }
EMULATED __m128i _mm512_extracti32x4_epi32(__m512i a, int i) { return x86::half<__m128i>(a, i & 3); }
EMULATED __m128 _mm512_extractf32x4_ps(__m512 a, int i) { return x86::half<__m128>(a, i & 3); }
EMULATED __m512i _mm512_inserti64x4(__m512i a, __m256i b, int i) { return x86::with_part(a, b, i & 1); }
EMULATED __m512i _mm512_inserti32x8(__m512i a, __m256i b, int i) { return x86::with_part(a, b, i & 1); }
EMULATED __m512 _mm512_insertf32x8(__m512 a, __m256 b, int i) { return x86::with_part(a, b, i & 1); }
EMULATED __m512i _mm512_inserti32x4(__m512i a, __m128i b, int i) { return x86::with_part(a, b, i & 3); }
EMULATED int32_t _mm512_cvtsi512_si32(__m512i a) { return x86::lane<int32_t>(a, 0); }
EMULATED float _mm512_cvtss_f32(__m512 a) { return x86::lane<float>(a, 0); }
EMULATED double _mm512_cvtsd_f64(__m512d a) { return x86::lane<double>(a, 0); }
EMULATED __m512i _mm512_broadcastd_epi32(__m128i a) { return _mm512_set1_epi32(x86::lane<int32_t>(a, 0)); }
EMULATED __m512i _mm512_broadcastq_epi64(__m128i a) { return _mm512_set1_epi64(x86::lane<int64_t>(a, 0)); }
EMULATED __m512 _mm512_broadcastss_ps(__m128 a) { return _mm512_set1_ps(x86::lane<float>(a, 0)); }
EMULATED __m512i _mm512_broadcast_i32x4(__m128i a) {
  return x86::make<__m512i, int32_t>([&](int i) { return x86::lane<int32_t>(a, i % 4); });
}
EMULATED __m512i _mm512_broadcast_i64x4(__m256i a) { return x86::join<__m512i>(a, a); }

// Permutations. By numbers of lanes, across the whole vector:
#define EMULATED_PERMUTATIONS(prefix, suffix, V, I, T)                                                \
  EMULATED V prefix##_permutexvar_##suffix(I index, V a) {                                            \
    constexpr int n = x86::kLanesOf<T, V>;                                                            \
    return x86::make<V, T>([&](int i) { return x86::lane<T>(a, x86::lane<T>(index, i) & (n - 1)); }); \
  }                                                                                                   \
  EMULATED V prefix##_permutex2var_##suffix(V a, I index, V b) {                                      \
    constexpr int n = x86::kLanesOf<T, V>;                                                            \
    return x86::make<V, T>([&](int i) {                                                               \
      const int from = x86::lane<T>(index, i) & (2 * n - 1);                                          \
      return from < n ? x86::lane<T>(a, from) : x86::lane<T>(b, from - n);                            \
    });                                                                                               \
  }
EMULATED_PERMUTATIONS(_mm512, ps, __m512, __m512i, uint32_t)
EMULATED_PERMUTATIONS(_mm512, pd, __m512d, __m512i, uint64_t)
EMULATED_PERMUTATIONS(_mm512, epi64, __m512i, __m512i, uint64_t)
EMULATED_PERMUTATIONS(_mm512, epi32, __m512i, __m512i, uint32_t)
EMULATED_PERMUTATIONS(_mm512, epi16, __m512i, __m512i, uint16_t)
EMULATED_PERMUTATIONS(_mm256, epi16, __m256i, __m256i, uint16_t)
#undef EMULATED_PERMUTATIONS

// By two bits a place of an immediate: within each group of four lanes, of 128-bit parts, of 64-bit lanes.
EMULATED __m512 _mm512_permute_ps(__m512 a, int by) {
  return x86::make<__m512, float>([&](int i) { return x86::lane<float>(a, i / 4 * 4 + (by >> i % 4 * 2 & 3)); });
}
// A macro, because its _MM_PERM_ENUM would have the compiler's own function found beside this one.
EMULATED __m512i shuffle_epi32(__m512i a, int by) {
  return x86::make<__m512i, int32_t>([&](int i) { return x86::lane<int32_t>(a, i / 4 * 4 + (by >> i % 4 * 2 & 3)); });
}
#define _mm512_shuffle_epi32(a, by) shuffle_epi32(a, by)
EMULATED __m512 _mm512_shuffle_ps(__m512 a, __m512 b, int by) {
  return x86::make<__m512, float>(
      [&](int i) { return x86::lane<float>(i % 4 < 2 ? a : b, i / 4 * 4 + (by >> i % 4 * 2 & 3)); });
}
EMULATED __m512 _mm512_shuffle_f32x4(__m512 a, __m512 b, int by) {
  return x86::make<__m512, float>(
      [&](int i) { return x86::lane<float>(i < 8 ? a : b, (by >> i / 4 * 2 & 3) * 4 + i % 4); });
}
EMULATED __m512i _mm512_shuffle_i32x4(__m512i a, __m512i b, int by) {
  return x86::make<__m512i, int32_t>(
      [&](int i) { return x86::lane<int32_t>(i < 8 ? a : b, (by >> i / 4 * 2 & 3) * 4 + i % 4); });
}
EMULATED __m512i _mm512_shuffle_i64x2(__m512i a, __m512i b, int by) { return _mm512_shuffle_i32x4(a, b, by); }
EMULATED __m512i _mm512_permutex_epi64(__m512i a, int by) {
  return x86::make<__m512i, int64_t>([&](int i) { return x86::lane<int64_t>(a, i / 4 * 4 + (by >> i % 4 * 2 & 3)); });
}
EMULATED __m512i _mm512_alignr_epi32(__m512i a, __m512i b, int by) {
  return x86::make<__m512i, int32_t>([&](int i) {
    const int from = i + (by & 15);
    return from < 16 ? x86::lane<int32_t>(b, from) : x86::lane<int32_t>(a, from - 16);
  });
}

// Within 128-bit parts and lane by lane: the AVX2 instruction on each half.
#define EMULATED_BY_HALVES(name, V, H)                                                                                 \
  EMULATED V _mm512_##name(V a, V b) {                                                                                 \
    return x86::join<V>(                                                                                               \
        _mm256_##name(x86::half<H>(a, 0), x86::half<H>(b, 0)), _mm256_##name(x86::half<H>(a, 1), x86::half<H>(b, 1))); \
  }
EMULATED_BY_HALVES(shuffle_epi8, __m512i, __m256i)
EMULATED_BY_HALVES(packs_epi32, __m512i, __m256i)
EMULATED_BY_HALVES(packus_epi32, __m512i, __m256i)
EMULATED_BY_HALVES(packs_epi16, __m512i, __m256i)
EMULATED_BY_HALVES(packus_epi16, __m512i, __m256i)
EMULATED_BY_HALVES(unpacklo_epi8, __m512i, __m256i)
EMULATED_BY_HALVES(unpackhi_epi8, __m512i, __m256i)
EMULATED_BY_HALVES(unpacklo_epi16, __m512i, __m256i)
EMULATED_BY_HALVES(unpackhi_epi16, __m512i, __m256i)
EMULATED_BY_HALVES(unpacklo_epi32, __m512i, __m256i)
EMULATED_BY_HALVES(unpackhi_epi32, __m512i, __m256i)
EMULATED_BY_HALVES(unpacklo_epi64, __m512i, __m256i)
EMULATED_BY_HALVES(unpackhi_epi64, __m512i, __m256i)
EMULATED_BY_HALVES(unpacklo_ps, __m512, __m256)
EMULATED_BY_HALVES(unpackhi_ps, __m512, __m256)
#undef EMULATED_BY_HALVES

// Conversions: of each half by AVX2 where it has them. V and W are to and from, H and G their halves.
#define EMULATED_CONVERSION(name, V, H, W, G)                                                        \
  EMULATED V _mm512_##name(W a) {                                                                    \
    return x86::join<V>(H(_mm256_##name(x86::half<G>(a, 0))), H(_mm256_##name(x86::half<G>(a, 1)))); \
  }
EMULATED_CONVERSION(cvtepi32_ps, __m512, __m256, __m512i, __m256i)
EMULATED_CONVERSION(cvtps_epi32, __m512i, __m256i, __m512, __m256)
EMULATED_CONVERSION(cvttps_epi32, __m512i, __m256i, __m512, __m256)
EMULATED_CONVERSION(cvtps_pd, __m512d, __m256d, __m256, __m128)
EMULATED_CONVERSION(cvtpd_ps, __m256, __m128, __m512d, __m256d)
EMULATED_CONVERSION(cvtpd_epi32, __m256i, __m128i, __m512d, __m256d)
EMULATED_CONVERSION(cvtepi32_pd, __m512d, __m256d, __m256i, __m128i)
EMULATED_CONVERSION(cvtph_ps, __m512, __m256, __m256i, __m128i)
EMULATED_CONVERSION(cvtepi8_epi16, __m512i, __m256i, __m256i, __m128i)
EMULATED_CONVERSION(cvtepu8_epi16, __m512i, __m256i, __m256i, __m128i)
EMULATED_CONVERSION(cvtepi16_epi32, __m512i, __m256i, __m256i, __m128i)
EMULATED_CONVERSION(cvtepu16_epi32, __m512i, __m256i, __m256i, __m128i)
EMULATED_CONVERSION(cvtepi32_epi64, __m512i, __m256i, __m256i, __m128i)
#undef EMULATED_CONVERSION
template <int rounding = _MM_FROUND_TO_NEAREST_INT>
EMULATED __m256i cvtps_ph_rounded(__m512 a) {
  return x86::join<__m256i>(
      _mm256_cvtps_ph(x86::half<__m256>(a, 0), rounding), _mm256_cvtps_ph(x86::half<__m256>(a, 1), rounding));
}
#define _mm512_cvtps_ph(a, rounding) cvtps_ph_rounded<((rounding) & ~_MM_FROUND_NO_EXC)>(a)
EMULATED __m512i _mm512_cvtepi8_epi32(__m128i a) {
  return x86::make<__m512i, int32_t>([&](int i) { return x86::lane<int8_t>(a, i); });
}
EMULATED __m512i _mm512_cvtepu8_epi32(__m128i a) {
  return x86::make<__m512i, int32_t>([&](int i) { return x86::lane<uint8_t>(a, i); });
}

namespace x86 {
// To narrower integers: cut off, or to what fits. Lanes of V that W has none for are zero.
template <typename V, typename To, typename From, bool saturate, typename W>
EMULATED V narrowed(W a) {
  constexpr From high = (From{1} << (8 * sizeof(To) - 1)) - 1, low = -high - 1;
  return make<V, To>([&](int i) {
    const From value = i < kLanesOf<From, W> ? lane<From>(a, i) : From{0};
    return static_cast<To>(!saturate ? value : value > high ? high : value < low ? low : value);
  });
}
}  // namespace x86
#define EMULATED_NARROWING(prefix, from, to, V, To, From, W)                                 \
  EMULATED V prefix##_cvt##from##_##to(W a) { return x86::narrowed<V, To, From, false>(a); } \
  EMULATED V prefix##_cvts##from##_##to(W a) { return x86::narrowed<V, To, From, true>(a); }
EMULATED_NARROWING(_mm512, epi32, epi16, __m256i, int16_t, int32_t, __m512i)
EMULATED_NARROWING(_mm512, epi32, epi8, __m128i, int8_t, int32_t, __m512i)
EMULATED_NARROWING(_mm512, epi16, epi8, __m256i, int8_t, int16_t, __m512i)
EMULATED_NARROWING(_mm256, epi32, epi16, __m128i, int16_t, int32_t, __m256i)
EMULATED_NARROWING(_mm256, epi32, epi8, __m128i, int8_t, int32_t, __m256i)
EMULATED_NARROWING(_mm256, epi16, epi8, __m128i, int8_t, int16_t, __m256i)
#undef EMULATED_NARROWING

// Gathers: base + index * scale bytes; lanes that are masked out are not read.
#define EMULATED_GATHER(name, V, T, I, Index)                                                                         \
  EMULATED V _mm512_mask_##name(V source, x86::Mask<T, V> k, I index, const void* base, int scale) {                  \
    return x86::make<V, T>([&](int i) {                                                                               \
      T value = x86::lane<T>(source, i);                                                                              \
      if (x86::bit(k, i)) {                                                                                           \
        std::memcpy(&value, static_cast<const char*>(base) + int64_t{x86::lane<Index>(index, i)} * scale, sizeof(T)); \
      }                                                                                                               \
      return value;                                                                                                   \
    });                                                                                                               \
  }                                                                                                                   \
  EMULATED V _mm512_##name(I index, const void* base, int scale) {                                                    \
    return _mm512_mask_##name(V{}, static_cast<x86::Mask<T, V>>(-1), index, base, scale);                             \
  }
EMULATED_GATHER(i32gather_ps, __m512, float, __m512i, int32_t)
EMULATED_GATHER(i32gather_epi32, __m512i, int32_t, __m512i, int32_t)
EMULATED_GATHER(i32gather_pd, __m512d, double, __m256i, int32_t)
EMULATED_GATHER(i64gather_pd, __m512d, double, __m512i, int64_t)
#undef EMULATED_GATHER

}  // namespace darkmatter
