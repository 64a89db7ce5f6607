// Attention on the CPU through the C++ API, over attention_cases.txt: GFLOP/s, GB/s and the part of a measured FMA
// peak.
#include <cmath>
#include <cstring>
#include <map>
#include <random>

#include "attention/attention.h"
#include "attention_cases.h"
#include "cpu_benchmark.h"
#include "cpu_peak.h"

namespace packseq::bench {
namespace {

// `count` standard normal elements of a dtype.
std::vector<char> normal(Dtype dtype, int64_t count, uint32_t seed) {
  std::mt19937 generator(seed);
  std::normal_distribution<float> draw;
  std::vector<char> data(size_t(count) * size_of(dtype));
  for (int64_t i = 0; i < count; ++i) {
    const float x = draw(generator);
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof(x));
    if (dtype == Dtype::bf16) bits >>= 16;  // rounded towards zero, which is as random
    std::memcpy(&data[size_t(i) * size_of(dtype)], &bits, size_of(dtype));
  }
  return data;
}

// A case's tensors and the calls over them.
struct Tensors {
  Tensors(const Case& c, Dtype dtype) : count(c.total() * c.heads * c.dim), cu(c.cu_seqlens()) {
    for (uint32_t i = 0; i < 4; ++i) inputs.push_back(normal(dtype, count, i));
    for (auto* x : {&out, &dq, &dk, &dv}) x->resize(size_t(count) * size_of(dtype));
    lse.resize(size_t(c.total() * c.heads));
    const auto packed = [&](int i) {
      return Packed{.data = inputs[size_t(i)].data(), .token = int64_t(c.heads) * c.dim, .head = c.dim};
    };
    const AttentionProblem problem = {.dtype = dtype,
                                      .total_q = c.total(),
                                      .total_k = c.total(),
                                      .sequences = int64_t(c.lengths.size()),
                                      .heads = c.heads,
                                      .kv_heads = c.heads,
                                      .dim = c.dim,
                                      .dim_v = c.dim,
                                      .cu_seqlens_q = cu.data(),
                                      .cu_seqlens_k = cu.data(),
                                      .q = packed(0),
                                      .k = packed(1),
                                      .v = packed(2),
                                      .scale = 1 / std::sqrt(double(c.dim)),
                                      .causal = c.causal,
                                      .window_left = -1,
                                      .window_right = -1,
                                      .sink_tokens = 0,
                                      .softcap = 0,
                                      .alibi_slopes = nullptr,
                                      .sinks = nullptr};
    forward = {.problem = problem, .out = out.data(), .lse = lse.data(), .workspace = nullptr};
    backward = {.problem = problem,
                .dout = packed(3),
                .out = out.data(),
                .lse = lse.data(),
                .dlse = nullptr,
                .dq = dq.data(),
                .dk = dk.data(),
                .dv = dv.data(),
                .dsinks = nullptr,
                .workspace = nullptr};
  }

  int64_t count;
  std::vector<int32_t> cu;
  std::vector<std::vector<char>> inputs;
  std::vector<char> out, dq, dk, dv;
  std::vector<float> lse;
  AttentionForward forward;
  AttentionBackward backward;
};

// Measured once for each number of threads.
double cpu_peak(int threads) {
  static std::map<int, double> peaks;
  const auto [peak, is_new] = peaks.try_emplace(threads);
  if (is_new) peak->second = measure_cpu_peak();
  return peak->second;
}

void attention(benchmark::State& state, const Case& c, Dtype dtype, bool backward) {
  const double peak = cpu_peak(thread_count());
  const Executor executor = threads_executor();
  Tensors tensors(c, dtype);
  attention_forward(tensors.forward, executor);
  const double seconds = repeat(state, [&] {
    backward ? attention_backward(tensors.backward, executor) : attention_forward(tensors.forward, executor);
  });
  add_rate(state, "FLOP", c.flops(backward));
  add_rate(state, "bytes", c.bytes(backward, size_of(dtype)));
  state.counters["peak_%"] = 100 * c.flops(backward) * double(state.iterations()) / seconds / peak;
}

void add_benchmarks() {
  for (const Case& c : attention_cases("cpu"))
    for (const bool backward : {false, true})
      for (const Dtype dtype : {Dtype::f32, Dtype::bf16})
        add_benchmark_by_threads(c.name + (backward ? " backward " : " forward ") + name_of(dtype),
                                 [=](benchmark::State& state) { attention(state, c, dtype, backward); });
}

}  // namespace
}  // namespace packseq::bench

int main(int argc, char** argv) {
  packseq::bench::add_benchmarks();
  return packseq::bench::run_benchmarks(argc, argv);
}
