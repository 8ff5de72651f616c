// What topk_encode and threshold_encode have in common when they screen.
//
// Three steps, each on what the one before left over: 8-bit scores of all latents (scan_panels), float32 scores with
// their own bound, float64 sums (both in rescore). Only the last gives values; the others only leave out what is
// certainly below a limit.
//
// Memory: of each token of a task its codes, a float32 row (16-bit and float64 types) and at most kScreenCandidates
// candidates.
#pragma once

#include <limits>

#include "cpu/encoder.h"
#include "cpu/screen.h"

namespace darkmatter {

constexpr int64_t kScreenCandidates = 4096;  // a token with more is done exactly: the bound does not help it
constexpr int64_t kScreenChunk = 256;        // tokens a task: each row of weights is read once for all of them

// What is known of the rounding to T: the relative half unit in the last place (for float16 and bfloat16 with room for
// their rounding through float32, for the others as the comparison in float32 needs it), the absolute one of subnormal
// numbers, and a value below everything that overflows to infinity.
template <typename T>
struct RoundingMargin {
  static constexpr float relative = 0x1p-21f, absolute = 1e-37f, largest = 3e38f;
};
template <>
struct RoundingMargin<Half> {
  static constexpr float relative = 0x1.1p-11f, absolute = 0x1p-23f, largest = 65000.0f;
};
template <>
struct RoundingMargin<BFloat16> {
  static constexpr float relative = 0x1.1p-8f, absolute = 1e-37f, largest = 3e38f;
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

// Rows of T as rows of float32: themselves, or converted.
template <typename T>
class FloatRows {
 public:
  FloatRows(const T* rows, int64_t n, int64_t d) {
    if constexpr (std::is_same_v<T, float>) {
      data_ = rows;
    } else {
      storage_.resize(n * d);
      std::vector<double> wide(d);
      for (int64_t row = 0; row < n; ++row) {
        kernels().of<T>().widen(rows + row * d, wide.data(), d);
        screen_kernels()->narrow(wide.data(), storage_.data() + row * d, d);
      }
      data_ = storage_.data();
    }
  }
  const float* data() const { return data_; }

 private:
  std::vector<float> storage_;
  const float* data_;
};

// The tokens of one task, ready to be screened.
template <typename T>
struct TaskTokens {
  const T* x;  // [count, d]
  int64_t count;
  std::vector<uint8_t> codes;           // [count, d_padded]
  std::vector<ScreenedToken> screened;  // [count]
  std::vector<double> norm;             // [count] of x
  FloatRows<T> narrow;                  // [count, d]

  // centre [d] is b_dec, or empty.
  TaskTokens(const T* x, int64_t count, const ScreenedWeights& weights, const std::vector<double>& centre)
      : x(x), count(count), codes(count * weights.d_padded), screened(count), norm(count), narrow(x, count, weights.d) {
    const int64_t d = weights.d;
    double centre_squares = 0.0;
    for (double e : centre) {
      centre_squares += e * e;
    }
    std::vector<float> scratch(weights.d_padded);
    std::vector<double> row(d);
    for (int64_t t = 0; t < count; ++t) {
      kernels().of<T>().widen(x + t * d, row.data(), d);
      norm[t] = std::sqrt(kernels().f64.dot(row.data(), row.data(), d));
      for (size_t e = 0; e < centre.size(); ++e) {
        row[e] -= centre[e];
      }
      // of two float64 sums of d products, and of the centred row: (d + 2) units each
      const double error = 4.0 * static_cast<double>(d + 2) * 0x1p-53 * (norm[t] + std::sqrt(centre_squares));
      screened[t] = screen_kernels()->encode_token(
          row.data(), d, weights.d_padded, error, scratch.data(), codes.data() + t * weights.d_padded);
    }
  }

  // One token's float64 row as rows of its own, for the exact path.
  WideRows wide_row(int64_t row, int64_t d) const {
    WideRows wide(1, d);
    wide.fill(kernels().of<T>(), x + row * d, 1);
    return wide;
  }
};

// What the screen let in of one token: latents, their scores, and the upper bounds of their pre-activations.
struct Candidates {
  std::vector<float> score, upper;
  std::vector<int32_t> latent;
  int64_t count = 0;

  // Appends the hits of one panel.
  void scan(
      const int32_t* products, const ScreenedToken& token, const ScreenedWeights& weights, int64_t panel,
      const float* limits, int64_t step) {
    if (count + kPanel > static_cast<int64_t>(upper.size())) {
      upper.resize(2 * upper.size() + 4 * kPanel);
      score.resize(upper.size());
      latent.resize(upper.size());
    }
    count += screen_kernels()->hits(
        products, token, weights, panel, limits, step, score.data() + count, upper.data() + count,
        latent.data() + count);
  }
  bool too_many() const { return count > kScreenCandidates; }
};

// Products of each of the rows [first, first + n) and each of the panels begin, begin + step, .. < end:
// visit(row, panel, products), where products is int32 [kPanel].
template <typename T, typename Visit>
void scan_panels(
    const TaskTokens<T>& tokens, const ScreenedWeights& weights, int64_t first, int64_t n, int64_t begin, int64_t end,
    int64_t step, const Visit& visit) {
  const ScreenKernels& kernel = *screen_kernels();
  alignas(64) int32_t products[kScreenTokens * kPanel];
  for (int64_t panel = begin; panel < end; panel += step) {
    const int8_t* codes = weights.codes + panel * weights.d_padded * kPanel;
    for (int64_t tile = first; tile < first + n; tile += kScreenTokens) {
      const int64_t some = std::min(kScreenTokens, first + n - tile);
      kernel.products(tokens.codes.data() + tile * weights.d_padded, some, codes, weights.d_padded, products);
      for (int64_t t = 0; t < some; ++t) {
        visit(tile + t, panel, products + t * kPanel);
      }
    }
  }
}

// (token, latent) pairs of a task, listed token by token, visited latent by latent: a row of weights then comes from
// memory once for all the tokens that want it, while the tokens stay in L2.
struct Pairs {
  std::vector<int32_t> latent;
  std::vector<int64_t> start{0};  // [tokens + 1]

  void end_token() { start.push_back(static_cast<int64_t>(latent.size())); }
  int64_t size() const { return static_cast<int64_t>(latent.size()); }

  // visit(latent, tokens, pairs, count) for every latent in [begin, end) that has pairs, after fetching the row of
  // `weights` [.., row_bytes] of the next such latent into the cache.
  template <typename Visit>
  void by_latent(int64_t begin, int64_t end, const void* weights, int64_t row_bytes, const Visit& visit) const {
    std::vector<int32_t> place(end - begin + 1, 0);  // a counting sort
    for (const int32_t l : latent) {
      ++place[l - begin + 1];
    }
    for (int64_t l = 0; l < end - begin; ++l) {
      place[l + 1] += place[l];
    }
    std::vector<int32_t> token(size()), pair(size()), next(place.begin(), place.end() - 1);
    for (size_t t = 0; t + 1 < start.size(); ++t) {
      for (int64_t p = start[t]; p < start[t + 1]; ++p) {
        const int32_t at = next[latent[p] - begin]++;
        token[at] = static_cast<int32_t>(t);
        pair[at] = static_cast<int32_t>(p);
      }
    }
    for (int64_t at = 0; at < size();) {
      const int32_t l = latent[pair[at]], after = place[l - begin + 1];
      if (after < size()) {
        const char* row = static_cast<const char*>(weights) + latent[pair[after]] * row_bytes;
        for (int64_t byte = 0; byte < row_bytes; byte += 64) {
          __builtin_prefetch(row + byte);
        }
      }
      visit(l, &token[at], &pair[at], after - at);
      at = after;
    }
  }
};

// The exact rounded pre-activations of the pairs that may reach their limit.
template <typename T>
struct Rescored {
  std::vector<T> h;
  std::vector<char> known;  // 0: certainly below the limit, h means nothing
};

// limit(token, latent) bounds pre-activations before rounding. A float32 dot product with the bound of its own error
// decides which pairs get float64 sums: at once, while their rows are in the cache.
template <typename T, typename Limit>
Rescored<T> rescore(
    const TaskTokens<T>& tokens, const Packed& packed, const ScreenedWeights& weights, int64_t begin, int64_t end,
    const Pairs& pairs, const Limit& limit) {
  const int64_t d = weights.d;
  const double* bias = data<double>(packed.bias);
  const float* norms = weights.bounds + kNorm * weights.padded();
  const TypedKernels<T>& kernel = kernels().of<T>();
  const double unit = float_error(d);
  Rescored<T> result{std::vector<T>(pairs.size()), std::vector<char>(pairs.size(), 0)};
  std::vector<float> scores(tokens.count);
  std::vector<double> wide(d), sums(tokens.count);
  std::vector<int32_t> near_token, near_pair;
  const T* rows = data<T>(packed.weight);
  pairs.by_latent(
      begin, end, rows, d * sizeof(T), [&](int32_t latent, const int32_t* token, const int32_t* pair, int64_t count) {
        const FloatRows<T> narrow(rows + latent * d, 1, d);
        screen_kernels()->float_dots(narrow.data(), tokens.narrow.data(), d, d, token, count, scores.data());
        near_token.clear();
        near_pair.clear();
        for (int64_t c = 0; c < count; ++c) {
          const double score = scores[c] + bias[latent];
          // the last terms: the comparison in float64, products below the smallest normal number
          const double bound = unit * tokens.norm[token[c]] * norms[latent] + std::fabs(score) * 0x1p-40 + 1e-32;
          if (!(score + bound < limit(token[c], latent))) {  // NaN: unknown, so the exact sum decides
            near_token.push_back(token[c]);
            near_pair.push_back(pair[c]);
          }
        }
        if (near_token.empty()) {
          return;
        }
        kernel.widen(rows + latent * d, wide.data(), d);
        kernel.gathered_dots(wide.data(), tokens.x, d, near_token.data(), near_token.size(), sums.data());
        for (size_t c = 0; c < near_pair.size(); ++c) {
          result.h[near_pair[c]] = rounded<T>(sums[c] + bias[latent]);
          result.known[near_pair[c]] = 1;
        }
      });
  return result;
}

}  // namespace darkmatter
