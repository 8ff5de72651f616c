// The pass over a chunk of scores while they are in L2: which latents can still be in the answer of their token.
//
// A candidate is a latent whose upper bound is not below its token's limit. For top-k the limit is a lower bound of the
// k-th best pre-activation: the k-th largest of the lower bounds seen so far, raised whenever a list grows too long; a
// stale limit only lets more in. For a threshold encode it is the latent's own threshold.
//
// Budget: 4 bytes a score read from L2, and per 8 tokens the 20 bytes of bounds of each latent. Appends are rare: about
// k (1 + log(chunks)) a token.
#pragma once

#include "cuda/screen.cuh"

namespace darkmatter {

constexpr int kFilterTokens = 8;   // a block: they share the bounds of the latents, in registers
constexpr int kFilterLatents = 4;  // a thread: one 16-byte load a token
constexpr int kTile = kThreads * kFilterLatents;
constexpr int kFilterBlocks = 3;  // a multiprocessor: 80 registers a thread, 96 KB of products in flight
constexpr int kListPerThread = 8;
constexpr int kList = kThreads * kListPerThread;  // candidates of one list: 2048
constexpr int kManyAtOnce = 256;                  // a tile that lets in more raises the limit first
constexpr int kMaxScreenK = 512;

// A chunk of scores: products of codes of tokens [n] and latents [first, first + width).
struct ScoreChunk {
  const float* products;  // [n, ld]
  int64_t ld;
  int64_t n, first, width;
};

struct ScreenedLatents {
  const float* bounds;  // [kBoundRows, n]
  int64_t n;
};

// What the latents of one thread need, held in registers over the tokens of the block.
struct LatentRegisters {
  float scale[kFilterLatents], bias[kFilterLatents], norm[kFilterLatents], rounding[kFilterLatents],
      slack[kFilterLatents];
  int valid;  // the first so many are latents

  __device__ void load(const ScreenedLatents& latents, int64_t first, int64_t end) {
    valid = end <= first ? 0 : end - first < kFilterLatents ? static_cast<int>(end - first) : kFilterLatents;
#pragma unroll
    for (int l = 0; l < kFilterLatents; ++l) {
      const float* of = latents.bounds + first + (l < valid ? l : 0);
      scale[l] = valid ? of[kScale * latents.n] : 0.0f;
      bias[l] = valid ? of[kBias * latents.n] : 0.0f;
      norm[l] = valid ? of[kNorm * latents.n] : 0.0f;
      rounding[l] = valid ? of[kRounding * latents.n] : 0.0f;
      slack[l] = valid ? of[kSlack * latents.n] : 0.0f;
    }
  }
  __device__ Interval interval(int l, float product, float token_scale, TokenBounds token) const {
    return interval_of(product, token_scale, token, scale[l], bias[l], norm[l], rounding[l], slack[l]);
  }
};

// Four products; a row that is not aligned to 16 bytes, or its end, one by one.
__device__ inline void load_products(
    const float* row, int64_t at, int valid, bool aligned, float (&out)[kFilterLatents]) {
  if (aligned && valid == kFilterLatents) {
    const float4 four = *reinterpret_cast<const float4*>(row + at);
    out[0] = four.x;
    out[1] = four.y;
    out[2] = four.z;
    out[3] = four.w;
    return;
  }
#pragma unroll
  for (int l = 0; l < kFilterLatents; ++l) {
    out[l] = l < valid ? row[at + l] : 0.0f;
  }
}

// Which tokens and latents a block has. Grid: (tiles of kFilterTokens tokens, ranges of the latents of the chunk).
struct FilterBlock {
  int64_t first_token, begin, end;
  int n_tokens, range;
  bool aligned;

  __device__ FilterBlock(const ScoreChunk& chunk, const CandidateLists& lists)
      : first_token(static_cast<int64_t>(blockIdx.x) * kFilterTokens),
        n_tokens(chunk.n - first_token < kFilterTokens ? static_cast<int>(chunk.n - first_token) : kFilterTokens),
        range(blockIdx.y),
        aligned(chunk.ld % kFilterLatents == 0) {
    const int64_t part = ceil_div(ceil_div(chunk.width, lists.ranges), kTile) * kTile;
    begin = range * part;
    end = begin + part < chunk.width ? begin + part : chunk.width;
  }
};

struct FilterShared {
  float limit[kFilterTokens];
  float scale[kFilterTokens];
  TokenBounds bounds[kFilterTokens];
  int count[kFilterTokens], added[kFilterTokens], cursor[kFilterTokens];
  int active[kFilterTokens];  // 0: the exact path decides
  BlockScratch scratch;

  __device__ void load(const FilterBlock& block, const ScreenedTokens& tokens, const CandidateLists& lists) {
    const int t = threadIdx.x;
    if (t < kFilterTokens) {
      const int64_t token = block.first_token + t;
      const bool real = t < block.n_tokens && tokens.exact[token] == 0;
      active[t] = real;
      limit[t] = real && lists.limit != nullptr ? key_float(lists.limit[token]) : 0.0f;
      count[t] = real ? lists.count[token * lists.ranges + block.range] : 0;
      scale[t] = real ? tokens.scale[token] : 0.0f;
      bounds[t] = real ? tokens.bounds[token] : TokenBounds{0.0f, 0.0f};
      added[t] = cursor[t] = 0;
    }
    __syncthreads();
  }
};

// One list in global memory.
struct CandidateList {
  int32_t* latent;
  float *lower, *upper;

  __device__ CandidateList(const CandidateLists& lists, int64_t token, int range) {
    const int64_t at = (token * lists.ranges + range) * kList;
    latent = lists.latent + at;
    lower = lists.lower != nullptr ? lists.lower + at : nullptr;
    upper = lists.upper != nullptr ? lists.upper + at : nullptr;
  }
};

// Raises a token's limit to what its list proves and drops what is below; all threads. Returns the new count.
__device__ inline int tighten(
    CandidateList list, int count, int k, RoundingMargin margin, float* limit, int* cursor, BlockScratch& scratch) {
  uint32_t keys[kListPerThread];
  float lower[kListPerThread], upper[kListPerThread];
  int32_t latent[kListPerThread];
#pragma unroll
  for (int i = 0; i < kListPerThread; ++i) {
    const int at = i * kThreads + threadIdx.x;
    const bool there = at < count;
    lower[i] = there ? list.lower[at] : 0.0f;
    upper[i] = there ? list.upper[at] : 0.0f;
    latent[i] = there ? list.latent[at] : 0;
    keys[i] = there ? ordered_key(lower[i]) : 0;
  }
  const float proven = twice_below(margin, key_float(kth_largest(keys, k, scratch)));
  if (threadIdx.x == 0) {
    *limit = proven > *limit ? proven : *limit;
    *cursor = 0;
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kListPerThread; ++i) {
    if (keys[i] != 0 && !(upper[i] < *limit)) {
      const int at = atomicAdd(cursor, 1);
      list.lower[at] = lower[i];
      list.upper[at] = upper[i];
      list.latent[at] = latent[i];
    }
  }
  __syncthreads();
  return *cursor;
}

// What take_hits needs of a tile of one chunk.
struct Tile {
  ScoreChunk chunk;
  ScreenedLatents latents;
  CandidateLists lists;
  FilterBlock block;
  int64_t at;  // of this thread's latents in the chunk

  __device__ Tile(const ScoreChunk& chunk, const ScreenedLatents& latents, const CandidateLists& lists)
      : chunk(chunk), latents(latents), lists(lists), block(chunk, lists), at(0) {}

  __device__ void load_latents(LatentRegisters& own) const {
    own.load(latents, chunk.first + at, chunk.first + block.end);
  }
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
__device__ __noinline__ void take_hits(
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
      list.latent[place] = static_cast<int32_t>(tile.chunk.first + tile.at + l);
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
__global__ void __launch_bounds__(kThreads, kFilterBlocks) filter_topk_kernel(
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
    } else {
      tokens.exact[token] = 1;
    }
  }
}

// Threshold: each latent has a limit of its own, and nothing is ever dropped again.
struct LatentLimits {
  const float* values;  // [n] or one: margin_below(threshold)
  int step;             // 0: one for all
};

__global__ void __launch_bounds__(kThreads) filter_threshold_kernel(
    ScoreChunk chunk, ScreenedLatents latents, ScreenedTokens tokens, CandidateLists lists, LatentLimits limits) {
  const FilterBlock block(chunk, lists);
  FilterShared& shared = *Arena{shared_memory()}.take<FilterShared>(1);
  shared.load(block, tokens, lists);
  for (int64_t tile = block.begin; tile < block.end; tile += kTile) {
    const int64_t at = tile + threadIdx.x * kFilterLatents;
    LatentRegisters own;
    own.load(latents, chunk.first + at, chunk.first + block.end);
    float limit[kFilterLatents];
#pragma unroll
    for (int l = 0; l < kFilterLatents; ++l) {
      limit[l] = l < own.valid ? limits.values[(chunk.first + at + l) * limits.step] : INFINITY;
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
            list.latent[place] = static_cast<int32_t>(chunk.first + at + l);
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
    } else {
      tokens.exact[token] = 1;
    }
  }
}

}  // namespace darkmatter
