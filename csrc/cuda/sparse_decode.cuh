// sparse_decode on the GPU: one block a token and a slice of columns; raw pointers, no framework.
//
// Budget: each active latent's row of W_dec crosses memory once (k d elements a token), values and indices are
// broadcast reads. Sums are in float64 in stored order, one thread a column, so the result equals the CPU's to the bit
// for float32 and 16-bit input: their products are exact in float64.
#pragma once

#include <cstdint>

namespace darkmatter {

constexpr int kDecodeThreads = 128;

template <typename T>
__device__ inline double widened(T value) {
  return static_cast<double>(static_cast<float>(value));
}
template <>
__device__ inline double widened(double value) {
  return value;
}
template <typename T>
__device__ inline T narrowed(double value) {
  return static_cast<T>(static_cast<float>(value));
}
template <>
__device__ inline double narrowed<double>(double value) {
  return value;
}

template <typename T>
__global__ void sparse_decode_kernel(
    const T* __restrict__ values,         // [N, k] or [z]
    const int64_t* __restrict__ indices,  // [N, k] or [z]
    const int64_t* __restrict__ crow,     // [N + 1], or null for fixed k
    int64_t k,
    const T* __restrict__ W_dec,  // [F, d]
    const T* __restrict__ b_dec,  // [d] or null
    int64_t n_latents, int64_t d,
    T* __restrict__ out) {  // [N, d]
  const int64_t token = blockIdx.x;
  const int64_t column = static_cast<int64_t>(blockIdx.y) * kDecodeThreads + threadIdx.x;
  if (column >= d) {
    return;
  }
  const int64_t begin = crow ? crow[token] : token * k;
  const int64_t end = crow ? crow[token + 1] : begin + k;
  double sum = b_dec ? widened(b_dec[column]) : 0.0;
  for (int64_t a = begin; a < end; ++a) {
    const int64_t latent = indices[a];
    // An index out of range would read foreign memory; without a host sync the honest answer is NaN.
    const bool valid = latent >= 0 && latent < n_latents;
    const double factor = valid ? widened(values[a]) : __longlong_as_double(0x7ff8000000000000);
    if (factor != 0.0) {
      sum = fma(factor, valid ? widened(W_dec[latent * d + column]) : 1.0, sum);
    }
  }
  out[token * d + column] = narrowed<T>(sum);
}

}  // namespace darkmatter
