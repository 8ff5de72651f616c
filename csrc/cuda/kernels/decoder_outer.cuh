// decoder_outer on the GPU: the active latents sorted by latent, and sums of the tokens' rows over each latent.
//
// Budget: F d elements written, z d read (z active latents in all). What is read lies in L2 or nearer: blocks run
// through all latents of one slice of kOuterBytes columns before the next slice; of a slice of x (4096 tokens: 1 MB)
// the L1 of a multiprocessor holds a fifth. In training a latent has few entries (F 131072, N 4096, k 64: two), so a
// warp a latent would be all latency: start, tokens, rows, store, one after the other. Here a group of threads owns a
// run of latents, whose entries are one stretch of the sorted list, and goes through it without stopping at their
// borders: kDecodeAhead rows at a time, with the next entries already on their way. Slices of a whole warp would read
// more from L2, slices of a cache line would leave lanes idle at borders, where float64 becomes T (16 a clock and
// multiprocessor).
//
// Sums are in float64 in stored order, one thread a column, as in sparse_decode.cuh.
#pragma once

#include "cuda/kernels/active.cuh"
#include "cuda/kernels/packet.cuh"

namespace darkmatter::cuda {

constexpr int kOuterBytes = 256;   // of a row: 16 threads of 16 bytes
constexpr int kOuterEntries = 32;  // of the latents of a group on average: four times kDecodeAhead
constexpr int kMaxRun = 32;        // latents a group, however few entries they have

// Threads a row where one takes kWidth elements.
template <typename T, int kWidth>
DM_HOST_DEVICE constexpr int outer_lanes() {
  constexpr int kWanted = kOuterBytes / sizeof(T) / kWidth;
  return kWanted < 32 ? kWanted : 32;
}

// Keys to sort entries by: the latent, and n_latents for one out of range, which belongs to no row. 32 bits are half
// the passes of 64.
static __global__ void __launch_bounds__(kThreads)
    latent_keys_kernel(const int64_t* __restrict__ indices, int64_t n, int64_t n_latents, int32_t* __restrict__ keys) {
  const int64_t at = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (at < n) {
    const int64_t latent = indices[at];
    keys[at] = static_cast<int32_t>(latent >= 0 && latent < n_latents ? latent : n_latents);
  }
}

// The sorted entries as segments: starts [F + 1], and the token and value of each entry in that order.
template <typename T>
__global__ void __launch_bounds__(kThreads) segments_kernel(
    const int32_t* __restrict__ sorted,  // [z] latents
    const int64_t* __restrict__ order,   // [z] where each was
    int64_t n, ActiveLatents active, const T* __restrict__ values, int64_t* __restrict__ starts,
    int32_t* __restrict__ tokens, T* __restrict__ own) {
  const int64_t at = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (at <= active.n_latents) {  // the first entry whose latent is not below `at`
    int64_t low = 0, high = n;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      (sorted[middle] < at ? low : high) = sorted[middle] < at ? middle + 1 : middle;
    }
    starts[at] = low;
  }
  if (at < n) {
    const int64_t entry = order[at];
    own[at] = values[entry];
    tokens[at] = static_cast<int32_t>(active.token_of(entry));
  }
}

// Entries sorted by latent.
template <typename T>
struct Segments {
  const int64_t* starts;   // [F + 1]
  const int32_t* latents;  // [z]
  const int32_t* tokens;   // [z]
  const T* values;         // [z]
  int64_t n_latents;
};

// out_j = sum over the entries a of latent j of values_a rows[tokens_a]; zeros for a latent without entries.
// A group of outer_lanes threads takes `run` latents and a slice of columns.
template <typename T, int kWidth>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 2 ? 2 : kDecodeBlocks) decoder_outer_kernel(
    Segments<T> segments, int64_t run,
    const T* __restrict__ rows,  // [N, d]
    int64_t d, T* __restrict__ out) {
  using Row = Packet<T, kWidth>;
  constexpr int kLanesARow = outer_lanes<T, kWidth>();
  static_assert(kLanesARow >= kDecodeAhead, "an entry a lane");
  const int lane = threadIdx.x % kLanesARow, leader = threadIdx.x % 32 - lane;
  const int64_t group = static_cast<int64_t>(blockIdx.x) * (kThreads / kLanesARow) + threadIdx.x / kLanesARow;
  const int64_t column = (static_cast<int64_t>(blockIdx.y) * kLanesARow + lane) * kWidth;
  // Every lane stays to the end, with nothing of its own to do beyond the last latent or column: exchanges of whole
  // warps are cheaper than those of groups.
  int32_t latent = static_cast<int32_t>(group * run < segments.n_latents ? group * run : segments.n_latents);
  const int32_t last = static_cast<int32_t>(latent + run < segments.n_latents ? latent + run : segments.n_latents);
  int64_t a = segments.starts[latent];
  const int64_t stop = segments.starts[last];
  const T* from = rows + (column < d ? column : 0);
  T* to = out + latent * d + column;
  double sum[kWidth] = {};
  const auto finish_latent = [&] {
    Row result;
#pragma unroll
    for (int c = 0; c < kWidth; ++c) {
      result.element[c] = rounded<T>(sum[c]);
      sum[c] = 0.0;
    }
    if (column < d) {
      store_packet(to, result);
    }
    to += d;
    ++latent;
  };
  // Each lane holds one of the next kDecodeAhead entries. Those beyond `stop` are of latent `last`, which is not
  // written here, and of row 0.
  int32_t entry_latent = 0, token = 0;
  double value = 0.0;
  const auto fetch = [&](int64_t first) {
    const bool inside = lane < kDecodeAhead && first + lane < stop;
    entry_latent = inside ? segments.latents[first + lane] : last;
    token = inside ? segments.tokens[first + lane] : 0;
    value = inside ? widen(segments.values[first + lane]) : 0.0;
  };
  fetch(a);
  for (; __ballot_sync(kAllLanes, a < stop) != 0; a += kDecodeAhead) {
    Row ahead[kDecodeAhead];
#pragma unroll
    for (int i = 0; i < kDecodeAhead; ++i) {
      const int64_t row = __shfl_sync(kAllLanes, token, leader + i);
      ahead[i] = *reinterpret_cast<const Row*>(from + row * d);
    }
    const int32_t latents = entry_latent;
    const double values = value;
    fetch(a + kDecodeAhead);
#pragma unroll
    for (int i = 0; i < kDecodeAhead; ++i) {
      const int32_t own = __shfl_sync(kAllLanes, latents, leader + i);
      const double factor = __shfl_sync(kAllLanes, values, leader + i);
#pragma unroll 1
      while (latent < own) {
        finish_latent();
      }
#pragma unroll
      for (int c = 0; c < kWidth; ++c) {
        sum[c] = fma(factor, widen(ahead[i].element[c]), sum[c]);
      }
    }
  }
  while (latent < last) {
    finish_latent();
  }
}

}  // namespace darkmatter::cuda
