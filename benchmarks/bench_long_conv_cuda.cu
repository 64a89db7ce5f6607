// The long convolution on the GPU through the C++ API, filters as long as the longest sequence: milliseconds, GB/s,
// each tensor counted once, and the part of what a device copy reaches.
#include "gpu_report.cuh"
#include "longconv/longconv.h"
#include "longconv_cases.h"

namespace packseq::bench {
namespace {

const std::vector<LongConvCase>& cases() {
  static const std::vector<LongConvCase> all = longconv_cases();
  return all;
}

char* rows(DeviceMemory& memory, const LongConvCase& c) {
  return constant(memory, c.elements() * int64_t(size_of(c.dtype)));
}

char* filter(DeviceMemory& memory, const LongConvCase& c) {
  return constant(memory, c.channels * c.taps() * int64_t(sizeof(float)));
}

LongConvProblem problem_of(const LongConvCase& c, DeviceMemory& memory) {
  return {.dtype = c.dtype,
          .total = c.total(),
          .sequences = int64_t(c.lengths.size()),
          .channels = c.channels,
          .cu_seqlens = memory.copy(c.cu_seqlens()),
          .reverse = false,
          .u = {rows(memory, c), c.channels},
          .pre_gate = {},
          .gate = {},
          .k = filter(memory, c),
          .k_after = nullptr,
          .taps = c.taps(),
          .taps_after = 0,
          .D = nullptr};
}

void forward(nvbench::state& state) {
  const LongConvCase& c = find_case(cases(), state.get_string("Case"));
  DeviceMemory memory;
  const LongConvProblem p = problem_of(c, memory);
  const LongConvForward call = {
      .problem = p, .out = rows(memory, c), .workspace = memory.take<char>(int64_t(long_conv_forward_workspace(p)))};
  measure(state, [&](cudaStream_t stream) { long_conv_forward(call, stream); });
  add_milliseconds(state);
  add_bytes(state, c.bytes(false));
}

void backward(nvbench::state& state) {
  const LongConvCase& c = find_case(cases(), state.get_string("Case"));
  DeviceMemory memory;
  const LongConvProblem p = problem_of(c, memory);
  const LongConvBackward call = {.problem = p,
                                 .dout = {rows(memory, c), c.channels},
                                 .du = rows(memory, c),
                                 .dpre_gate = nullptr,
                                 .dgate = nullptr,
                                 .dk = filter(memory, c),
                                 .dk_after = nullptr,
                                 .dD = nullptr,
                                 .workspace = memory.take<char>(int64_t(long_conv_backward_workspace(p)))};
  measure(state, [&](cudaStream_t stream) { long_conv_backward(call, stream); });
  add_milliseconds(state);
  add_bytes(state, c.bytes(true));
}

NVBENCH_BENCH(forward)
    .set_name("long_conv_forward")
    .add_string_axis("Case", names_of(cases()))
    .set_criterion_param_float64("min-time", 0.05)
    .set_timeout(1);
NVBENCH_BENCH(backward)
    .set_name("long_conv_backward")
    .add_string_axis("Case", names_of(cases()))
    .set_criterion_param_float64("min-time", 0.05)
    .set_timeout(1);

}  // namespace
}  // namespace packseq::bench
