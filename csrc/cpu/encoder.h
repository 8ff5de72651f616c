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
constexpr int64_t kLatents = 24;          // latents a block: their float64 rows stay in L2 (147 KB at d 768)
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
    const int64_t fits = std::max<int64_t>(2, kTokenBytes / (8 * std::max<int64_t>(d, 1)) / 2 * 2);
    const int64_t share = ceil_div(ceil_div(n_tokens, threads), 2) * 2;  // the kernel takes two tokens at a time
    chunk = std::max<int64_t>(2, std::min({kTokens, fits, share}));
    chunks = ceil_div(n_tokens, chunk);
    range = ceil_div(n_latents, std::max<int64_t>(1, chunks ? ceil_div(threads, chunks) : 1));
    range = std::max<int64_t>(1, range);
    ranges = ceil_div(n_latents, range);
  }
};

// Rows of float64, 64-byte aligned and zero-padded to whole lanes, as the dots kernel wants them.
class WideRows {
 public:
  WideRows(int64_t rows, int64_t d) : d_(d), d_padded_(ceil_div(d, kLanes) * kLanes), storage_(rows * d_padded_ + 8) {}

  template <typename T>
  void fill(const TypedKernels<T>& kernel, const T* from, int64_t rows) {
    for (int64_t row = 0; row < rows; ++row) {
      kernel.widen(from + row * d_, data() + row * d_padded_, d_);
    }
  }
  double* data() {
    const auto address = reinterpret_cast<uintptr_t>(storage_.data());
    return storage_.data() + (64 - address % 64) % 64 / sizeof(double);
  }
  int64_t d_padded() const { return d_padded_; }

 private:
  int64_t d_, d_padded_;
  std::vector<double> storage_;  // zero beyond d in every row
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
    WideRows x_wide(tokens, d), w_wide(kLatents, d);
    std::vector<double> scores(tokens * kLatents);
    T h[kLatents];
    x_wide.fill(kernel.of<T>(), x + token * d, tokens);
    for (int64_t first = number * tiling.range; first < end; first += kLatents) {
      const int64_t latents = std::min(kLatents, end - first);
      w_wide.fill(kernel.of<T>(), w + first * d, latents);
      kernel.dots(x_wide.data(), tokens, w_wide.data(), kLatents, x_wide.d_padded(), scores.data(), kLatents);
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
