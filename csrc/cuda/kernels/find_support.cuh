// The nonzero entries of dense acts (NaN is one, -0 is not), in two passes: how many, then which.
//
// Budget: two reads of the array, 16 bytes a thread. Each warp has an eighth of a row, so that a prefix sum of the
// counts says where it writes and no two threads have to agree on anything.
#pragma once

#include "cuda/kernels/block.cuh"
#include "cuda/kernels/packet.cuh"

namespace darkmatter::cuda {

// The part of a row a warp reads.
struct RowPart {
  int64_t begin, end;

  __device__ RowPart(int64_t n_latents, int width) {
    const int64_t part = ceil_div(ceil_div(n_latents, kWarps), 32 * width) * 32 * width;
    begin = threadIdx.x / 32 * part;
    end = begin + part < n_latents ? begin + part : n_latents;
  }
};

// Bit c is set where element c of the packet is nonzero.
template <typename T, int kWidth>
__device__ unsigned nonzero_bits(const T* row, int64_t at, int64_t end) {
  if (at >= end) {
    return 0;
  }
  const auto packet = *reinterpret_cast<const Packet<T, kWidth>*>(row + at);
  unsigned bits = 0;
#pragma unroll
  for (int c = 0; c < kWidth; ++c) {
    bits |= widen(packet.element[c]) == 0.0 ? 0u : 1u << c;
  }
  return bits;
}

template <typename T, int kWidth>
__global__ void __launch_bounds__(kThreads)
    count_support_kernel(const T* __restrict__ acts, int64_t n_latents, int64_t* __restrict__ counts) {  // [N, kWarps]
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const T* row = acts + static_cast<int64_t>(blockIdx.x) * n_latents;
  const RowPart part(n_latents, kWidth);
  int count = 0;
  for (int64_t at = part.begin + lane * kWidth; at < part.end; at += 32 * kWidth) {
    count += __popc(nonzero_bits<T, kWidth>(row, at, part.end));
  }
  for (int step = 16; step > 0; step /= 2) {
    count += __shfl_xor_sync(kAllLanes, count, step);
  }
  if (lane == 0) {
    counts[static_cast<int64_t>(blockIdx.x) * kWarps + warp] = count;
  }
}

template <typename T, int kWidth>
__global__ void __launch_bounds__(kThreads) write_support_kernel(
    const T* __restrict__ acts, int64_t n_latents,
    const int64_t* __restrict__ up_to,  // [N, kWarps] sums of the counts, this one included
    const int64_t* __restrict__ counts, int64_t* __restrict__ col) {
  const int lane = threadIdx.x % 32;
  const int64_t own = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  const T* row = acts + static_cast<int64_t>(blockIdx.x) * n_latents;
  const RowPart part(n_latents, kWidth);
  int64_t next = up_to[own] - counts[own];
  for (int64_t from = part.begin; from < part.end; from += 32 * kWidth) {  // the same steps for all lanes
    const int64_t at = from + lane * kWidth;
    const unsigned bits = nonzero_bits<T, kWidth>(row, at, part.end);
    if (__ballot_sync(kAllLanes, bits != 0) == 0) {
      continue;
    }
    int before = __popc(bits);
    for (int step = 1; step < 32; step *= 2) {
      const int other = __shfl_up_sync(kAllLanes, before, step);
      before += lane >= step ? other : 0;
    }
    const int total = __shfl_sync(kAllLanes, before, 31);
    int64_t to = next + before - __popc(bits);
#pragma unroll
    for (int c = 0; c < kWidth; ++c) {
      if (bits >> c & 1) {
        col[to++] = at + c;
      }
    }
    next += total;
  }
}

}  // namespace darkmatter::cuda
