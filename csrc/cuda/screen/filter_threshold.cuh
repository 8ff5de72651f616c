// The filter of a threshold encode.
#pragma once

#include "cuda/screen/filter.cuh"

namespace darkmatter::cuda {

__global__ void __launch_bounds__(kThreads) filter_threshold_kernel(
    ScoreChunk chunk, ScreenedLatents latents, ScreenedTokens tokens, CandidateLists lists, LatentLimits limits) {
  const FilterBlock block(chunk, lists);
  FilterShared& shared = *Arena{shared_memory()}.take<FilterShared>(1);
  shared.load(block, tokens, lists);
  for (int64_t tile = block.begin; tile < block.end; tile += kTile) {
    const int64_t at = tile + threadIdx.x * kFilterLatents;
    LatentRegisters own;
    const int64_t first = chunk.latent(at);
    own.load(latents, first, block.end - at);
    float limit[kFilterLatents];
#pragma unroll
    for (int l = 0; l < kFilterLatents; ++l) {
      limit[l] = l < own.valid ? limits.values[(first + l) * limits.step] : INFINITY;
    }
    for (int t = 0; t < block.n_tokens; ++t) {
      if (!shared.active[t] || own.valid == 0) {
        continue;
      }
      const CandidateList list(lists, block.first_token + t, block.range);
      float products[kFilterLatents];
      load_products(chunk.products + (block.first_token + t) * chunk.ld, at, own.valid, block.aligned, products);
#pragma unroll
      for (int l = 0; l < kFilterLatents; ++l) {
        const float upper = own.interval(l, products[l], shared.scale[t], shared.bounds[t]).upper;
        if (l < own.valid && !(upper < limit[l])) {
          const int place = atomicAdd(&shared.count[t], 1);
          if (place < kList) {
            list.latent[place] = static_cast<int32_t>(first + l);
          }
        }
      }
    }
  }
  __syncthreads();
  if (static_cast<int>(threadIdx.x) < block.n_tokens) {
    const int t = threadIdx.x;
    const int64_t token = block.first_token + t;
    if (shared.active[t] && shared.count[t] <= kList) {
      lists.count[token * lists.ranges + block.range] = shared.count[t];
    } else if (tokens.exact[token] == kByScreen) {
      tokens.exact[token] = kExactly;
    }
  }
}

}  // namespace darkmatter::cuda
