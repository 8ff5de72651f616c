// Screening for the best k of each token of a task.
//
// The limit below which a latent is left out is first *guessed*, from the scores of a sample of the panels, so that a
// few times k latents are expected above it. When k exact values turn out to be at least the limit, nothing that was
// left out can be among the best k, whatever the guess was. Otherwise the token is scanned again with the k-th best
// exact value found so far as a limit that is certain.
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
  float limit = -std::numeric_limits<float>::infinity();
  bool screened = true;  // false: the exact path decides

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
    std::vector<char> chosen(tokens_.count, 1);
    finish(chosen);
    scan_again();
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
    std::vector<float> scores(panels * kPanel), scratch(2 * panels * kPanel + 32);
    float bound[kPanel];
    for (int64_t row = first_row; row < first_row + n; ++row) {
      const ScreenedToken& token = tokens_.screened[row];
      int64_t latents = 0;
      for (int64_t p = 0; p < panels; ++p) {
        const int64_t panel = first_ + p * step_;
        screen_kernels()->intervals(of(row, p), token, weights_, panel, scores.data() + latents, bound);
        latents += std::min(kPanel, task_.end - panel * kPanel);
      }
      states_[row].limit = guess(scores.data(), latents, scratch.data());
      for (int64_t p = 0; p < panels; ++p) {
        states_[row].scan(of(row, p), token, weights_, first_ + p * step_);
      }
    }
  }

  // Of a sample as large as this, `expected` latents are among the best k on average (a Poisson number when the best
  // are scattered). Four standard deviations more make a second scan rare.
  float guess(const float* scores, int64_t latents, float* scratch) const {
    const double expected = static_cast<double>(k_) * latents / (task_.end - task_.begin);
    const auto nth = static_cast<int64_t>(expected + 4.0 * std::sqrt(expected) + 3.0);
    return nth <= latents ? screen_kernels()->nth_largest(scores, latents, nth, scratch)
                          : -std::numeric_limits<float>::infinity();
  }

  // k values are known to be at least the k-th largest lower bound: the limit that follows for upper bounds. Rounded
  // itself, then compared with rounded values: twice the margin.
  float limit_of(const float* lower, int64_t n, std::vector<float>& scratch) const {
    if (n < k_) {
      return -std::numeric_limits<float>::infinity();
    }
    scratch.resize(2 * n + 32);
    return margin_below<T>(margin_below<T>(screen_kernels()->nth_largest(lower, n, k_, scratch.data())));
  }

  // The best k among the candidates of the chosen tokens. The k most promising candidates first: what they reach keeps
  // most of the others from being looked at.
  void finish(const std::vector<char>& chosen) {
    std::vector<float> scratch, limits(tokens_.count, -std::numeric_limits<float>::infinity());
    Pairs likely, others, last;
    const auto wanted = [&](int64_t row) { return chosen[row] && states_[row].screened; };
    for (int64_t row = 0; row < tokens_.count; ++row) {
      Candidates& found = states_[row].found;
      if (wanted(row) && found.count > 0) {
        scratch.resize(2 * found.count + 32);
        const float least =
            screen_kernels()->nth_largest(found.upper.data(), found.count, std::min(k_, found.count), scratch.data());
        move_above(found, least, likely);
      }
      likely.end_token();
    }
    const Refined first = refine(tokens_, packed_, weights_, task_.begin, task_.end, likely);
    for (int64_t row = 0; row < tokens_.count; ++row) {
      if (wanted(row)) {
        const int64_t start = likely.start[row];
        limits[row] = limit_of(first.lower.data() + start, likely.start[row + 1] - start, scratch);
        move_above(states_[row].found, limits[row], others);
      }
      others.end_token();
    }
    const Refined second = refine(tokens_, packed_, weights_, task_.begin, task_.end, others);
    std::vector<float> lower;
    for (int64_t row = 0; row < tokens_.count; ++row) {
      lower.clear();
      each_pair(row, likely, first, others, second, [&](int32_t, float low, float) { lower.push_back(low); });
      const float limit = limit_of(lower.data(), static_cast<int64_t>(lower.size()), scratch);
      each_pair(row, likely, first, others, second, [&](int32_t latent, float, float high) {
        if (!(high < limit)) {
          last.latent.push_back(latent);
        }
      });
      last.end_token();
    }
    const std::vector<T> h = rescore(tokens_, packed_, task_.begin, task_.end, last);
    for (int64_t row = 0; row < tokens_.count; ++row) {
      for (int64_t p = last.start[row]; p < last.start[row + 1]; ++p) {
        states_[row].best.offer_any(k_, {h[p], last.latent[p]});
      }
    }
  }

  // Moves the candidates whose upper bound is not below `least` to the last token of `pairs`.
  static void move_above(Candidates& found, float least, Pairs& pairs) {
    int64_t kept = 0;
    for (int64_t c = 0; c < found.count; ++c) {
      if (found.upper[c] < least) {
        found.upper[kept] = found.upper[c];
        found.latent[kept++] = found.latent[c];
      } else {
        pairs.latent.push_back(found.latent[c]);
      }
    }
    found.count = kept;
  }

  template <typename Visit>
  static void each_pair(
      int64_t row, const Pairs& a, const Refined& of_a, const Pairs& b, const Refined& of_b, const Visit& visit) {
    for (int64_t p = a.start[row]; p < a.start[row + 1]; ++p) {
      visit(a.latent[p], of_a.lower[p], of_a.upper[p]);
    }
    for (int64_t p = b.start[row]; p < b.start[row + 1]; ++p) {
      visit(b.latent[p], of_b.lower[p], of_b.upper[p]);
    }
  }

  // The tokens whose guess was too high, in runs of tiles: the scan works at full speed only on whole tiles.
  void scan_again() {
    std::vector<char> again(tokens_.count, 0);
    for (int64_t row = 0; row < tokens_.count; ++row) {
      TopKState<T>& state = states_[row];
      const float certain = state.screened ? margin_below<T>(state.best.reached(k_)) : 0;
      if (state.screened && !(certain >= state.limit)) {
        again[row] = 1;
        state.limit = certain;
        state.found.count = 0;
        state.best = {};
      }
    }
    const auto in_tile = [&](int64_t row) {
      const auto begin = again.begin() + row;
      return std::find(begin, again.begin() + std::min(row + kScreenTokens, tokens_.count), 1) !=
             again.begin() + std::min(row + kScreenTokens, tokens_.count);
    };
    bool any = false;
    for (int64_t row = 0; row < tokens_.count;) {
      int64_t end = row;
      while (end < tokens_.count && in_tile(end)) {
        end += kScreenTokens;
      }
      if (end > row) {
        any = true;
        scan_panels(
            tokens_, weights_, row, std::min(end, tokens_.count) - row, first_, last_, 1,
            [&](int64_t one, int64_t panel, const int32_t* products) {
              if (again[one]) {
                states_[one].scan(products, tokens_.screened[one], weights_, panel);
              }
            });
      }
      row = std::max(end, row + kScreenTokens);
    }
    if (any) {
      finish(again);
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
