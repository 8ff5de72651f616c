// The matrix product of the screen, by the cuBLAS that torch has loaded.
//
// Called directly and not through torch's mm: a user's allow_fp16_accumulation would make torch add in float16, which
// the screen's bound does not allow. cuBLAS' headers are not needed to build: the function is looked up in the process,
// and its few constants are part of its binary interface.
#include <dlfcn.h>

#include "cuda/launch.h"

namespace darkmatter::cuda {

// cublas_api.h, library_types.h
constexpr int kOperationNone = 0, kOperationTranspose = 1;
constexpr int kTypeFloat32 = 0, kTypeFloat16 = 2;
constexpr int kComputeFloat32 = 68;
constexpr int kAlgorithmDefault = -1;

using GemmEx = int (*)(
    void* handle, int transa, int transb, int m, int n, int k, const void* alpha, const void* a, int a_type, int lda,
    const void* b, int b_type, int ldb, const void* beta, void* c, int c_type, int ldc, int compute, int algorithm);

using GemmStridedBatchedEx = int (*)(
    void* handle, int transa, int transb, int m, int n, int k, const void* alpha, const void* a, int a_type, int lda,
    long long a_stride, const void* b, int b_type, int ldb, long long b_stride, const void* beta, void* c, int c_type,
    int ldc, long long c_stride, int batches, int compute, int algorithm);

template <typename Function>
static Function find_cublas(const char* function) {
  void* found = dlsym(RTLD_DEFAULT, function);
  for (const char* name : {"libcublas.so.13", "libcublas.so.12", "libcublas.so"}) {
    if (found == nullptr) {
      if (void* library = dlopen(name, RTLD_LAZY | RTLD_NOLOAD)) {
        found = dlsym(library, function);
      }
    }
  }
  require(found != nullptr, "darkmatter_ext: ", function, " must be in the process (torch loads cuBLAS), got none");
  return reinterpret_cast<Function>(found);
}

// cuBLAS counts columns first: the transpose of the product is latents times tokens transposed.
void half_products(
    const OnDevice&, const __half* tokens, const __half* latents, int64_t n, int64_t width, int64_t d, float* products,
    int64_t ld, int64_t runs, int64_t skip) {
  void* handle = nullptr;
  TORCH_ERROR_CODE_CHECK(torch_get_current_cuda_blas_handle(&handle));
  const float one = 1.0f, zero = 0.0f;
  const int columns = static_cast<int>(width), rows = static_cast<int>(n), depth = static_cast<int>(d);
  int status = 0;
  if (runs == 1) {
    static const auto gemm = find_cublas<GemmEx>("cublasGemmEx");
    status = gemm(
        handle, kOperationTranspose, kOperationNone, columns, rows, depth, &one, latents, kTypeFloat16, depth, tokens,
        kTypeFloat16, depth, &zero, products, kTypeFloat32, static_cast<int>(ld), kComputeFloat32, kAlgorithmDefault);
  } else {
    static const auto gemms = find_cublas<GemmStridedBatchedEx>("cublasGemmStridedBatchedEx");
    status = gemms(
        handle, kOperationTranspose, kOperationNone, columns, rows, depth, &one, latents, kTypeFloat16, depth,
        (width + skip) * d, tokens, kTypeFloat16, depth, 0, &zero, products, kTypeFloat32, static_cast<int>(ld), width,
        static_cast<int>(runs), kComputeFloat32, kAlgorithmDefault);
  }
  require(status == 0, "darkmatter_ext: the matrix product of cuBLAS must succeed, got status ", status);
}

}  // namespace darkmatter::cuda
