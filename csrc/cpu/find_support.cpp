// find_support: the nonzero entries of dense acts, in CSR terms. One read of the array; memory-bound.
#include <tuple>
#include <vector>

#include "cpu/kernels/dispatch.h"
#include "registration.h"

namespace darkmatter::cpu {

static std::tuple<Tensor, Tensor> find_support(Tensor acts) {
  check_dim("acts", acts, 2);
  check_floating("acts", acts);
  const int64_t n_tokens = acts.size(0), n_latents = acts.size(1);
  require(n_latents <= INT32_MAX, "acts: must have fewer than 2^31 latents, got ", n_latents);
  const Tensor rows = torch::stable::contiguous(acts);
  Tensor crow = torch::stable::new_empty(acts, {n_tokens + 1}, ScalarType::Long);
  int64_t* starts = mutable_data<int64_t>(crow);
  std::vector<std::vector<int32_t>> found(n_tokens);
  dispatch_floating("acts", acts.scalar_type(), [&](auto type) {
    using T = decltype(type);
    parallel_ranges(n_tokens, 4, [&](int64_t begin, int64_t end) {
      std::vector<int32_t> buffer(n_latents);
      for (int64_t token = begin; token < end; ++token) {
        const int64_t count = kernels().of<T>().nonzeros(data<T>(rows) + token * n_latents, n_latents, buffer.data());
        found[token].assign(buffer.begin(), buffer.begin() + count);
      }
    });
  });
  starts[0] = 0;
  for (int64_t token = 0; token < n_tokens; ++token) {
    starts[token + 1] = starts[token] + static_cast<int64_t>(found[token].size());
  }
  Tensor col = torch::stable::new_empty(acts, {starts[n_tokens]}, ScalarType::Long);
  parallel_ranges(n_tokens, 64, [&](int64_t begin, int64_t end) {
    for (int64_t token = begin; token < end; ++token) {
      std::copy(found[token].begin(), found[token].end(), mutable_data<int64_t>(col) + starts[token]);
    }
  });
  return {crow, col};
}

}  // namespace darkmatter::cpu

STABLE_TORCH_LIBRARY_IMPL(darkmatter, CPU, m) { m.impl("find_support", DARKMATTER_OP(&darkmatter::cpu::find_support)); }
