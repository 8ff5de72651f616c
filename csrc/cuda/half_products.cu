// The matrix product of the screen, by the cuBLAS that torch has loaded.
//
// Called directly and not through torch's mm: a user's allow_fp16_accumulation would make torch add in float16, which
// the screen's bound does not allow. cuBLAS' headers are not needed to build: the function is looked up in the process,
// and its few constants are part of its binary interface.
#include <dlfcn.h>

#include "cuda/launch.h"

namespace darkmatter {

// cublas_api.h, library_types.h
constexpr int kOperationNone = 0, kOperationTranspose = 1;
constexpr int kTypeFloat32 = 0, kTypeFloat16 = 2;
constexpr int kComputeFloat32 = 68;
constexpr int kAlgorithmDefault = -1;

using GemmEx = int (*)(
    void* handle, int transa, int transb, int m, int n, int k, const void* alpha, const void* a, int a_type, int lda,
    const void* b, int b_type, int ldb, const void* beta, void* c, int c_type, int ldc, int compute, int algorithm);

static GemmEx find_gemm() {
  void* found = dlsym(RTLD_DEFAULT, "cublasGemmEx");
  for (const char* name : {"libcublas.so.13", "libcublas.so.12", "libcublas.so"}) {
    if (found == nullptr) {
      if (void* library = dlopen(name, RTLD_LAZY | RTLD_NOLOAD)) {
        found = dlsym(library, "cublasGemmEx");
      }
    }
  }
  require(found != nullptr, "darkmatter_ext: cublasGemmEx must be in the process (torch loads cuBLAS), got none");
  return reinterpret_cast<GemmEx>(found);
}

void half_products(
    const OnDevice&, const __half* tokens, const __half* latents, int64_t n, int64_t width, int64_t d, float* products,
    int64_t ld) {
  static const GemmEx gemm = find_gemm();
  void* handle = nullptr;
  TORCH_ERROR_CODE_CHECK(torch_get_current_cuda_blas_handle(&handle));
  const float one = 1.0f, zero = 0.0f;
  // cuBLAS counts columns first: the transpose of the product is latents times tokens transposed.
  const int status = gemm(
      handle, kOperationTranspose, kOperationNone, static_cast<int>(width), static_cast<int>(n), static_cast<int>(d),
      &one, latents, kTypeFloat16, static_cast<int>(d), tokens, kTypeFloat16, static_cast<int>(d), &zero, products,
      kTypeFloat32, static_cast<int>(ld), kComputeFloat32, kAlgorithmDefault);
  require(status == 0, "darkmatter_ext: cublasGemmEx must succeed, got status ", status);
}

}  // namespace darkmatter
