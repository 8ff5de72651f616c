// topk_encode: the k largest pre-activations of each token, exact, without an [N, F] array.
//
// Each task finds the best k of its range of places for each of its tokens, by screening (top_k.h) or by exact
// sums of all; the ranges are merged at the end, with the latents that need no place. try_topk_encode leaves the tokens
// that screening does not help to its caller.
#include <numeric>
#include <tuple>

#include "cpu/screen/encode_tokens.h"
#include "cpu/screen/top_k.h"
#include "registration.h"

namespace darkmatter::cpu {

constexpr int64_t kGroup = 2048;       // tokens whose candidates (2k a token and range) live at a time
constexpr int64_t kMaxScreenK = 4096;  // above, the lists of bounds cost more than the scores

// The best k of every token, for some tokens.
template <typename T>
class TopK {
 public:
  TopK(const EncodeTokens<T>& tokens, int64_t k)
      : tokens_(tokens), tiling_(tokens_.tiling), k_(k), best_(tiling_.n_tokens * tiling_.ranges) {}

  // values, indices: [n_tokens, k]. Tokens that are left then hold nothing that means anything.
  void run(T* values, int64_t* indices) {
    tokens_.run(
        [&](const Tiling::Task& task) { screen_task(task); },
        [&](const Tiling::Task& task, const Rows& rows) { exact_task(task, rows); });
    find_constant_best();
    parallel_ranges(tiling_.n_tokens, 16, [&](int64_t begin, int64_t end) {
      for (int64_t token = begin; token < end; ++token) {
        write(token, values + token * k_, indices + token * k_);
      }
    });
  }

  const EncodeTokens<T>& tokens() const { return tokens_; }

 private:
  Best<T>& best_of(int64_t token, const Tiling::Task& task) { return best_[token * tiling_.ranges + task.number]; }

  void screen_task(const Tiling::Task& task) {
    const Packed& packed = tokens_.packed;
    const TaskTokens<T> tokens(tokens_.row(task.token), task.tokens, screened_weights(packed), tokens_.centre);
    TopKScreen<T> screen(tokens, packed, task, k_, tokens_.may_leave);
    std::vector<TopKState<T>>& states = screen.run();
    for (int64_t row = 0; row < task.tokens; ++row) {
      if (states[row].screened) {
        best_of(task.token + row, task) = std::move(states[row].best);
      }
    }
    exact_task(task, tokens_.sort_undecided(tokens, task, [&](int64_t row) { return states[row].screened; }));
  }

  void exact_task(const Tiling::Task& task, const Rows& rows) {
    const Packed& packed = tokens_.packed;
    visit_exactly<T>(tokens_.row(task.token), rows, packed, task.begin, task.end, [&](int64_t row, int64_t place, T h) {
      offer_place(best_of(task.token + row, task), k_, packed.places, place, h);
    });
  }

  // Those of the constant latents that can be among the best of any token, and the best of a token of zeros.
  void find_constant_best() {
    tokens_.others.visit_constant([&](int32_t latent, T h) { constant_.offer_any(k_, {h, latent}); });
    constant_.cut(k_);
    if (tokens_.any_zero()) {
      tokens_.others.visit_all_at_zero([&](int32_t latent, T h) { at_zero_.offer_any(k_, {h, latent}); });
      at_zero_.cut(k_);
    }
  }

  void write(int64_t token, T* values, int64_t* indices) {
    if (tokens_.left[token]) {
      std::fill_n(values, k_, T(0.0f));
      std::iota(indices, indices + k_, int64_t{0});
      return;
    }
    std::vector<Candidate<T>> merged;
    const auto add = [&](const Best<T>& part) { merged.insert(merged.end(), part.kept.begin(), part.kept.end()); };
    const auto add_one = [&](int32_t latent, T h) { merged.push_back({h, latent}); };
    const T* x = tokens_.row(token);
    if (tokens_.zero[token]) {
      add(at_zero_);
    } else {
      for (int64_t range = 0; range < tiling_.ranges; ++range) {
        add(best_[token * tiling_.ranges + range]);
      }
      if (tokens_.others.constant_of(x)) {
        add(constant_);
      } else {
        tokens_.others.visit_constant_as_nan(k_, add_one);
      }
    }
    tokens_.others.visit_odd(x, add_one);
    std::partial_sort(merged.begin(), merged.begin() + k_, merged.end(), comes_first<T>);
    for (int64_t a = 0; a < k_; ++a) {
      values[a] = relu(merged[a].value);
      indices[a] = merged[a].index;
    }
  }

  EncodeTokens<T> tokens_;
  const Tiling& tiling_;
  const int64_t k_;
  std::vector<Best<T>> best_;  // [n_tokens, ranges]
  Best<T> constant_, at_zero_;
};

static std::tuple<Tensor, Tensor, Tensor> encode(
    const Tensor& x, const Tensor& W_enc, const Tensor& b_enc, const OptionalTensor& b_dec, int64_t k,
    const PackedArguments& given, bool may_leave) {
  check_encoder_input(x, W_enc);
  require(k >= 0 && k <= W_enc.size(1), "k: must be from 0 to ", W_enc.size(1), " (latents), got ", k);
  const Packed packed = packed_encoder(W_enc, b_enc, b_dec, given, x.size(0));
  Tensor values = torch::stable::new_empty(x, {x.size(0), k});
  Tensor indices = torch::stable::new_empty(x, {x.size(0), k}, ScalarType::Long);
  std::vector<int64_t> left;
  if (x.size(0) > 0 && k > 0) {
    const Tensor rows = torch::stable::contiguous(x);
    const std::vector<double> centre = wide_vector(b_dec);
    const bool screens = packed.codes && k <= kMaxScreenK && 8 * k <= packed.places.n_places;
    dispatch_floating("x", x.scalar_type(), [&](auto type) {
      using T = decltype(type);
      const OtherLatents<T> others(packed, b_enc, centre);
      for (int64_t first = 0; first < x.size(0); first += kGroup) {
        const int64_t some = std::min(kGroup, x.size(0) - first);
        TopK<T> group({data<T>(rows) + first * x.size(1), some, packed, others, centre, screens, may_leave}, k);
        group.run(mutable_data<T>(values) + first * k, mutable_data<int64_t>(indices) + first * k);
        group.tokens().list_left(first, left);
      }
    });
  }
  return {values, indices, token_numbers(x, left)};
}

static std::tuple<Tensor, Tensor> topk_encode(
    Tensor x, Tensor W_enc, Tensor b_enc, OptionalTensor b_dec, int64_t k, OptionalTensor weight, OptionalTensor bias,
    OptionalTensor codes, OptionalTensor sums, OptionalTensor bounds, OptionalTensor groups, OptionalTensor gain) {
  auto [values, indices, undecided] =
      encode(x, W_enc, b_enc, b_dec, k, {weight, bias, codes, sums, bounds, groups, gain}, false);
  return {values, indices};
}

static std::tuple<Tensor, Tensor, Tensor> try_topk_encode(
    Tensor x, Tensor W_enc, Tensor b_enc, OptionalTensor b_dec, int64_t k, OptionalTensor weight, OptionalTensor bias,
    OptionalTensor codes, OptionalTensor sums, OptionalTensor bounds, OptionalTensor groups, OptionalTensor gain) {
  return encode(x, W_enc, b_enc, b_dec, k, {weight, bias, codes, sums, bounds, groups, gain}, true);
}

}  // namespace darkmatter::cpu

STABLE_TORCH_LIBRARY_IMPL(darkmatter, CPU, m) {
  m.impl("topk_encode", DARKMATTER_OP(&darkmatter::cpu::topk_encode));
  m.impl("try_topk_encode", DARKMATTER_OP(&darkmatter::cpu::try_topk_encode));
}
