// pursuit_step on CUDA: launch and registration. Nothing waits for the device.
#include "cuda/kernels/pursuit_step.cuh"

#include "cuda/kernels/dispatch.h"

namespace darkmatter::cuda {

static void check_rows(const char* name, const Tensor& tensor, const Tensor& like) {
  check_type(name, tensor, like.scalar_type());
  check_dim(name, tensor, 2);
  check_size(name, tensor, 0, like.size(0));
  check_size(name, tensor, 1, like.size(1));
  require(tensor.is_contiguous(), name, ": must be contiguous, got strides of another layout");
}

static void check_tokens(const char* name, const Tensor& tensor, ScalarType type, int64_t n) {
  check_vector(name, tensor, n);
  check_type(name, tensor, type);
  require(tensor.is_contiguous(), name, ": must be contiguous, got strides of another layout");
}

template <typename W>
static void launch_step(
    const OnDevice& device, const Tensor& dictionary, const PursuitState<W>& state, const PursuitRules& rules,
    int64_t n_tokens) {
  const auto bytes = [&](bool staged) {
    Arena arena{nullptr};
    if (staged) {
      arena.take<double>(state.d);
    }
    arena.take<double>(state.s_max);
    arena.take<double>(state.s_max);
    arena.take<PursuitShared>(1);
    return static_cast<int64_t>(arena.used);
  };
  const bool staged = state.d <= kMaxStaged && bytes(true) <= device.shared_limit();
  require(
      bytes(false) <= device.shared_limit(), "l0: must be at most ", device.shared_limit() / 16 - 16,
      " on this GPU, got ", state.s_max);
  with_width<W>(dictionary, [&](auto width) {
    device.launch(
        pursuit_step_kernel<W, width.value>, dim3(static_cast<unsigned>(n_tokens)), kThreads,
        static_cast<size_t>(bytes(staged)), state, rules, staged);
  });
}

static void pursuit_step(
    Tensor target, Tensor dictionary, Tensor choice, Tensor noise, Tensor l0, int64_t step, bool keep_chosen,
    double residual_threshold, Tensor residual, Tensor atoms, Tensor weights, Tensor n_chosen, Tensor done) {
  check_dim("target", target, 2);
  check_dim("dictionary", dictionary, 2);
  check_size("dictionary", dictionary, 1, target.size(1));
  const int64_t n = target.size(0);
  check_type("target", target, ScalarType::Double);
  check_rows("target", target, target);
  check_rows("dictionary", dictionary, dictionary);
  check_rows("residual", residual, target);
  check_dim("weights", weights, 2);
  check_size("weights", weights, 0, n);
  check_type("weights", weights, ScalarType::Double);
  require(weights.is_contiguous(), "weights: must be contiguous, got strides of another layout");
  check_type("atoms", atoms, ScalarType::Long);
  check_values(weights, atoms);
  require(atoms.is_contiguous(), "atoms: must be contiguous, got strides of another layout");
  require(
      step >= 0 && step < weights.size(1), "step: must be from 0 to ", weights.size(1) - 1, " (places), got ", step);
  check_tokens("choice", choice, ScalarType::Long, n);
  check_tokens("noise", noise, ScalarType::Double, n);
  check_tokens("l0", l0, ScalarType::Long, n);
  check_tokens("n_chosen", n_chosen, ScalarType::Long, n);
  check_tokens("done", done, ScalarType::Int, n);
  if (n == 0) {
    return;
  }
  const OnDevice device(target);
  const Tensor direction = torch::stable::empty_like(target);
  const auto run = [&](auto type) {
    using W = decltype(type);
    const PursuitState<W> state{
        data<double>(target),
        data<W>(dictionary),
        data<int64_t>(choice),
        data<double>(noise),
        data<int64_t>(l0),
        mutable_data<double>(residual),
        mutable_data<int64_t>(atoms),
        mutable_data<double>(weights),
        mutable_data<int64_t>(n_chosen),
        mutable_data<int>(done),
        mutable_data<double>(direction),
        target.size(1),
        weights.size(1)};
    launch_step(device, dictionary, state, PursuitRules{step, keep_chosen, residual_threshold}, n);
  };
  if (dictionary.scalar_type() == ScalarType::Double) {
    run(double{});
  } else {
    check_type("dictionary", dictionary, ScalarType::Float);
    run(float{});
  }
}

}  // namespace darkmatter::cuda

STABLE_TORCH_LIBRARY_IMPL(darkmatter, CUDA, m) {
  m.impl("pursuit_step", DARKMATTER_OP(&darkmatter::cuda::pursuit_step));
}
