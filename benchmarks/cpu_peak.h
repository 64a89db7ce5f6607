// float32 FLOP/s this machine reaches in a loop of independent fused multiply-adds, the yardstick of the CPU
// benchmarks.
#pragma once
#include <algorithm>
#include <chrono>
#include <numeric>
#include <vector>

#include "cpu_threads.h"

namespace packseq::bench {

constexpr int kFmaChains = 12;  // covers the latency of two pipes, fits sixteen registers
constexpr int kFmaSteps = 1'000'000;

// Returns the FLOP it did. `kBytes` is the vector's width.
template <int kBytes>
[[gnu::always_inline]] inline double fma_loop(float seed) {
  typedef float Vector __attribute__((vector_size(kBytes)));
  Vector sum[kFmaChains];
  for (int i = 0; i < kFmaChains; ++i) sum[i] = Vector{} + (seed + float(i));
  const Vector scale = Vector{} + (1 - 1e-6f * seed), add = Vector{} + 1e-6f * seed;
  for (int step = 0; step < kFmaSteps; ++step) {
#pragma GCC unroll 12
    for (int i = 0; i < kFmaChains; ++i) sum[i] = sum[i] * scale + add;
  }
  for (int i = 0; i < kFmaChains; ++i) asm volatile("" ::"m"(sum[i]));
  return 2.0 * kFmaChains * kFmaSteps * (kBytes / sizeof(float));
}

#ifdef __x86_64__
[[gnu::target("avx512f"), gnu::noinline]] inline double fma_avx512(float seed) { return fma_loop<64>(seed); }
[[gnu::target("avx2,fma"), gnu::noinline]] inline double fma_avx2(float seed) { return fma_loop<32>(seed); }
#endif
[[gnu::noinline]] inline double fma_baseline(float seed) { return fma_loop<16>(seed); }

inline double best_fma_loop(float seed) {
#ifdef __x86_64__
  if (__builtin_cpu_supports("avx512f")) return fma_avx512(seed);
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return fma_avx2(seed);
#endif
  return fma_baseline(seed);
}

// On thread_count() threads at once: the best of many runs of a few milliseconds, since whatever else runs only slows
// it.
inline double measure_cpu_peak() {
  double best = 0;
  for (int run = 0; run < 40; ++run) {
    std::vector<double> flops(size_t(thread_count()), 0.0);
    const auto begin = std::chrono::steady_clock::now();
    threads_executor().parallel_for(thread_count(), 1, [&](int64_t from, int64_t to) {
      for (int64_t i = from; i < to; ++i) flops[size_t(i)] = best_fma_loop(1 + float(i));
    });
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - begin;
    best = std::max(best, std::accumulate(flops.begin(), flops.end(), 0.0) / seconds.count());
  }
  return best;
}

}  // namespace packseq::bench
