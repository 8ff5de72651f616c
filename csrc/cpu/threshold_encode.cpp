// threshold_encode: the pre-activations above a threshold, ragged (JumpReLU, BatchTopK at inference, ReLU with 0).
//
// Kept: h > threshold, strictly, and h that is NaN: a dense SAE would turn the whole row NaN, and dropping it would
// hide that. try_threshold_encode leaves the tokens that screening does not help to its caller.
#include <tuple>

#include "cpu/screen/encode_tokens.h"
#include "cpu/screen/rescore.h"
#include "registration.h"

namespace darkmatter::cpu {

// What one task keeps of one token.
template <typename T>
struct Kept {
  std::vector<int64_t> indices;
  std::vector<T> values;

  void sort() {
    std::vector<std::pair<int64_t, T>> both;
    for (size_t i = 0; i < indices.size(); ++i) {
      both.emplace_back(indices[i], values[i]);
    }
    std::sort(both.begin(), both.end(), [](const auto& a, const auto& b) { return a.first < b.first; });
    for (size_t i = 0; i < indices.size(); ++i) {
      std::tie(indices[i], values[i]) = both[i];
    }
  }
};

// The thresholds in the dtype of x, and as limits of the screen's upper bounds, by place.
template <typename T>
struct Thresholds {
  const T* values;
  int64_t step;  // 0: one for all latents
  std::vector<float> limits;

  Thresholds(const Tensor& threshold, const Places& places)
      : values(data<T>(threshold)), step(threshold.dim() == 0 ? 0 : 1) {
    for (int64_t j = 0; j < threshold.numel(); ++j) {
      require(values[j] == values[j], "threshold: must not contain NaN, got NaN at latent ", j);
    }
    if (step == 0) {
      limits = {margin_below<T>(static_cast<float>(*values))};
      return;
    }
    limits.assign(screen_panels(places.n_places) * kPanel, std::numeric_limits<float>::infinity());
    parallel_ranges(places.n_places, 1 << 12, [&](int64_t begin, int64_t end) {
      for (int64_t place = begin; place < end; ++place) {
        places.each_of(place, [&](int32_t latent) {
          limits[place] = std::min(limits[place], margin_below<T>(static_cast<float>(values[latent])));
        });
      }
    });
  }

  void keep(Kept<T>& own, int64_t latent, T h) const {
    if (!(h <= values[latent * step])) {
      own.indices.push_back(latent);
      own.values.push_back(relu(h));
    }
  }
};

// The latents above their thresholds of every token.
template <typename T>
class AboveThreshold {
 public:
  AboveThreshold(const EncodeTokens<T>& tokens, const Tensor& threshold)
      : tokens_(tokens),
        packed_(tokens_.packed),
        tiling_(tokens_.tiling),
        thresholds_(threshold, packed_.places),
        kept_(tiling_.n_tokens * tiling_.ranges),
        whole_(tiling_.n_tokens) {}

  void run() {
    tokens_.run(
        [&](const Tiling::Task& task) { screen_task(task); },
        [&](const Tiling::Task& task, const Rows& rows) { exact_task(task, rows); });
    Kept<T> constant, at_zero;
    tokens_.others.visit_constant([&](int32_t latent, T h) { thresholds_.keep(constant, latent, h); });
    if (tokens_.any_zero()) {
      tokens_.others.visit_all_at_zero([&](int32_t latent, T h) { thresholds_.keep(at_zero, latent, h); });
    }
    parallel_ranges(tiling_.n_tokens, 16, [&](int64_t begin, int64_t end) {
      for (int64_t token = begin; token < end; ++token) {
        if (!tokens_.left[token]) {
          join(token, constant, at_zero);
        }
      }
    });
  }

  const EncodeTokens<T>& tokens() const { return tokens_; }
  const Kept<T>& of(int64_t token) const { return whole_[token]; }

 private:
  Kept<T>& kept_of(int64_t token, const Tiling::Task& task) { return kept_[token * tiling_.ranges + task.number]; }

  void keep_place(Kept<T>& own, int64_t place, T h) const {
    packed_.places.each_of(place, [&](int32_t latent) { thresholds_.keep(own, latent, h); });
  }

  void exact_task(const Tiling::Task& task, const Rows& rows) {
    visit_exactly<T>(
        tokens_.row(task.token), rows, packed_, task.begin, task.end,
        [&](int64_t row, int64_t place, T h) { keep_place(kept_of(task.token + row, task), place, h); });
  }

  // Candidates of the tokens of a task. A few panels first: a token that already has more than its share there is given
  // up before the others cost anything.
  std::vector<Candidates> scan(const TaskTokens<T>& tokens, const Tiling::Task& task, std::vector<char>& screened) {
    const ScreenedWeights weights = screened_weights(packed_);
    const int64_t first = task.begin / kPanel, last = ceil_div(task.end, kPanel);
    const int64_t step = sample_step(last - first);
    const int64_t most = most_candidates(task.end - task.begin, tokens_.may_leave);
    std::vector<Candidates> found(task.tokens);
    const auto scan_some = [&](int64_t begin, int64_t end, int64_t by, int64_t at_most) {
      Rows rows;
      for (int64_t row = 0; row < task.tokens; ++row) {
        if (screened[row]) {
          rows.push_back(static_cast<int32_t>(row));
        }
      }
      scan_panels(
          tokens, packed_, weights, rows, begin, end, by, [&](int64_t row, int64_t panel, const int32_t* products) {
            if (screened[row]) {
              found[row].scan(
                  products, tokens.screened[row], weights, panel, thresholds_.limits.data(), thresholds_.step);
              screened[row] = found[row].count <= at_most;
            }
          });
    };
    if (step > 1) {
      scan_some(first, last, step, 2 * most / step + kCandidatesAtLeast);
    }
    for (int64_t panel = first; panel < last; panel += step) {
      scan_some(step > 1 ? panel + 1 : panel, std::min(panel + step, last), 1, most);
    }
    return found;
  }

  void screen_task(const Tiling::Task& task) {
    const TaskTokens<T> tokens(tokens_.row(task.token), task.tokens, screened_weights(packed_), tokens_.centre);
    std::vector<char> screened(task.tokens);
    for (int64_t row = 0; row < task.tokens; ++row) {
      screened[row] = tokens.screened[row].screened;
    }
    const std::vector<Candidates> found = scan(tokens, task, screened);
    Pairs pairs;
    for (int64_t row = 0; row < task.tokens; ++row) {
      if (screened[row]) {
        pairs.place.insert(pairs.place.end(), found[row].place.begin(), found[row].place.begin() + found[row].count);
      }
      pairs.end_token();
    }
    keep_exact(tokens, task, pairs);
    exact_task(task, tokens_.sort_undecided(tokens, task, [&](int64_t row) { return screened[row] != 0; }));
  }

  void keep_exact(const TaskTokens<T>& tokens, const Tiling::Task& task, const Pairs& pairs) {
    const Rescored<T> exact = rescore(
        tokens, packed_, screened_weights(packed_), task.begin, task.end, pairs, std::numeric_limits<int64_t>::max(),
        [&](int32_t, int32_t place) { return thresholds_.limits[place * thresholds_.step]; });
    for (int64_t row = 0; row < task.tokens; ++row) {
      for (int64_t p = pairs.start[row]; p < pairs.start[row + 1]; ++p) {
        if (exact.known[p]) {
          keep_place(kept_of(task.token + row, task), pairs.place[p], exact.h[p]);
        }
      }
    }
  }

  // All that is kept of a token, latents ascending.
  void join(int64_t token, const Kept<T>& constant, const Kept<T>& at_zero) {
    Kept<T>& whole = whole_[token];
    const auto add = [&](const Kept<T>& part) {
      whole.indices.insert(whole.indices.end(), part.indices.begin(), part.indices.end());
      whole.values.insert(whole.values.end(), part.values.begin(), part.values.end());
    };
    const auto keep = [&](int32_t latent, T h) { thresholds_.keep(whole, latent, h); };
    const T* x = tokens_.row(token);
    if (tokens_.zero[token]) {
      add(at_zero);
    } else {
      for (int64_t range = 0; range < tiling_.ranges; ++range) {
        add(kept_[token * tiling_.ranges + range]);
      }
      if (tokens_.others.constant_of(x)) {
        add(constant);
      } else {
        tokens_.others.visit_constant_as_nan(packed_.places.n_constant, keep);
      }
    }
    tokens_.others.visit_odd(x, keep);
    if (!std::is_sorted(whole.indices.begin(), whole.indices.end())) {
      whole.sort();
    }
  }

  EncodeTokens<T> tokens_;
  const Packed& packed_;
  const Tiling& tiling_;
  const Thresholds<T> thresholds_;
  std::vector<Kept<T>> kept_;   // [n_tokens, ranges]
  std::vector<Kept<T>> whole_;  // [n_tokens]
};

// values, crow, col as the op table has them, and the tokens that were left.
template <typename T>
static std::tuple<Tensor, Tensor, Tensor, Tensor> as_ragged(const Tensor& x, const AboveThreshold<T>& found) {
  const int64_t n_tokens = x.size(0);
  Tensor crow = torch::stable::new_empty(x, {n_tokens + 1}, ScalarType::Long);
  int64_t* starts = mutable_data<int64_t>(crow);
  starts[0] = 0;
  for (int64_t token = 0; token < n_tokens; ++token) {
    starts[token + 1] = starts[token] + static_cast<int64_t>(found.of(token).indices.size());
  }
  Tensor col = torch::stable::new_empty(x, {starts[n_tokens]}, ScalarType::Long);
  Tensor values = torch::stable::new_empty(x, {starts[n_tokens]});
  parallel_ranges(n_tokens, 64, [&](int64_t begin, int64_t end) {
    for (int64_t token = begin; token < end; ++token) {
      const Kept<T>& own = found.of(token);
      std::copy(own.indices.begin(), own.indices.end(), mutable_data<int64_t>(col) + starts[token]);
      std::copy(own.values.begin(), own.values.end(), mutable_data<T>(values) + starts[token]);
    }
  });
  std::vector<int64_t> left;
  found.tokens().list_left(0, left);
  return {values, crow, col, token_numbers(x, left)};
}

static std::tuple<Tensor, Tensor, Tensor, Tensor> encode(
    const Tensor& x, const Tensor& W_enc, const Tensor& b_enc, const OptionalTensor& b_dec, const Tensor& threshold,
    const PackedArguments& given, bool may_leave) {
  check_encoder_input(x, W_enc);
  check_threshold(threshold, x, W_enc);
  const Packed packed = packed_encoder(W_enc, b_enc, b_dec, given, x.size(0));
  const Tensor rows = torch::stable::contiguous(x), limits = torch::stable::contiguous(threshold);
  const std::vector<double> centre = wide_vector(b_dec);
  return dispatch_floating("x", x.scalar_type(), [&](auto type) {
    using T = decltype(type);
    const OtherLatents<T> others(packed, b_enc, centre);
    const bool screens = packed.codes.has_value();
    AboveThreshold<T> found({data<T>(rows), x.size(0), packed, others, centre, screens, may_leave}, limits);
    found.run();
    return as_ragged(x, found);
  });
}

static std::tuple<Tensor, Tensor, Tensor> threshold_encode(
    Tensor x, Tensor W_enc, Tensor b_enc, OptionalTensor b_dec, Tensor threshold, OptionalTensor weight,
    OptionalTensor bias, OptionalTensor codes, OptionalTensor sums, OptionalTensor bounds, OptionalTensor groups,
    OptionalTensor gain) {
  auto [values, crow, col, undecided] =
      encode(x, W_enc, b_enc, b_dec, threshold, {weight, bias, codes, sums, bounds, groups, gain}, false);
  return {values, crow, col};
}

static std::tuple<Tensor, Tensor, Tensor, Tensor> try_threshold_encode(
    Tensor x, Tensor W_enc, Tensor b_enc, OptionalTensor b_dec, Tensor threshold, OptionalTensor weight,
    OptionalTensor bias, OptionalTensor codes, OptionalTensor sums, OptionalTensor bounds, OptionalTensor groups,
    OptionalTensor gain) {
  return encode(x, W_enc, b_enc, b_dec, threshold, {weight, bias, codes, sums, bounds, groups, gain}, true);
}

}  // namespace darkmatter::cpu

STABLE_TORCH_LIBRARY_IMPL(darkmatter, CPU, m) {
  m.impl("threshold_encode", DARKMATTER_OP(&darkmatter::cpu::threshold_encode));
  m.impl("try_threshold_encode", DARKMATTER_OP(&darkmatter::cpu::try_threshold_encode));
}
