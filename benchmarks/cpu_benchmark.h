// What the CPU's benchmark programs share: registering cases, with one thread and with all; rates; and main().
#pragma once
#include <benchmark/benchmark.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <set>
#include <string>
#include <vector>

#include "cpu_threads.h"

namespace packseq::bench {

// f(state), timed by the wall clock.
template <class F>
void add_benchmark(const std::string& name, const F& f) {
  benchmark::RegisterBenchmark(name.c_str(), f)->UseRealTime()->Unit(benchmark::kMillisecond);
}

// The same with one thread, then with all.
template <class F>
void add_benchmark_by_threads(const std::string& name, const F& f) {
  for (const int threads : std::set{1, thread_count()}) {
    add_benchmark(name + " threads " + std::to_string(threads), [threads, f](benchmark::State& state) {
      thread_count() = threads;
      f(state);
    });
  }
}

// Runs run() as often as it takes; the seconds of all runs.
template <class F>
double repeat(benchmark::State& state, const F& run) {
  const auto begin = std::chrono::steady_clock::now();
  for (auto _ : state) {
    run();
    benchmark::ClobberMemory();
  }
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
}

// `each` of something an iteration, as a rate.
inline void add_rate(benchmark::State& state, const char* name, double each) {
  state.counters[name] = benchmark::Counter(each * double(state.iterations()), benchmark::Counter::kIsRate);
}

// Seconds of a memcpy, cut as the operators' work is, that reads and writes `bytes` in all.
inline double copy_seconds(double bytes) {
  std::vector<char> from(size_t(bytes / 2), 1), to(from.size());
  double best = 1e9;
  for (int run = 0; run < 10; ++run) {
    const auto begin = std::chrono::steady_clock::now();
    threads_executor().parallel_for(int64_t(from.size()), 64 * 1024, [&](int64_t first, int64_t last) {
      std::memcpy(&to[size_t(first)], &from[size_t(first)], size_t(last - first));
    });
    best = std::min(best, std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count());
  }
  return best;
}

// Of run(), which moves `bytes`: their rate, and the percentage of what memcpy reaches.
template <class F>
void repeat_against_copy(benchmark::State& state, double bytes, const F& run) {
  const double seconds = repeat(state, run);
  add_rate(state, "bytes", bytes);
  state.counters["memcpy_%"] = 100 * copy_seconds(bytes) * double(state.iterations()) / seconds;
}

inline int run_benchmarks(int argc, char** argv) {
  benchmark::Initialize(&argc, argv);
  if (benchmark::ReportUnrecognizedArguments(argc, argv)) return 1;
  benchmark::RunSpecifiedBenchmarks();
  return 0;
}

}  // namespace packseq::bench
