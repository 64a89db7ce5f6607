// The long convolution on the CPU through the C++ API: filters as long as the longest sequence. Rates count a
// multiplication and an addition for each token, channel and halving of its sequence.
#include <algorithm>
#include <cmath>

#include "case_lengths.h"
#include "cpu_benchmark.h"
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

void long_conv(benchmark::State& state, const LongConvCase& c, bool is_backward) {
  const Executor executor = threads_executor();
  Tensors tensors(c);
  repeat(state, [&] {
    is_backward ? long_conv_backward(tensors.backward, executor) : long_conv_forward(tensors.forward, executor);
  });
  double work = 0;
  for (const int length : c.lengths) work += 2.0 * length * std::log2(std::max(2, length)) * c.channels;
  add_rate(state, "rate", work);
}

void add_benchmarks() {
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
        add_benchmark_by_threads(c.name + " " + name_of(dtype) + (is_backward ? " backward" : " forward"),
                                 [=](benchmark::State& state) { long_conv(state, c, is_backward); });
  }
}

}  // namespace
}  // namespace packseq::bench

int main(int argc, char** argv) {
  packseq::bench::add_benchmarks();
  return packseq::bench::run_benchmarks(argc, argv);
}
