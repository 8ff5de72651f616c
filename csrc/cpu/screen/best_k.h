// The best k pre-activations of a token, in a total order: value descending, NaN first, then index ascending. Neither
// blocking nor the number of threads can change what the best k are.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <vector>

namespace darkmatter::cpu {

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
  T threshold{};  // a value that k of those seen reach, once `limited`
  bool limited = false;

  // In any order of latents: a tie with the threshold may have the lower index, so only smaller values are turned away.
  void offer_any(int64_t k, const Candidate<T>& candidate) {
    if (limited && candidate.value < threshold) {
      return;
    }
    kept.push_back(candidate);
    if (static_cast<int64_t>(kept.size()) >= 2 * k) {
      cut(k);
    }
  }

  // The k-th best value so far, or -inf: nothing that rounds to less can still come in. (NaN sorts first and counts.)
  float reached(int64_t k) {
    if (static_cast<int64_t>(kept.size()) < k) {
      return -std::numeric_limits<float>::infinity();
    }
    cut(k);
    const T worst = std::max_element(kept.begin(), kept.end(), comes_first<T>)->value;
    return worst == worst ? static_cast<float>(worst) : std::numeric_limits<float>::infinity();
  }

  void cut(int64_t k) {
    if (static_cast<int64_t>(kept.size()) <= k) {
      return;
    }
    std::nth_element(kept.begin(), kept.begin() + (k - 1), kept.end(), comes_first<T>);
    kept.resize(k);
    threshold = kept[k - 1].value;
    limited = true;
  }
};

}  // namespace darkmatter::cpu
