// The nonzero entries of dense acts (NaN is one, -0 is not), in two passes: how many, then which.
//
// Budget: two reads of the array, 16 bytes a thread. Each warp has an eighth of a row, so that a prefix sum of the
// counts says where it writes and no two threads have to agree on anything. In rows of fixed length the sum is over the
// warps of a block, and one launch does both passes.
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

// How many entries the warp's part has.
template <typename T, int kWidth>
__device__ int count_of_part(const T* row, const RowPart& part) {
  int count = 0;
  for (int64_t at = part.begin + threadIdx.x % 32 * kWidth; at < part.end; at += 32 * kWidth) {
    count += __popc(nonzero_bits<T, kWidth>(row, at, part.end));
  }
  for (int step = 16; step > 0; step /= 2) {
    count += __shfl_xor_sync(kAllLanes, count, step);
  }
  return count;
}

// Writes the latents of the warp's part to col[next] and after, but for those from col[end] on.
template <typename T, int kWidth>
__device__ void write_part(const T* row, const RowPart& part, int64_t next, int64_t end, int64_t* col) {
  const int lane = threadIdx.x % 32;
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
        if (to < end) {
          col[to] = at + c;
        }
        ++to;
      }
    }
    next += total;
  }
}

template <typename T, int kWidth>
__global__ void __launch_bounds__(kThreads)
    count_support_kernel(const T* __restrict__ acts, int64_t n_latents, int64_t* __restrict__ counts) {  // [N, kWarps]
  const int count =
      count_of_part<T, kWidth>(acts + static_cast<int64_t>(blockIdx.x) * n_latents, RowPart(n_latents, kWidth));
  if (threadIdx.x % 32 == 0) {
    counts[static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32] = count;
  }
}

template <typename T, int kWidth>
__global__ void __launch_bounds__(kThreads) write_support_kernel(
    const T* __restrict__ acts, int64_t n_latents,
    const int64_t* __restrict__ up_to,  // [N, kWarps] sums of the counts, this one included
    const int64_t* __restrict__ counts, int64_t* __restrict__ col) {
  const int64_t own = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  write_part<T, kWidth>(
      acts + static_cast<int64_t>(blockIdx.x) * n_latents, RowPart(n_latents, kWidth), up_to[own] - counts[own],
      up_to[own], col);
}

// Both in one, into rows of fixed length: indices [N, capacity], zeros after a token's own, and how many it has.
template <typename T, int kWidth>
__global__ void __launch_bounds__(kThreads) support_rows_kernel(
    const T* __restrict__ acts, int64_t n_latents, int64_t capacity, int64_t* __restrict__ indices,
    int64_t* __restrict__ found) {  // [N]
  int* counts = Arena{shared_memory()}.take<int>(kWarps);
  const int warp = threadIdx.x / 32;
  const T* row = acts + static_cast<int64_t>(blockIdx.x) * n_latents;
  const RowPart part(n_latents, kWidth);
  const int count = count_of_part<T, kWidth>(row, part);
  if (threadIdx.x % 32 == 0) {
    counts[warp] = count;
  }
  __syncthreads();
  int64_t before = 0, all = 0;
  for (int w = 0; w < kWarps; ++w) {
    before += w < warp ? counts[w] : 0;
    all += counts[w];
  }
  int64_t* own = indices + static_cast<int64_t>(blockIdx.x) * capacity;
  if (count > 0 && before < capacity) {  // the whole warp
    write_part<T, kWidth>(row, part, before, capacity, own);
  }
  for (int64_t place = all + threadIdx.x; place < capacity; place += kThreads) {
    own[place] = 0;
  }
  if (threadIdx.x == 0) {
    found[blockIdx.x] = all;
  }
}

}  // namespace darkmatter::cuda
