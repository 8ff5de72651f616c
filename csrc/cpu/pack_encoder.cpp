// pack_encoder: W_enc as contiguous rows [F, d], and b_enc with b_dec folded in, in float64.
#include <torch/csrc/stable/library.h>

#include <atomic>
#include <tuple>

#include "cpu/encoder.h"

namespace darkmatter {

// NaN weights would turn into NaN latents that win every top-k: refused here, once, in the pass that packs.
static void check_no_nan(const char* name, const Tensor& tensor) {
  dispatch_floating(name, tensor.scalar_type(), [&](auto type) {
    using T = decltype(type);
    const T* values = data<T>(tensor);
    std::atomic<bool> found{false};
    parallel_ranges(tensor.numel(), 1 << 16, [&](int64_t begin, int64_t end) {
      bool nan = false;
      for (int64_t e = begin; e < end; ++e) {
        nan |= values[e] != values[e];
      }
      if (nan) {
        found = true;
      }
    });
    STD_TORCH_CHECK(!found, name, ": must not contain NaN, got shape ", shape_of(tensor), " with NaN");
  });
}

void check_encoder_input(const Tensor& x, const Tensor& W_enc) {
  check_dim("x", x, 2);
  check_dim("W_enc", W_enc, 2);
  check_size("x", x, 1, W_enc.size(0));
  check_floating("x", x);
  check_type("W_enc", W_enc, x.scalar_type());
}

static Packed pack(const Tensor& W_enc, const Tensor& b_enc, const OptionalTensor& b_dec) {
  check_dim("W_enc", W_enc, 2);
  check_floating("W_enc", W_enc);
  const int64_t d = W_enc.size(0), n_latents = W_enc.size(1);
  check_vector("b_enc", b_enc, n_latents);
  check_type("b_enc", b_enc, W_enc.scalar_type());
  if (b_dec) {
    check_vector("b_dec", *b_dec, d);
    check_type("b_dec", *b_dec, W_enc.scalar_type());
  }
  const Tensor weight = torch::stable::contiguous(torch::stable::transpose(W_enc, 0, 1));
  const Tensor b_in = torch::stable::contiguous(b_enc);
  Tensor bias = torch::stable::new_empty(weight, {n_latents}, ScalarType::Double);
  check_no_nan("W_enc", weight);
  check_no_nan("b_enc", b_in);
  dispatch_floating("W_enc", weight.scalar_type(), [&](auto type) {
    using T = decltype(type);
    const TypedKernels<T>& kernel = kernels().of<T>();
    double* folded = mutable_data<double>(bias);
    kernel.widen(data<T>(b_in), folded, n_latents);
    if (!b_dec) {
      return;
    }
    const Tensor subtracted = torch::stable::contiguous(*b_dec);
    check_no_nan("b_dec", subtracted);
    std::vector<double> b_wide(d);
    kernel.widen(data<T>(subtracted), b_wide.data(), d);
    parallel_ranges(n_latents, 256, [&](int64_t begin, int64_t end) {
      for (int64_t j = begin; j < end; ++j) {
        folded[j] -= kernel.dot(b_wide.data(), data<T>(weight) + j * d, d);
      }
    });
  });
  return {weight, bias};
}

Packed packed_encoder(
    const Tensor& W_enc, const Tensor& b_enc, const OptionalTensor& b_dec, const OptionalTensor& weight,
    const OptionalTensor& bias) {
  STD_TORCH_CHECK(
      weight.has_value() == bias.has_value(), "weight, bias: must be given together, got ",
      weight.has_value() ? "weight" : "bias", " alone");
  if (!weight) {
    return pack(W_enc, b_enc, b_dec);
  }
  check_dim("weight", *weight, 2);
  check_size("weight", *weight, 0, W_enc.size(1));
  check_size("weight", *weight, 1, W_enc.size(0));
  check_type("weight", *weight, W_enc.scalar_type());
  check_vector("bias", *bias, W_enc.size(1));
  check_type("bias", *bias, ScalarType::Double);
  return {torch::stable::contiguous(*weight), torch::stable::contiguous(*bias)};
}

// An op may not return a view of its input: a W_enc stored as [F, d] rows is copied for the caller who keeps it.
static std::tuple<Tensor, Tensor> pack_encoder(Tensor W_enc, Tensor b_enc, OptionalTensor b_dec) {
  Packed packed = pack(W_enc, b_enc, b_dec);
  const bool aliases = packed.weight.const_data_ptr() == W_enc.const_data_ptr();
  return {aliases ? torch::stable::clone(packed.weight) : packed.weight, packed.bias};
}

}  // namespace darkmatter

STABLE_TORCH_LIBRARY_IMPL(darkmatter, CPU, m) { m.impl("pack_encoder", TORCH_BOX(&darkmatter::pack_encoder)); }
