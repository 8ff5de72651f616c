// to_dense on CUDA: active latents as dense acts [N, F]. Nothing waits for the device.
#include "cuda/kernels/to_dense.cuh"

#include "cuda/active.h"

namespace darkmatter::cuda {

static Tensor to_dense(Tensor values, Tensor indices, OptionalTensor crow, int64_t n_latents) {
  check_values(values, indices);
  check_floating("values", values);
  require(n_latents >= 0, "n_latents: must be at least 0, got ", n_latents);
  const OnDevice device(values);
  const Active active(indices, crow, n_latents);
  const Tensor given = torch::stable::contiguous(values);
  Tensor dense = torch::stable::new_zeros(values, {active.latents.n_tokens, n_latents});
  if (dense.numel() > 0 && given.numel() > 0) {
    dispatch_floating("values", values.scalar_type(), [&](auto type) {
      using T = decltype(type);
      device.launch(
          to_dense_kernel<T>, dim3(static_cast<unsigned>(ceil_div(active.latents.n_tokens, kThreads))), kThreads, 0,
          data<T>(given), active.latents, mutable_data<T>(dense));
    });
  }
  return dense;
}

}  // namespace darkmatter::cuda

STABLE_TORCH_LIBRARY_IMPL(darkmatter, CUDA, m) { m.impl("to_dense", DARKMATTER_OP(&darkmatter::cuda::to_dense)); }
