// The inner loops of the CPU ops, behind raw pointers, one table an instruction set.
//
// All sums are in float64. A dot product adds into eight lanes (element e into lane e mod 8) and reduces them by one
// fixed tree. Products of two numbers of at most 24 bits are exact in float64, so for float32, bfloat16 and float16
// input the result is the same to the bit with or without fused multiply-add, on any instruction set, in any blocking.
// (For float64 input the last bit may depend on whether the machine fuses.)
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>
#include <tuple>
#include <type_traits>

namespace darkmatter::cpu {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;

constexpr int64_t kLanes = 8;

// The unsigned integer of a type's size, for its bits.
template <typename T>
using Word = std::conditional_t<sizeof(T) == 8, uint64_t, std::conditional_t<sizeof(T) == 4, uint32_t, uint16_t>>;

// Kernels on elements of one type.
template <typename T>
struct TypedKernels {
  // to[e] = from[e]
  void (*widen)(const T* from, double* to, int64_t n);
  // to[e] = from[e], rounded
  void (*round_row)(const double* from, T* to, int64_t n);
  // one dot product
  double (*dot)(const double* x, const T* w, int64_t d);
  // out[p] = <left[p], right[p]> for n pairs of rows [d]
  void (*pair_dots)(const T* const* left, const T* const* right, int64_t d, int64_t n, double* out);
  // out[a] = <x, rows[index[a]]> for a < count. `index` has `known` >= count entries: those beyond count will be wanted
  // next and are fetched ahead.
  void (*row_dots)(
      const double* x, const T* rows, int64_t d, const int64_t* index, int64_t count, int64_t known, double* out);
  // index[0 .. count) = the places of the nonzero elements, ascending; returns count
  int64_t (*nonzeros)(const T* row, int64_t n, int32_t* index);
  // sum[e] += factors[a] * rows[index[a], e] for a = 0 .. count - 1 in this order and e < d; rows lie ld_rows apart.
  // `known` as in row_dots.
  void (*weighted_sum)(
      const T* rows, int64_t ld_rows, int64_t d, const int64_t* index, const double* factors, int64_t count,
      int64_t known, double* sum);
  // out[e] = bias[e] + that sum, rounded once; `sum` [d] is room to work in. With narrow_factors, the same factors in
  // float32, bfloat16 is summed in float32 where that provably rounds to the same; returns how many columns did not.
  int64_t (*decode_row)(
      const T* rows, int64_t ld_rows, int64_t d, const int64_t* index, const double* factors,
      const float* narrow_factors, int64_t count, int64_t known, const T* bias, double* sum, T* out);
};

struct Kernels {
  // out[t * ld_out + l] = <x_t, w_l> for rows x [tokens, d_padded], w [latents, d_padded], zero beyond d; d_padded
  // and latents are multiples of kLanes. 64-byte aligned rows are twice as fast.
  void (*dots)(
      const double* x, int64_t tokens, const double* w, int64_t latents, int64_t d_padded, double* out, int64_t ld_out);
  std::tuple<TypedKernels<float>, TypedKernels<double>, TypedKernels<Half>, TypedKernels<BFloat16>> typed;

  template <typename T>
  const TypedKernels<T>& of() const {
    return std::get<TypedKernels<T>>(typed);
  }
};

const Kernels& kernels();  // of active_isa()

}  // namespace darkmatter::cpu
