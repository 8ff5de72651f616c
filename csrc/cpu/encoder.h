// Exact pre-activations block by block: what topk_encode and threshold_encode have in common.
//
// h_ij = round(<x_i, w_j> + bias_j) with the dot product and the sum in float64, bias_j = b_enc_j - <b_dec, w_j>.
// With gains h_ij = round(h_ij * gain_j) on top. Never more than a block of scores exists: memory beyond inputs and
// outputs is, for each thread, (kTokens + kLatents) d + kTokens kLatents float64 (at most about 2.2 MB at d 4096),
// besides the packed copy of W_enc when none is given.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "cpu/kernels/dispatch.h"
#include "cpu/kernels/wide_rows.h"
#include "cpu/screen/places.h"
#include "margins.h"

namespace darkmatter::cpu {

constexpr int64_t kTokens = 64;           // tokens a block: amortises the widening of the weights to float64
constexpr int64_t kLatents = 24;          // latents a block: their float64 rows stay in L2 (147 KB at d 768)
constexpr int64_t kTokenBytes = 1 << 20;  // of float64 tokens a block, so that they stay in L2 for large d

// What rounding to each dtype does.
template <typename T>
constexpr RoundingMargin kMargin = kWideMargin;
template <>
constexpr RoundingMargin kMargin<Half> = kHalfMargin;
template <>
constexpr RoundingMargin kMargin<BFloat16> = kBFloat16Margin;

// Encoder weights as the kernels want them; codes, sums and bounds are absent where there is no screening.
struct Packed {
  Tensor weight;                       // [F, d] contiguous
  Tensor bias;                         // [F] float64, b_enc - <b_dec, w_j>
  OptionalTensor gain;                 // [F]
  OptionalTensor codes, sums, bounds;  // see ScreenedWeights
  Tensor groups;                       // see Places
  Places places;

  int64_t n_latents() const { return weight.size(0); }
  int64_t d() const { return weight.size(1); }
};

// The rounded pre-activation of a latent from its float64 dot product: what the ops select by.
template <typename T>
class PreActivation {
 public:
  explicit PreActivation(const Packed& packed) : bias_(data<double>(packed.bias)), gain_(data<T>(packed.gain)) {}

  T operator()(double dot, int64_t latent) const { return rounded_with(dot + bias_[latent], latent); }

  // From the sum with its bias. A product of two numbers of at most 24 bits is exact in float64.
  T rounded_with(double sum, int64_t latent) const {
    const T h = rounded<T>(sum);
    return gain_ == nullptr ? h : rounded<T>(static_cast<double>(h) * static_cast<double>(gain_[latent]));
  }

 private:
  const double* bias_;
  const T* gain_;
};

// Checks all encoder arguments, and packs the weights unless they come packed.
Packed packed_encoder(
    const Tensor& W_enc, const Tensor& b_enc, const OptionalTensor& b_dec, const PackedArguments& given,
    int64_t n_tokens);
std::vector<double> wide_vector(const OptionalTensor& tensor);  // float64 elements of a vector, empty for none

// Tokens a block of exact sums.
inline int64_t exact_tokens(int64_t d) {
  const int64_t fits = kTokenBytes / (8 * std::max<int64_t>(d, 1)) / 2 * 2;
  return std::max<int64_t>(2, std::min(kTokens, fits));
}

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
    return Tiling(n_tokens, n_latents, exact_tokens(d), 2, 1);
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

// Visits the rounded pre-activations of some tokens (rows of x_wide) and the places [begin, end), ascending:
//   visit(row, place, h).
template <typename T, typename Visit>
void visit_range(
    WideRows& x_wide, int64_t tokens, const Packed& packed, int64_t begin, int64_t end, const Visit& visit) {
  const int64_t d = packed.d();
  const T* w = data<T>(packed.weight);
  const int32_t* latent = packed.places.latent;
  const PreActivation<T> h(packed);
  const Kernels& kernel = kernels();
  WideRows w_wide(kLatents, d);
  std::vector<double> scores(tokens * kLatents);
  for (int64_t first = begin; first < end; first += kLatents) {
    const int64_t places = std::min(kLatents, end - first);
    for (int64_t l = 0; l < places; ++l) {
      kernel.of<T>().widen(w + latent[first + l] * d, w_wide.data() + l * w_wide.d_padded(), d);
    }
    kernel.dots(x_wide.data(), tokens, w_wide.data(), kLatents, x_wide.d_padded(), scores.data(), kLatents);
    for (int64_t row = 0; row < tokens; ++row) {
      for (int64_t l = 0; l < places; ++l) {
        visit(row, first + l, h(scores[row * kLatents + l], latent[first + l]));
      }
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

}  // namespace darkmatter::cpu
