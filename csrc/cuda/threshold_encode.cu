// threshold_encode on CUDA: as topk_encode, but nobody knows how many latents are kept until they are, so the op waits
// for the device once, as torch.nonzero does, to allocate its result; twice where tokens take the exact path. With a
// capacity (threshold_encode_fixed) the result has its shape beforehand, and nothing waits.
#include <tuple>

#include "cuda/encoder.h"
#include "cuda/screen/filter_threshold.cuh"

namespace darkmatter::cuda {

constexpr int64_t kPoolPerToken = 1024;  // kept latents a token, on average; more go the exact way

// What is kept, token by token, before it is known where it goes. The numbers lie in one tensor, all 0 at first: a
// call of few tokens is as long as its launches.
class Kept {
 public:
  Tensor latent, values, exact;

  Kept(const Tensor& x, int64_t capacity)
      : latent(torch::stable::new_empty(x, {capacity}, ScalarType::Int)),
        values(torch::stable::new_empty(x, {capacity})),
        n_(x.size(0)),
        numbers_(torch::stable::new_zeros(x, {kFound + 1 + 2 * n_}, ScalarType::Long)) {}

  KeptPool pool() const {
    return {mutable_data<int32_t>(latent), values.mutable_data_ptr(), latent.numel(), used(), count() + n_, count()};
  }
  unsigned long long* n_nan() const { return used() + 1; }                         // of the thresholds
  int64_t* count() const { return mutable_data<int64_t>(numbers_) + kFound + 1; }  // [N]

  // crow [N + 1]: the sums of a 0, which lies before the counts, and of these.
  Tensor row_starts() const {
    Tensor all = numbers_;
    return prefix_sums(torch::stable::narrow(all, 0, kFound, n_ + 1));
  }

 private:
  static constexpr int64_t kFound = 2;  // pool entries used, NaN thresholds; then a 0, counts [N], starts [N]

  unsigned long long* used() const { return mutable_data<unsigned long long>(numbers_); }

  int64_t n_;
  Tensor numbers_;
};

template <typename T>
static Tensor limits_of(const OnDevice& device, const Tensor& threshold, unsigned long long* n_nan) {
  const Tensor limits =
      torch::stable::new_empty(threshold, {std::max<int64_t>(1, threshold.numel())}, ScalarType::Float);
  if (threshold.numel() > 0) {
    device.launch(
        threshold_limits_kernel<T>, dim3(static_cast<unsigned>(ceil_div(threshold.numel(), kThreads))), kThreads, 0,
        data<T>(threshold), threshold.numel(), mutable_data<float>(limits), n_nan);
  }
  return limits;
}

// finish(rows of a tile, its first token, how many, tokens, lists, bytes of shared memory) of every tile of tokens.
// Returns who answers for a token.
template <typename T, typename Finish>
static Tensor screened_threshold(
    const OnDevice& device, const Tensor& x, const OptionalTensor& b_dec, const Packed& packed,
    const LatentLimits& of_latents, const Finish& finish) {
  ScreenPass pass(device, x, b_dec, packed, 0, FusedQuestion{0, margin_of<T>(), of_latents});
  ExactRows<T> all = exact_rows<T>(x, packed);
  const size_t finish_bytes = fit_shared(device, all, [](Arena& arena) { KeptArrays{arena}; });
  pass.run<T>(
      x,
      [&](const ScoreChunk& chunk, const ScreenedLatents& latents, const ScreenedTokens& tokens,
          const CandidateLists& lists, dim3 grid) {
        device.launch(
            filter_threshold_kernel, grid, kThreads, sizeof(FilterShared), chunk, latents, tokens, lists, of_latents);
      },
      [&](int64_t first, int64_t n, const ScreenedTokens& tokens, const CandidateLists& lists) {
        ExactRows<T> tile = all;
        tile.x += first * all.d;
        tile.n = n;
        finish(tile, first, n, tokens, lists, finish_bytes);
      });
  return pass.exact();
}

// All tokens take the exact path.
static Tensor all_exactly(const Tensor& x) {
  Tensor marks = torch::stable::new_empty(x, {x.size(0)}, ScalarType::Int);
  torch::stable::fill_(marks, static_cast<double>(kExactly));
  return marks;
}

// Where kept latents go: their numbers only (col null), or all of it.
template <typename T>
struct KeptPlaces {
  int64_t* count;
  const int64_t* crow;
  int64_t* col;
  T* values;
};

// The marked tokens, some at a time: their scores, and which of these are kept.
template <typename T>
static void exact_threshold(
    const OnDevice& device, const Tensor& x, const Packed& packed, const MarkedTokens& marked, int64_t number,
    const Thresholds<T>& thresholds, const KeptPlaces<T>& places) {
  const int64_t n_latents = packed.weight.size(0);
  const int64_t most = std::min(exact_groups<T>(number, n_latents), kMaxGridY) * kExactTokens;
  const std::array<int64_t, 2> shape{std::min(most, number), n_latents};
  const Tensor scores = torch::stable::new_empty(x, shape);
  for (int64_t first = 0; first < number; first += most) {
    const int64_t n = std::min(most, number - first);
    exact_scores(device, exact_products<T>(x, packed), marked, first, n, mutable_data<T>(scores));
    Arena arena{nullptr};
    arena.take<BlockScratch>(1);
    arena.take<int>(1);
    device.launch(
        kept_scores_kernel<T>, dim3(static_cast<unsigned>(n)), kThreads, arena.used, data<T>(scores), n_latents, marked,
        first, thresholds, places.count, places.crow, places.col, places.values);
  }
}

template <typename T>
static std::tuple<Tensor, Tensor, Tensor> above(
    const OnDevice& device, const Tensor& x, const OptionalTensor& b_dec, const Packed& packed,
    const Tensor& threshold) {
  const bool screened = packed.codes.has_value();
  Kept kept(x, screened ? x.size(0) * kPoolPerToken : 0);
  const Thresholds<T> thresholds{data<T>(threshold), threshold.dim() == 0 ? 0 : 1};
  const Tensor limits = limits_of<T>(device, threshold, kept.n_nan());
  if constexpr (!std::is_same_v<T, double>) {
    if (screened) {
      kept.exact = screened_threshold<T>(
          device, x, b_dec, packed, {data<float>(limits), thresholds.step},
          [&](const ExactRows<T>& tile, int64_t first, int64_t n, const ScreenedTokens& tokens,
              const CandidateLists& lists, size_t bytes) {
            device.launch(
                finish_threshold_kernel<T>, dim3(static_cast<unsigned>(n)), kThreads, bytes, tile, tokens, lists,
                thresholds, first, kept.pool());
          });
    }
  }
  if (!screened) {
    kept.exact = all_exactly(x);
  }
  const MarkedList marked(device, kept.exact, kExactly);
  Tensor crow = kept.row_starts();
  int64_t n_kept = 0, n_nan = 0, n_marked = 0;
  device.read(
      {{data<int64_t>(crow) + x.size(0), &n_kept},
       {reinterpret_cast<const int64_t*>(kept.n_nan()), &n_nan},
       {marked.number(), &n_marked}});
  require(n_nan == 0, "threshold: must not contain NaN, got ", n_nan, " NaN");
  if (n_marked > 0) {
    exact_threshold<T>(device, x, packed, marked.tokens(), n_marked, thresholds, {kept.count()});
    crow = kept.row_starts();
    device.read({{data<int64_t>(crow) + x.size(0), &n_kept}});
  }
  Tensor col = torch::stable::new_empty(x, {n_kept}, ScalarType::Long);
  Tensor values = torch::stable::new_empty(x, {n_kept});
  if (n_kept > 0) {
    device.launch(
        write_kept_kernel<T>, dim3(static_cast<unsigned>(x.size(0))), kThreads, 0, kept.pool(), data<int64_t>(crow),
        data<int>(kept.exact), mutable_data<int64_t>(col), mutable_data<T>(values));
    if (n_marked > 0) {
      exact_threshold<T>(
          device, x, packed, marked.tokens(), n_marked, thresholds,
          {nullptr, data<int64_t>(crow), mutable_data<int64_t>(col), mutable_data<T>(values)});
    }
  }
  return {values, crow, col};
}

// The same into rows of fixed length.
template <typename T>
static void above_into(
    const OnDevice& device, const Tensor& x, const OptionalTensor& b_dec, const Packed& packed, const Tensor& threshold,
    const KeptRows<T>& rows) {
  const Thresholds<T> thresholds{data<T>(threshold), threshold.dim() == 0 ? 0 : 1};
  std::optional<Tensor> marks;
  if constexpr (!std::is_same_v<T, double>) {
    if (packed.codes) {
      const Tensor limits = limits_of<T>(device, threshold, nullptr);
      marks = screened_threshold<T>(
          device, x, b_dec, packed, {data<float>(limits), thresholds.step},
          [&](const ExactRows<T>& tile, int64_t first, int64_t n, const ScreenedTokens& tokens,
              const CandidateLists& lists, size_t bytes) {
            KeptRows<T> of_tile = rows;
            of_tile.values += first * rows.capacity;
            of_tile.indices += first * rows.capacity;
            of_tile.found += first;
            device.launch(
                finish_threshold_rows_kernel<T>, dim3(static_cast<unsigned>(n)), kThreads, bytes, tile, tokens, lists,
                thresholds, of_tile);
          });
    }
  }
  exact_answers<T>(device, x, packed, marks ? *marks : all_exactly(x), KeptOfScores<T>{thresholds, rows});
}

static std::tuple<Tensor, Tensor, Tensor> threshold_encode_fixed(
    Tensor x, Tensor W_enc, Tensor b_enc, OptionalTensor b_dec, Tensor threshold, int64_t capacity,
    OptionalTensor weight, OptionalTensor bias, OptionalTensor codes, OptionalTensor sums, OptionalTensor bounds,
    OptionalTensor groups, OptionalTensor gain) {
  check_encoder_input(x, W_enc);
  check_threshold(threshold, x, W_enc);
  check_capacity(capacity, W_enc.size(1));
  const OnDevice device(x);
  const Packed packed =
      packed_encoder(device, W_enc, b_enc, b_dec, {weight, bias, codes, sums, bounds, groups, gain}, can_screen(W_enc));
  Tensor values = torch::stable::new_empty(x, {x.size(0), capacity});
  Tensor indices = torch::stable::new_empty(x, {x.size(0), capacity}, ScalarType::Long);
  Tensor found = torch::stable::new_zeros(x, {x.size(0)}, ScalarType::Long);
  if (x.size(0) > 0 && W_enc.size(1) > 0) {
    const Tensor rows = torch::stable::contiguous(x), limits = torch::stable::contiguous(threshold);
    dispatch_floating("x", x.scalar_type(), [&](auto type) {
      using T = decltype(type);
      above_into<T>(
          device, rows, b_dec, packed, limits,
          {mutable_data<T>(values), mutable_data<int64_t>(indices), mutable_data<int64_t>(found), capacity});
    });
  }
  return {values, indices, found};
}

static std::tuple<Tensor, Tensor, Tensor> threshold_encode(
    Tensor x, Tensor W_enc, Tensor b_enc, OptionalTensor b_dec, Tensor threshold, OptionalTensor weight,
    OptionalTensor bias, OptionalTensor codes, OptionalTensor sums, OptionalTensor bounds, OptionalTensor groups,
    OptionalTensor gain) {
  check_encoder_input(x, W_enc);
  check_threshold(threshold, x, W_enc);
  const OnDevice device(x);
  const Packed packed =
      packed_encoder(device, W_enc, b_enc, b_dec, {weight, bias, codes, sums, bounds, groups, gain}, can_screen(W_enc));
  if (x.size(0) == 0 || W_enc.size(1) == 0) {
    return {
        torch::stable::new_empty(x, {0}), torch::stable::new_zeros(x, {x.size(0) + 1}, ScalarType::Long),
        torch::stable::new_empty(x, {0}, ScalarType::Long)};
  }
  const Tensor rows = torch::stable::contiguous(x), limits = torch::stable::contiguous(threshold);
  return dispatch_floating(
      "x", x.scalar_type(), [&](auto type) { return above<decltype(type)>(device, rows, b_dec, packed, limits); });
}

}  // namespace darkmatter::cuda

STABLE_TORCH_LIBRARY_IMPL(darkmatter, CUDA, m) {
  m.impl("threshold_encode", DARKMATTER_OP(&darkmatter::cuda::threshold_encode));
  m.impl("threshold_encode_fixed", DARKMATTER_OP(&darkmatter::cuda::threshold_encode_fixed));
}
