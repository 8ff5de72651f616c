// csrc/cuda/kernels/hopper.cuh for the emulator: the same names, with the meaning that the PTX manual gives them.
//
// What runs behind the threads on the GPU does so here: a copy happens at some time after it was asked for, copies in
// any order; products read their tiles, and write their sums, as late as a thread may find them not done: when it
// waits. So a tile that is read before its barrier, or handed back before its products are done, shows in the result.
#pragma once

#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "cuda/kernels/block.cuh"
#include "tensor_core.h"

#define DM_HOPPER

namespace darkmatter::cuda::hopper {

constexpr int kTileColumns = 64;
constexpr int kAtomBytes = 1024;
constexpr int kProductLatents = 256;
constexpr int kProductDepth = 16;
constexpr int kAccumulators = 128;
constexpr int kStepInDescriptor = 2;
constexpr int kWarpgroup = 128;

struct TensorMap {
  const __half* rows;
  int64_t n, d;
  int box_rows;
};
using Barrier = uint64_t;

inline simt::Block& block() { return *simt::Block::current(); }
inline int rank() { return block().fiber().rank; }
inline void must(bool holds, const char* rule) {
  if (!holds) {
    throw std::runtime_error(std::string("emulated kernel: ") + rule);
  }
}

// Shared memory begins at address 0 of each block, and is aligned to whole atoms.
inline uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(static_cast<const unsigned char*>(pointer) - memory_of(rank()));
}
template <typename E>
E* in_block(E* pointer, int other) {
  return reinterpret_cast<E*>(memory_of(other) + shared_address(pointer));
}

// The whole of what rounding up may cost, so that a byte too many is behind the end.
inline unsigned char* aligned_shared() { return memory_of(rank()) + kAtomBytes; }
inline uint32_t cluster_rank() { return static_cast<uint32_t>(rank()); }
inline void cluster_sync() {
  __syncwarp();
  block().sync_cluster();
}

// What a barrier's eight bytes hold.
struct BarrierState {
  uint16_t count, missing;  // arrivals of a phase, and those still to come in this one
  int32_t bytes : 31;       // expected and not yet there; below zero while they are early
  uint32_t parity : 1;      // of this phase
};
static_assert(sizeof(BarrierState) == sizeof(Barrier));

template <typename Change>
void change(Barrier* barrier, const Change& how) {
  auto state = simt::from_bits<BarrierState>(*barrier);
  how(state);
  if (state.missing == 0 && state.bytes == 0) {
    state.parity ^= 1;
    state.missing = state.count;
    block().wake(barrier);
  }
  *barrier = simt::to_bits(state);
}
inline void arrive_expecting(Barrier* barrier, int bytes) {
  change(barrier, [&](BarrierState& state) {
    must(state.missing > 0, "more arrive at a barrier than it counts");
    state.bytes += bytes;
    --state.missing;
  });
}
inline void count_bytes(Barrier* barrier, int bytes) {
  change(barrier, [&](BarrierState& state) { state.bytes -= bytes; });
}

inline void init(Barrier* barrier, int count) {
  must(shared_address(barrier) % sizeof(Barrier) == 0, "a barrier is aligned to 8 bytes");
  *barrier = simt::to_bits(BarrierState{static_cast<uint16_t>(count), static_cast<uint16_t>(count), 0, 0});
}
inline void fence_init() {}
inline void arrive(Barrier* barrier) { arrive_expecting(barrier, 0); }
inline void arrive_at(Barrier* barrier, uint32_t other) {
  must(block().lives(static_cast<int>(other)), "arrives at a barrier of a block that has ended");
  arrive(in_block(barrier, static_cast<int>(other)));
}
inline void wait(Barrier* barrier, uint32_t parity) {
  block().wait_until(barrier, [=] { return simt::from_bits<BarrierState>(*barrier).parity != parity; });
}

// Where byte `at` of shared memory is with the swizzle of 128 bytes.
inline uint32_t swizzled(uint32_t at) { return at ^ (at >> 7 & 7) << 4; }

inline void copy_tile_to(uint16_t blocks, void* to, const TensorMap& map, int column, int row, Barrier* barrier) {
  const uint32_t at = shared_address(to);
  must(at % kAtomBytes == 0, "a swizzled tile is aligned to 1024 bytes");
  for (int other = 0; other < kMaxClusterBlocks; ++other) {
    if ((blocks >> other & 1) == 0) {
      continue;
    }
    unsigned char* memory = memory_of(other);
    Barrier* told = in_block(barrier, other);
    block().later([=] {
      must(block().lives(other), "copies into a block that has ended");
      for (int r = 0; r < map.box_rows; ++r) {
        for (int c = 0; c < kTileColumns; ++c) {
          const bool inside = row + r < map.n && column + c < map.d;
          const __half value = inside ? map.rows[(row + r) * map.d + column + c] : __float2half_rn(0.0f);
          std::memcpy(memory + swizzled(at + (r * kTileColumns + c) * sizeof(__half)), &value, sizeof(value));
        }
      }
      count_bytes(told, static_cast<int>(map.box_rows * kTileColumns * sizeof(__half)));
    });
  }
}
inline void copy_tile(void* to, const TensorMap& map, int column, int row, Barrier* barrier) {
  copy_tile_to(static_cast<uint16_t>(1u << rank()), to, map, column, row, barrier);
}
inline void copy_bytes(void* to, const void* from, int bytes, Barrier* barrier) {
  must(
      shared_address(to) % 16 == 0 && reinterpret_cast<uintptr_t>(from) % 16 == 0 && bytes % 16 == 0,
      "a copy of bytes is aligned to 16");
  block().later([=] {
    std::memcpy(to, from, bytes);
    count_bytes(barrier, bytes);
  });
}

template <int kRegisters>
void give_registers() {
  static_assert(kRegisters % 8 == 0 && kRegisters >= 24 && kRegisters <= 256);
}
template <int kRegisters>
void take_registers() {
  static_assert(kRegisters % 8 == 0 && kRegisters >= 24 && kRegisters <= 256);
}

// The fields of a descriptor as the manual lists them, in units of 16 bytes.
inline uint64_t tile_descriptor(const void* tile) {
  must(shared_address(tile) % kAtomBytes == 0, "a swizzled tile is aligned to 1024 bytes");
  return shared_address(tile) / 16 | static_cast<uint64_t>(kAtomBytes / 16) << 32 | uint64_t{1} << 62;
}
// Element (row, k) of a tile whose k begins where the descriptor says.
inline float element(uint64_t descriptor, int row, int k) {
  const auto start = static_cast<uint32_t>(descriptor & 0x3fff) * 16;
  const auto atom = static_cast<uint32_t>(descriptor >> 32 & 0x3fff) * 16;
  must(descriptor >> 62 == 1, "a tile is swizzled by 128 bytes");
  __half value;
  const uint32_t at = start + row / 8 * atom + row % 8 * 128 + k * sizeof(__half);
  std::memcpy(&value, memory_of(rank()) + swizzled(at), sizeof(value));
  return __half2float(value);
}

inline void begin_products() { block().fiber().fenced = true; }

// The two rows and 64 columns of one thread.
inline void add_products(float* sums, uint64_t left, uint64_t right, bool add) {
  const int thread = block().fiber().thread.x % kWarpgroup, lane = thread % 32;
  for (int half = 0; half < 2; ++half) {
    float row[kProductDepth];
    bool zeros = true;
    for (int k = 0; k < kProductDepth; ++k) {
      row[k] = element(left, thread / 32 * 16 + lane / 4 + 8 * half, k);
      zeros = zeros && row[k] == 0.0f;
    }
    for (int j = 0; j < kProductLatents / 4; ++j) {  // two neighbours of every eight columns
      float& at = sums[j / 2 * 4 + half * 2 + j % 2];
      double sum = add ? at : 0.0;
      for (int k = 0; k < kProductDepth && !zeros; k += 4) {
        double four[4];
        for (int i = 0; i < 4; ++i) {
          four[i] = static_cast<double>(row[k + i]) * element(right, j / 2 * 8 + lane % 4 * 2 + j % 2, k + i);
        }
        sum = add_truncated(sum, four);
      }
      at = static_cast<float>(sum);
    }
  }
}
inline void product(float (&sums)[kAccumulators], uint64_t left, uint64_t right, bool add) {
  must(block().fiber().fenced, "products begin behind a fence");
  block().fiber().open.push_back([=, to = &sums[0]] { add_products(to, left, right, add); });
}
inline void commit_products() {
  simt::Fiber& fiber = block().fiber();
  fiber.groups.push_back(std::move(fiber.open));
  fiber.open.clear();
}
template <int kPending>
void wait_products() {
  simt::Fiber& fiber = block().fiber();
  for (; static_cast<int>(fiber.groups.size()) > kPending; fiber.groups.pop_front()) {
    for (const simt::Work& work : fiber.groups.front()) {
      work();
    }
  }
  fiber.fenced = kPending > 0 && fiber.fenced;
  __syncwarp();
}
inline void hold(float (&)[kAccumulators]) {}

inline bool describe_rows(const __half* rows, int64_t n, int64_t d, int box_rows, TensorMap* map) {
  *map = {rows, n, d, box_rows};
  return reinterpret_cast<uintptr_t>(rows) % 16 == 0 && d % kTileColumns == 0 && box_rows <= 256;
}

}  // namespace darkmatter::cuda::hopper
