// What mma.sync gives, out of registers and fed from shared memory, by rows a warp and warps an SM.
#include "gpu_report.cuh"
#include "mma_loop.cuh"

namespace packseq::bench {
namespace {

constexpr int kIterations = 4096;

template <int kRows>
void mma(nvbench::state& state) {
  const bool shared = state.get_string("Operands") == "shared";
  const int64_t blocks =
      state.get_int64("Warps an SM") / (kMmaThreads / 32) * device_attribute(cudaDevAttrMultiProcessorCount);
  const auto kernel = shared ? mma_shared_kernel<kRows> : mma_registers_kernel<kRows>;
  state.exec(nvbench::exec_tag::no_batch, [&](nvbench::launch& call) {
    launch("mma loop", kernel, blocks, kMmaThreads, 0, call.get_stream(), {.iterations = kIterations, .sink = nullptr});
  });
  add_flops(state, mma_loop_flops<kRows>(double(blocks) * (kMmaThreads / 32.0), kIterations), 0);
}

void mma_rows(nvbench::state& state) { state.get_int64("Rows a warp") == 16 ? mma<1>(state) : mma<2>(state); }

NVBENCH_BENCH(mma_rows)
    .set_name("mma_sync_bf16")
    .add_string_axis("Operands", {"registers", "shared"})
    .add_int64_axis("Rows a warp", {16, 32})
    .add_int64_axis("Warps an SM", {4, 8, 16})
    .set_criterion_param_float64("min-time", 0.05)
    .set_throttle_threshold(0)
    .set_timeout(1);

}  // namespace
}  // namespace packseq::bench
