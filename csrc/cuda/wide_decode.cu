// wide_decode and wide_dot on CUDA: launch and registration. Nothing waits for the device.
#include <vector>

#include "cuda/active.h"
#include "cuda/kernels/wide_rows.cuh"

namespace darkmatter::cuda {

static Tensor wide_decode(Tensor values, Tensor indices, Tensor W_dec) {
  check_dim("W_dec", W_dec, 2);
  check_values(values, indices);
  check_type("values", values, ScalarType::Double);
  const OnDevice device(W_dec);
  const Active active(indices, std::nullopt, W_dec.size(0));
  const int64_t d = W_dec.size(1);
  const Tensor rows = torch::stable::contiguous(W_dec), factors = torch::stable::contiguous(values);
  Tensor out = torch::stable::new_empty(factors, {active.latents.n_tokens, d});
  if (out.numel() > 0) {
    Arena arena{nullptr};
    arena.take<int64_t>(active.latents.k);
    arena.take<double>(active.latents.k);
    require(
        static_cast<int64_t>(arena.used) <= device.shared_limit(), "indices: must have at most ",
        device.shared_limit() / 16, " latents a token on this GPU, got ", active.latents.k);
    dispatch_floating("W_dec", W_dec.scalar_type(), [&](auto type) {
      using W = decltype(type);
      with_width<W>(rows, [&](auto width) {
        device.launch(
            wide_decode_kernel<W, width.value>, dim3(static_cast<unsigned>(active.latents.n_tokens)), kThreads,
            arena.used, data<double>(factors), active.latents, data<W>(rows), d, mutable_data<double>(out));
      });
    });
  }
  return out;
}

static Tensor wide_dot(Tensor rows, Tensor indices, Tensor W_dec) {
  check_dim("rows", rows, 2);
  check_dim("W_dec", W_dec, 2);
  check_size("rows", rows, 1, W_dec.size(1));
  check_type("rows", rows, ScalarType::Double);
  const OnDevice device(W_dec);
  const Active active(indices, std::nullopt, W_dec.size(0));
  check_size("rows", rows, 0, active.latents.n_tokens);
  const Tensor left = torch::stable::contiguous(rows), weights = torch::stable::contiguous(W_dec);
  const std::vector<int64_t> shape(indices.sizes().begin(), indices.sizes().end());
  Tensor out = torch::stable::new_empty(left, shape);
  if (out.numel() > 0) {
    dispatch_floating("W_dec", W_dec.scalar_type(), [&](auto type) {
      using W = decltype(type);
      device.launch(
          wide_dot_kernel<W>, dim3(static_cast<unsigned>(active.latents.n_tokens)), kThreads, 0, data<double>(left),
          active.latents, data<W>(weights), W_dec.size(1), mutable_data<double>(out));
    });
  }
  return out;
}

}  // namespace darkmatter::cuda

STABLE_TORCH_LIBRARY_IMPL(darkmatter, CUDA, m) {
  m.impl("wide_decode", DARKMATTER_OP(&darkmatter::cuda::wide_decode));
  m.impl("wide_dot", DARKMATTER_OP(&darkmatter::cuda::wide_dot));
}
