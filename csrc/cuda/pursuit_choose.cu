// pursuit_choose on CUDA: the screen of topk_encode with k 1, then float64 products. Nothing waits for the device.
#include "cuda/encoder.h"
#include "cuda/screen/choose.cuh"
#include "cuda/screen/filter_topk.cuh"

namespace darkmatter::cuda {

constexpr int kBestOnly = 1;  // k

struct ChooseArguments {
  const Tensor &residual, &noise, &choice;
  const Packed& packed;  // the dictionary; no bias
  TokenRules rules;
};

template <typename W>
static ExactProducts<double, W> products_of(const ChooseArguments& of) {
  return {data<double>(of.residual), data<W>(of.packed.weight), nullptr, of.residual.size(1), of.packed.weight.size(0)};
}

// Screens all tokens, and chooses for those that screening helps. Returns who is left.
template <typename W>
static Tensor choose_by_screen(const OnDevice& device, const ChooseArguments& of) {
  ScreenPass pass(
      device, of.residual, std::nullopt, of.packed, kBestOnly, FusedQuestion{kBestOnly, kWideMargin, {nullptr, 0}},
      of.rules);
  Arena arena{nullptr};
  arena.take<double>(kList);
  arena.take<int32_t>(kList);
  arena.take<ChooseShared>(1);
  pass.run<double>(
      of.residual,
      [&](const ScoreChunk& chunk, const ScreenedLatents& latents, const ScreenedTokens& tokens,
          const CandidateLists& lists, dim3 grid) {
        device.launch(
            filter_topk_kernel<kList>, grid, kThreads, sizeof(FilterShared), chunk, latents, tokens, lists, kBestOnly,
            kWideMargin);
      },
      [&](int64_t first, int64_t n, const ScreenedTokens& tokens, const CandidateLists& lists) {
        ExactProducts<double, W> tile = products_of<W>(of);
        tile.x += first * tile.d;
        device.launch(
            finish_choice_kernel<W>, dim3(static_cast<unsigned>(n)), kThreads, arena.used, tile, tokens, lists,
            data<double>(of.noise) + first, mutable_data<int64_t>(of.choice) + first);
      });
  return pass.exact();
}

__global__ void __launch_bounds__(kThreads) mark_unless_resting_kernel(TokenRules rules, int64_t n, int* marks) {
  const int64_t token = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (token < n) {
    marks[token] = rules.rests(token) ? kNobody : kExactly;
  }
}

template <typename W>
static void choose(const OnDevice& device, const ChooseArguments& of) {
  const int64_t n = of.residual.size(0);
  Tensor marks;
  if (of.packed.codes) {
    marks = choose_by_screen<W>(device, of);
  } else {
    marks = torch::stable::new_empty(of.choice, {n}, ScalarType::Int);
    device.launch(
        mark_unless_resting_kernel, dim3(static_cast<unsigned>(ceil_div(n, kThreads))), kThreads, 0, of.rules, n,
        mutable_data<int>(marks));
  }
  const MarkedList marked(device, marks, kExactly, n);
  auto* lowest = mutable_data<unsigned long long>(of.choice);
  for (unsigned long long* pass : {static_cast<unsigned long long*>(nullptr), lowest}) {
    device.launch(
        exact_choice_kernel<W>, dim3(static_cast<unsigned>(kExactBlocks * device.multiprocessors)), kThreads,
        sizeof(ExactShared), products_of<W>(of), marked.tokens(), data<double>(of.noise), marked.counters(), pass);
  }
}

static Tensor pursuit_choose(
    Tensor residual, Tensor dictionary, Tensor codes, Tensor bounds, Tensor noise, Tensor l0, int64_t step,
    Tensor done) {
  check_dim("residual", residual, 2);
  check_type("residual", residual, ScalarType::Double);
  check_dim("dictionary", dictionary, 2);
  check_size("dictionary", dictionary, 1, residual.size(1));
  require(dictionary.size(0) > 0, "dictionary: must have at least one atom, got none");
  for (const auto& [name, tensor, type] :
       {std::tuple<const char*, const Tensor&, ScalarType>{"noise", noise, ScalarType::Double},
        {"l0", l0, ScalarType::Long},
        {"done", done, ScalarType::Int}}) {
    check_vector(name, tensor, residual.size(0));
    check_type(name, tensor, type);
    require(tensor.is_contiguous(), name, ": must be contiguous, got strides of another layout");
  }
  const OnDevice device(residual);
  const Tensor rows = torch::stable::contiguous(residual);
  Packed packed{torch::stable::contiguous(dictionary), {}, {}, {}};
  if (codes.numel() > 0) {
    check_codes(codes, bounds, dictionary.size(1), dictionary.size(0));
    packed.codes = torch::stable::contiguous(codes);
    packed.bounds = torch::stable::contiguous(bounds);
  }
  Tensor choice = torch::stable::new_empty(l0, {residual.size(0)});
  torch::stable::fill_(choice, -1.0);
  if (residual.size(0) > 0) {
    const ChooseArguments arguments{
        rows, noise, choice, packed, {data<double>(noise), data<int>(done), data<int64_t>(l0), step}};
    if (dictionary.scalar_type() == ScalarType::Double) {
      choose<double>(device, arguments);
    } else {
      check_type("dictionary", dictionary, ScalarType::Float);
      choose<float>(device, arguments);
    }
  }
  return choice;
}

}  // namespace darkmatter::cuda

STABLE_TORCH_LIBRARY_IMPL(darkmatter, CUDA, m) {
  m.impl("pursuit_choose", DARKMATTER_OP(&darkmatter::cuda::pursuit_choose));
}
