// sparse_decode and its two gradients on CUDA: launch and registration. Nothing waits for the device.
#include "cuda/kernels/sparse_decode.cuh"

#include <algorithm>
#include <tuple>
#include <vector>

#include "cuda/active.h"
#include "cuda/kernels/decoder_outer.cuh"

namespace darkmatter::cuda {

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
  const OptionalTensor bias = contiguous_or_none(b_dec);
  const int64_t d = W_dec.size(1);
  Tensor out = torch::stable::new_empty(W_dec, {active.latents.n_tokens, d});
  if (out.numel() == 0) {
    return out;
  }
  dispatch_floating("W_dec", W_dec.scalar_type(), [&](auto type) {
    using T = decltype(type);
    const int64_t groups = ceil_div(active.latents.n_tokens, kWarps);
    const auto launch = [&](auto width, auto ahead) {
      device.launch(
          sparse_decode_kernel<T, width.value, ahead.value>,
          dim3(static_cast<unsigned>(groups), static_cast<unsigned>(ceil_div(d, 32 * width.value))), kThreads, 0,
          data<T>(factors), active.latents, data<T>(rows), data<T>(bias), d, mutable_data<T>(out));
    };
    with_width<T>(rows, [&](auto width) {
      if (groups * ceil_div(d, 32 * width.value) < kDecodeBlocks * device.multiprocessors) {
        launch(std::integral_constant<int, 1>(), std::integral_constant<int, kFewAhead>());
      } else {
        launch(width, std::integral_constant<int, kDecodeAhead>());
      }
    });
  });
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

// Out [F, d] = for each latent the rows of its entries, weighted.
template <typename T>
static void launch_outer(
    const OnDevice& device, const Segments<T>& segments, int64_t n_entries, const Tensor& rows, const Tensor& out) {
  const int64_t d = rows.size(1), n_latents = segments.n_latents;
  const int64_t run = n_entries == 0 ? kMaxRun : std::clamp<int64_t>(kOuterEntries * n_latents / n_entries, 1, kMaxRun);
  with_width<T>(rows, [&](auto width) {
    constexpr int kLanesARow = outer_lanes<T, width.value>();
    const dim3 grid(
        static_cast<unsigned>(ceil_div(n_latents, run * (kThreads / kLanesARow))),
        static_cast<unsigned>(ceil_div(d, kLanesARow * width.value)));
    device.launch(
        decoder_outer_kernel<T, width.value>, grid, kThreads, 0, segments, run, data<T>(rows), d, mutable_data<T>(out));
  });
}

static Tensor decoder_outer(Tensor values, Tensor indices, OptionalTensor crow, Tensor rows, int64_t n_latents) {
  check_dim("rows", rows, 2);
  check_floating("rows", rows);
  check_values(values, indices);
  check_type("values", values, rows.scalar_type());
  require(
      n_latents >= 0 && n_latents < INT32_MAX, "n_latents: must be at least 0 and less than ", INT32_MAX, ", got ",
      n_latents);
  require(rows.size(0) < INT32_MAX, "rows: must have less than ", INT32_MAX, " rows, got shape ", shape_of(rows));
  const OnDevice device(rows);
  const Active active(indices, crow, n_latents);
  check_size("rows", rows, 0, active.latents.n_tokens);
  Tensor out = torch::stable::new_empty(rows, {n_latents, rows.size(1)});
  if (out.numel() == 0) {
    return out;
  }
  const int64_t n = indices.numel();
  const auto blocks = [](int64_t threads) { return dim3(static_cast<unsigned>(ceil_div(threads, kThreads))); };
  Tensor keys = torch::stable::new_empty(rows, {n}, ScalarType::Int);
  if (n > 0) {
    device.launch(
        latent_keys_kernel, blocks(n), kThreads, 0, data<int64_t>(active.indices), n, n_latents,
        mutable_data<int32_t>(keys));
  }
  const auto [sorted, order] = stable_sort(keys, false);
  const Tensor right = torch::stable::contiguous(rows), factors = torch::stable::contiguous(values);
  Tensor starts = torch::stable::new_empty(order, {n_latents + 1});
  Tensor tokens = torch::stable::new_empty(keys, {n}), own = torch::stable::new_empty(factors, {n});
  dispatch_floating("rows", rows.scalar_type(), [&](auto type) {
    using T = decltype(type);
    device.launch(
        segments_kernel<T>, blocks(std::max(n, n_latents + 1)), kThreads, 0, data<int32_t>(sorted),
        data<int64_t>(order), n, active.latents, data<T>(factors), mutable_data<int64_t>(starts),
        mutable_data<int32_t>(tokens), mutable_data<T>(own));
    const Segments<T> segments{
        data<int64_t>(starts), data<int32_t>(sorted), data<int32_t>(tokens), data<T>(own), n_latents};
    launch_outer(device, segments, n, right, out);
  });
  return out;
}

}  // namespace darkmatter::cuda

STABLE_TORCH_LIBRARY_IMPL(darkmatter, CUDA, m) {
  m.impl("sparse_decode", DARKMATTER_OP(&darkmatter::cuda::sparse_decode));
  m.impl("decoder_dot", DARKMATTER_OP(&darkmatter::cuda::decoder_dot));
  m.impl("decoder_outer", DARKMATTER_OP(&darkmatter::cuda::decoder_outer));
}
