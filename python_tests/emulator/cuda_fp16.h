// CUDA's float16 for the emulator, as torch has it.
#pragma once

#include <torch/headeronly/util/Half.h>

using __half = torch::headeronly::Half;
inline float __half2float(__half value) { return static_cast<float>(value); }
inline __half __float2half_rn(float value) { return __half(value); }
