// Float64 numbers with rows of weights of another type, by one block a token: what pursuit carries from step to step.
#pragma once

#include <type_traits>

#include "cuda/kernels/active.cuh"
#include "cuda/kernels/block.cuh"
#include "cuda/kernels/packet.cuh"

namespace darkmatter::cuda {

constexpr int kRowsAhead = 8;  // a thread has in flight

// visit(column, sum over a of factors_a rows[atoms_a, column]) for every column. A thread has kWidth neighbouring
// columns, so that 16 bytes are loaded at once; d is a multiple of kWidth. A factor of 0 adds nothing, whatever its row
// holds.
template <int kWidth, typename W, typename Visit>
__device__ void weighted_columns(
    const W* rows, int64_t d, const int64_t* atoms, const double* factors, int count, const Visit& visit) {
  using Row = Packet<W, kWidth>;
  for (int64_t column = static_cast<int64_t>(threadIdx.x) * kWidth; column < d; column += kThreads * kWidth) {
    double sum[kWidth] = {};
    const auto add = [&](int a, auto n) {
      Row ahead[n.value];
#pragma unroll
      for (int i = 0; i < n.value; ++i) {
        ahead[i] = *reinterpret_cast<const Row*>(rows + atoms[a + i] * d + column);
      }
#pragma unroll
      for (int i = 0; i < n.value; ++i) {
        const double factor = factors[a + i];
#pragma unroll
        for (int c = 0; c < kWidth; ++c) {
          const double with = fma(factor, widen(ahead[i].element[c]), sum[c]);
          sum[c] = factor == 0.0 ? sum[c] : with;
        }
      }
    };
    int a = 0;
    for (; a + kRowsAhead <= count; a += kRowsAhead) {
      add(a, std::integral_constant<int, kRowsAhead>());
    }
    for (; a < count; ++a) {
      add(a, std::integral_constant<int, 1>());
    }
#pragma unroll
    for (int c = 0; c < kWidth; ++c) {
      visit(column + c, sum[c]);
    }
  }
}

// out [N, d] = sums of rows [F, d] weighted by values [N, k]. An index out of range makes NaN. Grid: tokens.
template <typename W, int kWidth>
__global__ void __launch_bounds__(kThreads, kDecodeBlocks) wide_decode_kernel(
    const double* __restrict__ values, ActiveLatents active, const W* __restrict__ rows, int64_t d,
    double* __restrict__ out) {
  const int64_t token = blockIdx.x, begin = active.begin(token);
  const int count = static_cast<int>(active.k);
  Arena arena{shared_memory()};
  int64_t* atoms = arena.take<int64_t>(active.k);
  double* factors = arena.take<double>(active.k);
  for (int a = threadIdx.x; a < count; a += kThreads) {
    const int64_t atom = active.indices[begin + a];
    const bool valid = atom >= 0 && atom < active.n_latents;
    atoms[a] = valid ? atom : 0;
    factors[a] = valid ? values[begin + a] : static_cast<double>(NAN);
  }
  __syncthreads();
  weighted_columns<kWidth>(
      rows, d, atoms, factors, count, [&](int64_t column, double sum) { out[token * d + column] = sum; });
}

// out [N, k] = <own_i, rows[indices]>. Grid: tokens.
template <typename W>
__global__ void __launch_bounds__(kThreads, kDotBlocks) wide_dot_kernel(
    const double* __restrict__ own, ActiveLatents active, const W* __restrict__ rows, int64_t d,
    double* __restrict__ out) {
  const int64_t token = blockIdx.x, end = active.end(token);
  for (int64_t a = active.begin(token) + threadIdx.x / kLanes; a < end; a += kGroups) {
    const int64_t atom = active.indices[a];
    const bool valid = atom >= 0 && atom < active.n_latents;
    const double product = lanes_dot(own + token * d, rows + (valid ? atom : 0) * d, d);
    if (threadIdx.x % kLanes == 0) {
      out[a] = valid ? product : static_cast<double>(NAN);
    }
  }
}

}  // namespace darkmatter::cuda
