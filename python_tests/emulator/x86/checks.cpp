// The emulated AVX-512 against the processor: what each instruction does to random vectors, special values among them,
// is what AVX2 does to their halves, or, where AVX2 has no such instruction, what a few AVX2 instructions or plain
// loops give. Prints each intrinsic that differs, then how many were compared; knows nothing of csrc.
#include <immintrin.h>

#include <algorithm>
#include <random>

namespace darkmatter {
namespace {

std::mt19937_64 generator(1);
int differing = 0, compared = 0;

struct alignas(64) Block {
  unsigned char bytes[64];
};

template <typename V>
V as(const Block& block, int half = 0) {
  V v;
  std::memcpy(&v, block.bytes + half * sizeof(V) % 64, sizeof(v));
  return v;
}

// Random bits, or random lanes of a type with its special values.
Block bits() {
  Block block;
  for (int i = 0; i < 64; i += 8) {
    const uint64_t word = generator();
    std::memcpy(block.bytes + i, &word, 8);
  }
  return block;
}
template <typename T>
Block numbers() {
  Block block;
  const T special[] = {T(0),   T(-0.0), T(1),    T(-1),           T(INFINITY), T(-INFINITY),
                       T(NAN), T(2.5),  T(-3.5), T(2147483648.0), T(1e-42),    T(1e30)};
  for (size_t i = 0; i < 64 / sizeof(T); ++i) {
    const uint64_t draw = generator();
    const T value = draw % 3 == 0 ? special[draw / 3 % 12] : T(std::normal_distribution<double>(0, 100)(generator));
    std::memcpy(block.bytes + i * sizeof(T), &value, sizeof(T));
  }
  return block;
}
// The extremes too: their products overflow.
Block words() {
  Block block = bits();
  const int16_t special[] = {-32768, 32767, -1, 0};
  for (int i = 0; i < 64; i += 2) {
    const uint64_t draw = generator();
    if (draw % 2) {
      std::memcpy(block.bytes + i, special + draw / 2 % 4, 2);
    }
  }
  return block;
}

// Equal to the bit, one NaN like another; T is how lanes are read.
template <typename T, typename V>
void same(const char* name, const V& mine, const V& expected) {
  for (int i = 0; i < x86::kLanesOf<T, V>; ++i) {
    const T a = x86::lane<T>(mine, i), b = x86::lane<T>(expected, i);
    if (std::memcmp(&a, &b, sizeof(T)) != 0 && !(a != a && b != b)) {
      std::printf("%s differs in lane %d\n", name, i);
      ++differing;
      return;
    }
  }
}
void same_mask(const char* name, uint64_t mine, uint64_t expected) {
  if (mine != expected) {
    std::printf("%s: %llx, expected %llx\n", name, (unsigned long long)mine, (unsigned long long)expected);
    ++differing;
  }
}

uint64_t high_bits(__m256i v) { return static_cast<uint32_t>(_mm256_movemask_epi8(v)); }

// 512 bits are two times 256 bits: CHECK2(add_ps, ...) compares _mm512_add_ps with _mm256_add_ps on both halves.
#define HALVES(V, H, expression)                            \
  [&] {                                                     \
    const auto half = [&](int h) { return H(expression); }; \
    return x86::join<V>(half(0), half(1));                  \
  }()
#define CHECK1(name, V, H, T, a) \
  ++compared, same<T>(#name, V(_mm512_##name(as<V>(a))), HALVES(V, H, _mm256_##name(as<H>(a, h))))
#define CHECK2(name, V, H, T, a, b) \
  ++compared,                       \
      same<T>(#name, V(_mm512_##name(as<V>(a), as<V>(b))), HALVES(V, H, _mm256_##name(as<H>(a, h), as<H>(b, h))))
#define CHECK3(name, V, H, T, a, b, c)                                   \
  ++compared, same<T>(                                                   \
                  #name, V(_mm512_##name(as<V>(a), as<V>(b), as<V>(c))), \
                  HALVES(V, H, _mm256_##name(as<H>(a, h), as<H>(b, h), as<H>(c, h))))
#define CHECK_BY(name, V, H, T, a, by) \
  ++compared, same<T>(#name, _mm512_##name(as<V>(a), by), HALVES(V, H, _mm256_##name(as<H>(a, h), by)))

void floats() {
  const Block a = numbers<float>(), b = numbers<float>(), c = numbers<float>();
  const Block p = numbers<double>(), q = numbers<double>(), r = numbers<double>();
#define PS(name) CHECK2(name##_ps, __m512, __m256, float, a, b), CHECK2(name##_pd, __m512d, __m256d, double, p, q)
  PS(add), PS(sub), PS(mul), PS(div), PS(max), PS(min);
#undef PS
  CHECK1(sqrt_ps, __m512, __m256, float, a), CHECK1(sqrt_pd, __m512d, __m256d, double, p);
  CHECK3(fmadd_ps, __m512, __m256, float, a, b, c), CHECK3(fmsub_ps, __m512, __m256, float, a, b, c);
  CHECK3(fnmadd_ps, __m512, __m256, float, a, b, c), CHECK3(fnmadd_pd, __m512d, __m256d, double, p, q, r);
  CHECK3(fmadd_pd, __m512d, __m256d, double, p, q, r), CHECK3(fmsub_pd, __m512d, __m256d, double, p, q, r);
  const __m256 sign = _mm256_set1_ps(-0.0f);
  same<float>("abs_ps", _mm512_abs_ps(as<__m512>(a)), HALVES(__m512, __m256, _mm256_andnot_ps(sign, as<__m256>(a, h))));
  same<double>(
      "abs_pd", _mm512_abs_pd(as<__m512d>(p)),
      HALVES(__m512d, __m256d, _mm256_andnot_pd(_mm256_set1_pd(-0.0), as<__m256d>(p, h))));
  CHECK_BY(permute_ps, __m512, __m256, float, a, 0xB1), CHECK_BY(permute_ps, __m512, __m256, float, a, 0x4E);
  CHECK_BY(permute_ps, __m512, __m256, float, a, 0x1B);
  CHECK2(unpacklo_ps, __m512, __m256, float, a, b), CHECK2(unpackhi_ps, __m512, __m256, float, a, b);
  same<float>(
      "shuffle_ps", _mm512_shuffle_ps(as<__m512>(a), as<__m512>(b), 0x9C),
      HALVES(__m512, __m256, _mm256_shuffle_ps(as<__m256>(a, h), as<__m256>(b, h), 0x9C)));
#define PREDICATE(p)                                                                   \
  ++compared, same_mask(                                                               \
                  "cmp_ps " #p, _mm512_cmp_ps_mask(as<__m512>(a), as<__m512>(b), p),   \
                  _mm256_movemask_ps(_mm256_cmp_ps(as<__m256>(a), as<__m256>(b), p)) | \
                      _mm256_movemask_ps(_mm256_cmp_ps(as<__m256>(a, 1), as<__m256>(b, 1), p)) << 8)
  PREDICATE(0), PREDICATE(1), PREDICATE(2), PREDICATE(3), PREDICATE(4), PREDICATE(5), PREDICATE(6), PREDICATE(7);
  PREDICATE(8), PREDICATE(9), PREDICATE(10), PREDICATE(11), PREDICATE(12), PREDICATE(13), PREDICATE(14), PREDICATE(15);
  PREDICATE(16), PREDICATE(17), PREDICATE(21), PREDICATE(25), PREDICATE(29), PREDICATE(30), PREDICATE(31);
#undef PREDICATE
}

#define _mm256_permutex_epi64 _mm256_permute4x64_epi64  // AVX2's name of it
void integers() {
  const Block a = words(), b = words();
#define INTEGERS(name, T) CHECK2(name, __m512i, __m256i, T, a, b)
  INTEGERS(add_epi64, int64_t), INTEGERS(sub_epi64, int64_t), INTEGERS(add_epi32, int32_t);
  INTEGERS(sub_epi32, int32_t), INTEGERS(mullo_epi32, int32_t), INTEGERS(max_epi32, int32_t);
  INTEGERS(min_epi32, int32_t), INTEGERS(add_epi16, int16_t), INTEGERS(sub_epi16, int16_t);
  INTEGERS(mullo_epi16, int16_t), INTEGERS(mulhi_epi16, int16_t), INTEGERS(max_epi16, int16_t);
  INTEGERS(min_epi16, int16_t), INTEGERS(add_epi8, int8_t), INTEGERS(sub_epi8, int8_t);
  INTEGERS(madd_epi16, int32_t), INTEGERS(maddubs_epi16, int16_t), INTEGERS(packs_epi32, int16_t);
  INTEGERS(packus_epi32, int16_t), INTEGERS(packs_epi16, int8_t), INTEGERS(packus_epi16, int8_t);
  INTEGERS(shuffle_epi8, int8_t), INTEGERS(unpacklo_epi8, int8_t), INTEGERS(unpackhi_epi8, int8_t);
  INTEGERS(unpacklo_epi16, int8_t), INTEGERS(unpackhi_epi16, int8_t), INTEGERS(unpacklo_epi32, int8_t);
  INTEGERS(unpackhi_epi32, int8_t), INTEGERS(unpacklo_epi64, int8_t), INTEGERS(unpackhi_epi64, int8_t);
#undef INTEGERS
#define BITWISE(name)                                                           \
  ++compared, same<int32_t>(                                                    \
                  #name, _mm512_##name##_epi32(as<__m512i>(a), as<__m512i>(b)), \
                  HALVES(__m512i, __m256i, _mm256_##name##_si256(as<__m256i>(a, h), as<__m256i>(b, h))))
  BITWISE(and), BITWISE(or), BITWISE(xor), BITWISE(andnot);
#undef BITWISE
  CHECK1(abs_epi32, __m512i, __m256i, int32_t, a), CHECK1(abs_epi16, __m512i, __m256i, int16_t, a);
#define SHIFT(name, n) CHECK_BY(name, __m512i, __m256i, int16_t, a, n)
  SHIFT(slli_epi32, 7), SHIFT(slli_epi32, 32), SHIFT(srli_epi32, 7), SHIFT(srli_epi32, 40), SHIFT(srai_epi32, 7);
  SHIFT(srai_epi32, 32), SHIFT(slli_epi16, 3), SHIFT(slli_epi16, 16), SHIFT(srli_epi16, 3), SHIFT(srli_epi16, 99);
  SHIFT(srai_epi16, 3), SHIFT(srai_epi16, 16), SHIFT(shuffle_epi32, 0x4E), SHIFT(shuffle_epi32, 0x1B);
  SHIFT(permutex_epi64, 0x93);
#undef SHIFT
}

// Products of bytes by widening to 16 bits, which AVX2 multiplies and adds without overflow.
template <typename V>
__m256i byte_products(const Block& a, const Block& b, int h) {
  const auto wide = [&](int q) {
    return _mm256_madd_epi16(
        _mm256_cvtepu8_epi16(as<__m128i>(a, 2 * h + q)), _mm256_cvtepi8_epi16(as<__m128i>(b, 2 * h + q)));
  };
  return _mm256_permute4x64_epi64(_mm256_hadd_epi32(wide(0), wide(1)), 0xD8);
}

// The exact sum, cut off to what fits: from two sums of 32 bits that cannot both be wrong.
__m256i saturated(__m256i c, __m256i products) {
  const __m256i sum = _mm256_add_epi32(c, products);
  const __m256i over = _mm256_andnot_si256(_mm256_xor_si256(c, products), _mm256_xor_si256(c, sum));
  const __m256i limit = _mm256_xor_si256(_mm256_srai_epi32(c, 31), _mm256_set1_epi32(INT32_MAX));
  return _mm256_castps_si256(
      _mm256_blendv_ps(_mm256_castsi256_ps(sum), _mm256_castsi256_ps(limit), _mm256_castsi256_ps(over)));
}

void dot_products() {
  const Block a = words(), b = words(), c = words();
  Block small = b;  // two products of -32768 * -32768 do not fit: dpwssds sums them exactly
  for (int i = 0; i < 64; i += 2) {
    int16_t value;
    std::memcpy(&value, small.bytes + i, 2);
    value = std::max<int16_t>(value, -32767);
    std::memcpy(small.bytes + i, &value, 2);
  }
  const auto add = [&](__m256i products, int h) { return _mm256_add_epi32(as<__m256i>(c, h), products); };
  const auto words_of = [&](const Block& y, int h) { return _mm256_madd_epi16(as<__m256i>(a, h), as<__m256i>(y, h)); };
#define VNNI(name, y, expression)                                                                                      \
  ++compared, same<int32_t>(                                                                                           \
                  #name, _mm512_##name##_epi32(as<__m512i>(c), as<__m512i>(a), as<__m512i>(y)),                        \
                  HALVES(__m512i, __m256i, expression));                                                               \
  for (int h = 0; h < 2; ++h) {                                                                                        \
    same<int32_t>(                                                                                                     \
        #name " 256", _mm256_##name##_epi32(as<__m256i>(c, h), as<__m256i>(a, h), as<__m256i>(y, h)), expression);     \
    same<int32_t>(                                                                                                     \
        #name " avx", _mm256_##name##_avx_epi32(as<__m256i>(c, h), as<__m256i>(a, h), as<__m256i>(y, h)), expression); \
  }
  VNNI(dpbusd, b, add(byte_products<__m256i>(a, b, h), h))
  VNNI(dpbusds, b, saturated(as<__m256i>(c, h), byte_products<__m256i>(a, b, h)))
  VNNI(dpwssd, b, add(words_of(b, h), h))
  VNNI(dpwssds, small, saturated(as<__m256i>(c, h), words_of(small, h)))
#undef VNNI
  const __m512i one = _mm512_set1_epi16(-32768);  // 2^31 - 1 from c = -1, not the wrapped -2^31 - 1
  same<int32_t>("dpwssds", _mm512_dpwssds_epi32(_mm512_set1_epi32(-1), one, one), _mm512_set1_epi32(INT32_MAX));
}

void conversions() {
  const Block a = numbers<float>(), p = numbers<double>(), i = words();
#define CONVERSION(name, V, H, T, W, G, from) \
  ++compared, same<T>(#name, _mm512_##name(as<W>(from)), HALVES(V, H, _mm256_##name(as<G>(from, h))))
  CONVERSION(cvtps_epi32, __m512i, __m256i, int32_t, __m512, __m256, a);
  CONVERSION(cvttps_epi32, __m512i, __m256i, int32_t, __m512, __m256, a);
  CONVERSION(cvtepi32_ps, __m512, __m256, float, __m512i, __m256i, i);
  CONVERSION(cvtps_pd, __m512d, __m256d, double, __m256, __m128, a);
  CONVERSION(cvtpd_ps, __m256, __m128, float, __m512d, __m256d, p);
  CONVERSION(cvtpd_epi32, __m256i, __m128i, int32_t, __m512d, __m256d, p);
  CONVERSION(cvtepi32_pd, __m512d, __m256d, double, __m256i, __m128i, i);
  CONVERSION(cvtph_ps, __m512, __m256, float, __m256i, __m128i, i);
  CONVERSION(cvtepi8_epi16, __m512i, __m256i, int16_t, __m256i, __m128i, i);
  CONVERSION(cvtepu8_epi16, __m512i, __m256i, int16_t, __m256i, __m128i, i);
  CONVERSION(cvtepi16_epi32, __m512i, __m256i, int32_t, __m256i, __m128i, i);
  CONVERSION(cvtepu16_epi32, __m512i, __m256i, int32_t, __m256i, __m128i, i);
  CONVERSION(cvtepi32_epi64, __m512i, __m256i, int64_t, __m256i, __m128i, i);
#undef CONVERSION
  const auto eight = [&](int h) { return _mm_loadl_epi64(reinterpret_cast<const __m128i*>(i.bytes + 8 * h)); };
  ++compared, same<int32_t>(
                  "cvtepi8_epi32", _mm512_cvtepi8_epi32(as<__m128i>(i)),
                  HALVES(__m512i, __m256i, _mm256_cvtepi8_epi32(eight(h))));
  ++compared, same<int32_t>(
                  "cvtepu8_epi32", _mm512_cvtepu8_epi32(as<__m128i>(i)),
                  HALVES(__m512i, __m256i, _mm256_cvtepu8_epi32(eight(h))));
  ++compared, same<int16_t>(
                  "cvtps_ph", _mm512_cvtps_ph(as<__m512>(a), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC),
                  HALVES(__m256i, __m128i, _mm256_cvtps_ph(as<__m256>(a, h), _MM_FROUND_TO_NEAREST_INT)));
  // Saturating by AVX2's packs, whose 128-bit parts lie crosswise; cutting off by its byte shuffle.
  const __m256i x = as<__m256i>(i), y = as<__m256i>(i, 1), zero = _mm256_setzero_si256();
  const auto packed = [](__m256i v) { return _mm256_permute4x64_epi64(v, 0xD8); };
  const __m256i to_words = packed(_mm256_packs_epi32(x, y)), to_bytes = packed(_mm256_packs_epi16(x, y));
  const __m128i cut = _mm_setr_epi8(0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1);
  const auto cut_bytes = [&](int q) { return _mm_shuffle_epi8(as<__m128i>(i, q), cut); };
  const __m128i low = _mm_unpacklo_epi32(cut_bytes(0), cut_bytes(1));
  const __m128i high = _mm_unpacklo_epi32(cut_bytes(2), cut_bytes(3));
  compared += 8;
  same<int16_t>("cvtsepi32_epi16", _mm512_cvtsepi32_epi16(as<__m512i>(i)), to_words);
  same<int8_t>("cvtsepi16_epi8", _mm512_cvtsepi16_epi8(as<__m512i>(i)), to_bytes);
  same<int16_t>("cvtsepi32_epi16 256", _mm256_cvtsepi32_epi16(x), _mm256_castsi256_si128(to_words));
  same<int8_t>("cvtsepi16_epi8 256", _mm256_cvtsepi16_epi8(x), _mm256_castsi256_si128(to_bytes));
  same<int8_t>(
      "cvtsepi32_epi8", _mm512_cvtsepi32_epi8(as<__m512i>(i)),
      _mm256_castsi256_si128(packed(_mm256_packs_epi16(to_words, zero))));
  same<int8_t>("cvtepi32_epi8", _mm512_cvtepi32_epi8(as<__m512i>(i)), _mm_unpacklo_epi64(low, high));
  same<int8_t>("cvtepi32_epi8 256", _mm256_cvtepi32_epi8(x), _mm_unpacklo_epi64(low, _mm_setzero_si128()));
  same<int16_t>(
      "cvtepi32_epi16", _mm512_cvtepi32_epi16(as<__m512i>(i)),
      packed(_mm256_packus_epi32(
          _mm256_and_si256(x, _mm256_set1_epi32(0xffff)), _mm256_and_si256(y, _mm256_set1_epi32(0xffff)))));
  same<int8_t>(
      "cvtepi16_epi8", _mm512_cvtepi16_epi8(as<__m512i>(i)),
      packed(_mm256_packus_epi16(
          _mm256_and_si256(x, _mm256_set1_epi16(0xff)), _mm256_and_si256(y, _mm256_set1_epi16(0xff)))));
}

// Masks: AVX2 blends by the sign of lanes, gathers and loads under the same signs.
void masks() {
  const Block a = numbers<float>(), b = numbers<float>(), i = words(), j = words();
  const __mmask16 k = static_cast<__mmask16>(generator());
  Block sign{};
  for (int e = 0; e < 16; ++e) {
    sign.bytes[4 * e + 3] = k >> e & 1 ? 0x80 : 0;
  }
  const __m512 x = as<__m512>(a), y = as<__m512>(b);
  const auto blend = [&](const auto& no, const auto& yes) {
    return x86::join<__m512>(
        _mm256_blendv_ps(x86::half<__m256>(no, 0), x86::half<__m256>(yes, 0), as<__m256>(sign)),
        _mm256_blendv_ps(x86::half<__m256>(no, 1), x86::half<__m256>(yes, 1), as<__m256>(sign, 1)));
  };
  const __m512 zero{}, sum = HALVES(__m512, __m256, _mm256_add_ps(as<__m256>(a, h), as<__m256>(b, h)));
  compared += 12;
  same<float>("mask_mov_ps", _mm512_mask_mov_ps(x, k, y), blend(x, y));
  same<float>("mask_blend_ps", _mm512_mask_blend_ps(k, x, y), blend(x, y));
  same<float>("mask_add_ps", _mm512_mask_add_ps(y, k, x, y), blend(y, sum));
  same<float>("maskz_add_ps", _mm512_maskz_add_ps(k, x, y), blend(zero, sum));
  same<float>(
      "256 mask_add_ps", _mm256_mask_add_ps(as<__m256>(b), k, as<__m256>(a), as<__m256>(b)),
      x86::half<__m256>(blend(y, sum), 0));
  same<float>("maskz_loadu_ps", _mm512_maskz_loadu_ps(k, a.bytes), blend(zero, x));
  same<float>("mask_loadu_ps", _mm512_mask_loadu_ps(y, k, a.bytes), blend(y, x));
  Block stored = b;
  _mm512_mask_storeu_ps(stored.bytes, k, x);
  same<float>("mask_storeu_ps", as<__m512>(stored), blend(y, x));
  same_mask("mask_cmp_ps", _mm512_mask_cmp_ps_mask(k, x, y, _CMP_GT_OQ), k & _mm512_cmp_ps_mask(x, y, _CMP_GT_OQ));
  const auto greater = [&](auto compare) {
    return high_bits(compare(as<__m256i>(i), as<__m256i>(j))) | high_bits(compare(as<__m256i>(i, 1), as<__m256i>(j, 1)))
                                                                    << 32;
  };
  const auto gt8 = [](__m256i p, __m256i q) { return _mm256_cmpgt_epi8(p, q); };
  const auto gt16 = [](__m256i p, __m256i q) { return _mm256_cmpgt_epi16(p, q); };
  const auto eq16 = [](__m256i p, __m256i q) { return _mm256_cmpeq_epi16(p, q); };
  const auto gt32 = [](__m256i p, __m256i q) { return _mm256_cmpgt_epi32(p, q); };
  const auto every = [](uint64_t bytes, int n) {
    uint64_t found = 0;
    for (int e = 0; e < 64 / n; ++e) {
      found |= (bytes >> e * n & 1) << e;
    }
    return found;
  };
  const __m512i u = as<__m512i>(i), v = as<__m512i>(j);
  same_mask("cmpgt_epi8", _mm512_cmpgt_epi8_mask(u, v), greater(gt8));
  same_mask("cmpgt_epi16", _mm512_cmpgt_epi16_mask(u, v), every(greater(gt16), 2));
  same_mask("cmpeq_epi16", _mm512_cmpeq_epi16_mask(u, v), every(greater(eq16), 2));
  same_mask("cmpneq_epi16", _mm512_cmpneq_epi16_mask(u, v), every(~greater(eq16), 2));
  same_mask("cmplt_epi32", _mm512_cmplt_epi32_mask(v, u), every(greater(gt32), 4));
  same_mask("cmpge_epi32", _mm512_cmpge_epi32_mask(v, u), every(~greater(gt32), 4));
}

// By their definitions.
void permutations() {
  const Block a = numbers<float>(), b = numbers<float>(), by = bits();
  float x[32], compressed[16] = {}, expanded[16] = {};
  std::memcpy(x, a.bytes, 64), std::memcpy(x + 16, b.bytes, 64);
  uint32_t index[16];
  std::memcpy(index, by.bytes, 64);
  const __mmask16 k = static_cast<__mmask16>(generator());
  int n = 0;
  float one[16], two[16], parts[16], gathered[16], shifted[16];
  int32_t offset[16];
  for (int e = 0; e < 16; ++e) {
    one[e] = x[index[e] % 16], two[e] = x[index[e] % 32];
    parts[e] = x[(e < 8 ? 0 : 16) + (0x4E >> e / 4 * 2 & 3) * 4 + e % 4];
    offset[e] = index[e] % 31, gathered[e] = x[offset[e]];
    shifted[e] = x[e + 5];
    if (k >> e & 1) {
      expanded[e] = x[n];
      compressed[n++] = x[e];
    }
  }
  const auto wide = [](const float* from) { return x86::load<__m512>(from); };
  const __m512 u = as<__m512>(a), v = as<__m512>(b);
  const __m512i numbers = as<__m512i>(by), places = x86::load<__m512i>(offset);
  compared += 10;
  same<float>("permutexvar_ps", _mm512_permutexvar_ps(numbers, u), wide(one));
  same<float>("permutex2var_ps", _mm512_permutex2var_ps(u, numbers, v), wide(two));
  same<float>("shuffle_f32x4", _mm512_shuffle_f32x4(u, v, 0x4E), wide(parts));
  same<float>("i32gather_ps", _mm512_i32gather_ps(places, x, 4), wide(gathered));
  same<float>(
      "mask_i32gather_ps", _mm512_mask_i32gather_ps(u, k, places, x, 4), _mm512_mask_mov_ps(u, k, wide(gathered)));
  same<float>(
      "alignr_epi32", _mm512_castsi512_ps(_mm512_alignr_epi32(_mm512_castps_si512(v), _mm512_castps_si512(u), 5)),
      wide(shifted));
  same<float>("maskz_compress_ps", _mm512_maskz_compress_ps(k, u), wide(compressed));
  same<float>("maskz_expand_ps", _mm512_maskz_expand_ps(k, u), wide(expanded));
  float stored[16];
  std::copy_n(x + 16, 16, stored);
  _mm512_mask_compressstoreu_ps(stored, k, u);
  std::copy_n(x + 16 + n, 16 - n, compressed + n);  // those behind are as they were
  same<float>("mask_compressstoreu_ps", wide(stored), wide(compressed));
  same<float>("mask_compress_ps", _mm512_mask_compress_ps(v, k, u), wide(compressed));
}

// In the compilers' order: halves, quarters, and the last two.
void reductions() {
  const Block a = numbers<float>(), p = numbers<double>(), i = words();
  const __m256 eight = _mm256_add_ps(as<__m256>(a), as<__m256>(a, 1));
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  const __m128 one = _mm_add_ss(two, _mm_movehdup_ps(two));
  compared += 3;
  same<float>("reduce_add_ps", _mm512_reduce_add_ps(as<__m512>(a)), _mm_cvtss_f32(one));
  const __m256d half = _mm256_add_pd(as<__m256d>(p), as<__m256d>(p, 1));
  const __m128d quarter = _mm_add_pd(_mm256_castpd256_pd128(half), _mm256_extractf128_pd(half, 1));
  same<double>(
      "reduce_add_pd", _mm512_reduce_add_pd(as<__m512d>(p)),
      _mm_cvtsd_f64(_mm_add_sd(quarter, _mm_unpackhi_pd(quarter, quarter))));
  int32_t n[16];
  std::memcpy(n, i.bytes, 64);
  same<int32_t>("reduce_max_epi32", _mm512_reduce_max_epi32(as<__m512i>(i)), *std::max_element(n, n + 16));
}

// A product of two tiles beside plain loops over rows that lie further apart than a tile is wide.
void tiles() {
  constexpr int kStride = 192;
  struct alignas(64) {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
  } const config;
  static unsigned char a[16 * kStride], b[16 * kStride];
  for (int i = 0; i < 16 * kStride; i += 64) {
    const Block left = bits(), right = bits();
    std::memcpy(a + i, left.bytes, 64);
    std::memcpy(b + i, right.bytes, 64);
  }
  int32_t found[16][16];
  _tile_loadconfig(&config);
  _tile_loadd(6, a, kStride);
  _tile_loadd(7, b, kStride);
  _tile_zero(0);
  _tile_dpbusd(0, 6, 7);
  _tile_dpbusd(0, 6, 7);
  _tile_stored(0, found, 64);
  _tile_release();
  ++compared;
  for (int m = 0; m < 16; ++m) {
    int32_t sums[16] = {};
    for (int e = 0; e < 64; ++e) {
      for (int n = 0; n < 16; ++n) {
        sums[n] += 2 * int{a[m * kStride + e]} * static_cast<signed char>(b[e / 4 * kStride + 4 * n + e % 4]);
      }
    }
    same<int32_t>("tile_dpbusd", x86::load<__m512i>(found[m]), x86::load<__m512i>(sums));
  }
}

}  // namespace
}  // namespace darkmatter

int main() {
  for (int round = 0; round < 300; ++round) {
    darkmatter::floats();
    darkmatter::integers();
    darkmatter::dot_products();
    darkmatter::conversions();
    darkmatter::masks();
    darkmatter::permutations();
    darkmatter::reductions();
    darkmatter::tiles();
  }
  std::printf("compared %d, %d differ\n", darkmatter::compared / 300, darkmatter::differing);
  return darkmatter::differing != 0;
}
