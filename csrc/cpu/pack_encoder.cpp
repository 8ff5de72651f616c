// pack_encoder: W_enc as contiguous rows [F, d], and b_enc with b_dec folded in, in float64.
#include <torch/csrc/stable/library.h>

#include <atomic>
#include <tuple>

#include "cpu/encoder.h"
#include "cpu/screen.h"

namespace darkmatter {

// Below these sizes screening costs more than it saves.
constexpr int64_t kMinScreenD = 32;
constexpr int64_t kMinScreenLatents = 256;
constexpr int64_t kMinTokensToPack = 64;  // in a call with unpacked weights: rounding W_enc costs about 20 tokens' work

// NaN weights would turn into NaN latents that win every top-k: refused here, once, in the pass that packs.
static void check_no_nan(const char* name, const Tensor& tensor, const Tensor& given) {
  dispatch_floating(name, tensor.scalar_type(), [&](auto type) {
    using T = decltype(type);
    const T* values = data<T>(tensor);
    std::atomic<bool> found{false};
    parallel_ranges(tensor.numel(), 1 << 16, [&](int64_t begin, int64_t end) {
      bool nan = false;
      for (int64_t e = begin; e < end; ++e) {
        nan |= values[e] != values[e];
      }
      if (nan) {
        found = true;
      }
    });
    require(!found, name, ": must not contain NaN, got shape ", shape_of(given), " with NaN");
  });
}

// W_enc [d, F] of contiguous rows as rows [F, d], in tiles: whole cache lines are read and written, and a block of
// latents keeps few enough pages in use. (torch's copy of a transposed matrix takes about twice the time.)
template <typename T>
static bool transpose_tiles(const T* from, int64_t row_stride, T* to, int64_t d, int64_t n_latents) {
  constexpr int64_t kTile = 16, kLatents = 64;
  std::atomic<bool> found_nan{false};
  parallel_ranges(ceil_div(n_latents, kLatents), 1, [&](int64_t begin, int64_t end) {
    bool nan = false;
    const int64_t last = std::min(end * kLatents, n_latents);
    for (int64_t block = begin * kLatents; block < last; block += kLatents) {
      for (int64_t i = 0; i < d; i += kTile) {
        const int64_t rows = std::min(kTile, d - i);
        for (int64_t j = block; j < std::min(block + kLatents, last); j += kTile) {
          const int64_t columns = std::min(kTile, last - j);
          T tile[kTile][kTile];  // rows of W_enc lie whole pages apart and would evict each other if read in turns
          for (int64_t r = 0; r < rows; ++r) {
            const T* row = from + (i + r) * row_stride + j;
            __builtin_prefetch(i + kTile + r < d ? row + kTile * row_stride : row);  // too far apart for the hardware's
            std::copy_n(row, columns, tile[r]);
          }
          for (int64_t c = 0; c < columns; ++c) {
            for (int64_t r = 0; r < rows; ++r) {
              nan |= tile[r][c] != tile[r][c];
              to[(j + c) * d + i + r] = tile[r][c];
            }
          }
        }
      }
    }
    if (nan) {
      found_nan = true;
    }
  });
  return found_nan;
}

// Contiguous rows [F, d] of W_enc [d, F], refusing NaN.
static Tensor packed_rows(const Tensor& W_enc) {
  const int64_t d = W_enc.size(0), n_latents = W_enc.size(1);
  if (W_enc.stride(1) != 1 || W_enc.stride(0) < n_latents) {
    const Tensor weight = torch::stable::contiguous(torch::stable::transpose(W_enc, 0, 1));
    check_no_nan("W_enc", weight, W_enc);
    return weight;
  }
  Tensor weight = torch::stable::new_empty(W_enc, {n_latents, d});
  dispatch_floating("W_enc", W_enc.scalar_type(), [&](auto type) {
    using T = decltype(type);
    const bool nan = transpose_tiles<T>(data<T>(W_enc), W_enc.stride(0), mutable_data<T>(weight), d, n_latents);
    require(!nan, "W_enc: must not contain NaN, got shape ", shape_of(W_enc), " with NaN");
  });
  return weight;
}

// b_enc - <b_dec, w_j> in float64.
template <typename T>
static void fold_bias(const Tensor& weight, const Tensor& b_enc, const std::vector<double>& centre, double* folded) {
  const int64_t n_latents = weight.size(0), d = weight.size(1);
  const TypedKernels<T>& kernel = kernels().of<T>();
  kernel.widen(data<T>(b_enc), folded, n_latents);
  if (!centre.empty()) {
    parallel_ranges(n_latents, 256, [&](int64_t begin, int64_t end) {
      for (int64_t j = begin; j < end; ++j) {
        folded[j] -= kernel.dot(centre.data(), data<T>(weight) + j * d, d);
      }
    });
  }
}

// Codes and bounds of every latent. The screen scores (x - b_dec) against w, so its bias is b_enc itself.
template <typename T>
static void encode_latents(Packed& packed, const Tensor& b_enc) {
  const int64_t n_latents = packed.weight.size(0), d = packed.weight.size(1);
  const int64_t d_padded = screen_padded(d), panels = screen_panels(n_latents), padded = panels * kPanel;
  packed.codes = torch::stable::new_zeros(packed.weight, {panels * d_padded * kPanel}, ScalarType::Char);
  packed.sums = torch::stable::new_zeros(packed.weight, {padded}, ScalarType::Int);
  packed.bounds = torch::stable::new_zeros(packed.weight, {kBoundRows, padded}, ScalarType::Float);
  parallel_ranges(panels, 1, [&](int64_t begin, int64_t end) {
    std::vector<double> row(d);
    std::vector<float> scratch(d_padded);
    for (int64_t j = begin * kPanel; j < std::min(end * kPanel, n_latents); ++j) {
      kernels().of<T>().widen(data<T>(packed.weight) + j * d, row.data(), d);
      int8_t* codes = mutable_data<int8_t>(*packed.codes) + j / kPanel * d_padded * kPanel + j % kPanel * 4;
      double bias;
      kernels().of<T>().widen(data<T>(b_enc) + j, &bias, 1);
      screen_kernels()->encode_latent(
          row.data(), bias, d, d_padded, scratch.data(), codes, 4 * kPanel, mutable_data<int32_t>(*packed.sums) + j,
          mutable_data<float>(*packed.bounds) + j, padded);
    }
  });
}

static Packed pack(const Tensor& W_enc, const Tensor& b_enc, const OptionalTensor& b_dec, bool screen) {
  check_encoder_weights(W_enc, b_enc, b_dec);
  const int64_t n_latents = W_enc.size(1);
  if (b_dec) {
    check_no_nan("b_dec", torch::stable::contiguous(*b_dec), *b_dec);
  }
  Packed packed{packed_rows(W_enc), {}, {}, {}, {}};
  packed.bias = torch::stable::new_empty(packed.weight, {n_latents}, ScalarType::Double);
  const Tensor b_in = torch::stable::contiguous(b_enc);
  check_no_nan("b_enc", b_in, b_in);
  const std::vector<double> centre = wide_vector(b_dec);
  dispatch_floating("W_enc", W_enc.scalar_type(), [&](auto type) {
    using T = decltype(type);
    fold_bias<T>(packed.weight, b_in, centre, mutable_data<double>(packed.bias));
    if (screen) {
      encode_latents<T>(packed, b_in);
    }
  });
  return packed;
}

std::vector<double> wide_vector(const OptionalTensor& tensor) {
  std::vector<double> wide;
  if (tensor) {
    const Tensor own = torch::stable::contiguous(*tensor);
    wide.resize(own.numel());
    dispatch_floating("b_dec", own.scalar_type(), [&](auto type) {
      using T = decltype(type);
      kernels().of<T>().widen(data<T>(own), wide.data(), own.numel());
    });
  }
  return wide;
}

static bool can_screen(int64_t d, int64_t n_latents) {
  return screen_kernels() != nullptr && d >= kMinScreenD && d <= kMaxScreenD && n_latents >= kMinScreenLatents;
}

Packed packed_encoder(
    const Tensor& W_enc, const Tensor& b_enc, const OptionalTensor& b_dec, const PackedArguments& given,
    int64_t n_tokens) {
  const int64_t d = W_enc.size(0), n_latents = W_enc.size(1);
  if (!given.weight) {
    require(!given.bias && !given.codes, "weight: must be given with bias and codes, got them alone");
    return pack(W_enc, b_enc, b_dec, can_screen(d, n_latents) && n_tokens >= kMinTokensToPack);
  }
  check_packed_rows(given, W_enc);
  Packed packed{torch::stable::contiguous(*given.weight), torch::stable::contiguous(*given.bias), {}, {}, {}};
  if (given.codes && given.codes->numel() > 0 && can_screen(d, n_latents)) {
    require(given.sums && given.bounds, "sums, bounds: must be given with codes, got codes alone");
    const int64_t padded = screen_panels(n_latents) * kPanel;
    check_vector("codes", *given.codes, padded * screen_padded(d));
    check_type("codes", *given.codes, ScalarType::Char);
    check_vector("sums", *given.sums, padded);
    check_type("sums", *given.sums, ScalarType::Int);
    check_dim("bounds", *given.bounds, 2);
    check_size("bounds", *given.bounds, 0, kBoundRows);
    check_size("bounds", *given.bounds, 1, padded);
    check_type("bounds", *given.bounds, ScalarType::Float);
    packed.codes = torch::stable::contiguous(*given.codes);
    packed.sums = torch::stable::contiguous(*given.sums);
    packed.bounds = torch::stable::contiguous(*given.bounds);
  }
  return packed;
}

// An op may not return a view of its input: a W_enc stored as [F, d] rows is copied for the caller who keeps it.
static std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> pack_encoder(
    Tensor W_enc, Tensor b_enc, OptionalTensor b_dec) {
  check_dim("W_enc", W_enc, 2);
  Packed packed = pack(W_enc, b_enc, b_dec, can_screen(W_enc.size(0), W_enc.size(1)));
  const bool aliases = packed.weight.const_data_ptr() == W_enc.const_data_ptr();
  if (!packed.codes) {
    packed.codes = torch::stable::new_empty(packed.weight, {0}, ScalarType::Char);
    packed.sums = torch::stable::new_empty(packed.weight, {0}, ScalarType::Int);
    packed.bounds = torch::stable::new_empty(packed.weight, {kBoundRows, 0}, ScalarType::Float);
  }
  return {
      aliases ? torch::stable::clone(packed.weight) : packed.weight, packed.bias, *packed.codes, *packed.sums,
      *packed.bounds};
}

}  // namespace darkmatter

STABLE_TORCH_LIBRARY_IMPL(darkmatter, CPU, m) { m.impl("pack_encoder", TORCH_BOX(&darkmatter::pack_encoder)); }
