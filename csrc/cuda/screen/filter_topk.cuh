// The filter of top-k: limits that rise as better lower bounds are seen.
//
// A token without a limit gets one from the lower bounds of its first tile, before the tile is looked through: else all
// of it would be appended. From then on a list that has grown by k proves a better limit, and is cut to what reaches
// it; for k 1 every candidate raises the limit at once.
#pragma once

#include "cuda/screen/limits.cuh"

namespace darkmatter::cuda {

constexpr int kMinGrowth = 64;  // of a list before it is tightened again

// How long a list may be at the end of a tile, `left` being what the last tightening left, at least k: as long as it
// leaves room for a whole tile. Where more than that are left, near ties of the k-th best, any growth is looked at.
__device__ inline int mark_after(int left, int k, int size) {
  const int grown = left + (k < kMinGrowth ? kMinGrowth : k), roomy = grown < size - kTile ? grown : size - kTile;
  return left < roomy ? roomy : left;
}

// What the warps do between tiles, each for its token. Lists hold kSize candidates.
template <int kSize>
struct TopKLimits {
  const ScreenedLatents& latents;
  const CandidateLists& lists;
  const FilterBlock& block;
  FilterShared& shared;
  int k;
  RoundingMargin margin;

  __device__ int own() const { return threadIdx.x / 32; }

  // Gives the warp's token a limit if it has none: what the lower bounds of the first tile prove, which are written
  // behind its list for a while.
  __device__ void start() const {
    const int t = own(), lane = threadIdx.x % 32;
    const int width = block.end - block.begin, n = width < kTile ? width : kTile, count = shared.count[t];
    if (shared.active[t] == 0 || shared.limit[t] != ordered_key(-INFINITY) || n < k || count + n > kSize) {
      return;  // the whole warp
    }
    float* lower = lists.lower + block.list<kSize>(t) + count;
    constexpr int kAtOnce = 4;
    for (int first = lane; first < n; first += 32 * kAtOnce) {
      float ahead[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int at = block.begin + (first + 32 * i < n ? first + 32 * i : first);
        ahead[i] = latents.interval(block.latent(at), block.product(t, at), shared.scale[t], shared.bounds[t]).lower;
      }
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        if (first + 32 * i < n) {
          lower[first + 32 * i] = ahead[i];
        }
      }
    }
    __syncwarp();
    const uint32_t proven = proven_limit(lower, n, k, margin, shared.bins[t]);
    if (lane == 0) {
      shared.limit[t] = proven;
    }
  }

  // Tightens the warp's token's list if it is past its mark; one that went past its end sends the token the exact way.
  __device__ void tighten_own(int buffer, int next) const {
    const int t = own(), count = shared.count[t];
    if (shared.active[t] == 0 || count <= shared.mark[t]) {
      return;  // the whole warp
    }
    const LargestBounds largest = largest_of(latents, block, next, threadIdx.x % kTileRuns);
    const bool fits = count <= kSize;
    Tightened after{shared.limit[t], count};
    if (fits) {
      const int at = block.list<kSize>(t);
      const CandidateList list(lists.latent + at, lists.lower + at, lists.upper + at);
      after = tighten(list, count, after.limit, k, margin, shared.bins[t]);
    }
    __syncwarp();  // all have read what is written now
    if (threadIdx.x % 32 == 0) {
      shared.active[t] = fits;
      shared.limit[t] = after.limit;
      shared.count[t] = after.count;
      shared.mark[t] = mark_after(after.count, k, kSize);
    }
    shared.set_own_tests(buffer, largest);
  }
};

template <int kSize>
__global__ void __launch_bounds__(kThreads, kFilterBlocks) filter_topk_kernel(
    ScoreChunk chunk, ScreenedLatents latents, ScreenedTokens tokens, CandidateLists lists, int k,
    RoundingMargin margin) {
  const FilterBlock block(chunk, lists);
  if (block.begin >= block.end) {
    return;  // the whole block
  }
  FilterShared& shared = *Arena{shared_memory()}.take<FilterShared>(1);
  const TopKLimits<kSize> limits{latents, lists, block, shared, k, margin};
  const LargestBounds largest = largest_of(latents, block, block.begin, threadIdx.x % kTileRuns);
  shared.load(block, tokens, lists, mark_after(k, k, kSize));
  __syncthreads();
  limits.start();
  shared.set_own_tests(0, largest);
  __syncthreads();
  bool past = false;  // some list of this block is past its mark
  scan_chunk(
      latents, block, shared,
      [&](int t, int latent, const Interval& interval) {
        const uint32_t limit =
            k == 1 ? atomicMax(&shared.limit[t], ordered_key(twice_below(margin, interval.lower))) : shared.limit[t];
        if (interval.upper < key_float(limit)) {
          return;
        }
        const int place = atomicAdd(&shared.count[t], 1);
        past |= place >= shared.mark[t];
        if (place < kSize) {
          const int at = block.list<kSize>(t) + place;
          lists.latent[at] = latent;
          lists.lower[at] = interval.lower;
          lists.upper[at] = interval.upper;
        }
      },
      [&](int buffer, int next) {
        const bool tightened = __syncthreads_or(past);
        past = false;
        if (tightened) {
          limits.tighten_own(buffer, next);
          __syncthreads();
        }
      });
  if (static_cast<int>(threadIdx.x) < block.n_tokens) {
    const int t = threadIdx.x, token = block.first_token + t;
    if (shared.active[t]) {
      lists.count[token * block.ranges + block.range] = shared.count[t];
      atomicMax(&lists.limit[token], shared.limit[t]);
    } else if (tokens.exact[token] == kByScreen) {
      tokens.exact[token] = kExactly;
    }
  }
}

}  // namespace darkmatter::cuda
