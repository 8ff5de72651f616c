// to_dense: active latents as dense acts [N, F]. One write of the array; memory-bound.
#include <algorithm>

#include "cpu/active.h"
#include "cpu/kernels/pool.h"
#include "registration.h"

namespace darkmatter::cpu {

static Tensor to_dense(Tensor values, Tensor indices, OptionalTensor crow, int64_t n_latents) {
  check_values(values, indices);
  check_floating("values", values);
  require(n_latents >= 0, "n_latents: must be at least 0, got ", n_latents);
  const Active active(indices, crow, -1, n_latents);
  const Tensor given = torch::stable::contiguous(values);
  Tensor out = new_pooled(values, {active.n_tokens, n_latents});
  dispatch_floating("values", values.scalar_type(), [&](auto type) {
    using T = decltype(type);
    parallel_ranges(active.n_tokens, 4, [&](int64_t begin, int64_t end) {
      for (int64_t token = begin; token < end; ++token) {
        T* row = mutable_data<T>(out) + token * n_latents;
        std::fill_n(row, n_latents, T(0));
        for (int64_t a = active.begin(token); a < active.begin(token + 1); ++a) {
          T& place = row[active.index()[a]];  // a latent stored twice adds up, as in sparse_decode
          place = rounded<T>(static_cast<double>(place) + static_cast<double>(data<T>(given)[a]));
        }
      }
    });
  });
  return out;
}

}  // namespace darkmatter::cpu

STABLE_TORCH_LIBRARY_IMPL(darkmatter, CPU, m) { m.impl("to_dense", DARKMATTER_OP(&darkmatter::cpu::to_dense)); }
