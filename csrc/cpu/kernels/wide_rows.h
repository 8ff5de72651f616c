// Aligned float64 rows.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/kernels/dispatch.h"

namespace darkmatter::cpu {

// Rows of float64, 64-byte aligned and zero-padded to whole lanes: vectors that cross cache lines take several times as
// long, stores most of all.
class WideRows {
 public:
  WideRows(int64_t rows, int64_t d) : d_(d), d_padded_(ceil_div(d, kLanes) * kLanes), storage_(rows * d_padded_ + 8) {}

  template <typename T>
  void fill(const TypedKernels<T>& kernel, const T* from, int64_t rows) {
    for (int64_t row = 0; row < rows; ++row) {
      kernel.widen(from + row * d_, data() + row * d_padded_, d_);
    }
  }
  double* data() {
    const auto address = reinterpret_cast<uintptr_t>(storage_.data());
    return storage_.data() + (64 - address % 64) % 64 / sizeof(double);
  }
  int64_t d() const { return d_; }
  int64_t d_padded() const { return d_padded_; }

 private:
  int64_t d_, d_padded_;
  std::vector<double> storage_;  // zero beyond d in every row
};

}  // namespace darkmatter::cpu
