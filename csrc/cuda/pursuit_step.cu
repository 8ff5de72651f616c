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

static void pursuit_step(
    Tensor target, Tensor dictionary, Tensor choice, Tensor l0, int64_t step, bool keep_chosen,
    double residual_threshold, Tensor residual, Tensor atoms, Tensor weights, Tensor n_chosen, Tensor done) {
  check_dim("target", target, 2);
  check_dim("dictionary", dictionary, 2);
  check_size("dictionary", dictionary, 1, target.size(1));
  const int64_t n = target.size(0);
  check_rows("target", target, target);
  check_rows("dictionary", dictionary, dictionary);
  check_type("dictionary", dictionary, target.scalar_type());
  check_rows("residual", residual, target);
  check_dim("weights", weights, 2);
  check_size("weights", weights, 0, n);
  check_type("weights", weights, target.scalar_type());
  require(weights.is_contiguous(), "weights: must be contiguous, got strides of another layout");
  check_type("atoms", atoms, ScalarType::Long);
  check_values(weights, atoms);
  require(atoms.is_contiguous(), "atoms: must be contiguous, got strides of another layout");
  require(
      step >= 0 && step < weights.size(1), "step: must be from 0 to ", weights.size(1) - 1, " (places), got ", step);
  check_tokens("choice", choice, ScalarType::Long, n);
  check_tokens("l0", l0, ScalarType::Long, n);
  check_tokens("n_chosen", n_chosen, ScalarType::Long, n);
  check_tokens("done", done, ScalarType::Int, n);
  const bool wide = target.scalar_type() == ScalarType::Double;
  require(wide || target.scalar_type() == ScalarType::Float, "target: must be float32 or float64, got another dtype");
  if (n == 0) {
    return;
  }
  const OnDevice device(target);
  const Tensor direction = torch::stable::empty_like(target);
  const auto run = [&](auto type) {
    using T = decltype(type);
    const PursuitState<T> state{data<T>(target),
                                data<T>(dictionary),
                                data<int64_t>(choice),
                                data<int64_t>(l0),
                                mutable_data<T>(residual),
                                mutable_data<int64_t>(atoms),
                                mutable_data<T>(weights),
                                mutable_data<int64_t>(n_chosen),
                                mutable_data<int>(done),
                                mutable_data<T>(direction),
                                target.size(1),
                                weights.size(1)};
    const bool staged = state.d <= kMaxStaged;
    Arena arena{nullptr};
    if (staged) {
      arena.take<double>(state.d);
    }
    arena.take<T>(state.s_max);
    arena.take<T>(state.s_max);
    arena.take<PursuitShared>(1);
    device.launch(
        pursuit_step_kernel<T>, dim3(static_cast<unsigned>(n)), kThreads, arena.used, state,
        PursuitRules{step, keep_chosen, residual_threshold}, staged);
  };
  if (wide) {
    run(double{});
  } else {
    run(float{});
  }
}

}  // namespace darkmatter::cuda

STABLE_TORCH_LIBRARY_IMPL(darkmatter, CUDA, m) { m.impl("pursuit_step", TORCH_BOX(&darkmatter::cuda::pursuit_step)); }
