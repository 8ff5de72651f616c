// Launch and registration of sparse_decode on CUDA.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>

#include "checks.h"
#include "cuda/sparse_decode.cuh"

namespace darkmatter {

template <typename T>
static const T* pointer(const OptionalTensor& tensor) {
  return tensor ? static_cast<const T*>(tensor->const_data_ptr()) : nullptr;
}

template <typename T>
static void launch(
    const Tensor& values, const Tensor& indices, const OptionalTensor& crow, const Tensor& W_dec,
    const OptionalTensor& b_dec, const Tensor& out, cudaStream_t stream) {
  const int64_t d = W_dec.size(1), n_tokens = out.size(0);
  const dim3 grid(static_cast<unsigned>(n_tokens), static_cast<unsigned>((d + kDecodeThreads - 1) / kDecodeThreads));
  sparse_decode_kernel<T><<<grid, kDecodeThreads, 0, stream>>>(
      pointer<T>(values), pointer<int64_t>(indices), pointer<int64_t>(crow), crow ? 0 : indices.size(1),
      pointer<T>(W_dec), pointer<T>(b_dec), W_dec.size(0), d, static_cast<T*>(out.mutable_data_ptr()));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

static OptionalTensor contiguous_or_none(const OptionalTensor& tensor) {
  return tensor ? OptionalTensor(torch::stable::contiguous(*tensor)) : std::nullopt;
}

static Tensor sparse_decode(Tensor values, Tensor indices, OptionalTensor crow, Tensor W_dec, OptionalTensor b_dec) {
  check_dim("W_dec", W_dec, 2);
  check_floating("W_dec", W_dec);
  check_type("values", values, W_dec.scalar_type());
  check_type("indices", indices, ScalarType::Long);
  check_dim("indices", indices, crow ? 1 : 2);
  require(
      shape_of(values) == shape_of(indices), "values: must have the shape of indices ", shape_of(indices), ", got ",
      shape_of(values));
  if (b_dec) {
    check_vector("b_dec", *b_dec, W_dec.size(1));
    check_type("b_dec", *b_dec, W_dec.scalar_type());
  }
  const torch::stable::accelerator::DeviceGuard guard(W_dec.get_device_index());
  const int64_t n_tokens = crow ? crow->size(0) - 1 : indices.size(0);
  Tensor out = torch::stable::new_empty(W_dec, {n_tokens, W_dec.size(1)});
  if (out.numel() == 0) {
    return out;
  }
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(W_dec.get_device_index(), &stream));
  const Tensor own_values = torch::stable::contiguous(values), own_indices = torch::stable::contiguous(indices);
  const Tensor weights = torch::stable::contiguous(W_dec);
  const OptionalTensor rows = contiguous_or_none(crow), bias = contiguous_or_none(b_dec);
  const auto run = [&](auto type) {
    launch<decltype(type)>(own_values, own_indices, rows, weights, bias, out, static_cast<cudaStream_t>(stream));
  };
  switch (W_dec.scalar_type()) {
    case ScalarType::Float:
      run(float{});
      break;
    case ScalarType::Double:
      run(double{});
      break;
    case ScalarType::Half:
      run(__half{});
      break;
    default:
      run(__nv_bfloat16{});
  }
  return out;
}

}  // namespace darkmatter

STABLE_TORCH_LIBRARY_IMPL(darkmatter, CUDA, m) { m.impl("sparse_decode", TORCH_BOX(&darkmatter::sparse_decode)); }
