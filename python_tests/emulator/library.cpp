// The CUDA ops as torch.ops.darkmatter_emulated, on CPU tensors: the launchers and kernels of csrc/cuda as they are.
#include <torch/csrc/stable/library.h>

#undef STABLE_TORCH_LIBRARY
#define STABLE_TORCH_LIBRARY(ns, m) STABLE_TORCH_LIBRARY_FRAGMENT(darkmatter_emulated, m)
#undef STABLE_TORCH_LIBRARY_IMPL
#define STABLE_TORCH_LIBRARY_IMPL(ns, key, m) _STABLE_TORCH_LIBRARY_IMPL(darkmatter_emulated, CPU, m, C10_UID)

#include "ops.cpp"

#include "cuda/find_support.cu"
#include "cuda/prepare_encoder.cu"
#include "cuda/pursuit_choose.cu"
#include "cuda/pursuit_step.cu"
#include "cuda/screen/fused_filter.cu"
#include "cuda/screen_intervals.cu"
#include "cuda/sparse_decode.cu"
#include "cuda/threshold_encode.cu"
#include "cuda/to_dense.cu"
#include "cuda/topk_encode.cu"
#include "cuda/wide_decode.cu"

// The order in which the threads of a block take turns.
extern "C" __attribute__((visibility("default"))) void darkmatter_emulated_seed(uint64_t seed) { simt::seed = seed; }
extern "C" __attribute__((visibility("default"))) void darkmatter_emulated_multiprocessors(int n) {
  simt::multiprocessors = n;
}
// 80: compute capability 8.0. The fused filter is taken from 90 on.
extern "C" __attribute__((visibility("default"))) void darkmatter_emulated_capability(int capability) {
  simt::capability = capability;
}
// Bytes of shared memory that a block may have; 0: as many as there are.
extern "C" __attribute__((visibility("default"))) void darkmatter_emulated_shared(int bytes) {
  simt::shared_limit = bytes > 0 ? bytes : darkmatter::cuda::kSharedBytes;
}

// Launches of clusters so far.
extern "C" __attribute__((visibility("default"))) int darkmatter_emulated_cluster_launches() {
  return simt::cluster_launches;
}
