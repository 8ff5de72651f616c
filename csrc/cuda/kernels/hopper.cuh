// The words of Hopper (sm_90a) that CUDA C++ has no words for: barriers that count bytes, copies of tiles by the tensor
// memory accelerator, matrix products of a warpgroup, registers that change hands. Each is one instruction or a few;
// python_tests/emulator has another file of the same name that gives them their documented meaning on the CPU.
//
// Tiles in shared memory are [rows][64] float16: 128 bytes a row, eight rows an atom of 1024 bytes, to which they are
// aligned, and inside it 16-byte piece c of row r is at place c xor r mod 8 (the swizzle of 128 bytes that copies write
// and products read without bank conflicts).
#pragma once

#include <cuda.h>  // types alone: the one function of the driver is looked up, and libcuda is not linked
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/kernels/block.cuh"

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
#define DM_HOPPER  // elsewhere kernels of these words compile to nothing
#endif

namespace darkmatter::cuda::hopper {

constexpr int kTileColumns = 64;
constexpr int kAtomBytes = 1024;
constexpr int kProductLatents = 256;  // the width n of one product m64n256k16
constexpr int kProductDepth = 16;     // its k
constexpr int kAccumulators = 128;    // a thread: 64 * 256 / 128
constexpr int kStepInDescriptor = 2;  // from one k of 16 to the next: 32 bytes, in units of 16
constexpr int kWarpgroup = 128;       // threads

using TensorMap = CUtensorMap;
using Barrier = uint64_t;

__device__ inline uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// The block's dynamic shared memory from the first whole atom on.
__device__ inline unsigned char* aligned_shared() {
  unsigned char* memory = shared_memory();
  return memory + (kAtomBytes - shared_address(memory) % kAtomBytes) % kAtomBytes;
}

// Blocks of a cluster.

__device__ inline uint32_t cluster_rank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

// All threads of all blocks of the cluster; those of a warp together.
__device__ inline void cluster_sync() {
  asm volatile(
      "barrier.cluster.arrive.release.aligned;\n\t"
      "barrier.cluster.wait.acquire.aligned;" ::
          : "memory");
}

// Barriers. A phase ends when `count` have arrived and all bytes expected in it are there; waiting is for the end of
// the phase of a parity, and before the first phase that of parity 1 has ended.

__device__ inline void init(Barrier* barrier, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(count) : "memory");
}

// Makes barriers that one thread initialised known to the cluster and to the copies; a sync must follow.
__device__ inline void fence_init() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

__device__ inline void arrive(Barrier* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}

// At the barrier of the same place in block `rank` of the cluster. What it tells there is that products have read a
// tile, which waiting for them has ended; no memory that this thread wrote is handed over, and a release for the
// cluster would cost a fence of the whole GPU a stage.
__device__ inline void arrive_at(Barrier* barrier, uint32_t rank) {
  asm volatile(
      "{\n\t"
      ".reg .b32 remote;\n\t"
      "mapa.shared::cluster.u32 remote, %0, %1;\n\t"
      "mbarrier.arrive.shared::cluster.b64 _, [remote];\n\t"
      "}" ::"r"(shared_address(barrier)),
      "r"(rank)
      : "memory");
}

__device__ inline void arrive_expecting(Barrier* barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}

__device__ inline void wait(Barrier* barrier, uint32_t parity) {
  uint32_t ended = 0;
  while (ended == 0) {
    asm volatile(
        "{\n\t"
        ".reg .pred p;\n\t"
        "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n\t"
        "selp.u32 %0, 1, 0, p;\n\t"
        "}"
        : "=r"(ended)
        : "r"(shared_address(barrier)), "r"(parity)
        : "memory");
  }
}

// Copies, which end by telling the barrier their bytes. Rows and columns outside the tensor come as zeros.

__device__ inline void copy_tile(void* to, const TensorMap& map, int column, int row, Barrier* barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(
          shared_address(to)),
      "l"(&map), "r"(column), "r"(row), "r"(shared_address(barrier))
      : "memory");
}

// The same into the same place of every block whose bit is set in `blocks`, telling the barrier of each.
__device__ inline void copy_tile_to(
    uint16_t blocks, void* to, const TensorMap& map, int column, int row, Barrier* barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
      "[%0], [%1, {%2, %3}], [%4], %5;" ::"r"(shared_address(to)),
      "l"(&map), "r"(column), "r"(row), "r"(shared_address(barrier)), "h"(blocks)
      : "memory");
}

// `bytes` in one piece; both addresses and `bytes` are multiples of 16.
__device__ inline void copy_bytes(void* to, const void* from, int bytes, Barrier* barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   shared_address(to)),
               "l"(__cvta_generic_to_global(from)), "r"(bytes), "r"(shared_address(barrier))
               : "memory");
}

// Registers of the warps of a warpgroup, all of which call: a multiple of 8.

template <int kRegisters>
__device__ inline void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ inline void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// Matrix products: sums [64, 256] += left [64, 16] right [256, 16]^T by the 128 threads of a warpgroup, together. They
// run behind the program, in groups that are committed and waited for; until then nobody touches the sums.

// A tile as products read it: its address, from one atom of eight rows to the next, and how it is swizzled.
__device__ inline uint64_t tile_descriptor(const void* tile) {
  constexpr uint64_t kUnit = 16, kSwizzle128 = 1;
  return (shared_address(tile) & 0x3ffff) / kUnit | kAtomBytes / kUnit << 32 | kSwizzle128 << 62;
}

// Before the first product, and after the program has touched the sums.
__device__ inline void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Until at most the last kPending groups are not done.
template <int kPending>
__device__ inline void wait_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// The compiler must not move what the program does with the sums across this.
__device__ inline void hold(float (&sums)[kAccumulators]) {
#pragma unroll
  for (int i = 0; i < kAccumulators; ++i) {
    asm volatile("" : "+f"(sums[i])::"memory");
  }
}

#define DM_SUM4(i) "+f"(sums[i]), "+f"(sums[i + 1]), "+f"(sums[i + 2]), "+f"(sums[i + 3])
#define DM_SUM16(i) DM_SUM4(i), DM_SUM4(i + 4), DM_SUM4(i + 8), DM_SUM4(i + 12)
#define DM_SUM64(i) DM_SUM16(i), DM_SUM16(i + 16), DM_SUM16(i + 32), DM_SUM16(i + 48)

// Adds to the sums, or overwrites them. Sum i of thread t is of row 16 (t / 32) + t % 32 / 4 + 8 (i / 2 % 2) and column
// 8 (i / 4) + 2 (t % 4) + i % 2.
__device__ inline void product(float (&sums)[kAccumulators], uint64_t left, uint64_t right, bool add) {
  asm volatile(
      "{\n\t"
      ".reg .pred p;\n\t"
      "setp.ne.b32 p, %130, 0;\n\t"
      "wgmma.mma_async.sync.aligned.m64n256k16.f32.f16.f16 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      " %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
      " %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
      " %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "
      " %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "
      " %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "
      " %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, "
      " %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127}, "
      "%128, %129, p, 1, 1, 0, 0;\n\t"
      "}"
      : DM_SUM64(0), DM_SUM64(64)
      : "l"(left), "l"(right), "r"(static_cast<int>(add)));
}

#undef DM_SUM4
#undef DM_SUM16
#undef DM_SUM64

// Host: how copies see rows [n, d] of float16, d a multiple of 64, taken `box_rows` (at most 256) by 64 at a time.
// False where the driver refuses.
inline bool describe_rows(const __half* rows, int64_t n, int64_t d, int box_rows, TensorMap* map) {
  using Encode = decltype(&cuTensorMapEncodeTiled);
  static const auto encode = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult status{};
#if CUDART_VERSION >= 12050
    cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &status);
#else
    cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &found, cudaEnableDefault, &status);
#endif
    return reinterpret_cast<Encode>(status == cudaDriverEntryPointSuccess ? found : nullptr);
  }();
  const cuuint64_t size[] = {static_cast<cuuint64_t>(d), static_cast<cuuint64_t>(n)};
  const cuuint64_t row_bytes[] = {static_cast<cuuint64_t>(d) * sizeof(__half)};
  const cuuint32_t box[] = {kTileColumns, static_cast<cuuint32_t>(box_rows)}, every[] = {1, 1};
  return encode != nullptr &&
         encode(
             map, CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 2, const_cast<__half*>(rows), size, row_bytes, box, every,
             CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
             CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

}  // namespace darkmatter::cuda::hopper
