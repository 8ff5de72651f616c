// prepare_encoder, prepare_rows: W_enc as contiguous rows [F, d], b_enc with b_dec folded in, in float64, groups and
// codes.
#include <atomic>
#include <bit>
#include <tuple>

#include "cpu/encoder.h"
#include "cpu/screen/certificate.h"
#include "registration.h"

namespace darkmatter::cpu {

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

// Codes and bounds of every place. The screen scores (x - b_dec) against w, so its bias is b_enc itself.
template <typename T>
static void encode_places(Packed& packed, const Tensor& b_enc) {
  const ScreenKernels& kernel = *screen_kernels();
  const int64_t d = packed.d(), n_places = packed.places.n_places, group = kernel.group;
  const int64_t d_padded = screen_padded(kernel, d), panels = screen_panels(n_places), padded = panels * kPanel;
  const int64_t latent_bytes = d_padded * kernel.weight_bytes;
  packed.codes = torch::stable::new_zeros(packed.weight, {codes_size(kernel, d, n_places)}, ScalarType::Char);
  packed.sums = torch::stable::new_zeros(packed.weight, {padded}, ScalarType::Int);
  packed.bounds = torch::stable::new_zeros(packed.weight, {kBoundRows, padded}, ScalarType::Float);
  parallel_ranges(ceil_div(n_places, group), 1, [&](int64_t begin, int64_t end) {
    std::vector<double> row(d);
    std::vector<float> scratch(d_padded);
    for (int64_t place = begin * group; place < std::min(end * group, n_places); ++place) {
      const int64_t j = packed.places.latent[place];
      kernels().of<T>().widen(data<T>(packed.weight) + j * d, row.data(), d);
      LatentTerms terms{0.0, 1.0, 0.0, 0.0};
      kernels().of<T>().widen(data<T>(b_enc) + j, &terms.bias, 1);
      if (packed.gain) {
        kernels().of<T>().widen(data<T>(*packed.gain) + j, &terms.gain, 1);
        terms.margin = kMargin<T>.relative;
        terms.tiny = kMargin<T>.absolute;
      }
      int8_t* first = mutable_data<int8_t>(*packed.codes) + place / group * group * latent_bytes + place % group * 4;
      kernel.encode_latent(
          row.data(), terms, d, d_padded, scratch.data(), first, 4 * group, mutable_data<int32_t>(*packed.sums) + place,
          mutable_data<float>(*packed.bounds) + place, padded);
    }
  });
}

// Inf times a gain is Inf (or NaN), whatever a bound says of the number that overflowed: the largest norm of a token
// for which none does, kept with the groups.
static void keep_reach(Packed& packed) {
  double reach = std::numeric_limits<double>::infinity();
  if (!packed.gain || !packed.codes) {
    return;
  }
  const int64_t padded = screen_panels(packed.places.n_places) * kPanel;
  const float* bounds = data<float>(*packed.bounds);
  dispatch_floating("gain", packed.gain->scalar_type(), [&](auto type) {
    using T = decltype(type);
    for (int64_t place = 0; place < packed.places.n_places; ++place) {
      const auto bound = [&](int row) { return bounds[row * padded + place]; };
      if (!std::isfinite(bound(kNorm) + bound(kRounding) + bound(kSlack))) {
        continue;  // never left out
      }
      const int64_t j = packed.places.latent[place];
      if (std::isinf(data<double>(packed.bias)[j])) {
        continue;  // switched off
      }
      const double norm = norm_before_gain(bound(kNorm), static_cast<double>(data<T>(*packed.gain)[j]));
      const double room = kMargin<T>.largest - std::fabs(data<double>(packed.bias)[j]);
      reach = std::min(reach, room / norm);
    }
  });
  const auto single = static_cast<float>(reach * (1 - 0x1p-20));  // rounded down
  mutable_data<int32_t>(packed.groups)[kReachAt] = std::bit_cast<int32_t>(single);
  packed.places.reach = single;
}

// All but the rows, which are there. `screen`: codes, and a look for equal latents, worth it for many tokens.
static void pack_terms(Packed& packed, const Tensor& b_enc, const OptionalTensor& b_dec, bool screen) {
  const int64_t n_latents = packed.n_latents();
  packed.bias = torch::stable::new_empty(packed.weight, {n_latents}, ScalarType::Double);
  const Tensor b_in = torch::stable::contiguous(b_enc);
  check_no_nan("b_enc", b_in, b_in);
  if (b_dec) {
    check_no_nan("b_dec", torch::stable::contiguous(*b_dec), *b_dec);
  }
  if (packed.gain) {
    check_no_nan("gain", *packed.gain, *packed.gain);
  }
  const std::vector<double> centre = wide_vector(b_dec);
  dispatch_floating("W_enc", packed.weight.scalar_type(), [&](auto type) {
    using T = decltype(type);
    fold_bias<T>(packed.weight, b_in, centre, mutable_data<double>(packed.bias));
    packed.groups = group_latents(packed.weight, data<double>(packed.bias), packed.gain, screen);
    packed.places = places_of(packed.groups, n_latents);
    if (screen) {
      encode_places<T>(packed, b_in);
    }
  });
  keep_reach(packed);
}

static Packed pack(
    const Tensor& W_enc, const Tensor& b_enc, const OptionalTensor& b_dec, const OptionalTensor& gain, bool screen) {
  check_encoder_weights(W_enc, b_enc, b_dec);
  check_gain(gain, W_enc);
  Packed packed;
  packed.weight = packed_rows(W_enc);
  packed.gain = contiguous_or_none(gain);
  pack_terms(packed, b_enc, b_dec, screen);
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
  return d >= kMinScreenD && d <= kMaxScreenD && n_latents >= kMinScreenLatents;
}

Packed packed_encoder(
    const Tensor& W_enc, const Tensor& b_enc, const OptionalTensor& b_dec, const PackedArguments& given,
    int64_t n_tokens) {
  const int64_t d = W_enc.size(0), n_latents = W_enc.size(1);
  if (!given.weight) {
    require(!given.bias && !given.codes, "weight: must be given with bias and codes, got them alone");
    // Whether torch multiplies in full precision only the caller can know, who prepares.
    const bool screen = can_screen(d, n_latents) && screen_kernels()->products != nullptr;
    return pack(W_enc, b_enc, b_dec, given.gain, screen && n_tokens >= kMinTokensToPack);
  }
  check_packed_rows(given, W_enc);
  require(given.groups.has_value(), "groups: must be given with weight, got weight alone");
  Packed packed;
  packed.weight = torch::stable::contiguous(*given.weight);
  packed.bias = torch::stable::contiguous(*given.bias);
  packed.gain = contiguous_or_none(given.gain);
  packed.groups = torch::stable::contiguous(*given.groups);
  packed.places = places_of(packed.groups, n_latents);
  if (given.codes && given.codes->numel() > 0 && can_screen(d, n_latents)) {
    require(given.sums && given.bounds, "sums, bounds: must be given with codes, got codes alone");
    const ScreenKernels& kernel = *screen_kernels();
    const int64_t padded = screen_panels(packed.places.n_places) * kPanel;
    check_vector("codes", *given.codes, codes_size(kernel, d, packed.places.n_places));
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

static void fill_absent(Packed& packed) {
  if (!packed.codes) {
    packed.codes = torch::stable::new_empty(packed.weight, {0}, ScalarType::Char);
    packed.sums = torch::stable::new_empty(packed.weight, {0}, ScalarType::Int);
    packed.bounds = torch::stable::new_empty(packed.weight, {kBoundRows, 0}, ScalarType::Float);
  }
}

// An op may not return a view of its input: a W_enc stored as [F, d] rows is copied for the caller who keeps it.
static std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> prepare_encoder(
    Tensor W_enc, Tensor b_enc, OptionalTensor b_dec, OptionalTensor gain) {
  check_dim("W_enc", W_enc, 2);
  Packed packed = pack(W_enc, b_enc, b_dec, gain, can_screen(W_enc.size(0), W_enc.size(1)));
  fill_absent(packed);
  const bool aliases = packed.weight.const_data_ptr() == W_enc.const_data_ptr();
  return {
      aliases ? torch::stable::clone(packed.weight) : packed.weight,
      packed.bias,
      *packed.codes,
      *packed.sums,
      *packed.bounds,
      packed.groups};
}

static std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> prepare_rows(
    Tensor rows, Tensor b_enc, OptionalTensor b_dec, OptionalTensor gain) {
  check_dim("rows", rows, 2);
  const Tensor W_enc = torch::stable::transpose(rows, 0, 1);
  check_encoder_weights(W_enc, b_enc, b_dec);
  check_gain(gain, W_enc);
  Packed packed;
  packed.weight = torch::stable::contiguous(rows);
  packed.gain = contiguous_or_none(gain);
  check_no_nan("rows", packed.weight, rows);
  pack_terms(packed, b_enc, b_dec, can_screen(rows.size(1), rows.size(0)));
  fill_absent(packed);
  return {packed.bias, *packed.codes, *packed.sums, *packed.bounds, packed.groups};
}

}  // namespace darkmatter::cpu

STABLE_TORCH_LIBRARY_IMPL(darkmatter, CPU, m) {
  m.impl("prepare_encoder", DARKMATTER_OP(&darkmatter::cpu::prepare_encoder));
  m.impl("prepare_rows", DARKMATTER_OP(&darkmatter::cpu::prepare_rows));
}
