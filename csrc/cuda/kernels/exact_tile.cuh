// Exact float64 products of a few tokens with a few latents: a row of weights is read once for kExactTokens tokens.
//
// Budget of a tile, 8 tokens by 64 latents: 64 d elements of weights from memory, 8 d of tokens from L2, 512 d float64
// multiply-adds (a multiprocessor has 64 a clock on an A100 or H100: 8 d clocks) and as many clocks of shared memory.
// Sums are those of lanes_dot to the bit: element e is added into lane e mod 8, the lanes by the same tree.
#pragma once

#include "cuda/kernels/block.cuh"

namespace darkmatter::cuda {

constexpr int kExactTokens = kLanes;  // one for each lane of a group
constexpr int kExactOfGroup = 2;      // latents of a group of lanes
constexpr int kExactLatents = kGroups * kExactOfGroup;
constexpr int kSlab = 512;  // columns of the tokens staged at a time, as doubles: 32 KB
constexpr int kExactAhead = 8;
constexpr int kExactBlocks = 2;  // a multiprocessor: 128 registers a thread

template <typename X, typename W>
struct ExactProducts {
  const X* x;          // [n, d]
  const W* weight;     // [F, d]
  const double* bias;  // [F], or null
  int64_t d, n_latents;
};

// Shared memory of a tile.
struct ExactShared {
  double slab[kExactTokens * kSlab];
  int64_t tokens[kExactTokens];  // -1: none
};

// visit(t, latent, h) once for every token shared.tokens[t] and every latent of [first, first + kExactLatents), by some
// thread. All threads of the block.
template <typename X, typename W, typename Visit>
__device__ void exact_tile(const ExactProducts<X, W>& of, int64_t first, ExactShared& shared, const Visit& visit) {
  __syncthreads();  // the tokens are written
  const int lane = threadIdx.x % kLanes;
  const int64_t latent = first + threadIdx.x / kLanes * kExactOfGroup;
  const W* rows[kExactOfGroup];
  double sums[kExactOfGroup][kExactTokens] = {};
#pragma unroll
  for (int l = 0; l < kExactOfGroup; ++l) {
    rows[l] = of.weight + (latent + l < of.n_latents ? latent + l : of.n_latents - 1) * of.d;
  }
  for (int64_t start = 0; start < of.d; start += kSlab) {
    const int width = of.d - start < kSlab ? static_cast<int>(of.d - start) : kSlab;
    __syncthreads();  // the slab before is done with
    for (int i = threadIdx.x; i < kExactTokens * kSlab; i += kThreads) {
      const int64_t token = shared.tokens[i / kSlab];
      const int column = i % kSlab;
      shared.slab[i] = token >= 0 && column < width ? widen(of.x[token * of.d + start + column]) : 0.0;
    }
    __syncthreads();
    const auto add = [&](int column, auto count) {
      W ahead[kExactOfGroup][count.value];
#pragma unroll
      for (int i = 0; i < count.value; ++i) {
#pragma unroll
        for (int l = 0; l < kExactOfGroup; ++l) {
          ahead[l][i] = rows[l][start + column + kLanes * i];
        }
      }
#pragma unroll
      for (int i = 0; i < count.value; ++i) {
#pragma unroll
        for (int t = 0; t < kExactTokens; ++t) {
          const double own = shared.slab[t * kSlab + column + kLanes * i];
#pragma unroll
          for (int l = 0; l < kExactOfGroup; ++l) {
            sums[l][t] = fma(own, widen(ahead[l][i]), sums[l][t]);
          }
        }
      }
    };
    int column = lane;
    for (; column + kLanes * (kExactAhead - 1) < width; column += kLanes * kExactAhead) {
      add(column, std::integral_constant<int, kExactAhead>());
    }
    for (; column < width; column += kLanes) {
      add(column, std::integral_constant<int, 1>());
    }
  }
#pragma unroll
  for (int l = 0; l < kExactOfGroup; ++l) {
    double mine = 0.0;  // of token number `lane`
#pragma unroll
    for (int t = 0; t < kExactTokens; ++t) {
      double sum = sums[l][t];
      sum += __shfl_xor_sync(kAllLanes, sum, 4);
      sum += __shfl_xor_sync(kAllLanes, sum, 2);
      sum += __shfl_xor_sync(kAllLanes, sum, 1);
      mine = t == lane ? sum : mine;
    }
    if (latent + l < of.n_latents && shared.tokens[lane] >= 0) {
      visit(lane, latent + l, of.bias != nullptr ? mine + of.bias[latent + l] : mine);
    }
  }
}

// The tokens with a mark, as a list in any order: nothing that is made of them depends on it.
struct MarkedTokens {
  int64_t* list;               // [n]
  unsigned long long* number;  // of them
};

static __global__ void __launch_bounds__(kThreads)
    list_marked_kernel(const int* __restrict__ marks, int64_t n, int mark, MarkedTokens marked) {
  const int64_t token = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (token < n && marks[token] == mark) {
    marked.list[atomicAdd(marked.number, 1ull)] = token;
  }
}

// The tokens of a group of kExactTokens marked ones into shared memory.
__device__ inline void load_group(const MarkedTokens& marked, int64_t group, int64_t number, ExactShared& shared) {
  if (threadIdx.x < kExactTokens) {
    const int64_t at = group * kExactTokens + threadIdx.x;
    shared.tokens[threadIdx.x] = at < number ? marked.list[at] : -1;
  }
}

}  // namespace darkmatter::cuda
