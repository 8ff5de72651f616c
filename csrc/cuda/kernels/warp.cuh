// What the lanes of one warp do together. All lanes must call.
#pragma once

#include "cuda/kernels/block.cuh"

namespace darkmatter::cuda {

constexpr int kBins = 256;      // of a radix select, eight bits a pass
constexpr int kLoadsAhead = 8;  // a lane has in flight

// The k-th largest of n floats in device memory, 1 <= k <= n, as its ordered_key. `bins` [kBins] are the warp's own.
__device__ inline uint32_t kth_largest_of_warp(const float* values, int n, int k, int* bins) {
  constexpr int kOwn = kBins / 32;
  const int lane = threadIdx.x % 32;
  uint32_t prefix = 0, known = 0;
  for (int shift = 24; shift >= 0; shift -= 8) {
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      bins[i * 32 + lane] = 0;
    }
    __syncwarp();
    for (int first = lane; first < n; first += 32 * kLoadsAhead) {
      float ahead[kLoadsAhead];
#pragma unroll
      for (int i = 0; i < kLoadsAhead; ++i) {
        const int at = first + 32 * i;
        ahead[i] = values[at < n ? at : first];
      }
#pragma unroll
      for (int i = 0; i < kLoadsAhead; ++i) {
        const uint32_t key = ordered_key(ahead[i]);
        if (first + 32 * i < n && (key & known) == prefix) {
          atomicAdd(&bins[key >> shift & (kBins - 1)], 1);
        }
      }
    }
    __syncwarp();
    int bin = kBins - 1 - kOwn * lane, count = 0;  // the lane's bins, from the largest key down
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      count += bins[bin - i];
    }
    int up_to = count;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const int before = __shfl_up_sync(kAllLanes, up_to, step);
      up_to += lane >= step ? before : 0;
    }
    int rank = k - (up_to - count);
    const bool here = rank > 0 && rank <= count;
    while (here && rank > bins[bin]) {
      rank -= bins[bin--];
    }
    const int from = __ffs(static_cast<int>(__ballot_sync(kAllLanes, here))) - 1;
    prefix |= static_cast<uint32_t>(__shfl_sync(kAllLanes, bin, from)) << shift;
    k = __shfl_sync(kAllLanes, rank, from);
    known |= static_cast<uint32_t>(kBins - 1) << shift;
    __syncwarp();  // the bins have been read
  }
  return prefix;
}

}  // namespace darkmatter::cuda
