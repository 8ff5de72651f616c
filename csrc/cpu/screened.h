// What topk_encode and threshold_encode have in common when they screen.
//
// Three steps, each on what the one before left over: 8-bit scores of all latents (scan_panels), float32 scores with
// their own bound, float64 sums (both in rescore). Only the last gives values; the others only leave out what is
// certainly below a limit.
//
// Memory: of each token of a task its 8-bit codes, a float16 row and at most kScreenCandidates candidates.
#pragma once

#include <limits>

#include "cpu/encoder.h"
#include "cpu/screen.h"
#include "screening.h"

namespace darkmatter {

constexpr int64_t kScreenCandidates = 4096;  // a token with more is done exactly: the bound does not help it
constexpr int64_t kScreenChunk = 256;        // tokens a task: each row of weights is read once for all of them
constexpr size_t kExactPairs = 32;           // exact sums done together, their rows still in the cache

template <typename T>
constexpr RoundingMargin kMargin = kWideMargin;
template <>
constexpr RoundingMargin kMargin<Half> = kHalfMargin;
template <>
constexpr RoundingMargin kMargin<BFloat16> = kBFloat16Margin;

template <typename T>
inline float margin_below(float value) {
  return margin_below(kMargin<T>, value);
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

// The tokens of one task, ready to be screened.
template <typename T>
struct TaskTokens {
  const T* x;  // [count, d]
  int64_t count;
  std::vector<uint8_t> codes;           // [count, d_padded]
  std::vector<ScreenedToken> screened;  // [count]
  // x * scale in float16, half the bytes of float32: what matters when rows are gathered. scale is a power of two that
  // brings the norm to 1 .. 2; `lost` bounds the norm of what rounding to float16 removed, in units of x.
  std::vector<uint16_t> half;             // [count, d]
  std::vector<double> scale, norm, lost;  // [count]

  // centre [d] is b_dec, or empty.
  TaskTokens(const T* x, int64_t count, const ScreenedWeights& weights, const std::vector<double>& centre)
      : x(x),
        count(count),
        codes(count * weights.d_padded),
        screened(count),
        half(count * weights.d),
        scale(count, 1.0),
        norm(count),
        lost(count) {
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
      if (norm[t] > 1e-30 && norm[t] < 1e30) {
        scale[t] = std::ldexp(1.0, -std::ilogb(norm[t]));
        lost[t] = screen_kernels()->to_half(row.data(), scale[t], half.data() + t * d, d);
      } else {
        lost[t] = std::numeric_limits<double>::infinity();
      }
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

  // visit(latent, tokens, pairs, count, next) for every latent in [begin, end) that has pairs; next is the following
  // such latent, or this one at the end.
  template <typename Visit>
  void by_latent(int64_t begin, int64_t end, const Visit& visit) const {
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
      visit(l, &token[at], &pair[at], after - at, after < size() ? latent[pair[after]] : l);
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

// Pairs waiting for their exact sums.
template <typename T>
class ExactPairs {
 public:
  ExactPairs(const TaskTokens<T>& tokens, const Packed& packed, Rescored<T>& result)
      : tokens_(tokens), packed_(packed), result_(result), d_(packed.weight.size(1)) {}

  void add(int32_t latent, int32_t token, int32_t pair) {
    left_.push_back(data<T>(packed_.weight) + latent * d_);
    right_.push_back(tokens_.x + token * d_);
    bias_.push_back(data<double>(packed_.bias)[latent]);
    pair_.push_back(pair);
  }
  void flush_from(size_t least) {
    if (pair_.empty() || pair_.size() < least) {
      return;
    }
    sums_.resize(pair_.size());
    kernels().of<T>().pair_dots(left_.data(), right_.data(), d_, pair_.size(), sums_.data());
    for (size_t p = 0; p < pair_.size(); ++p) {
      result_.h[pair_[p]] = rounded<T>(sums_[p] + bias_[p]);
      result_.known[pair_[p]] = 1;
    }
    left_.clear();
    right_.clear();
    bias_.clear();
    pair_.clear();
  }

 private:
  const TaskTokens<T>& tokens_;
  const Packed& packed_;
  Rescored<T>& result_;
  int64_t d_;
  std::vector<const T*> left_, right_;
  std::vector<double> bias_, sums_;
  std::vector<int32_t> pair_;
};

// limit(token, latent) bounds pre-activations before rounding. A dot product of the float16 token in float32, with the
// bound of its own error, decides which pairs get float64 sums.
template <typename T, typename Limit>
Rescored<T> rescore(
    const TaskTokens<T>& tokens, const Packed& packed, const ScreenedWeights& weights, int64_t begin, int64_t end,
    const Pairs& pairs, const Limit& limit) {
  const int64_t d = weights.d;
  const double* bias = data<double>(packed.bias);
  const float* norms = weights.bounds + kNorm * weights.padded();
  const double unit = float_error(d), tiny = static_cast<double>(d) * 4e-38;  // products below the smallest normal
  Rescored<T> result{std::vector<T>(pairs.size()), std::vector<char>(pairs.size(), 0)};
  ExactPairs<T> exact(tokens, packed, result);
  std::vector<float> scores(tokens.count), storage(d);
  std::vector<double> wide(d);
  const T* rows = data<T>(packed.weight);
  pairs.by_latent(
      begin, end, [&](int32_t latent, const int32_t* token, const int32_t* pair, int64_t count, int32_t next) {
        const T* row = rows + latent * d;
        const float* w;
        if constexpr (std::is_same_v<T, float>) {
          w = row;
        } else {
          kernels().of<T>().widen(row, wide.data(), d);
          screen_kernels()->to_float(wide.data(), storage.data(), d);
          w = storage.data();
        }
        const auto* next_row = reinterpret_cast<const char*>(rows + next * d);
        screen_kernels()->half_dots(
            w, tokens.half.data(), d, token, count, scores.data(), next_row, next_row + d * sizeof(T));
        for (int64_t c = 0; c < count; ++c) {
          const int32_t t = token[c];
          const double score = scores[c] / tokens.scale[t] + bias[latent];
          const double bound = (tokens.lost[t] + unit * (tokens.norm[t] + tokens.lost[t])) * norms[latent] +
                               tiny / tokens.scale[t] + std::fabs(score) * 0x1p-40 + 1e-37;
          if (!(score + bound < limit(t, latent))) {  // NaN: unknown, so the exact sum decides
            exact.add(latent, t, pair[c]);
          }
        }
        exact.flush_from(kExactPairs);
      });
  exact.flush_from(1);
  return result;
}

}  // namespace darkmatter
