// Numbers on host and device: conversions, ordered keys, outward rounding. Plain functions, tested on the host.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "margins.h"

namespace darkmatter::cuda {

// To float64, exactly.
DM_HOST_DEVICE inline double widen(double value) { return value; }
DM_HOST_DEVICE inline double widen(float value) { return value; }
DM_HOST_DEVICE inline double widen(__half value) { return __half2float(value); }
DM_HOST_DEVICE inline double widen(__nv_bfloat16 value) { return __bfloat162float(value); }

// From float64, as torch converts: through float32 for the 16-bit types.
template <typename T>
DM_HOST_DEVICE inline T rounded(double value);
template <>
DM_HOST_DEVICE inline double rounded(double value) {
  return value;
}
template <>
DM_HOST_DEVICE inline float rounded(double value) {
  return static_cast<float>(value);
}
template <>
DM_HOST_DEVICE inline __half rounded(double value) {
  return __float2half_rn(static_cast<float>(value));
}
template <>
DM_HOST_DEVICE inline __nv_bfloat16 rounded(double value) {
  return __float2bfloat16_rn(static_cast<float>(value));
}

template <typename T>
DM_HOST_DEVICE constexpr RoundingMargin margin_of() {
  if constexpr (std::is_same_v<T, __half>) {
    return kHalfMargin;
  } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return kBFloat16Margin;
  } else {
    return kWideMargin;
  }
}

// The smallest float not below `value`; NaN stays NaN.
DM_HOST_DEVICE inline float rounded_up(double value) {
  const float nearest = static_cast<float>(value);
  return static_cast<double>(nearest) < value ? nextafterf(nearest, INFINITY) : nearest;
}

DM_HOST_DEVICE inline uint32_t float_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof(bits));
  return bits;
}
DM_HOST_DEVICE inline float bits_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof(value));
  return value;
}

// Unsigned integers in the order of floats: -Inf < .. < -0 = +0 < .. < +Inf < NaN, as torch sorts. 0 is the key of
// nothing: below every float's.
DM_HOST_DEVICE inline uint32_t ordered_key(float value) {
  if (value != value) {
    return 0xffffffffu;
  }
  const uint32_t bits = float_bits(value == 0.0f ? 0.0f : value);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
DM_HOST_DEVICE inline float key_float(uint32_t key) {
  if (key == 0xffffffffu) {
    return bits_float(0x7fc00000u);
  }
  return bits_float(key & 0x80000000u ? key & 0x7fffffffu : ~key);
}

// The same of float64.
DM_HOST_DEVICE inline uint64_t ordered_key(double value) {
  if (value != value) {
    return ~uint64_t{0};
  }
  value = value == 0.0 ? 0.0 : value;
  uint64_t bits;
  memcpy(&bits, &value, sizeof(bits));
  return bits >> 63 != 0 ? ~bits : bits | uint64_t{1} << 63;
}
DM_HOST_DEVICE inline double key_double(uint64_t key) {
  const uint64_t bits = key >> 63 != 0 ? key & ~(uint64_t{1} << 63) : ~key;
  double value;
  memcpy(&value, &bits, sizeof(value));
  return value;
}

// (value, latent) in one number: larger value first, of equals the lower latent. Never 0.
DM_HOST_DEVICE inline uint64_t ranked(float value, int32_t latent) {
  return static_cast<uint64_t>(ordered_key(value)) << 32 | (0xffffffffu - static_cast<uint32_t>(latent));
}
DM_HOST_DEVICE inline int32_t ranked_latent(uint64_t key) {
  return static_cast<int32_t>(0xffffffffu - static_cast<uint32_t>(key));
}
DM_HOST_DEVICE inline float ranked_value(uint64_t key) { return key_float(static_cast<uint32_t>(key >> 32)); }

// relu that keeps NaN, as torch.relu does.
DM_HOST_DEVICE inline float relu(float value) { return value <= 0.0f ? 0.0f : value; }
DM_HOST_DEVICE inline double relu(double value) { return value <= 0.0 ? 0.0 : value; }

}  // namespace darkmatter::cuda
