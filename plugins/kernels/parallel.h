// Threads that live for one call. A call starts them only if its work is large enough.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

namespace odtrt {

// How many threads to use so that each gets at least `min_share` of `work` units. wanted: the most that may be used;
// 0: one for each processor core.
inline int threads_for(size_t work, size_t min_share, int32_t wanted) {
  const size_t available = wanted > 0 ? static_cast<size_t>(wanted) : std::thread::hardware_concurrency();
  return static_cast<int>(std::max<size_t>(1, std::min(available, work / min_share)));
}

// Calls work(i) once for every i from 0 to count - 1, in any order, on this thread and num_threads - 1 more. Rethrows
// an exception of work.
template <typename Work>
void for_each_index(size_t count, int num_threads, const Work &work) {
  std::atomic<size_t> next{0};
  std::exception_ptr failure;
  std::mutex failure_mutex;
  const auto take_turns = [&]() noexcept {
    try {
      for (size_t i; (i = next.fetch_add(1)) < count;) work(i);
    } catch (...) {
      const std::lock_guard<std::mutex> lock(failure_mutex);
      failure = std::current_exception();
    }
  };
  const size_t others = std::min(static_cast<size_t>(num_threads), std::max<size_t>(count, 1)) - 1;
  std::vector<std::thread> threads;
  threads.reserve(others);
  try {
    while (threads.size() < others) threads.emplace_back(take_turns);
  } catch (...) {  // the system refuses a thread, so the running ones do all the work
  }
  take_turns();
  for (std::thread &thread : threads) thread.join();
  if (failure) std::rethrow_exception(failure);
}

}  // namespace odtrt
