// The selective scan on the CPU through the C++ API: tokens/s, and steps/s, where a step is one state of one channel at
// one token.
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "cpu_benchmark.h"
#include "scan/scan.h"

namespace packseq::bench {
namespace {

struct ScanShape {
  std::string name;
  std::vector<int> lengths;
  int channels, states;
  Dtype dtype = Dtype::f32;
  bool complex = false;
};

// As a Mamba block calls it: B and C of every token, D, z, a bias and softplus.
struct ScanBatch {
  explicit ScanBatch(const ScanShape& s) : shape(s) {
    for (int n : s.lengths) cu.push_back(cu.back() + n);
    const size_t rows = size_t(cu.back()), parts = s.complex ? 2 : 1, wide = rows * size_t(s.channels);
    const size_t matrix = rows * size_t(s.states) * parts, states = size_t(s.channels * s.states) * parts;
    for (auto* x : {&u, &delta, &z, &dout}) *x = tokens(wide, s.dtype);
    for (auto* x : {&B, &C}) *x = tokens(matrix, s.complex ? Dtype::f32 : s.dtype);
    for (auto* x : {&out, &du, &ddelta, &dz}) x->resize(wide * size_of(s.dtype));
    for (auto* x : {&dB, &dC}) x->resize(matrix * 4);
    for (auto* x : {&D, &bias, &dD, &dbias}) x->assign(size_t(s.channels), 0.1f);
    A.resize(states), dA.resize(states);
    for (size_t i = 0; i < states; ++i) A[i] = -float(1 + i % size_t(s.states));
    pool.resize(s.lengths.size() * states);
  }

  ScanProblem problem() const {
    const ScanShape& s = shape;
    const int64_t channels = s.channels;
    return {.dtype = s.dtype,
            .complex = s.complex,
            .total = cu.back(),
            .sequences = int64_t(s.lengths.size()),
            .channels = s.channels,
            .states = s.states,
            .groups = 1,
            .cu_seqlens = cu.data(),
            .reverse = false,
            .delta_softplus = true,
            .u = {u.data(), channels},
            .delta = {delta.data(), channels},
            .z = {z.data(), channels},
            .A = A.data(),
            .B = {{B.data(), s.states, s.states}, nullptr},
            .C = {{C.data(), s.states, s.states}, nullptr},
            .D = D.data(),
            .delta_bias = bias.data(),
            .initial_states = nullptr};
  }

  void forward(const Executor& executor) {
    scan_forward({.problem = problem(), .out = out.data(), .final_states = nullptr, .workspace = nullptr}, executor);
  }

  void backward(const Executor& executor) {
    scan_backward({.problem = problem(),
                   .dout = {dout.data(), shape.channels},
                   .dfinal_states = nullptr,
                   .du = du.data(),
                   .ddelta = ddelta.data(),
                   .dz = dz.data(),
                   .dA = dA.data(),
                   .dB = dB.data(),
                   .dC = dC.data(),
                   .dD = dD.data(),
                   .ddelta_bias = dbias.data(),
                   .dinitial_states = nullptr,
                   .workspace = nullptr},
                  executor);
  }

  void step(const Executor& executor) {
    scan_step({.problem = problem(),
               .pool = pool.data(),
               .slots = int64_t(shape.lengths.size()),
               .indices = nullptr,
               .out = out.data()},
              executor);
  }

  // Random numbers; the bits of a half type's are the upper half of a float's, which are small numbers in float16.
  static std::vector<char> tokens(size_t count, Dtype t) {
    static std::mt19937 random(1);
    std::normal_distribution<float> normal;
    std::vector<char> bytes(count * size_of(t));
    for (size_t i = 0; i < count; ++i) {
      const float x = normal(random);
      std::memcpy(&bytes[i * size_of(t)], reinterpret_cast<const char*>(&x) + 4 - size_of(t), size_of(t));
    }
    return bytes;
  }

  ScanShape shape;
  std::vector<int32_t> cu = {0};
  std::vector<char> u, delta, z, dout, B, C, out, du, ddelta, dz, dB, dC;
  std::vector<float> A, D, bias, dA, dD, dbias, pool;
};

void scan(benchmark::State& state, const ScanShape& shape, void (ScanBatch::*call)(const Executor&)) {
  const Executor executor = threads_executor();
  ScanBatch batch(shape);
  repeat(state, [&] { (batch.*call)(executor); });
  const double tokens = double(batch.cu.back());
  add_rate(state, "tokens", tokens);
  add_rate(state, "steps", tokens * double(shape.channels * shape.states));
}

// Documents of very different lengths that hold as many tokens as the even batch.
std::vector<int> mixed_lengths(int tokens) {
  std::mt19937 random(2);
  std::lognormal_distribution<double> length(4.5, 1.2);
  std::vector<int> lengths;
  for (int rest = tokens; rest > 0; rest -= lengths.back()) {
    lengths.push_back(std::min(rest, 1 + int(length(random))));
  }
  return lengths;
}

void add_benchmarks() {
  const auto add = [](const std::string& what, const ScanShape& shape, void (ScanBatch::*call)(const Executor&)) {
    add_benchmark_by_threads(what + " " + shape.name, [=](benchmark::State& state) { scan(state, shape, call); });
  };
  const std::vector<int> even = {1024, 1024};
  for (const ScanShape& shape : {ScanShape{"f32 B2 L1024 D512 N16", even, 512, 16},
                                 {"bf16 B2 L1024 D512 N16", even, 512, 16, Dtype::bf16},
                                 {"f32 2048 tokens mixed D512 N16", mixed_lengths(2048), 512, 16},
                                 {"f32 B1 L8192 D512 N16", {8192}, 512, 16},
                                 {"f32 B2 L1024 D512 N64", even, 512, 64},
                                 {"complex B2 L1024 D512 N16", even, 512, 16, Dtype::f32, true}}) {
    add("forward", shape, &ScanBatch::forward);
    add("backward", shape, &ScanBatch::backward);
  }
  for (int sequences : {1, 64}) {
    add("step", {"f32 B" + std::to_string(sequences) + " D1536 N16", std::vector<int>(size_t(sequences), 1), 1536, 16},
        &ScanBatch::step);
  }
}

}  // namespace
}  // namespace packseq::bench

int main(int argc, char** argv) {
  packseq::bench::add_benchmarks();
  return packseq::bench::run_benchmarks(argc, argv);
}
