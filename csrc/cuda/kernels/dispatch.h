// From a tensor's dtype and alignment to template parameters, and torch's own ops.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <array>
#include <tuple>

#include "cuda/kernels/packet.cuh"
#include "cuda/launch.h"

namespace darkmatter::cuda {

// Calls body with a value of the C++ type of `type`: body(float{}), body(__half{}), ...
template <typename Body>
auto dispatch_screened(const char* name, ScalarType type, const Body& body) {
  switch (type) {
    case ScalarType::Float:
      return body(float{});
    case ScalarType::Half:
      return body(__half{});
    case ScalarType::BFloat16:
      return body(__nv_bfloat16{});
    default:
      refuse(name, ": must be a floating-point tensor, got ", torch::headeronly::toString(type));
  }
}
template <typename Body>
auto dispatch_floating(const char* name, ScalarType type, const Body& body) {
  return type == ScalarType::Double ? body(double{}) : dispatch_screened(name, type, body);
}

// Calls body with the number of elements that a thread moves at once: 16 bytes where every row of `rows` starts at a
// multiple of 16, else one.
template <typename T, typename Body>
void with_width(const Tensor& rows, const Body& body) {
  constexpr int kWidest = kPacketBytes / sizeof(T);
  const auto address = reinterpret_cast<uintptr_t>(rows.const_data_ptr());
  if (rows.size(1) % kWidest == 0 && address % kPacketBytes == 0) {
    body(std::integral_constant<int, kWidest>());
  } else {
    body(std::integral_constant<int, 1>());
  }
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
