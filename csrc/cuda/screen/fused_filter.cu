#include "cuda/screen/fused_filter.h"

#include <algorithm>
#include <cstdlib>
#include <string_view>

#include "cuda/screen/fused_filter.cuh"

namespace darkmatter::cuda {

constexpr int kMostGrowth = 4;
constexpr int64_t kFewTokens = kTokenTile * kClusterBlocks;  // take as long here as one cluster's tile of them
constexpr int kEmptyRegisters = 64;  // more than a kernel compiled to nothing has, fewer than the kernel

// Latents of the first step at most: four times the largest k of a list.
static int64_t most_of_first_step(int k) { return 4 * (k > kShortK ? kMaxScreenK : kShortK); }

// Which tiles are screened first: every so many. A threshold has no first step.
static int64_t first_step(int k, int64_t tiles) {
  int64_t step = 1;
  while (k > 0 && ceil_div(tiles, step) * kLatentTile > most_of_first_step(k)) {
    step *= 2;
  }
  return step;
}

bool FusedFilter::wanted(const OnDevice& device, const Tensor& codes, int64_t n_tokens) {
  const char* given = std::getenv("DARKMATTER_CUDA_FUSED");
  const std::string_view asked = given == nullptr ? "" : given;
  return asked != "0" && (n_tokens > kFewTokens || asked == "1") && device.capability == 90 &&
         device.registers(fused_filter_kernel) > kEmptyRegisters &&
         reinterpret_cast<uintptr_t>(codes.const_data_ptr()) % 16 == 0;
}

FusedFilter::FusedFilter(
    const OnDevice& device, const Tensor& codes, const ScreenedLatents& latents, const FusedQuestion& question)
    : device_(device),
      question_(question),
      latents_(latents),
      d_padded_(codes.size(1)),
      tiles_(static_cast<int>(ceil_div(codes.size(0), kLatentTile))),
      step_(static_cast<int>(first_step(question.k, tiles_))) {
  require(
      hopper::describe_rows(data<__half>(codes), latents_.n, d_padded_, kLatentTile / kClusterBlocks, &latent_map_),
      "darkmatter_ext: the driver must describe the codes of latents, got a refusal");
}

int64_t FusedFilter::first_latents(int k, int64_t n_latents) {
  const int64_t tiles = ceil_div(n_latents, kLatentTile), step = first_step(k, tiles);
  const int64_t runs = ceil_div(tiles, step), last = (runs - 1) * step * kLatentTile;
  return (runs - 1) * kLatentTile + std::min<int64_t>(kLatentTile, n_latents - last);
}

void FusedFilter::run(int64_t n, const ScreenedTokens& tokens, const CandidateLists& lists) const {
  hopper::TensorMap token_map;
  require(
      hopper::describe_rows(tokens.codes, n, d_padded_, kTokenTile, &token_map),
      "darkmatter_ext: the driver must describe the codes of tokens, got a refusal");
  if (question_.k == 0) {
    launch(token_map, n, tokens, lists, 1, 0);
    return;
  }
  Arena arena{nullptr};
  arena.take<int>(kWarps * kBins);
  for (int step = step_; step > 1;) {
    // Half a list is expected to be filled.
    const int growth = question_.k * kMostGrowth <= lists.size / 2 ? std::min(kMostGrowth, step) : 2;
    step /= growth;
    device_.launch(
        raise_limits_kernel, dim3(static_cast<unsigned>(ceil_div(n, kWarps))), kThreads, arena.used, tokens, lists, n,
        question_.k, question_.margin);
    launch(token_map, n, tokens, lists, step, growth);
  }
}

void FusedFilter::launch(
    const hopper::TensorMap& token_map, int64_t n, const ScreenedTokens& tokens, const CandidateLists& lists, int step,
    int growth) const {
  const int multiples = static_cast<int>(ceil_div(tiles_, step));
  const int wanted = growth == 0 ? multiples : multiples - static_cast<int>(ceil_div(multiples, growth));
  if (wanted == 0) {
    return;
  }
  const FusedWork work{
      tokens,
      latents_,
      lists,
      question_.limits,
      n,
      static_cast<int>(d_padded_ / hopper::kTileColumns),
      {step, growth, wanted}};
  const int64_t pairs = ceil_div(n, kTokenTile * kClusterBlocks);
  const int64_t clusters = std::min<int64_t>(pairs * wanted, std::max(1, device_.multiprocessors / kClusterBlocks));
  device_.launch_clusters(
      fused_filter_kernel, kClusterBlocks, dim3(static_cast<unsigned>(clusters * kClusterBlocks)), kFusedThreads,
      kFusedSharedBytes, token_map, latent_map_, work);
}

}  // namespace darkmatter::cuda
