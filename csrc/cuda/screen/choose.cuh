// The end of the choice of pursuit: the atom of the largest float64 product with a token's residual, among those whose
// bounds reach it. Products that fall short of the largest by at most the token's noise are equal to it, and the lowest
// index is taken. The bounds of such a token are wider by its noise (TokenBounds::extra): with b the largest product,
// every lower bound is at most b - noise, so no product of b - noise or more has an upper bound below the limit.
//
// Budget: the few candidates' rows; tokens with more than a list of them see all atoms twice.
#pragma once

#include "cuda/kernels/exact_tile.cuh"
#include "cuda/screen/finish.cuh"

namespace darkmatter::cuda {

constexpr int kByBlock = 2;  // candidates that are done one after the other by all threads

struct ChooseShared {
  int count;
  uint32_t limit;  // ordered_key
  double partial[kWarps];
};

// <row, w> by one warp, or by the whole block: a row is a long wait for a warp. The order of summation is each one's
// own: what it may change is noise.
template <typename W>
__device__ double warp_dot(const double* row, const W* w, int64_t d) {
  constexpr int kAtOnce = 8;
  double sum = 0.0;
  int64_t e = threadIdx.x % 32;
  for (; e + 32 * (kAtOnce - 1) < d; e += 32 * kAtOnce) {
    W ahead[kAtOnce];
    double own[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      ahead[i] = w[e + 32 * i];
      own[i] = row[e + 32 * i];
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      sum = fma(own[i], widen(ahead[i]), sum);
    }
  }
  for (; e < d; e += 32) {
    sum = fma(row[e], widen(w[e]), sum);
  }
  return warp_sum(sum);
}
template <typename W>
__device__ double block_dot(const double* row, const W* w, int64_t d, double (&partial)[kWarps]) {
  double sum = 0.0;
#pragma unroll 4
  for (int64_t e = threadIdx.x; e < d; e += kThreads) {
    sum = fma(row[e], widen(w[e]), sum);
  }
  return block_sum(sum, partial);
}

// The atoms that a token's lists let in, those whose upper bound reaches the largest lower bound. Returns how many;
// more than kList are too many. All threads.
__device__ inline int gather_best(const CandidateLists& lists, int64_t token, int32_t* atoms, ChooseShared& shared) {
  if (threadIdx.x == 0) {
    shared.count = 0;
    shared.limit = lists.limit[token];
  }
  __syncthreads();
  // All ranges at once, each by its share of the threads: one after the other they would be as many waits.
  const int share = kThreads / lists.ranges, range = static_cast<int>(threadIdx.x) / share;
  const bool has_range = range < lists.ranges;
  const CandidateList list(lists, token, has_range ? range : 0);
  const int in_range = has_range ? lists.count[token * lists.ranges + range] : 0;
  const auto visit = [&](const auto& look) {
    for (int i = static_cast<int>(threadIdx.x) % share; i < in_range; i += share) {
      look(i);
    }
    __syncthreads();
  };
  visit([&](int i) { atomicMax(&shared.limit, ordered_key(twice_below(margin_of<float>(), list.lower[i]))); });
  const float limit = key_float(shared.limit);
  visit([&](int i) {
    if (!(list.upper[i] < limit)) {
      const int place = atomicAdd(&shared.count, 1);
      if (place < kList) {
        atoms[place] = list.latent[i];
      }
    }
  });
  return shared.count;
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
  const int count = gather_best(lists, token, atoms, shared);
  if (count > kList) {
    if (threadIdx.x == 0) {
      tokens.exact[token] = kExactly;
    }
    return;  // the whole block
  }
  const double* row = exact.x + token * exact.d;
  if (count <= kByBlock) {
    for (int p = 0; p < count; ++p) {
      const double product = block_dot(row, exact.weight + atoms[p] * exact.d, exact.d, shared.partial);
      if (threadIdx.x == 0) {
        products[p] = product;
      }
    }
  } else {
    for (int p = threadIdx.x / 32; p < count; p += kWarps) {
      const double product = warp_dot(row, exact.weight + atoms[p] * exact.d, exact.d);
      if (threadIdx.x % 32 == 0) {
        products[p] = product;
      }
    }
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    double best = -INFINITY;
    for (int p = 0; p < count; ++p) {
      best = products[p] > best ? products[p] : best;
    }
    int32_t lowest = INT32_MAX;
    for (int p = 0; p < count; ++p) {
      if (!(products[p] < best - noise[token]) && atoms[p] < lowest) {
        lowest = atoms[p];
      }
    }
    choice[token] = lowest;
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
