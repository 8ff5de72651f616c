// Included before every source of csrc/cpu, and compiled once for all of them: the ops are registered as
// torch.ops.darkmatter_emulated_cpu.
#pragma once

#include <immintrin.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#undef STABLE_TORCH_LIBRARY
#define STABLE_TORCH_LIBRARY(ns, m) STABLE_TORCH_LIBRARY_FRAGMENT(darkmatter_emulated_cpu, m)
#undef STABLE_TORCH_LIBRARY_IMPL
#define STABLE_TORCH_LIBRARY_IMPL(ns, key, m) _STABLE_TORCH_LIBRARY_IMPL(darkmatter_emulated_cpu, key, m, C10_UID)
