// Neighbouring elements moved together, and how many loads the gathering kernels keep in flight.
#pragma once

#include <cuda_runtime.h>

#include <cstring>

namespace darkmatter::cuda {

constexpr int kPacketBytes = 16;  // the widest load and store of a thread
constexpr int kDecodeAhead = 8;   // rows a thread has in flight: 8 x 16 bytes x 768 threads, 96 KB a multiprocessor
constexpr int kFewAhead = 32;     // of few tokens: one element each
constexpr int kDecodeBlocks = 3;  // a multiprocessor: 80 registers a thread

// kWidth elements, loaded at once; 16 bytes where rows are aligned, else one element.
template <typename T, int kWidth>
struct alignas(sizeof(T) * kWidth) Packet {
  T element[kWidth];
};

// In one store, which takes an intrinsic: nvcc stores an assigned struct element by element. Of what L2 holds, it goes
// first: it is not read again here, and what is read should stay.
template <typename T, int kWidth>
__device__ void store_packet(T* to, const Packet<T, kWidth>& packet) {
  if constexpr (sizeof(packet) == sizeof(uint4)) {
    uint4 bits;
    memcpy(&bits, &packet, sizeof(bits));
    __stcs(reinterpret_cast<uint4*>(to), bits);
  } else {
    static_assert(kWidth == 1, "16 bytes or one element");
    *to = packet.element[0];
  }
}

}  // namespace darkmatter::cuda
