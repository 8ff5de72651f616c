// What topk_encode and threshold_encode do alike with the tokens of a call: which of them the screen decides, which the
// exact path, and which are zeros or left to the caller.
#pragma once

#include "cpu/screen/candidates.h"

namespace darkmatter::cpu {

template <typename T>
struct EncodeTokens {
  const T* x;  // [n_tokens, d]
  const Packed& packed;
  const OtherLatents<T>& others;
  const std::vector<double>& centre;
  bool screens, may_leave;
  Tiling tiling;
  std::vector<char> zero, left;  // [n_tokens]

  // screens: whether there is a screen for this call. may_leave: whether tokens that it does not decide are left.
  EncodeTokens(
      const T* x, int64_t n_tokens, const Packed& packed, const OtherLatents<T>& others,
      const std::vector<double>& centre, bool screens, bool may_leave)
      : x(x),
        packed(packed),
        others(others),
        centre(centre),
        screens(screens),
        may_leave(may_leave),
        tiling(
            screens ? screen_tiling(n_tokens, packed.places.n_places)
                    : Tiling::exact(n_tokens, packed.places.n_places, packed.d())),
        zero(n_tokens, 0),
        left(n_tokens, may_leave && !screens) {}

  const T* row(int64_t token) const { return x + token * packed.d(); }
  bool any_zero() const { return std::find(zero.begin(), zero.end(), 1) != zero.end(); }

  // screen(task), or exact(task, all its rows), for every task.
  template <typename Screen, typename Exact>
  void run(const Screen& screen, const Exact& exact) const {
    if (may_leave && !screens) {
      return;
    }
    parallel_tasks(tiling.tasks(), [&](int64_t i) {
      const Tiling::Task task = tiling.task(i);
      screens ? screen(task) : exact(task, rows_between(0, task.tokens));
    });
  }

  // Marks the rows of a task that its screen did not decide as zeros or as left; returns those for the exact path.
  template <typename Decided>
  Rows sort_undecided(const TaskTokens<T>& tokens, const Tiling::Task& task, const Decided& decided) {
    Rows exact;
    for (int64_t row = 0; row < task.tokens; ++row) {
      if (decided(row)) {
        continue;
      }
      if (tokens.zero[row]) {
        zero[task.token + row] = 1;
      } else if (may_leave) {
        left[task.token + row] = 1;
      } else {
        exact.push_back(static_cast<int32_t>(row));
      }
    }
    return exact;
  }

  // Appends the numbers of the tokens that are left, counted from `first` on.
  void list_left(int64_t first, std::vector<int64_t>& numbers) const {
    for (int64_t token = 0; token < tiling.n_tokens; ++token) {
      if (left[token]) {
        numbers.push_back(first + token);
      }
    }
  }
};

inline Tensor token_numbers(const Tensor& x, const std::vector<int64_t>& numbers) {
  Tensor tensor = torch::stable::new_empty(x, {static_cast<int64_t>(numbers.size())}, ScalarType::Long);
  std::copy(numbers.begin(), numbers.end(), mutable_data<int64_t>(tensor));
  return tensor;
}

}  // namespace darkmatter::cpu
