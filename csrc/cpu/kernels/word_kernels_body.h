// The screening kernels on 16-bit codes. word_kernels.cpp includes this file once an instruction set, in a namespace
// and under a target pragma of its own; hence no include guard, and no call of an inline function from outside it (a
// shared one would be compiled for whichever set comes first).
//
// A row is scaled by its *norm*, not by its largest element: codes are q = round(v / s) with ||v|| / s = kCodeNorm.
// Then no partial sum of products can leave int32, by Cauchy-Schwarz, however the row is shaped:
//   |sum over some e of q_x q_w| <= ||q_x|| ||q_w|| <= (45000 + sqrt(32768) / 2)^2 < 2^31,
// and an outlying dimension costs no precision, so no rotation is needed. What rounding removes is about
// sqrt(d / 12) / 45000 of the norm: 1.8e-4 at d 768, a fiftieth of what 8 bits lose.

#define DM_INLINE static inline __attribute__((always_inline))

constexpr double kCodeNorm = 45000.0, kLargestCode = 32767.0;

typedef double Wide4 __attribute__((vector_size(32)));
typedef int32_t Int4 __attribute__((vector_size(16)));
typedef int16_t Short4 __attribute__((vector_size(8)));
typedef int32_t Int8 __attribute__((vector_size(32)));

#if DM_WORDS == 3
constexpr int64_t kLanes32 = 16;  // 32-bit lanes of a vector
typedef __m512i Ints;
typedef __m512 Floats;
#define DM_OF(name) _mm512_##name
DM_INLINE Ints load_ints(const void* from) { return _mm512_loadu_si512(from); }
DM_INLINE void store_ints(void* to, Ints value) { _mm512_storeu_si512(to, value); }
DM_INLINE Ints zero_ints() { return _mm512_setzero_si512(); }
DM_INLINE uint32_t not_below(Floats a, Floats b) { return _mm512_cmp_ps_mask(a, b, _CMP_NLT_UQ); }
#else
constexpr int64_t kLanes32 = 8;
typedef __m256i Ints;
typedef __m256 Floats;
#define DM_OF(name) _mm256_##name
DM_INLINE Ints load_ints(const void* from) { return _mm256_loadu_si256(static_cast<const __m256i*>(from)); }
DM_INLINE void store_ints(void* to, Ints value) { _mm256_storeu_si256(static_cast<__m256i*>(to), value); }
DM_INLINE Ints zero_ints() { return _mm256_setzero_si256(); }
DM_INLINE uint32_t not_below(Floats a, Floats b) {
  return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_NLT_UQ)));
}
#endif

// sum + a0 b0 + a1 b1 in each 32-bit lane
DM_INLINE Ints add_products(Ints sum, Ints a, Ints b) {
#if DM_WORDS == 2
  return _mm256_dpwssd_avx_epi32(sum, a, b);
#else
  return DM_OF(add_epi32)(sum, DM_OF(madd_epi16)(a, b));
#endif
}

// The sums of a tile, its weights, a token and a product fill the registers: 12 + 2 + 1 + 1 of 16, 24 + 3 + 1 + 1
// of 32.
#if DM_WORDS == 3
constexpr int kTileTokens = 8, kTileVectors = 3;
#else
constexpr int kTileTokens = 6, kTileVectors = 2;
#endif
constexpr int64_t kGroup = kTileVectors * kLanes32, kTokensAtOnce = kTileTokens == 8 ? 8 : 12;

DM_INLINE double total(Wide4 sums) { return (sums[0] + sums[2]) + (sums[1] + sums[3]); }

DM_INLINE Wide4 load_wide(const double* row, int64_t n) {  // the first n of four, the rest zero
  Wide4 value = {};
  if (n >= 4) {
    __builtin_memcpy(&value, row, sizeof(value));
  } else if (n > 0) {
    __builtin_memcpy(&value, row, n * sizeof(double));
  }
  return value;
}

// Rounds a row to d_padded codes. Float64 sums of squares and the products v / s are off by units of 2^-52 of the
// norms, which kOutward covers.
static RoundedRow round_row(const double* row, int64_t d, int64_t d_padded, int16_t* codes) {
  Wide4 squares = {}, largest = {};
  for (int64_t e = 0; e < d; e += 4) {
    const Wide4 v = load_wide(row + e, d - e), size = v < 0.0 ? -v : v;
    squares += v * v;
    largest = size > largest ? size : largest;
  }
  double most = 0.0;
  for (int i = 0; i < 4; ++i) {
    most = largest[i] > most ? largest[i] : most;
  }
  RoundedRow result{};
  result.norm = __builtin_sqrt(total(squares));
  const double by_norm = result.norm / kCodeNorm, by_size = most / kLargestCode;
  result.scale = static_cast<float>(by_norm > by_size ? by_norm : by_size);
  if (!(result.norm < 1e30) ||
      !(result.scale > 1e-36f)) {  // no usable scale: codes of zero, all of the row is rounding
    __builtin_memset(codes, 0, d_padded * sizeof(int16_t));
    result.scale = 0.0f;
    result.rounding = result.norm < 1e30 ? result.norm + 1e-33 : __builtin_inf();
    return result;
  }
  // Adding and taking away 1.5 * 2^52 rounds to the nearest integer.
  const double inverse = 1.0 / static_cast<double>(result.scale), scale = result.scale, shift = 0x1.8p52;
  Wide4 code_squares = {}, lost_squares = {};
  for (int64_t e = 0; e < d_padded; e += 4) {
    const Wide4 v = load_wide(row + e, d - e);
    Wide4 code = (v * inverse + shift) - shift;
    code = code > kLargestCode ? Wide4{} + kLargestCode : code;
    code = code < -kLargestCode ? Wide4{} - kLargestCode : code;
    const Short4 narrow = __builtin_convertvector(__builtin_convertvector(code, Int4), Short4);
    __builtin_memcpy(codes + e, &narrow, sizeof(narrow));
    const Wide4 back = code * scale, lost = v - back;
    code_squares += back * back;
    lost_squares += lost * lost;
  }
  result.code_norm = __builtin_sqrt(total(code_squares));
  result.rounding = __builtin_sqrt(total(lost_squares));
  return result;
}

static ScreenedToken encode_token(
    const double* row, int64_t d, int64_t d_padded, double error, float* /*scratch*/, void* codes) {
  const RoundedRow rounded = round_row(row, d, d_padded, static_cast<int16_t*>(codes));
  ScreenedToken token{};
  token.scale = rounded.scale;
  token.alpha = static_cast<float>((rounded.rounding + error) * kOutward);
  token.beta = static_cast<float>(rounded.code_norm * kOutward);
  token.screened = rounded.scale > 0 && rounded.norm > 1e-25 && rounded.norm < 1e30;
  return token;
}

static void encode_latent(
    const double* row, const LatentTerms& terms, int64_t d, int64_t d_padded, float* /*scratch*/, int8_t* first,
    int64_t stride, int32_t* sum, float* bounds, int64_t ld_bounds) {
  alignas(64) int16_t codes[kMaxScreenD];
  const RoundedRow rounded = round_row(row, d, d_padded, codes);
  for (int64_t pair = 0; pair < d_padded / 2; ++pair) {
    __builtin_memcpy(first + pair * stride, codes + 2 * pair, 4);
  }
  *sum = 0;
  store_bounds(rounded, rounded.norm + kTinyNorm, rounded.rounding + kTinyNorm, terms, bounds, ld_bounds);
}

// A tokens by one group of latents: each step multiplies two dimensions.
template <int A>
DM_INLINE void tile(const int16_t* x, const int8_t* group, int64_t d_padded, int32_t* out) {
  Ints sums[A][kTileVectors];
#pragma GCC unroll 8
  for (int a = 0; a < A; ++a) {
#pragma GCC unroll 3
    for (int b = 0; b < kTileVectors; ++b) {
      sums[a][b] = zero_ints();
    }
  }
  const int16_t* const end = x + d_padded;
  for (; x < end; x += 2, group += 4 * kGroup) {
    Ints w[kTileVectors];
#pragma GCC unroll 3
    for (int b = 0; b < kTileVectors; ++b) {
      w[b] = load_ints(group + 4 * kLanes32 * b);
    }
#pragma GCC unroll 8
    for (int a = 0; a < A; ++a) {
      int32_t two;
      __builtin_memcpy(&two, x + a * d_padded, 4);
      const Ints codes = DM_OF(set1_epi32)(two);
#pragma GCC unroll 3
      for (int b = 0; b < kTileVectors; ++b) {
        sums[a][b] = add_products(sums[a][b], codes, w[b]);
      }
    }
  }
#pragma GCC unroll 8
  for (int a = 0; a < A; ++a) {
#pragma GCC unroll 3
    for (int b = 0; b < kTileVectors; ++b) {
      store_ints(out + a * kPanel + b * kLanes32, sums[a][b]);
    }
  }
}

static void products(const void* x, int64_t tokens, const int8_t* panel, int64_t d_padded, int32_t* out) {
  const auto* rows = static_cast<const int16_t*>(x);
  for (int64_t l = 0; l < kPanel; l += kGroup) {
    const int8_t* group = panel + l * d_padded * 2;
    int64_t t = 0;
    for (; t + kTileTokens <= tokens; t += kTileTokens) {
      tile<kTileTokens>(rows + t * d_padded, group, d_padded, out + t * kPanel + l);
    }
    for (; t + 2 <= tokens; t += 2) {
      tile<2>(rows + t * d_padded, group, d_padded, out + t * kPanel + l);
    }
    if (t < tokens) {
      tile<1>(rows + t * d_padded, group, d_padded, out + t * kPanel + l);
    }
  }
}

struct Interval {
  Floats score, bound;
};

// One vector of places of one token: their scores and the bounds of the scores' errors.
DM_INLINE Interval
interval_of(const int32_t* products, const ScreenedToken& token, const float* bounds, int64_t padded) {
  const auto row = [&](int which) __attribute__((always_inline)) { return DM_OF(loadu_ps)(bounds + which * padded); };
  const Floats scaled = DM_OF(mul_ps)(DM_OF(cvtepi32_ps)(load_ints(products)), DM_OF(set1_ps)(token.scale));
  const Floats score = DM_OF(fmadd_ps)(scaled, row(kScale), row(kBias));
  const Floats bound = DM_OF(fmadd_ps)(
      DM_OF(set1_ps)(token.alpha), row(kNorm),
      DM_OF(fmadd_ps)(DM_OF(set1_ps)(token.beta), row(kRounding), row(kSlack)));
  return {score, bound};
}

static void intervals(
    const int32_t* products, const ScreenedToken& token, const ScreenedWeights& weights, int64_t panel, float* score,
    float* bound) {
  const int64_t padded = weights.panels * kPanel;
  for (int64_t l = 0; l < kPanel; l += kLanes32) {
    const Interval found = interval_of(products + l, token, weights.bounds + panel * kPanel + l, padded);
    DM_OF(storeu_ps)(score + l, found.score);
    DM_OF(storeu_ps)(bound + l, found.bound);
  }
}

static int64_t hits(
    const int32_t* products, const ScreenedToken& token, const ScreenedWeights& weights, int64_t panel,
    const float* limits, int64_t step, float* score, float* upper, int32_t* place) {
  const int64_t padded = weights.panels * kPanel, first = panel * kPanel, beyond = weights.n_places - first;
  int64_t count = 0;
#pragma GCC unroll 2
  for (int64_t l = 0; l < kPanel; l += kLanes32) {
    const Interval found = interval_of(products + l, token, weights.bounds + first + l, padded);
    // upper_end; max gives its second operand when one is NaN
    const Floats sum = DM_OF(add_ps)(DM_OF(max_ps)(DM_OF(set1_ps)(-kLargestScore), found.score), found.bound);
    const Floats limit = step ? DM_OF(loadu_ps)(limits + first + l) : DM_OF(set1_ps)(*limits);
    uint32_t in = not_below(sum, limit);
    if (beyond - l < kLanes32) {  // the last panel is padded
      in &= beyond <= l ? 0u : (1u << (beyond - l)) - 1;
    }
    if (in) {  // few: one at a time
      float scores[kLanes32], sums[kLanes32];
      DM_OF(storeu_ps)(scores, found.score);
      DM_OF(storeu_ps)(sums, sum);
      do {
        const int lane = __builtin_ctz(in);
        score[count] = scores[lane];
        upper[count] = sums[lane] == sums[lane] ? sums[lane] : __builtin_inff();
        place[count++] = static_cast<int32_t>(first + l + lane);
        in &= in - 1;
      } while (in);
    }
  }
  return count;
}

// float32 bits as integers of the same order; NaN smallest.
DM_INLINE Int8 ordered(const float* values) {
  typedef float Float8 __attribute__((vector_size(32)));
  Float8 value;
  __builtin_memcpy(&value, values, sizeof(value));
  const Int8 bits = (Int8)value, order = bits ^ (bits >> 31 & 0x7fffffff);
  return (Int8)(value == value) ? order : Int8{} + INT32_MIN;
}

// Bisection of the values' order: each round counts how many are at least the middle, until exactly nth are.
static float nth_largest(const float* values, int64_t n, int64_t nth, float* scratch) {
  auto* order = reinterpret_cast<int32_t*>(scratch);
  int64_t whole = 0;
  for (; whole + 8 <= n; whole += 8) {
    const Int8 eight = ordered(values + whole);
    __builtin_memcpy(order + whole, &eight, sizeof(eight));
  }
  float rest[8];
  for (int i = 0; i < 8; ++i) {
    rest[i] = whole + i < n ? values[whole + i] : __builtin_nanf("");
  }
  const Int8 last = ordered(rest);
  __builtin_memcpy(order + whole, &last, sizeof(last));
  const int64_t vectors = whole / 8 + 1;
  const auto count_from = [&](int32_t middle) {
    Int8 counts = {};
    for (int64_t v = 0; v < vectors; ++v) {
      Int8 eight;
      __builtin_memcpy(&eight, order + 8 * v, sizeof(eight));
      counts -= (Int8)(eight >= Int8{} + middle);
    }
    int64_t count = 0;
    for (int i = 0; i < 8; ++i) {
      count += counts[i];
    }
    return count;
  };
  int64_t low = INT32_MIN, high = static_cast<int64_t>(INT32_MAX) + 1;  // count(low) >= nth > count(high)
  while (high - low > 1) {
    const int64_t middle = low + (high - low) / 2, count = count_from(static_cast<int32_t>(middle));
    if (count == nth) {  // the nth largest is the least of these
      Int8 least = Int8{} + INT32_MAX;
      for (int64_t v = 0; v < vectors; ++v) {
        Int8 eight;
        __builtin_memcpy(&eight, order + 8 * v, sizeof(eight));
        const Int8 in = eight >= Int8{} + static_cast<int32_t>(middle) ? eight : Int8{} + INT32_MAX;
        least = in < least ? in : least;
      }
      low = INT32_MAX;
      for (int i = 0; i < 8; ++i) {
        low = least[i] < low ? least[i] : low;
      }
      break;
    }
    (count > nth ? low : high) = middle;
  }
  const auto bits = static_cast<int32_t>(low);
  const int32_t back = bits ^ (bits >> 31 & 0x7fffffff);
  return low == INT32_MIN ? -__builtin_inff() : __builtin_bit_cast(float, back);
}

static const ScreenKernels table = {kTokensAtOnce, 2,        2,         16,   kGroup,      false,   encode_token,
                                    encode_latent, products, intervals, hits, nth_largest, nullptr, nullptr,
                                    nullptr};

#undef DM_OF
#undef DM_INLINE
