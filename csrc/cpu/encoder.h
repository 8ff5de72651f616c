// Exact pre-activations block by block: what topk_encode and threshold_encode have in common.
//
// h_ij = round(<x_i, w_j> + bias_j) with the dot product and the sum in float64, bias_j = b_enc_j - <b_dec, w_j>.
// Never more than a block of scores exists: memory beyond inputs and outputs is, for each thread, kTokens * d +
// kLatents * d
// + kTokens * kLatents float64 (at most about 2.2 MB at d 4096), besides the packed copy of W_enc when none is given.
#pragma once

#include <algorithm>
#include <vector>

#include "cpu/dispatch.h"

namespace darkmatter {

constexpr int64_t kTokens = 64;           // tokens a block: amortises the widening of the weights to float64
constexpr int64_t kLatents = 32;          // latents a block: their float64 rows stay in L2 (192 KB at d 768)
constexpr int64_t kTokenBytes = 1 << 20;  // of float64 tokens a block, so that they stay in L2 for large d

struct Packed {
  Tensor weight;  // [F, d] contiguous
  Tensor bias;    // [F] float64
};

// Checks all encoder arguments, and packs the weights unless they come packed.
Packed packed_encoder(
    const Tensor& W_enc, const Tensor& b_enc, const OptionalTensor& b_dec, const OptionalTensor& weight,
    const OptionalTensor& bias);
void check_encoder_input(const Tensor& x, const Tensor& W_enc);

// How [N, F] is cut into tasks: token chunks, and for few tokens also ranges of latents, so that every thread has work.
struct Tiling {
  int64_t n_tokens, n_latents, chunk, chunks, range, ranges;

  Tiling(int64_t n_tokens, int64_t n_latents, int64_t d) : n_tokens(n_tokens), n_latents(n_latents) {
    const int64_t threads = torch::stable::get_num_threads();
    const int64_t fits = std::max<int64_t>(4, kTokenBytes / (8 * std::max<int64_t>(d, 1)) / 4 * 4);
    const int64_t share = ceil_div(ceil_div(n_tokens, threads), 4) * 4;  // the kernel takes four tokens at a time
    chunk = std::max<int64_t>(4, std::min({kTokens, fits, share}));
    chunks = ceil_div(n_tokens, chunk);
    range = ceil_div(n_latents, std::max<int64_t>(1, chunks ? ceil_div(threads, chunks) : 1));
    range = std::max<int64_t>(1, range);
    ranges = ceil_div(n_latents, range);
  }
};

// Visits the rounded pre-activations of every token, latents ascending within a range:
//   visit(range number, token, first latent, count, const T* h)
// Different tokens, and different ranges of one token, are visited by different threads.
template <typename T, typename Visit>
void visit_pre_activations(const T* x, const Packed& packed, const Tiling& tiling, const Visit& visit) {
  const int64_t d = packed.weight.size(1);
  const T* w = data<T>(packed.weight);
  const double* bias = data<double>(packed.bias);
  const Kernels& kernel = kernels();
  parallel_tasks(tiling.chunks * tiling.ranges, [&](int64_t task) {
    const int64_t token = task / tiling.ranges * tiling.chunk, number = task % tiling.ranges;
    const int64_t tokens = std::min(tiling.chunk, tiling.n_tokens - token);
    const int64_t end = std::min((number + 1) * tiling.range, tiling.n_latents);
    std::vector<double> x_wide(tokens * d), w_wide(kLatents * d), scores(tokens * kLatents);
    T h[kLatents];
    kernel.of<T>().widen(x + token * d, x_wide.data(), tokens * d);
    for (int64_t first = number * tiling.range; first < end; first += kLatents) {
      const int64_t latents = std::min(kLatents, end - first);
      kernel.of<T>().widen(w + first * d, w_wide.data(), latents * d);
      kernel.dots(x_wide.data(), tokens, w_wide.data(), latents, d, scores.data(), kLatents);
      for (int64_t t = 0; t < tokens; ++t) {
        for (int64_t l = 0; l < latents; ++l) {
          h[l] = rounded<T>(scores[t * kLatents + l] + bias[first + l]);
        }
        visit(number, token + t, first, latents, static_cast<const T*>(h));
      }
    }
  });
}

// relu that keeps NaN, as torch.relu does.
template <typename T>
inline T relu(T value) {
  return static_cast<float>(value) <= 0.0f ? T(0.0f) : value;
}
template <>
inline double relu(double value) {
  return value <= 0.0 ? 0.0 : value;
}

}  // namespace darkmatter
