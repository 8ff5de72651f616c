// The screens of all latents (latent_screens.cuh), made once a call.
#pragma once

#include "cuda/kernels/dispatch.h"
#include "cuda/screen/filter.cuh"

namespace darkmatter::cuda {

class LatentScreens {
 public:
  // bounds: [kBoundRows, F]; padded to whole tiles of the filter.
  LatentScreens(const OnDevice& device, const Tensor& bounds, const LatentLimits& limits);

  const ScreenedLatents& latents() const { return latents_; }

 private:
  Tensor screens_, largest_;
  ScreenedLatents latents_;
};

}  // namespace darkmatter::cuda
