// Tensors as the kernels of the CUDA library take them: typed pointers, and a tensor's dtype as a template parameter.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <array>
#include <tuple>

#include "cuda/launch.h"

namespace darkmatter::cuda {

template <typename T>
const T* pointer(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}
template <typename T>
const T* pointer(const OptionalTensor& tensor) {
  return tensor ? pointer<T>(*tensor) : nullptr;
}
template <typename T>
T* mutable_pointer(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

inline OptionalTensor contiguous_or_none(const OptionalTensor& tensor) {
  return tensor ? OptionalTensor(torch::stable::contiguous(*tensor)) : std::nullopt;
}

// body(float{}), body(__half{}), ... by the dtype.
template <typename Body>
auto dispatch_screened(ScalarType type, const Body& body) {
  switch (type) {
    case ScalarType::Half:
      return body(__half{});
    case ScalarType::BFloat16:
      return body(__nv_bfloat16{});
    default:
      return body(float{});
  }
}
template <typename Body>
auto dispatch_all(ScalarType type, const Body& body) {
  return type == ScalarType::Double ? body(double{}) : dispatch_screened(type, body);
}

// Torch's own ops, through its dispatcher.
inline std::tuple<Tensor, Tensor> stable_sort(const Tensor& tensor, bool descending) {
  std::array<StableIValue, 4> stack{
      torch::stable::detail::from(tensor), torch::stable::detail::from(std::optional<bool>(true)),
      torch::stable::detail::from(int64_t{-1}), torch::stable::detail::from(descending)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::sort", "stable", stack.data(), TORCH_ABI_VERSION));
  return {torch::stable::detail::to<Tensor>(stack[0]), torch::stable::detail::to<Tensor>(stack[1])};
}

inline Tensor prefix_sums(const Tensor& tensor) {
  std::array<StableIValue, 3> stack{
      torch::stable::detail::from(tensor), torch::stable::detail::from(int64_t{0}),
      torch::stable::detail::from(std::optional<ScalarType>())};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::cumsum", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

inline Tensor equal_to_zero(const Tensor& tensor) {
  std::array<StableIValue, 1> stack{torch::stable::detail::from(tensor)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::logical_not", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

inline Tensor relu_of(const Tensor& tensor) {
  std::array<StableIValue, 1> stack{torch::stable::detail::from(tensor)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::relu", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

}  // namespace darkmatter::cuda
