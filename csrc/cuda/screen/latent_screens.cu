#include "cuda/screen/latent_screens.h"

namespace darkmatter::cuda {

// Screens and largest bounds of all runs. One block a run, one latent a thread.
__global__ void __launch_bounds__(kThreads) prepare_latents_kernel(
    ScreenedLatents latents, LatentLimits limits, LatentScreen* __restrict__ screens,
    LargestBounds* __restrict__ largest) {
  static_assert(kRun == kThreads, "one latent a thread");
  uint32_t* keys = Arena{shared_memory()}.take<uint32_t>(3);
  if (threadIdx.x < 3) {
    keys[threadIdx.x] = ordered_key(0.0f);
  }
  __syncthreads();
  const int64_t latent = static_cast<int64_t>(blockIdx.x) * kRun + threadIdx.x;
  LatentScreen screen{0.0f, -INFINITY};
  if (latent < latents.n) {
    const float* of = latents.bounds + latent;
    const float bias = of[kBias * latents.n];
    screen.scale = of[kScale * latents.n];
    screen.shift = limits.values != nullptr ? shift_of(bias, limits.values[latent * limits.step]) : bias;
    atomicMax(&keys[0], ordered_key(of[kNorm * latents.n]));
    atomicMax(&keys[1], ordered_key(of[kRounding * latents.n]));
    atomicMax(&keys[2], ordered_key(of[kSlack * latents.n]));
  }
  screens[latent] = screen;
  __syncthreads();
  if (threadIdx.x == 0) {
    largest[blockIdx.x] = {key_float(keys[0]), key_float(keys[1]), key_float(keys[2])};
  }
}

LatentScreens::LatentScreens(const OnDevice& device, const Tensor& bounds, const LatentLimits& limits) {
  const int64_t n = bounds.size(1), runs = ceil_div(n, kTile) * kTileRuns;
  screens_ = torch::stable::new_empty(bounds, {runs, kRun, 2}, ScalarType::Float);
  largest_ = torch::stable::new_empty(bounds, {runs, 3}, ScalarType::Float);
  latents_ = {data<float>(bounds), n, data<LatentScreen>(screens_), data<LargestBounds>(largest_)};
  Arena arena{nullptr};
  arena.take<uint32_t>(3);
  device.launch(
      prepare_latents_kernel, dim3(static_cast<unsigned>(runs)), kThreads, arena.used, latents_, limits,
      mutable_data<LatentScreen>(screens_), mutable_data<LargestBounds>(largest_));
}

}  // namespace darkmatter::cuda
