// Exact pre-activations block by block: what topk_encode and threshold_encode have in common.
//
// h_ij = round(<x_i, w_j> + bias_j) with the dot product and the sum in float64, bias_j = b_enc_j - <b_dec, w_j>.
// Never more than a block of scores exists: memory beyond inputs and outputs is, for each thread, kTokens * d +
// kLatents * d
// + kTokens * kLatents float64 (at most about 2.2 MB at d 4096), besides the packed copy of W_enc when none is given.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "cpu/dispatch.h"
#include "cpu/wide_rows.h"

namespace darkmatter {

constexpr int64_t kTokens = 64;           // tokens a block: amortises the widening of the weights to float64
constexpr int64_t kLatents = 24;          // latents a block: their float64 rows stay in L2 (147 KB at d 768)
constexpr int64_t kTokenBytes = 1 << 20;  // of float64 tokens a block, so that they stay in L2 for large d

// Encoder weights as the kernels want them; the last three are absent where there is no screening.
struct Packed {
  Tensor weight;                       // [F, d] contiguous
  Tensor bias;                         // [F] float64, b_enc - <b_dec, w_j>
  OptionalTensor codes, sums, bounds;  // see ScreenedWeights
};

// Checks all encoder arguments, and packs the weights unless they come packed.
Packed packed_encoder(
    const Tensor& W_enc, const Tensor& b_enc, const OptionalTensor& b_dec, const PackedArguments& given,
    int64_t n_tokens);
std::vector<double> wide_vector(const OptionalTensor& tensor);  // float64 elements of a vector, empty for none

// How [N, F] is cut into tasks: token chunks, and for few tokens also ranges of latents, so that every thread has work.
struct Tiling {
  int64_t n_tokens, n_latents, chunk, chunks, range, ranges;

  // Chunks of at most max_chunk tokens, a multiple of token_step; ranges a multiple of latent_step latents.
  Tiling(int64_t n_tokens, int64_t n_latents, int64_t max_chunk, int64_t token_step, int64_t latent_step)
      : n_tokens(n_tokens), n_latents(n_latents) {
    const int64_t threads = torch::stable::get_num_threads();
    const int64_t share = ceil_div(ceil_div(n_tokens, threads), token_step) * token_step;
    chunk = std::max(token_step, std::min(max_chunk, share));
    chunks = ceil_div(n_tokens, chunk);
    const int64_t pieces = chunks ? ceil_div(threads, chunks) : 1;
    range = std::max(latent_step, ceil_div(ceil_div(n_latents, pieces), latent_step) * latent_step);
    ranges = ceil_div(n_latents, range);
  }

  static Tiling exact(int64_t n_tokens, int64_t n_latents, int64_t d) {
    const int64_t fits = kTokenBytes / (8 * std::max<int64_t>(d, 1)) / 2 * 2;
    return Tiling(n_tokens, n_latents, std::max<int64_t>(2, std::min(kTokens, fits)), 2, 1);
  }

  struct Task {
    int64_t token, tokens, number, begin, end;  // first token, tokens, range number, its latents
  };
  Task task(int64_t i) const {
    const int64_t token = i / ranges * chunk, number = i % ranges;
    return {
        token, std::min(chunk, n_tokens - token), number, number * range, std::min((number + 1) * range, n_latents)};
  }
  int64_t tasks() const { return chunks * ranges; }
};

// Visits the rounded pre-activations of some tokens (rows of x_wide) and the latents [begin, end):
//   visit(row, first latent, count, const T* h), latents ascending.
template <typename T, typename Visit>
void visit_range(
    WideRows& x_wide, int64_t tokens, const Packed& packed, int64_t begin, int64_t end, const Visit& visit) {
  const int64_t d = packed.weight.size(1);
  const T* w = data<T>(packed.weight);
  const double* bias = data<double>(packed.bias);
  const Kernels& kernel = kernels();
  WideRows w_wide(kLatents, d);
  std::vector<double> scores(tokens * kLatents);
  T h[kLatents];
  for (int64_t first = begin; first < end; first += kLatents) {
    const int64_t latents = std::min(kLatents, end - first);
    w_wide.fill(kernel.of<T>(), w + first * d, latents);
    kernel.dots(x_wide.data(), tokens, w_wide.data(), kLatents, x_wide.d_padded(), scores.data(), kLatents);
    for (int64_t row = 0; row < tokens; ++row) {
      for (int64_t l = 0; l < latents; ++l) {
        h[l] = rounded<T>(scores[row * kLatents + l] + bias[first + l]);
      }
      visit(row, first, latents, static_cast<const T*>(h));
    }
  }
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
