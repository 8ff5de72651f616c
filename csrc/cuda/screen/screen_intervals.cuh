// The interval of every pre-activation of a chunk, written out: one thread each.
#pragma once

#include "cuda/screen/filter.cuh"

namespace darkmatter::cuda {

__global__ void __launch_bounds__(kThreads) write_intervals_kernel(
    ScoreChunk chunk, ScreenedLatents latents, ScreenedTokens tokens, float* __restrict__ lower,
    float* __restrict__ upper) {
  const int64_t token = blockIdx.y, at = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (at >= chunk.width) {
    return;
  }
  const int64_t latent = chunk.first + at;
  const Interval interval =
      latents.interval(latent, chunk.products[token * chunk.ld + at], tokens.scale[token], tokens.bounds[token]);
  lower[token * latents.n + latent] = interval.lower;
  upper[token * latents.n + latent] = interval.upper;
}

}  // namespace darkmatter::cuda
