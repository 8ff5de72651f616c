// Argument checks of the ops: one line naming argument, rule and value. They guard torch.ops callers; the Python layer
// checks the same rules first and raises TypeError / ValueError.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>

namespace darkmatter {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// A RuntimeError in Python. STD_TORCH_CHECK would put function, source path and line before the message.
template <typename... Parts>
[[noreturn]] inline void refuse(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

template <typename... Parts>
inline void require(bool holds, const Parts&... parts) {
  if (!holds) {
    refuse(parts...);
  }
}

inline std::string shape_of(const Tensor& tensor) {
  std::string text = "[";
  for (int64_t i = 0; i < tensor.dim(); ++i) {
    text += (i ? ", " : "") + std::to_string(tensor.size(i));
  }
  return text + "]";
}

inline void check_dim(const char* name, const Tensor& tensor, int64_t dim) {
  require(tensor.dim() == dim, name, ": must have ", dim, " dimensions, got shape ", shape_of(tensor));
}

inline void check_size(const char* name, const Tensor& tensor, int64_t axis, int64_t size) {
  require(
      tensor.size(axis) == size, name, ": must have size ", size, " in dimension ", axis, ", got shape ",
      shape_of(tensor));
}

inline void check_vector(const char* name, const Tensor& tensor, int64_t size) {
  check_dim(name, tensor, 1);
  check_size(name, tensor, 0, size);
}

inline void check_type(const char* name, const Tensor& tensor, ScalarType type) {
  require(
      tensor.scalar_type() == type, name, ": must have dtype ", torch::headeronly::toString(type), ", got ",
      torch::headeronly::toString(tensor.scalar_type()));
}

inline void check_floating(const char* name, const Tensor& tensor) {
  const ScalarType type = tensor.scalar_type();
  require(
      type == ScalarType::Float || type == ScalarType::Double || type == ScalarType::Half ||
          type == ScalarType::BFloat16,
      name, ": must be float16, bfloat16, float32 or float64, got ", torch::headeronly::toString(type));
}

}  // namespace darkmatter
