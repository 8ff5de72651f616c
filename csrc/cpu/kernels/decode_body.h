// The kernels of the decode: sums of rows with factors. kernels_body.h includes this file, under the same rules.

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

constexpr int kRows = 4;  // rows added in one pass over the sums: a quarter of their loads and stores

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
      fetch_start(rows + index[next] * ld_rows);
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
