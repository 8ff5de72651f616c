// screen_intervals on CUDA: what screening knows of every pre-activation. For tests, and to see how tight the bound is.
#include <tuple>

#include "cuda/encoder.h"
#include "cuda/screen/screen_intervals.cuh"

namespace darkmatter::cuda {

static std::tuple<Tensor, Tensor, Tensor> screen_intervals(
    Tensor x, Tensor W_enc, Tensor b_enc, OptionalTensor b_dec, OptionalTensor weight, OptionalTensor bias,
    OptionalTensor codes, OptionalTensor sums, OptionalTensor bounds, OptionalTensor groups, OptionalTensor gain) {
  check_encoder_input(x, W_enc);
  require(
      can_screen(W_enc), "W_enc: must be float16, bfloat16 or float32 with at least ", kMinScreenD, " dimensions and ",
      kMinScreenLatents, " latents to be screened, got shape ", shape_of(W_enc));
  const OnDevice device(x);
  const Packed packed =
      packed_encoder(device, W_enc, b_enc, b_dec, {weight, bias, codes, sums, bounds, groups, gain}, true);
  const int64_t n_latents = W_enc.size(1);
  Tensor lower = torch::stable::new_empty(x, {x.size(0), n_latents}, ScalarType::Float);
  Tensor upper = torch::stable::new_empty(x, {x.size(0), n_latents}, ScalarType::Float);
  Tensor screened = torch::stable::new_zeros(x, {x.size(0)}, ScalarType::Bool);
  if (x.size(0) > 0) {
    const Tensor rows = torch::stable::contiguous(x);
    ScreenPass pass(device, rows, b_dec, packed, 0);
    int64_t first_token = 0;
    dispatch_screened("x", x.scalar_type(), [&](auto type) {
      pass.run<decltype(type)>(
          rows,
          [&](const ScoreChunk& chunk, const ScreenedLatents& latents, const ScreenedTokens& tokens,
              const CandidateLists&, dim3) {
            const dim3 grid(static_cast<unsigned>(ceil_div(chunk.width, kThreads)), static_cast<unsigned>(chunk.n));
            device.launch(
                write_intervals_kernel, grid, kThreads, 0, chunk, latents, tokens,
                mutable_data<float>(lower) + first_token * n_latents,
                mutable_data<float>(upper) + first_token * n_latents);
          },
          [&](int64_t, int64_t n, const ScreenedTokens&, const CandidateLists&) { first_token += n; });
    });
    torch::stable::copy_(screened, equal_to_zero(pass.exact()));
  }
  return {lower, upper, screened};
}

}  // namespace darkmatter::cuda

STABLE_TORCH_LIBRARY_IMPL(darkmatter, CUDA, m) {
  m.impl("screen_intervals", DARKMATTER_OP(&darkmatter::cuda::screen_intervals));
}
