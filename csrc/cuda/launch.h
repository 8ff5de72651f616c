// How the ops reach the GPU: device, stream, launches, and the matrix product. The only file of the CUDA library that
// knows how a kernel is started; python_tests/emulator has another of the same name that runs kernels on the CPU.
#pragma once

#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>

#include <map>
#include <mutex>
#include <set>
#include <utility>

#include "checks.h"
#include "registration.h"

namespace darkmatter::cuda {

// What does not change about a device, asked of the driver once.
struct DeviceFacts {
  int multiprocessors, capability, shared_limit;

  static DeviceFacts of(int device) {
    static std::mutex mutex;
    static std::map<int, DeviceFacts> known;
    const std::scoped_lock lock(mutex);
    const auto found = known.find(device);
    if (found != known.end()) {
      return found->second;
    }
    const auto attribute = [&](cudaDeviceAttr name) {
      int value = 0;
      STD_CUDA_CHECK(cudaDeviceGetAttribute(&value, name, device));
      return value;
    };
    const int capability =
        10 * attribute(cudaDevAttrComputeCapabilityMajor) + attribute(cudaDevAttrComputeCapabilityMinor);
    const DeviceFacts facts{
        attribute(cudaDevAttrMultiProcessorCount), capability, attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin)};
    known.emplace(device, facts);
    return facts;
  }
};

// The device of a tensor made current, and torch's current stream there.
class OnDevice {
 public:
  explicit OnDevice(const Tensor& tensor) : device_(tensor.get_device_index()), guard_(device_) {
    void* current = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device_, &current));
    stream_ = static_cast<cudaStream_t>(current);
    const DeviceFacts facts = DeviceFacts::of(device_);
    multiprocessors = facts.multiprocessors;
    capability = facts.capability;
    shared_limit_ = facts.shared_limit;
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

  int64_t shared_limit() const { return shared_limit_; }  // bytes of a block

  int multiprocessors = 0;
  int capability = 0;  // 90: compute capability 9.0

 private:
  static constexpr size_t kDefaultShared = 48 * 1024;

  // More shared memory than a kernel has without asking: as much as the device gives, once a kernel and device. Set to
  // what one call needs, it could be lowered by another thread before this one launches.
  void allow(const void* kernel, size_t shared) const {
    if (shared <= kDefaultShared) {
      return;
    }
    static std::mutex mutex;
    static std::set<std::pair<const void*, int>> allowed;
    const std::scoped_lock lock(mutex);
    if (allowed.count({kernel, device_}) == 0) {
      cudaFuncAttributes own{};
      STD_CUDA_CHECK(cudaFuncGetAttributes(&own, kernel));
      const int most = shared_limit_ - static_cast<int>(own.sharedSizeBytes);
      STD_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most));
      allowed.insert({kernel, device_});
    }
  }

  int device_, shared_limit_ = 0;
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_ = nullptr;
};

// products [n, ld] (of which runs * width columns are written) = tokens [n, d] times latents transposed, float16 in,
// float32 out, added in float32. The latents are `runs` times `width` rows of d, with `skip` rows after each run.
void half_products(
    const OnDevice& device, const __half* tokens, const __half* latents, int64_t n, int64_t width, int64_t d,
    float* products, int64_t ld, int64_t runs = 1, int64_t skip = 0);

}  // namespace darkmatter::cuda
