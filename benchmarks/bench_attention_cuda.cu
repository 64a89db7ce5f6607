// Attention on the GPU through the C++ API, bfloat16, forward and backward, over attention_cases.txt; also as a step of
// a ring, which adds its results in float32 to those of other keys.
#include "attention/attention.h"
#include "attention_cases.h"
#include "device_memory.cuh"
#include "gpu_report.cuh"
#include "mma_loop.cuh"

namespace packseq::bench {
namespace {

using Half = __nv_bfloat16;

struct Fill {
  Half* data;
  int64_t count;
  uint32_t seed;
};

// Standard normal, by Box and Muller's formula over hashed indices.
__global__ void fill_kernel(const __grid_constant__ Fill fill) {
  const int64_t i = blockIdx.x * int64_t(blockDim.x) + threadIdx.x;
  if (i >= fill.count) return;
  uint64_t x = (uint64_t(fill.seed) << 40) + uint64_t(i) + 1;
  x *= 0x9E3779B97F4A7C15u;
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
  x ^= x >> 27;
  const float u = (float(uint32_t(x)) + 1) * 0x1p-32f, angle = float(x >> 32) * 0x1p-32f;
  fill.data[i] = Half(sqrtf(-2 * logf(u)) * cospif(2 * angle));
}

Half* normal(DeviceMemory& memory, int64_t count, uint32_t seed) {
  Half* data = memory.take<Half>(count);
  launch("fill", fill_kernel, (count + 255) / 256, 256, 0, nullptr, {.data = data, .count = count, .seed = seed});
  return data;
}

AttentionBackward prepare(const Case& c, DeviceMemory& memory) {
  const int64_t total = c.total(), count = total * c.heads * c.dim, token = int64_t(c.heads) * c.dim;
  const int32_t* cu_seqlens = memory.copy(c.cu_seqlens());
  uint32_t seed = 0;
  const auto input = [&] { return Packed{.data = normal(memory, count, ++seed), .token = token, .head = c.dim}; };
  AttentionBackward call{};
  call.problem = {.dtype = Dtype::bf16,
                  .total_q = total,
                  .total_k = total,
                  .sequences = int64_t(c.lengths.size()),
                  .heads = c.heads,
                  .kv_heads = c.heads,
                  .dim = c.dim,
                  .dim_v = c.dim,
                  .cu_seqlens_q = cu_seqlens,
                  .cu_seqlens_k = cu_seqlens,
                  .q = input(),
                  .k = input(),
                  .v = input(),
                  .scale = 1 / std::sqrt(double(c.dim)),
                  .causal = c.causal,
                  .window_left = -1,
                  .window_right = -1,
                  .sink_tokens = 0,
                  .softcap = 0,
                  .alibi_slopes = nullptr,
                  .sinks = nullptr};
  call.dout = input();
  call.dq = memory.take<Half>(count);
  call.dk = memory.take<Half>(count);
  call.dv = memory.take<Half>(count);
  call.workspace = memory.take<char>(int64_t(attention_backward_workspace(call)));
  return call;
}

// Of the device under test, once a run.
double mma_peak(cudaStream_t stream) {
  static const double peak = measure_mma_peak(stream);
  return peak;
}

const std::vector<Case>& cases() {
  static const std::vector<Case> all = attention_cases("gpu");
  return all;
}

template <bool kBackward, bool kAdds>
void attention(nvbench::state& state) {
  const Case& c = find_case(cases(), state.get_string("Case"));
  const cudaStream_t stream = state.get_cuda_stream();
  const double peak = mma_peak(stream);
  DeviceMemory memory;
  AttentionBackward backward = prepare(c, memory);
  AttentionForward forward = {.problem = backward.problem,
                              .out = memory.take<Half>(c.total() * c.heads * c.dim),
                              .lse = memory.take<float>(c.total() * c.heads),
                              .workspace = memory.take<char>(int64_t(attention_forward_workspace(backward.problem)))};
  backward.out = forward.out;
  backward.lse = forward.lse;
  check_cuda(cudaDeviceSynchronize(), "inputs");
  attention_forward(forward, stream);
  check_cuda(cudaStreamSynchronize(stream), "attention");
  if constexpr (kAdds) {
    const int64_t rows = c.total() * c.heads;
    const auto zeros = [&](int64_t count) {
      float* x = memory.take<float>(count);
      check_cuda(cudaMemset(x, 0, size_t(count) * sizeof(float)), "zeros");
      return x;
    };
    forward.out = zeros(rows * c.dim);
    forward.sums = zeros(rows * 2);
    backward.out = nullptr;
    backward.delta = zeros(rows);
    for (void** gradient : {&backward.dq, &backward.dk, &backward.dv}) *gradient = zeros(rows * c.dim);
  }

  state.add_global_memory_reads(size_t(c.bytes(kBackward, sizeof(Half))), "least bytes");
  state.exec(nvbench::exec_tag::no_batch, [&](nvbench::launch& call) {
    if constexpr (kBackward) {
      attention_backward(backward, call.get_stream());
    } else {
      attention_forward(forward, call.get_stream());
    }
  });
  add_flops(state, c.flops(kBackward), peak);
}

void attention_forward_bf16(nvbench::state& state) { attention<false, false>(state); }
void attention_backward_bf16(nvbench::state& state) { attention<true, false>(state); }
void ring_step_forward_bf16(nvbench::state& state) { attention<false, true>(state); }
void ring_step_backward_bf16(nvbench::state& state) { attention<true, true>(state); }

// Short, so that the table takes a minute; the clock falls under such loads, which is no reason to leave runs out.
#define PACKSEQ_BENCH(name)                           \
  NVBENCH_BENCH(name)                                 \
      .add_string_axis("Case", names_of(cases()))     \
      .set_criterion_param_float64("min-time", 0.05)  \
      .set_criterion_param_float64("max-noise", 0.01) \
      .set_throttle_threshold(0)                      \
      .set_timeout(1)
PACKSEQ_BENCH(attention_forward_bf16);
PACKSEQ_BENCH(attention_backward_bf16);
PACKSEQ_BENCH(ring_step_forward_bf16);
PACKSEQ_BENCH(ring_step_backward_bf16);

}  // namespace
}  // namespace packseq::bench
