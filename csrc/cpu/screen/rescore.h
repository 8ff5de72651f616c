// Exact pre-activations of what a screen let in: which (token, place) pairs, and their float64 sums.
#pragma once

#include "cpu/screen/candidates.h"

namespace darkmatter::cpu {

constexpr size_t kExactPairs = 32;  // exact sums done together, their rows still in the cache

// (token, place) pairs of a task, listed token by token, visited place by place: a row of weights then comes from
// memory once for all the tokens that want it, while the tokens stay in L2.
struct Pairs {
  std::vector<int32_t> place;
  std::vector<int64_t> start{0};  // [tokens + 1]

  void end_token() { start.push_back(static_cast<int64_t>(place.size())); }
  int64_t size() const { return static_cast<int64_t>(place.size()); }

  // visit(place, tokens, pairs, count, next) for every place that has pairs; next is the following such place, or this
  // one at the end.
  template <typename Visit>
  void by_place(int64_t begin, int64_t end, const Visit& visit) const {
    const std::vector<int32_t> order = sorted(begin, end);
    std::vector<int32_t> token(size());
    std::vector<int32_t> token_of(size());
    for (size_t t = 0; t + 1 < start.size(); ++t) {
      std::fill(token_of.begin() + start[t], token_of.begin() + start[t + 1], static_cast<int32_t>(t));
    }
    for (int64_t at = 0; at < size(); ++at) {
      token[at] = token_of[order[at]];
    }
    for (int64_t at = 0; at < size();) {
      const int32_t p = place[order[at]];
      int64_t after = at + 1;
      while (after < size() && place[order[after]] == p) {
        ++after;
      }
      visit(p, &token[at], &order[at], after - at, after < size() ? place[order[after]] : p);
      at = after;
    }
  }

 private:
  // The pairs in the order of their places, all in [begin, end), tokens ascending.
  std::vector<int32_t> sorted(int64_t begin, int64_t end) const {
    std::vector<int32_t> order(size());
    if (size() < (end - begin) / 8) {  // few: cheaper than counting all places
      for (int64_t p = 0; p < size(); ++p) {
        order[p] = static_cast<int32_t>(p);
      }
      std::sort(order.begin(), order.end(), [&](int32_t a, int32_t b) {
        return place[a] != place[b] ? place[a] < place[b] : a < b;
      });
      return order;
    }
    std::vector<int32_t> next(end - begin + 1, 0);
    for (const int32_t p : place) {
      ++next[p - begin + 1];
    }
    for (int64_t p = 0; p < end - begin; ++p) {
      next[p + 1] += next[p];
    }
    for (int64_t p = 0; p < size(); ++p) {
      order[next[place[p] - begin]++] = static_cast<int32_t>(p);
    }
    return order;
  }
};

// The exact rounded pre-activations of the pairs that may reach their limit.
template <typename T>
struct Rescored {
  std::vector<T> h;
  std::vector<char> known;      // 0: certainly below the limit, h means nothing
  std::vector<int64_t> wanted;  // by token: how many exact sums were left to make; beyond `most` none were made
};

// Pairs waiting for their exact sums.
template <typename T>
class ExactPairs {
 public:
  ExactPairs(const TaskTokens<T>& tokens, const Packed& packed, Rescored<T>& result)
      : tokens_(tokens), packed_(packed), h_(packed), result_(result), d_(packed.d()) {}

  void add(int32_t latent, int32_t token, int32_t pair) {
    left_.push_back(data<T>(packed_.weight) + latent * d_);
    right_.push_back(tokens_.x + token * d_);
    latent_.push_back(latent);
    pair_.push_back(pair);
  }
  void flush_from(size_t least) {
    if (pair_.empty() || pair_.size() < least) {
      return;
    }
    sums_.resize(pair_.size());
    kernels().of<T>().pair_dots(left_.data(), right_.data(), d_, pair_.size(), sums_.data());
    for (size_t p = 0; p < pair_.size(); ++p) {
      result_.h[pair_[p]] = h_(sums_[p], latent_[p]);
      result_.known[pair_[p]] = 1;
    }
    left_.clear();
    right_.clear();
    latent_.clear();
    pair_.clear();
  }

 private:
  const TaskTokens<T>& tokens_;
  const Packed& packed_;
  const PreActivation<T> h_;
  Rescored<T>& result_;
  int64_t d_;
  std::vector<const T*> left_, right_;
  std::vector<double> sums_;
  std::vector<int32_t> latent_, pair_;
};

// A dot product of the float16 token in float32, with the bound of its own error, decides which pairs get float64 sums:
// add(token, pair) for each that is not certainly below limit(token, place).
template <typename T, typename Limit>
class Refinement {
 public:
  Refinement(const TaskTokens<T>& tokens, const Packed& packed, const ScreenedWeights& weights, const Limit& limit)
      : tokens_(tokens),
        packed_(packed),
        weights_(weights),
        limit_(limit),
        scores_(tokens.count),
        single_(weights.d),
        wide_(weights.d) {}

  template <typename Add>
  void operator()(
      int32_t place, const int32_t* token, const int32_t* pair, int64_t count, int32_t next, const Add& add) {
    const int64_t d = weights_.d, padded = weights_.padded(), latent = packed_.places.latent[place];
    const T* rows = data<T>(packed_.weight);
    const auto* next_row = reinterpret_cast<const char*>(rows + packed_.places.latent[next] * d);
    screen_kernels()->half_dots(
        as_float(rows + latent * d), tokens_.half.data(), d, token, count, scores_.data(), next_row,
        next_row + d * sizeof(T));
    const double unit = float_error(d), tiny = static_cast<double>(d) * 4e-38;  // products below the smallest normal
    const double gain = packed_.gain ? static_cast<double>(data<T>(*packed_.gain)[latent]) : 1.0;
    const double norm = weights_.bounds[kNorm * padded + place];  // with |gain| in it, or more
    const double bias = data<double>(packed_.bias)[latent];
    for (int64_t c = 0; c < count; ++c) {
      const int32_t t = token[c];
      const double score = (scores_[c] / tokens_.scale[t] + bias) * gain;
      double bound = (tokens_.lost[t] + unit * (tokens_.norm[t] + tokens_.lost[t])) * norm +
                     tiny / tokens_.scale[t] * std::fabs(gain) + std::fabs(score) * 0x1p-40 + 1e-37;
      if (packed_.gain) {  // rounding before the gain
        bound += 2.0 * kMargin<T>.relative * (std::fabs(score) + bound) + kMargin<T>.absolute * std::fabs(gain);
      }
      if (!(score + bound < limit_(t, place))) {  // NaN: unknown, so the exact sum decides
        add(t, pair[c]);
      }
    }
  }

 private:
  const float* as_float(const T* row) {
    if constexpr (std::is_same_v<T, float>) {
      return row;
    } else {
      kernels().of<T>().widen(row, wide_.data(), weights_.d);
      screen_kernels()->to_float(wide_.data(), single_.data(), weights_.d);
      return single_.data();
    }
  }

  const TaskTokens<T>& tokens_;
  const Packed& packed_;
  const ScreenedWeights& weights_;
  const Limit& limit_;
  std::vector<float> scores_, single_;
  std::vector<double> wide_;
};

// limit(token, place) bounds pre-activations before rounding; `most`: exact sums of a token.
template <typename T, typename Limit>
Rescored<T> rescore(
    const TaskTokens<T>& tokens, const Packed& packed, const ScreenedWeights& weights, int64_t begin, int64_t end,
    const Pairs& pairs, int64_t most, const Limit& limit) {
  Rescored<T> result{
      std::vector<T>(pairs.size()), std::vector<char>(pairs.size(), 0), std::vector<int64_t>(tokens.count, 0)};
  ExactPairs<T> exact(tokens, packed, result);
  Refinement<T, Limit> refine(tokens, packed, weights, limit);
  pairs.by_place(
      begin, end, [&](int32_t place, const int32_t* token, const int32_t* pair, int64_t count, int32_t next) {
        const int32_t latent = packed.places.latent[place];
        const auto add = [&](int32_t t, int32_t p) {
          if (++result.wanted[t] <= most) {
            exact.add(latent, t, p);
          }
        };
        if (screen_kernels()->refines) {
          refine(place, token, pair, count, next, add);
        } else {
          for (int64_t c = 0; c < count; ++c) {
            add(token[c], pair[c]);
          }
        }
        exact.flush_from(kExactPairs);
      });
  exact.flush_from(1);
  return result;
}

}  // namespace darkmatter::cpu
