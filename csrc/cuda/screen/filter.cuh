// The pass over a chunk of scores while they are in L2: which latents can still be in the answer of their token.
//
// A candidate is a latent whose upper bound is not below its token's limit. For top-k the limit is a lower bound of the
// k-th best pre-activation, raised as better lower bounds are seen (filter_topk.cuh); a stale limit only lets more in.
// For a threshold encode it is the latent's own threshold.
//
// Budget: 4 bytes a score read from L2, once, 16 bytes a thread and token; per 8 tokens the 8 bytes of the screen of
// each latent. A score costs a multiplication, a fused one and a comparison with the least score of its token and run.
// In most tiles of 1024 latents some score is a hit, about k (1 + log(F / k)) of a token in all: the lanes that have
// hits look at them again and append them by themselves, without a barrier. A tile has one barrier.
#pragma once

#include "cuda/kernels/warp.cuh"
#include "cuda/screen/latent_screens.cuh"

namespace darkmatter::cuda {

constexpr int kFilterTokens = 8;   // a block: they share the screens of the latents, in registers
constexpr int kFilterLatents = 4;  // a thread: one 16-byte load a token
constexpr int kTile = kThreads * kFilterLatents;
constexpr int kTileRuns = kTile / kRun;
constexpr int kFilterBlocks = 4;  // a multiprocessor: 64 registers a thread, 128 KB of products in flight
// Candidates of one list: room for the best k, a tile in which all are better, and as many near ties of the k-th. Long
// lists are for large k: each costs twice the memory, and twice the registers of those who look through it at the end.
constexpr int kList = 2048, kLongList = 2 * kList;
constexpr int kShortK = 512, kMaxScreenK = 1024;
DM_HOST_DEVICE constexpr int list_size(int k) { return k > kShortK ? kLongList : kList; }

static_assert(kTile % kRun == 0 && kShortK + kTile <= kList && kMaxScreenK + kTile <= kLongList);
static_assert(kFilterTokens == kWarps, "a warp looks after a token's list");
static_assert(kFilterTokens * kFilterLatents == 32, "a bit for each score of a thread");

// A chunk of scores: products of codes of tokens [n] and `width` latents from `first` on. After every kRun of them
// `skip` are left out: a chunk may sample the whole dictionary. Rows are whole tiles, and there are whole blocks of
// them: what lies beyond n or width may be read, and is anything.
struct ScoreChunk {
  const float* products;  // [n, ld]
  int64_t ld;
  int64_t n, first, width, skip;

  __device__ int64_t latent(int64_t at) const { return first + at + at / kRun * skip; }
};

// Which tokens and latents a block has. Grid: (tiles of kFilterTokens tokens, ranges of the latents of the chunk).
// In int, for registers: a chunk has less than 2^31 products and a tile of tokens less than 2^31 candidates.
struct FilterBlock {
  const float* products;  // of the first token
  int ld, first_latent, skip;
  int begin, end;  // of the range, in the chunk
  int first_token, n_tokens, range, ranges;

  __device__ FilterBlock(const ScoreChunk& chunk, const CandidateLists& lists)
      : products(chunk.products + static_cast<int64_t>(blockIdx.x) * kFilterTokens * chunk.ld),
        ld(static_cast<int>(chunk.ld)),
        first_latent(static_cast<int>(chunk.first)),
        skip(static_cast<int>(chunk.skip)),
        first_token(static_cast<int>(blockIdx.x) * kFilterTokens),
        range(static_cast<int>(blockIdx.y)),
        ranges(lists.ranges) {
    const int left = static_cast<int>(chunk.n) - first_token, width = static_cast<int>(chunk.width);
    n_tokens = left < kFilterTokens ? left : kFilterTokens;
    const int tiles = (width + kTile - 1) / kTile, part = (tiles + ranges - 1) / ranges * kTile;
    begin = range * part;
    end = begin + part < width ? begin + part : width;
  }
  __device__ int latent(int at) const { return first_latent + at + at / kRun * skip; }
  __device__ float product(int t, int at) const { return products[t * ld + at]; }
  // Where the list of token t begins. (The size known here saves a register, of which the filters have none to spare.)
  template <int kSize>
  __device__ int list(int t) const {
    return ((first_token + t) * ranges + range) * kSize;
  }
};

// How a token looks at the scores of a run: a hit is one that is not below `least`.
struct ScoreTest {
  float scale, least;
};

struct FilterShared {
  // Of this tile and of the next: a warp may be a tile ahead of another.
  ScoreTest test[2][kTileRuns][kFilterTokens];
  float scale[kFilterTokens];
  TokenBounds bounds[kFilterTokens];
  uint32_t limit[kFilterTokens];  // ordered_key; of a threshold's scores, which are less their limits, that of 0
  int count[kFilterTokens];
  int mark[kFilterTokens];    // top-k: a list that is longer at the end of a tile is tightened
  int active[kFilterTokens];  // 0: the exact path decides
  int bins[kWarps][kBins];

  // Warp 0; others see it after a barrier.
  __device__ void load(
      const FilterBlock& block, const ScreenedTokens& tokens, const CandidateLists& lists, int marked) {
    const int t = threadIdx.x;
    if (t < kFilterTokens) {
      const int token = block.first_token + (t < block.n_tokens ? t : 0);
      active[t] = t < block.n_tokens && tokens.exact[token] == kByScreen;
      limit[t] = lists.limit != nullptr ? lists.limit[token] : ordered_key(0.0f);
      count[t] = lists.count[token * block.ranges + block.range];
      scale[t] = tokens.scale[token];
      bounds[t] = tokens.bounds[token];
      mark[t] = marked;
    }
    __syncwarp();
  }

  // Token t's test for a run of the tile that `buffer` is for. Others may be raising the limit: read by an atomic.
  __device__ void set_test(int buffer, int t, int run, const LargestBounds& largest) {
    const float own = key_float(atomicMax(&limit[t], 0u));
    test[buffer][run][t] = {scale[t], active[t] != 0 ? least_score(own, bounds[t], largest) : INFINITY};
  }
  // All tests of the warp's own token; `largest` of run lane % kTileRuns.
  __device__ void set_own_tests(int buffer, const LargestBounds& largest) {
    __syncwarp();
    if (threadIdx.x % 32 < kTileRuns) {
      set_test(buffer, threadIdx.x / 32, threadIdx.x % 32, largest);
    }
  }
};

// The largest bounds of the latents in a run of the tile from `from` on; of any latents beyond the end.
__device__ inline LargestBounds largest_of(
    const ScreenedLatents& latents, const FilterBlock& block, int from, int run) {
  const int at = from + run * kRun;
  return latents.largest[at < block.end ? block.latent(at) / kRun : 0];
}

// Of the thread's four latents, the scores of all tokens that are not below what their tests ask: a bit each, four a
// token. All products are loaded before the first is used.
__device__ inline uint32_t find_hits(
    const float* products, int ld, const LatentScreen* screens, const ScoreTest (&tests)[kFilterTokens]) {
  float4 of_token[kFilterTokens];
#pragma unroll
  for (int t = 0; t < kFilterTokens; ++t) {
    of_token[t] = *reinterpret_cast<const float4*>(products + t * ld);
  }
  const float4 first = reinterpret_cast<const float4*>(screens)[0],
               second = reinterpret_cast<const float4*>(screens)[1];
  __syncwarp();  // else the compiler has some of them wait for registers of others
  uint32_t hits = 0;
#pragma unroll
  for (int t = 0; t < kFilterTokens; ++t) {
    const ScoreTest test = tests[t];
    const auto look = [&](int l, float product, float scale, float shift) {
      hits |= !(fmaf(product, test.scale * scale, shift) < test.least) ? 1u << (kFilterLatents * t + l) : 0u;
    };
    look(0, of_token[t].x, first.x, first.y);
    look(1, of_token[t].y, first.z, first.w);
    look(2, of_token[t].z, second.x, second.y);
    look(3, of_token[t].w, second.z, second.w);
  }
  return hits;
}

// Those of a thread's hits that are latents of the block, of which `left` are from its first on.
__device__ inline uint32_t within(uint32_t hits, int left) {
  constexpr uint32_t kFirst = 0x11111111;  // of every token
  return left >= kFilterLatents ? hits : left <= 0 ? 0 : hits & kFirst * ((1u << left) - 1);
}

// Looks through the block's range, tile by tile: take(t, latent, interval) for every score that may be of a
// candidate, by the thread that has it; then, all threads together, end_tile(buffer of the next tile, its begin), which
// holds a barrier. The tests of the first tile are set.
template <typename Take, typename EndTile>
__device__ inline void scan_chunk(
    const ScreenedLatents& latents, const FilterBlock& block, FilterShared& shared, const Take& take,
    const EndTile& end_tile) {
  constexpr int kTests = kTileRuns * kFilterTokens;
  int buffer = 0;
  for (int from = block.begin; from < block.end; from += kTile) {
    const int at = from + static_cast<int>(threadIdx.x) * kFilterLatents;
    LargestBounds largest;
    if (threadIdx.x < kTests) {  // under way while the tile is looked through
      largest = largest_of(latents, block, from + kTile, threadIdx.x / kFilterTokens);
    }
    uint32_t hits = find_hits(
        block.products + at, block.ld, latents.screens + (at < block.end ? block.latent(at) : 0),
        shared.test[buffer][threadIdx.x / (kRun / kFilterLatents)]);
    buffer = 1 - buffer;
    if (threadIdx.x < kTests) {
      shared.set_test(buffer, threadIdx.x % kFilterTokens, threadIdx.x / kFilterTokens, largest);
    }
    for (hits = within(hits, block.end - at); hits != 0; hits &= hits - 1) {
      const int bit = __ffs(static_cast<int>(hits)) - 1, l = bit % kFilterLatents, t = bit / kFilterLatents;
      if (shared.active[t] != 0) {  // others have hits where a product is NaN
        const int latent = block.latent(at + l);
        take(t, latent, latents.interval(latent, block.product(t, at + l), shared.scale[t], shared.bounds[t]));
      }
    }
    end_tile(buffer, from + kTile);
  }
}

// One list in global memory.
struct CandidateList {
  int32_t* latent;
  float *lower, *upper;

  __device__ CandidateList(int32_t* latent, float* lower, float* upper) : latent(latent), lower(lower), upper(upper) {}
  __device__ CandidateList(const CandidateLists& lists, int64_t token, int range) {
    const int64_t at = (token * lists.ranges + range) * lists.size;
    latent = lists.latent + at;
    lower = lists.lower != nullptr ? lists.lower + at : nullptr;
    upper = lists.upper != nullptr ? lists.upper + at : nullptr;
  }
};

}  // namespace darkmatter::cuda
