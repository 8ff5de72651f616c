// A GPU small enough for a test: CUDA's words in plain C++, so that the kernels and launchers of csrc/cuda run on the
// CPU.
//
// One block at a time (or one cluster of blocks), each of its threads a fiber. A fiber runs until it waits for others
// (__syncthreads, a warp's exchange) or ends; who runs next is drawn at random from a seed, so that a missing barrier
// shows as a result that changes with the seed. Shared memory is filled with 0xa5 before each block, and a canary
// behind it is looked at after. A load or store at an address that is no multiple of its size ends the process with a
// line: this is compiled so, and tensors begin at multiples of 64 here, of 512 there. What this cannot show: races
// between blocks, memory ordering, what is read behind shared memory, speed.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <deque>
#include <exception>
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
#define __grid_constant__
#define __align__(n) __attribute__((aligned(n)))

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

namespace darkmatter::cuda {
inline constexpr size_t kSharedBytes = 227 * 1024, kCanary = 4096;
inline constexpr int kMaxClusterBlocks = 2;
// Of the first block of a cluster (of the only one, without clusters), and of the others.
__attribute__((aligned(1024))) inline unsigned char memory[kSharedBytes + kCanary];
__attribute__((aligned(1024))) inline unsigned char others[kMaxClusterBlocks - 1][kSharedBytes + kCanary];
inline unsigned char* memory_of(int rank) { return rank == 0 ? memory : others[rank - 1]; }
}  // namespace darkmatter::cuda

namespace simt {

inline constexpr size_t kStack = 128 * 1024;
inline uint64_t seed = 1;  // of the order of threads; set by a test
inline int multiprocessors = 2, capability = 80, cluster_launches = 0;
inline size_t shared_limit = darkmatter::cuda::kSharedBytes;  // of a block

// Stacks are kept for the next block: making them would take longer than running it.
inline char* stack_of(int thread) {
  static std::vector<std::unique_ptr<char[]>> stacks;
  while (static_cast<int>(stacks.size()) <= thread) {
    stacks.emplace_back(new char[kStack]);
  }
  return stacks[thread].get();
}

using Work = std::function<void()>;

struct Fiber {
  dim3 thread;
  int rank;  // of its block in the cluster
  ucontext_t context;
  jmp_buf place;
  bool started = false, done = false;
  // Work that the thread has handed over and not waited for: groups that are closed, the one that is not, and whether
  // it may hand over more.
  std::deque<std::vector<Work>> groups;
  std::vector<Work> open;
  bool fenced = false;
  int votes = 0;  // of __syncthreads_or
};

// Threads of a warp exchanging values. Two sets of slots: nobody can be two exchanges ahead.
struct Meeting {
  unsigned arrived = 0;
  int parity = 0;
  uint64_t slots[2][32];
  std::vector<int> waiting;
};

// The threads of one block, or of the blocks of one cluster.
class Block {
 public:
  static Block*& current() {
    static Block* block = nullptr;
    return block;
  }

  Block(dim3 index, dim3 grid, int threads, int blocks, const Work& body)
      : grid(grid),
        threads(threads),
        index_(index),
        body_(body),
        fibers_(threads * blocks),
        at_barrier_(blocks),
        live_(blocks, threads),
        votes_(blocks),
        random_(seed * 0x9e3779b97f4a7c15 + 1) {
    for (int f = 0; f < threads * blocks; ++f) {
      fibers_[f].thread = dim3(f % threads, 0, 0);
      fibers_[f].rank = f / threads;
      ready_.push_back(f);
    }
  }

  void run() {
    current() = this;
    while (all_live() > 0) {
      const size_t choices = ready_.size() + (behind_.empty() ? 0 : 1);
      if (choices == 0) {
        throw std::runtime_error("emulated kernel: threads wait for others that never come");
      }
      const size_t pick = random() % choices;
      if (pick == ready_.size()) {
        run_behind();
        continue;
      }
      running_ = ready_[pick];
      ready_[pick] = ready_.back();
      ready_.pop_back();
      resume(fibers_[running_]);
      if (failure_) {
        std::rethrow_exception(failure_);
      }
      release_if_all();
    }
    if (!behind_.empty()) {
      throw std::runtime_error("emulated kernel: ends before a copy into its shared memory");
    }
    current() = nullptr;
  }

  Fiber& fiber() { return fibers_[running_]; }
  int thread() const { return running_; }
  bool lives(int rank) const { return live_[rank] > 0; }
  dim3 index() const { return dim3(index_.x + fibers_[running_].rank, index_.y, index_.z); }

  void sync() {
    at_barrier_[fibers_[running_].rank].push_back(running_);
    yield();
  }
  // Whether any thread says yes. Three slots: when a thread is past its barrier nobody reads the slot before, and
  // nobody writes the one after next.
  bool sync_or(bool yes) {
    const int vote = fibers_[running_].votes++;
    std::array<bool, 3>& slots = votes_[fibers_[running_].rank];
    slots[vote % 3] |= yes;
    sync();
    slots[(vote + 2) % 3] = false;
    return slots[vote % 3];
  }
  void sync_cluster() {
    at_cluster_barrier_.push_back(running_);
    yield();
  }

  // Until `holds`; asked again whenever someone calls wake() for the same thing.
  void wait_until(const void* thing, const std::function<bool()>& holds) {
    while (!holds()) {
      asleep_[thing].push_back(running_);
      yield();
    }
  }
  void wake(const void* thing) {
    std::vector<int>& asleep = asleep_[thing];
    ready_.insert(ready_.end(), asleep.begin(), asleep.end());
    asleep.clear();
  }

  // Work that runs behind the threads, at some time and in any order.
  void later(Work work) { behind_.push_back(std::move(work)); }

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

  dim3 grid;
  int threads;

 private:
  static void start() {
    Block& block = *current();
    try {
      block.body_();
    } catch (...) {
      block.failure_ = std::current_exception();
    }
    Fiber& fiber = block.fiber();
    fiber.done = true;
    --block.live_[fiber.rank];
    _longjmp(block.scheduler_, 1);
  }
  uint64_t random() {
    random_ = random_ * 6364136223846793005ull + 1442695040888963407ull;
    return random_ >> 33;
  }
  int all_live() const {
    int all = 0;
    for (const int live : live_) {
      all += live;
    }
    return all;
  }
  void run_behind() {
    std::swap(behind_[random() % behind_.size()], behind_.back());
    const Work work = std::move(behind_.back());
    behind_.pop_back();
    work();
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
    fiber.context.uc_stack.ss_sp = stack_of(running_);
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
    for (size_t rank = 0; rank < at_barrier_.size(); ++rank) {
      release(at_barrier_[rank], live_[rank]);
    }
    release(at_cluster_barrier_, all_live());
  }
  void release(std::vector<int>& waiting, int expected) {
    if (!waiting.empty() && static_cast<int>(waiting.size()) == expected) {
      ready_.insert(ready_.end(), waiting.begin(), waiting.end());
      waiting.clear();
    }
  }

  dim3 index_;
  const Work& body_;
  std::vector<Fiber> fibers_;
  std::vector<int> ready_, at_cluster_barrier_;
  std::map<const void*, std::vector<int>> asleep_;
  std::vector<std::vector<int>> at_barrier_;
  std::vector<int> live_;
  std::vector<std::array<bool, 3>> votes_;
  std::vector<Work> behind_;
  std::map<std::pair<int, unsigned>, Meeting> meetings_;
  std::exception_ptr failure_;
  jmp_buf scheduler_;
  uint64_t random_;
  int running_ = 0;
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

// Runs every block of a grid, `blocks` at a time: a cluster.
inline void run_grid(dim3 grid, int threads, size_t shared, const Work& body, int blocks = 1) {
  using darkmatter::cuda::kCanary;
  if (shared > shared_limit) {
    throw std::runtime_error("emulated kernel: asks for " + std::to_string(shared) + " bytes of shared memory");
  }
  if (grid.x % blocks != 0 || blocks > darkmatter::cuda::kMaxClusterBlocks) {
    throw std::runtime_error("emulated kernel: a grid that is not of whole clusters");
  }
  for (unsigned y = 0; y < grid.y; ++y) {
    for (unsigned x = 0; x < grid.x; x += blocks) {
      for (int rank = 0; rank < blocks; ++rank) {
        std::memset(darkmatter::cuda::memory_of(rank), 0xa5, shared + kCanary);
      }
      Block(dim3(x, y, 0), grid, threads, blocks, body).run();
      for (int rank = 0; rank < blocks; ++rank) {
        const unsigned char* behind = darkmatter::cuda::memory_of(rank) + shared;
        if (std::any_of(behind, behind + kCanary, [](unsigned char byte) { return byte != 0xa5; })) {
          throw std::runtime_error("emulated kernel: wrote behind its shared memory");
        }
      }
    }
  }
}

}  // namespace simt

#define threadIdx (simt::Block::current()->fiber().thread)
#define blockIdx (simt::Block::current()->index())
#define gridDim (simt::Block::current()->grid)

inline void __syncthreads() { simt::Block::current()->sync(); }
inline int __syncthreads_or(int yes) { return simt::Block::current()->sync_or(yes != 0); }
inline void __threadfence() {}
inline void __nanosleep(unsigned) {}
template <typename E>
E __ldcg(const E* from) {
  return *from;
}
inline void __syncwarp() { simt::Block::current()->exchange(0xffffffffu, 0); }
inline int __ffs(int bits) { return __builtin_ffs(bits); }
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
inline unsigned __reduce_or_sync(unsigned mask, unsigned value) {
  const auto all = simt::Block::current()->exchange(mask, value);
  unsigned bits = 0;
  for (int lane = 0; lane < 32; ++lane) {
    bits |= mask >> lane & 1 ? static_cast<unsigned>(all[lane]) : 0u;
  }
  return bits;
}
template <typename E>
E atomicAdd(E* to, E value) {
  const E before = *to;
  *to += value;
  return before;
}
inline void __stcs(uint4* to, uint4 value) { *to = value; }
template <typename E>
E atomicMax(E* to, E value) {
  const E before = *to;
  *to = std::max(before, value);
  return before;
}
template <typename E>
E atomicMin(E* to, E value) {
  const E before = *to;
  *to = std::min(before, value);
  return before;
}
