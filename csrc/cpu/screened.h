// What topk_encode and threshold_encode have in common when they screen: preparing tokens, scanning, rescoring.
//
// Memory: kScreenCandidates intervals a token of a task at most, and the codes of its tokens.
#pragma once

#include <limits>

#include "cpu/encoder.h"
#include "cpu/screen.h"

namespace darkmatter {

constexpr int64_t kScreenCandidates = 4096;  // a token with more is done exactly: the bound does not help it
constexpr int64_t kScreenChunk = 128;        // tokens a task: each panel of weights is read once for all of them

// What is known of the rounding to T: the relative half unit in the last place of T, with room for float16's and
// bfloat16's rounding through float32, and the absolute one of its subnormal numbers (how far below a value another may
// lie and still round to the same number), and a value below everything that overflows to infinity.
template <typename T>
struct RoundingMargin {
  static constexpr float relative = 0x1p-21f, absolute = 1e-37f, largest = 3e38f;
};
template <>
struct RoundingMargin<Half> {
  static constexpr float relative = 0x1p-9f, absolute = 0x1p-23f, largest = 65000.0f;
};
template <>
struct RoundingMargin<BFloat16> {
  static constexpr float relative = 0x1p-6f, absolute = 1e-37f, largest = 3e38f;
};

// A number that anything which may round to `value` or more is not below.
template <typename T>
inline float margin_below(float value) {
  value = std::min(value, RoundingMargin<T>::largest);
  return value - std::fabs(value) * RoundingMargin<T>::relative - RoundingMargin<T>::absolute;
}

inline ScreenedWeights screened_weights(const Packed& packed) {
  const int64_t n_latents = packed.weight.size(0), d = packed.weight.size(1);
  return {
      n_latents,
      d,
      screen_padded(d),
      screen_panels(n_latents),
      data<int8_t>(*packed.codes),
      data<int32_t>(*packed.sums),
      data<float>(*packed.bounds)};
}

// The tokens of one task: float64 rows for exact work, codes for screening.
template <typename T>
struct TaskTokens {
  int64_t count;
  WideRows wide;
  std::vector<uint8_t> codes;           // [count, d_padded]
  std::vector<ScreenedToken> screened;  // [count]

  TaskTokens(const T* x, int64_t count, int64_t d) : count(count), wide(count, d) {
    wide.fill(kernels().of<T>(), x, count);
  }

  // One token's float64 row as rows of its own, for the exact path.
  template <typename Body>
  void with_row(int64_t row, const Body& body) {
    WideRows alone(1, wide.d());
    std::copy_n(wide.data() + row * wide.d_padded(), wide.d(), alone.data());
    body(alone);
  }

  // centre [d] is b_dec, or empty.
  void encode(const ScreenedWeights& weights, const std::vector<double>& centre) {
    const int64_t d = weights.d;
    double centre_squares = 0.0;
    for (double e : centre) {
      centre_squares += e * e;
    }
    codes.resize(count * weights.d_padded);
    screened.resize(count);
    std::vector<float> scratch(weights.d_padded);
    std::vector<double> row(d);
    for (int64_t t = 0; t < count; ++t) {
      const double* x = wide.data() + t * wide.d_padded();
      double squares = 0.0;
      for (int64_t e = 0; e < d; ++e) {
        squares += x[e] * x[e];
        row[e] = centre.empty() ? x[e] : x[e] - centre[e];
      }
      // of two float64 sums of d products, and of the centred row: (d + 2) units each
      const double error =
          4.0 * static_cast<double>(d + 2) * 0x1p-53 * (std::sqrt(squares) + std::sqrt(centre_squares));
      screened[t] = screen_kernels()->encode_token(
          row.data(), d, weights.d_padded, error, scratch.data(), codes.data() + t * weights.d_padded);
    }
  }
};

// The latents of each token of a task that are to be rescored, and their exact rounded pre-activations in the same
// order.
template <typename T>
struct Chosen {
  std::vector<int32_t> latents;
  std::vector<T> h;
};

// Rescores the chosen latents of all tokens of a task, latent by latent: a row of weights comes from memory once for
// all the tokens that want it, while the tokens stay in L2. (Token by token it is bound by L3: four times slower at d
// 2304.) chosen[row]'s latents lie in [begin, end).
template <typename T>
void rescore(TaskTokens<T>& tokens, const Packed& packed, int64_t begin, int64_t end, std::vector<Chosen<T>>& chosen) {
  std::vector<int32_t> start(end - begin + 1, 0);  // a counting sort by latent
  for (Chosen<T>& own : chosen) {
    own.h.resize(own.latents.size());
    for (const int32_t latent : own.latents) {
      ++start[latent - begin + 1];
    }
  }
  for (int64_t j = 0; j < end - begin; ++j) {
    start[j + 1] += start[j];
  }
  const int64_t total = start[end - begin];
  std::vector<int32_t> token(total), next(start.begin(), start.end() - 1);
  std::vector<T*> target(total);
  for (size_t row = 0; row < chosen.size(); ++row) {
    for (size_t c = 0; c < chosen[row].latents.size(); ++c) {
      const int32_t at = next[chosen[row].latents[c] - begin]++;
      token[at] = static_cast<int32_t>(row);
      target[at] = &chosen[row].h[c];
    }
  }
  const int64_t d = packed.weight.size(1), d_padded = tokens.wide.d_padded();
  const double* bias = data<double>(packed.bias);
  const Kernels& kernel = kernels();
  WideRows weight(1, d);
  std::vector<double> sums(chosen.size());
  for (int64_t j = begin; j < end; ++j) {
    const int64_t first = start[j - begin], count = start[j - begin + 1] - first;
    if (count > 0) {
      weight.fill(kernel.of<T>(), data<T>(packed.weight) + j * d, 1);
      kernel.f64.gathered_dots(weight.data(), tokens.wide.data(), d_padded, &token[first], count, sums.data());
      for (int64_t c = 0; c < count; ++c) {
        *target[first + c] = rounded<T>(sums[c] + bias[j]);
      }
    }
  }
}

// Screens the tokens of a task against panels [begin, end): token by token, hit(row, hits) for what the limits let in.
// limits(row) -> pointer, step 0 (one limit a token) or 1 (one a latent); a token is skipped while alive(row) is false.
template <typename T, typename Limits, typename Alive, typename Hit>
void scan_panels(
    const TaskTokens<T>& tokens, const ScreenedWeights& weights, int64_t begin, int64_t end, int64_t step,
    const Limits& limits, const Alive& alive, const Hit& hit) {
  const ScreenKernels& kernel = *screen_kernels();
  alignas(64) int32_t scores[kScreenTokens * kPanel];
  Hits found;
  for (int64_t panel = begin; panel < end; ++panel) {
    const int8_t* codes = weights.codes + panel * weights.d_padded * kPanel;
    for (int64_t first = 0; first < tokens.count; first += kScreenTokens) {
      const int64_t n = std::min(kScreenTokens, tokens.count - first);
      kernel.scores(tokens.codes.data() + first * weights.d_padded, n, codes, weights.d_padded, scores);
      for (int64_t t = 0; t < n; ++t) {
        const int64_t row = first + t;
        if (alive(row)) {
          kernel.hits(scores + t * kPanel, tokens.screened[row], weights, panel, limits(row), step, &found);
          if (found.count > 0) {
            hit(row, found);
          }
        }
      }
    }
  }
}

}  // namespace darkmatter
