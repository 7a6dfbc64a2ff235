// Runs a loop on XLA's own thread pool; no threads of our own.
#pragma once
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>

#include "xla/ffi/api/ffi.h"

namespace q4 {

// Calls body(i) for i in [0, count), from the calling thread and up to `threads - 1` of the pool's.
// The caller takes work too and waits only for items that were started, so a busy pool delays
// nothing and a late worker finds nothing to do. A bound of one thread runs everything here.
template <class Body>
void ParallelFor(xla::ffi::ThreadPool& pool, int64_t threads, int64_t count, const Body& body) {
  if (threads > count) threads = count;
  if (threads <= 1) {
    for (int64_t i = 0; i < count; i++) body(i);
    return;
  }
  struct State {
    std::atomic<int64_t> next{0}, done{0};
    std::mutex mutex;
    std::condition_variable finished;
  };
  auto state = std::make_shared<State>();  // Late workers may outlive this call.
  auto work = [state, count, &body] {
    int64_t i;
    while ((i = state->next.fetch_add(1)) < count) {
      body(i);
      if (state->done.fetch_add(1) + 1 == count) {
        std::lock_guard<std::mutex> lock(state->mutex);
        state->finished.notify_one();
      }
    }
  };
  for (int64_t t = 1; t < threads; t++) pool.Schedule(decltype(work)(work));
  work();
  // The tail is short, a tile or two on another core: spin a little before sleeping.
  for (int spin = 0; spin < 4000; spin++) {
    if (state->done.load() == count) return;
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
  }
  std::unique_lock<std::mutex> lock(state->mutex);
  state->finished.wait(lock, [&] { return state->done.load() == count; });
}

}  // namespace q4
