// The kernels themselves, in compiler vector extensions. kernels.cpp includes this file once an instruction set, in a
// namespace and under a target pragma of its own; hence no include guard, and no call of a function from outside it
// (a shared inline function would be compiled for whichever set comes first).

typedef double Vec8 __attribute__((vector_size(64)));
typedef float Float8 __attribute__((vector_size(32)));
typedef uint32_t Word8 __attribute__((vector_size(32)));
typedef uint16_t Short8 __attribute__((vector_size(16)));

#define DM_INLINE static inline __attribute__((always_inline))

template <typename V, typename T>
DM_INLINE V load_as(const T* from) {
  V value;
  __builtin_memcpy(&value, from, sizeof(V));
  return value;
}

DM_INLINE void store(double* to, Vec8 value) { __builtin_memcpy(to, &value, sizeof(value)); }

// Eight elements of any type as float64; the conversions are exact.
DM_INLINE Vec8 load8(const double* from) { return load_as<Vec8>(from); }
DM_INLINE Vec8 load8(const float* from) { return __builtin_convertvector(load_as<Float8>(from), Vec8); }
DM_INLINE Vec8 load8(const BFloat16* from) {
  const Word8 words = __builtin_convertvector(load_as<Short8>(from), Word8) << 16;
  return __builtin_convertvector(load_as<Float8>(&words), Vec8);
}
DM_INLINE Vec8 load8(const Half* from) {
#if DM_HAS_F16C
  return __builtin_convertvector((Float8)_mm256_cvtph_ps(load_as<__m128i>(from)), Vec8);
#else
  Vec8 value;
  for (int e = 0; e < 8; ++e) {
    value[e] = widen_half(from[e]);
  }
  return value;
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

// A block of A tokens times B latents, A B sums of eight lanes. 8 x 3 keeps 24 sums in the 32 zmm registers and needs
// 11 loads for 24 multiply-adds, so the two multiply-add ports are the limit; eight tokens read each weight row once
// from L2.
template <int A, int B>
DM_INLINE void dot_block(const double* x, const double* w, int64_t d_padded, double* out, int64_t ld_out) {
  Vec8 sums[A][B];
#pragma GCC unroll 8
  for (int a = 0; a < A; ++a) {
#pragma GCC unroll 4
    for (int b = 0; b < B; ++b) {
      sums[a][b] = Vec8{};
    }
  }
  for (int64_t e = 0; e < d_padded; e += kLanes) {
    Vec8 columns[B];
#pragma GCC unroll 4
    for (int b = 0; b < B; ++b) {
      columns[b] = load8(w + b * d_padded + e);
    }
#pragma GCC unroll 8
    for (int a = 0; a < A; ++a) {
      const Vec8 row = load8(x + a * d_padded + e);
#pragma GCC unroll 4
      for (int b = 0; b < B; ++b) {
        sums[a][b] += row * columns[b];
      }
    }
  }
#pragma GCC unroll 8
  for (int a = 0; a < A; ++a) {
#pragma GCC unroll 4
    for (int b = 0; b < B; ++b) {
      out[a * ld_out + b] = reduce(sums[a][b]);
    }
  }
}

template <int A>
DM_INLINE void dot_rows(
    const double* x, const double* w, int64_t latents, int64_t d_padded, double* out, int64_t ld_out) {
  int64_t l = 0;
  for (; l + 2 <= latents; l += 2) {
    dot_block<A, 2>(x, w + l * d_padded, d_padded, out + l, ld_out);
  }
  for (; l < latents; ++l) {
    dot_block<A, 1>(x, w + l * d_padded, d_padded, out + l, ld_out);
  }
}

static void dots(
    const double* x, int64_t tokens, const double* w, int64_t latents, int64_t d_padded, double* out, int64_t ld_out) {
  int64_t t = 0;
  for (; t + 8 <= tokens; t += 8) {
    dot_rows<8>(x + t * d_padded, w, latents, d_padded, out + t * ld_out, ld_out);
  }
  for (; t < tokens; ++t) {
    dot_rows<1>(x + t * d_padded, w, latents, d_padded, out + t * ld_out, ld_out);
  }
}

template <typename T>
static double dot(const double* x, const T* w, int64_t d) {
  Vec8 sum = {};
  int64_t e = 0;
  for (; e + kLanes <= d; e += kLanes) {
    sum += load8(x + e) * load8(w + e);
  }
  if (e < d) {
    sum += load_tail(x + e, d - e) * load_tail(w + e, d - e);
  }
  return reduce(sum);
}

// One column block of weighted_sum, WIDTH vectors of sums in registers over all the rows.
template <int WIDTH, typename T>
DM_INLINE void weighted_columns(
    const T* rows, int64_t ld_rows, const int64_t* index, const double* factors, int64_t count, double* sum) {
  Vec8 sums[WIDTH];
#pragma GCC unroll 8
  for (int v = 0; v < WIDTH; ++v) {
    sums[v] = load8(sum + 8 * v);
  }
  for (int64_t a = 0; a < count; ++a) {
    const T* row = rows + index[a] * ld_rows;
#pragma GCC unroll 8
    for (int v = 0; v < WIDTH; ++v) {
      sums[v] += factors[a] * load8(row + 8 * v);
    }
  }
#pragma GCC unroll 8
  for (int v = 0; v < WIDTH; ++v) {
    store(sum + 8 * v, sums[v]);
  }
}

template <typename T>
static void weighted_sum(
    const T* rows, int64_t d, const int64_t* index, const double* factors, int64_t count, double* sum) {
  int64_t e = 0;
  for (; e + 64 <= d; e += 64) {
    weighted_columns<8>(rows + e, d, index, factors, count, sum + e);
  }
  for (; e + 8 <= d; e += 8) {
    weighted_columns<1>(rows + e, d, index, factors, count, sum + e);
  }
  if (e < d) {
    Vec8 tail = load_tail(sum + e, d - e);
    for (int64_t a = 0; a < count; ++a) {
      tail += factors[a] * load_tail(rows + index[a] * d + e, d - e);
    }
    __builtin_memcpy(sum + e, &tail, (d - e) * sizeof(double));
  }
}

template <typename T>
static constexpr TypedKernels<T> typed() {
  return {widen<T>, dot<T>, weighted_sum<T>};
}

static const Kernels table = {dots, typed<float>(), typed<double>(), typed<Half>(), typed<BFloat16>()};

#undef DM_INLINE
