// The kernels themselves, in compiler vector extensions. kernels.cpp includes this file once an instruction set, in a
// namespace and under a target pragma of its own; hence no include guard, and no call of a function from outside it
// (a shared inline function would be compiled for whichever set comes first).

typedef double Vec8 __attribute__((vector_size(64)));
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

DM_INLINE void store(double* to, Vec8 value) { __builtin_memcpy(to, &value, sizeof(value)); }

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

DM_INLINE double reduce(Vec8 sum) {
  return ((sum[0] + sum[4]) + (sum[2] + sum[6])) + ((sum[1] + sum[5]) + (sum[3] + sum[7]));
}

// The same tree for eight sums at once: each step adds the halves of two vectors into one.
DM_INLINE Vec8 reduce_eight(const Vec8 (&sums)[8]) {
  Vec8 fours[4], twos[2];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const Vec8 a = sums[2 * i], b = sums[2 * i + 1];
    fours[i] = DM_SHUFFLE(a, b, 0, 1, 2, 3, 8, 9, 10, 11) + DM_SHUFFLE(a, b, 4, 5, 6, 7, 12, 13, 14, 15);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    const Vec8 a = fours[2 * i], b = fours[2 * i + 1];
    twos[i] = DM_SHUFFLE(a, b, 0, 1, 4, 5, 8, 9, 12, 13) + DM_SHUFFLE(a, b, 2, 3, 6, 7, 10, 11, 14, 15);
  }
  return DM_SHUFFLE(twos[0], twos[1], 0, 2, 4, 6, 8, 10, 12, 14) +
         DM_SHUFFLE(twos[0], twos[1], 1, 3, 5, 7, 9, 11, 13, 15);
}

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

// A block of A tokens times eight latents, 8 A sums of eight lanes. 2 x 8 keeps 16 sums in registers and needs 10 loads
// for 16 multiply-adds, so the two multiply-add ports are the limit; the eight weight rows stay in L1 while tokens
// stream.
template <int A>
DM_INLINE void dot_block(const double* x, const double* w, int64_t d_padded, double* out, int64_t ld_out) {
  Vec8 sums[A][8];
#pragma GCC unroll 2
  for (int a = 0; a < A; ++a) {
#pragma GCC unroll 8
    for (int b = 0; b < 8; ++b) {
      sums[a][b] = Vec8{};
    }
  }
  for (int64_t e = 0; e < d_padded; e += kLanes) {
    Vec8 rows[A];
#pragma GCC unroll 2
    for (int a = 0; a < A; ++a) {
      rows[a] = load8(x + a * d_padded + e);
    }
#pragma GCC unroll 8
    for (int b = 0; b < 8; ++b) {
      const Vec8 column = load8(w + b * d_padded + e);
#pragma GCC unroll 2
      for (int a = 0; a < A; ++a) {
        sums[a][b] += rows[a] * column;
      }
    }
  }
#pragma GCC unroll 2
  for (int a = 0; a < A; ++a) {
    store(out + a * ld_out, reduce_eight(sums[a]));
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

// With AVX2 a sum of eight lanes goes through memory at every addition (measured: eight times as long as in two
// halves).
#if DM_ISA == 1
typedef double Vec4 __attribute__((vector_size(32)));
DM_INLINE Vec4 load4(const double* from) { return load_as<Vec4>(from); }
DM_INLINE Vec4 load4(const float* from) { return (Vec4)_mm256_cvtps_pd(_mm_loadu_ps(from)); }
DM_INLINE Vec4 load4(const BFloat16* from) {
  const __m128i words = _mm_cvtepu16_epi32(_mm_loadl_epi64((const __m128i*)from));
  return (Vec4)_mm256_cvtps_pd(_mm_castsi128_ps(_mm_slli_epi32(words, 16)));
}
DM_INLINE Vec4 load4(const Half* from) {
  return (Vec4)_mm256_cvtps_pd(_mm_cvtph_ps(_mm_loadl_epi64((const __m128i*)from)));
}
#endif

template <typename T>
static double dot(const double* x, const T* w, int64_t d) {
  Vec8 sum = {};
  int64_t e = 0;
#if DM_ISA == 1
  Vec4 low = {}, high = {};
  for (; e + kLanes <= d; e += kLanes) {
    low += load4(x + e) * load4(w + e);
    high += load4(x + e + 4) * load4(w + e + 4);
  }
  sum = Vec8{low[0], low[1], low[2], low[3], high[0], high[1], high[2], high[3]};
#endif
  for (; e + kLanes <= d; e += kLanes) {
    sum += load8(x + e) * load8(w + e);
  }
  if (e < d) {
    sum += load_tail(x + e, d - e) * load_tail(w + e, d - e);
  }
  return reduce(sum);
}

// Four pairs at a time: four independent chains of additions hide their latency.
template <typename T>
static void pair_dots(const T* const* left, const T* const* right, int64_t d, int64_t n, double* out) {
  for (int64_t p = 0; p < n; p += 4) {
    const T *a[4], *b[4];
    Vec8 sums[4] = {};
    for (int i = 0; i < 4; ++i) {
      const int64_t one = p + i < n ? p + i : p;
      a[i] = left[one];
      b[i] = right[one];
    }
    int64_t e = 0;
    for (; e + kLanes <= d; e += kLanes) {
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        sums[i] += load8(a[i] + e) * load8(b[i] + e);
      }
    }
    for (int i = 0; i < 4; ++i) {
      if (e < d) {
        sums[i] += load_tail(a[i] + e, d - e) * load_tail(b[i] + e, d - e);
      }
      if (p + i < n) {
        out[p + i] = reduce(sums[i]);
      }
    }
  }
}

// sum[e] += factors[r] * rows[r][e] for ROWS rows, in this order for each e.
template <int ROWS, typename T>
DM_INLINE void add_rows(const T* const* rows, const double* factors, int64_t d, double* sum) {
  const T* row[ROWS];  // in registers: what is stored through `sum` could alias the arguments
  double factor[ROWS];
#pragma GCC unroll 4
  for (int r = 0; r < ROWS; ++r) {
    row[r] = rows[r];
    factor[r] = factors[r];
  }
  int64_t e = 0;
  for (; e + kLanes <= d; e += kLanes) {
    Vec8 total = load8(sum + e);
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r) {
      total += factor[r] * load8(row[r] + e);
    }
    store(sum + e, total);
  }
  if (e < d) {
    Vec8 total = load_tail(sum + e, d - e);
    for (int r = 0; r < ROWS; ++r) {
      total += factor[r] * load_tail(row[r] + e, d - e);
    }
    __builtin_memcpy(sum + e, &total, (d - e) * sizeof(double));
  }
}

constexpr int kRows = 4;          // rows added in one pass over the sums: a quarter of their loads and stores
constexpr int64_t kAhead = 1024;  // bytes of a row fetched ahead: the hardware prefetcher follows from there

template <typename T>
static void weighted_sum(
    const T* rows, int64_t ld_rows, int64_t d, const int64_t* index, const double* factors, int64_t count,
    int64_t known, double* sum) {
  const T* now[kRows];
  int64_t a = 0;
  for (; a + kRows <= count; a += kRows) {
    for (int r = 0; r < kRows; ++r) {
      now[r] = rows + index[a + r] * ld_rows;
    }
    for (int64_t next = a + kRows; next < known && next < a + 2 * kRows; ++next) {
      const char* start = reinterpret_cast<const char*>(rows + index[next] * ld_rows);
      for (int64_t byte = 0; byte < kAhead; byte += 64) {
        __builtin_prefetch(start + byte);
      }
    }
    add_rows<kRows>(now, factors + a, d, sum);
  }
  for (; a < count; ++a) {
    now[0] = rows + index[a] * ld_rows;
    add_rows<1>(now, factors + a, d, sum);
  }
}

// Looks at whole cache lines first: sparse acts are nearly all zero. Doubling drops the sign, so that -0 is zero.
template <typename T>
static int64_t nonzeros(const T* row, int64_t n, int32_t* index) {
  constexpr int64_t line = 64 / sizeof(T);
  typedef decltype(bits_of(T{})) Word;
  typedef Word Words __attribute__((vector_size(64)));
  int64_t count = 0, e = 0;
  const auto scan = [&](int64_t end) {
    for (; e < end; ++e) {
      index[count] = static_cast<int32_t>(e);
      count += static_cast<Word>(bits_of(row[e]) << 1) != 0;
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
  return {widen<T>, round_row<T>, dot<T>, pair_dots<T>, nonzeros<T>, weighted_sum<T>};
}

static const Kernels table = {dots, typed<float>(), typed<double>(), typed<Half>(), typed<BFloat16>()};

#undef DM_INLINE
#undef DM_SHUFFLE
