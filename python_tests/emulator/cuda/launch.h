// csrc/cuda/launch.h for the emulator: the same names, kernels run on the CPU, the matrix product as a tensor core
// makes it.
#pragma once

#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "checks.h"

namespace darkmatter {

class OnDevice {
 public:
  explicit OnDevice(const Tensor&) {}

  template <typename... Parameters, typename... Arguments>
  void launch(void (*kernel)(Parameters...), dim3 grid, int threads, size_t shared, Arguments... arguments) const {
    simt::run_grid(grid, threads, shared, [&] { kernel(static_cast<Parameters>(arguments)...); });
  }

  void read(const int64_t* from, int64_t* to, int count) const { std::copy_n(from, count, to); }

  int multiprocessors = 2;
};

// Adds as a tensor core does that the bound must allow for: four products and the running sum are aligned to the
// largest of them and truncated to 24 bits.
inline void half_products(
    const OnDevice&, const __half* tokens, const __half* latents, int64_t n, int64_t width, int64_t d, float* products,
    int64_t ld) {
  std::vector<float> left(n * d), right(width * d);
  std::transform(tokens, tokens + n * d, left.begin(), __half2float);
  std::transform(latents, latents + width * d, right.begin(), __half2float);
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t j = 0; j < width; ++j) {
      double sum = 0.0;
      for (int64_t e = 0; e < d; e += 4) {
        double terms[5] = {sum}, largest = std::fabs(sum);
        for (int64_t t = 0; t < 4; ++t) {
          terms[t + 1] = e + t < d ? static_cast<double>(left[i * d + e + t]) * right[j * d + e + t] : 0.0;
          largest = std::max(largest, std::fabs(terms[t + 1]));
        }
        if (largest > 0.0 && largest < INFINITY) {
          const double unit = std::ldexp(1.0, std::ilogb(largest) - 23);
          sum = 0.0;
          for (const double term : terms) {
            sum += std::trunc(term / unit) * unit;
          }
        } else {
          sum = terms[0] + terms[1] + terms[2] + terms[3] + terms[4];
        }
      }
      products[i * ld + j] = static_cast<float>(sum);
    }
  }
}

}  // namespace darkmatter
