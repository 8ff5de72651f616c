// threshold_encode: the pre-activations above a threshold, ragged (JumpReLU, BatchTopK at inference, ReLU with 0).
//
// Kept: h > threshold, strictly, and h that is NaN (a dense SAE would turn the whole row NaN; dropping it would hide
// it).
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "cpu/screened.h"

namespace darkmatter {

// What one task keeps of one token, latents ascending.
template <typename T>
struct Kept {
  std::vector<int64_t> indices;
  std::vector<T> values;
};

// The thresholds in the dtype of x, and as limits of the screen's upper bounds.
template <typename T>
struct Thresholds {
  const T* values;
  int64_t step;  // 0: one for all latents
  std::vector<float> limits;

  Thresholds(const Tensor& threshold, int64_t padded) : values(data<T>(threshold)), step(threshold.dim() == 0 ? 0 : 1) {
    limits.assign(step ? padded : 1, std::numeric_limits<float>::infinity());
    for (int64_t j = 0; j < threshold.numel(); ++j) {
      require(values[j] == values[j], "threshold: must not contain NaN, got NaN at latent ", j);
      limits[j] = margin_below<T>(static_cast<float>(values[j]));
    }
  }

  void keep(Kept<T>& own, int64_t latent, T h) const {
    if (!(h <= values[latent * step])) {
      own.indices.push_back(latent);
      own.values.push_back(relu(h));
    }
  }
};

template <typename T>
static void exact_rows(
    WideRows& wide, int64_t tokens, const Packed& packed, const Thresholds<T>& thresholds, const Tiling::Task& task,
    Kept<T>* first_kept, int64_t ld_kept) {
  visit_range<T>(
      wide, tokens, packed, task.begin, task.end, [&](int64_t row, int64_t first, int64_t latents, const T* h) {
        for (int64_t l = 0; l < latents; ++l) {
          thresholds.keep(first_kept[row * ld_kept], first + l, h[l]);
        }
      });
}

template <typename T>
static void screen_rows(
    const TaskTokens<T>& tokens, const Packed& packed, const Thresholds<T>& thresholds, const Tiling::Task& task,
    Kept<T>* first_kept, int64_t ld_kept) {
  const ScreenedWeights weights = screened_weights(packed);
  const float* limits = thresholds.limits.data();
  std::vector<Candidates> found(task.tokens);
  const auto screened = [&](int64_t row) { return tokens.screened[row].screened && !found[row].too_many(); };
  scan_panels(
      tokens, weights, 0, task.tokens, task.begin / kPanel, ceil_div(task.end, kPanel), 1,
      [&](int64_t row, int64_t panel, const int32_t* products) {
        if (screened(row)) {
          found[row].scan(products, tokens.screened[row], weights, panel, limits, thresholds.step);
        }
      });
  Pairs pairs;
  for (int64_t row = 0; row < task.tokens; ++row) {
    if (screened(row)) {
      pairs.latent.insert(pairs.latent.end(), found[row].latent.begin(), found[row].latent.begin() + found[row].count);
    }
    pairs.end_token();
  }
  const Rescored<T> exact = rescore(tokens, packed, weights, task.begin, task.end, pairs, [&](int32_t, int32_t latent) {
    return limits[latent * thresholds.step];
  });
  for (int64_t row = 0; row < task.tokens; ++row) {
    Kept<T>& own = first_kept[row * ld_kept];
    if (!screened(row)) {
      WideRows wide = tokens.wide_row(row, weights.d);
      exact_rows<T>(wide, 1, packed, thresholds, task, &own, ld_kept);
    }
    for (int64_t p = pairs.start[row]; p < pairs.start[row + 1]; ++p) {
      if (exact.known[p]) {
        thresholds.keep(own, pairs.latent[p], exact.h[p]);
      }
    }
  }
}

template <typename T>
static std::tuple<Tensor, Tensor, Tensor> select_above(
    const Tensor& x, const Packed& packed, const std::vector<double>& centre, const Tensor& threshold) {
  const int64_t n_latents = packed.weight.size(0), d = packed.weight.size(1);
  const bool screen = packed.codes.has_value();
  const Tiling tiling = screen ? Tiling(x.size(0), n_latents, kScreenChunk, kScreenTokens, kPanel)
                               : Tiling::exact(x.size(0), n_latents, d);
  const Thresholds<T> thresholds(threshold, screen_panels(n_latents) * kPanel);
  std::vector<Kept<T>> kept(tiling.n_tokens * tiling.ranges);
  parallel_tasks(tiling.tasks(), [&](int64_t i) {
    const Tiling::Task task = tiling.task(i);
    const T* rows = data<T>(x) + task.token * d;
    Kept<T>* first_kept = &kept[task.token * tiling.ranges + task.number];
    if (screen) {
      const TaskTokens<T> tokens(rows, task.tokens, screened_weights(packed), centre);
      screen_rows(tokens, packed, thresholds, task, first_kept, tiling.ranges);
    } else {
      WideRows wide(task.tokens, d);
      wide.fill(kernels().of<T>(), rows, task.tokens);
      exact_rows(wide, task.tokens, packed, thresholds, task, first_kept, tiling.ranges);
    }
  });

  Tensor crow = torch::stable::new_empty(x, {tiling.n_tokens + 1}, ScalarType::Long);
  int64_t* starts = mutable_data<int64_t>(crow);
  starts[0] = 0;
  for (int64_t token = 0; token < tiling.n_tokens; ++token) {
    starts[token + 1] = starts[token];
    for (int64_t range = 0; range < tiling.ranges; ++range) {
      starts[token + 1] += kept[token * tiling.ranges + range].indices.size();
    }
  }
  Tensor col = torch::stable::new_empty(x, {starts[tiling.n_tokens]}, ScalarType::Long);
  Tensor values = torch::stable::new_empty(x, {starts[tiling.n_tokens]});
  parallel_ranges(tiling.n_tokens, 64, [&](int64_t begin, int64_t end) {
    for (int64_t token = begin; token < end; ++token) {
      int64_t at = starts[token];
      for (int64_t range = 0; range < tiling.ranges; ++range) {
        const Kept<T>& own = kept[token * tiling.ranges + range];
        std::copy(own.indices.begin(), own.indices.end(), mutable_data<int64_t>(col) + at);
        std::copy(own.values.begin(), own.values.end(), mutable_data<T>(values) + at);
        at += own.indices.size();
      }
    }
  });
  return {values, crow, col};
}

static std::tuple<Tensor, Tensor, Tensor> threshold_encode(
    Tensor x, Tensor W_enc, Tensor b_enc, OptionalTensor b_dec, Tensor threshold, OptionalTensor weight,
    OptionalTensor bias, OptionalTensor codes, OptionalTensor sums, OptionalTensor bounds) {
  check_encoder_input(x, W_enc);
  check_threshold(threshold, x, W_enc);
  const Packed packed = packed_encoder(W_enc, b_enc, b_dec, {weight, bias, codes, sums, bounds}, x.size(0));
  const Tensor rows = torch::stable::contiguous(x), limits = torch::stable::contiguous(threshold);
  return dispatch_floating("x", x.scalar_type(), [&](auto type) {
    return select_above<decltype(type)>(rows, packed, wide_vector(b_dec), limits);
  });
}

}  // namespace darkmatter

STABLE_TORCH_LIBRARY_IMPL(darkmatter, CPU, m) { m.impl("threshold_encode", TORCH_BOX(&darkmatter::threshold_encode)); }
