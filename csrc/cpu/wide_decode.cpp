// wide_decode, wide_dot: sparse_decode and decoder_dot of float64 numbers with weights of any type, not rounded: what
// pursuit carries from step to step. The same gathers and sums in the same order; only what goes in and out is wider.
#include <algorithm>
#include <vector>

#include "cpu/active.h"
#include "registration.h"

namespace darkmatter::cpu {

constexpr int64_t kWideTokens = 4;  // tokens a parallel part at least

static Tensor wide_decode(Tensor values, Tensor indices, Tensor W_dec) {
  check_dim("W_dec", W_dec, 2);
  check_values(values, indices);
  check_type("values", values, ScalarType::Double);
  const int64_t d = W_dec.size(1);
  const Active active(indices, std::nullopt, -1, W_dec.size(0));
  const Tensor weights = torch::stable::contiguous(W_dec), factors = torch::stable::contiguous(values);
  Tensor out = torch::stable::new_empty(factors, {active.n_tokens, d});
  const double* given = data<double>(factors);
  const int64_t* atoms = active.index();
  double* sums = mutable_data<double>(out);
  dispatch_floating("W_dec", W_dec.scalar_type(), [&](auto type) {
    using T = decltype(type);
    const TypedKernels<T>& kernel = kernels().of<T>();
    const T* all = data<T>(weights);
    parallel_ranges(active.n_tokens, kWideTokens, [&](int64_t begin, int64_t end) {
      std::vector<int64_t> index;  // of the nonzero values: those of atoms that have left cost no gather
      std::vector<double> factor;
      for (int64_t token = begin; token < end; ++token) {
        index.clear();
        factor.clear();
        for (int64_t a = active.begin(token); a < active.begin(token + 1); ++a) {
          if (const double value = given[a]; value != 0.0) {
            index.push_back(atoms[a]);
            factor.push_back(value);
          }
        }
        const auto count = static_cast<int64_t>(index.size());
        double* sum = sums + token * d;
        std::fill_n(sum, d, 0.0);
        kernel.weighted_sum(all, d, d, index.data(), factor.data(), count, count, sum);
      }
    });
  });
  return out;
}

static Tensor wide_dot(Tensor rows, Tensor indices, Tensor W_dec) {
  check_dim("rows", rows, 2);
  check_dim("W_dec", W_dec, 2);
  check_size("rows", rows, 1, W_dec.size(1));
  check_type("rows", rows, ScalarType::Double);
  const int64_t d = W_dec.size(1);
  const Active active(indices, std::nullopt, rows.size(0), W_dec.size(0));
  const Tensor weights = torch::stable::contiguous(W_dec), left = torch::stable::contiguous(rows);
  Tensor out = torch::stable::new_empty(left, {active.n_tokens, indices.size(1)});
  const double* given = data<double>(left);  // once: each call goes through torch's C interface
  const int64_t* atoms = active.index();
  double* products = mutable_data<double>(out);
  dispatch_floating("W_dec", W_dec.scalar_type(), [&](auto type) {
    using T = decltype(type);
    const TypedKernels<T>& kernel = kernels().of<T>();
    const T* all = data<T>(weights);
    parallel_ranges(active.n_tokens, kWideTokens, [&](int64_t begin, int64_t end) {
      for (int64_t token = begin; token < end; ++token) {
        const int64_t first = active.begin(token), count = active.begin(token + 1) - first;
        kernel.row_dots(given + token * d, all, d, atoms + first, count, active.begin(end) - first, products + first);
      }
    });
  });
  return out;
}

}  // namespace darkmatter::cpu

STABLE_TORCH_LIBRARY_IMPL(darkmatter, CPU, m) {
  m.impl("wide_decode", DARKMATTER_OP(&darkmatter::cpu::wide_decode));
  m.impl("wide_dot", DARKMATTER_OP(&darkmatter::cpu::wide_dot));
}
