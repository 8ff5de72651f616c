// The active latents of tokens as kernels read them.
#pragma once

#include "cuda/kernels/block.cuh"

namespace darkmatter::cuda {

// The active latents of N tokens, fixed or ragged.
struct ActiveLatents {
  const int64_t* indices;  // [N, k] or [z]
  const int64_t* crow;     // [N + 1], or null for fixed k
  int64_t k, n_tokens, n_latents;

  __device__ int64_t begin(int64_t token) const { return crow != nullptr ? crow[token] : token * k; }
  __device__ int64_t end(int64_t token) const { return crow != nullptr ? crow[token + 1] : (token + 1) * k; }
  // The token of an entry: the last that begins at or before it and is not empty.
  __device__ int64_t token_of(int64_t entry) const {
    if (crow == nullptr) {
      return entry / k;
    }
    int64_t low = 0, high = n_tokens - 1;
    while (low < high) {
      const int64_t middle = (low + high + 1) / 2;
      if (crow[middle] <= entry) {
        low = middle;
      } else {
        high = middle - 1;
      }
    }
    return low;
  }
};

}  // namespace darkmatter::cuda
