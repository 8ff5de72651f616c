// sparse_decode and its two gradients: gathers and sums over the active latents only, float64 sums in a fixed order.
#include <algorithm>
#include <vector>

#include "cpu/active.h"
#include "cpu/kernels/pool.h"
#include "cpu/kernels/wide_rows.h"
#include "registration.h"

namespace darkmatter::cpu {

constexpr int64_t kTokenGrain = 8;     // tokens a parallel part at least
constexpr int64_t kLatentGrain = 32;   // latents a parallel part at least
constexpr int64_t kColumnGrain = 256;  // columns of W_dec a part at least, when there are fewer tokens than threads
constexpr int64_t kLooked = 1024;      // columns summed twice before one asks what share they are
constexpr int64_t kGathered = 4096;    // active latents listed at a time

// The nonzero active latents of tokens [begin, end) in order: relu leaves zeros in fixed-k acts, no gather for them.
struct Used {
  std::vector<int64_t> index;
  std::vector<double> factor;
  std::vector<float> narrow_factor;
  std::vector<int64_t> start;  // [tokens + 1]

  // Takes tokens from `begin` until kGathered entries or `end`; returns the token after the last taken.
  template <typename T>
  int64_t gather(const Active& active, const T* values, int64_t begin, int64_t end) {
    index.clear();
    factor.clear();
    narrow_factor.clear();
    start.assign(1, 0);
    for (; begin < end && static_cast<int64_t>(index.size()) < kGathered; ++begin) {
      for (int64_t a = active.begin(begin); a < active.begin(begin + 1); ++a) {
        const double value = static_cast<double>(values[a]);
        if (value != 0.0) {
          index.push_back(active.index()[a]);
          factor.push_back(value);
          narrow_factor.push_back(static_cast<float>(value));
        }
      }
      start.push_back(static_cast<int64_t>(index.size()));
    }
    return begin;
  }
};

static Tensor sparse_decode(Tensor values, Tensor indices, OptionalTensor crow, Tensor W_dec, OptionalTensor b_dec) {
  check_dim("W_dec", W_dec, 2);
  check_values(values, indices);
  check_type("values", values, W_dec.scalar_type());
  const int64_t d = W_dec.size(1);
  if (b_dec) {
    check_vector("b_dec", *b_dec, d);
    check_type("b_dec", *b_dec, W_dec.scalar_type());
  }
  const Active active(indices, crow, -1, W_dec.size(0));
  const Tensor weights = torch::stable::contiguous(W_dec), factors = torch::stable::contiguous(values);
  const Tensor given_bias = b_dec ? torch::stable::contiguous(*b_dec) : W_dec;
  Tensor out = torch::stable::new_empty(W_dec, {active.n_tokens, d});
  dispatch_floating("W_dec", W_dec.scalar_type(), [&](auto type) {
    using T = decltype(type);
    const TypedKernels<T>& kernel = kernels().of<T>();
    const std::vector<T> no_bias(b_dec ? 0 : d);
    const T* bias = b_dec ? data<T>(given_bias) : no_bias.data();
    // Columns [from, from + n) of tokens [begin, end). How the work is cut does not change any sum.
    const auto decode = [&](int64_t begin, int64_t end, int64_t from, int64_t n) {
      WideRows sum(1, n);
      Used used;
      int64_t looked = 0, again = 0;  // columns; where too many are summed twice, the wide sums alone are faster
      for (int64_t token = begin; token < end;) {
        const int64_t first = token;
        token = used.gather(active, data<T>(factors), first, end);
        for (int64_t t = 0; t < token - first; ++t) {
          const int64_t start = used.start[t];
          const bool narrow = again <= looked / 4 + kLooked;
          again += kernel.decode_row(
              data<T>(weights) + from, d, n, used.index.data() + start, used.factor.data() + start,
              narrow ? used.narrow_factor.data() + start : nullptr, used.start[t + 1] - start,
              used.start.back() - start, bias + from, sum.data(), mutable_data<T>(out) + (first + t) * d + from);
          looked += n;
        }
      }
    };
    if (active.n_tokens >= torch::stable::get_num_threads()) {
      parallel_ranges(active.n_tokens, kTokenGrain, [&](int64_t begin, int64_t end) { decode(begin, end, 0, d); });
    } else {
      parallel_ranges(ceil_div(d, kColumnGrain), 1, [&](int64_t begin, int64_t end) {
        const int64_t from = begin * kColumnGrain;
        decode(0, active.n_tokens, from, std::min(end * kColumnGrain, d) - from);
      });
    }
  });
  return out;
}

static Tensor decoder_dot(Tensor rows, Tensor indices, OptionalTensor crow, Tensor W_dec) {
  check_dim("rows", rows, 2);
  check_dim("W_dec", W_dec, 2);
  check_size("rows", rows, 1, W_dec.size(1));
  check_type("rows", rows, W_dec.scalar_type());
  const int64_t d = W_dec.size(1);
  const Active active(indices, crow, rows.size(0), W_dec.size(0));
  const Tensor weights = torch::stable::contiguous(W_dec), left = torch::stable::contiguous(rows);
  const int64_t* latents = active.index();
  std::vector<int64_t> shape(indices.sizes().begin(), indices.sizes().end());
  Tensor out = torch::stable::new_empty(W_dec, shape);
  dispatch_floating("W_dec", W_dec.scalar_type(), [&](auto type) {
    using T = decltype(type);
    const TypedKernels<T>& kernel = kernels().of<T>();
    const T *given = data<T>(left), *all = data<T>(weights);
    T* products = mutable_data<T>(out);
    parallel_ranges(active.n_tokens, kTokenGrain, [&](int64_t begin, int64_t end) {
      std::vector<double> wide(d), sums;
      for (int64_t token = begin; token < end; ++token) {
        const int64_t first = active.begin(token), count = active.begin(token + 1) - first;
        kernel.widen(given + token * d, wide.data(), d);
        sums.resize(count);
        kernel.row_dots(wide.data(), all, d, latents + first, count, active.begin(end) - first, sums.data());
        std::transform(sums.begin(), sums.end(), products + first, rounded<T>);
      }
    });
  });
  return out;
}

// The active latents sorted by latent, tokens ascending within one (a counting sort): the segments of decoder_outer.
struct Segments {
  std::vector<int64_t> start;  // [F + 1]
  std::vector<int64_t> token;  // [z]
  std::vector<double> factor;  // [z]

  template <typename T>
  Segments(const Active& active, const T* values)
      : start(active.n_latents + 1, 0), token(active.n_active), factor(active.n_active) {
    for (int64_t a = 0; a < active.n_active; ++a) {
      ++start[active.index()[a] + 1];
    }
    for (int64_t j = 0; j < active.n_latents; ++j) {
      start[j + 1] += start[j];
    }
    std::vector<int64_t> next(start.begin(), start.end() - 1);
    for (int64_t i = 0; i < active.n_tokens; ++i) {
      for (int64_t a = active.begin(i); a < active.begin(i + 1); ++a) {
        const int64_t at = next[active.index()[a]]++;
        token[at] = i;
        factor[at] = static_cast<double>(values[a]);
      }
    }
  }
};

static Tensor decoder_outer(Tensor values, Tensor indices, OptionalTensor crow, Tensor rows, int64_t n_latents) {
  check_dim("rows", rows, 2);
  check_values(values, indices);
  check_type("values", values, rows.scalar_type());
  require(n_latents >= 0, "n_latents: must be at least 0, got ", n_latents);
  const int64_t d = rows.size(1);
  const Active active(indices, crow, rows.size(0), n_latents);
  const Tensor right = torch::stable::contiguous(rows), factors = torch::stable::contiguous(values);
  Tensor out = new_pooled(rows, {n_latents, d});
  dispatch_floating("rows", rows.scalar_type(), [&](auto type) {
    using T = decltype(type);
    const TypedKernels<T>& kernel = kernels().of<T>();
    const Segments segments(active, data<T>(factors));
    parallel_ranges(n_latents, kLatentGrain, [&](int64_t begin, int64_t end) {
      WideRows sum(1, d);
      for (int64_t j = begin; j < end; ++j) {
        const int64_t first = segments.start[j], count = segments.start[j + 1] - first;
        std::fill_n(sum.data(), d, 0.0);
        kernel.weighted_sum(
            data<T>(right), d, d, segments.token.data() + first, segments.factor.data() + first, count,
            active.n_active - first, sum.data());
        kernel.round_row(sum.data(), mutable_data<T>(out) + j * d, d);
      }
    });
  });
  return out;
}

}  // namespace darkmatter::cpu

STABLE_TORCH_LIBRARY_IMPL(darkmatter, CPU, m) {
  m.impl("sparse_decode", DARKMATTER_OP(&darkmatter::cpu::sparse_decode));
  m.impl("decoder_dot", DARKMATTER_OP(&darkmatter::cpu::decoder_dot));
  m.impl("decoder_outer", DARKMATTER_OP(&darkmatter::cpu::decoder_outer));
}
