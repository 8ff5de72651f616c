// topk_encode: the k largest pre-activations of each token, exact, without an [N, F] array.
//
// Each task finds the best k of its range of places for each of its tokens, by screening (top_k.h) or by exact
// sums of all; the ranges are merged at the end, with the latents that need no place. try_topk_encode leaves the tokens
// that screening does not help to its caller.
#include <torch/csrc/stable/library.h>

#include <numeric>
#include <tuple>

#include "cpu/screen/top_k.h"

namespace darkmatter::cpu {

constexpr int64_t kGroup = 2048;       // tokens whose candidates (2k a token and range) live at a time
constexpr int64_t kMaxScreenK = 4096;  // above, the lists of bounds cost more than the scores

// The best k of every token, for some tokens.
template <typename T>
class TopK {
 public:
  TopK(
      const T* x, int64_t n_tokens, const Packed& packed, const OtherLatents<T>& others,
      const std::vector<double>& centre, int64_t k, bool may_leave)
      : x_(x),
        packed_(packed),
        others_(others),
        centre_(centre),
        k_(k),
        may_leave_(may_leave),
        screens_(packed.codes && k <= kMaxScreenK && 8 * k <= packed.places.n_places),
        tiling_(
            screens_ ? screen_tiling(n_tokens, packed.places.n_places)
                     : Tiling::exact(n_tokens, packed.places.n_places, packed.d())),
        best_(n_tokens * tiling_.ranges),
        zero_(n_tokens, 0),
        left_(n_tokens, may_leave && !screens_) {}

  // values, indices: [n_tokens, k]. Tokens for which left() is set then hold nothing that means anything.
  void run(T* values, int64_t* indices) {
    if (!may_leave_ || screens_) {
      parallel_tasks(tiling_.tasks(), [&](int64_t i) {
        const Tiling::Task task = tiling_.task(i);
        screens_ ? screen_task(task) : exact_task(task, rows_between(0, task.tokens));
      });
    }
    find_constant_best();
    parallel_ranges(tiling_.n_tokens, 16, [&](int64_t begin, int64_t end) {
      for (int64_t token = begin; token < end; ++token) {
        write(token, values + token * k_, indices + token * k_);
      }
    });
  }

  bool left(int64_t token) const { return left_[token]; }

 private:
  Best<T>& best_of(int64_t token, const Tiling::Task& task) { return best_[token * tiling_.ranges + task.number]; }

  void screen_task(const Tiling::Task& task) {
    const TaskTokens<T> tokens(x_ + task.token * packed_.d(), task.tokens, screened_weights(packed_), centre_);
    TopKScreen<T> screen(tokens, packed_, task, k_, may_leave_);
    std::vector<TopKState<T>>& states = screen.run();
    Rows undecided;
    for (int64_t row = 0; row < task.tokens; ++row) {
      if (states[row].screened) {
        best_of(task.token + row, task) = std::move(states[row].best);
      } else if (tokens.zero[row]) {
        zero_[task.token + row] = 1;
      } else {
        undecided.push_back(static_cast<int32_t>(row));
      }
    }
    if (may_leave_) {
      for (const int32_t row : undecided) {
        left_[task.token + row] = 1;
      }
    } else {
      exact_task(task, undecided);
    }
  }

  void exact_task(const Tiling::Task& task, const Rows& rows) {
    visit_exactly<T>(
        x_ + task.token * packed_.d(), rows, packed_, task.begin, task.end, [&](int64_t row, int64_t place, T h) {
          offer_place(best_of(task.token + row, task), k_, packed_.places, place, h);
        });
  }

  // Those of the constant latents that can be among the best of any token, and the best of a token of zeros.
  void find_constant_best() {
    others_.visit_constant([&](int32_t latent, T h) { constant_.offer_any(k_, {h, latent}); });
    constant_.cut(k_);
    if (std::find(zero_.begin(), zero_.end(), 1) != zero_.end()) {
      others_.visit_all_at_zero([&](int32_t latent, T h) { at_zero_.offer_any(k_, {h, latent}); });
      at_zero_.cut(k_);
    }
  }

  void write(int64_t token, T* values, int64_t* indices) {
    if (left_[token]) {
      std::fill_n(values, k_, T(0.0f));
      std::iota(indices, indices + k_, int64_t{0});
      return;
    }
    std::vector<Candidate<T>> merged;
    const auto add = [&](const Best<T>& part) { merged.insert(merged.end(), part.kept.begin(), part.kept.end()); };
    if (zero_[token]) {
      add(at_zero_);
    } else {
      for (int64_t range = 0; range < tiling_.ranges; ++range) {
        add(best_[token * tiling_.ranges + range]);
      }
      add_constant(token, merged);
    }
    others_.visit_odd(x_ + token * packed_.d(), [&](int32_t latent, T h) { merged.push_back({h, latent}); });
    std::partial_sort(merged.begin(), merged.begin() + k_, merged.end(), comes_first<T>);
    for (int64_t a = 0; a < k_; ++a) {
      values[a] = relu(merged[a].value);
      indices[a] = merged[a].index;
    }
  }

  // 0 times Inf or NaN is NaN: of a token that is not finite, the constant latents too.
  void add_constant(int64_t token, std::vector<Candidate<T>>& merged) const {
    const T* row = x_ + token * packed_.d();
    const bool finite = constant_.kept.empty() ||
                        std::all_of(row, row + packed_.d(), [](T e) { return std::isfinite(static_cast<double>(e)); });
    if (finite) {
      merged.insert(merged.end(), constant_.kept.begin(), constant_.kept.end());
    } else {
      const Places& places = packed_.places;
      for (int64_t i = 0; i < std::min(k_, places.n_constant); ++i) {
        merged.push_back({static_cast<T>(std::numeric_limits<float>::quiet_NaN()), places.constant[i]});
      }
    }
  }

  const T* x_;
  const Packed& packed_;
  const OtherLatents<T>& others_;
  const std::vector<double>& centre_;
  const int64_t k_;
  const bool may_leave_, screens_;
  const Tiling tiling_;
  std::vector<Best<T>> best_;  // [n_tokens, ranges]
  std::vector<char> zero_, left_;
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
    dispatch_floating("x", x.scalar_type(), [&](auto type) {
      using T = decltype(type);
      const OtherLatents<T> others(packed, b_enc, centre);
      for (int64_t first = 0; first < x.size(0); first += kGroup) {
        const int64_t some = std::min(kGroup, x.size(0) - first);
        TopK<T> group(data<T>(rows) + first * x.size(1), some, packed, others, centre, k, may_leave);
        group.run(mutable_data<T>(values) + first * k, mutable_data<int64_t>(indices) + first * k);
        for (int64_t token = 0; token < some; ++token) {
          if (group.left(token)) {
            left.push_back(first + token);
          }
        }
      }
    });
  }
  Tensor undecided = torch::stable::new_empty(x, {static_cast<int64_t>(left.size())}, ScalarType::Long);
  std::copy(left.begin(), left.end(), mutable_data<int64_t>(undecided));
  return {values, indices, undecided};
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
  m.impl("topk_encode", TORCH_BOX(&darkmatter::cpu::topk_encode));
  m.impl("try_topk_encode", TORCH_BOX(&darkmatter::cpu::try_topk_encode));
}
