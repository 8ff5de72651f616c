// How the ops reach the GPU: device, stream, launches, and the matrix product. The only file of the CUDA library that
// knows how a kernel is started; python_tests/emulator has another of the same name that runs kernels on the CPU.
#pragma once

#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>

#include "checks.h"

namespace darkmatter {

// The device of a tensor made current, and torch's current stream there.
class OnDevice {
 public:
  explicit OnDevice(const Tensor& tensor) : guard_(tensor.get_device_index()) {
    void* current = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &current));
    stream_ = static_cast<cudaStream_t>(current);
    STD_CUDA_CHECK(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, tensor.get_device_index()));
  }

  // Starts kernel(arguments...) with `shared` bytes of dynamic shared memory.
  template <typename... Parameters, typename... Arguments>
  void launch(void (*kernel)(Parameters...), dim3 grid, int threads, size_t shared, Arguments... arguments) const {
    if (shared > kDefaultShared) {
      STD_CUDA_CHECK(cudaFuncSetAttribute(
          reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
          static_cast<int>(shared)));
    }
    kernel<<<grid, threads, shared, stream_>>>(static_cast<Parameters>(arguments)...);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }

  // The host waits for `count` numbers from the device.
  void read(const int64_t* from, int64_t* to, int count) const {
    STD_CUDA_CHECK(cudaMemcpyAsync(to, from, count * sizeof(int64_t), cudaMemcpyDeviceToHost, stream_));
    STD_CUDA_CHECK(cudaStreamSynchronize(stream_));
  }

  int multiprocessors = 0;

 private:
  static constexpr size_t kDefaultShared = 48 * 1024;

  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_ = nullptr;
};

// products [n, ld] (of which `width` columns are written) = tokens [n, d] times latents [width, d] transposed, float16
// in, float32 out, added in float32.
void half_products(
    const OnDevice& device, const __half* tokens, const __half* latents, int64_t n, int64_t width, int64_t d,
    float* products, int64_t ld);

}  // namespace darkmatter
