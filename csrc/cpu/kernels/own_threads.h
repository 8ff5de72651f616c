// Threads that ThreadSanitizer understands, in the place of torch's, whose waiting for each other it cannot see. Only
// in the build of `make sanitize`: slow, and with no pool.
#pragma once

#include <algorithm>
#include <cstdint>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

namespace darkmatter::cpu {

inline thread_local bool within_part = false;  // whether this thread runs a part of another's loop

// Runs body(begin, end) over parts of [0, n), at least `grain` items each, on as many as four threads. Within such a
// part the caller's thread does all, as with torch's. The first exception is thrown again.
template <typename Body>
void on_own_threads(int64_t n, int64_t grain, const Body& body) {
  constexpr int64_t kThreads = 4;
  const int64_t part = std::max({grain, (n + kThreads - 1) / kThreads, int64_t{1}});
  if (within_part || n <= part) {
    if (n > 0) {
      body(int64_t{0}, n);
    }
    return;
  }
  std::mutex mutex;
  std::exception_ptr failure;
  std::vector<std::thread> threads;
  for (int64_t begin = 0; begin < n; begin += part) {
    threads.emplace_back([&, begin] {
      within_part = true;
      try {
        body(begin, std::min(n, begin + part));
      } catch (...) {
        const std::lock_guard<std::mutex> guard(mutex);
        failure = failure ? failure : std::current_exception();
      }
    });
  }
  for (auto& thread : threads) {
    thread.join();
  }
  if (failure) {
    std::rethrow_exception(failure);
  }
}

}  // namespace darkmatter::cpu
