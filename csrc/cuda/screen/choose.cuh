// The end of the choice of pursuit: the atom of the largest float64 product with a token's residual, among those whose
// bounds reach it. Products that fall short of the largest by at most the token's noise are equal to it, and the lowest
// index is taken. The bounds of such a token are wider by its noise (TokenBounds::extra): with b the largest product,
// every lower bound is at most b - noise, so no product of b - noise or more has an upper bound below the limit.
//
// Budget: the few candidates' rows, a warp each; tokens with more than a list of them see all atoms twice.
#pragma once

#include "cuda/kernels/exact_tile.cuh"
#include "cuda/screen/finish.cuh"

namespace darkmatter::cuda {

struct ChooseShared {
  int count;
  unsigned long long best, lowest;
};

// <row, w> by one warp. Its order of summation is its own: what it may change is noise.
template <typename W>
__device__ double warp_dot(const double* row, const W* w, int64_t d) {
  double sum = 0.0;
  int64_t e = threadIdx.x % 32;
  for (; e + 32 * (kAhead - 1) < d; e += 32 * kAhead) {
    W ahead[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      ahead[i] = w[e + 32 * i];
    }
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      sum = fma(row[e + 32 * i], widen(ahead[i]), sum);
    }
  }
  for (; e < d; e += 32) {
    sum = fma(row[e], widen(w[e]), sum);
  }
  return warp_sum(sum);
}

// Grid: tokens of the tile.
template <typename W>
__global__ void __launch_bounds__(kThreads) finish_choice_kernel(
    ExactProducts<double, W> exact, ScreenedTokens tokens, CandidateLists lists, const double* __restrict__ noise,
    int64_t* __restrict__ choice) {
  const int64_t token = blockIdx.x;
  if (tokens.exact[token] != kByScreen) {
    return;  // the whole block
  }
  Arena arena{shared_memory()};
  double* products = arena.take<double>(kList);
  int32_t* atoms = arena.take<int32_t>(kList);
  ChooseShared& shared = *arena.take<ChooseShared>(1);
  if (threadIdx.x == 0) {
    shared.count = 0;
    shared.best = 0;
    shared.lowest = ~0ull;
  }
  __syncthreads();
  const float limit = key_float(lists.limit[token]);
  for (int range = 0; range < lists.ranges; ++range) {
    const CandidateList list(lists, token, range);
    const int count = lists.count[token * lists.ranges + range];
    for (int i = threadIdx.x; i < count; i += kThreads) {
      if (!(list.upper[i] < limit)) {
        const int place = atomicAdd(&shared.count, 1);
        if (place < kList) {
          atoms[place] = list.latent[i];
        }
      }
    }
  }
  __syncthreads();
  const int count = shared.count;
  if (count > kList) {
    if (threadIdx.x == 0) {
      tokens.exact[token] = kExactly;
    }
    return;  // the whole block
  }
  for (int p = threadIdx.x / 32; p < count; p += kWarps) {
    const double product = warp_dot(exact.x + token * exact.d, exact.weight + atoms[p] * exact.d, exact.d);
    if (threadIdx.x % 32 == 0) {
      products[p] = product;
      atomicMax(&shared.best, static_cast<unsigned long long>(ordered_key(product)));
    }
  }
  __syncthreads();
  const double enough = key_double(shared.best) - noise[token];
  for (int p = threadIdx.x; p < count; p += kThreads) {
    if (!(products[p] < enough)) {
      atomicMin(&shared.lowest, static_cast<unsigned long long>(atoms[p]));
    }
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    choice[token] = static_cast<int64_t>(shared.lowest);
  }
}

// The marked tokens, one look at all atoms: first the largest product of each token (lowest null), then the lowest atom
// whose product is as large. Any grid. lowest begins at -1, the largest unsigned number; best [N] at 0.
template <typename W>
__global__ void __launch_bounds__(kThreads, kExactBlocks) exact_choice_kernel(
    ExactProducts<double, W> exact, MarkedTokens marked, const double* __restrict__ noise,
    unsigned long long* __restrict__ best, unsigned long long* __restrict__ lowest) {
  ExactShared& shared = *Arena{shared_memory()}.take<ExactShared>(1);
  const auto number = static_cast<int64_t>(*marked.number);
  const int64_t tiles = ceil_div(exact.n_latents, kExactLatents), items = ceil_div(number, kExactTokens) * tiles;
  for (int64_t item = blockIdx.x; item < items; item += gridDim.x) {
    __syncthreads();  // the tokens of the item before are done with
    load_group(marked, item / tiles, number, shared);
    exact_tile(exact, item % tiles * kExactLatents, shared, [&](int t, int64_t latent, double product) {
      const int64_t token = shared.tokens[t];
      if (lowest == nullptr) {
        atomicMax(&best[token], static_cast<unsigned long long>(ordered_key(product)));
      } else if (!(product < key_double(best[token]) - noise[token])) {
        atomicMin(&lowest[token], static_cast<unsigned long long>(latent));
      }
    });
  }
}

}  // namespace darkmatter::cuda
