// The launches of the fused filter (fused_filter.cuh): which latents when.
#pragma once

#include "cuda/kernels/dispatch.h"
#include "cuda/kernels/hopper.cuh"
#include "cuda/screen/filter.cuh"

namespace darkmatter::cuda {

// What an encode asks: its best k, or those above a threshold (k 0).
struct FusedQuestion {
  int k;
  RoundingMargin margin;
  LatentLimits limits;
};

// Top-k needs a limit before the first latent is looked at, and better ones on the way. So every step()-th tile of
// latents is screened in another way first, then the rest in launches that take the tiles halfway between, in quarters,
// and so on: each time up to growth times what went before, and then the limits are raised. A list is then expected to
// hold growth * k candidates, of any dictionary that has no period of step() tiles: also of one sorted by importance,
// since each launch samples all of it. A list that overflows sends its token the exact way.
class FusedFilter {
 public:
  // Where the device has the code, compute capability 9.0, and there are tokens for its tiles: few take as long as two
  // tiles of them, in more launches. DARKMATTER_CUDA_FUSED=0 asks for the other screen, 1 for this one also of few.
  static bool wanted(const OnDevice& device, const Tensor& codes, int64_t n_tokens);

  FusedFilter(
      const OnDevice& device, const Tensor& codes, const ScreenedLatents& latents, const FusedQuestion& question);

  // How many the tiles of the first step are.
  static int64_t first_latents(int k, int64_t n_latents);

  int k() const { return question_.k; }
  int64_t step() const { return step_; }

  // Screens the latents that are not in the first step, or all of them for a threshold.
  void run(int64_t n, const ScreenedTokens& tokens, const CandidateLists& lists) const;

 private:
  void launch(
      const hopper::TensorMap& token_map, int64_t n, const ScreenedTokens& tokens, const CandidateLists& lists,
      int step, int growth) const;

  const OnDevice& device_;
  FusedQuestion question_;
  ScreenedLatents latents_;
  int64_t d_padded_;
  int tiles_, step_;
  hopper::TensorMap latent_map_;
};

}  // namespace darkmatter::cuda
