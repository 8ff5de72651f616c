// The pass over a chunk of scores while they are in L2: which latents can still be in the answer of their token.
//
// A candidate is a latent whose upper bound is not below its token's limit. For top-k the limit is a lower bound of the
// k-th best pre-activation: the k-th largest of the lower bounds seen so far, raised whenever a list grows too long; a
// stale limit only lets more in. For a threshold encode it is the latent's own threshold.
//
// Budget: 4 bytes a score read from L2, and per 8 tokens the 20 bytes of bounds of each latent. Appends are rare: about
// k (1 + log(chunks)) a token.
#pragma once

#include "cuda/screen/certificate.cuh"

namespace darkmatter::cuda {

constexpr int kFilterTokens = 8;   // a block: they share the bounds of the latents, in registers
constexpr int kFilterLatents = 4;  // a thread: one 16-byte load a token
constexpr int kTile = kThreads * kFilterLatents;
constexpr int kFilterBlocks = 3;  // a multiprocessor: 80 registers a thread, 96 KB of products in flight
constexpr int kListPerThread = 8;
constexpr int kList = kThreads * kListPerThread;  // candidates of one list: 2048
constexpr int kManyAtOnce = 256;                  // a tile that lets in more raises the limit first
constexpr int kMaxScreenK = 512;

// A chunk of scores: products of codes of tokens [n] and `width` latents from `first` on. After every kRun of them
// `skip` are left out: a chunk may sample the whole dictionary.
constexpr int kRun = 256;
struct ScoreChunk {
  const float* products;  // [n, ld]
  int64_t ld;
  int64_t n, first, width, skip;

  __device__ int64_t latent(int64_t at) const { return first + at + at / kRun * skip; }
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

  // From latent `first` on, of which `left` are in the chunk.
  __device__ void load(const ScreenedLatents& latents, int64_t first, int64_t left) {
    valid = left <= 0 ? 0 : left < kFilterLatents ? static_cast<int>(left) : kFilterLatents;
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
      bounds[t] = real ? tokens.bounds[token] : TokenBounds{0.0f, 0.0f, 0.0f};
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

// Threshold: each latent has a limit of its own, and nothing is ever dropped again.
struct LatentLimits {
  const float* values;  // [n] or one: margin_below(threshold)
  int step;             // 0: one for all
};

}  // namespace darkmatter::cuda
