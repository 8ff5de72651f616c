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

// ---- x_hat of bfloat16: sums in float32 where a bound proves that they round as the float64 sums do

// A register of float32, or of bfloat16 pairs: even columns in the lower halves of the words, odd ones in the upper.
#if DM_ISA >= 2
constexpr int kFloats = 16;
#else
constexpr int kFloats = 8;
#endif
typedef float Floats __attribute__((vector_size(4 * kFloats)));
typedef int32_t Ints __attribute__((vector_size(4 * kFloats)));

constexpr int kPairs = 4;                         // registers of pairs a block: with their sums they fill the registers
constexpr int64_t kBlock = 2 * kFloats * kPairs;  // columns a block
constexpr int64_t kChain = 16;                    // rows summed before they are added to the rest: the sums stay small
constexpr int64_t kFewRows = 4, kManyRows = 1 << 16;  // rows for which this is worth it, and the bound holds
constexpr int32_t kUpper = ~0xffff;

DM_INLINE Floats evens(Ints pairs) { return (Floats)(pairs << 16); }
DM_INLINE Floats odds(Ints pairs) { return (Floats)(pairs & kUpper); }
DM_INLINE Floats magnitude(Floats value) { return (Floats)((Ints)value & 0x7fffffff); }

// By their bits, which are ordered as the numbers are, infinity and NaN above all.
DM_INLINE Floats larger(Floats a, Floats b) { return (Floats)((Ints)a > (Ints)b ? (Ints)a : (Ints)b); }

DM_INLINE Floats largest(const Floats (&sums)[kPairs][2]) {
  Floats of_pair[kPairs];
#pragma GCC unroll 4
  for (int p = 0; p < kPairs; ++p) {
    of_pair[p] = larger(magnitude(sums[p][0]), magnitude(sums[p][1]));
  }
  return larger(larger(of_pair[0], of_pair[1]), larger(of_pair[2], of_pair[3]));
}

// bfloat16 nearest to finite values, ties to even, in the upper halves.
DM_INLINE Ints to_bfloat16(Floats value) {
  const Ints bits = (Ints)value;
  return (bits + 0x7fff + (bits >> 16 & 1)) & kUpper;
}

// Eight columns of x_hat, summed in float64.
static void decode_eight(
    const BFloat16* rows, int64_t ld_rows, const int64_t* index, const double* factors, int64_t count,
    const BFloat16* bias, BFloat16* out) {
  double sums[8];
  Vec4 low = lower(load8(bias)), high = upper(load8(bias));
  for (int64_t a = 0; a < count; ++a) {
    const Vec8 row = load8(rows + index[a] * ld_rows);
    low += factors[a] * lower(row);
    high += factors[a] * upper(row);
  }
  __builtin_memcpy(sums, &low, sizeof(low));
  __builtin_memcpy(sums + 4, &high, sizeof(high));
  store_rounded(out, load8(sums));
}

// kBlock columns of x_hat, rounded from float32 sums. Lanes of `certain` tell which pairs of columns of each register
// are those of the float64 sums. `ahead` [n_ahead] are the rows wanted soon.
//
// Products of two bfloat16 numbers are exact in float32, so the only errors are half a unit in the last place of each
// partial sum, at most 2^-24 of its magnitude, for which the largest of the columns in its lane stands.
DM_INLINE void decode_block(
    const BFloat16* rows, int64_t ld_rows, const int64_t* index, const float* factors, int64_t count,
    const BFloat16* bias, BFloat16* out, const BFloat16* ahead_rows, const int64_t* ahead, int64_t n_ahead,
    Ints (&certain)[kPairs]) {
  Floats total[kPairs][2], passed = {};
#pragma GCC unroll 4
  for (int p = 0; p < kPairs; ++p) {
    const Ints pairs = load_as<Ints>(bias + 2 * kFloats * p);
    total[p][0] = evens(pairs);
    total[p][1] = odds(pairs);
  }
  for (int64_t begin = 0; begin < count; begin += kChain) {
    const int64_t end = begin + kChain < count ? begin + kChain : count;
    Floats sums[kPairs][2] = {};
    for (int64_t a = begin; a < end; ++a) {
      const BFloat16* row = rows + index[a] * ld_rows;
      const char* line = reinterpret_cast<const char*>(ahead_rows + ahead[a < n_ahead ? a : 0] * ld_rows);
#pragma GCC unroll 4
      for (int64_t byte = 0; byte < kBlock * 2; byte += 64) {
        __builtin_prefetch(line + byte);
      }
#pragma GCC unroll 4
      for (int p = 0; p < kPairs; ++p) {
        const Ints pairs = load_as<Ints>(row + 2 * kFloats * p);
        sums[p][0] += factors[a] * evens(pairs);
        sums[p][1] += factors[a] * odds(pairs);
      }
      passed += largest(sums);
    }
#pragma GCC unroll 4
    for (int p = 0; p < kPairs; ++p) {
      total[p][0] += sums[p][0];
      total[p][1] += sums[p][1];
    }
    passed += largest(total);
  }
  passed += largest(total);  // for the rounding of total -+ error
  // A little more than 2^-24: `passed` itself is rounded, and so is the float64 sum. Then what underflow can cost.
  const Floats error = passed * 0x1.02p-24f + static_cast<float>(count) * 0x1p-125f;
#pragma GCC unroll 4
  for (int p = 0; p < kPairs; ++p) {
    const Floats low[2] = {total[p][0] - error, total[p][1] - error};
    const Floats high[2] = {total[p][0] + error, total[p][1] + error};
    const Ints even = to_bfloat16(low[0]), odd = to_bfloat16(low[1]);
    const Ints finite = (high[0] - low[0] < __builtin_inff()) & (high[1] - low[1] < __builtin_inff());  // nor NaN
    certain[p] = (even == to_bfloat16(high[0])) & (odd == to_bfloat16(high[1])) & finite;
    const Ints pairs = (Ints)((even >> 16 & 0xffff) | odd);
    __builtin_memcpy(out + 2 * kFloats * p, &pairs, sizeof(pairs));
  }
}

// All blocks of columns that fit; returns how many columns those are, and in `again` how many were summed twice.
static int64_t decode_narrow(
    const BFloat16* rows, int64_t ld_rows, int64_t d, const int64_t* index, const double* factors,
    const float* narrow_factors, int64_t count, int64_t known, const BFloat16* bias, BFloat16* out, int64_t* again) {
  int64_t e = 0;
  for (; e + kBlock <= d; e += kBlock) {
    const int64_t next = e + 2 * kBlock;  // the block wanted soon, of these rows or of the next token's
    const bool same = next < d || known == count;
    Ints certain[kPairs];
    decode_block(
        rows + e, ld_rows, index, narrow_factors, count, bias + e, out + e, rows + (next < d ? next : e & kBlock),
        same ? index : index + count, same ? count : known - count, certain);
    int32_t lanes[kPairs * kFloats];
    __builtin_memcpy(lanes, certain, sizeof(lanes));
    for (int64_t part = 0; part < kBlock; part += 8) {
      const int32_t* four = lanes + part / 2;
      if ((four[0] & four[1] & four[2] & four[3]) == 0) {
        decode_eight(rows + e + part, ld_rows, index, factors, count, bias + e + part, out + e + part);
        *again += 8;
      }
    }
  }
  return e;
}

template <typename T>
static int64_t decode_row(
    const T* rows, int64_t ld_rows, int64_t d, const int64_t* index, const double* factors, const float* narrow_factors,
    int64_t count, int64_t known, const T* bias, double* sum, T* out) {
  int64_t e = 0, again = 0;
  if constexpr (__is_same(T, BFloat16)) {
    if (narrow_factors != nullptr && count >= kFewRows && count <= kManyRows) {
      e = decode_narrow(rows, ld_rows, d, index, factors, narrow_factors, count, known, bias, out, &again);
    }
  }
  if (e < d) {
    widen(bias + e, sum, d - e);
    weighted_sum(rows + e, ld_rows, d - e, index, factors, count, known, sum);
    round_row(sum, out + e, d - e);
  }
  return again;
}

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
  return {widen<T>, round_row<T>, dot<T>, pair_dots<T>, nonzeros<T>, weighted_sum<T>, decode_row<T>};
}

static constexpr Kernels table = {dots, {typed<float>(), typed<double>(), typed<Half>(), typed<BFloat16>()}};

#undef DM_INLINE
#undef DM_SHUFFLE
