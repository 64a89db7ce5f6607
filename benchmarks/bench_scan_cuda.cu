// The selective scan on the GPU through the C++ API: milliseconds, steps (a state of a channel at a token) a second,
// and the part of what one exp2 a step leaves possible.
#include <cstring>
#include <string>

#include "device_memory.cuh"
#include "gpu_report.cuh"
#include "scan/scan.h"
#include "scan_cases.h"

namespace packseq::bench {
namespace {

const std::vector<ScanCase>& cases() {
  static const std::vector<ScanCase> all = scan_cases();
  return all;
}

// Small numbers of both signs in the tensors' type.
void* tensor(DeviceMemory& memory, int64_t count, Dtype t) {
  std::vector<uint16_t> half(t == Dtype::f32 ? 0 : size_t(count));
  std::vector<float> single(t == Dtype::f32 ? size_t(count) : 0);
  uint32_t state = 1;
  for (int64_t i = 0; i < count; ++i) {
    state = state * 1664525 + 1013904223;
    const float x = float(int32_t(state)) * 0x1p-31f;
    if (t == Dtype::f32) {
      single[size_t(i)] = x;
    } else {
      uint32_t bits;
      std::memcpy(&bits, &x, 4);
      half[size_t(i)] = uint16_t(bits >> 16);  // bfloat16
    }
  }
  return t == Dtype::f32 ? static_cast<void*>(memory.copy(single)) : memory.copy(half);
}

// As a Mamba block calls it: B and C of every token, D, z, a bias and softplus.
ScanProblem problem_of(const ScanCase& s, DeviceMemory& memory) {
  std::vector<int32_t> cu = {0};
  for (int n : s.lengths) cu.push_back(cu.back() + n);
  std::vector<float> A(size_t(s.channels) * s.states);
  for (size_t i = 0; i < A.size(); ++i) A[i] = -float(1 + i % size_t(s.states));
  const std::vector<float> vector(size_t(s.channels), 0.1f), bias(size_t(s.channels), -3.0f);
  const auto rows = [&] { return Rows{tensor(memory, s.elements(), s.dtype), s.channels}; };
  const auto matrix = [&] {
    return StateMatrix{{tensor(memory, s.total() * s.states, s.dtype), s.states, s.states}, nullptr};
  };
  return {.dtype = s.dtype,
          .complex = false,
          .total = s.total(),
          .sequences = int64_t(s.lengths.size()),
          .channels = s.channels,
          .states = s.states,
          .groups = 1,
          .cu_seqlens = memory.copy(cu),
          .reverse = false,
          .delta_softplus = true,
          .u = rows(),
          .delta = rows(),
          .z = rows(),
          .A = memory.copy(A),
          .B = matrix(),
          .C = matrix(),
          .D = memory.copy(vector),
          .delta_bias = memory.copy(bias),
          .initial_states = nullptr};
}

// 16 results of the special-function units a clock and multiprocessor.
double exp2_rate() {
  return 16.0 * device_attribute(cudaDevAttrMultiProcessorCount) * device_attribute(cudaDevAttrClockRate) * 1e3;
}

template <class F>
void measure_steps(nvbench::state& state, const ScanCase& s, const F& run) {
  measure(state, run);
  const double rate = s.steps() / gpu_seconds(state);
  add_milliseconds(state);
  add_column(state, "Gsteps/s", rate * 1e-9);
  add_column(state, "of exp2 rate", rate / exp2_rate(), "percentage");
}

void forward(nvbench::state& state) {
  const ScanCase& s = find_case(cases(), state.get_string("Case"));
  DeviceMemory memory;
  const ScanProblem p = problem_of(s, memory);
  const ScanForward call = {.problem = p,
                            .out = memory.take<char>(s.elements() * int64_t(size_of(s.dtype))),
                            .final_states = memory.take<float>(p.sequences * s.channels * s.states),
                            .workspace = memory.take<char>(int64_t(scan_forward_workspace(p)))};
  measure_steps(state, s, [&](cudaStream_t stream) { scan_forward(call, stream); });
}

void backward(nvbench::state& state) {
  const ScanCase& s = find_case(cases(), state.get_string("Case"));
  DeviceMemory memory;
  const ScanProblem p = problem_of(s, memory);
  const int64_t item = int64_t(size_of(s.dtype)), matrix = s.total() * s.states * item;
  const ScanBackward call = {.problem = p,
                             .dout = {tensor(memory, s.elements(), s.dtype), s.channels},
                             .dfinal_states = nullptr,
                             .du = memory.take<char>(s.elements() * item),
                             .ddelta = memory.take<char>(s.elements() * item),
                             .dz = memory.take<char>(s.elements() * item),
                             .dA = memory.take<float>(int64_t(s.channels) * s.states),
                             .dB = memory.take<char>(matrix),
                             .dC = memory.take<char>(matrix),
                             .dD = memory.take<float>(s.channels),
                             .ddelta_bias = memory.take<float>(s.channels),
                             .dinitial_states = nullptr,
                             .workspace = memory.take<char>(int64_t(scan_backward_workspace(p)))};
  measure_steps(state, s, [&](cudaStream_t stream) { scan_backward(call, stream); });
}

// One token of each of many sequences: the share of a device copy's rate that the states' bytes reach.
void step(nvbench::state& state) {
  const int64_t sequences = state.get_int64("Sequences");
  const ScanCase s = {"step", Dtype::bf16, 5120, std::vector<int>(size_t(sequences), 1)};
  DeviceMemory memory;
  const int64_t states = sequences * s.channels * s.states;
  const ScanStep call = {.problem = problem_of(s, memory),
                         .pool = memory.take<float>(states),
                         .slots = sequences,
                         .indices = nullptr,
                         .out = memory.take<char>(s.elements() * 2)};
  check_cuda(cudaMemset(call.pool, 0, size_t(states) * sizeof(float)), "pool");
  measure_steps(state, s, [&](cudaStream_t stream) { scan_step(call, stream); });
  add_bytes(state, 2.0 * sizeof(float) * double(states) + 4.0 * 2 * double(s.elements()));
}

NVBENCH_BENCH(forward)
    .set_name("scan_forward")
    .add_string_axis("Case", names_of(cases()))
    .set_criterion_param_float64("min-time", 0.05)
    .set_timeout(1);
NVBENCH_BENCH(backward)
    .set_name("scan_backward")
    .add_string_axis("Case", names_of(cases()))
    .set_criterion_param_float64("min-time", 0.05)
    .set_timeout(1);
NVBENCH_BENCH(step)
    .set_name("scan_step")
    .add_int64_axis("Sequences", {1, 64, 512})
    .set_criterion_param_float64("min-time", 0.05)
    .set_timeout(1);

}  // namespace
}  // namespace packseq::bench
