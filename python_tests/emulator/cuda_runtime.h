// A GPU small enough for a test: CUDA's words in plain C++, so that the kernels and launchers of csrc/cuda run on the
// CPU.
//
// One block at a time, each of its threads a fiber. A fiber runs until it waits for others (__syncthreads, a warp's
// exchange) or ends; who runs next is drawn at random from a seed, so that a missing barrier shows as a result that
// changes with the seed. Shared memory is filled with 0xa5 before each block, and a canary behind it is looked at
// after. What this cannot show: races between blocks, memory ordering, alignment faults, speed.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __shared__
#define __launch_bounds__(...)
#define __noinline__
#define __align__(n) __attribute__((aligned(n)))

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct float4 {
  float x, y, z, w;
};

namespace darkmatter {
inline constexpr size_t kSharedBytes = 227 * 1024, kCanary = 64;
__attribute__((aligned(128))) inline unsigned char memory[kSharedBytes + kCanary];
}  // namespace darkmatter

namespace simt {

inline constexpr size_t kStack = 128 * 1024;
inline uint64_t seed = 1;  // of the order of threads; set by a test

// Stacks are kept for the next block: making them would take longer than running it.
inline char* stack_of(int thread) {
  static std::vector<std::unique_ptr<char[]>> stacks;
  while (static_cast<int>(stacks.size()) <= thread) {
    stacks.emplace_back(new char[kStack]);
  }
  return stacks[thread].get();
}

struct Fiber {
  dim3 thread;
  ucontext_t context;
  jmp_buf place;
  bool started = false, done = false;
};

// Threads of a warp exchanging values. Two sets of slots: nobody can be two exchanges ahead.
struct Meeting {
  unsigned arrived = 0;
  int parity = 0;
  uint64_t slots[2][32];
  std::vector<int> waiting;
};

class Block {
 public:
  static Block*& current() {
    static Block* block = nullptr;
    return block;
  }

  Block(dim3 index, dim3 grid, int threads, const std::function<void()>& body)
      : index(index),
        grid(grid),
        threads(threads),
        body_(body),
        fibers_(threads),
        random_(seed * 0x9e3779b97f4a7c15 + 1) {
    for (int t = 0; t < threads; ++t) {
      fibers_[t].thread = dim3(t, 0, 0);
      ready_.push_back(t);
    }
    live_ = threads;
  }

  void run() {
    current() = this;
    while (live_ > 0) {
      if (ready_.empty()) {
        throw std::runtime_error("emulated kernel: threads wait for others that never come");
      }
      random_ = random_ * 6364136223846793005ull + 1442695040888963407ull;
      const size_t pick = (random_ >> 33) % ready_.size();
      running_ = ready_[pick];
      ready_[pick] = ready_.back();
      ready_.pop_back();
      resume(fibers_[running_]);
      release_if_all();
    }
    current() = nullptr;
  }

  const Fiber& fiber() const { return fibers_[running_]; }
  int thread() const { return running_; }

  void sync() {
    at_barrier_.push_back(running_);
    yield();
  }

  // Every thread of `mask` gives a value and gets all of theirs.
  std::array<uint64_t, 32> exchange(unsigned mask, uint64_t value) {
    Meeting& meeting = meetings_[{running_ / 32, mask}];
    const int parity = meeting.parity, lane = running_ % 32;
    if ((mask >> lane & 1) == 0) {
      throw std::runtime_error("emulated kernel: a thread is not in the mask it waits with");
    }
    meeting.slots[parity][lane] = value;
    meeting.arrived |= 1u << lane;
    if (meeting.arrived == mask) {
      meeting.arrived = 0;
      meeting.parity = 1 - parity;
      ready_.insert(ready_.end(), meeting.waiting.begin(), meeting.waiting.end());
      meeting.waiting.clear();
    } else {
      meeting.waiting.push_back(running_);
      yield();
    }
    std::array<uint64_t, 32> all;
    std::copy_n(meeting.slots[parity], 32, all.begin());
    return all;
  }

  dim3 index, grid;
  int threads;

 private:
  static void start() {
    Block& block = *current();
    block.body_();
    block.fibers_[block.running_].done = true;
    --block.live_;
    _longjmp(block.scheduler_, 1);
  }
  void resume(Fiber& fiber) {
    if (_setjmp(scheduler_) != 0) {
      return;
    }
    if (fiber.started) {
      _longjmp(fiber.place, 1);
    }
    fiber.started = true;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = stack_of(fiber.thread.x);
    fiber.context.uc_stack.ss_size = kStack;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, &Block::start, 0);
    setcontext(&fiber.context);
  }
  void yield() {
    if (_setjmp(fibers_[running_].place) == 0) {
      _longjmp(scheduler_, 1);
    }
  }
  void release_if_all() {
    if (live_ > 0 && static_cast<int>(at_barrier_.size()) == live_) {
      ready_.swap(at_barrier_);
      at_barrier_.clear();
    }
  }

  const std::function<void()>& body_;
  std::vector<Fiber> fibers_;
  std::vector<int> ready_, at_barrier_;
  std::map<std::pair<int, unsigned>, Meeting> meetings_;
  jmp_buf scheduler_;
  uint64_t random_;
  int running_ = 0, live_ = 0;
};

template <typename E>
uint64_t to_bits(E value) {
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(value));
  return bits;
}
template <typename E>
E from_bits(uint64_t bits) {
  E value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

// Runs every block of a grid.
inline void run_grid(dim3 grid, int threads, size_t shared, const std::function<void()>& body) {
  using darkmatter::memory;
  if (shared > darkmatter::kSharedBytes) {
    throw std::runtime_error("emulated kernel: asks for " + std::to_string(shared) + " bytes of shared memory");
  }
  for (unsigned y = 0; y < grid.y; ++y) {
    for (unsigned x = 0; x < grid.x; ++x) {
      std::memset(memory, 0xa5, shared + darkmatter::kCanary);
      Block(dim3(x, y, 0), grid, threads, body).run();
      for (size_t i = shared; i < shared + darkmatter::kCanary; ++i) {
        if (memory[i] != 0xa5) {
          throw std::runtime_error("emulated kernel: wrote behind its shared memory");
        }
      }
    }
  }
}

}  // namespace simt

#define threadIdx (simt::Block::current()->fiber().thread)
#define blockIdx (simt::Block::current()->index)
#define gridDim (simt::Block::current()->grid)

inline void __syncthreads() { simt::Block::current()->sync(); }
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
template <typename E>
E __shfl_xor_sync(unsigned mask, E value, int lanes) {
  const int from = simt::Block::current()->thread() % 32 ^ lanes;
  return simt::from_bits<E>(simt::Block::current()->exchange(mask, simt::to_bits(value))[from]);
}
template <typename E>
E __shfl_up_sync(unsigned mask, E value, int lanes) {
  const int lane = simt::Block::current()->thread() % 32, from = lane >= lanes ? lane - lanes : lane;
  return simt::from_bits<E>(simt::Block::current()->exchange(mask, simt::to_bits(value))[from]);
}
template <typename E>
E __shfl_sync(unsigned mask, E value, int from) {
  return simt::from_bits<E>(simt::Block::current()->exchange(mask, simt::to_bits(value))[from]);
}
inline unsigned __ballot_sync(unsigned mask, bool value) {
  const auto all = simt::Block::current()->exchange(mask, value);
  unsigned bits = 0;
  for (int lane = 0; lane < 32; ++lane) {
    bits |= mask >> lane & 1 && all[lane] ? 1u << lane : 0u;
  }
  return bits;
}
template <typename E>
E atomicAdd(E* to, E value) {
  const E before = *to;
  *to += value;
  return before;
}
inline uint32_t atomicMax(uint32_t* to, uint32_t value) {
  const uint32_t before = *to;
  *to = std::max(before, value);
  return before;
}
