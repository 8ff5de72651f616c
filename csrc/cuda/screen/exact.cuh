// The path that never screens: float64 sums of all latents. For tokens that screening cannot help: not finite, or more
// candidates than a list holds. They are found on the device, without asking the host.
//
// Marked tokens go in groups of eight, and a group's latents in tiles, over all of the GPU: blocks take tiles by
// ticket. The scores of a group [8, F] lie in one of a few slots until its best k are chosen, by eight further tickets.
// Whoever holds a ticket waits only for holders of earlier ones, which run already: no block waits for ever.
//
// Budget: F d elements of W_enc and 8 F d float64 multiply-adds a group, at the rates of the whole GPU (F 131072, d
// 3584: 1.9 GB and 3.8 G, half a millisecond on an H200); without marked tokens one launch that ends at once.
#pragma once

#include "cuda/kernels/exact_tile.cuh"
#include "cuda/screen/finish.cuh"

namespace darkmatter::cuda {

constexpr int kScoresAtOnce = 1024;  // looked at between two looks at the buffer of keys
constexpr int kBestKeys = 4096;      // of this buffer: 32 KB, as a slab of tokens has
static_assert(kMaxScreenK + kScoresAtOnce <= kBestKeys);

// Groups of marked tokens on their way through the exact path. The counters begin at 0.
template <typename T>
struct ExactWork {
  MarkedTokens marked;
  unsigned long long* ticket;
  int* scored;    // [groups] tiles done
  int* finished;  // [groups] tokens done
  T* scores;      // [slots, kExactTokens, F]
  int64_t slots;
};

// One thread waits until `count` has reached `wanted`; then all threads see what was written before it did.
__device__ inline void wait_for(int* count, int wanted) {
  if (threadIdx.x == 0) {
    while (atomicAdd(count, 0) < wanted) {
      __nanosleep(200);
    }
    __threadfence();
  }
  __syncthreads();
}
// What all threads have written is seen by those who wait for `count`.
__device__ inline void signal(int* count) {
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    atomicAdd(count, 1);
  }
}

// The best k of n scores, as ranked() keys: a buffer of kBestKeys, cut to the best k when it may not hold more.
template <typename T>
__device__ void best_of_scores(const T* scores, int64_t n, int k, uint64_t* keys, int* filled) {
  for (int i = threadIdx.x; i < kBestKeys; i += kThreads) {
    keys[i] = 0;
  }
  if (threadIdx.x == 0) {
    *filled = 0;
  }
  __syncthreads();
  uint64_t least = 0;  // the k-th best at the last cut
  for (int64_t first = 0; first < n; first += kScoresAtOnce) {
#pragma unroll
    for (int i = 0; i < kScoresAtOnce / kThreads; ++i) {
      const int64_t latent = first + i * kThreads + threadIdx.x;
      if (latent < n) {
        const T h = __ldcg(scores + latent);  // of other multiprocessors: not what this one may remember
        const uint64_t key = ranked(static_cast<float>(widen(h)), static_cast<int32_t>(latent));
        if (key > least) {
          keys[atomicAdd(filled, 1)] = key;
        }
      }
    }
    __syncthreads();
    if (*filled > kBestKeys - kScoresAtOnce) {
      sort_descending(keys, kBestKeys);
      least = keys[k - 1];
      for (int i = k + threadIdx.x; i < kBestKeys; i += kThreads) {
        keys[i] = 0;
      }
      if (threadIdx.x == 0) {
        *filled = k;
      }
    }
    __syncthreads();
  }
  sort_descending(keys, next_power_of_two(*filled));
}

struct ExactAnswerShared {
  union {
    ExactShared tile;
    uint64_t keys[kBestKeys];
    BlockScratch scratch;
  };
  unsigned long long ticket;
  int filled;
};

// The answer of a token to its n scores: the best k, k <= kMaxScreenK.
template <typename T>
struct BestOfScores {
  int k;
  T* values;         // [N, k]
  int64_t* indices;  // [N, k]

  __device__ void operator()(const T* scores, int64_t n, int64_t token, ExactAnswerShared& shared) const {
    best_of_scores(scores, n, k, shared.keys, &shared.filled);
    write_best(shared.keys, k, values + token * k, indices + token * k);
  }
};

// The answer of a token to its n scores: those above a threshold, in a row of fixed length.
template <typename T>
struct KeptOfScores {
  Thresholds<T> thresholds;
  KeptRows<T> rows;

  __device__ void operator()(const T* scores, int64_t n, int64_t token, ExactAnswerShared& shared) const {
    constexpr int kOwn = kScoresAtOnce / kThreads;  // neighbours: latents ascend from thread to thread
    int64_t before = 0;
    for (int64_t first = 0; first < n; first += kScoresAtOnce) {
      T own[kOwn];
      unsigned kept = 0;
#pragma unroll
      for (int i = 0; i < kOwn; ++i) {
        const int64_t latent = first + static_cast<int64_t>(threadIdx.x) * kOwn + i;
        if (latent < n) {
          own[i] = __ldcg(scores + latent);  // of other multiprocessors: not what this one may remember
          kept |= thresholds.keeps(own[i], latent) ? 1u << i : 0u;
        }
      }
      const int up_to = inclusive_scan(__popc(kept), shared.scratch);
      int64_t to = before + up_to - __popc(kept);
#pragma unroll
      for (int i = 0; i < kOwn; ++i) {
        if (kept >> i & 1) {
          rows.store(token, to++, first + static_cast<int64_t>(threadIdx.x) * kOwn + i, relu(widen(own[i])));
        }
      }
      if (threadIdx.x == kThreads - 1) {
        shared.filled = up_to;  // read before the next scan's barriers
      }
      __syncthreads();
      before += shared.filled;
    }
    rows.end(token, before);
  }
};

// Answers of the marked tokens: answer(scores, n_latents, token, shared), by all threads of a block.
template <typename T, typename Answer>
__global__ void __launch_bounds__(kThreads, kExactBlocks)
    exact_answers_kernel(ExactProducts<T, T> exact, ExactWork<T> work, Answer answer) {
  ExactAnswerShared& shared = *Arena{shared_memory()}.take<ExactAnswerShared>(1);
  const auto number = static_cast<int64_t>(*work.marked.number);
  const int tiles = static_cast<int>(ceil_div(exact.n_latents, kExactLatents));
  while (true) {
    if (threadIdx.x == 0) {
      shared.ticket = number > 0 ? atomicAdd(work.ticket, 1ull) : 0;
    }
    __syncthreads();
    const int64_t ticket = static_cast<int64_t>(shared.ticket), group = ticket / (tiles + kExactTokens);
    const int part = static_cast<int>(ticket % (tiles + kExactTokens));
    if (group * kExactTokens >= number) {
      return;  // the whole block
    }
    T* scores = work.scores + group % work.slots * kExactTokens * exact.n_latents;
    if (part < tiles) {
      if (group >= work.slots) {
        wait_for(work.finished + group - work.slots, kExactTokens);
      }
      load_group(work.marked, group, number, shared.tile);
      exact_tile(exact, static_cast<int64_t>(part) * kExactLatents, shared.tile, [&](int t, int64_t latent, double h) {
        scores[t * exact.n_latents + latent] = rounded<T>(h);
      });
      signal(work.scored + group);
    } else {
      wait_for(work.scored + group, tiles);
      const int64_t at = group * kExactTokens + part - tiles;
      if (at < number) {
        answer(scores + (part - tiles) * exact.n_latents, exact.n_latents, work.marked.list[at], shared);
      }
      signal(work.finished + group);
    }
    __syncthreads();
  }
}

// All pre-activations [n, F] of some marked tokens, the next n from number `first` on. Grid: (tiles of latents,
// groups).
template <typename T>
__global__ void __launch_bounds__(kThreads, kExactBlocks) exact_scores_kernel(
    ExactProducts<T, T> exact, MarkedTokens marked, int64_t first, int64_t n, T* __restrict__ scores) {
  ExactShared& shared = *Arena{shared_memory()}.take<ExactShared>(1);
  const int64_t group = static_cast<int64_t>(blockIdx.y) * kExactTokens;
  if (threadIdx.x < kExactTokens) {
    const int64_t at = group + threadIdx.x;
    shared.tokens[threadIdx.x] = at >= n ? -1 : marked.list != nullptr ? marked.list[first + at] : first + at;
  }
  exact_tile(exact, static_cast<int64_t>(blockIdx.x) * kExactLatents, shared, [&](int t, int64_t latent, double h) {
    scores[(group + t) * exact.n_latents + latent] = rounded<T>(h);
  });
}

// Threshold, n marked tokens from number `first` on, their scores at hand: how many latents are kept (col null), or
// which and their values. Grid: n.
template <typename T>
__global__ void __launch_bounds__(kThreads) kept_scores_kernel(
    const T* __restrict__ scores, int64_t n_latents, MarkedTokens marked, int64_t first, Thresholds<T> thresholds,
    int64_t* __restrict__ count, const int64_t* __restrict__ crow, int64_t* __restrict__ col, T* __restrict__ values) {
  Arena arena{shared_memory()};
  BlockScratch& scratch = *arena.take<BlockScratch>(1);
  int* total = arena.take<int>(1);
  const int64_t token = marked.list[first + blockIdx.x];
  const T* own = scores + static_cast<int64_t>(blockIdx.x) * n_latents;
  int64_t before = 0;
  for (int64_t from = 0; from < n_latents; from += kThreads) {
    const int64_t latent = from + threadIdx.x;
    const T h = latent < n_latents ? own[latent] : T(0.0f);
    const bool kept = latent < n_latents && thresholds.keeps(h, latent);
    const int up_to = inclusive_scan(kept, scratch);
    if (kept && col != nullptr) {
      col[crow[token] + before + up_to - 1] = latent;
      values[crow[token] + before + up_to - 1] = rounded<T>(relu(widen(h)));
    }
    if (threadIdx.x == kThreads - 1) {
      *total = up_to;
    }
    __syncthreads();
    before += *total;
    __syncthreads();
  }
  if (threadIdx.x == 0 && col == nullptr) {
    count[token] = before;
  }
}

}  // namespace darkmatter::cuda
