// Executors that results must not depend on.
#pragma once
#include <algorithm>
#include <thread>
#include <vector>

#include "core/executor.h"

namespace packseq::testing {

// Ranges in threads of their own, as many at most as it says.
template <int kThreads = 3>
Executor threaded() {
  return {[](int64_t count, int64_t, Executor::Body body, void* context) {
            std::vector<std::thread> threads;
            const int64_t step = (count + kThreads - 1) / kThreads;
            for (int64_t i = 0; i < count; i += step) {
              threads.emplace_back([=] { body(context, i, std::min(i + step, count)); });
            }
            for (std::thread& t : threads) t.join();
          },
          kThreads};
}

// Claims many threads, but runs everything as one range.
inline Executor one_range() {
  return {[](int64_t count, int64_t, Executor::Body body, void* context) {
            if (count > 0) body(context, 0, count);
          },
          7};
}

}  // namespace packseq::testing
