// sparse_decode and decoder_dot on the GPU: one warp a token and a slice of columns, one block a token.
//
// Budget: each active latent's row of W_dec is read once a token, 16 bytes a thread. Blocks run through the tokens of
// one slice of kSlice bytes before the next slice: of W_dec one slice (F kSlice bytes: 67 MB at F 131072) is in use at
// a time, so that rows several tokens share are found in L2. Few tokens do not fill the GPU so: then a thread has one
// column, four times the warps, and four times as many rows in flight (measured on an H200, 32 tokens of 64 latents at
// d 2304: 73 us without, against 43 of torch's embedding_bag).
//
// Sums are in float64 in stored order, one thread a column, so the result equals the CPU's to the bit for float32 and
// 16-bit input: their products are exact in float64.
#pragma once

#include <type_traits>

#include "cuda/kernels/active.cuh"
#include "cuda/kernels/packet.cuh"

namespace darkmatter::cuda {

constexpr int kSliceBytes = 512;  // of a row: 32 threads of 16 bytes

// out_i = b + sum over a of values_a rows[indices_a]. A value of 0 adds no row (relu leaves zeros), so an infinite row
// there does not make NaN (the row is fetched, which costs less than a branch). An index out of range would read
// foreign memory; without asking the host the honest answer is NaN.
template <typename T, int kWidth, int kAhead>
__global__ void __launch_bounds__(kThreads, kAhead > kDecodeAhead ? 2 : kDecodeBlocks) sparse_decode_kernel(
    const T* __restrict__ values, ActiveLatents active,
    const T* __restrict__ rows,  // [F, d]
    const T* __restrict__ bias,  // [d] or null
    int64_t d, T* __restrict__ out) {
  using Row = Packet<T, kWidth>;
  const int64_t token = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  const int64_t column = (static_cast<int64_t>(blockIdx.y) * 32 + threadIdx.x % 32) * kWidth;
  if (token >= active.n_tokens || column >= d) {
    return;
  }
  double sum[kWidth];
#pragma unroll
  for (int c = 0; c < kWidth; ++c) {
    sum[c] = bias != nullptr ? widen(bias[column + c]) : 0.0;
  }
  // Weights and rows of the entries from `a`; a stretch of kAhead has no branch, so that all its loads are in flight.
  const auto add = [&](int64_t a, auto count) {
    T given[count.value];
    bool valid[count.value];
    Row ahead[count.value];
#pragma unroll
    for (int i = 0; i < count.value; ++i) {
      const int64_t latent = active.indices[a + i];
      valid[i] = latent >= 0 && latent < active.n_latents;
      given[i] = values[a + i];
      ahead[i] = *reinterpret_cast<const Row*>(rows + (valid[i] ? latent : 0) * d + column);
    }
#pragma unroll
    for (int i = 0; i < count.value; ++i) {
      const double factor = valid[i] ? widen(given[i]) : static_cast<double>(NAN);
#pragma unroll
      for (int c = 0; c < kWidth; ++c) {
        const double with = fma(factor, widen(ahead[i].element[c]), sum[c]);
        sum[c] = factor == 0.0 ? sum[c] : with;
      }
    }
  };
  int64_t a = active.begin(token);
  const int64_t end = active.end(token);
  for (; a + kAhead <= end; a += kAhead) {
    add(a, std::integral_constant<int, kAhead>());
  }
  if constexpr (kAhead > kDecodeAhead) {
    for (; a + kDecodeAhead <= end; a += kDecodeAhead) {
      add(a, std::integral_constant<int, kDecodeAhead>());
    }
  }
  for (; a < end; ++a) {
    add(a, std::integral_constant<int, 1>());
  }
  Row result;
#pragma unroll
  for (int c = 0; c < kWidth; ++c) {
    result.element[c] = rounded<T>(sum[c]);
  }
  store_packet(out + token * d + column, result);
}

// out_a = <rows_i, W_dec[indices_a]> of the token i of a. One block a token.
template <typename T>
__global__ void __launch_bounds__(kThreads, kDotBlocks) decoder_dot_kernel(
    const T* __restrict__ rows, ActiveLatents active, const T* __restrict__ W_dec, int64_t d, bool staged,
    T* __restrict__ out) {
  const int64_t token = blockIdx.x;
  Arena arena{shared_memory()};
  double* storage = staged ? arena.take<double>(d) : nullptr;
  const T* own = rows + token * d;
  const double* row = stage_row(own, d, storage);
  const int64_t end = active.end(token);
  for (int64_t a = active.begin(token) + threadIdx.x / kLanes; a < end; a += kGroups) {
    const int64_t latent = active.indices[a];
    const bool valid = latent >= 0 && latent < active.n_latents;
    const double product = valid ? row_dot(row, own, W_dec + latent * d, d) : NAN;
    if (threadIdx.x % kLanes == 0) {
      out[a] = rounded<T>(product);
    }
  }
}

}  // namespace darkmatter::cuda
