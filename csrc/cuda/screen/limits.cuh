// How a token's limit is raised to what its list proves, by one warp.
#pragma once

#include "cuda/screen/filter.cuh"

namespace darkmatter::cuda {

// Not above the k-th best pre-activation, of which n >= k have these lower bounds; never NaN.
__device__ inline uint32_t proven_limit(const float* lower, int n, int k, RoundingMargin margin, int* bins) {
  return ordered_key(twice_below(margin, key_float(kth_largest_of_warp(lower, n, k, bins))));
}

// Leaves out of a list what is below the limit, and returns how many are left; all lanes of a warp.
__device__ inline int drop_below(CandidateList list, int count, float limit) {
  constexpr int kAtOnce = 4;  // of each lane
  const unsigned before = (1u << threadIdx.x % 32) - 1;
  int left = 0;
  for (int first = threadIdx.x % 32; first - static_cast<int>(threadIdx.x % 32) < count; first += 32 * kAtOnce) {
    float lower[kAtOnce], upper[kAtOnce];
    int32_t latent[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int at = first + 32 * i < count ? first + 32 * i : 0;
      lower[i] = list.lower[at];
      upper[i] = list.upper[at];
      latent[i] = list.latent[at];
    }
    __syncwarp();  // all have read what is written over now: no more than has been read
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const bool keep = first + 32 * i < count && !(upper[i] < limit);
      const unsigned kept = __ballot_sync(kAllLanes, keep);
      if (keep) {
        const int place = left + __popc(kept & before);
        list.lower[place] = lower[i];
        list.upper[place] = upper[i];
        list.latent[place] = latent[i];
      }
      left += __popc(kept);
    }
  }
  return left;
}

// Raises the limit to what the list proves and drops what is below it; all lanes of a warp, count >= k.
struct Tightened {
  uint32_t limit;
  int count;
};
__device__ inline Tightened tighten(
    CandidateList list, int count, uint32_t limit, int k, RoundingMargin margin, int* bins) {
  const uint32_t proven = proven_limit(list.lower, count, k, margin, bins);
  limit = proven > limit ? proven : limit;
  return {limit, drop_below(list, count, key_float(limit))};
}

}  // namespace darkmatter::cuda
