// topk_encode: the k largest pre-activations of each token, exact, without an [N, F] array.
//
// Each task finds the best k of its range of latents for each of its tokens, by screening (screened_topk.h) or by exact
// sums of all; the ranges are merged at the end.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "cpu/screened_topk.h"

namespace darkmatter {

constexpr int64_t kGroup = 2048;      // tokens whose candidates (2k a token and range) live at a time
constexpr int64_t kMaxScreenK = 512;  // above, the lists of bounds cost more than the scores

template <typename T>
static void screen_task(
    const T* x, const Packed& packed, const std::vector<double>& centre, int64_t k, const Tiling& tiling,
    const Tiling::Task& task, std::vector<Best<T>>& best) {
  const int64_t d = packed.weight.size(1);
  const TaskTokens<T> tokens(x + task.token * d, task.tokens, screened_weights(packed), centre);
  TopKScreen<T> screen(tokens, packed, task, k);
  std::vector<TopKState<T>>& states = screen.run();
  for (int64_t row = 0; row < task.tokens; ++row) {
    Best<T>& own = best[(task.token + row) * tiling.ranges + task.number];
    if (states[row].screened) {
      own = std::move(states[row].best);
    } else {
      WideRows wide = tokens.wide_row(row, d);
      visit_range<T>(wide, 1, packed, task.begin, task.end, [&](int64_t, int64_t first, int64_t n, const T* h) {
        own.offer(k, first, n, h);
      });
    }
  }
}

template <typename T>
static void exact_task(
    const T* x, const Packed& packed, int64_t k, const Tiling& tiling, const Tiling::Task& task,
    std::vector<Best<T>>& best) {
  const int64_t d = packed.weight.size(1);
  WideRows wide(task.tokens, d);
  wide.fill(kernels().of<T>(), x + task.token * d, task.tokens);
  visit_range<T>(
      wide, task.tokens, packed, task.begin, task.end, [&](int64_t row, int64_t first, int64_t latents, const T* h) {
        best[(task.token + row) * tiling.ranges + task.number].offer(k, first, latents, h);
      });
}

template <typename T>
static void write_best(std::vector<Best<T>>& best, const Tiling& tiling, int64_t k, T* values, int64_t* indices) {
  parallel_ranges(tiling.n_tokens, 16, [&](int64_t begin, int64_t end) {
    for (int64_t token = begin; token < end; ++token) {
      std::vector<Candidate<T>>& merged = best[token * tiling.ranges].kept;
      for (int64_t range = 1; range < tiling.ranges; ++range) {
        const auto& part = best[token * tiling.ranges + range].kept;
        merged.insert(merged.end(), part.begin(), part.end());
      }
      std::partial_sort(merged.begin(), merged.begin() + k, merged.end(), comes_first<T>);
      for (int64_t a = 0; a < k; ++a) {
        values[token * k + a] = relu(merged[a].value);
        indices[token * k + a] = merged[a].index;
      }
    }
  });
}

template <typename T>
static void select_top_k(
    const T* x, int64_t n_tokens, const Packed& packed, const std::vector<double>& centre, int64_t k, T* values,
    int64_t* indices) {
  const int64_t n_latents = packed.weight.size(0), d = packed.weight.size(1);
  const bool screen = packed.codes && k <= kMaxScreenK && 8 * k <= n_latents;
  const Tiling tiling =
      screen ? Tiling(n_tokens, n_latents, kScreenChunk, kScreenTokens, kPanel) : Tiling::exact(n_tokens, n_latents, d);
  std::vector<Best<T>> best(tiling.n_tokens * tiling.ranges);
  parallel_tasks(tiling.tasks(), [&](int64_t i) {
    const Tiling::Task task = tiling.task(i);
    if (screen) {
      screen_task(x, packed, centre, k, tiling, task, best);
    } else {
      exact_task(x, packed, k, tiling, task, best);
    }
  });
  write_best(best, tiling, k, values, indices);
}

static std::tuple<Tensor, Tensor> topk_encode(
    Tensor x, Tensor W_enc, Tensor b_enc, OptionalTensor b_dec, int64_t k, OptionalTensor weight, OptionalTensor bias,
    OptionalTensor codes, OptionalTensor sums, OptionalTensor bounds) {
  check_encoder_input(x, W_enc);
  require(k >= 0 && k <= W_enc.size(1), "k: must be from 0 to ", W_enc.size(1), " (latents), got ", k);
  const Packed packed = packed_encoder(W_enc, b_enc, b_dec, {weight, bias, codes, sums, bounds}, x.size(0));
  Tensor values = torch::stable::new_empty(x, {x.size(0), k});
  Tensor indices = torch::stable::new_empty(x, {x.size(0), k}, ScalarType::Long);
  if (x.size(0) > 0 && k > 0) {
    const Tensor rows = torch::stable::contiguous(x);
    const std::vector<double> centre = wide_vector(b_dec);
    dispatch_floating("x", x.scalar_type(), [&](auto type) {
      using T = decltype(type);
      for (int64_t first = 0; first < x.size(0); first += kGroup) {
        select_top_k<T>(
            data<T>(rows) + first * x.size(1), std::min(kGroup, x.size(0) - first), packed, centre, k,
            mutable_data<T>(values) + first * k, mutable_data<int64_t>(indices) + first * k);
      }
    });
  }
  return {values, indices};
}

}  // namespace darkmatter

STABLE_TORCH_LIBRARY_IMPL(darkmatter, CPU, m) { m.impl("topk_encode", TORCH_BOX(&darkmatter::topk_encode)); }
