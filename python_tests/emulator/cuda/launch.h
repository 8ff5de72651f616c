// csrc/cuda/launch.h for the emulator: the same names, kernels run on the CPU, the matrix product as a tensor core
// makes it.
#pragma once

#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>

#include "checks.h"
#include "registration.h"
#include "tensor_core.h"

namespace darkmatter::cuda {

class OnDevice {
 public:
  explicit OnDevice(const Tensor&) {}

  template <typename... Parameters, typename... Arguments>
  void launch(void (*kernel)(Parameters...), dim3 grid, int threads, size_t shared, Arguments... arguments) const {
    simt::run_grid(grid, threads, shared, [&] { kernel(static_cast<Parameters>(arguments)...); });
  }

  template <typename... Parameters, typename... Arguments>
  void launch_clusters(
      void (*kernel)(Parameters...), int blocks, dim3 grid, int threads, size_t shared, Arguments... arguments) const {
    ++simt::cluster_launches;
    simt::run_grid(grid, threads, shared, [&] { kernel(static_cast<Parameters>(arguments)...); }, blocks);
  }

  template <typename... Parameters>
  int registers(void (*)(Parameters...)) const {
    return 255;
  }

  struct Number {
    const int64_t* from;
    int64_t* to;
  };
  void read(std::initializer_list<Number> numbers) const {
    for (const Number& number : numbers) {
      *number.to = *number.from;
    }
  }

  int64_t shared_limit() const { return simt::shared_limit; }

  int multiprocessors = simt::multiprocessors;
  int capability = simt::capability;
};

inline void half_products(
    const OnDevice&, const __half* tokens, const __half* latents, int64_t n, int64_t width, int64_t d, float* products,
    int64_t ld, int64_t runs = 1, int64_t skip = 0) {
  std::vector<float> left(n * d), right(width * d);
  std::transform(tokens, tokens + n * d, left.begin(), __half2float);
  for (int64_t run = 0; run < runs; ++run) {
    const __half* rows = latents + run * (width + skip) * d;
    std::transform(rows, rows + width * d, right.begin(), __half2float);
    for (int64_t i = 0; i < n; ++i) {
      for (int64_t j = 0; j < width; ++j) {
        double sum = 0.0;
        for (int64_t e = 0; e < d; e += 4) {
          double four[4];
          for (int64_t t = 0; t < 4; ++t) {
            four[t] = e + t < d ? static_cast<double>(left[i * d + e + t]) * right[j * d + e + t] : 0.0;
          }
          sum = add_truncated(sum, four);
        }
        products[i * ld + run * width + j] = static_cast<float>(sum);
      }
    }
  }
}

}  // namespace darkmatter::cuda
