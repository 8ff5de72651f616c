// The screening kernels where there are no integer dot products: the "codes" are float32 rows and torch's own matrix
// product, which runs at the speed of the platform's BLAS, multiplies them a chunk of panels at a time (candidates.h).
//
// Of a sum of d products in float32, in any order, with or without fused multiply-adds (Higham, 3.1):
//   |fl(<x, w>) - <x, w>| <= gamma ||x|| ||w||,  gamma = d u / (1 - d u),  u = 2^-24,
// about 4.6e-5 at d 768: hardly more than the answer is left. It does not hold for products in bfloat16 or TF32, which
// torch may be told to use: ops.py looks at that before every call.
//
// Plain C++, compiled for what every processor of the platform has.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "cpu/screen/certificate.h"

namespace darkmatter::cpu {
namespace {

double gamma_of(int64_t d) { return 1.01 * static_cast<double>(d + 2) * kUnit; }

// Products below the smallest normal number may be lost, one by one.
constexpr double kLost = 2e-38;

// Norms of rows below this have products, and sums of some of them, below 1e36, by Cauchy-Schwarz: nothing overflows.
constexpr double kLargestNorm = 1e18;

ScreenedToken encode_token(
    const double* row, int64_t d, int64_t /*d_padded*/, double error, float* /*scratch*/, void* codes) {
  auto* single = static_cast<float*>(codes);
  double squares = 0.0, lost = 0.0;
  for (int64_t e = 0; e < d; ++e) {
    single[e] = static_cast<float>(row[e]);
    const double back = single[e];
    squares += back * back;
    lost += (row[e] - back) * (row[e] - back);
  }
  ScreenedToken token{};
  token.scale = 1.0f;
  token.alpha = static_cast<float>((std::sqrt(lost) + error) * kOutward);
  token.beta = static_cast<float>(std::sqrt(squares) * kOutward);
  token.screened = squares > 1e-50 && squares < kLargestNorm * kLargestNorm;
  return token;
}

void encode_latent(
    const double* row, const LatentTerms& terms, int64_t d, int64_t /*d_padded*/, float* /*scratch*/, int8_t* /*first*/,
    int64_t /*stride*/, int32_t* sum, float* bounds, int64_t ld_bounds) {
  double squares = 0.0, lost = 0.0;
  for (int64_t e = 0; e < d; ++e) {
    const double back = static_cast<float>(row[e]);
    squares += back * back;
    lost += (row[e] - back) * (row[e] - back);
  }
  const double norm = std::sqrt(squares), rounding = std::sqrt(lost) + gamma_of(d) * norm;
  LatentTerms own = terms;
  own.tiny += norm < kLargestNorm ? kLost * static_cast<double>(d) : std::numeric_limits<double>::infinity();
  *sum = 0;
  store_bounds({1.0f, norm, norm, rounding}, norm + std::sqrt(lost) + kTinyNorm, rounding, own, bounds, ld_bounds);
}

struct Intervals {
  float score[kPanel], bound[kPanel];
};

Intervals intervals_of(
    const int32_t* products, const ScreenedToken& token, const ScreenedWeights& weights, int64_t panel) {
  const int64_t padded = weights.padded();
  const float* column = weights.bounds + panel * kPanel;
  float single[kPanel];
  std::memcpy(single, products, sizeof(single));
  Intervals found;
  for (int64_t l = 0; l < kPanel; ++l) {
    found.score[l] = single[l] * column[kScale * padded + l] + column[kBias * padded + l];
    found.bound[l] = token.alpha * column[kNorm * padded + l] + token.beta * column[kRounding * padded + l] +
                     column[kSlack * padded + l];
  }
  return found;
}

void intervals(
    const int32_t* products, const ScreenedToken& token, const ScreenedWeights& weights, int64_t panel, float* score,
    float* bound) {
  const Intervals found = intervals_of(products, token, weights, panel);
  std::copy_n(found.score, kPanel, score);
  std::copy_n(found.bound, kPanel, bound);
}

int64_t hits(
    const int32_t* products, const ScreenedToken& token, const ScreenedWeights& weights, int64_t panel,
    const float* limits, int64_t step, float* score, float* upper, int32_t* place) {
  const Intervals found = intervals_of(products, token, weights, panel);
  const int64_t first = panel * kPanel, some = std::min(kPanel, weights.n_places - first);
  float limit[kPanel], sum[kPanel];
  bool any = false;
  for (int64_t l = 0; l < kPanel; ++l) {
    limit[l] = limits[step ? first + l : 0];
    sum[l] = upper_end(found.score[l], found.bound[l]);
    any |= !(sum[l] < limit[l]);
  }
  int64_t count = 0;
  for (int64_t l = 0; any && l < some; ++l) {
    if (!(sum[l] < limit[l])) {
      score[count] = found.score[l];
      upper[count] = sum[l] == sum[l] ? sum[l] : std::numeric_limits<float>::infinity();
      place[count++] = static_cast<int32_t>(first + l);
    }
  }
  return count;
}

float nth_largest(const float* values, int64_t n, int64_t nth, float* scratch) {
  for (int64_t i = 0; i < n; ++i) {
    scratch[i] = values[i] == values[i] ? values[i] : -std::numeric_limits<float>::infinity();
  }
  std::nth_element(scratch, scratch + (nth - 1), scratch + n, [](float a, float b) { return a > b; });
  return scratch[nth - 1];
}

const ScreenKernels table = {kScreenChunk, 4,         0,    1,           kPanel,  false,   encode_token, encode_latent,
                             nullptr,      intervals, hits, nth_largest, nullptr, nullptr, nullptr};

}  // namespace

const ScreenKernels* float_kernels() { return &table; }

}  // namespace darkmatter::cpu
