// A matrix with its dimensions exchanged, through tiles in shared memory: read and written once, in whole cache lines.
#pragma once

#include "cuda/kernels/block.cuh"
#include "cuda/kernels/packet.cuh"

namespace darkmatter::cuda {

constexpr int kSide = 64;            // of a tile: 128 bytes of the narrowest type
constexpr int kTileRow = kSide + 1;  // elements from one row of the tile to the next: columns lie in all banks
constexpr int64_t kMostRows = int64_t{65535} * kSide;  // of the matrix: blockIdx.y has 16 bits

// to [n_columns, n_rows] = from [n_rows, n_columns], rows of which are `ld` elements apart. T stands for any type of
// its size. With kWidth above 1, n_rows, n_columns, ld and both addresses are multiples of it.
template <typename T, int kWidth>
__global__ void __launch_bounds__(kThreads)
    transpose_kernel(const T* __restrict__ from, int64_t ld, int64_t n_rows, int64_t n_columns, T* __restrict__ to) {
  using Part = Packet<T, kWidth>;
  constexpr int kParts = kSide / kWidth, kAtOnce = kThreads / kParts, kRounds = kSide / kAtOnce;
  const int part = static_cast<int>(threadIdx.x) % kParts * kWidth, own = static_cast<int>(threadIdx.x) / kParts;
  const int64_t row = static_cast<int64_t>(blockIdx.y) * kSide, column = static_cast<int64_t>(blockIdx.x) * kSide;
  T* tile = reinterpret_cast<T*>(shared_memory());  // [column][row]
  Part held[kRounds];
#pragma unroll
  for (int i = 0; i < kRounds; ++i) {
    const int64_t at = row + own + i * kAtOnce;
    if (at < n_rows && column + part < n_columns) {
      held[i] = *reinterpret_cast<const Part*>(from + at * ld + column + part);
    }
  }
#pragma unroll
  for (int i = 0; i < kRounds; ++i) {
#pragma unroll
    for (int c = 0; c < kWidth; ++c) {
      tile[(part + c) * kTileRow + own + i * kAtOnce] = held[i].element[c];
    }
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kRounds; ++i) {
    const int at = own + i * kAtOnce;
#pragma unroll
    for (int c = 0; c < kWidth; ++c) {
      held[i].element[c] = tile[at * kTileRow + part + c];
    }
    if (column + at < n_columns && row + part < n_rows) {
      store_packet(to + (column + at) * n_rows + row + part, held[i]);
    }
  }
}

}  // namespace darkmatter::cuda
