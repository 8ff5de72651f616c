// The lanes of a vector as numbers of a type.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#define EMULATED static inline __attribute__((always_inline))

namespace darkmatter {
namespace x86 {

template <int N>
struct MaskOf;
template <>
struct MaskOf<4> {
  using type = __mmask8;
};
template <>
struct MaskOf<8> {
  using type = __mmask8;
};
template <>
struct MaskOf<16> {
  using type = __mmask16;
};
template <>
struct MaskOf<32> {
  using type = __mmask32;
};
template <>
struct MaskOf<64> {
  using type = __mmask64;
};

template <typename T, typename V>
constexpr int kLanesOf = sizeof(V) / sizeof(T);
template <typename T, typename V>
using Mask = typename MaskOf<kLanesOf<T, V>>::type;

template <typename T, typename V>
EMULATED T lane(const V& v, int i) {
  T value;
  std::memcpy(&value, reinterpret_cast<const char*>(&v) + i * sizeof(T), sizeof(T));
  return value;
}

EMULATED bool bit(uint64_t mask, int i) { return mask >> i & 1; }

// Lane i is f(i).
template <typename V, typename T, typename F>
EMULATED V make(const F& f) {
  T lanes[kLanesOf<T, V>];
  for (int i = 0; i < kLanesOf<T, V>; ++i) {
    lanes[i] = f(i);
  }
  V v;
  std::memcpy(&v, lanes, sizeof(v));
  return v;
}

// Bit i is f(i).
template <typename T, typename V, typename F>
EMULATED Mask<T, V> make_mask(const F& f) {
  uint64_t mask = 0;
  for (int i = 0; i < kLanesOf<T, V>; ++i) {
    mask |= static_cast<uint64_t>(f(i)) << i;
  }
  return static_cast<Mask<T, V>>(mask);
}

template <typename T, typename V>
EMULATED V select(Mask<T, V> k, V yes, V no) {
  return make<V, T>([&](int i) { return bit(k, i) ? lane<T>(yes, i) : lane<T>(no, i); });
}

// Half 0 or 1 of a vector of 64 bytes.
template <typename H, typename V>
EMULATED H half(const V& v, int which) {
  H h;
  std::memcpy(&h, reinterpret_cast<const char*>(&v) + which * sizeof(H), sizeof(h));
  return h;
}
template <typename V, typename H>
EMULATED V join(const H& low, const H& high) {
  V v;
  std::memcpy(&v, &low, sizeof(low));
  std::memcpy(reinterpret_cast<char*>(&v) + sizeof(low), &high, sizeof(high));
  return v;
}

EMULATED void aligned(const void* address, uintptr_t to) {
  if (reinterpret_cast<uintptr_t>(address) % to != 0) {
    std::fprintf(stderr, "emulated AVX-512: an aligned access at %p, not a multiple of %zu\n", address, to);
    std::abort();
  }
}

}  // namespace x86
}  // namespace darkmatter
