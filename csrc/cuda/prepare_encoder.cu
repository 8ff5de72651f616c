// prepare_encoder on CUDA: W_enc as contiguous rows [F, d], b_enc with b_dec folded in, float16 codes and their bounds.
#include <tuple>

#include "cuda/encoder.h"
#include "cuda/kernels/prepare_encoder.cuh"

namespace darkmatter::cuda {

// Waits for the device: the reason why only prepare_encoder looks for NaN, and not every call that packs for itself.
static void check_no_nan(const OnDevice& device, const char* name, const Tensor& tensor, const Tensor& given) {
  Tensor found = torch::stable::new_zeros(tensor, {1}, ScalarType::Long);
  if (tensor.numel() > 0) {
    const auto blocks =
        static_cast<unsigned>(std::min<int64_t>(ceil_div(tensor.numel(), kThreads), 8 * device.multiprocessors));
    dispatch_floating(name, tensor.scalar_type(), [&](auto type) {
      using T = decltype(type);
      device.launch(
          find_nan_kernel<T>, dim3(blocks), kThreads, 0, data<T>(tensor), tensor.numel(),
          mutable_data<unsigned long long>(found));
    });
  }
  int64_t count = 0;
  device.read({{data<int64_t>(found), &count}});
  require(count == 0, name, ": must not contain NaN, got shape ", shape_of(given), " with NaN");
}

static void make_codes(const OnDevice& device, Packed& packed, const Tensor& b_enc) {
  const int64_t n = packed.weight.size(0), d = packed.weight.size(1), d_padded = screen_padded(d);
  packed.codes = torch::stable::new_empty(packed.weight, {n, d_padded}, ScalarType::Half);
  packed.bounds = torch::stable::new_empty(packed.weight, {kBoundRows, n}, ScalarType::Float);
  dispatch_floating("weight", packed.weight.scalar_type(), [&](auto type) {
    using T = decltype(type);
    device.launch(
        round_latents_kernel<T>, dim3(static_cast<unsigned>(ceil_div(n, kWarps))), kThreads, 0, data<T>(packed.weight),
        data<T>(b_enc), n, d, d_padded, mutable_data<__half>(*packed.codes), mutable_data<float>(*packed.bounds));
  });
}

static Packed pack(
    const OnDevice& device, const Tensor& W_enc, const Tensor& b_enc, const OptionalTensor& b_dec, bool screen) {
  Packed packed{torch::stable::contiguous(torch::stable::transpose(W_enc, 0, 1)), {}, {}, {}};
  const int64_t n = packed.weight.size(0), d = packed.weight.size(1);
  packed.bias = torch::stable::new_empty(packed.weight, {n}, ScalarType::Double);
  const Tensor own_bias = torch::stable::contiguous(b_enc);
  const OptionalTensor centre = contiguous_or_none(b_dec);
  if (n > 0) {
    dispatch_floating("W_enc", W_enc.scalar_type(), [&](auto type) {
      using T = decltype(type);
      device.launch(
          fold_bias_kernel<T>, dim3(static_cast<unsigned>(ceil_div(n, kGroups))), kThreads, 0, data<T>(packed.weight),
          data<T>(own_bias), data<T>(centre), n, d, mutable_data<double>(packed.bias));
    });
  }
  if (screen) {
    make_codes(device, packed, own_bias);
  }
  return packed;
}

static void refuse_gain(const OptionalTensor& gain) {
  require(!gain, "gain: must be None on CUDA, which has no kernel for it, got a tensor");
}

void check_codes(const Tensor& codes, const Tensor& bounds, int64_t d, int64_t n_latents) {
  check_dim("codes", codes, 2);
  check_size("codes", codes, 0, n_latents);
  check_size("codes", codes, 1, screen_padded(d));
  check_type("codes", codes, ScalarType::Half);
  check_dim("bounds", bounds, 2);
  check_size("bounds", bounds, 0, kBoundRows);
  check_size("bounds", bounds, 1, n_latents);
  check_type("bounds", bounds, ScalarType::Float);
}

Packed packed_encoder(
    const OnDevice& device, const Tensor& W_enc, const Tensor& b_enc, const OptionalTensor& b_dec,
    const PackedArguments& given, bool screen) {
  refuse_gain(given.gain);
  if (!given.weight) {
    require(!given.bias && !given.codes, "weight: must be given with bias and codes, got them alone");
    check_encoder_weights(W_enc, b_enc, b_dec);
    return pack(device, W_enc, b_enc, b_dec, screen);
  }
  check_packed_rows(given, W_enc);
  Packed packed{torch::stable::contiguous(*given.weight), torch::stable::contiguous(*given.bias), {}, {}};
  if (screen && given.codes && given.codes->numel() > 0) {
    require(given.bounds.has_value(), "bounds: must be given with codes, got codes alone");
    check_codes(*given.codes, *given.bounds, W_enc.size(0), W_enc.size(1));
    packed.codes = torch::stable::contiguous(*given.codes);
    packed.bounds = torch::stable::contiguous(*given.bounds);
  }
  return packed;
}

// An op may not return a view of its input: a W_enc stored as [F, d] rows is copied for the caller who keeps it.
static std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> prepare_encoder(
    Tensor W_enc, Tensor b_enc, OptionalTensor b_dec, OptionalTensor gain) {
  refuse_gain(gain);
  check_encoder_weights(W_enc, b_enc, b_dec);
  const OnDevice device(W_enc);
  Packed packed = pack(device, W_enc, b_enc, b_dec, has_codes(W_enc.size(0), W_enc.size(1)));
  check_no_nan(device, "W_enc", packed.weight, W_enc);
  check_no_nan(device, "b_enc", torch::stable::contiguous(b_enc), b_enc);
  if (b_dec) {
    check_no_nan(device, "b_dec", torch::stable::contiguous(*b_dec), *b_dec);
  }
  if (!packed.codes) {
    packed.codes = torch::stable::new_empty(packed.weight, {0, screen_padded(W_enc.size(0))}, ScalarType::Half);
    packed.bounds = torch::stable::new_empty(packed.weight, {kBoundRows, 0}, ScalarType::Float);
  }
  const bool aliases = packed.weight.const_data_ptr() == W_enc.const_data_ptr();
  const auto none = [&] { return torch::stable::new_empty(packed.weight, {0}, ScalarType::Int); };
  return {
      aliases ? torch::stable::clone(packed.weight) : packed.weight,
      packed.bias,
      *packed.codes,
      none(),
      *packed.bounds,
      none()};
}

}  // namespace darkmatter::cuda

STABLE_TORCH_LIBRARY_IMPL(darkmatter, CUDA, m) {
  m.impl("prepare_encoder", TORCH_BOX(&darkmatter::cuda::prepare_encoder));
}
