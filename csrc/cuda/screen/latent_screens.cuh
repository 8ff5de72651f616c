// What a screen needs of the latents: their own five bounds for the few that may be candidates, and before that, of
// each latent, how its product becomes a score, and of every kRun latents how much their scores err at most.
//
// A scan looks at a score alone and passes it by if it is below least_score(): two numbers a latent and one a token and
// run, instead of five a latent and two a token. Whatever it does not pass by is looked at again, with the latent's own
// bounds.
#pragma once

#include "cuda/screen/certificate.cuh"

namespace darkmatter::cuda {

constexpr int kRun = 256;  // latents whose largest bounds are known

// The score is product * (token's scale * scale) + shift. For a threshold the shift is less the latent's own limit, so
// that one number a token says where to look.
struct LatentScreen {
  float scale, shift;
};

// Of the latents of a run.
struct LargestBounds {
  float norm, rounding, slack;
};

struct ScreenedLatents {
  const float* bounds;  // [kBoundRows, n]
  int64_t n;
  const LatentScreen* screens;   // [runs, kRun], beyond the last latent with a shift of -inf
  const LargestBounds* largest;  // [runs]

  // By the latent's own bounds.
  __device__ Interval interval(int64_t latent, float product, float token_scale, TokenBounds token) const {
    const float* of = bounds + latent;
    return interval_of(
        product, token_scale, token, of[kScale * n], of[kBias * n], of[kNorm * n], of[kRounding * n], of[kSlack * n]);
  }
};

// Threshold: each latent has a limit of its own, and nothing is ever dropped again.
struct LatentLimits {
  const float* values;  // [n] or one: margin_below(threshold); null for top-k
  int step;             // 0: one for all
};

// Not below bias - limit, also after the rounding of both sides of a comparison (see least_score): 2^-20 of each is 8
// times what the float32 steps of interval_of may lose.
DM_HOST_DEVICE inline float shift_of(float bias, float limit) {
  if (!(limit > -INFINITY)) {
    return INFINITY;  // everything is let in
  }
  const double both = fabs(static_cast<double>(bias)) + fabs(static_cast<double>(limit));
  return both < INFINITY ? rounded_up(static_cast<double>(bias) - limit + both * 0x1p-20) : bias;
}

// Below it no score of a run is of a candidate. What is NaN must be let in: ask !(score < least).
//
// Where interval_of finds an upper bound not below the limit, the score is not below limit - error but for the 2^-24 of
// |limit| by which their sum may have been rounded up; and the error is at most that of the largest bounds, since
// alpha, beta and the bounds are not negative and each step rounds monotonely. The steps here lose at most 2^-23 of
// |limit| + error. So 2^-20 of it, taken off, is five times what is needed. It does not vanish by underflow: error
// holds the slack, at least 1e-36, of every latent of the run that has a finite bias; with an infinite one the score is
// infinite.
DM_HOST_DEVICE inline float least_score(float limit, TokenBounds token, const LargestBounds& largest) {
  const float error = fmaf(token.alpha, largest.norm, fmaf(token.beta, largest.rounding, largest.slack));
  return limit - error - (fabsf(limit) + error) * 0x1p-20f;
}

// Screens and largest bounds of all runs. One block a run, one latent a thread.
static __global__ void __launch_bounds__(kThreads) prepare_latents_kernel(
    ScreenedLatents latents, LatentLimits limits, LatentScreen* __restrict__ screens,
    LargestBounds* __restrict__ largest) {
  static_assert(kRun == kThreads, "one latent a thread");
  uint32_t* keys = Arena{shared_memory()}.take<uint32_t>(3);
  if (threadIdx.x < 3) {
    keys[threadIdx.x] = ordered_key(0.0f);
  }
  __syncthreads();
  const int64_t latent = static_cast<int64_t>(blockIdx.x) * kRun + threadIdx.x;
  LatentScreen screen{0.0f, -INFINITY};
  if (latent < latents.n) {
    const float* of = latents.bounds + latent;
    const float bias = of[kBias * latents.n];
    screen.scale = of[kScale * latents.n];
    screen.shift = limits.values != nullptr ? shift_of(bias, limits.values[latent * limits.step]) : bias;
    atomicMax(&keys[0], ordered_key(of[kNorm * latents.n]));
    atomicMax(&keys[1], ordered_key(of[kRounding * latents.n]));
    atomicMax(&keys[2], ordered_key(of[kSlack * latents.n]));
  }
  screens[latent] = screen;
  __syncthreads();
  if (threadIdx.x == 0) {
    largest[blockIdx.x] = {key_float(keys[0]), key_float(keys[1]), key_float(keys[2])};
  }
}

}  // namespace darkmatter::cuda
