// Certified screening: which latents can be in the answer, decided in 8-bit integers with a rigorous bound.
//
// x_i and w_j are rotated by one orthogonal map R (so that no single dimension is an outlier that ruins the 8-bit
// scale) and rounded to x~ = s_x q_x, w~ = s_w q_w with integer q in [-127, 127]. Their integer dot product is exact,
// and
//   |<x, w> - <x~, w~>| <= ||x - x~|| ||w|| + ||x~|| ||w - w~||                                       (Cauchy-Schwarz)
// with all four norms *measured* in float64 and rounded outward, plus what floating-point rounding adds anywhere (of
// the rotation, of the scores, of the exact sums). Latent j can be left out when its score plus its bound is below a
// value that is certainly reached by the answer; everything else is rescored exactly, so the answer is that of the
// exact path to the bit.
//
// Rate: vpdpbusd does 64 multiply-adds an instruction, four times what float32 does; the weights are read at one byte
// each.
#pragma once

#include <cstdint>

#include "screening.h"

namespace darkmatter {

constexpr int64_t kPanel = 48;          // latents a panel: three vectors of int32 sums
constexpr int64_t kScreenTokens = 8;    // tokens a tile: 8 x 3 sums in registers
constexpr int64_t kScreenAlign = 64;    // d is padded to whole cache lines of 8-bit codes
constexpr int64_t kMaxScreenD = 32768;  // 255 * 127 * d must stay below 2^31

struct ScreenedWeights {
  int64_t n_latents, d, d_padded, panels;
  const int8_t* codes;  // [panels, d_padded / 4, kPanel, 4]
  const int32_t* sums;  // [F_padded] 128 * sum of the codes: what the unsigned coding of x adds to each score
  const float* bounds;  // [kBoundRows, F_padded]

  int64_t padded() const { return panels * kPanel; }
};

// One token ready to be screened.
struct ScreenedToken {
  float scale;    // s_x; 0 for padding
  float alpha;    // bound of ||x - x~||, rounding included
  float beta;     // bound of ||x~||
  bool screened;  // false: not finite, or too small or large for the bound; the exact path decides
};

struct ScreenKernels {
  // codes[d_padded] = unsigned 8-bit codes (code + 128) of the rotated row, and its norms. row is float64 [d]; scratch
  // float32 [d_padded]. `error` is the absolute rounding error of exact sums with this row, per unit of ||w||.
  ScreenedToken (*encode_token)(
      const double* row, int64_t d, int64_t d_padded, double error, float* scratch, uint8_t* codes);
  // Codes of one latent into its place in the panel layout, and its column of sums and bounds.
  void (*encode_latent)(
      const double* row, double bias, int64_t d, int64_t d_padded, float* scratch, int8_t* codes, int64_t stride_groups,
      int32_t* sum, float* bounds, int64_t ld_bounds);
  // Products of `tokens` <= kScreenTokens tokens (code rows d_padded apart) and one panel: int32 [tokens, kPanel].
  void (*products)(const uint8_t* x, int64_t tokens, const int8_t* panel, int64_t d_padded, int32_t* out);
  // The interval [score - bound, score + bound] of each latent of the panel, from one token's products.
  void (*intervals)(
      const int32_t* products, const ScreenedToken& token, const ScreenedWeights& weights, int64_t panel, float* score,
      float* bound);
  // The latents of the panel whose upper bound is not below limits[l * step] (step 0: one limit for all), and those
  // upper bounds; returns how many. Both arrays have room for kPanel. A NaN bound (infinite weights) counts as
  // infinite.
  int64_t (*hits)(
      const int32_t* products, const ScreenedToken& token, const ScreenedWeights& weights, int64_t panel,
      const float* limits, int64_t step, float* score, float* upper, int32_t* latent);
  // The nth largest of n values, 1 <= nth <= n, NaN smallest. scratch has room for 2 n + 32.
  float (*nth_largest)(const float* values, int64_t n, int64_t nth, float* scratch);
  // to[e] = from[e] * scale in float16; returns the norm of what that rounding removed, in units of `from`.
  double (*to_half)(const double* from, double scale, uint16_t* to, int64_t n);
  // to[e] = from[e], rounded to nearest
  void (*to_float)(const double* from, float* to, int64_t n);
  // out[r] = <w, rows[index[r]]> summed in float32 for n float16 rows [.., d], while `next` .. `next_end` is fetched.
  void (*half_dots)(
      const float* w, const uint16_t* rows, int64_t d, const int32_t* index, int64_t n, float* out, const char* next,
      const char* next_end);
};

// The sums of half_dots have at most this many roundings each, so that they are off by at most
// float_error(d) ||w|| ||row|| (Higham, Accuracy and Stability of Numerical Algorithms, 3.1), with room for a w that
// was rounded to float32 before.
inline double float_error(int64_t d) { return (static_cast<double>(d) / 16 + 16) * 0x1p-24 * 1.01; }

const ScreenKernels* screen_kernels();  // null where the instruction set has no 8-bit dot products

inline int64_t screen_padded(int64_t d) { return (d + kScreenAlign - 1) / kScreenAlign * kScreenAlign; }
inline int64_t screen_panels(int64_t n_latents) { return (n_latents + kPanel - 1) / kPanel; }

}  // namespace darkmatter
