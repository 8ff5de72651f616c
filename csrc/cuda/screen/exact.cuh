// The path that never screens: float64 sums of all latents, streamed through one block a token. For tokens that
// screening cannot help: not finite, or more candidates than a list holds. They are found on the device, without asking
// the host.
//
// Budget: F d elements of W_enc a token, read through L2, where the blocks, going at one pace, find each other's rows.
#pragma once

#include "cuda/screen/finish.cuh"

namespace darkmatter::cuda {

constexpr int kExactBlocks = 1024;  // at most; each looks at every 1024th token

// Visits the exact pre-activations of one token, kThreads latents at a time: visit(latent, h, valid) once a thread, all
// threads together.
template <typename T, typename Visit>
__device__ void visit_exact(const ExactRows<T>& exact, const double* row, int64_t token, T* sums, const Visit& visit) {
  for (int64_t first = 0; first < exact.n_latents; first += kThreads) {
    for (int p = static_cast<int>(threadIdx.x) / kLanes; p < kThreads; p += kGroups) {
      if (first + p < exact.n_latents) {
        const T h = rounded<T>(exact.pre_activation(row, token, first + p));
        if (threadIdx.x % kLanes == 0) {
          sums[p] = h;
        }
      }
    }
    __syncthreads();
    const int64_t latent = first + threadIdx.x;
    visit(latent, sums[threadIdx.x], latent < exact.n_latents);
    __syncthreads();
  }
}

// Best k of the tokens marked in `marked`, k <= kMaxScreenK: a buffer of 2048 keys, cut to the best k when full.
template <typename T>
__global__ void __launch_bounds__(kThreads, kDotBlocks) exact_topk_kernel(
    ExactRows<T> exact, const int* __restrict__ marked, int k, T* __restrict__ values, int64_t* __restrict__ indices) {
  Arena arena{shared_memory()};
  double* storage = exact.take_row(arena);
  uint64_t* keys = arena.take<uint64_t>(kList);
  T* sums = arena.take<T>(kThreads);
  int* filled = arena.take<int>(1);
  for (int64_t token = blockIdx.x; token < exact.n; token += gridDim.x) {
    if (marked[token] == 0) {
      continue;  // the whole block
    }
    const double* row = stage_row(exact.x + token * exact.d, exact.d, storage);
    for (int i = threadIdx.x; i < kList; i += kThreads) {
      keys[i] = 0;
    }
    if (threadIdx.x == 0) {
      *filled = 0;
    }
    __syncthreads();
    uint64_t least = 0;  // the k-th best at the last cut
    visit_exact(exact, row, token, sums, [&](int64_t latent, T h, bool valid) {
      const uint64_t key = valid ? ranked(static_cast<float>(widen(h)), static_cast<int32_t>(latent)) : 0;
      if (key > least) {
        keys[atomicAdd(filled, 1)] = key;
      }
      __syncthreads();
      if (*filled > kList - kThreads) {
        sort_descending(keys, kList);
        least = keys[k - 1];
        for (int i = k + threadIdx.x; i < kList; i += kThreads) {
          keys[i] = 0;
        }
        if (threadIdx.x == 0) {
          *filled = k;
        }
        __syncthreads();
      }
    });
    sort_descending(keys, kList);
    write_best(keys, k, values + token * k, indices + token * k);
    __syncthreads();
  }
}

// Threshold, marked tokens: how many latents are kept (col null), or also which and their values.
template <typename T>
__global__ void __launch_bounds__(kThreads, kDotBlocks) exact_threshold_kernel(
    ExactRows<T> exact, const int* __restrict__ marked, Thresholds<T> thresholds, int64_t* __restrict__ count,
    const int64_t* __restrict__ crow, int64_t* __restrict__ col, T* __restrict__ values) {
  Arena arena{shared_memory()};
  double* storage = exact.take_row(arena);
  T* sums = arena.take<T>(kThreads);
  BlockScratch& scratch = *arena.take<BlockScratch>(1);
  int* total = arena.take<int>(1);
  for (int64_t token = blockIdx.x; token < exact.n; token += gridDim.x) {
    if (marked[token] == 0) {
      continue;  // the whole block
    }
    const double* row = stage_row(exact.x + token * exact.d, exact.d, storage);
    int64_t before = 0;
    visit_exact(exact, row, token, sums, [&](int64_t latent, T h, bool valid) {
      const bool kept = valid && thresholds.keeps(h, latent);
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
    });
    if (threadIdx.x == 0 && col == nullptr) {
      count[token] = before;
    }
    __syncthreads();
  }
}

// All pre-activations [n, F], for what no list can hold: float64, large k, small dictionaries.
// Grid: (kThreads latents, tokens).
template <typename T>
__global__ void __launch_bounds__(kThreads, kDotBlocks)
    exact_scores_kernel(ExactRows<T> exact, T* __restrict__ scores) {
  Arena arena{shared_memory()};
  double* storage = exact.take_row(arena);
  const int64_t token = blockIdx.y, first = static_cast<int64_t>(blockIdx.x) * kThreads;
  const double* row = stage_row(exact.x + token * exact.d, exact.d, storage);
  for (int64_t p = first + threadIdx.x / kLanes; p < first + kThreads && p < exact.n_latents; p += kGroups) {
    const T h = rounded<T>(exact.pre_activation(row, token, p));
    if (threadIdx.x % kLanes == 0) {
      scores[token * exact.n_latents + p] = h;
    }
  }
}

}  // namespace darkmatter::cuda
