// From a tensor's dtype to a template parameter, and parallel loops whose body may throw nothing.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <cstdint>

#include "checks.h"
#include "cpu/kernels/kernels.h"
#ifdef DARKMATTER_OWN_THREADS
#include "cpu/kernels/own_threads.h"
#endif
#include "host_device.h"
#include "tensors.h"

namespace darkmatter::cpu {

// Calls body with a value of the C++ type of `type`: body(float{}), body(Half{}), ...
template <typename Body>
auto dispatch_floating(const char* name, ScalarType type, const Body& body) {
  switch (type) {
    case ScalarType::Float:
      return body(float{});
    case ScalarType::Double:
      return body(double{});
    case ScalarType::Half:
      return body(Half{});
    case ScalarType::BFloat16:
      return body(BFloat16{});
    default:
      refuse(name, ": must be a floating-point tensor, got ", torch::headeronly::toString(type));
  }
}

// float64 to the output type, as torch converts: through float32 for the 16-bit types.
template <typename T>
inline T rounded(double value) {
  return static_cast<T>(static_cast<float>(value));
}
template <>
inline double rounded<double>(double value) {
  return value;
}

// Runs body(begin, end) over parts of [0, n), at least `grain` items each, on torch's threads.
template <typename Body>
void parallel_ranges(int64_t n, int64_t grain, const Body& body) {
#ifdef DARKMATTER_OWN_THREADS
  on_own_threads(n, grain, body);
#else
  torch::stable::parallel_for(0, n, grain, [&](int64_t begin, int64_t end) { body(begin, end); });
#endif
}

// Runs body(i) for i in [0, n).
template <typename Body>
void parallel_tasks(int64_t n, const Body& body) {
  parallel_ranges(n, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      body(i);
    }
  });
}

}  // namespace darkmatter::cpu
