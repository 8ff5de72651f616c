// The kernels themselves, in compiler vector extensions. kernels.cpp includes this file once an instruction set, in a
// namespace and under a target pragma of its own; hence no include guard, and no call of a function from outside it
// (a shared inline function would be compiled for whichever set comes first).

typedef double Vec8 __attribute__((vector_size(64)));
typedef double Vec4 __attribute__((vector_size(32)));
typedef int64_t Long8 __attribute__((vector_size(64)));
typedef float Float8 __attribute__((vector_size(32)));
typedef uint32_t Word8 __attribute__((vector_size(32)));
typedef uint16_t Short8 __attribute__((vector_size(16)));

#define DM_INLINE static inline __attribute__((always_inline))
#if defined(__clang__)
#define DM_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define DM_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, Long8{__VA_ARGS__})
#endif

template <typename V, typename T>
DM_INLINE V load_as(const T* from) {
  V value;
  __builtin_memcpy(&value, from, sizeof(V));
  return value;
}

// Where eight doubles are two registers, gcc keeps a Vec8 that is stored whole or carried through a loop in memory and
// moves it by general registers: store and add up its halves.
DM_INLINE Vec4 lower(Vec8 value) { return Vec4{value[0], value[1], value[2], value[3]}; }
DM_INLINE Vec4 upper(Vec8 value) { return Vec4{value[4], value[5], value[6], value[7]}; }

DM_INLINE void store(double* to, Vec8 value) {
#if DM_ISA >= 2
  __builtin_memcpy(to, &value, sizeof(value));
#else
  const Vec4 halves[2] = {lower(value), upper(value)};
  __builtin_memcpy(to, &halves[0], sizeof(Vec4));
  __builtin_memcpy(to + 4, &halves[1], sizeof(Vec4));
#endif
}

// Eight elements of any type as float64; the conversions are exact. By intrinsics where there are any: compilers split
// the vector conversions into halves and join them again, at three times the instructions.
DM_INLINE Vec8 load8(const double* from) { return load_as<Vec8>(from); }
#if DM_ISA >= 2
DM_INLINE Vec8 load8(const float* from) { return (Vec8)_mm512_cvtps_pd(_mm256_loadu_ps(from)); }
DM_INLINE Vec8 load8(const BFloat16* from) {
  const __m256i words = _mm256_cvtepu16_epi32(load_as<__m128i>(from));
  return (Vec8)_mm512_cvtps_pd(_mm256_castsi256_ps(_mm256_slli_epi32(words, 16)));
}
DM_INLINE Vec8 load8(const Half* from) { return (Vec8)_mm512_cvtps_pd(_mm256_cvtph_ps(load_as<__m128i>(from))); }
#else
DM_INLINE Vec8 load8(const float* from) { return __builtin_convertvector(load_as<Float8>(from), Vec8); }
DM_INLINE Vec8 load8(const BFloat16* from) {
  const Word8 words = __builtin_convertvector(load_as<Short8>(from), Word8) << 16;
  return __builtin_convertvector(load_as<Float8>(&words), Vec8);
}
DM_INLINE Vec8 load8(const Half* from) {
#if DM_ISA == 1
  return __builtin_convertvector((Float8)_mm256_cvtph_ps(load_as<__m128i>(from)), Vec8);
#else
  Vec8 value;
  for (int e = 0; e < 8; ++e) {
    value[e] = widen_half(from[e]);
  }
  return value;
#endif
}
#endif

// Eight float64 rounded to any type: to nearest even, the 16-bit types through float32, as torch converts.
DM_INLINE void store_rounded(double* to, Vec8 value) { store(to, value); }
DM_INLINE Float8 to_float(Vec8 value) {
#if DM_ISA >= 2
  return (Float8)_mm512_cvtpd_ps((__m512d)value);
#else
  return __builtin_convertvector(value, Float8);
#endif
}
DM_INLINE void store_rounded(float* to, Vec8 value) {
  const Float8 rounded = to_float(value);
  __builtin_memcpy(to, &rounded, sizeof(rounded));
}
DM_INLINE void store_rounded(BFloat16* to, Vec8 value) {
  const Float8 single = to_float(value);
  const Word8 bits = (Word8)single, even = bits + 0x7fff + (bits >> 16 & 1);
  const Word8 not_a_number = (Word8)(single != single);
  const Short8 rounded = __builtin_convertvector((even >> 16 & ~not_a_number) | (not_a_number & 0x7fc0), Short8);
  __builtin_memcpy(to, &rounded, sizeof(rounded));
}
DM_INLINE void store_rounded(Half* to, Vec8 value) {
  const Float8 single = to_float(value);
#if DM_ISA >= 1
  const __m128i rounded = _mm256_cvtps_ph((__m256)single, _MM_FROUND_TO_NEAREST_INT);
  __builtin_memcpy(to, &rounded, sizeof(rounded));
#else
  for (int e = 0; e < 8; ++e) {
    to[e] = round_half(single[e]);
  }
#endif
}

// Fewer than eight elements, the rest zero.
template <typename T>
DM_INLINE Vec8 load_tail(const T* from, int64_t n) {
  T padded[8] = {};
  __builtin_memcpy(padded, from, n * sizeof(T));
  return load8(padded);
}

// Eight sums of products. The same additions in the same order on every instruction set: lane by lane, then as a tree.
#if DM_ISA >= 2
struct Sums {
  Vec8 all = {};
};
DM_INLINE void add(Sums& sums, Vec8 a, Vec8 b) { sums.all += a * b; }
DM_INLINE Vec4 fold(const Sums& sums) { return lower(sums.all) + upper(sums.all); }
#else
struct Sums {
  Vec4 low = {}, high = {};
};
DM_INLINE void add(Sums& sums, Vec8 a, Vec8 b) {
  sums.low += lower(a) * lower(b);
  sums.high += upper(a) * upper(b);
}
DM_INLINE Vec4 fold(const Sums& sums) { return sums.low + sums.high; }
#endif

DM_INLINE double reduce(Vec4 four) { return (four[0] + four[2]) + (four[1] + four[3]); }
DM_INLINE double reduce(const Sums& sums) { return reduce(fold(sums)); }

template <typename T>
static void widen(const T* from, double* to, int64_t n) {
  int64_t e = 0;
  for (; e + 8 <= n; e += 8) {
    store(to + e, load8(from + e));
  }
  if (e < n) {
    const Vec8 tail = load_tail(from + e, n - e);
    __builtin_memcpy(to + e, &tail, (n - e) * sizeof(double));
  }
}

template <typename T>
static void round_row(const double* from, T* to, int64_t n) {
  int64_t e = 0;
  for (; e + 8 <= n; e += 8) {
    store_rounded(to + e, load8(from + e));
  }
  if (e < n) {
    T tail[8];
    store_rounded(tail, load_tail(from + e, n - e));
    __builtin_memcpy(to + e, tail, (n - e) * sizeof(T));
  }
}

// A tokens times B latents, whose rows stay in L1 while tokens stream. The two halves of the lanes one after the other:
// 2 x 4 sums of four lanes, two tokens and a weight fit the registers of every instruction set with vectors of 32
// bytes, and 6 loads feed 8 multiply-adds.
template <int A, int B>
DM_INLINE void half_block(const double* x, const double* w, int64_t d_padded, Vec4 (&sums)[A][B]) {
  Vec4 own[A][B] = {};
  for (int64_t e = 0; e < d_padded; e += kLanes) {
    Vec4 rows[A];
#pragma GCC unroll 2
    for (int a = 0; a < A; ++a) {
      rows[a] = load_as<Vec4>(x + a * d_padded + e);
    }
#pragma GCC unroll 4
    for (int b = 0; b < B; ++b) {
      const Vec4 column = load_as<Vec4>(w + b * d_padded + e);
#pragma GCC unroll 2
      for (int a = 0; a < A; ++a) {
        own[a][b] += rows[a] * column;
      }
    }
  }
  __builtin_memcpy(sums, own, sizeof(own));
}

template <int A>
DM_INLINE void dot_block(const double* x, const double* w, int64_t d_padded, double* out, int64_t ld_out) {
  constexpr int B = 4;
  for (int first = 0; first < kLanes; first += B) {
    Vec4 low[A][B], high[A][B];
    half_block<A, B>(x, w + first * d_padded, d_padded, low);
    half_block<A, B>(x + 4, w + first * d_padded + 4, d_padded, high);
    for (int a = 0; a < A; ++a) {
      for (int b = 0; b < B; ++b) {
        out[a * ld_out + first + b] = reduce(low[a][b] + high[a][b]);
      }
    }
  }
}

static void dots(
    const double* x, int64_t tokens, const double* w, int64_t latents, int64_t d_padded, double* out, int64_t ld_out) {
  for (int64_t l = 0; l < latents; l += 8) {
    int64_t t = 0;
    for (; t + 2 <= tokens; t += 2) {
      dot_block<2>(x + t * d_padded, w + l * d_padded, d_padded, out + t * ld_out + l, ld_out);
    }
    if (t < tokens) {
      dot_block<1>(x + t * d_padded, w + l * d_padded, d_padded, out + t * ld_out + l, ld_out);
    }
  }
}

template <typename T>
static double dot(const double* x, const T* w, int64_t d) {
  Sums sums;
  int64_t e = 0;
  for (; e + kLanes <= d; e += kLanes) {
    add(sums, load8(x + e), load8(w + e));
  }
  if (e < d) {
    add(sums, load_tail(x + e, d - e), load_tail(w + e, d - e));
  }
  return reduce(sums);
}

// Four pairs at a time: four independent chains of additions hide their latency.
template <typename T>
static void pair_dots(const T* const* left, const T* const* right, int64_t d, int64_t n, double* out) {
  for (int64_t p = 0; p < n; p += 4) {
    const T *a[4], *b[4];
    Sums sums[4];
    for (int i = 0; i < 4; ++i) {
      const int64_t one = p + i < n ? p + i : p;
      a[i] = left[one];
      b[i] = right[one];
    }
    int64_t e = 0;
    for (; e + kLanes <= d; e += kLanes) {
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        add(sums[i], load8(a[i] + e), load8(b[i] + e));
      }
    }
    for (int i = 0; i < 4; ++i) {
      if (e < d) {
        add(sums[i], load_tail(a[i] + e, d - e), load_tail(b[i] + e, d - e));
      }
      if (p + i < n) {
        out[p + i] = reduce(sums[i]);
      }
    }
  }
}

// Rows that are gathered lie anywhere, so each start is a miss; from there the hardware prefetcher follows.
DM_INLINE void fetch_start(const void* row) {
  constexpr int64_t kAhead = 1024, kLine = 64;  // bytes
  for (int64_t byte = 0; byte < kAhead; byte += kLine) {
    __builtin_prefetch(static_cast<const char*>(row) + byte);
  }
}

// As pair_dots, with one x for all, which is loaded once for four rows.
template <typename T>
static void row_dots(
    const double* x, const T* rows, int64_t d, const int64_t* index, int64_t count, int64_t known, double* out) {
  for (int64_t p = 0; p < count; p += 4) {
    const T* row[4];
    Sums sums[4];
    for (int i = 0; i < 4; ++i) {
      row[i] = rows + index[p + i < count ? p + i : p] * d;
    }
    for (int64_t next = p + 4; next < known && next < p + 8; ++next) {
      fetch_start(rows + index[next] * d);
    }
    int64_t e = 0;
    for (; e + kLanes <= d; e += kLanes) {
      const Vec8 own = load8(x + e);
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        add(sums[i], own, load8(row[i] + e));
      }
    }
    for (int i = 0; i < 4; ++i) {
      if (e < d) {
        add(sums[i], load_tail(x + e, d - e), load_tail(row[i] + e, d - e));
      }
      if (p + i < count) {
        out[p + i] = reduce(sums[i]);
      }
    }
  }
}

#include "cpu/kernels/decode_body.h"

// Looks at whole cache lines first: sparse acts are nearly all zero. Doubling drops the sign, so that -0 is zero.
template <typename T>
static int64_t nonzeros(const T* row, int64_t n, int32_t* index) {
  constexpr int64_t line = 64 / sizeof(T);
  typedef Word<T> Bits;
  typedef Bits Words __attribute__((vector_size(64)));
  int64_t count = 0, e = 0;
  const auto scan = [&](int64_t end) {
    for (; e < end; ++e) {
      index[count] = static_cast<int32_t>(e);
      count += static_cast<Bits>(load_as<Bits>(row + e) << 1) != 0;
    }
  };
  while (e + 4 * line <= n) {
    const Words any = load_as<Words>(row + e) | load_as<Words>(row + e + line) | load_as<Words>(row + e + 2 * line) |
                      load_as<Words>(row + e + 3 * line);
    const Words without_sign = any << 1;
    const Long8 sizes = load_as<Long8>(&without_sign);
    if ((sizes[0] | sizes[1] | sizes[2] | sizes[3] | sizes[4] | sizes[5] | sizes[6] | sizes[7]) != 0) {
      scan(e + 4 * line);
    } else {
      e += 4 * line;
    }
  }
  scan(n);
  return count;
}

template <typename T>
static constexpr TypedKernels<T> typed() {
  return {widen<T>, round_row<T>, dot<T>, pair_dots<T>, row_dots<T>, nonzeros<T>, weighted_sum<T>, decode_row<T>};
}

static constexpr Kernels table = {dots, {typed<float>(), typed<double>(), typed<Half>(), typed<BFloat16>()}};

#undef DM_INLINE
#undef DM_SHUFFLE
