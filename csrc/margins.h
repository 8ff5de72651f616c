// What the screens of the CPU (cpu/screen/certificate.h) and of the GPU (cuda/screen/certificate.cuh) share. No
// framework.
#pragma once

#include <cmath>

#include "host_device.h"

namespace darkmatter {

// What is stored of each latent besides its codes, as rows of a float32 array [kBoundRows, ..].
enum BoundRow : int { kScale, kBias, kNorm, kRounding, kSlack, kBoundRows };

// What is known of rounding to a dtype: the relative half unit in the last place (for float16 and bfloat16 with room
// for their rounding through float32, for the others as the comparison in float32 needs it), the absolute one of
// subnormal numbers, and a value below everything that overflows to infinity.
struct RoundingMargin {
  float relative, absolute, largest;
};
constexpr RoundingMargin kWideMargin{0x1p-21f, 1e-37f, 3e38f};
constexpr RoundingMargin kHalfMargin{0x1.1p-11f, 0x1p-23f, 65000.0f};
constexpr RoundingMargin kBFloat16Margin{0x1.1p-8f, 1e-37f, 3e38f};

// A number that anything which may round to `value` or more is not below.
DM_HOST_DEVICE inline float margin_below(const RoundingMargin& margin, float value) {
  value = margin.largest < value ? margin.largest : value;  // NaN stays NaN
  return value - fabsf(value) * margin.relative - margin.absolute;
}

// The same for a `value` that is not rounded itself: it may round down by as much again.
DM_HOST_DEVICE inline float twice_below(const RoundingMargin& margin, float value) {
  return margin_below(margin, margin_below(margin, value));
}

}  // namespace darkmatter
