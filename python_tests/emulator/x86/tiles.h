// AMX: eight tiles of 16 rows of 64 bytes in palette 1, a thread's own. As on the processor, a thread that has not
// configured its tiles must not touch them: the program stops.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "lanes.h"

#undef _tile_loadconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbusd

namespace darkmatter {
namespace x86 {

struct Tiles {
  static constexpr int kTiles = 8, kRows = 16, kBytes = 64;
  bool configured = false;
  uint8_t bytes[kTiles][kRows][kBytes];

  void clear() { std::memset(bytes, 0, sizeof(bytes)); }
  uint8_t (&operator[](int tile)) [kRows][kBytes] {
    if (!configured || tile < 0 || tile >= kTiles) {
      std::fputs("emulator: a tile that is not configured\n", stderr);
      std::abort();
    }
    return bytes[tile];
  }
};

inline Tiles& tiles() {
  static thread_local Tiles own;
  return own;
}

}  // namespace x86

inline void _tile_loadconfig(const void* from) {
  const auto* config = static_cast<const uint8_t*>(from);
  bool whole = config[0] == 1;
  for (int tile = 0; tile < x86::Tiles::kTiles; ++tile) {
    uint16_t row_bytes;
    std::memcpy(&row_bytes, config + 16 + 2 * tile, 2);
    whole = whole && row_bytes == x86::Tiles::kBytes && config[48 + tile] == x86::Tiles::kRows;
  }
  if (!whole) {
    std::fputs("emulator: tiles of another size than 16 rows of 64 bytes\n", stderr);
    std::abort();
  }
  x86::tiles().configured = true;
  x86::tiles().clear();
}

inline void _tile_release() {
  x86::tiles().configured = false;
  x86::tiles().clear();
}

inline void _tile_zero(int tile) { std::memset(x86::tiles()[tile], 0, sizeof(x86::tiles()[tile])); }

inline void _tile_loadd(int tile, const void* from, int64_t stride) {
  for (int row = 0; row < x86::Tiles::kRows; ++row) {
    std::memcpy(x86::tiles()[tile][row], static_cast<const char*>(from) + row * stride, x86::Tiles::kBytes);
  }
}

inline void _tile_stored(int tile, void* to, int64_t stride) {
  for (int row = 0; row < x86::Tiles::kRows; ++row) {
    std::memcpy(static_cast<char*>(to) + row * stride, x86::tiles()[tile][row], x86::Tiles::kBytes);
  }
}

// to[m][n] += the four products of the unsigned bytes a[m][4 k ..] and the signed bytes b[k][4 n ..], k = 0 .. 15.
inline void _tile_dpbusd(int to, int a, int b) {
  for (int m = 0; m < x86::Tiles::kRows; ++m) {
    int32_t sums[16];
    std::memcpy(sums, x86::tiles()[to][m], sizeof(sums));
    for (int k = 0; k < 16; ++k) {
      for (int n = 0; n < 16; ++n) {
        for (int i = 0; i < 4; ++i) {
          const auto weight = static_cast<int8_t>(x86::tiles()[b][k][4 * n + i]);
          sums[n] += static_cast<int32_t>(x86::tiles()[a][m][4 * k + i]) * weight;
        }
      }
    }
    std::memcpy(x86::tiles()[to][m], sums, sizeof(sums));
  }
}

}  // namespace darkmatter
