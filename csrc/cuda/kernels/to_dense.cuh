// Dense acts: one thread a token writes its active latents into zeros.
#pragma once

#include "cuda/kernels/active.cuh"

namespace darkmatter::cuda {

// dense[token, indices_a] += values_a: a latent stored twice adds up, one thread a token at a time in stored order.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    to_dense_kernel(const T* __restrict__ values, ActiveLatents active, T* __restrict__ dense) {
  const int64_t token = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (token >= active.n_tokens) {
    return;
  }
  for (int64_t a = active.begin(token); a < active.end(token); ++a) {
    const int64_t latent = active.indices[a];
    if (latent >= 0 && latent < active.n_latents) {
      T& place = dense[token * active.n_latents + latent];
      place = rounded<T>(widen(place) + widen(values[a]));
    }
  }
}

}  // namespace darkmatter::cuda
