// The screening kernels on 8-bit codes, multiplied in tiles: AMX. Codes, bounds and the rest are those of
// byte_kernels.cpp.
//
// A tile register holds 16 rows of 64 bytes. tdpbusd multiplies 64 codes each of 16 tokens with those of 16 latents in
// 16 cycles, eight times what vpdpbusd does, and the panels lie in memory as it wants them: a row of a tile is four
// codes each of 16 latents. What is left is to bring tiles in:
//   - 32 tokens and a panel are 6 tiles of sums; each step of 64 dimensions loads 7 tiles for 6 products;
//   - a slice of a panel stays in L1 while all tokens of the task pass, whose sums wait in L2;
//   - the next panel is fetched meanwhile: loads of tiles find a stream of it too late.
// Measured in a loop of its own on a Sapphire Rapids core, bfloat16 tiles, d 768, 256 tokens, panels from memory, in G
// multiply-adds a second: 720 to 840 as it is, 660 without slices, 625 without fetching ahead; 1010 with panels in L2,
// 1776 in registers alone.
//
// bfloat16 codes (tdpbf16ps) have a bound an eighth as wide and need no second stage, but are twice the bytes: large
// calls took as long, one token twice as long.
#include "cpu/screen/certificate.h"

#if defined(__x86_64__)
#include <immintrin.h>

namespace darkmatter::cpu {
namespace {

constexpr int64_t kTileRows = 16, kTileBytes = 64, kLine = 64;
constexpr int64_t kTokensAtOnce = 2 * kTileRows;
constexpr int64_t kCodeRow = 4 * kPanel;              // bytes from one row of a panel's tile to the next
constexpr int64_t kStepBytes = kTileRows * kCodeRow;  // of a panel: 64 dimensions of its latents
constexpr int64_t kSlice = 8 * kTileBytes;            // dimensions whose codes of a panel, 24 KB, stay in L1
constexpr int64_t kSumRow = sizeof(int32_t) * kPanel;

// Palette 1 with eight tiles, all of 16 rows of 64 bytes.
struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
static_assert(sizeof(TileConfig) == 64);
const TileConfig config;

#pragma GCC push_options
#pragma GCC target("amx-tile,amx-int8")

void enter() { _tile_loadconfig(&config); }
void leave() { _tile_release(); }

// Adds the products of `dimensions` dimensions from x and panel on to out, or sets out (`first`). Tiles 0 to 2 are the
// sums of the first 16 tokens, 3 to 5 of the others. Going forth and back through the latents, a tile of tokens that is
// loaded is multiplied twice. Each step fetches `ahead` lines from `next` on into L2.
void add_32_tokens(
    const uint8_t* x, const int8_t* panel, int64_t d_padded, int64_t dimensions, bool first, int32_t* out,
    const int8_t* next, int64_t ahead) {
  const uint8_t* const x2 = x + kTileRows * d_padded;
  int32_t* const out2 = out + kTileRows * kPanel;
  if (first) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    _tile_zero(4);
    _tile_zero(5);
  } else {
    _tile_loadd(0, out, kSumRow);
    _tile_loadd(1, out + 16, kSumRow);
    _tile_loadd(2, out + 32, kSumRow);
    _tile_loadd(3, out2, kSumRow);
    _tile_loadd(4, out2 + 16, kSumRow);
    _tile_loadd(5, out2 + 32, kSumRow);
  }
  for (int64_t e = 0; e < dimensions; e += kTileBytes, panel += kStepBytes) {
    for (int64_t line = 0; line < ahead; ++line, next += kLine) {
      _mm_prefetch(next, _MM_HINT_T1);
    }
    _tile_loadd(6, panel, kCodeRow);
    _tile_loadd(7, x + e, d_padded);
    _tile_dpbusd(0, 7, 6);
    _tile_loadd(7, x2 + e, d_padded);
    _tile_dpbusd(3, 7, 6);
    _tile_loadd(6, panel + kTileBytes, kCodeRow);
    _tile_dpbusd(4, 7, 6);
    _tile_loadd(7, x + e, d_padded);
    _tile_dpbusd(1, 7, 6);
    _tile_loadd(6, panel + 2 * kTileBytes, kCodeRow);
    _tile_dpbusd(2, 7, 6);
    _tile_loadd(7, x2 + e, d_padded);
    _tile_dpbusd(5, 7, 6);
  }
  _tile_stored(0, out, kSumRow);
  _tile_stored(1, out + 16, kSumRow);
  _tile_stored(2, out + 32, kSumRow);
  _tile_stored(3, out2, kSumRow);
  _tile_stored(4, out2 + 16, kSumRow);
  _tile_stored(5, out2 + 32, kSumRow);
}

#pragma GCC pop_options

// What is left of 32 tokens goes through vpdpbusd: its time is the panel's way from memory.
void products(const void* codes, int64_t tokens, const int8_t* panel, int64_t d_padded, int32_t* out) {
  const auto* x = static_cast<const uint8_t*>(codes);
  const int64_t in_tiles = tokens / kTokensAtOnce * kTokensAtOnce, lines = kStepBytes / kLine;
  for (int64_t e = 0; in_tiles > 0 && e < d_padded; e += kSlice) {
    const int64_t dimensions = d_padded - e < kSlice ? d_padded - e : kSlice;
    const int8_t* slice = panel + e / kTileBytes * kStepBytes;
    // Each of the parts fetches its share of the same slice of the next panel.
    const int64_t ahead = (lines * kTokensAtOnce + in_tiles - 1) / in_tiles;
    const int8_t* next = slice + kPanel * d_padded;
    for (int64_t t = 0; t < in_tiles; t += kTokensAtOnce, next += ahead * kLine * (dimensions / kTileBytes)) {
      add_32_tokens(x + t * d_padded + e, slice, d_padded, dimensions, e == 0, out + t * kPanel, next, ahead);
    }
  }
  const int64_t most = byte_kernels()->tokens;
  for (int64_t t = in_tiles; t < tokens; t += most) {
    const int64_t some = tokens - t < most ? tokens - t : most;
    byte_kernels()->products(x + t * d_padded, some, panel, d_padded, out + t * kPanel);
  }
}

}  // namespace

const ScreenKernels* tile_kernels() {
  static const ScreenKernels table = [] {
    ScreenKernels own = *byte_kernels();
    own.tokens = kTokensAtOnce;
    own.at_once = kScreenChunk;
    own.enter = enter;
    own.leave = leave;
    own.products = products;
    return own;
  }();
  return &table;
}

}  // namespace darkmatter::cpu

#else

namespace darkmatter::cpu {

const ScreenKernels* tile_kernels() { return nullptr; }

}  // namespace darkmatter::cpu

#endif
