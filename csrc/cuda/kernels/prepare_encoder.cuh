// Packing encoder weights: the bias of the exact path, and whether anything is NaN. (Codes: certificate.cuh.)
#pragma once

#include "cuda/kernels/block.cuh"

namespace darkmatter::cuda {

// bias_j = b_enc_j - <b_dec, w_j> in float64, summed as on the CPU. Eight threads a latent.
template <typename T>
__global__ void __launch_bounds__(kThreads) fold_bias_kernel(
    const T* __restrict__ rows, const T* __restrict__ b_enc, const T* __restrict__ b_dec, int64_t n, int64_t d,
    double* __restrict__ bias) {
  const int64_t latent = static_cast<int64_t>(blockIdx.x) * kGroups + threadIdx.x / kLanes;
  if (latent >= n) {
    return;  // whole groups of eight
  }
  const double shift = b_dec != nullptr ? lanes_dot(b_dec, rows + latent * d, d) : 0.0;
  if (threadIdx.x % kLanes == 0) {
    bias[latent] = widen(b_enc[latent]) - shift;
  }
}

// Counts the NaN of an array into found[0].
template <typename T>
__global__ void __launch_bounds__(kThreads)
    find_nan_kernel(const T* __restrict__ values, int64_t n, unsigned long long* __restrict__ found) {
  bool nan = false;
  for (int64_t e = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; e < n;
       e += static_cast<int64_t>(gridDim.x) * kThreads) {
    const double value = widen(values[e]);
    nan |= value != value;
  }
  if (nan) {
    atomicAdd(found, 1ull);
  }
}

}  // namespace darkmatter::cuda
