// find_support on CUDA. The number of nonzero entries decides the shape of the result, so the op waits for the device
// once, as torch.nonzero does. With a capacity (find_support_fixed) the shape is known, and nothing waits.
#include "cuda/kernels/find_support.cuh"

#include <tuple>

#include "cuda/kernels/dispatch.h"

namespace darkmatter::cuda {

template <typename T, int kWidth>
static std::tuple<Tensor, Tensor> support(const OnDevice& device, const Tensor& acts) {
  const int64_t n_tokens = acts.size(0), n_latents = acts.size(1);
  Tensor counts = torch::stable::new_empty(acts, {n_tokens * kWarps}, ScalarType::Long);
  const dim3 grid(static_cast<unsigned>(n_tokens));
  device.launch(
      count_support_kernel<T, kWidth>, grid, kThreads, 0, data<T>(acts), n_latents, mutable_data<int64_t>(counts));
  const Tensor up_to = prefix_sums(counts);
  Tensor crow = torch::stable::new_zeros(acts, {n_tokens + 1}, ScalarType::Long);
  Tensor rest = torch::stable::narrow(crow, 0, 1, n_tokens);
  Tensor by_warp = torch::stable::view(up_to, {n_tokens, kWarps});
  torch::stable::copy_(rest, torch::stable::select(by_warp, 1, kWarps - 1));
  int64_t n_active = 0;
  device.read({{data<int64_t>(crow) + n_tokens, &n_active}});
  Tensor col = torch::stable::new_empty(acts, {n_active}, ScalarType::Long);
  if (n_active > 0) {
    device.launch(
        write_support_kernel<T, kWidth>, grid, kThreads, 0, data<T>(acts), n_latents, data<int64_t>(up_to),
        data<int64_t>(counts), mutable_data<int64_t>(col));
  }
  return {crow, col};
}

// Calls body(T{}, elements that a thread reads at once).
template <typename Body>
static auto with_type_and_width(const Tensor& rows, const Body& body) {
  return dispatch_floating("acts", rows.scalar_type(), [&](auto type) {
    constexpr int kWidth = 16 / sizeof(type);
    const auto address = reinterpret_cast<uintptr_t>(rows.const_data_ptr());
    return rows.size(1) % kWidth == 0 && address % 16 == 0 ? body(type, std::integral_constant<int, kWidth>())
                                                           : body(type, std::integral_constant<int, 1>());
  });
}

static std::tuple<Tensor, Tensor> find_support(Tensor acts) {
  check_dim("acts", acts, 2);
  check_floating("acts", acts);
  const OnDevice device(acts);
  if (acts.numel() == 0) {
    return {
        torch::stable::new_zeros(acts, {acts.size(0) + 1}, ScalarType::Long),
        torch::stable::new_empty(acts, {0}, ScalarType::Long)};
  }
  const Tensor rows = torch::stable::contiguous(acts);
  return with_type_and_width(
      rows, [&](auto type, auto width) { return support<decltype(type), width.value>(device, rows); });
}

static std::tuple<Tensor, Tensor> find_support_fixed(Tensor acts, int64_t capacity) {
  check_dim("acts", acts, 2);
  check_floating("acts", acts);
  check_capacity(capacity, acts.size(1));
  const OnDevice device(acts);
  Tensor indices = torch::stable::new_empty(acts, {acts.size(0), capacity}, ScalarType::Long);
  Tensor found = torch::stable::new_zeros(acts, {acts.size(0)}, ScalarType::Long);
  if (acts.numel() > 0) {
    const Tensor rows = torch::stable::contiguous(acts);
    Arena arena{nullptr};
    arena.take<int>(kWarps);
    with_type_and_width(rows, [&](auto type, auto width) {
      using T = decltype(type);
      device.launch(
          support_rows_kernel<T, width.value>, dim3(static_cast<unsigned>(rows.size(0))), kThreads, arena.used,
          data<T>(rows), rows.size(1), capacity, mutable_data<int64_t>(indices), mutable_data<int64_t>(found));
    });
  }
  return {indices, found};
}

}  // namespace darkmatter::cuda

STABLE_TORCH_LIBRARY_IMPL(darkmatter, CUDA, m) {
  m.impl("find_support", DARKMATTER_OP(&darkmatter::cuda::find_support));
  m.impl("find_support_fixed", DARKMATTER_OP(&darkmatter::cuda::find_support_fixed));
}
