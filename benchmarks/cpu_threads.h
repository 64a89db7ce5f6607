// An Executor over plain threads, for programs without torch.
#pragma once
#include <algorithm>
#include <cstdint>
#include <thread>
#include <vector>

#include "core/executor.h"

namespace packseq::bench {

inline int& thread_count() {
  static int count = std::max(1, int(std::thread::hardware_concurrency()));
  return count;
}

// Cuts as torch's pool does: equal ranges, one a thread, none below the grain. Starting a thread costs some 20 us, so
// this is for work of a millisecond and more.
inline void run_on_threads(int64_t count, int64_t grain, Executor::Body body, void* context) {
  const int64_t threads = std::clamp<int64_t>(count / std::max<int64_t>(grain, 1), 1, thread_count());
  const int64_t range = (count + threads - 1) / threads;
  std::vector<std::jthread> others;
  for (int64_t begin = range; begin < count; begin += range) {
    others.emplace_back(body, context, begin, std::min(begin + range, count));
  }
  if (count > 0) body(context, 0, std::min(range, count));
}

inline Executor threads_executor() { return {run_on_threads, thread_count()}; }

}  // namespace packseq::bench
