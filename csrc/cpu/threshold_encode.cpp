// threshold_encode: the pre-activations above a threshold, ragged (JumpReLU, BatchTopK at inference, ReLU with 0).
//
// Kept: h > threshold, strictly, and h that is NaN (a dense SAE would turn the whole row NaN; dropping it would hide
// it).
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "cpu/encoder.h"

namespace darkmatter {

// What one task keeps of one token, latents ascending.
template <typename T>
struct Kept {
  std::vector<int64_t> indices;
  std::vector<T> values;
};

template <typename T>
static std::tuple<Tensor, Tensor, Tensor> select_above(const Tensor& x, const Packed& packed, const Tensor& threshold) {
  const Tiling tiling(x.size(0), packed.weight.size(0), x.size(1));
  const T* limits = data<T>(threshold);
  const int64_t step = threshold.numel() == 1 && threshold.dim() == 0 ? 0 : 1;
  for (int64_t j = 0; j < threshold.numel(); ++j) {
    STD_TORCH_CHECK(limits[j] == limits[j], "threshold: must not contain NaN, got NaN at latent ", j);
  }
  std::vector<Kept<T>> kept(tiling.n_tokens * tiling.ranges);
  visit_pre_activations<T>(
      data<T>(x), packed, tiling, [&](int64_t range, int64_t token, int64_t first, int64_t latents, const T* h) {
        Kept<T>& own = kept[token * tiling.ranges + range];
        for (int64_t l = 0; l < latents; ++l) {
          if (!(h[l] <= limits[(first + l) * step])) {
            own.indices.push_back(first + l);
            own.values.push_back(relu(h[l]));
          }
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
    OptionalTensor bias) {
  check_encoder_input(x, W_enc);
  check_type("threshold", threshold, x.scalar_type());
  if (threshold.dim() != 0) {
    check_vector("threshold", threshold, W_enc.size(1));
  }
  const Packed packed = packed_encoder(W_enc, b_enc, b_dec, weight, bias);
  const Tensor rows = torch::stable::contiguous(x), limits = torch::stable::contiguous(threshold);
  return dispatch_floating(
      "x", x.scalar_type(), [&](auto type) { return select_above<decltype(type)>(rows, packed, limits); });
}

}  // namespace darkmatter

STABLE_TORCH_LIBRARY_IMPL(darkmatter, CPU, m) { m.impl("threshold_encode", TORCH_BOX(&darkmatter::threshold_encode)); }
