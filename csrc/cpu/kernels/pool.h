// Large results in memory that is used again. A fresh array of 100 MB costs 25 000 page faults, longer than writing it
// (measured on two cores: 26 ms to allocate and clear, 3 ms to clear memory already there). Asking for 2 MB pages
// instead was fast for one array and stalled for 100 ms and more when a second one had to be found.
#pragma once

#include <cstdint>
#include <vector>

#include "checks.h"

namespace darkmatter::cpu {

// new_empty in the dtype of `like`; arrays of 1 to 256 MB come from a pool and go back to it when torch drops the last
// tensor on them. The pool keeps at most DARKMATTER_POOL_MB (512) of unused memory, 0 turns it off.
Tensor new_pooled(const Tensor& like, const std::vector<int64_t>& shape);

}  // namespace darkmatter::cpu
