// The filter of a threshold encode: scores less their latents' limits are looked at, nothing is ever dropped again.
#pragma once

#include "cuda/screen/filter.cuh"

namespace darkmatter::cuda {

__global__ void __launch_bounds__(kThreads, kFilterBlocks) filter_threshold_kernel(
    ScoreChunk chunk, ScreenedLatents latents, ScreenedTokens tokens, CandidateLists lists, LatentLimits limits) {
  const FilterBlock block(chunk, lists);
  if (block.begin >= block.end) {
    return;  // the whole block
  }
  FilterShared& shared = *Arena{shared_memory()}.take<FilterShared>(1);
  const LargestBounds largest = largest_of(latents, block, block.begin, threadIdx.x % kTileRuns);
  shared.load(block, tokens, lists, kList);
  __syncthreads();
  shared.set_own_tests(0, largest);
  __syncthreads();
  scan_chunk(
      latents, block, shared,
      [&](int t, int latent, const Interval& interval) {
        if (interval.upper < limits.values[latent * limits.step]) {
          return;
        }
        const int place = atomicAdd(&shared.count[t], 1);
        if (place < kList) {
          lists.latent[block.list<kList>(t) + place] = latent;
        }
      },
      [](int, int) { __syncthreads(); });
  if (static_cast<int>(threadIdx.x) < block.n_tokens) {
    const int t = threadIdx.x, token = block.first_token + t;
    if (shared.active[t] && shared.count[t] <= kList) {
      lists.count[token * block.ranges + block.range] = shared.count[t];
    } else if (tokens.exact[token] == kByScreen) {
      tokens.exact[token] = kExactly;
    }
  }
}

}  // namespace darkmatter::cuda
