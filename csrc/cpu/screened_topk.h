// Screening for the best k of each token of a task.
//
// The limit below which a latent is left out is *guessed*: for the scan from the scores of a sample of the panels, so
// that a few times k latents are expected above it, and then from the k-th best score of all. When k exact values turn
// out to be at least the limits, nothing that was left out can be among the best k, whatever the guesses were.
// Otherwise the token is done again with the k-th best exact value found so far as a limit that is certain.
#pragma once

#include "cpu/best_k.h"
#include "cpu/screened.h"

namespace darkmatter {

constexpr int64_t kSampleShare = 16;   // one panel in so many is in the sample ...
constexpr int64_t kSamplePanels = 22;  // ... but at least so many (1056 latents)
constexpr int64_t kSampleTokens = 32;  // tokens whose sample is kept at a time: 32 x 1536 x 4 bytes at F 24576

// What one task knows of one token.
template <typename T>
struct TopKState {
  Candidates found;
  Best<T> best;
  float certain = -std::numeric_limits<float>::infinity();     // known to leave out none of the best k
  float limit = -std::numeric_limits<float>::infinity();       // of the next step, guessed or certain
  float scan_limit = -std::numeric_limits<float>::infinity();  // of the candidates that were found
  bool screened = true;                                        // false: the exact path decides

  void scan(const int32_t* products, const ScreenedToken& token, const ScreenedWeights& weights, int64_t panel) {
    if (screened) {
      found.scan(products, token, weights, panel, &limit, 0);
      screened = !found.too_many();
    }
  }
};

template <typename T>
class TopKScreen {
 public:
  TopKScreen(const TaskTokens<T>& tokens, const Packed& packed, const Tiling::Task& task, int64_t k)
      : tokens_(tokens),
        packed_(packed),
        weights_(screened_weights(packed)),
        task_(task),
        k_(k),
        first_(task.begin / kPanel),
        last_(ceil_div(task.end, kPanel)),
        step_(std::max<int64_t>(1, std::min(kSampleShare, (last_ - first_) / kSamplePanels))),
        states_(tokens.count) {
    for (int64_t row = 0; row < tokens.count; ++row) {
      states_[row].screened = tokens.screened[row].screened;
    }
  }

  // The best k of every token; a token whose state is not `screened` is left to the exact path.
  std::vector<TopKState<T>>& run() {
    for (int64_t row = 0; row < tokens_.count; row += kSampleTokens) {
      sample(row, std::min(kSampleTokens, tokens_.count - row));
    }
    for (int64_t panel = first_; panel < last_; panel += step_) {  // the panels between those of the sample
      scan(0, tokens_.count, panel + 1, std::min(panel + step_, last_));
    }
    for (TopKState<T>& state : states_) {
      state.scan_limit = state.limit;
    }
    finish(std::vector<char>(tokens_.count, 1), true);
    correct();
    return states_;
  }

 private:
  void scan(int64_t first_row, int64_t n, int64_t begin, int64_t end) {
    scan_panels(
        tokens_, weights_, first_row, n, begin, end, 1, [&](int64_t row, int64_t panel, const int32_t* products) {
          states_[row].scan(products, tokens_.screened[row], weights_, panel);
        });
  }

  // Guesses the limits of some tokens, and scans the panels of the sample with them.
  void sample(int64_t first_row, int64_t n) {
    const int64_t panels = ceil_div(last_ - first_, step_);
    std::vector<int32_t> products(n * panels * kPanel);
    const auto of = [&](int64_t row, int64_t p) { return products.data() + ((row - first_row) * panels + p) * kPanel; };
    scan_panels(
        tokens_, weights_, first_row, n, first_, last_, step_, [&](int64_t row, int64_t panel, const int32_t* some) {
          std::copy_n(some, kPanel, of(row, (panel - first_) / step_));
        });
    std::vector<float> scores(panels * kPanel), lower(scores.size()), scratch(2 * scores.size() + 32);
    float bound[kPanel];
    for (int64_t row = first_row; row < first_row + n; ++row) {
      const ScreenedToken& token = tokens_.screened[row];
      int64_t latents = 0;
      for (int64_t p = 0; p < panels; ++p) {
        const int64_t panel = first_ + p * step_;
        screen_kernels()->intervals(of(row, p), token, weights_, panel, scores.data() + latents, bound);
        for (int64_t l = 0; l < kPanel; ++l) {
          lower[latents + l] = scores[latents + l] - bound[l];
        }
        latents += std::min(kPanel, task_.end - panel * kPanel);
      }
      if (latents >= k_) {  // k latents have a value of at least the k-th largest lower bound
        states_[row].certain = twice_below(screen_kernels()->nth_largest(lower.data(), latents, k_, scratch.data()));
      }
      states_[row].limit = guess(scores.data(), latents, scratch.data());
      for (int64_t p = 0; p < panels; ++p) {
        states_[row].scan(of(row, p), token, weights_, first_ + p * step_);
      }
    }
  }

  // Of a sample as large as this, `expected` latents are among the best k on average (a Poisson number when the best
  // are scattered). Five standard deviations more make a second scan rare.
  float guess(const float* scores, int64_t latents, float* scratch) const {
    const double expected = static_cast<double>(k_) * latents / (task_.end - task_.begin);
    const auto nth = static_cast<int64_t>(expected + 5.0 * std::sqrt(expected) + 3.0);
    return nth <= latents ? screen_kernels()->nth_largest(scores, latents, nth, scratch)
                          : -std::numeric_limits<float>::infinity();
  }

  // Rounded itself, then compared with rounded values: twice the margin.
  static float twice_below(float value) { return darkmatter::twice_below(kMargin<T>, value); }

  // Raises the limit of a token to just below the k-th best score: scores are off by far less than their bounds, which
  // hold for the worst rounding and not for the usual one, about 1 / sqrt(d) of it.
  void raise_limit(TopKState<T>& state, std::vector<float>& scratch) const {
    const Candidates& found = state.found;
    if (found.count >= k_) {
      scratch.resize(2 * found.count + 32);
      const float kth = screen_kernels()->nth_largest(found.score.data(), found.count, k_, scratch.data());
      const float slack = 2.0f * (found.upper[0] - found.score[0]) / std::sqrt(static_cast<float>(weights_.d));
      state.limit = std::max(state.limit, twice_below(kth - slack));
    }
  }

  // The best k among the candidates of the chosen tokens.
  void finish(const std::vector<char>& chosen, bool guess) {
    std::vector<float> scratch;
    Pairs pairs;
    for (int64_t row = 0; row < tokens_.count; ++row) {
      TopKState<T>& state = states_[row];
      if (chosen[row] && state.screened) {
        if (guess) {
          raise_limit(state, scratch);
        }
        for (int64_t c = 0; c < state.found.count; ++c) {
          if (!(state.found.upper[c] < state.limit)) {
            pairs.latent.push_back(state.found.latent[c]);
          }
        }
      }
      pairs.end_token();
    }
    const Rescored<T> exact = rescore(
        tokens_, packed_, weights_, task_.begin, task_.end, pairs,
        [&](int32_t row, int32_t) { return states_[row].limit; });
    for (int64_t row = 0; row < tokens_.count; ++row) {
      for (int64_t p = pairs.start[row]; p < pairs.start[row + 1]; ++p) {
        if (exact.known[p]) {
          states_[row].best.offer_any(k_, {exact.h[p], pairs.latent[p]});
        }
      }
    }
  }

  // Once more, with limits that are certain, the tokens whose guesses were too high.
  void correct() {
    std::vector<char> wrong(tokens_.count, 0), missed(tokens_.count, 0);
    for (int64_t row = 0; row < tokens_.count; ++row) {
      TopKState<T>& state = states_[row];
      state.certain = std::max(state.certain, margin_below<T>(state.best.reached(k_)));
      if (state.screened && !(state.certain >= state.limit)) {
        wrong[row] = 1;
        missed[row] = !(state.certain >= state.scan_limit);
        state.limit = state.certain;
        state.best = {};
      }
    }
    scan_again(missed);
    if (std::find(wrong.begin(), wrong.end(), 1) != wrong.end()) {
      finish(wrong, false);
    }
  }

  // In runs of whole tiles, the only way to scan at full speed.
  void scan_again(const std::vector<char>& missed) {
    const auto in_tile = [&](int64_t row) {
      const auto end = missed.begin() + std::min(row + kScreenTokens, tokens_.count);
      return std::find(missed.begin() + row, end, 1) != end;
    };
    for (int64_t row = 0; row < tokens_.count; ++row) {
      if (missed[row]) {
        states_[row].found.count = 0;
      }
    }
    for (int64_t row = 0, end = 0; row < tokens_.count; row = end + kScreenTokens) {
      for (end = row; end < tokens_.count && in_tile(end);) {
        end += kScreenTokens;
      }
      scan_panels(
          tokens_, weights_, row, std::min(end, tokens_.count) - row, first_, last_, 1,
          [&](int64_t one, int64_t panel, const int32_t* products) {
            if (missed[one]) {
              states_[one].scan(products, tokens_.screened[one], weights_, panel);
            }
          });
    }
  }

  const TaskTokens<T>& tokens_;
  const Packed& packed_;
  const ScreenedWeights weights_;
  const Tiling::Task& task_;
  const int64_t k_, first_, last_, step_;
  std::vector<TopKState<T>> states_;
};

}  // namespace darkmatter
