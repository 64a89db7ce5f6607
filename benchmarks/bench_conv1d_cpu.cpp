// The causal convolution on the CPU through the C++ API: bytes/s, each tensor counted once, and the percentage of what
// memcpy reaches.
#include "case_lengths.h"
#include "conv1d_cases.h"
#include "cpu_benchmark.h"

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

void conv1d(benchmark::State& state, const Conv1dCase& c, bool is_backward) {
  const Executor executor = threads_executor();
  Tensors tensors(c);
  repeat_against_copy(state, c.bytes(is_backward), [&] {
    is_backward ? conv1d_backward(tensors.backward, executor) : conv1d_forward(tensors.forward, executor);
  });
}

void add_benchmarks() {
  for (const Dtype dtype : {Dtype::f32, Dtype::bf16}) {
    const std::vector<Conv1dCase> cases = {{"2x2048 D2048", std::vector<int>(2, 2048), 2048, dtype},
                                           {"packed 64 of 4096 D2048", log_normal_lengths(64, 4096), 2048, dtype},
                                           {"1024x4 D2048", std::vector<int>(1024, 4), 2048, dtype}};
    for (const Conv1dCase& c : cases)
      for (const bool is_backward : {false, true})
        add_benchmark_by_threads(c.name + " " + name_of(dtype) + (is_backward ? " backward" : " forward"),
                                 [=](benchmark::State& state) { conv1d(state, c, is_backward); });
  }
}

}  // namespace
}  // namespace packseq::bench

int main(int argc, char** argv) {
  packseq::bench::add_benchmarks();
  return packseq::bench::run_benchmarks(argc, argv);
}
