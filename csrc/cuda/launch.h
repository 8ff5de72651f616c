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

namespace darkmatter::cuda {

// The device of a tensor made current, and torch's current stream there.
class OnDevice {
 public:
  explicit OnDevice(const Tensor& tensor) : guard_(tensor.get_device_index()) {
    void* current = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &current));
    stream_ = static_cast<cudaStream_t>(current);
    const auto attribute = [&](cudaDeviceAttr name) {
      int value = 0;
      STD_CUDA_CHECK(cudaDeviceGetAttribute(&value, name, tensor.get_device_index()));
      return value;
    };
    multiprocessors = attribute(cudaDevAttrMultiProcessorCount);
    capability = 10 * attribute(cudaDevAttrComputeCapabilityMajor) + attribute(cudaDevAttrComputeCapabilityMinor);
  }

  // Starts kernel(arguments...) with `shared` bytes of dynamic shared memory.
  template <typename... Parameters, typename... Arguments>
  void launch(void (*kernel)(Parameters...), dim3 grid, int threads, size_t shared, Arguments... arguments) const {
    allow(reinterpret_cast<const void*>(kernel), shared);
    kernel<<<grid, threads, shared, stream_>>>(static_cast<Parameters>(arguments)...);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }

  // The same in clusters of `blocks` blocks, which run at a time and reach each other's shared memory.
  template <typename... Parameters, typename... Arguments>
  void launch_clusters(
      void (*kernel)(Parameters...), int blocks, dim3 grid, int threads, size_t shared, Arguments... arguments) const {
    allow(reinterpret_cast<const void*>(kernel), shared);
    cudaLaunchAttribute cluster{};
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim.x = static_cast<unsigned>(blocks);
    cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = grid;
    config.blockDim = dim3(static_cast<unsigned>(threads));
    config.dynamicSmemBytes = shared;
    config.stream = stream_;
    config.attrs = &cluster;
    config.numAttrs = 1;
    STD_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...));
  }

  // A thread's registers in the code of this device; 0 where there is none.
  template <typename... Parameters>
  int registers(void (*kernel)(Parameters...)) const {
    cudaFuncAttributes found{};
    if (cudaFuncGetAttributes(&found, reinterpret_cast<const void*>(kernel)) != cudaSuccess) {
      cudaGetLastError();  // an answer, not a failure
      return 0;
    }
    return found.numRegs;
  }

  // The host waits for numbers from the device.
  struct Number {
    const int64_t* from;
    int64_t* to;
  };
  void read(std::initializer_list<Number> numbers) const {
    for (const Number& number : numbers) {
      STD_CUDA_CHECK(cudaMemcpyAsync(number.to, number.from, sizeof(int64_t), cudaMemcpyDeviceToHost, stream_));
    }
    STD_CUDA_CHECK(cudaStreamSynchronize(stream_));
  }

  int multiprocessors = 0;
  int capability = 0;  // 90: compute capability 9.0

 private:
  static constexpr size_t kDefaultShared = 48 * 1024;

  static void allow(const void* kernel, size_t shared) {
    if (shared > kDefaultShared) {
      STD_CUDA_CHECK(
          cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared)));
    }
  }

  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_ = nullptr;
};

// products [n, ld] (of which runs * width columns are written) = tokens [n, d] times latents transposed, float16 in,
// float32 out, added in float32. The latents are `runs` times `width` rows of d, with `skip` rows after each run.
void half_products(
    const OnDevice& device, const __half* tokens, const __half* latents, int64_t n, int64_t width, int64_t d,
    float* products, int64_t ld, int64_t runs = 1, int64_t skip = 0);

}  // namespace darkmatter::cuda
