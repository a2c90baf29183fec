// Work on XLA's own threads; for native.cc.

#pragma once

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

// Runs f(0) ... f(count - 1), on the caller's thread and those of XLA's pool that come in time. The caller waits only for tasks
// that some thread has begun, so that a pool whose threads all wait here is no deadlock.
template <typename Make>
void in_parallel(ffi::ThreadPool& pool, int64_t count, Make make) {
  struct Shared {
    std::atomic<int64_t> next{0};
    std::mutex mutex;
    std::condition_variable all_done;
    int64_t done = 0;
  };
  auto shared = std::make_shared<Shared>();
  auto work = [shared, count, make]() {
    int64_t index = shared->next.fetch_add(1);
    if (index >= count) return;  // too late: what ``make`` refers to may be gone
    auto task = make();
    int64_t mine = 0;
    for (; index < count; index = shared->next.fetch_add(1), ++mine) task(index);
    std::lock_guard<std::mutex> lock(shared->mutex);
    shared->done += mine;
    if (shared->done == count) shared->all_done.notify_all();
  };
  const int64_t helpers = std::min<int64_t>(pool.num_threads(), count) - 1;
  for (int64_t i = 0; i < helpers; ++i) pool.Schedule(std::function<void()>(work));
  work();
  std::unique_lock<std::mutex> lock(shared->mutex);
  shared->all_done.wait(lock, [&] { return shared->done == count; });
}

}  // namespace
