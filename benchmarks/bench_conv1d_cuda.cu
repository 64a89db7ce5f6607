// The causal convolution on the GPU through the C++ API: GB/s, each tensor counted once, and the part of what a device
// copy reaches.
#include "case_lengths.h"
#include "conv1d_cases.h"
#include "device_memory.cuh"
#include "gpu_report.cuh"

namespace packseq::bench {
namespace {

const std::vector<Conv1dCase>& cases() {
  static const std::vector<Conv1dCase> all = {
      {"8x2048 D4096", std::vector<int>(8, 2048), 4096},
      {"8x2048 D4096 f32", std::vector<int>(8, 2048), 4096, Dtype::f32},
      {"8x2048 D2048", std::vector<int>(8, 2048), 2048},
      {"64x512 D3072", std::vector<int>(64, 512), 3072},
      {"1x131072 D3072", {131072}, 3072},
      {"packed 20 of 16384 D4096", log_normal_lengths(20, 16384), 4096},
      {"packed 600 of 16384 D4096", log_normal_lengths(600, 16384), 4096},
      {"4096x4 D4096", std::vector<int>(4096, 4), 4096},
      {"8x2048 D4097, no vectors", std::vector<int>(8, 2048), 4097},
  };
  return all;
}

char* tensor(DeviceMemory& memory, const Conv1dCase& c) {
  return constant(memory, c.elements() * int64_t(size_of(c.dtype)));
}

Conv1dProblem problem_of(const Conv1dCase& c, DeviceMemory& memory) {
  return c.problem(memory.copy(c.cu_seqlens()), tensor(memory, c),
                   memory.copy(std::vector<float>(size_t(c.channels) * 4, 0.25f)),
                   memory.copy(std::vector<float>(size_t(c.channels), 0.1f)));
}

void forward(nvbench::state& state) {
  const Conv1dCase& c = find_case(cases(), state.get_string("Case"));
  DeviceMemory memory;
  const Conv1dForward call = {.problem = problem_of(c, memory), .out = tensor(memory, c), .final_states = nullptr};
  measure(state, [&](cudaStream_t stream) { conv1d_forward(call, stream); });
  add_bytes(state, c.bytes(false));
}

void backward(nvbench::state& state) {
  const Conv1dCase& c = find_case(cases(), state.get_string("Case"));
  DeviceMemory memory;
  const Conv1dProblem p = problem_of(c, memory);
  const Conv1dBackward call = {.problem = p,
                               .dout = {tensor(memory, c), c.channels},
                               .dfinal_states = nullptr,
                               .dx = tensor(memory, c),
                               .dweight = memory.take<float>(int64_t(c.channels) * p.width),
                               .dbias = memory.take<float>(c.channels),
                               .dinitial_states = nullptr,
                               .workspace = memory.take<char>(int64_t(conv1d_backward_workspace(p)))};
  measure(state, [&](cudaStream_t stream) { conv1d_backward(call, stream); });
  add_bytes(state, c.bytes(true));
}

// One token of each of many sequences: its row, and its state read and written.
void step(nvbench::state& state) {
  const int64_t sequences = state.get_int64("Sequences");
  const Conv1dCase c = {"step", std::vector<int>(size_t(sequences), 1), 4096};
  DeviceMemory memory;
  const int64_t states = c.elements() * 3;
  const Conv1dStep call = {.problem = problem_of(c, memory),
                           .pool = memory.take<uint16_t>(states),
                           .slots = sequences,
                           .indices = nullptr,
                           .out = tensor(memory, c)};
  check_cuda(cudaMemset(call.pool, 0, size_t(states) * 2), "pool");
  measure(state, [&](cudaStream_t stream) { conv1d_step(call, stream); });
  add_bytes(state, c.bytes(false) + 2.0 * 2 * double(states));
}

NVBENCH_BENCH(forward)
    .set_name("conv1d_forward")
    .add_string_axis("Case", names_of(cases()))
    .set_criterion_param_float64("min-time", 0.05)
    .set_timeout(1);
NVBENCH_BENCH(backward)
    .set_name("conv1d_backward")
    .add_string_axis("Case", names_of(cases()))
    .set_criterion_param_float64("min-time", 0.05)
    .set_timeout(1);
NVBENCH_BENCH(step)
    .set_name("conv1d_step")
    .add_int64_axis("Sequences", {1, 64, 512, 4096})
    .set_criterion_param_float64("min-time", 0.05)
    .set_timeout(1);

}  // namespace
}  // namespace packseq::bench
