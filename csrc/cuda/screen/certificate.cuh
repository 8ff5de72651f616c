// Certified screening on the GPU: tokens and latents in float16 with a power-of-two scale a row, and what bounds the
// error of their tensor-core products.
//
//   |h_ij - s~_ij| <= ||dx_i|| ||w_j|| + ||x~_i|| ||dw_j|| + gamma ||x~_i|| ||w~_j|| + rounding of the float32 steps
//
// dx = x - x~ and dw = w - w~ are *measured*; everything is rounded outward. fp16 and not bf16: at the same rate it
// rounds eight times less, and the scale gives it the range. The float32 scores come from any matrix product that adds
// in float32 or better, truncating or not: see kGamma.
#pragma once

#include "cuda/kernels/block.cuh"

namespace darkmatter::cuda {

constexpr int64_t kScreenAlign = 64;      // d is padded to whole 128-byte lines of float16
constexpr int kTargetExponent = 13;       // of a row's largest element after scaling: far from float16's 2^16 and 2^-14
constexpr int kMaxExponent = 60;          // of a scale: products of two scales stay within float32
constexpr double kOutward = 1 + 0x1p-19;  // covers the float32 roundings of scores, bounds and their sum

DM_HOST_DEVICE inline int64_t screen_padded(int64_t d) { return ceil_div(d, kScreenAlign) * kScreenAlign; }

// Tensor cores align the terms they add to the largest of them and cut off what lies below its last bit: at most 2^-23
// of the largest for each product, and again for the running sum each time it is a term (every 4 products at the worst;
// 8 or 16 on the chips at hand). No term and no running sum exceeds ||x~|| ||w~|| (Cauchy-Schwarz on the prefix), up to
// the error itself, for which 64 more are allowed, as for adding up the parts of a split product.
DM_HOST_DEVICE inline double accumulation_error(int64_t d) { return (1.25 * static_cast<double>(d) + 64.0) * 0x1p-23; }

// How a row is rounded: row * 2^power in float16, or not at all.
struct RowScale {
  int power;
  bool usable;  // false: not finite, or too large to be scaled
};
DM_HOST_DEVICE inline RowScale row_scale(double largest, double squares) {
  if (!(squares < INFINITY) || !(largest < 0x1p70)) {
    return {0, false};
  }
  if (largest == 0.0) {
    return {0, true};
  }
  int power = kTargetExponent - ilogb(largest);
  power = power > kMaxExponent ? kMaxExponent : power < -kMaxExponent ? -kMaxExponent : power;
  return {power, true};
}

// The bounds of a token: e_ij = alpha_i norm_j + beta_i rounding_j + slack_j + extra_i. `extra` widens the intervals of
// one that asks for all pre-activations up to so much below the best.
struct TokenBounds {
  float alpha, beta, extra;

  DM_HOST_DEVICE float error(float norm, float rounding, float slack) const {
    return fmaf(alpha, norm, fmaf(beta, rounding, slack)) + extra;
  }
};
// norm, removed: ||x - c|| and ||dx||; raw: ||x|| + ||c||, which the float64 sums of the exact answer err in proportion
// to.
DM_HOST_DEVICE inline TokenBounds token_bounds(double norm, double removed, double raw, int64_t d, double extra) {
  const double rounded_norm = norm + removed;
  const double exact_error = 4.0 * static_cast<double>(d + 2) * 0x1p-53 * raw;
  return {
      rounded_up((removed + (accumulation_error(d) + 0x1p-20) * rounded_norm + exact_error) * kOutward),
      rounded_up(rounded_norm * (1.0 + accumulation_error(d)) * kOutward), rounded_up(extra * kOutward)};
}

__device__ inline double warp_sum(double value) {
  for (int step = 16; step > 0; step /= 2) {
    value += __shfl_xor_sync(kAllLanes, value, step);
  }
  return value;
}
__device__ inline double warp_max(double value) {
  for (int step = 16; step > 0; step /= 2) {
    const double other = __shfl_xor_sync(kAllLanes, value, step);
    value = other > value ? other : value;
  }
  return value;
}

// One row by one warp. Writes its codes, zeros beyond d; returns its scale and norms. The norm is NaN exactly where the
// row less its centre has a NaN.
struct RoundedRow {
  RowScale scale;
  double norm, removed, raw;
};
// Calls body(e, x) for every 32nd element of a row from this lane's on, in order. Loads run ahead of the body, which
// writes where, for all the compiler knows, the row may lie.
constexpr int kRowAhead = 8;
template <typename T, typename Body>
__device__ void for_own_elements(const T* row, int64_t d, const Body& body) {
  int64_t e = threadIdx.x % 32;
  for (; e + 32 * (kRowAhead - 1) < d; e += 32 * kRowAhead) {
    T ahead[kRowAhead];
#pragma unroll
    for (int i = 0; i < kRowAhead; ++i) {
      ahead[i] = row[e + 32 * i];
    }
#pragma unroll
    for (int i = 0; i < kRowAhead; ++i) {
      body(e + 32 * i, widen(ahead[i]));
    }
  }
  for (; e < d; e += 32) {
    body(e, widen(row[e]));
  }
}

template <typename T>
__device__ RoundedRow round_row(const T* row, const T* centre, int64_t d, int64_t d_padded, __half* codes) {
  double squares = 0.0, largest = 0.0, row_squares = 0.0, centre_squares = 0.0;
  const auto centre_at = [&](int64_t e) { return centre != nullptr ? widen(centre[e]) : 0.0; };
  for_own_elements(row, d, [&](int64_t e, double x) {
    const double c = centre_at(e), value = x - c;
    squares += value * value;
    row_squares += x * x;
    centre_squares += c * c;
    largest = fabs(value) > largest ? fabs(value) : largest;
  });
  squares = warp_sum(squares);
  const double raw = sqrt(warp_sum(row_squares)) + sqrt(warp_sum(centre_squares));
  const RowScale scale = row_scale(warp_max(largest), squares);
  const double factor = scale.usable ? ldexp(1.0, scale.power) : 0.0;
  double removed = 0.0;
  for_own_elements(row, d, [&](int64_t e, double x) {
    const double value = scale.usable ? (x - centre_at(e)) * factor : 0.0;
    const __half code = __float2half_rn(static_cast<float>(value));
    codes[e] = code;
    const double rest = value - widen(code);
    removed += rest * rest;
  });
  for (int64_t e = d + threadIdx.x % 32; e < d_padded; e += 32) {
    codes[e] = __float2half_rn(0.0f);
  }
  removed = sqrt(warp_sum(removed));
  return {scale, sqrt(squares), scale.usable ? removed / factor : INFINITY, raw};
}

// Codes and bounds of latents [0, n): rows [n, d], b_enc [n]; counts the rows with NaN into n_nan[0]. One warp a
// latent.
template <typename T>
__global__ void round_latents_kernel(
    const T* __restrict__ rows, const T* __restrict__ b_enc, int64_t n, int64_t d, int64_t d_padded,
    __half* __restrict__ codes,   // [n, d_padded]
    float* __restrict__ bounds,   // [kBoundRows, n]
    unsigned long long* n_nan) {  // or null
  const int64_t latent = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (latent >= n) {
    return;  // whole warps
  }
  const RoundedRow row = round_row<T>(rows + latent * d, nullptr, d, d_padded, codes + latent * d_padded);
  if (threadIdx.x % 32 == 0) {
    if (n_nan != nullptr && row.norm != row.norm) {
      atomicAdd(n_nan, 1ull);
    }
    const double bias = widen(b_enc[latent]);
    bounds[kScale * n + latent] = static_cast<float>(ldexp(1.0, -row.scale.power));
    bounds[kBias * n + latent] = static_cast<float>(bias);
    bounds[kNorm * n + latent] = row.scale.usable ? rounded_up(row.norm * kOutward) : INFINITY;
    bounds[kRounding * n + latent] = row.scale.usable ? rounded_up(row.removed * kOutward) : INFINITY;
    // An infinite bias is exact: latents masked by -Inf stay below every limit.
    bounds[kSlack * n + latent] = fabs(bias) < INFINITY ? rounded_up(fabs(bias) * 0x1p-20 + 1e-36) : 0.0f;
  }
}

// Who answers for a token.
constexpr int kByScreen = 0, kExactly = 1, kNobody = 2;

// The tokens of a tile, ready to be screened.
struct ScreenedTokens {
  __half* codes;        // [n, d_padded]
  float* scale;         // [n]
  TokenBounds* bounds;  // [n]
  int* exact;           // [n] kExactly: screening does not help this token, the exact path decides
};

// What a step of pursuit knows of its tokens [n]; null in an encode. Resting tokens are answered by nobody.
struct TokenRules {
  const double* noise = nullptr;  // products that fall short of the best by at most so much are wanted too
  const int* done = nullptr;
  const int64_t* l0 = nullptr;
  int64_t step = 0;

  __device__ double extra(int64_t token) const { return noise != nullptr ? noise[token] : 0.0; }
  __device__ bool rests(int64_t token) const { return noise != nullptr && (done[token] != 0 || l0[token] <= step); }
  TokenRules from(int64_t first) const {
    return noise != nullptr ? TokenRules{noise + first, done + first, l0 + first, step} : *this;
  }
};

// The candidates of every (token, range of latents) of a tile of tokens.
struct CandidateLists {
  int* count;       // [n, ranges]
  int32_t* latent;  // [n, ranges, size]
  float* lower;     // same; null for a threshold encode, which never asks again
  float* upper;
  uint32_t* limit;  // [n] ordered_key of what top-k leaves out below; rounding to the output dtype is allowed for
  int ranges, size;
};

// Codes and bounds of the tokens of a tile, and empty lists for them. One warp a token.
template <typename T>
__global__ void round_tokens_kernel(
    const T* __restrict__ x, const T* __restrict__ b_dec, int64_t n, int64_t d, int64_t d_padded, TokenRules rules,
    ScreenedTokens tokens, CandidateLists lists) {
  const int64_t token = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (token >= n) {
    return;  // whole warps
  }
  const RoundedRow row = round_row<T>(x + token * d, b_dec, d, d_padded, tokens.codes + token * d_padded);
  const int lane = threadIdx.x % 32;
  if (lane < lists.ranges) {
    lists.count[token * lists.ranges + lane] = 0;
  }
  if (lane == 0) {
    tokens.scale[token] = static_cast<float>(ldexp(1.0, -row.scale.power));
    tokens.bounds[token] = token_bounds(row.norm, row.removed, row.raw, d, rules.extra(token));
    tokens.exact[token] = rules.rests(token) ? kNobody : row.scale.usable ? kByScreen : kExactly;
    if (lists.limit != nullptr) {
      lists.limit[token] = ordered_key(-INFINITY);
    }
  }
}

// What screening knows of one pre-activation.
struct Interval {
  float lower, upper;
};
// product: of the two rows of codes. NaN (infinite weights) becomes "anything".
DM_HOST_DEVICE inline Interval interval_of(
    float product, float token_scale, TokenBounds token, float scale, float bias, float norm, float rounding,
    float slack) {
  const float score = fmaf(product, token_scale * scale, bias);
  const float error = token.error(norm, rounding, slack);
  const float lower = score - error, upper = score + error;
  return {lower == lower ? lower : -INFINITY, upper == upper ? upper : INFINITY};
}

}  // namespace darkmatter::cuda
