// The end of an encode, one block a token: exact float64 sums of the candidates, and the answer among them.
//
// Budget: k (1.05 .. 1.2) rows of W_enc a token from memory; the token's row is converted once into shared memory.
#pragma once

#include "cuda/screen/filter.cuh"

namespace darkmatter::cuda {

// The exact side of an encode.
template <typename T>
struct ExactRows {
  const T* x;          // [n, d]
  const T* weight;     // [F, d]
  const double* bias;  // [F]
  int64_t n, d, n_latents;
  bool staged;  // whether a row of doubles fits into shared memory

  __device__ double pre_activation(const double* row, int64_t token, int64_t latent) const {
    return row_dot(row, x + token * d, weight + latent * d, d) + bias[latent];
  }
  DM_HOST_DEVICE double* take_row(Arena& arena) const { return staged ? arena.take<double>(d) : nullptr; }
};

struct FinishShared {
  int count;            // candidates
  int certain, others;  // those among the best k by their bounds; others that may be
  int filled;           // exact values so far
  BlockScratch scratch;
};

// Best k of the candidates. Grid: tokens of the tile. Shared memory: 16 bytes a place of a list, 32 or 64 KB.
struct TopKArrays {
  uint64_t* keys;   // [size] ranked() of the exact values, in any order, then zeros
  int32_t* latent;  // [size] those certainly among the best by their bounds from the front, the others from the back
  float* upper;     // [size]
  float* lower;     // [size] until the candidates are split, where the keys are from then on
  int size;

  DM_HOST_DEVICE TopKArrays(Arena& arena, int size)
      : keys(arena.take<uint64_t>(size)),
        latent(arena.take<int32_t>(size)),
        upper(arena.take<float>(size)),
        lower(reinterpret_cast<float*>(keys)),
        size(size) {}
};

// All candidates of a token that its limit lets in, from all its lists, into shared memory. Returns how many; more than
// one list holds are too many.
__device__ inline int gather_candidates(
    const CandidateLists& lists, int64_t token, const TopKArrays& arrays, int* cursor) {
  if (threadIdx.x == 0) {
    *cursor = 0;
  }
  __syncthreads();
  const float limit = key_float(lists.limit[token]);
  for (int range = 0; range < lists.ranges; ++range) {
    const CandidateList list(lists, token, range);
    const int count = lists.count[token * lists.ranges + range];
    for (int i = threadIdx.x; i < count; i += kThreads) {
      const float upper = list.upper[i];
      if (!(upper < limit)) {
        const int place = atomicAdd(cursor, 1);
        if (place < arrays.size) {
          arrays.latent[place] = list.latent[i];
          arrays.upper[place] = upper;
          arrays.lower[place] = list.lower[i];
        }
      }
    }
  }
  __syncthreads();
  return *cursor;
}

// Puts the candidates that are among the best k by their lower bounds to the front, others that may be to the back, and
// leaves out the rest. There are at least k candidates; kPerThread is of the places of a list.
template <int kPerThread>
__device__ inline void split_candidates(
    const TopKArrays& arrays, int count, int k, RoundingMargin margin, FinishShared& shared) {
  uint32_t keys[kPerThread];
  float upper[kPerThread];
  int32_t latent[kPerThread];
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) {
    const int at = i * kThreads + threadIdx.x;
    const bool there = at < count;
    keys[i] = there ? ordered_key(arrays.lower[at]) : 0;
    upper[i] = there ? arrays.upper[at] : 0.0f;
    latent[i] = there ? arrays.latent[at] : 0;
  }
  const uint32_t kth = kth_largest(keys, k, shared.scratch);
  const float limit = twice_below(margin, key_float(kth));
  if (threadIdx.x == 0) {
    shared.certain = shared.others = shared.filled = 0;
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) {
    if (keys[i] != 0 && (keys[i] >= kth || !(upper[i] < limit))) {
      const int place = keys[i] >= kth ? atomicAdd(&shared.certain, 1) : arrays.size - 1 - atomicAdd(&shared.others, 1);
      arrays.latent[place] = latent[i];
      arrays.upper[place] = upper[i];
    }
    const int at = i * kThreads + threadIdx.x;
    arrays.keys[at] = 0;
  }
  __syncthreads();
}

// Appends the exact values of the candidates [begin, end) whose upper bound is not below `limit`.
template <typename T>
__device__ void rescore(
    const ExactRows<T>& exact, const double* row, int64_t token, const TopKArrays& arrays, int begin, int end,
    float limit, int* filled) {
  for (int p = begin + static_cast<int>(threadIdx.x) / kLanes; p < end; p += kGroups) {
    if (arrays.upper[p] < limit) {
      continue;  // the same for the eight threads of the group
    }
    const int32_t latent = arrays.latent[p];
    const T h = rounded<T>(exact.pre_activation(row, token, latent));
    if (threadIdx.x % kLanes == 0) {
      arrays.keys[atomicAdd(filled, 1)] = ranked(static_cast<float>(widen(h)), latent);
    }
  }
  __syncthreads();
}

// The k-th best value among the first `count` keys, all computed.
template <int kPerThread>
__device__ inline float kth_value(const uint64_t* keys, int count, int k, BlockScratch& scratch) {
  uint32_t values[kPerThread];
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) {
    const int at = i * kThreads + threadIdx.x;
    values[i] = at < count ? static_cast<uint32_t>(keys[at] >> 32) : 0;
  }
  return key_float(kth_largest(values, k, scratch));
}

template <typename T>
__device__ void write_best(const uint64_t* keys, int k, T* values, int64_t* indices) {
  for (int a = threadIdx.x; a < k; a += kThreads) {
    values[a] = rounded<T>(widen(relu(ranked_value(keys[a]))));
    indices[a] = ranked_latent(keys[a]);
  }
}

template <typename T, int kSize>
__global__ void __launch_bounds__(kThreads, kSize == kList ? kDotBlocks : 2) finish_topk_kernel(
    ExactRows<T> exact, ScreenedTokens tokens, CandidateLists lists, int k,
    T* __restrict__ values,           // [n, k]
    int64_t* __restrict__ indices) {  // [n, k]
  const int64_t token = blockIdx.x;
  if (tokens.exact[token] != 0) {
    return;  // the whole block
  }
  Arena arena{shared_memory()};
  double* storage = exact.take_row(arena);
  constexpr int kPerThread = kSize / kThreads;
  const TopKArrays arrays(arena, kSize);
  FinishShared& shared = *arena.take<FinishShared>(1);
  const int count = gather_candidates(lists, token, arrays, &shared.count);
  if (count > kSize) {
    if (threadIdx.x == 0) {
      tokens.exact[token] = kExactly;
    }
    return;  // the whole block
  }
  const RoundingMargin margin = margin_of<T>();
  split_candidates<kPerThread>(arrays, count, k, margin, shared);
  const double* row = stage_row(exact.x + token * exact.d, exact.d, storage);
  rescore(exact, row, token, arrays, 0, shared.certain, -INFINITY, &shared.filled);
  // k exact values are known: others must be able to round to the k-th best of them.
  const float limit = margin_below(margin, kth_value<kPerThread>(arrays.keys, shared.filled, k, shared.scratch));
  rescore(exact, row, token, arrays, kSize - shared.others, kSize, limit, &shared.filled);
  sort_descending(arrays.keys, next_power_of_two(shared.filled));
  write_best(arrays.keys, k, values + token * k, indices + token * k);
}

// Threshold: the candidates that are above, latents ascending, into a pool shared by all tokens.
struct KeptPool {
  int32_t* latent;  // [capacity]
  void* values;     // [capacity] of T
  int64_t capacity;
  unsigned long long* used;
  int64_t* start;  // [n] where a token's entries begin
  int64_t* count;  // [n]
};

template <typename T>
struct Thresholds {
  const T* values;
  int step;  // 0: one for all latents

  // h > threshold, or NaN: dropping it would hide it.
  __device__ bool keeps(T h, int64_t latent) const { return !(widen(h) <= widen(values[latent * step])); }
};

// The same in rows of fixed length: of more latents than fit only the first are stored.
template <typename T>
struct KeptRows {
  T* values;         // [n, capacity] zeros after the token's own
  int64_t* indices;  // [n, capacity]
  int64_t* found;    // [n] how many the token has
  int64_t capacity;

  __device__ void store(int64_t token, int64_t place, int64_t latent, double value) const {
    if (place < capacity) {
      values[token * capacity + place] = rounded<T>(value);
      indices[token * capacity + place] = latent;
    }
  }
  // After all of the token's are stored; all threads of the block.
  __device__ void end(int64_t token, int64_t count) const {
    for (int64_t place = count + threadIdx.x; place < capacity; place += kThreads) {
      store(token, place, 0, 0.0);
    }
    if (threadIdx.x == 0) {
      found[token] = count;
    }
  }
};

// Shared memory of the end of a threshold encode.
struct KeptArrays {
  uint64_t* keys;   // [kList] of what is kept, the lowest latent first; its value in the lower half
  int32_t* latent;  // [kList] candidates
  FinishShared* shared;

  DM_HOST_DEVICE explicit KeptArrays(Arena& arena)
      : keys(arena.take<uint64_t>(kList)), latent(arena.take<int32_t>(kList)), shared(arena.take<FinishShared>(1)) {}

  __device__ int32_t kept_latent(int i) const { return ranked_latent(keys[i] >> 32); }
  __device__ float kept_value(int i) const { return bits_float(static_cast<uint32_t>(keys[i])); }
};

// The candidates of a token that are kept, as keys; returns how many, or -1 where the screen does not answer for it:
// since before, or because they are too many for a list, and then the exact path will.
template <typename T>
__device__ int keep_candidates(
    const ExactRows<T>& exact, double* storage, int64_t token, const ScreenedTokens& tokens,
    const CandidateLists& lists, const Thresholds<T>& thresholds, const KeptArrays& arrays) {
  if (tokens.exact[token] != 0) {
    return -1;
  }
  uint64_t* keys = arrays.keys;
  int32_t* latent = arrays.latent;
  FinishShared& shared = *arrays.shared;
  int count = 0;
  for (int range = 0; range < lists.ranges; ++range) {
    const CandidateList list(lists, token, range);
    const int own = lists.count[token * lists.ranges + range];
    for (int i = threadIdx.x; i < own && count + i < kList; i += kThreads) {
      latent[count + i] = list.latent[i];
    }
    count += own;
  }
  if (count > kList) {
    if (threadIdx.x == 0) {
      tokens.exact[token] = kExactly;
    }
    return -1;
  }
  const int n = next_power_of_two(count);
  for (int i = threadIdx.x; i < n; i += kThreads) {
    keys[i] = 0;
  }
  if (threadIdx.x == 0) {
    shared.certain = 0;
  }
  __syncthreads();
  const double* row = stage_row(exact.x + token * exact.d, exact.d, storage);
  for (int p = static_cast<int>(threadIdx.x) / kLanes; p < count; p += kGroups) {
    const T h = rounded<T>(exact.pre_activation(row, token, latent[p]));
    if (threadIdx.x % kLanes == 0 && thresholds.keeps(h, latent[p])) {
      // descending keys: ascending latents, with the value behind
      keys[p] = static_cast<uint64_t>(0xffffffffu - static_cast<uint32_t>(latent[p])) << 32 |
                float_bits(relu(static_cast<float>(widen(h))));
      atomicAdd(&shared.certain, 1);
    }
  }
  sort_descending(keys, n);
  return shared.certain;
}

template <typename T>
__global__ void __launch_bounds__(kThreads, kDotBlocks) finish_threshold_kernel(
    ExactRows<T> exact, ScreenedTokens tokens, CandidateLists lists, Thresholds<T> thresholds, int64_t first_token,
    KeptPool pool) {
  const int64_t token = blockIdx.x;
  Arena arena{shared_memory()};
  double* storage = exact.take_row(arena);
  const KeptArrays arrays(arena);
  FinishShared& shared = *arrays.shared;
  const int kept = keep_candidates(exact, storage, token, tokens, lists, thresholds, arrays);
  if (kept < 0) {
    return;  // the whole block
  }
  if (threadIdx.x == 0) {
    const unsigned long long start = atomicAdd(pool.used, static_cast<unsigned long long>(kept));
    const bool fits = static_cast<int64_t>(start) + kept <= pool.capacity;
    pool.start[first_token + token] = static_cast<int64_t>(start);
    pool.count[first_token + token] = fits ? kept : 0;
    tokens.exact[token] = fits ? kByScreen : kExactly;
    shared.others = fits;
  }
  __syncthreads();
  if (shared.others == 0) {
    return;  // the whole block
  }
  const int64_t start = pool.start[first_token + token];
  for (int i = threadIdx.x; i < kept; i += kThreads) {
    pool.latent[start + i] = arrays.kept_latent(i);
    static_cast<T*>(pool.values)[start + i] = rounded<T>(arrays.kept_value(i));
  }
}

// As finish_threshold_kernel, into rows of fixed length that begin with those of the tile.
template <typename T>
__global__ void __launch_bounds__(kThreads, kDotBlocks) finish_threshold_rows_kernel(
    ExactRows<T> exact, ScreenedTokens tokens, CandidateLists lists, Thresholds<T> thresholds, KeptRows<T> rows) {
  const int64_t token = blockIdx.x;
  Arena arena{shared_memory()};
  double* storage = exact.take_row(arena);
  const KeptArrays arrays(arena);
  const int kept = keep_candidates(exact, storage, token, tokens, lists, thresholds, arrays);
  if (kept < 0) {
    return;  // the whole block
  }
  for (int i = threadIdx.x; i < kept; i += kThreads) {
    rows.store(token, i, arrays.kept_latent(i), arrays.kept_value(i));
  }
  rows.end(token, kept);
}

// What an upper bound must reach for a latent to be a candidate; and how many thresholds are NaN, if anyone asks.
template <typename T>
__global__ void __launch_bounds__(kThreads) threshold_limits_kernel(
    const T* __restrict__ thresholds, int64_t n, float* __restrict__ limits,
    unsigned long long* __restrict__ found_nan) {
  const int64_t at = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (at < n) {
    const auto threshold = static_cast<float>(widen(thresholds[at]));
    limits[at] = margin_below(margin_of<T>(), threshold);
    if (found_nan != nullptr && threshold != threshold) {
      atomicAdd(found_nan, 1ull);
    }
  }
}

// From the pool to CSR: col [z], values [z]. Grid: tokens.
template <typename T>
__global__ void __launch_bounds__(kThreads) write_kept_kernel(
    KeptPool pool, const int64_t* __restrict__ crow, const int* __restrict__ exact, int64_t* __restrict__ col,
    T* __restrict__ values) {
  const int64_t token = blockIdx.x;
  if (exact[token] != 0) {
    return;  // the exact path writes it
  }
  const int64_t from = pool.start[token], to = crow[token];
  for (int64_t i = threadIdx.x; i < pool.count[token]; i += kThreads) {
    col[to + i] = pool.latent[from + i];
    values[to + i] = static_cast<const T*>(pool.values)[from + i];
  }
}

}  // namespace darkmatter::cuda
