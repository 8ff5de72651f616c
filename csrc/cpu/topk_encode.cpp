// topk_encode: the k largest pre-activations of each token, exact, without an [N, F] array.
//
// Each task keeps, for each of its tokens, up to 2k candidates and the k-th best value so far as a threshold; when the
// buffer is full it is cut back to the best k. The order (value descending, NaN first, then index ascending) is total,
// so neither blocking nor the number of threads can change the answer.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "cpu/encoder.h"

namespace darkmatter {

template <typename T>
struct Candidate {
  T value;
  int64_t index;
};

// NaN counts as the largest value (as in torch.topk); -0 equals +0.
template <typename T>
inline bool comes_first(const Candidate<T>& a, const Candidate<T>& b) {
  const bool a_nan = a.value != a.value, b_nan = b.value != b.value;
  if (a_nan || b_nan) {
    return a_nan && b_nan ? a.index < b.index : a_nan;
  }
  return a.value != b.value ? a.value > b.value : a.index < b.index;
}

// The best k of what one task has seen of one token.
template <typename T>
struct Best {
  std::vector<Candidate<T>> kept;
  T threshold{};  // once k are kept: a later candidate must be larger (a tie has the higher index and loses)

  void offer(int64_t k, int64_t first, int64_t latents, const T* h) {
    for (int64_t l = 0; l < latents; ++l) {
      if (static_cast<int64_t>(kept.size()) >= k && h[l] <= threshold) {
        continue;
      }
      kept.push_back({h[l], first + l});
      if (static_cast<int64_t>(kept.size()) == k) {
        threshold = std::max_element(kept.begin(), kept.end(), comes_first<T>)->value;
      } else if (static_cast<int64_t>(kept.size()) >= 2 * k) {
        cut(k);
      }
    }
  }

  void cut(int64_t k) {
    if (static_cast<int64_t>(kept.size()) <= k) {
      return;
    }
    std::nth_element(kept.begin(), kept.begin() + (k - 1), kept.end(), comes_first<T>);
    kept.resize(k);
    threshold = kept[k - 1].value;
  }
};

constexpr int64_t kGroup = 2048;  // tokens whose candidates (2k a token and range) live at a time

template <typename T>
static void select_top_k(const T* x, int64_t n_tokens, const Packed& packed, int64_t k, T* values, int64_t* indices) {
  const Tiling tiling(n_tokens, packed.weight.size(0), packed.weight.size(1));
  std::vector<Best<T>> best(tiling.n_tokens * tiling.ranges);
  visit_pre_activations<T>(
      x, packed, tiling, [&](int64_t range, int64_t token, int64_t first, int64_t latents, const T* h) {
        best[token * tiling.ranges + range].offer(k, first, latents, h);
      });
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

static std::tuple<Tensor, Tensor> topk_encode(
    Tensor x, Tensor W_enc, Tensor b_enc, OptionalTensor b_dec, int64_t k, OptionalTensor weight, OptionalTensor bias) {
  check_encoder_input(x, W_enc);
  STD_TORCH_CHECK(k >= 0 && k <= W_enc.size(1), "k: must be from 0 to ", W_enc.size(1), " (latents), got ", k);
  const Packed packed = packed_encoder(W_enc, b_enc, b_dec, weight, bias);
  Tensor values = torch::stable::new_empty(x, {x.size(0), k});
  Tensor indices = torch::stable::new_empty(x, {x.size(0), k}, ScalarType::Long);
  if (x.size(0) > 0 && k > 0) {
    const Tensor rows = torch::stable::contiguous(x);
    dispatch_floating("x", x.scalar_type(), [&](auto type) {
      using T = decltype(type);
      for (int64_t first = 0; first < x.size(0); first += kGroup) {
        select_top_k<T>(
            data<T>(rows) + first * x.size(1), std::min(kGroup, x.size(0) - first), packed, k,
            mutable_data<T>(values) + first * k, mutable_data<int64_t>(indices) + first * k);
      }
    });
  }
  return {values, indices};
}

}  // namespace darkmatter

STABLE_TORCH_LIBRARY_IMPL(darkmatter, CPU, m) { m.impl("topk_encode", TORCH_BOX(&darkmatter::topk_encode)); }
