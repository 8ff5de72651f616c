// What topk_encode and threshold_encode have in common on the GPU: packed weights, and the pass that screens.
//
// Tokens are taken kTileTokens at a time and latents in chunks whose float32 scores stay in L2: a matrix product writes
// a chunk, the filter reads it while it is there, and no [N, F] array ever exists.
#pragma once

#include <algorithm>

#include "cuda/kernels/dispatch.h"
#include "cuda/screen/exact.cuh"
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

// Codes [F, d_padded] and bounds [kBoundRows, F] as prepare_encoder makes them.
void check_codes(const Tensor& codes, const Tensor& bounds, int64_t d, int64_t n_latents);

// Whether codes of weights [d, F] are any use. (Of float64 weights pursuit has a use, the encoders have not.)
inline bool has_codes(int64_t d, int64_t n_latents) {
  return d >= kMinScreenD && n_latents >= kMinScreenLatents && n_latents < INT32_MAX;
}
inline bool can_screen(const Tensor& W_enc) {
  return W_enc.scalar_type() != ScalarType::Double && has_codes(W_enc.size(0), W_enc.size(1));
}

template <typename T>
ExactRows<T> exact_rows(const Tensor& x, const Packed& packed) {
  const int64_t d = x.size(1);
  return {data<T>(x),     data<T>(packed.weight), data<double>(packed.bias), x.size(0), d, packed.weight.size(0),
          d <= kMaxStaged};
}

template <typename T>
ExactProducts<T, T> exact_products(const Tensor& x, const Packed& packed) {
  return {data<T>(x), data<T>(packed.weight), data<double>(packed.bias), x.size(1), packed.weight.size(0)};
}

constexpr int64_t kMaxGridY = 65535;
constexpr int64_t kExactBytes = 32 << 20;  // of scores of marked tokens at a time, and at least one group's

// How many groups of marked tokens have their scores in so many bytes.
template <typename T>
int64_t exact_groups(int64_t n_tokens, int64_t n_latents) {
  const int64_t bytes = kExactTokens * n_latents * static_cast<int64_t>(sizeof(T));
  return std::max<int64_t>(1, std::min(kExactBytes / bytes, ceil_div(n_tokens, kExactTokens)));
}

// The tokens with a mark, as a list made on the device; and counters that begin at 0.
class MarkedList {
 public:
  MarkedList(const OnDevice& device, const Tensor& marks, int mark, int64_t counters = 0)
      : list_(torch::stable::new_empty(marks, {marks.numel()}, ScalarType::Long)),
        number_(torch::stable::new_zeros(marks, {1 + counters}, ScalarType::Long)) {
    device.launch(
        list_marked_kernel, dim3(static_cast<unsigned>(ceil_div(marks.numel(), kThreads))), kThreads, 0,
        data<int>(marks), marks.numel(), mark, tokens());
  }

  MarkedTokens tokens() const { return {mutable_data<int64_t>(list_), mutable_data<unsigned long long>(number_)}; }
  const int64_t* number() const { return data<int64_t>(number_); }
  unsigned long long* counters() const { return mutable_data<unsigned long long>(number_) + 1; }

 private:
  Tensor list_, number_;
};

// Bytes of shared memory of a kernel that takes `arrays(arena)` besides the staged row, which is given up where the
// device has no room for it.
template <typename T, typename Arrays>
size_t fit_shared(const OnDevice& device, ExactRows<T>& exact, const Arrays& arrays) {
  const auto bytes = [&] {
    Arena arena{nullptr};
    exact.take_row(arena);
    arrays(arena);
    return arena.used;
  };
  exact.staged = exact.staged && static_cast<int64_t>(bytes()) <= device.shared_limit();
  return bytes();
}

// All pre-activations [n, F] of n marked tokens from number `first` on; of all tokens where there is no list.
template <typename T>
void exact_scores(
    const OnDevice& device, const ExactProducts<T, T>& exact, const MarkedTokens& marked, int64_t first, int64_t n,
    T* scores) {
  const dim3 grid(
      static_cast<unsigned>(ceil_div(exact.n_latents, kExactLatents)),
      static_cast<unsigned>(ceil_div(n, kExactTokens)));
  device.launch(exact_scores_kernel<T>, grid, kThreads, sizeof(ExactShared), exact, marked, first, n, scores);
}

// Answers of the tokens that are marked kExactly. Nothing but a launch or two where none is; nothing waits.
template <typename T, typename Answer>
void exact_answers(
    const OnDevice& device, const Tensor& x, const Packed& packed, const Tensor& marks, const Answer& answer) {
  const int64_t n = x.size(0), n_latents = packed.weight.size(0), groups = ceil_div(n, kExactTokens);
  const int64_t slots = exact_groups<T>(n, n_latents);
  const MarkedList marked(device, marks, kExactly, 1 + groups);
  auto* counters = reinterpret_cast<int*>(marked.counters() + 1);  // two a group
  const Tensor scores = torch::stable::new_empty(x, {slots, kExactTokens, n_latents});
  const ExactWork<T> work{marked.tokens(),   marked.counters(),       counters,
                          counters + groups, mutable_data<T>(scores), slots};
  device.launch(
      exact_answers_kernel<T, Answer>, dim3(static_cast<unsigned>(kExactBlocks * device.multiprocessors)), kThreads,
      sizeof(ExactAnswerShared), exact_products<T>(x, packed), work, answer);
}

// Arrays of one allocation on the device, each at a multiple of 512 bytes and null if empty; from null, their bytes.
struct DeviceArrays {
  unsigned char* at;
  int64_t used = 0;

  template <typename E>
  E* take(int64_t n) {
    E* array = at != nullptr && n > 0 ? reinterpret_cast<E*>(at + used) : nullptr;
    used += ceil_div(n * static_cast<int64_t>(sizeof(E)), 512) * 512;
    return array;
  }
};

// The device memory of one pass, reused tile by tile.
class ScreenPass {
 public:
  ScreenPass(
      const OnDevice& device, const Tensor& x, const OptionalTensor& b_dec, const Packed& packed, int k,
      const std::optional<FusedQuestion>& fused = std::nullopt, const TokenRules& rules = {})
      : device_(device),
        packed_(packed),
        rules_(rules),
        d_padded_(screen_padded(x.size(1))),
        most_(std::min(kTileTokens, x.size(0))),
        rows_(ceil_div(most_, kFilterTokens) * kFilterTokens),
        width_(
            std::min(
                ceil_div(packed.weight.size(0), kTile) * kTile,
                std::max<int64_t>(kTile, kChunkBytes / (4 * rows_) / kTile * kTile))) {
    const int64_t tiles = rows_ / kFilterTokens, at_once = kFilterBlocks * device.multiprocessors;
    ranges_ = static_cast<int>(std::min({at_once / tiles, width_ / kTile, int64_t{kMaxRanges}}));
    ranges_ = std::max(1, std::min(ranges_, kMaxUnion / std::max(1, k)));
    const bool by_tiles = fused && FusedFilter::wanted(device, *packed.codes, most_);
    if (by_tiles) {
      ranges_ = 1;
      width_ = k > 0 ? ceil_div(FusedFilter::first_latents(k, packed.weight.size(0)), kTile) * kTile : 0;
    }
    reserve(x, k);
    prepare_latents(fused ? fused->limits : LatentLimits{nullptr, 0});
    if (by_tiles) {
      fused_.emplace(device, *packed.codes, latents_, *fused);
    }
    exact_ = torch::stable::new_empty(x, {x.size(0)}, ScalarType::Int);
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
      ScreenedTokens tokens = tokens_;
      tokens.exact = mutable_data<int>(exact_) + first;
      device_.launch(
          round_tokens_kernel<T>, dim3(static_cast<unsigned>(ceil_div(n, kWarps))), kThreads, 0, data<T>(x) + first * d,
          data<T>(centre_), n, d, d_padded_, rules_.from(first), tokens, lists_);
      const dim3 grid(static_cast<unsigned>(ceil_div(n, kFilterTokens)), static_cast<unsigned>(ranges_));
      if (fused_) {
        if (width_ > 0) {
          filter(sampled_products(tokens.codes, n), latents_, tokens, lists_, grid);
        }
        fused_->run(n, tokens, lists_);
      } else {
        for (int64_t latent = 0; latent < n_latents; latent += width_) {
          const int64_t width = std::min(width_, n_latents - latent);
          multiply(tokens.codes, n, latent, width, 0);
          filter(ScoreChunk{products_, width_, n, latent, width, 0}, latents_, tokens, lists_, grid);
        }
      }
      finish(first, n, tokens, lists_);
    }
  }

  const Tensor& exact() const { return exact_; }  // [N] who answers for a token

 private:
  // One allocation for all arrays of the pass: at small N the host would take longer for ten than the device for all.
  void reserve(const Tensor& x, int k) {
    const int64_t lists = most_ * ranges_, size = list_size(k), entries = lists * size, runs = latent_runs(),
                  bounded = k > 0 ? 1 : 0;
    const auto take_all = [&](DeviceArrays arrays) {
      tokens_.codes = arrays.take<__half>(most_ * d_padded_);
      tokens_.scale = arrays.take<float>(most_);
      tokens_.bounds = arrays.take<TokenBounds>(most_);
      products_ = arrays.take<float>(rows_ * width_);
      lists_ = {
          arrays.take<int>(lists),
          arrays.take<int32_t>(entries),
          arrays.take<float>(bounded * entries),
          arrays.take<float>(bounded * entries),
          arrays.take<uint32_t>(bounded * most_),
          ranges_,
          static_cast<int>(size)};
      screens_ = arrays.take<LatentScreen>(runs * kRun);
      largest_ = arrays.take<LargestBounds>(runs);
      return arrays.used;
    };
    memory_ = torch::stable::new_empty(x, {take_all(DeviceArrays{nullptr})}, ScalarType::Byte);
    take_all(DeviceArrays{mutable_data<unsigned char>(memory_)});
  }

  // Of whole tiles of latents.
  int64_t latent_runs() const { return ceil_div(packed_.weight.size(0), kTile) * kTileRuns; }

  // What the scans look at.
  void prepare_latents(const LatentLimits& limits) {
    latents_ = {data<float>(*packed_.bounds), packed_.weight.size(0), screens_, largest_};
    Arena arena{nullptr};
    arena.take<uint32_t>(3);
    device_.launch(
        prepare_latents_kernel, dim3(static_cast<unsigned>(latent_runs())), kThreads, arena.used, latents_, limits,
        screens_, largest_);
  }

  // Products of tokens and latents [first, first + width) into columns from `column` on, `runs` times with `skip`
  // latents left out in between.
  void multiply(
      const __half* tokens, int64_t n, int64_t first, int64_t width, int64_t column, int64_t runs = 1,
      int64_t skip = 0) const {
    half_products(
        device_, tokens, data<__half>(*packed_.codes) + first * d_padded_, n, width, d_padded_, products_ + column,
        width_, runs, skip);
  }

  // The chunk before the fused filter: every step-th run of latents, of which the last may be cut short.
  ScoreChunk sampled_products(const __half* tokens, int64_t n) const {
    const int64_t n_latents = packed_.weight.size(0), skip = (fused_->step() - 1) * kRun;
    const int64_t width = FusedFilter::first_latents(fused_->k(), n_latents), whole = width / kRun, rest = width % kRun;
    if (whole > 0) {
      multiply(tokens, n, 0, kRun, 0, whole, skip);
    }
    if (rest > 0) {
      multiply(tokens, n, whole * (kRun + skip), rest, whole * kRun);
    }
    return {products_, width_, n, 0, width, skip};
  }

  const OnDevice& device_;
  const Packed& packed_;
  const TokenRules rules_;
  int64_t d_padded_, most_, rows_, width_;  // rows_: most_ up to whole blocks of the filter
  int ranges_ = 1;
  Tensor memory_, exact_;
  ScreenedTokens tokens_{};
  CandidateLists lists_{};
  float* products_ = nullptr;
  LatentScreen* screens_ = nullptr;
  LargestBounds* largest_ = nullptr;
  ScreenedLatents latents_{};
  OptionalTensor centre_;
  std::optional<FusedFilter> fused_;
};

}  // namespace darkmatter::cuda
