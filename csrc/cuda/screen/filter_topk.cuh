// The filter of top-k: limits that rise as better lower bounds are seen.
#pragma once

#include "cuda/screen/filter.cuh"

namespace darkmatter::cuda {

// What take_hits needs of a tile of one chunk.
struct Tile {
  ScoreChunk chunk;
  ScreenedLatents latents;
  CandidateLists lists;
  FilterBlock block;
  int64_t at;  // of this thread's latents in the chunk

  __device__ Tile(const ScoreChunk& chunk, const ScreenedLatents& latents, const CandidateLists& lists)
      : chunk(chunk), latents(latents), lists(lists), block(chunk, lists), at(0) {}

  __device__ void load_latents(LatentRegisters& own) const { own.load(latents, chunk.latent(at), block.end - at); }
  __device__ void load_token(int t, int valid, float (&out)[kFilterLatents]) const {
    load_products(chunk.products + (block.first_token + t) * chunk.ld, at, valid, block.aligned, out);
  }
};

// Raises the limit of token t to what the hits of this tile prove, and drops the hits below; all threads.
__device__ inline uint32_t raise_limit(
    const Interval (&intervals)[kFilterLatents], uint32_t mine, int t, int k, RoundingMargin margin,
    FilterShared& shared) {
  uint32_t keys[kFilterLatents];
#pragma unroll
  for (int l = 0; l < kFilterLatents; ++l) {
    keys[l] = mine >> l & 1 ? ordered_key(intervals[l].lower) : 0;
  }
  const float proven = twice_below(margin, key_float(kth_largest(keys, k, shared.scratch)));
  if (threadIdx.x == 0) {
    shared.limit[t] = proven > shared.limit[t] ? proven : shared.limit[t];
    shared.added[t] = 0;
  }
  __syncthreads();
#pragma unroll
  for (int l = 0; l < kFilterLatents; ++l) {
    mine &= intervals[l].upper < shared.limit[t] ? ~(1u << l) : ~0u;
  }
  if (mine != 0) {
    atomicAdd(&shared.added[t], __popc(mine));
  }
  __syncthreads();
  return mine;
}

// Takes the hits of token t in this tile into its list; all threads. Rare, and out of line so that its registers do not
// count for the scan.
inline __device__ __noinline__ void take_hits(
    const Tile& tile, int t, uint32_t mine, int k, RoundingMargin margin, FilterShared& shared) {
  LatentRegisters own;
  tile.load_latents(own);
  float products[kFilterLatents];
  tile.load_token(t, own.valid, products);
  Interval intervals[kFilterLatents];
#pragma unroll
  for (int l = 0; l < kFilterLatents; ++l) {
    intervals[l] = own.interval(l, products[l], shared.scale[t], shared.bounds[t]);
  }
  const int hits = shared.added[t];
  __syncthreads();  // everyone has read it
  if (hits > kManyAtOnce && hits >= k) {
    mine = raise_limit(intervals, mine, t, k, margin, shared);
  }
  const CandidateList list(tile.lists, tile.block.first_token + t, tile.block.range);
  int count = shared.count[t];
  const int more = shared.added[t];
  const int long_list = 4 * k > kManyAtOnce ? (4 * k < kList ? 4 * k : kList) : kManyAtOnce;
  if (count + more > long_list && count >= k) {
    count = tighten(list, count, k, margin, &shared.limit[t], &shared.cursor[t], shared.scratch);
  }
  const bool fits = count + more <= kList;
  __syncthreads();
  if (threadIdx.x == 0) {
    shared.cursor[t] = count;
    shared.added[t] = 0;
    shared.active[t] = fits;
  }
  __syncthreads();
#pragma unroll
  for (int l = 0; l < kFilterLatents; ++l) {
    if (fits && mine >> l & 1) {
      const int place = atomicAdd(&shared.cursor[t], 1);
      list.latent[place] = static_cast<int32_t>(tile.chunk.latent(tile.at) + l);
      list.lower[place] = intervals[l].lower;
      list.upper[place] = intervals[l].upper;
    }
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    shared.count[t] = shared.cursor[t];
  }
}

// Top-k. The products of all tokens of the block are loaded before the first is used.
static __global__ void __launch_bounds__(kThreads, kFilterBlocks) filter_topk_kernel(
    ScoreChunk chunk, ScreenedLatents latents, ScreenedTokens tokens, CandidateLists lists, int k,
    RoundingMargin margin) {
  Tile tile(chunk, latents, lists);
  FilterShared& shared = *Arena{shared_memory()}.take<FilterShared>(1);
  shared.load(tile.block, tokens, lists);
  for (int64_t from = tile.block.begin; from < tile.block.end; from += kTile) {
    tile.at = from + threadIdx.x * kFilterLatents;
    uint32_t hits = 0;  // 4 bits a token
    {
      LatentRegisters own;
      tile.load_latents(own);
      float products[kFilterTokens][kFilterLatents];
#pragma unroll
      for (int t = 0; t < kFilterTokens; ++t) {
        tile.load_token(t < tile.block.n_tokens ? t : 0, own.valid, products[t]);
      }
#pragma unroll
      for (int t = 0; t < kFilterTokens; ++t) {
        uint32_t mine = 0;
#pragma unroll
        for (int l = 0; l < kFilterLatents; ++l) {
          const float upper = own.interval(l, products[t][l], shared.scale[t], shared.bounds[t]).upper;
          mine |= l < own.valid && !(upper < shared.limit[t]) ? 1u << l : 0u;
        }
        hits |= (shared.active[t] ? mine : 0u) << (kFilterLatents * t);
      }
    }
#pragma unroll
    for (int t = 0; t < kFilterTokens; ++t) {
      const uint32_t mine = hits >> (kFilterLatents * t) & ((1u << kFilterLatents) - 1);
      if (mine != 0) {
        atomicAdd(&shared.added[t], __popc(mine));
      }
    }
    __syncthreads();
    for (int t = 0; t < tile.block.n_tokens; ++t) {
      if (shared.added[t] != 0) {  // the same for all threads
        take_hits(tile, t, hits >> (kFilterLatents * t) & ((1u << kFilterLatents) - 1), k, margin, shared);
      }
    }
    __syncthreads();
  }
  if (static_cast<int>(threadIdx.x) < tile.block.n_tokens) {
    const int t = threadIdx.x;
    const int64_t token = tile.block.first_token + t;
    if (shared.active[t]) {
      lists.count[token * lists.ranges + tile.block.range] = shared.count[t];
      atomicMax(&lists.limit[token], ordered_key(shared.limit[t]));
    } else if (tokens.exact[token] == kByScreen) {
      tokens.exact[token] = kExactly;
    }
  }
}

}  // namespace darkmatter::cuda
