// topk_encode: the k largest pre-activations of each token, exact, without an [N, F] array.
//
// Each task keeps, for each of its tokens, up to 2k candidates and the k-th best value so far as a threshold; when the
// buffer is full it is cut back to the best k. The order (value descending, NaN first, then index ascending) is total,
// so neither blocking nor the number of threads can change the answer.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "cpu/screened.h"

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
  T threshold{};  // the k-th best value, once `limited`
  bool limited = false;

  // Latents in ascending order: a tie with the threshold has the higher index and loses.

  void offer(int64_t k, int64_t first, int64_t latents, const T* h) {
    for (int64_t l = 0; l < latents; ++l) {
      if (limited && h[l] <= threshold) {
        continue;
      }
      kept.push_back({h[l], first + l});
      if (static_cast<int64_t>(kept.size()) == k) {
        threshold = std::max_element(kept.begin(), kept.end(), comes_first<T>)->value;
        limited = true;
      } else if (static_cast<int64_t>(kept.size()) >= 2 * k) {
        cut(k);
      }
    }
  }

  void offer_all(int64_t k, const std::vector<int32_t>& latents, const std::vector<T>& h) {
    for (size_t i = 0; i < latents.size(); ++i) {
      offer_any(k, {h[i], latents[i]});
    }
  }

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

constexpr int64_t kGroup = 2048;      // tokens whose candidates (2k a token and range) live at a time
constexpr int64_t kMaxScreenK = 512;  // above, the lists of bounds cost more than the scores

// What one task knows of one token while it screens. `limit` bounds the k-th best value of the task from below: at
// first by the k-th largest lower bound (two-sided error), later by exact values of the k most promising candidates
// (one-sided).
template <typename T>
struct ScreenedTopK {
  std::vector<float> lowest;  // min-heap of the k largest lower bounds
  std::vector<float> upper;   // upper bounds and latents of the candidates not rescored yet
  std::vector<int32_t> latent;
  Best<T> best;  // the rescored ones
  float limit = -std::numeric_limits<float>::infinity();
  bool screened = true;

  void add(const Hits& hits, size_t k) {
    for (int32_t h = 0; h < hits.count; ++h) {
      if (!(hits.upper[h] < limit)) {
        upper.push_back(hits.upper[h]);
        latent.push_back(hits.latent[h]);
        raise(hits.lower[h], k);
      }
    }
    if (upper.size() > kScreenCandidates) {
      drop_below_limit();
      screened = upper.size() <= kScreenCandidates * 3 / 4;
    }
  }

  // k latents have a value of at least the smallest bound in the heap.
  void raise(float lower, size_t k) {
    if (lowest.size() == k) {
      if (!(lower > lowest.front())) {
        return;
      }
      std::pop_heap(lowest.begin(), lowest.end(), std::greater<>());
      lowest.back() = lower;
    } else if (lower == lower) {
      lowest.push_back(lower);
    } else {
      return;
    }
    std::push_heap(lowest.begin(), lowest.end(), std::greater<>());
    if (lowest.size() == k) {
      // rounded itself, then compared with rounded values: twice the margin
      limit = std::max(limit, margin_below<T>(margin_below<T>(lowest.front())));
    }
  }

  void drop_below_limit() {
    size_t kept = 0;
    for (size_t c = 0; c < upper.size(); ++c) {
      if (!(upper[c] < limit)) {
        upper[kept] = upper[c];
        latent[kept++] = latent[c];
      }
    }
    upper.resize(kept);
    latent.resize(kept);
  }

  // Moves the candidates whose upper bound is at least `least` to `chosen`, to be rescored.
  void choose_above(float least, std::vector<int32_t>& chosen) {
    chosen.clear();
    size_t kept = 0;
    for (size_t c = 0; c < upper.size(); ++c) {
      if (upper[c] < least) {
        upper[kept] = upper[c];
        latent[kept++] = latent[c];
      } else {
        chosen.push_back(latent[c]);
      }
    }
    upper.resize(kept);
    latent.resize(kept);
  }

  // Of those the limit lets in, the `most` most promising.
  void choose(size_t most, std::vector<int32_t>& chosen) {
    drop_below_limit();
    float least = -std::numeric_limits<float>::infinity();
    if (upper.size() > most) {
      std::vector<float> sorted(upper);
      std::nth_element(sorted.begin(), sorted.begin() + (most - 1), sorted.end(), std::greater<>());
      least = sorted[most - 1];
    }
    choose_above(least, chosen);
  }

  void absorb(int64_t k, const Chosen<T>& chosen) {
    best.offer_all(k, chosen.latents, chosen.h);
    limit = std::max(limit, margin_below<T>(best.reached(k)));
  }
};

// Rescores for every screened token of the task the `most` most promising candidates.
template <typename T>
static void tighten(
    std::vector<ScreenedTopK<T>>& states, TaskTokens<T>& tokens, const Packed& packed, const Tiling::Task& task,
    int64_t k, size_t most) {
  std::vector<Chosen<T>> chosen(states.size());
  for (size_t row = 0; row < states.size(); ++row) {
    if (states[row].screened) {
      states[row].choose(most, chosen[row].latents);
    }
  }
  rescore(tokens, packed, task.begin, task.end, chosen);
  for (size_t row = 0; row < states.size(); ++row) {
    states[row].absorb(k, chosen[row]);
  }
}

template <typename T>
static void screen_task(
    const T* x, const Packed& packed, const std::vector<double>& centre, int64_t k, const Tiling& tiling,
    const Tiling::Task& task, std::vector<Best<T>>& best) {
  const ScreenedWeights weights = screened_weights(packed);
  TaskTokens<T> tokens(x + task.token * weights.d, task.tokens, weights.d);
  tokens.encode(weights, centre);
  std::vector<ScreenedTopK<T>> states(task.tokens);
  for (int64_t row = 0; row < task.tokens; ++row) {
    states[row].screened = tokens.screened[row].screened;
  }
  // Tightened after 1/32, 1/8 and 1/2 of the panels: a handful of exact values saves most of the appends that follow.
  // At the end the k most promising first: what they reach keeps most of the others from being rescored.
  int64_t panel = task.begin / kPanel;
  const int64_t last = ceil_div(task.end, kPanel), panels = last - panel;
  for (const int64_t stop : {panel + panels / 32, panel + panels / 8, panel + panels / 2, last}) {
    scan_panels(
        tokens, weights, panel, stop, 0, [&](int64_t row) { return &states[row].limit; },
        [&](int64_t row) { return states[row].screened; },
        [&](int64_t row, const Hits& hits) { states[row].add(hits, k); });
    if (stop > panel) {
      tighten(states, tokens, packed, task, k, k);
    }
    panel = stop;
  }
  tighten(states, tokens, packed, task, k, std::numeric_limits<size_t>::max());
  for (int64_t row = 0; row < task.tokens; ++row) {
    Best<T>& own = best[(task.token + row) * tiling.ranges + task.number];
    if (states[row].screened) {
      own = std::move(states[row].best);
    } else {
      tokens.with_row(row, [&](WideRows& alone) {
        visit_range<T>(alone, 1, packed, task.begin, task.end, [&](int64_t, int64_t first, int64_t n, const T* h) {
          own.offer(k, first, n, h);
        });
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
