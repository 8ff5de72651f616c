// What the threads of one block do together: scans, the k-th largest, sorting. All threads of the block must call.
//
// Shared memory is dynamic throughout, cut into arrays by Arena: one mechanism, and one place to add up what a kernel
// needs.
#pragma once

#include <cuda_runtime.h>

#include "cuda/kernels/numeric.cuh"

namespace darkmatter::cuda {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr unsigned kAllLanes = 0xffffffffu;

__device__ inline unsigned char* shared_memory() {
  extern __shared__ __align__(16) unsigned char memory[];
  return memory;
}

// Cuts a stretch of memory into arrays; on the host, from null, it adds up their bytes.
struct Arena {
  unsigned char* at;
  size_t used = 0;

  template <typename E>
  DM_HOST_DEVICE E* take(int64_t n) {
    used = (used + 15) / 16 * 16;
    E* array = reinterpret_cast<E*>(at + used);
    used += n * sizeof(E);
    return array;
  }
};

// Scratch of the functions below.
struct BlockScratch {
  int histogram[kThreads];
  int warp_total[kWarps];
  int chosen, rank;
};

// Sum over this thread and those before it.
__device__ inline int inclusive_scan(int value, BlockScratch& scratch) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  for (int step = 1; step < 32; step *= 2) {
    const int before = __shfl_up_sync(kAllLanes, value, step);
    value += lane >= step ? before : 0;
  }
  if (lane == 31) {
    scratch.warp_total[warp] = value;
  }
  __syncthreads();
  for (int w = 0; w < warp; ++w) {
    value += scratch.warp_total[w];
  }
  __syncthreads();
  return value;
}

// The k-th largest of the keys of all threads, 1 <= k <= their number; a key of 0 stands for nothing. A radix select,
// eight bits a pass.
template <int kKeys>
__device__ uint32_t kth_largest(const uint32_t (&keys)[kKeys], int k, BlockScratch& scratch) {
  static_assert(kThreads == 256, "one bin a thread");
  uint32_t prefix = 0, known = 0;
  for (int shift = 24; shift >= 0; shift -= 8) {
    scratch.histogram[threadIdx.x] = 0;
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kKeys; ++i) {
      if (keys[i] != 0 && (keys[i] & known) == prefix) {
        atomicAdd(&scratch.histogram[keys[i] >> shift & 255], 1);
      }
    }
    __syncthreads();
    const int bin = 255 - static_cast<int>(threadIdx.x), count = scratch.histogram[bin];
    const int so_far = inclusive_scan(count, scratch);
    if (so_far >= k && so_far - count < k) {
      scratch.chosen = bin;
      scratch.rank = k - (so_far - count);
    }
    __syncthreads();
    prefix |= static_cast<uint32_t>(scratch.chosen) << shift;
    known |= 255u << shift;
    k = scratch.rank;
    __syncthreads();
  }
  return prefix;
}

// Sorts n keys in shared memory, the largest first; n is a power of two.
__device__ inline void sort_descending(uint64_t* keys, int n) {
  for (int size = 2; size <= n; size *= 2) {
    for (int stride = size / 2; stride > 0; stride /= 2) {
      __syncthreads();
      for (int pair = threadIdx.x; pair < n / 2; pair += kThreads) {
        const int i = pair / stride * 2 * stride + pair % stride, j = i + stride;
        const bool descending = (i & size) == 0;
        if ((keys[i] < keys[j]) == descending) {
          const uint64_t other = keys[i];
          keys[i] = keys[j];
          keys[j] = other;
        }
      }
    }
  }
  __syncthreads();
}

// The sum of the values of all threads, in a fixed order.
__device__ inline double block_sum(double value, double (&partial)[kWarps]) {
  for (int step = 16; step > 0; step /= 2) {
    value += __shfl_xor_sync(kAllLanes, value, step);
  }
  __syncthreads();
  if (threadIdx.x % 32 == 0) {
    partial[threadIdx.x / 32] = value;
  }
  __syncthreads();
  double sum = 0.0;
  for (int w = 0; w < kWarps; ++w) {
    sum += partial[w];
  }
  return sum;
}

DM_HOST_DEVICE inline int next_power_of_two(int n) {
  int power = 1;
  while (power < n) {
    power *= 2;
  }
  return power;
}

// <x, w> in float64 by eight neighbouring threads: element e is added into lane e mod 8, the lanes by one fixed tree,
// as on the CPU (cpu/kernels/kernels.h): the same to the bit. x is a row of doubles or of the type of w.
constexpr int kLanes = 8;
constexpr int kGroups = kThreads / kLanes;  // dot products a block has in flight
constexpr int kAhead = 16;                  // loads a thread has in flight: with 3 blocks, 48 KB a multiprocessor
constexpr int kDotBlocks = 3;               // a multiprocessor: 80 registers a thread

template <typename X, typename T>
__device__ double lanes_dot(const X* x, const T* w, int64_t d) {
  const int lane = threadIdx.x % kLanes;
  double sum = 0.0;
  int64_t e = lane;
  for (; e + kLanes * (kAhead - 1) < d; e += kLanes * kAhead) {
    T ahead[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      ahead[i] = w[e + kLanes * i];
    }
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      sum = fma(widen(x[e + kLanes * i]), widen(ahead[i]), sum);
    }
  }
  for (; e < d; e += kLanes) {
    sum = fma(widen(x[e]), widen(w[e]), sum);
  }
  const unsigned mask = 0xffu << (threadIdx.x % 32 / kLanes * kLanes);
  sum += __shfl_xor_sync(mask, sum, 4);
  sum += __shfl_xor_sync(mask, sum, 2);
  sum += __shfl_xor_sync(mask, sum, 1);
  return sum;
}

// A row in shared memory as doubles, so that it is converted once; null where it does not fit.
template <typename T>
__device__ const double* stage_row(const T* row, int64_t d, double* staged) {
  if (staged != nullptr) {
    for (int64_t e = threadIdx.x; e < d; e += kThreads) {
      staged[e] = widen(row[e]);
    }
    __syncthreads();
  }
  return staged;
}
constexpr int64_t kMaxStaged = 7168;  // 56 KB: with the lists of the kernels below 99 KB, what every GPU since 8.0 has

// <row, w> with the row staged or not.
template <typename T>
__device__ double row_dot(const double* staged, const T* row, const T* w, int64_t d) {
  return staged != nullptr ? lanes_dot(staged, w, d) : lanes_dot(row, w, d);
}

}  // namespace darkmatter::cuda
