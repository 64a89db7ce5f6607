// S4's filters and its step on the GPU through the C++ API: milliseconds, pairs of a pole and a node (a step) a second,
// the part of the time that the sums' own operations take at the declared FP32 rate, and that their bytes take in a
// device copy. The larger part is how near a call is to its floor.
#include <cmath>

#include "gpu_report.cuh"
#include "longconv/filters.h"
#include "longconv/s4_step.h"

namespace packseq::bench {
namespace {

constexpr int kPoles = 32;  // of conjugate pairs: a state of 64
constexpr double kPi = 3.14159265358979323846;

// FP32 operations of a pair of poles at one node, as the kernels count them; nodes are imaginary, as S4's are. The
// spectrum's are of one filter of rank 1: 7 for the denominator and 4 for each of its four sums; backward three of
// those sums once more, then 56 for the gradients of a pole.
constexpr double kCauchy = 10, kCauchyBackward = 19;
constexpr double kVandermonde = 2, kVandermondeBackward = 4;
constexpr double kSpectrum = 7 + 4 * 4, kSpectrumBackward = 7 + 3 * 4 + 56;

// Time steps of S4's rows, 1e-3 to 1e-1.
std::vector<float> time_steps(int64_t rows) {
  std::vector<float> dt;
  for (int64_t h = 0; h < rows; ++h) dt.push_back(float(1e-3 * std::pow(100.0, double(h) / double(rows))));
  return dt;
}

// S4's poles, -1/2 + i pi n, each row's times `by`.
std::vector<float> poles(const std::vector<float>& by) {
  std::vector<float> w;
  for (const float x : by)
    for (int n = 0; n < kPoles; ++n) w.push_back(-0.5f * x), w.push_back(float(kPi) * float(n) * x);
  return w;
}

// z = 2 (1 - o) / (1 + o), o = exp(-i theta), for theta from 0 to below pi.
std::vector<float> frequencies(int64_t nodes) {
  std::vector<float> z;
  for (int64_t l = 0; l < nodes; ++l) {
    z.push_back(0.0f), z.push_back(float(2 * std::tan(kPi * double(l) / double(2 * nodes))));
  }
  return z;
}

// A call's sizes and memory.
struct Filters {
  explicit Filters(nvbench::state& state)
      : rows(state.get_int64("Rows")),
        nodes(state.get_int64("Nodes")),
        backward(state.get_string("Direction") == "backward") {}

  // Complex numbers of the rows' poles and nodes.
  char* of_poles() { return constant(memory, rows * kPoles * kComplex); }
  char* of_nodes() { return constant(memory, rows * nodes * kComplex); }

  // node_bytes: of a row's node; tensors: how many numbers a pole has, backward with their gradients.
  template <class F>
  void report(nvbench::state& state, double operations, int node_bytes, int tensors, const F& run) {
    measure(state, run);
    const double pairs = double(rows * nodes) * kPoles, seconds = gpu_seconds(state);
    add_milliseconds(state);
    add_column(state, "Gpairs/s", pairs / seconds * 1e-9);
    add_column(state, "of FP32 rate", operations * pairs / declared_fp32_rate() / seconds, "percentage");
    add_bytes(state, double(rows * nodes) * node_bytes + double(rows * kPoles) * kComplex * tensors);
  }

  static constexpr int kComplex = 2 * sizeof(float);
  int64_t rows, nodes;
  bool backward;
  DeviceMemory memory;
};

void cauchy(nvbench::state& state) {
  Filters f(state);
  const CauchyProblem p = {.real = Dtype::f32,
                           .conjugate = true,
                           .groups = 1,
                           .rows = f.rows,
                           .nodes = f.nodes,
                           .poles = kPoles,
                           .v = f.of_poles(),
                           .z = f.memory.copy(frequencies(f.nodes)),
                           .w = f.memory.copy(poles(time_steps(f.rows)))};
  if (!f.backward) {
    const CauchyForward call = {.problem = p, .out = f.of_nodes()};
    return f.report(state, kCauchy, Filters::kComplex, 2, [&](cudaStream_t s) { cauchy_forward(call, s); });
  }
  const CauchyBackward call = {.problem = p,
                               .dout = f.of_nodes(),
                               .dv = f.of_poles(),
                               .dz = nullptr,
                               .dw = f.of_poles(),
                               .workspace = f.memory.take<char>(int64_t(cauchy_backward_workspace(p, false)))};
  f.report(state, kCauchyBackward, Filters::kComplex, 4, [&](cudaStream_t s) { cauchy_backward(call, s); });
}

void vandermonde(nvbench::state& state) {
  Filters f(state);
  const VandermondeProblem p = {.real = Dtype::f32,
                                .conjugate = true,
                                .groups = 1,
                                .rows = f.rows,
                                .length = f.nodes,
                                .poles = kPoles,
                                .x = f.memory.copy(poles(time_steps(f.rows)))};
  const void* const v = f.of_poles();
  if (!f.backward) {
    const VandermondeForward call = {.problem = p, .v = v, .out = f.of_nodes()};
    return f.report(state, kVandermonde, sizeof(float), 2, [&](cudaStream_t s) { vandermonde_forward(call, s); });
  }
  const VandermondeBackward call = {.problem = p,
                                    .v = v,
                                    .dout = f.of_nodes(),
                                    .dv = f.of_poles(),
                                    .dx = f.of_poles(),
                                    .workspace = f.memory.take<char>(int64_t(vandermonde_backward_workspace(p)))};
  f.report(state, kVandermondeBackward, sizeof(float), 4, [&](cudaStream_t s) { vandermonde_backward(call, s); });
}

void spectrum(nvbench::state& state) {
  Filters f(state);
  const S4Problem p = {.real = Dtype::f32,
                       .filters = 1,
                       .channels = f.rows,
                       .length = 2 * (f.nodes - 1),
                       .poles = kPoles,
                       .rank = 1,
                       .w = f.memory.copy(poles(std::vector<float>(size_t(f.rows), 1.0f))),
                       .P = f.of_poles(),
                       .B = f.of_poles(),
                       .C = f.of_poles(),
                       .dt = f.memory.copy(time_steps(f.rows))};
  if (!f.backward) {
    const S4Spectrum call = {.problem = p, .out = f.of_nodes()};
    return f.report(state, kSpectrum, Filters::kComplex, 4, [&](cudaStream_t s) { s4_spectrum(call, s); });
  }
  const S4SpectrumBackward call = {.problem = p,
                                   .dout = f.of_nodes(),
                                   .dw = f.of_poles(),
                                   .dP = f.of_poles(),
                                   .dB = f.of_poles(),
                                   .dC = f.of_poles(),
                                   .ddt = f.memory.take<float>(f.rows),
                                   .workspace = f.memory.take<char>(int64_t(s4_spectrum_backward_workspace(p)))};
  f.report(state, kSpectrumBackward, Filters::kComplex, 8, [&](cudaStream_t s) { s4_spectrum_backward(call, s); });
}

// One token of each of many sequences: the states read and written.
void step(nvbench::state& state) {
  constexpr int64_t kChannels = 1024, kElement = 2, kComplex = Filters::kComplex;
  const int64_t sequences = state.get_int64("Sequences"), states = sequences * kChannels * kPoles;
  DeviceMemory memory;
  std::vector<int32_t> cu;
  for (int64_t i = 0; i <= sequences; ++i) cu.push_back(int32_t(i));
  const auto of_poles = [&] { return constant(memory, kChannels * kPoles * kComplex); };
  const S4Step call = {.dtype = Dtype::bf16,
                       .total = sequences,
                       .sequences = sequences,
                       .channels = kChannels,
                       .filters = 1,
                       .poles = kPoles,
                       .rank = 1,
                       .zoh = false,
                       .cu_seqlens = memory.copy(cu),
                       .u = {constant(memory, sequences * kChannels * kElement), kChannels},
                       .w = memory.copy(poles(std::vector<float>(kChannels, 1.0f))),
                       .P = of_poles(),
                       .B = of_poles(),
                       .C = of_poles(),
                       .dt = memory.copy(time_steps(kChannels)),
                       .D = nullptr,
                       .pool = constant(memory, states * kComplex),
                       .slots = sequences,
                       .indices = nullptr,
                       .out = constant(memory, sequences * kChannels * kElement)};
  measure(state, [&](cudaStream_t s) { s4_step(call, s); });
  add_milliseconds(state);
  add_bytes(state, 2.0 * double(states * kComplex) + 4.0 * kChannels * kPoles * kComplex +
                       2.0 * double(sequences * kChannels * kElement));
}

NVBENCH_BENCH(cauchy)
    .set_name("cauchy")
    .add_string_axis("Direction", {"forward", "backward"})
    .add_int64_axis("Rows", {256, 1024})
    .add_int64_axis("Nodes", {4096, 16384})
    .set_criterion_param_float64("min-time", 0.05)
    .set_timeout(1);
NVBENCH_BENCH(vandermonde)
    .set_name("vandermonde")
    .add_string_axis("Direction", {"forward", "backward"})
    .add_int64_axis("Rows", {256, 1024})
    .add_int64_axis("Nodes", {4096, 16384})
    .set_criterion_param_float64("min-time", 0.05)
    .set_timeout(1);
NVBENCH_BENCH(spectrum)
    .set_name("s4_spectrum")
    .add_string_axis("Direction", {"forward", "backward"})
    .add_int64_axis("Rows", {256, 1024})
    .add_int64_axis("Nodes", {4096, 16384})
    .set_criterion_param_float64("min-time", 0.05)
    .set_timeout(1);
NVBENCH_BENCH(step)
    .set_name("s4_step")
    .add_int64_axis("Sequences", {1, 64, 512})
    .set_criterion_param_float64("min-time", 0.05)
    .set_timeout(1);

}  // namespace
}  // namespace packseq::bench
