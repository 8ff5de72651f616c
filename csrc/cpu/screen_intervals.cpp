// screen_intervals: the interval that screening gives each pre-activation, all of them, for tests and for looking at
// how tight the bound is on some data. The encoders themselves never make this [N, F] array.
#include <tuple>

#include "cpu/screen/candidates.h"
#include "registration.h"

namespace darkmatter::cpu {

template <typename T>
static void intervals_of_task(
    const T* x, const Packed& packed, const std::vector<double>& centre, const Tiling::Task& task, float* lower,
    float* upper, bool* screened) {
  const ScreenedWeights weights = screened_weights(packed);
  const TaskTokens<T> tokens(x + task.token * weights.d, task.tokens, weights, centre);
  float score[kPanel], bound[kPanel];
  scan_panels(
      tokens, packed, weights, rows_between(0, task.tokens), task.begin / kPanel, ceil_div(task.end, kPanel), 1,
      [&](int64_t row, int64_t panel, const int32_t* products) {
        screen_kernels()->intervals(products, tokens.screened[row], weights, panel, score, bound);
        for (int64_t l = 0; l < std::min(kPanel, weights.n_places - panel * kPanel); ++l) {
          packed.places.each_of(panel * kPanel + l, [&](int32_t latent) {
            const int64_t at = (task.token + row) * packed.n_latents() + latent;
            const bool known = score[l] == score[l] && bound[l] == bound[l];
            lower[at] = known ? lower_end(score[l], bound[l]) : -std::numeric_limits<float>::infinity();
            upper[at] = known ? upper_end(score[l], bound[l]) : std::numeric_limits<float>::infinity();
          });
        }
      });
  for (int64_t row = 0; row < task.tokens; ++row) {
    screened[task.token + row] = tokens.screened[row].screened;
  }
}

static std::tuple<Tensor, Tensor, Tensor> screen_intervals(
    Tensor x, Tensor W_enc, Tensor b_enc, OptionalTensor b_dec, OptionalTensor weight, OptionalTensor bias,
    OptionalTensor codes, OptionalTensor sums, OptionalTensor bounds, OptionalTensor groups, OptionalTensor gain) {
  check_encoder_input(x, W_enc);
  const Packed packed =
      packed_encoder(W_enc, b_enc, b_dec, {weight, bias, codes, sums, bounds, groups, gain}, x.size(0));
  require(packed.codes.has_value(), "codes: must be those of a machine that can screen, got none");
  const int64_t n_tokens = x.size(0), n_latents = W_enc.size(1);
  // Of latents that have no place nothing is known: (-inf, inf).
  const float infinity = std::numeric_limits<float>::infinity();
  Tensor lower = torch::stable::new_empty(x, {n_tokens, n_latents}, ScalarType::Float);
  Tensor upper = torch::stable::new_empty(x, {n_tokens, n_latents}, ScalarType::Float);
  std::fill_n(mutable_data<float>(lower), n_tokens * n_latents, -infinity);
  std::fill_n(mutable_data<float>(upper), n_tokens * n_latents, infinity);
  Tensor screened = torch::stable::new_empty(x, {n_tokens}, ScalarType::Bool);
  const Tensor rows = torch::stable::contiguous(x);
  const std::vector<double> centre = wide_vector(b_dec);
  const Tiling tiling = screen_tiling(n_tokens, packed.places.n_places);
  dispatch_floating("x", x.scalar_type(), [&](auto type) {
    using T = decltype(type);
    parallel_tasks(tiling.tasks(), [&](int64_t i) {
      intervals_of_task<T>(
          data<T>(rows), packed, centre, tiling.task(i), mutable_data<float>(lower), mutable_data<float>(upper),
          mutable_data<bool>(screened));
    });
  });
  return {lower, upper, screened};
}

}  // namespace darkmatter::cpu

STABLE_TORCH_LIBRARY_IMPL(darkmatter, CPU, m) {
  m.impl("screen_intervals", DARKMATTER_OP(&darkmatter::cpu::screen_intervals));
}
