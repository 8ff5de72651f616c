// The active latents an op is given, their shapes checked.
#pragma once

#include "cuda/kernels/active.cuh"
#include "cuda/kernels/dispatch.h"

namespace darkmatter::cuda {

// The active latents of N tokens, [N, k] or ragged. Their values are not looked at, which would have to be fetched:
// each kernel says what it makes of an index out of range.
struct Active {
  Tensor indices;
  OptionalTensor crow;
  ActiveLatents latents;

  Active(const Tensor& given, const OptionalTensor& rows, int64_t n_latents)
      : indices(torch::stable::contiguous(given)), crow(contiguous_or_none(rows)) {
    check_type("indices", given, ScalarType::Long);
    check_dim("indices", given, rows ? 1 : 2);
    require(
        n_latents > 0 || given.numel() == 0, "indices: must be empty where there are no latents, got ", given.numel());
    if (rows) {
      check_dim("crow", *rows, 1);
      check_type("crow", *rows, ScalarType::Long);
      require(rows->size(0) >= 1, "crow: must have N + 1 entries, got shape ", shape_of(*rows));
    }
    latents = {
        data<int64_t>(indices), data<int64_t>(crow), rows ? 0 : given.size(1), rows ? rows->size(0) - 1 : given.size(0),
        n_latents};
  }
};

}  // namespace darkmatter::cuda
