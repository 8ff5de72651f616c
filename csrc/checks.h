// Argument checks of the ops: one line naming argument, rule and value. They guard torch.ops callers; the Python layer
// checks the same rules first and raises TypeError / ValueError.
#pragma once

#include <cstdint>
#include <sstream>
#include <stdexcept>
#include <string>

#include "tensors.h"

namespace darkmatter {

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

inline void check_values(const Tensor& values, const Tensor& indices) {
  require(
      shape_of(values) == shape_of(indices), "values: must have the shape of indices ", shape_of(indices), ", got ",
      shape_of(values));
}

inline void check_encoder_input(const Tensor& x, const Tensor& W_enc) {
  check_dim("x", x, 2);
  check_dim("W_enc", W_enc, 2);
  check_size("x", x, 1, W_enc.size(0));
  check_floating("x", x);
  check_type("W_enc", W_enc, x.scalar_type());
}

inline void check_threshold(const Tensor& threshold, const Tensor& x, const Tensor& W_enc) {
  check_type("threshold", threshold, x.scalar_type());
  if (threshold.dim() != 0) {
    check_vector("threshold", threshold, W_enc.size(1));
  }
}

inline void check_capacity(int64_t capacity, int64_t n_latents) {
  require(
      capacity >= 0 && capacity <= n_latents, "capacity: must be from 0 to ", n_latents, " (latents), got ", capacity);
}

inline void check_encoder_weights(const Tensor& W_enc, const Tensor& b_enc, const OptionalTensor& b_dec) {
  check_dim("W_enc", W_enc, 2);
  check_floating("W_enc", W_enc);
  check_vector("b_enc", b_enc, W_enc.size(1));
  check_type("b_enc", b_enc, W_enc.scalar_type());
  if (b_dec) {
    check_vector("b_dec", *b_dec, W_enc.size(0));
    check_type("b_dec", *b_dec, W_enc.scalar_type());
  }
}

inline void check_gain(const OptionalTensor& gain, const Tensor& W_enc) {
  if (gain) {
    check_vector("gain", *gain, W_enc.size(1));
    check_type("gain", *gain, W_enc.scalar_type());
  }
}

// What prepare_encoder made, as it comes into an op: all given, or none.
struct PackedArguments {
  OptionalTensor weight, bias, codes, sums, bounds, groups, gain;
};

// weight and bias, which every backend packs alike.
inline void check_packed_rows(const PackedArguments& given, const Tensor& W_enc) {
  require(given.bias.has_value(), "bias: must be given with weight, got weight alone");
  check_dim("weight", *given.weight, 2);
  check_size("weight", *given.weight, 0, W_enc.size(1));
  check_size("weight", *given.weight, 1, W_enc.size(0));
  check_type("weight", *given.weight, W_enc.scalar_type());
  check_vector("bias", *given.bias, W_enc.size(1));
  check_type("bias", *given.bias, ScalarType::Double);
  check_gain(given.gain, W_enc);
}

}  // namespace darkmatter
