// The active latents an op is given, checked once.
#pragma once

#include "cpu/kernels/dispatch.h"

namespace darkmatter::cpu {

// The active latents of N tokens, [N, k] or ragged, seen the same way.
struct Active {
  Tensor indices;  // int64, contiguous
  OptionalTensor crow;
  int64_t n_tokens, n_active, n_latents;

  Active(const Tensor& given, const OptionalTensor& rows, int64_t tokens_if_ragged_unknown, int64_t latents)
      : indices(torch::stable::contiguous(given)), n_active(given.numel()), n_latents(latents) {
    check_type("indices", given, ScalarType::Long);
    if (rows) {
      check_dim("indices", given, 1);
      check_dim("crow", *rows, 1);
      check_type("crow", *rows, ScalarType::Long);
      require(rows->size(0) >= 1, "crow: must have N + 1 entries, got shape ", shape_of(*rows));
      crow = torch::stable::contiguous(*rows);
      n_tokens = rows->size(0) - 1;
    } else {
      check_dim("indices", given, 2);
      n_tokens = given.size(0);
    }
    require(
        tokens_if_ragged_unknown < 0 || tokens_if_ragged_unknown == n_tokens, "rows: must have ", n_tokens,
        " rows, one a token, got ", tokens_if_ragged_unknown);
    check_contents();
  }

  int64_t begin(int64_t token) const {
    return crow ? data<int64_t>(*crow)[token] : n_tokens ? token * (n_active / n_tokens) : 0;
  }
  const int64_t* index() const { return data<int64_t>(indices); }

 private:
  // An index out of range would read foreign memory: always checked, it costs nothing beside the gather.
  void check_contents() const {
    for (int64_t a = 0; a < n_active; ++a) {
      const int64_t j = index()[a];
      require(j >= 0 && j < n_latents, "indices: must be from 0 to ", n_latents - 1, ", got ", j);
    }
    if (!crow) {
      return;
    }
    require(
        begin(0) == 0 && begin(n_tokens) == n_active, "crow: must go from 0 to the number of indices (", n_active,
        "), got ", begin(0), " to ", begin(n_tokens));
    for (int64_t token = 0; token < n_tokens; ++token) {
      require(begin(token) <= begin(token + 1), "crow: must not decrease, got a fall at token ", token);
    }
  }
};

}  // namespace darkmatter::cpu
