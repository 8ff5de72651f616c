// The pool behind new_pooled: a list of unused blocks. A block is in use as long as a tensor, a view of it or a graph
// holds its storage: torch calls the deleter only after the last of them.
#include "cpu/kernels/pool.h"

#include <torch/csrc/stable/ops.h>

#include <cstdlib>
#include <list>
#include <mutex>
#include <unordered_map>

namespace darkmatter::cpu {

namespace {

constexpr size_t kSmallest = size_t{1} << 20, kLargest = size_t{256} << 20, kAlign = 4096;

struct Block {
  void* start;
  size_t bytes;
};

class Pool {
 public:
  // An unused block that is not much too large, else a new one; nullptr when there is no memory.
  void* take(size_t bytes) {
    const std::lock_guard<std::mutex> guard(mutex_);
    for (auto block = unused_.begin(); block != unused_.end(); ++block) {
      if (block->bytes >= bytes && block->bytes <= bytes + bytes / 4) {
        void* start = block->start;
        unused_bytes_ -= block->bytes;
        used_[start] = block->bytes;
        unused_.erase(block);
        return start;
      }
    }
    const size_t rounded = (bytes + kAlign - 1) / kAlign * kAlign;
    void* start = std::aligned_alloc(kAlign, rounded);
    if (start != nullptr) {
      used_[start] = rounded;
    }
    return start;
  }

  void give_back(void* start) {
    const std::lock_guard<std::mutex> guard(mutex_);
    const auto found = used_.find(start);
    unused_.push_back({start, found->second});
    unused_bytes_ += found->second;
    used_.erase(found);
    while (unused_bytes_ > limit_) {  // the longest unused goes first
      unused_bytes_ -= unused_.front().bytes;
      std::free(unused_.front().start);
      unused_.pop_front();
    }
  }

  bool serves(size_t bytes) const { return bytes >= kSmallest && bytes <= kLargest && bytes <= limit_; }

 private:
  static size_t limit_from_environment() {
    const char* text = std::getenv("DARKMATTER_POOL_MB");
    return text == nullptr ? size_t{512} << 20 : static_cast<size_t>(std::strtoull(text, nullptr, 10)) << 20;
  }

  const size_t limit_ = limit_from_environment();
  std::mutex mutex_;
  std::list<Block> unused_;
  std::unordered_map<void*, size_t> used_;
  size_t unused_bytes_ = 0;
};

// Never destroyed: tensors may outlive every static of this library.
Pool& pool() {
  static Pool& only = *new Pool;
  return only;
}

}  // namespace

Tensor new_pooled(const Tensor& like, const std::vector<int64_t>& shape) {
  std::vector<int64_t> strides(shape.size());
  int64_t numel = 1;
  for (size_t i = shape.size(); i-- > 0;) {
    strides[i] = numel;
    numel *= shape[i];
  }
  const size_t bytes = static_cast<size_t>(numel) * like.element_size();
  void* start = pool().serves(bytes) ? pool().take(bytes) : nullptr;
  if (start == nullptr) {
    return torch::stable::new_empty(like, shape);
  }
  return torch::stable::from_blob(
      start, shape, strides, like.device(), like.scalar_type(), [](void* block) { pool().give_back(block); });
}

}  // namespace darkmatter::cpu
