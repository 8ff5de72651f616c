// topk_encode on CUDA: screening, exact values of the candidates, and an exact path for whatever screening cannot help.
// Nothing waits for the device.
#include <tuple>

#include "cuda/encoder.h"
#include "cuda/screen/filter_topk.cuh"

namespace darkmatter::cuda {

constexpr int64_t kSortedBytes = 256 << 20;  // of exact scores at a time, where all are sorted

template <typename T, int kSize>
static void screened_topk(
    const OnDevice& device, const Tensor& x, const OptionalTensor& b_dec, const Packed& packed, int k,
    const Tensor& values, const Tensor& indices) {
  ScreenPass pass(device, x, b_dec, packed, k, FusedQuestion{k, margin_of<T>(), {nullptr, 0}});
  ExactRows<T> all = exact_rows<T>(x, packed);
  const size_t finish_bytes = fit_shared(device, all, [](Arena& arena) {
    TopKArrays{arena, kSize};
    arena.take<FinishShared>(1);
  });
  pass.run<T>(
      x,
      [&](const ScoreChunk& chunk, const ScreenedLatents& latents, const ScreenedTokens& tokens,
          const CandidateLists& lists, dim3 grid) {
        device.launch(
            filter_topk_kernel<kSize>, grid, kThreads, sizeof(FilterShared), chunk, latents, tokens, lists, k,
            margin_of<T>());
      },
      [&](int64_t first, int64_t n, const ScreenedTokens& tokens, const CandidateLists& lists) {
        ExactRows<T> tile = all;
        tile.x += first * all.d;
        tile.n = n;
        device.launch(
            finish_topk_kernel<T, kSize>, dim3(static_cast<unsigned>(n)), kThreads, finish_bytes, tile, tokens, lists,
            k, mutable_data<T>(values) + first * k, mutable_data<int64_t>(indices) + first * k);
      });
  exact_answers<T>(
      device, x, packed, pass.exact(), BestOfScores<T>{k, mutable_data<T>(values), mutable_data<int64_t>(indices)});
}

// All pre-activations, sorted by torch: stable, so that ties keep the order of latents, and NaN first.
template <typename T>
static void sorted_topk(
    const OnDevice& device, const Tensor& x, const Packed& packed, int64_t k, const Tensor& values,
    const Tensor& indices) {
  const int64_t n_tokens = x.size(0), n_latents = packed.weight.size(0);
  const int64_t row_bytes = n_latents * static_cast<int64_t>(sizeof(T) + sizeof(int64_t));
  const int64_t most = std::max<int64_t>(kExactTokens, std::min(kSortedBytes / row_bytes, kMaxGridY * kExactTokens));
  for (int64_t first = 0; first < n_tokens; first += most) {
    const int64_t n = std::min(most, n_tokens - first);
    const std::array<int64_t, 2> shape{n, n_latents};  // (nvcc 13.0 stumbles over the braces as an argument here)
    const Tensor scores = torch::stable::new_empty(x, shape);
    exact_scores(device, exact_products<T>(x, packed), MarkedTokens{}, first, n, mutable_data<T>(scores));
    const auto [best, latents] = stable_sort(scores, true);
    Tensor values_out = torch::stable::narrow(const_cast<Tensor&>(values), 0, first, n);
    Tensor indices_out = torch::stable::narrow(const_cast<Tensor&>(indices), 0, first, n);
    Tensor all_best = best, all_latents = latents;
    torch::stable::copy_(values_out, relu_of(torch::stable::narrow(all_best, 1, 0, k)));
    torch::stable::copy_(indices_out, torch::stable::narrow(all_latents, 1, 0, k));
  }
}

static std::tuple<Tensor, Tensor> topk_encode(
    Tensor x, Tensor W_enc, Tensor b_enc, OptionalTensor b_dec, int64_t k, OptionalTensor weight, OptionalTensor bias,
    OptionalTensor codes, OptionalTensor sums, OptionalTensor bounds, OptionalTensor groups, OptionalTensor gain) {
  check_encoder_input(x, W_enc);
  require(k >= 0 && k <= W_enc.size(1), "k: must be from 0 to ", W_enc.size(1), " (latents), got ", k);
  const OnDevice device(x);
  const bool screen = can_screen(W_enc) && k <= kMaxScreenK && 8 * k <= W_enc.size(1);
  const Packed packed =
      packed_encoder(device, W_enc, b_enc, b_dec, {weight, bias, codes, sums, bounds, groups, gain}, screen);
  Tensor values = torch::stable::new_empty(x, {x.size(0), k});
  Tensor indices = torch::stable::new_empty(x, {x.size(0), k}, ScalarType::Long);
  if (x.size(0) > 0 && k > 0) {
    const Tensor rows = torch::stable::contiguous(x);
    if (packed.codes) {
      dispatch_screened("x", x.scalar_type(), [&](auto type) {
        using T = decltype(type);
        const auto screened = k > kShortK ? screened_topk<T, kLongList> : screened_topk<T, kList>;
        screened(device, rows, b_dec, packed, static_cast<int>(k), values, indices);
      });
    } else {
      dispatch_floating("x", x.scalar_type(), [&](auto type) {
        sorted_topk<decltype(type)>(device, rows, packed, k, values, indices);
      });
    }
  }
  return {values, indices};
}

}  // namespace darkmatter::cuda

STABLE_TORCH_LIBRARY_IMPL(darkmatter, CUDA, m) { m.impl("topk_encode", DARKMATTER_OP(&darkmatter::cuda::topk_encode)); }
