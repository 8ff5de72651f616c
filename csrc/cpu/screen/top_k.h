// Screening for the best k of each token of a task.
//
// The limit below which a latent is left out is *guessed*: for the scan from the scores of a sample of the panels, so
// that a few times k latents are expected above it, and then from the k-th best score of all. When k exact values turn
// out to be at least the limits, nothing that was left out can be among the best k, whatever the guesses were.
// Otherwise the token is done again with the k-th best exact value found so far as a limit that is certain.
#pragma once

#include "cpu/screen/best_k.h"
#include "cpu/screen/rescore.h"

namespace darkmatter::cpu {

constexpr int64_t kSampleTokens = 128;  // tokens whose sample is kept at a time: 128 x 1536 x 4 bytes at F 24576

constexpr int64_t kMostFound = 4096;  // candidates of a token, or 4 k: beyond, the bound does not help it

// What one task knows of one token.
template <typename T>
struct TopKState {
  Candidates found;
  Best<T> best;
  float certain = -std::numeric_limits<float>::infinity();     // known to leave out none of the best k
  float limit = -std::numeric_limits<float>::infinity();       // of the next step, guessed or certain
  float scan_limit = -std::numeric_limits<float>::infinity();  // of the candidates that were found
  bool screened = true;                                        // false: not decided here

  // `most`: candidates beyond which the token is given up.
  void scan(
      const int32_t* products, const ScreenedToken& token, const ScreenedWeights& weights, int64_t panel,
      int64_t most) {
    if (screened) {
      found.scan(products, token, weights, panel, &limit, 0);
      screened = found.count <= most;
    }
  }
};

// Offers the pre-activation of a place for each of its latents; of k equal ones the first k are enough.
template <typename T>
inline void offer_place(Best<T>& best, int64_t k, const Places& places, int64_t place, T h) {
  best.offer_any(k, {h, places.latent[place]});
  if (places.n_twins > 0) {
    const int32_t *twin = places.twins + places.twin_start[place], *end = places.twins + places.twin_start[place + 1];
    for (; twin < std::min(end, places.twins + places.twin_start[place] + k); ++twin) {
      best.offer_any(k, {h, *twin});
    }
  }
}

template <typename T>
class TopKScreen {
 public:
  // may_leave: tokens that screening does not help enough may be left undecided.
  TopKScreen(const TaskTokens<T>& tokens, const Packed& packed, const Tiling::Task& task, int64_t k, bool may_leave)
      : tokens_(tokens),
        packed_(packed),
        weights_(screened_weights(packed)),
        task_(task),
        k_(k),
        first_(task.begin / kPanel),
        last_(ceil_div(task.end, kPanel)),
        step_(sample_step(last_ - first_)),
        most_found_(std::max(kMostFound, 4 * k)),
        most_rescored_(std::max(4 * k, most_candidates(task.end - task.begin, may_leave))),
        states_(tokens.count) {
    for (int64_t row = 0; row < tokens.count; ++row) {
      states_[row].screened = tokens.screened[row].screened;
    }
  }

  // The best k of every token; a token whose state is not `screened` is not decided.
  std::vector<TopKState<T>>& run() {
    const Rows rows = screened_rows();
    for (size_t first = 0; first < rows.size(); first += kSampleTokens) {
      sample(Rows(rows.begin() + first, rows.begin() + std::min(first + kSampleTokens, rows.size())));
    }
    const Rows left = screened_rows();
    for (int64_t panel = first_; panel < last_; panel += step_) {  // the panels between those of the sample
      scan(left, panel + 1, std::min(panel + step_, last_));
    }
    for (TopKState<T>& state : states_) {
      state.scan_limit = state.limit;
    }
    finish(left, true);
    correct();
    return states_;
  }

 private:
  // Few places and narrow bounds: the certain limit is as good as a guess.
  bool all_sampled() const { return step_ == 1 && !screen_kernels()->refines; }

  Rows screened_rows() const {
    Rows rows;
    for (int64_t row = 0; row < tokens_.count; ++row) {
      if (states_[row].screened) {
        rows.push_back(static_cast<int32_t>(row));
      }
    }
    return rows;
  }

  void scan(const Rows& rows, int64_t begin, int64_t end) {
    scan_panels(
        tokens_, packed_, weights_, rows, begin, end, 1, [&](int64_t row, int64_t panel, const int32_t* products) {
          states_[row].scan(products, tokens_.screened[row], weights_, panel, most_found_);
        });
  }

  // Guesses the limits of some tokens, and scans the panels of the sample with them. A token that already has more than
  // its share of candidates there is given up before the other panels cost anything.
  void sample(const Rows& rows) {
    const int64_t panels = ceil_div(last_ - first_, step_);
    std::vector<int32_t> products(rows.size() * panels * kPanel);
    std::vector<int32_t> number(rows.back() + 1);
    for (size_t i = 0; i < rows.size(); ++i) {
      number[rows[i]] = static_cast<int32_t>(i);
    }
    const auto of = [&](int64_t row, int64_t p) { return products.data() + (number[row] * panels + p) * kPanel; };
    scan_panels(
        tokens_, packed_, weights_, rows, first_, last_, step_, [&](int64_t row, int64_t panel, const int32_t* some) {
          std::copy_n(some, kPanel, of(row, (panel - first_) / step_));
        });
    std::vector<float> scores(panels * kPanel), lower(scores.size()), scratch(2 * scores.size() + 32);
    float bound[kPanel];
    for (const int64_t row : rows) {
      const ScreenedToken& token = tokens_.screened[row];
      int64_t places = 0;
      for (int64_t p = 0; p < panels; ++p) {
        const int64_t panel = first_ + p * step_;
        screen_kernels()->intervals(of(row, p), token, weights_, panel, scores.data() + places, bound);
        for (int64_t l = 0; l < kPanel; ++l) {
          lower[places + l] = lower_end(scores[places + l], bound[l]);
        }
        places += std::min(kPanel, task_.end - panel * kPanel);
      }
      if (places >= k_) {  // k latents have a value of at least the k-th largest lower bound
        states_[row].certain = twice_below(screen_kernels()->nth_largest(lower.data(), places, k_, scratch.data()));
      }
      states_[row].limit = all_sampled() ? states_[row].certain : guess(scores.data(), places, scratch.data());
      for (int64_t p = 0; p < panels; ++p) {
        states_[row].scan(of(row, p), token, weights_, first_ + p * step_, most_found_ / step_ + 4 * k_);
      }
    }
  }

  // Of a sample as large as this, `expected` latents are among the best k on average (a Poisson number when the best
  // are scattered). Five standard deviations more make a second scan rare.
  float guess(const float* scores, int64_t places, float* scratch) const {
    const double expected = static_cast<double>(k_) * places / (task_.end - task_.begin);
    const auto nth = static_cast<int64_t>(expected + 5.0 * std::sqrt(expected) + 3.0);
    return nth <= places ? screen_kernels()->nth_largest(scores, places, nth, scratch)
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
  void finish(const Rows& chosen, bool guess) {
    std::vector<float> scratch;
    Pairs pairs;
    auto next = chosen.begin();
    for (int64_t row = 0; row < tokens_.count; ++row) {
      if (next != chosen.end() && *next == row) {
        ++next;
        if (states_[row].screened) {
          list_pairs(states_[row], guess, scratch, pairs);
        }
      }
      pairs.end_token();
    }
    const Rescored<T> exact = rescore(
        tokens_, packed_, weights_, task_.begin, task_.end, pairs, most_rescored_,
        [&](int32_t row, int32_t) { return states_[row].limit; });
    for (int64_t row = 0; row < tokens_.count; ++row) {
      if (exact.wanted[row] > most_rescored_) {
        states_[row].screened = false;  // no bound tells its latents apart
        continue;
      }
      for (int64_t p = pairs.start[row]; p < pairs.start[row + 1]; ++p) {
        if (exact.known[p]) {
          offer_place(states_[row].best, k_, packed_.places, pairs.place[p], exact.h[p]);
        }
      }
    }
  }

  void list_pairs(TopKState<T>& state, bool guess, std::vector<float>& scratch, Pairs& pairs) const {
    if (guess && !all_sampled()) {
      raise_limit(state, scratch);
    }
    const size_t before = pairs.place.size();
    for (int64_t c = 0; c < state.found.count; ++c) {
      if (!(state.found.upper[c] < state.limit)) {
        pairs.place.push_back(state.found.place[c]);
      }
    }
    if (static_cast<int64_t>(pairs.place.size() - before) > most_rescored_ && !screen_kernels()->refines) {
      state.screened = false;  // too many exact sums
      pairs.place.resize(before);
    }
  }

  // Once more, with limits that are certain, the tokens whose guesses were too high.
  void correct() {
    Rows wrong, missed;
    for (int64_t row = 0; row < tokens_.count; ++row) {
      TopKState<T>& state = states_[row];
      state.certain = std::max(state.certain, margin_below<T>(state.best.reached(k_)));
      if (state.screened && !(state.certain >= state.limit)) {
        wrong.push_back(static_cast<int32_t>(row));
        if (!(state.certain >= state.scan_limit)) {
          missed.push_back(static_cast<int32_t>(row));
          state.found.count = 0;
        }
        state.limit = state.certain;
        state.best = {};
      }
    }
    scan(missed, first_, last_);
    if (!wrong.empty()) {
      finish(wrong, false);
    }
  }

  const TaskTokens<T>& tokens_;
  const Packed& packed_;
  const ScreenedWeights weights_;
  const Tiling::Task& task_;
  const int64_t k_, first_, last_, step_, most_found_, most_rescored_;
  std::vector<TopKState<T>> states_;
};

}  // namespace darkmatter::cpu
