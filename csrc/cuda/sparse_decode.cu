// sparse_decode and its two gradients on CUDA: launch and registration. Nothing waits for the device.
#include "cuda/kernels/sparse_decode.cuh"

#include <tuple>
#include <vector>

#include "cuda/active.h"

namespace darkmatter::cuda {

template <typename T, int kWidth, bool kSkipZeros>
static void launch_decode(
    const OnDevice& device, const Tensor& values, const ActiveLatents& active, const Tensor& rows,
    const OptionalTensor& bias, const Tensor& out) {
  const int64_t d = rows.size(1);
  const dim3 grid(
      static_cast<unsigned>(ceil_div(active.n_tokens, kWarps)), static_cast<unsigned>(ceil_div(d, 32 * kWidth)));
  device.launch(
      sparse_decode_kernel<T, kWidth, kSkipZeros>, grid, kThreads, 0, data<T>(values), active, data<T>(rows),
      data<T>(bias), d, mutable_data<T>(out));
}

// out [N, d] = sums of rows [.., d] weighted by values.
template <bool kSkipZeros>
static void weighted_rows(
    const OnDevice& device, const Tensor& values, const ActiveLatents& active, const Tensor& rows,
    const OptionalTensor& bias, const Tensor& out) {
  if (out.numel() == 0) {
    return;
  }
  dispatch_floating("rows", rows.scalar_type(), [&](auto type) {
    using T = decltype(type);
    constexpr int kWidth = kSliceBytes / 32 / sizeof(T);
    const auto address = reinterpret_cast<uintptr_t>(rows.const_data_ptr());
    if (rows.size(1) % kWidth == 0 && address % 16 == 0) {
      launch_decode<T, kWidth, kSkipZeros>(device, values, active, rows, bias, out);
    } else {
      launch_decode<T, 1, kSkipZeros>(device, values, active, rows, bias, out);
    }
  });
}

static Tensor sparse_decode(Tensor values, Tensor indices, OptionalTensor crow, Tensor W_dec, OptionalTensor b_dec) {
  check_dim("W_dec", W_dec, 2);
  check_floating("W_dec", W_dec);
  check_values(values, indices);
  check_type("values", values, W_dec.scalar_type());
  if (b_dec) {
    check_vector("b_dec", *b_dec, W_dec.size(1));
    check_type("b_dec", *b_dec, W_dec.scalar_type());
  }
  const OnDevice device(W_dec);
  const Active active(indices, crow, W_dec.size(0));
  const Tensor rows = torch::stable::contiguous(W_dec), factors = torch::stable::contiguous(values);
  Tensor out = torch::stable::new_empty(W_dec, {active.latents.n_tokens, W_dec.size(1)});
  weighted_rows<true>(device, factors, active.latents, rows, contiguous_or_none(b_dec), out);
  return out;
}

static Tensor decoder_dot(Tensor rows, Tensor indices, OptionalTensor crow, Tensor W_dec) {
  check_dim("rows", rows, 2);
  check_dim("W_dec", W_dec, 2);
  check_floating("W_dec", W_dec);
  check_size("rows", rows, 1, W_dec.size(1));
  check_type("rows", rows, W_dec.scalar_type());
  const OnDevice device(W_dec);
  const Active active(indices, crow, W_dec.size(0));
  check_size("rows", rows, 0, active.latents.n_tokens);
  const Tensor left = torch::stable::contiguous(rows), weights = torch::stable::contiguous(W_dec);
  const std::vector<int64_t> shape(indices.sizes().begin(), indices.sizes().end());
  Tensor out = torch::stable::new_empty(W_dec, shape);
  if (out.numel() > 0) {
    dispatch_floating("W_dec", W_dec.scalar_type(), [&](auto type) {
      using T = decltype(type);
      const int64_t d = W_dec.size(1);
      const bool staged = d <= kMaxStaged;
      device.launch(
          decoder_dot_kernel<T>, dim3(static_cast<unsigned>(active.latents.n_tokens)), kThreads,
          staged ? d * sizeof(double) : 0, data<T>(left), active.latents, data<T>(weights), d, staged,
          mutable_data<T>(out));
    });
  }
  return out;
}

// Sums over the tokens of a latent are the sums over the latents of a token with the roles exchanged: the active
// latents sorted by latent, tokens ascending within one, are the "active tokens" of each latent.
static Tensor decoder_outer(Tensor values, Tensor indices, OptionalTensor crow, Tensor rows, int64_t n_latents) {
  check_dim("rows", rows, 2);
  check_floating("rows", rows);
  check_values(values, indices);
  check_type("values", values, rows.scalar_type());
  require(n_latents >= 0, "n_latents: must be at least 0, got ", n_latents);
  const OnDevice device(rows);
  const Active active(indices, crow, n_latents);
  check_size("rows", rows, 0, active.latents.n_tokens);
  Tensor out = torch::stable::new_empty(rows, {n_latents, rows.size(1)});
  const int64_t n = indices.numel();
  const Tensor flat = torch::stable::reshape(active.indices, {n});
  const auto [sorted, order] = stable_sort(flat, false);
  const Tensor right = torch::stable::contiguous(rows), factors = torch::stable::contiguous(values);
  Tensor starts = torch::stable::new_empty(sorted, {n_latents + 1});
  Tensor tokens = torch::stable::new_empty(sorted, {n}), own = torch::stable::new_empty(factors, {n});
  dispatch_floating("rows", rows.scalar_type(), [&](auto type) {
    using T = decltype(type);
    const int64_t most = std::max(n, n_latents + 1);
    device.launch(
        segments_kernel<T>, dim3(static_cast<unsigned>(ceil_div(most, kThreads))), kThreads, 0, data<int64_t>(sorted),
        data<int64_t>(order), n, active.latents, data<T>(factors), mutable_data<int64_t>(starts),
        mutable_data<int64_t>(tokens), mutable_data<T>(own));
  });
  const ActiveLatents by_latent{data<int64_t>(tokens), data<int64_t>(starts), 0, n_latents, active.latents.n_tokens};
  weighted_rows<false>(device, own, by_latent, right, std::nullopt, out);
  return out;
}

}  // namespace darkmatter::cuda

STABLE_TORCH_LIBRARY_IMPL(darkmatter, CUDA, m) {
  m.impl("sparse_decode", TORCH_BOX(&darkmatter::cuda::sparse_decode));
  m.impl("decoder_dot", TORCH_BOX(&darkmatter::cuda::decoder_dot));
  m.impl("decoder_outer", TORCH_BOX(&darkmatter::cuda::decoder_outer));
}
