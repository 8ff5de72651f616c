// Certified screening: which latents can be in the answer, decided in integers with a rigorous bound.
//
// x_i and w_j are rounded to x~ = s_x q_x, w~ = s_w q_w with integers q. Their integer dot product is exact, and
//   |<x, w> - <x~, w~>| <= ||x - x~|| ||w|| + ||x~|| ||w - w~||                                       (Cauchy-Schwarz)
// with all four norms *measured* in float64 and rounded outward, plus what floating-point rounding adds anywhere (of
// the scores, of the exact sums). Latent j can be left out when its score plus its bound is below a value that is
// certainly reached by the answer; everything else is rescored exactly, so the answer is that of the exact path to the
// bit.
//
// Three kinds of codes, by what the processor multiplies fastest:
//   bytes (byte_kernels.cpp)   8 bits, AVX-512 VNNI: vpdpbusd does 64 multiply-adds an instruction, four times what
//                              float32 does. The bound is wide, so a second stage (half_dots) cuts the candidates.
//                              With AMX (tile_kernels.cpp) the same codes are multiplied in tiles, eight times as fast.
//   words (word_kernels.cpp)   16 bits, everything else with AVX2: vpmaddwd does 16 (32) an instruction, up to twice
//                              what float32 does. The bound is so narrow that hardly more than the answer is left.
//   floats (float_kernels.cpp) elsewhere: float32 rows and the platform's BLAS through torch.
#pragma once

#include <cstdint>

#include "margins.h"

namespace darkmatter::cpu {

constexpr int64_t kScreenChunk = 256;  // tokens a task: each row of weights is read once for all of them
constexpr int64_t kPanel = 48;         // places a panel
constexpr int64_t kMaxScreenTokens = kScreenChunk;
constexpr int64_t kMaxScreenD = 32768;  // sums of products of codes stay below 2^31 (each kind says why)

// Below these sizes screening costs more than it saves.
constexpr int64_t kMinScreenD = 32;
constexpr int64_t kMinScreenLatents = 256;
constexpr int64_t kMinTokensToPack = 64;  // in a call with unpacked weights: rounding W_enc costs about 20 tokens' work

// The weights of the screened places (cpu/screen/places.h), ready for a kind of codes.
struct ScreenedWeights {
  int64_t n_places, d, d_padded, panels;
  const int8_t* codes;  // panels of codes, laid out as the kernels want them
  const int32_t* sums;  // [padded] what the coding of x adds to each product
  const float* bounds;  // [kBoundRows, padded]
  double reach;         // the largest ||x|| for which no pre-activation overflows before its gain

  int64_t padded() const { return panels * kPanel; }
};

// One token ready to be screened.
struct ScreenedToken {
  float scale;    // s_x; 0 for padding
  float alpha;    // bound of ||x - x~||, rounding included
  float beta;     // bound of ||x~||
  bool screened;  // false: not finite, or too small or large for the bound; the exact path decides
};

// What is known of a latent besides its row.
struct LatentTerms {
  double bias;    // b_enc: the screen scores (x - b_dec) against w
  double gain;    // what the rounded pre-activation is multiplied with, 1 for none
  double margin;  // relative error of the rounding before that multiplication, 0 where there is no gain
  double tiny;    // its absolute error, of subnormal numbers
};

struct ScreenKernels {
  int64_t tokens;        // of a tile, at most kMaxScreenTokens where there are products
  int64_t code_bytes;    // of one code of a token
  int64_t weight_bytes;  // of one code of a latent; 0: the rows themselves are multiplied
  int64_t align;         // d is padded to a multiple of this
  int64_t group;         // latents whose codes are interleaved, four bytes of each in turn; divides kPanel
  bool refines;          // whether the bound is so wide that half_dots pays

  // Codes of the row (float64 [d]) of a token, d_padded of them, and its norms. scratch: float32 [d_padded]. `error` is
  // the absolute rounding error of exact sums with this row, per unit of ||w||.
  ScreenedToken (*encode_token)(
      const double* row, int64_t d, int64_t d_padded, double error, float* scratch, void* codes);
  // Codes of one latent into its place (`first`: its first four bytes, the next `stride` bytes on), and its column of
  // sums and bounds.
  void (*encode_latent)(
      const double* row, const LatentTerms& terms, int64_t d, int64_t d_padded, float* scratch, int8_t* first,
      int64_t stride, int32_t* sum, float* bounds, int64_t ld_bounds);
  // Products of `some` <= tokens tokens (code rows d_padded codes apart) and one panel: int32 [some, kPanel].
  // Null where rows are multiplied by torch.
  void (*products)(const void* x, int64_t some, const int8_t* panel, int64_t d_padded, int32_t* out);
  // The interval [score - bound, score + bound] of each place of the panel, from one token's products: see lower_end.
  void (*intervals)(
      const int32_t* products, const ScreenedToken& token, const ScreenedWeights& weights, int64_t panel, float* score,
      float* bound);
  // The places of the panel whose upper bound is not below limits[l * step] (step 0: one limit for all), and those
  // upper bounds; returns how many. All arrays have room for kPanel. A NaN bound counts as infinite.
  int64_t (*hits)(
      const int32_t* products, const ScreenedToken& token, const ScreenedWeights& weights, int64_t panel,
      const float* limits, int64_t step, float* score, float* upper, int32_t* place);
  // The nth largest of n values, 1 <= nth <= n, NaN smallest. scratch has room for 2 n + 32.
  float (*nth_largest)(const float* values, int64_t n, int64_t nth, float* scratch);

  // The rest only where `refines`.
  // to[e] = from[e] * scale in float16; returns the norm of what that rounding removed, in units of `from`.
  double (*to_half)(const double* from, double scale, uint16_t* to, int64_t n);
  // to[e] = from[e], rounded to nearest
  void (*to_float)(const double* from, float* to, int64_t n);
  // out[r] = <w, rows[index[r]]> summed in float32 for n float16 rows [.., d], while `next` .. `next_end` is fetched.
  void (*half_dots)(
      const float* w, const uint16_t* rows, int64_t d, const int32_t* index, int64_t n, float* out, const char* next,
      const char* next_end);

  int64_t at_once = 0;  // tokens that a call of products takes, if more than `tokens`

  // What a thread does before its first and after its last products, or null: registers that others use too.
  void (*enter)() = nullptr;
  void (*leave)() = nullptr;
};

// The sums of half_dots have at most this many roundings each, so that they are off by at most
// float_error(d) ||w|| ||row|| (Higham, Accuracy and Stability of Numerical Algorithms, 3.1), with room for a w that
// was rounded to float32 before.
inline double float_error(int64_t d) { return (static_cast<double>(d) / 16 + 16) * 0x1p-24 * 1.01; }

// Unit roundoff of float32 with room for products of (1 + u): every bound is inflated by whole multiples of it.
constexpr double kUnit = 0x1p-24;
constexpr double kOutward = 1 + 0x1p-20;  // float64 norms -> float32 bounds, and the float32 arithmetic on the bounds
constexpr double kTinyNorm = 1e-34;       // absolute errors of subnormal weights (flushed to zero or not) in norms
constexpr float kTinyBound = 1e-36f;      // keeps the bounds themselves out of float32's subnormal numbers
constexpr double kSmallestScale = 1.2e-38, kLargestBias = 1e38;  // what float32 holds with its full precision

// What rounding a row to codes did to it.
struct RoundedRow {
  float scale;
  double norm, code_norm, rounding;  // ||v||, ||v~||, ||v - v~||, of the row as it was rounded
};

inline double size_of(double value) { return value < 0 ? -value : value; }

// The column of bounds of a latent: `norm` bounds ||w||, `rounding` ||w - w~||.
inline void store_bounds(
    const RoundedRow& row, double norm, double rounding, const LatentTerms& terms, float* bounds, int64_t ld) {
  // A bias of -Inf switches a latent off: its score is -Inf, and nothing is lost of it.
  const bool off = terms.bias < -1.7e308 && terms.gain > 0;
  const double gain = terms.gain, size = size_of(gain), bias = off ? 0.0 : size_of(terms.bias);
  // A scale that float32 rounds by more than its unit is none: then all of the codes is lost.
  const bool scaled = row.scale * size >= kSmallestScale;
  const double lost = rounding + (scaled ? 8 * kUnit : 1.0) * row.code_norm;
  bounds[kScale * ld] = scaled ? static_cast<float>(row.scale * gain) : 0.0f;
  bounds[kBias * ld] = static_cast<float>(terms.bias * gain);
  // The rounding before the gain is off by margin |<x, w> + bias|, and ||x|| is at most alpha + beta. A gain of 0 keeps
  // the norm itself, for norm_before_gain.
  bounds[kNorm * ld] = static_cast<float>(norm * (1 + terms.margin) * (size > 0 ? size : 1) * kOutward) + kTinyBound;
  // The float32 score s_x s_w acc + bias is off by at most 8 units of its terms: into the slopes and the constant.
  bounds[kRounding * ld] = static_cast<float>((lost + terms.margin * norm) * size * kOutward) + kTinyBound;
  bounds[kSlack * ld] =
      bias * size < kLargestBias
          ? static_cast<float>(((10 * kUnit + terms.margin) * bias + terms.tiny) * size * kOutward) + 1e-35f
          : __builtin_inff();
}

// A bound of ||w|| from the kNorm of a latent.
inline double norm_before_gain(float norm, double gain) { return gain == 0 ? norm : norm / size_of(gain); }

// The ends of an interval. A score that overflowed is known to lie beyond the largest float32, no more.
constexpr float kLargestScore = 0x1.fffffep127f;
inline float lower_end(float score, float bound) { return (score > kLargestScore ? kLargestScore : score) - bound; }
inline float upper_end(float score, float bound) { return (score < -kLargestScore ? -kLargestScore : score) + bound; }

const ScreenKernels* screen_kernels();  // of active_isa()
const ScreenKernels* byte_kernels();    // AVX-512 VNNI; null where they are not compiled
const ScreenKernels* tile_kernels();    // AMX; null where they are not compiled
const ScreenKernels* word_kernels();    // of active_isa(), AVX2 at least; null below
const ScreenKernels* float_kernels();

inline int64_t screen_padded(const ScreenKernels& kernels, int64_t d) {
  return (d + kernels.align - 1) / kernels.align * kernels.align;
}
inline int64_t screen_panels(int64_t n_places) { return (n_places + kPanel - 1) / kPanel; }

// Bytes of all codes, and a few unused ones by whose number another layout is refused: that of another machine. One
// byte where there are no codes, as a sign that there are bounds.
inline int64_t codes_size(const ScreenKernels& kernels, int64_t d, int64_t n_places) {
  const int64_t codes = screen_panels(n_places) * kPanel * screen_padded(kernels, d);
  return kernels.weight_bytes == 0 ? 1 : (codes + kernels.group) * kernels.weight_bytes;
}

}  // namespace darkmatter::cpu
