// The long convolution on the CPU through the C++ API: filters as long as the longest sequence. Rates count a
// multiplication and an addition for each token, channel and halving of its sequence.
#include <benchmark/benchmark.h>

#include <algorithm>
#include <cmath>

#include "conv1d_cases.h"
#include "cpu_threads.h"
#include "longconv/longconv.h"

namespace packseq::bench {
namespace {

struct LongConvCase {
  std::string name;
  std::vector<int> lengths;
  int channels;
  Dtype dtype;
};

// One case's tensors, and the calls over them.
struct Tensors {
  explicit Tensors(const LongConvCase& c) : cu(c.lengths.size() + 1, 0) {
    std::partial_sum(c.lengths.begin(), c.lengths.end(), cu.begin() + 1);
    const int64_t taps = *std::max_element(c.lengths.begin(), c.lengths.end());
    k.assign(size_t(taps) * size_t(c.channels), 0.01f);
    dk.resize(k.size());
    for (auto* t : {&u, &dout, &out, &du}) t->assign(size_t(cu.back()) * c.channels * size_of(c.dtype), 0x3c);
    const LongConvProblem p = {.dtype = c.dtype,
                               .total = cu.back(),
                               .sequences = int64_t(c.lengths.size()),
                               .channels = c.channels,
                               .cu_seqlens = cu.data(),
                               .reverse = false,
                               .u = {u.data(), c.channels},
                               .pre_gate = {},
                               .gate = {},
                               .k = k.data(),
                               .k_after = nullptr,
                               .taps = taps,
                               .taps_after = 0,
                               .D = nullptr};
    forward = {.problem = p, .out = out.data(), .workspace = nullptr};
    backward = {.problem = p,
                .dout = {dout.data(), c.channels},
                .du = du.data(),
                .dpre_gate = nullptr,
                .dgate = nullptr,
                .dk = dk.data(),
                .dk_after = nullptr,
                .dD = nullptr,
                .workspace = nullptr};
  }

  std::vector<int32_t> cu;
  std::vector<float> k, dk;
  std::vector<char> u, dout, out, du;
  LongConvForward forward;
  LongConvBackward backward;
};

void long_conv(benchmark::State& state, const LongConvCase& c, bool is_backward, int threads) {
  thread_count() = threads;
  const Executor executor = threads_executor();
  Tensors tensors(c);
  for (auto _ : state) {
    if (is_backward) {
      long_conv_backward(tensors.backward, executor);
    } else {
      long_conv_forward(tensors.forward, executor);
    }
    benchmark::ClobberMemory();
  }
  double work = 0;
  for (const int length : c.lengths) work += 2.0 * length * std::log2(std::max(2, length)) * c.channels;
  state.counters["rate"] = benchmark::Counter(work * double(state.iterations()), benchmark::Counter::kIsRate);
}

void add_benchmarks() {
  const int all = thread_count();
  for (const Dtype dtype : {Dtype::f32, Dtype::bf16}) {
    const std::vector<LongConvCase> cases = {
        {"8x1024 D256", std::vector<int>(8, 1024), 256, dtype},
        {"8x4096 D256", std::vector<int>(8, 4096), 256, dtype},
        {"1x65536 D256", {65536}, 256, dtype},
        {"packed 16 of 16384 D256", log_normal_lengths(16, 16384), 256, dtype},
        {"512x60 D256", std::vector<int>(512, 60), 256, dtype},
    };
    for (const LongConvCase& c : cases)
      for (const bool is_backward : {false, true})
        for (const int threads : {1, all}) {
          const std::string name = c.name + " " + name_of(dtype) + (is_backward ? " backward" : " forward") +
                                   " threads " + std::to_string(threads);
          benchmark::RegisterBenchmark(name.c_str(), long_conv, c, is_backward, threads)
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
