// prepare_encoder on CUDA: W_enc as contiguous rows [F, d], b_enc with b_dec folded in, float16 codes and their bounds.
#include <tuple>
#include <type_traits>

#include "cuda/encoder.h"
#include "cuda/kernels/prepare_encoder.cuh"
#include "cuda/kernels/transpose.cuh"

namespace darkmatter::cuda {

// NaN among the arguments, counted on the device and read at once: the host waits, which is why only prepare_encoder
// looks for NaN, and not every call that packs for itself.
class NanCounts {
 public:
  enum Argument { kWeight, kBias, kCentre, kArguments };

  explicit NanCounts(const Tensor& like) : counts_(torch::stable::new_zeros(like, {kArguments}, ScalarType::Long)) {}

  unsigned long long* of(Argument argument) const { return mutable_data<unsigned long long>(counts_) + argument; }

  void add(const OnDevice& device, Argument argument, const Tensor& tensor) const {
    const int64_t n = tensor.numel();
    if (n == 0) {
      return;
    }
    const auto blocks = static_cast<unsigned>(std::min<int64_t>(ceil_div(n, kThreads), 8 * device.multiprocessors));
    dispatch_floating("tensor", tensor.scalar_type(), [&](auto type) {
      using T = decltype(type);
      device.launch(find_nan_kernel<T>, dim3(blocks), kThreads, 0, data<T>(tensor), n, of(argument));
    });
  }

  void check(const OnDevice& device, const Tensor& W_enc, const Tensor& b_enc, const OptionalTensor& b_dec) const {
    int64_t counts[kArguments];
    const int64_t* found = data<int64_t>(counts_);
    device.read({{found, &counts[0]}, {found + 1, &counts[1]}, {found + 2, &counts[2]}});
    const auto refuse_nan = [&](Argument argument, const char* name, const Tensor& given) {
      require(counts[argument] == 0, name, ": must not contain NaN, got shape ", shape_of(given), " with NaN");
    };
    refuse_nan(kWeight, "W_enc", W_enc);
    refuse_nan(kBias, "b_enc", b_enc);
    if (b_dec) {
      refuse_nan(kCentre, "b_dec", *b_dec);
    }
  }

 private:
  Tensor counts_;
};

static void make_codes(const OnDevice& device, Packed& packed, const Tensor& b_enc, unsigned long long* n_nan) {
  const int64_t n = packed.weight.size(0), d = packed.weight.size(1), d_padded = screen_padded(d);
  packed.codes = torch::stable::new_empty(packed.weight, {n, d_padded}, ScalarType::Half);
  packed.bounds = torch::stable::new_empty(packed.weight, {kBoundRows, n}, ScalarType::Float);
  dispatch_floating("weight", packed.weight.scalar_type(), [&](auto type) {
    using T = decltype(type);
    device.launch(
        round_latents_kernel<T>, dim3(static_cast<unsigned>(ceil_div(n, kWarps))), kThreads, 0, data<T>(packed.weight),
        data<T>(b_enc), n, d, d_padded, mutable_data<__half>(*packed.codes), mutable_data<float>(*packed.bounds),
        n_nan);
  });
}

template <typename T>
static void launch_transpose(const OnDevice& device, const Tensor& from, const Tensor& to) {
  const int64_t n_rows = from.size(0), n_columns = from.size(1), ld = from.stride(0);
  constexpr int kWidest = kPacketBytes / sizeof(T);
  const auto addresses =
      reinterpret_cast<uintptr_t>(from.const_data_ptr()) | reinterpret_cast<uintptr_t>(to.const_data_ptr());
  const bool aligned = (n_rows | n_columns | ld) % kWidest == 0 && addresses % kPacketBytes == 0;
  const dim3 grid(static_cast<unsigned>(ceil_div(n_columns, kSide)), static_cast<unsigned>(ceil_div(n_rows, kSide)));
  device.launch(
      aligned ? transpose_kernel<T, kWidest> : transpose_kernel<T, 1>, grid, kThreads, kSide * kTileRow * sizeof(T),
      data<T>(from), ld, n_rows, n_columns, mutable_data<T>(to));
}

// Contiguous rows [F, d] of W_enc [d, F]: W_enc's own memory where it is stored so, else a copy.
static Tensor rows_of(const OnDevice& device, const Tensor& W_enc) {
  const int64_t d = W_enc.size(0), n = W_enc.size(1);
  const Tensor rows = torch::stable::transpose(W_enc, 0, 1);
  if (rows.is_contiguous() || W_enc.stride(1) != 1 || W_enc.numel() == 0 || d > kMostRows) {
    return torch::stable::contiguous(rows);
  }
  Tensor out = torch::stable::new_empty(W_enc, {n, d});
  dispatch_floating("W_enc", W_enc.scalar_type(), [&](auto type) {
    using Bits =
        std::conditional_t<sizeof(type) == 2, uint16_t, std::conditional_t<sizeof(type) == 4, uint32_t, uint64_t>>;
    launch_transpose<Bits>(device, W_enc, out);
  });
  return out;
}

// Counts NaN of W_enc and b_enc, and of b_dec, where `nan` is given.
static Packed pack(
    const OnDevice& device, const Tensor& W_enc, const Tensor& b_enc, const OptionalTensor& b_dec, bool screen,
    const NanCounts* nan = nullptr) {
  Packed packed{rows_of(device, W_enc), {}, {}, {}};
  const int64_t n = packed.weight.size(0), d = packed.weight.size(1);
  packed.bias = torch::stable::new_empty(packed.weight, {n}, ScalarType::Double);
  const Tensor own_bias = torch::stable::contiguous(b_enc);
  const OptionalTensor centre = contiguous_or_none(b_dec);
  if (n > 0) {
    dispatch_floating("W_enc", W_enc.scalar_type(), [&](auto type) {
      using T = decltype(type);
      device.launch(
          fold_bias_kernel<T>, dim3(static_cast<unsigned>(ceil_div(n, kGroups))), kThreads, 0, data<T>(packed.weight),
          data<T>(own_bias), data<T>(centre), n, d, mutable_data<double>(packed.bias));
    });
  }
  if (screen) {
    make_codes(device, packed, own_bias, nan != nullptr ? nan->of(NanCounts::kWeight) : nullptr);
  }
  if (nan != nullptr) {
    if (!screen) {
      nan->add(device, NanCounts::kWeight, packed.weight);
    }
    nan->add(device, NanCounts::kBias, own_bias);
    if (centre) {
      nan->add(device, NanCounts::kCentre, *centre);
    }
  }
  return packed;
}

static void refuse_gain(const OptionalTensor& gain) {
  require(!gain, "gain: must be None on CUDA, which has no kernel for it, got a tensor");
}

void check_codes(const Tensor& codes, const Tensor& bounds, int64_t d, int64_t n_latents) {
  check_dim("codes", codes, 2);
  check_size("codes", codes, 0, n_latents);
  check_size("codes", codes, 1, screen_padded(d));
  check_type("codes", codes, ScalarType::Half);
  check_dim("bounds", bounds, 2);
  check_size("bounds", bounds, 0, kBoundRows);
  check_size("bounds", bounds, 1, n_latents);
  check_type("bounds", bounds, ScalarType::Float);
}

Packed packed_encoder(
    const OnDevice& device, const Tensor& W_enc, const Tensor& b_enc, const OptionalTensor& b_dec,
    const PackedArguments& given, bool screen) {
  refuse_gain(given.gain);
  if (!given.weight) {
    require(!given.bias && !given.codes, "weight: must be given with bias and codes, got them alone");
    check_encoder_weights(W_enc, b_enc, b_dec);
    return pack(device, W_enc, b_enc, b_dec, screen);
  }
  check_packed_rows(given, W_enc);
  Packed packed{torch::stable::contiguous(*given.weight), torch::stable::contiguous(*given.bias), {}, {}};
  if (screen && given.codes && given.codes->numel() > 0) {
    require(given.bounds.has_value(), "bounds: must be given with codes, got codes alone");
    check_codes(*given.codes, *given.bounds, W_enc.size(0), W_enc.size(1));
    packed.codes = torch::stable::contiguous(*given.codes);
    packed.bounds = torch::stable::contiguous(*given.bounds);
  }
  return packed;
}

// An op may not return a view of its input: a W_enc stored as [F, d] rows is copied for the caller who keeps it.
static std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> prepare_encoder(
    Tensor W_enc, Tensor b_enc, OptionalTensor b_dec, OptionalTensor gain) {
  refuse_gain(gain);
  check_encoder_weights(W_enc, b_enc, b_dec);
  const OnDevice device(W_enc);
  const NanCounts nan(W_enc);
  Packed packed = pack(device, W_enc, b_enc, b_dec, has_codes(W_enc.size(0), W_enc.size(1)), &nan);
  nan.check(device, W_enc, b_enc, b_dec);
  if (!packed.codes) {
    packed.codes = torch::stable::new_empty(packed.weight, {0, screen_padded(W_enc.size(0))}, ScalarType::Half);
    packed.bounds = torch::stable::new_empty(packed.weight, {kBoundRows, 0}, ScalarType::Float);
  }
  const bool aliases = packed.weight.const_data_ptr() == W_enc.const_data_ptr();
  const auto none = [&] { return torch::stable::new_empty(packed.weight, {0}, ScalarType::Int); };
  return {
      aliases ? torch::stable::clone(packed.weight) : packed.weight,
      packed.bias,
      *packed.codes,
      none(),
      *packed.bounds,
      none()};
}

}  // namespace darkmatter::cuda

STABLE_TORCH_LIBRARY_IMPL(darkmatter, CUDA, m) {
  m.impl("prepare_encoder", DARKMATTER_OP(&darkmatter::cuda::prepare_encoder));
}
