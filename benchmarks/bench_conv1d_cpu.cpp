// The causal convolution on the CPU through the C++ API: bytes/s, each tensor counted once, and the percentage of what
// memcpy reaches.
#include <benchmark/benchmark.h>

#include <chrono>
#include <cstring>

#include "conv1d_cases.h"
#include "cpu_threads.h"

namespace packseq::bench {
namespace {

// One case's tensors, and the calls over them.
struct Tensors {
  explicit Tensors(const Conv1dCase& c)
      : cu(c.cu_seqlens()),
        weight(size_t(c.channels) * 4, 0.25f),
        bias(size_t(c.channels), 0.1f),
        dweight(weight.size()),
        dbias(bias.size()) {
    for (auto* t : {&x, &dout, &out, &dx}) t->assign(size_t(c.elements()) * size_of(c.dtype), 0x3c);
    const Conv1dProblem p = c.problem(cu.data(), x.data(), weight.data(), bias.data());
    forward = {.problem = p, .out = out.data(), .final_states = nullptr};
    backward = {.problem = p,
                .dout = {dout.data(), c.channels},
                .dfinal_states = nullptr,
                .dx = dx.data(),
                .dweight = dweight.data(),
                .dbias = dbias.data(),
                .dinitial_states = nullptr,
                .workspace = nullptr};
  }

  std::vector<int32_t> cu;
  std::vector<float> weight, bias, dweight, dbias;
  std::vector<char> x, dout, out, dx;
  Conv1dForward forward;
  Conv1dBackward backward;
};

// Seconds of a memcpy on the same threads that reads and writes `bytes` in all.
double copy_seconds(double bytes) {
  std::vector<char> from(size_t(bytes / 2), 1), to(from.size());
  double best = 1e9;
  for (int run = 0; run < 10; ++run) {
    const auto begin = std::chrono::steady_clock::now();
    threads_executor().parallel_for(int64_t(from.size()), 64 * 1024, [&](int64_t first, int64_t last) {
      std::memcpy(&to[size_t(first)], &from[size_t(first)], size_t(last - first));
    });
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - begin;
    best = std::min(best, seconds.count());
  }
  return best;
}

void conv1d(benchmark::State& state, const Conv1dCase& c, bool is_backward, int threads) {
  thread_count() = threads;
  const Executor executor = threads_executor();
  Tensors tensors(c);
  const auto begin = std::chrono::steady_clock::now();
  for (auto _ : state) {
    if (is_backward) {
      conv1d_backward(tensors.backward, executor);
    } else {
      conv1d_forward(tensors.forward, executor);
    }
    benchmark::ClobberMemory();
  }
  const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - begin;
  const double runs = double(state.iterations()), bytes = c.bytes(is_backward);
  state.counters["bytes"] = benchmark::Counter(bytes * runs, benchmark::Counter::kIsRate);
  state.counters["memcpy_%"] = 100 * copy_seconds(bytes) * runs / seconds.count();
}

void add_benchmarks() {
  const int all = thread_count();
  for (const Dtype dtype : {Dtype::f32, Dtype::bf16}) {
    const std::vector<Conv1dCase> cases = {{"2x2048 D2048", std::vector<int>(2, 2048), 2048, dtype},
                                           {"packed 64 of 4096 D2048", log_normal_lengths(64, 4096), 2048, dtype},
                                           {"1024x4 D2048", std::vector<int>(1024, 4), 2048, dtype}};
    for (const Conv1dCase& c : cases)
      for (const bool is_backward : {false, true})
        for (const int threads : {1, all}) {
          const std::string name = c.name + " " + name_of(dtype) + (is_backward ? " backward" : " forward") +
                                   " threads " + std::to_string(threads);
          benchmark::RegisterBenchmark(name.c_str(), conv1d, c, is_backward, threads)
              ->UseRealTime()
              ->Unit(benchmark::kMillisecond);
          if (all == 1) break;
        }
  }
}

}  // namespace
}  // namespace packseq::bench

int main(int argc, char** argv) {
  packseq::bench::add_benchmarks();
  benchmark::Initialize(&argc, argv);
  if (benchmark::ReportUnrecognizedArguments(argc, argv)) return 1;
  benchmark::RunSpecifiedBenchmarks();
}
