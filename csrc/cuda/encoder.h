// What topk_encode and threshold_encode have in common on the GPU: packed weights, and the pass that screens.
//
// Tokens are taken kTileTokens at a time and latents in chunks whose float32 scores stay in L2: a matrix product writes
// a chunk, the filter reads it while it is there, and no [N, F] array ever exists.
#pragma once

#include <algorithm>

#include "cuda/kernels/dispatch.h"
#include "cuda/screen/finish.cuh"
#include "cuda/screen/fused_filter.h"

namespace darkmatter::cuda {

constexpr int64_t kTileTokens = 4096;
constexpr int64_t kChunkBytes = 32 << 20;  // of scores: within the 40 to 60 MB of L2 of an A100 or H200
constexpr int64_t kMinScreenD = 32;
constexpr int64_t kMinScreenLatents = 1024;
constexpr int kMaxRanges = 16;
constexpr int kMaxUnion = 768;  // ranges * k at most: the best k of every range must fit in one list at the end

struct Packed {
  Tensor weight;                 // [F, d] contiguous
  Tensor bias;                   // [F] float64, b_enc - <b_dec, w_j>
  OptionalTensor codes, bounds;  // [F, d_padded] float16, [kBoundRows, F] float32; absent where nothing is screened
};

// Checks all encoder arguments, and packs the weights unless they come packed. `screen`: whether codes are wanted.
Packed packed_encoder(
    const OnDevice& device, const Tensor& W_enc, const Tensor& b_enc, const OptionalTensor& b_dec,
    const PackedArguments& given, bool screen);

inline bool can_screen(const Tensor& W_enc) {
  return W_enc.scalar_type() != ScalarType::Double && W_enc.size(0) >= kMinScreenD &&
         W_enc.size(1) >= kMinScreenLatents && W_enc.size(1) < INT32_MAX;
}

template <typename T>
ExactRows<T> exact_rows(const Tensor& x, const Packed& packed) {
  const int64_t d = x.size(1);
  return {data<T>(x),     data<T>(packed.weight), data<double>(packed.bias), x.size(0), d, packed.weight.size(0),
          d <= kMaxStaged};
}

// Bytes of shared memory of a kernel that takes `arrays(arena)` besides the staged row.
template <typename T, typename Arrays>
size_t shared_bytes(const ExactRows<T>& exact, const Arrays& arrays) {
  Arena arena{nullptr};
  exact.take_row(arena);
  arrays(arena);
  return arena.used;
}

// The device memory of one pass, reused tile by tile.
class ScreenPass {
 public:
  ScreenPass(
      const OnDevice& device, const Tensor& x, const OptionalTensor& b_dec, const Packed& packed, int k,
      const std::optional<FusedQuestion>& fused = std::nullopt)
      : device_(device),
        packed_(packed),
        d_padded_(screen_padded(x.size(1))),
        most_(std::min(kTileTokens, x.size(0))),
        rows_(ceil_div(most_, kFilterTokens) * kFilterTokens),
        width_(
            std::min(
                ceil_div(packed.weight.size(0), kTile) * kTile,
                std::max<int64_t>(kTile, kChunkBytes / (4 * rows_) / kTile * kTile))) {
    prepare_latents(fused ? fused->limits : LatentLimits{nullptr, 0});
    const int64_t tiles = rows_ / kFilterTokens, at_once = kFilterBlocks * device.multiprocessors;
    ranges_ = static_cast<int>(std::min({at_once / tiles, width_ / kTile, int64_t{kMaxRanges}}));
    ranges_ = std::max(1, std::min(ranges_, kMaxUnion / std::max(1, k)));
    if (fused && FusedFilter::available(device, *packed.codes)) {
      fused_.emplace(device, *packed.codes, latents_, *fused);
      ranges_ = 1;
      width_ = k > 0 ? ceil_div(fused_->first_latents(), kTile) * kTile : 0;
    }
    const auto array = [&](int64_t n, ScalarType type) { return torch::stable::new_empty(x, {n}, type); };
    codes_ = array(most_ * d_padded_, ScalarType::Half);
    products_ = array(rows_ * width_, ScalarType::Float);
    scale_ = array(most_, ScalarType::Float);
    bounds_ = array(2 * most_, ScalarType::Float);
    exact_ = torch::stable::new_empty(x, {x.size(0)}, ScalarType::Int);
    count_ = array(most_ * ranges_, ScalarType::Int);
    latent_ = array(most_ * ranges_ * kList, ScalarType::Int);
    if (k > 0) {
      lower_ = array(most_ * ranges_ * kList, ScalarType::Float);
      upper_ = array(most_ * ranges_ * kList, ScalarType::Float);
      limit_ = array(most_, ScalarType::Int);
    }
    centre_ = contiguous_or_none(b_dec);
  }

  // For each tile of tokens:
  //   filter(chunk, latents, tokens, lists, grid) for each chunk,
  //   then finish(first token, n, tokens, lists).
  template <typename T, typename Filter, typename Finish>
  void run(const Tensor& x, const Filter& filter, const Finish& finish) {
    const int64_t n_latents = packed_.weight.size(0), d = x.size(1);
    for (int64_t first = 0; first < x.size(0); first += kTileTokens) {
      const int64_t n = std::min(kTileTokens, x.size(0) - first);
      const ScreenedTokens tokens{
          mutable_data<__half>(codes_), mutable_data<float>(scale_), mutable_data<TokenBounds>(bounds_),
          mutable_data<int>(exact_) + first};
      const CandidateLists lists{
          mutable_data<int>(count_),
          mutable_data<int32_t>(latent_),
          lower_ ? mutable_data<float>(*lower_) : nullptr,
          upper_ ? mutable_data<float>(*upper_) : nullptr,
          limit_ ? mutable_data<uint32_t>(*limit_) : nullptr,
          ranges_};
      device_.launch(
          round_tokens_kernel<T>, dim3(static_cast<unsigned>(ceil_div(n, kWarps))), kThreads, 0, data<T>(x) + first * d,
          data<T>(centre_), n, d, d_padded_, tokens, lists);
      const dim3 grid(static_cast<unsigned>(ceil_div(n, kFilterTokens)), static_cast<unsigned>(ranges_));
      if (fused_) {
        if (width_ > 0) {
          filter(sampled_products(tokens.codes, n), latents_, tokens, lists, grid);
        }
        fused_->run(n, tokens, lists);
      } else {
        for (int64_t latent = 0; latent < n_latents; latent += width_) {
          const int64_t width = std::min(width_, n_latents - latent);
          multiply(tokens.codes, n, latent, width, 0);
          filter(ScoreChunk{data<float>(products_), width_, n, latent, width, 0}, latents_, tokens, lists, grid);
        }
      }
      finish(first, n, tokens, lists);
    }
  }

  const Tensor& exact() const { return exact_; }  // [N] nonzero: a token for the exact path

 private:
  // What the scans look at, of whole tiles of latents.
  void prepare_latents(const LatentLimits& limits) {
    const Tensor& bounds = *packed_.bounds;
    const int64_t n = packed_.weight.size(0), runs = ceil_div(n, kTile) * kTileRuns;
    screens_ = torch::stable::new_empty(bounds, {runs, kRun, 2}, ScalarType::Float);
    largest_ = torch::stable::new_empty(bounds, {runs, 3}, ScalarType::Float);
    latents_ = {data<float>(bounds), n, data<LatentScreen>(screens_), data<LargestBounds>(largest_)};
    Arena arena{nullptr};
    arena.take<uint32_t>(3);
    device_.launch(
        prepare_latents_kernel, dim3(static_cast<unsigned>(runs)), kThreads, arena.used, latents_, limits,
        mutable_data<LatentScreen>(screens_), mutable_data<LargestBounds>(largest_));
  }

  // Products of tokens and latents [first, first + width) into columns from `column` on, `runs` times with `skip`
  // latents left out in between.
  void multiply(
      const __half* tokens, int64_t n, int64_t first, int64_t width, int64_t column, int64_t runs = 1,
      int64_t skip = 0) const {
    half_products(
        device_, tokens, data<__half>(*packed_.codes) + first * d_padded_, n, width, d_padded_,
        mutable_data<float>(products_) + column, width_, runs, skip);
  }

  // The chunk before the fused filter: every step-th run of latents, of which the last may be cut short.
  ScoreChunk sampled_products(const __half* tokens, int64_t n) const {
    const int64_t skip = (fused_->step() - 1) * kRun, width = fused_->first_latents(), whole = width / kRun,
                  rest = width % kRun;
    if (whole > 0) {
      multiply(tokens, n, 0, kRun, 0, whole, skip);
    }
    if (rest > 0) {
      multiply(tokens, n, whole * (kRun + skip), rest, whole * kRun);
    }
    return {data<float>(products_), width_, n, 0, width, skip};
  }

  const OnDevice& device_;
  const Packed& packed_;
  int64_t d_padded_, most_, rows_, width_;  // rows_: most_ up to whole blocks of the filter
  int ranges_ = 1;
  ScreenedLatents latents_{};
  Tensor screens_, largest_, codes_, products_, scale_, bounds_, exact_, count_, latent_;
  OptionalTensor lower_, upper_, limit_, centre_;
  std::optional<FusedFilter> fused_;
};

}  // namespace darkmatter::cuda
